from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

import acamkd as package
import tiny
from acamkd import config, data, models
from acamkd.data.scenes import CLASSES
from acamkd.data.statistics import count
from acamkd.errors import AcamkdError
from acamkd.jobs.init import init as module
from acamkd.jobs.init.choices import CPU
from acamkd.jobs.init.init import init
from acamkd.jobs.inspect_layers import LEVEL_DECAY, RATIOS
from acamkd.jobs.setup import Batches
from acamkd.models.base import Task
from command import Command

NAMES = ["background", *CLASSES]
FCOS: dict[str, Any] = {"arch": "fcos", "backbone": "test_efficientnet", "fpn_channels": 64}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The smallest networks, and recipes in the test's own folder."""
    fpn: dict[str, Any] = {"arch": "fpn", "backbone": "tu-test_efficientnet"}
    networks: dict[Task, tuple[dict[str, Any], dict[str, Any]]] = {
        "detection": (FCOS, FCOS),
        "segmentation": (fpn, fpn),
    }
    machine = dataclasses.replace(CPU, networks=networks, longest={"detection": 64, "segmentation": 64})
    monkeypatch.setattr(module, "this_machine", lambda: machine)
    monkeypatch.chdir(tmp_path)


def test_a_detectors_recipe_is_short_explained_and_loads(tmp_path: Path) -> None:
    root = tiny.write_data(tmp_path / "cells", "detection")
    proposal = init(root)
    assert proposal.file == Path("cells.yaml")
    text = proposal.file.read_text()
    lines = text.splitlines()
    assert len(lines) <= 40
    bare = [line for line in lines if "#" not in line and not line.endswith(":")]
    assert [line.split(":")[0].strip() for line in bare] == ["task", "root"]  # all else has its reason
    recipe = config.load(proposal.file)
    assert (recipe.task, recipe.data.format, recipe.data.root) == ("detection", "coco", root)
    assert recipe.student.inherit == ("head", "backbone.fpn.layer_blocks")
    (loss,) = recipe.losses
    assert (loss.name, loss.pairs, loss.weight) == ("acam", ("backbone:*",), "auto")
    assert (loss.gradient_ratio, recipe.train.optimizer.lr) == (0.5, 1e-3)  # no image is unlabeled
    assert recipe.train.batch_size == 2
    assert f"about {recipe.train.epochs * 4:,} steps" in text
    assert proposal.estimate is not None
    assert proposal.estimate.seconds > 0
    assert len(Batches(recipe).splits["train"]) == 8
    assert any("no unlabeled images" in warning for warning in proposal.warnings)
    shown = str(proposal)
    assert all(command in shown for command in (*proposal.commands, "acamkd run cells.yaml"))
    with pytest.raises(AcamkdError, match=r"cells\.yaml is there already"):
        init(root)
    init(root, overwrite=True)


def test_a_segmenters_recipe_with_a_drawn_validation_split(tmp_path: Path) -> None:
    root = tiny.write_data(tmp_path / "data")
    shutil.rmtree(root / "images/val")
    shutil.rmtree(root / "masks/val")
    (root / "unlabeled").mkdir()
    shutil.copy(next((root / "images/train").iterdir()), root / "unlabeled")
    before = sorted(root.rglob("*"))
    proposal = init(root, classes=NAMES, out="recipes/drawn.yaml")
    assert sorted(root.rglob("*")) == before
    recipe = config.load(proposal.file)
    assert recipe.data.val.share == 0.2
    assert recipe.data.unlabeled == Path("unlabeled")
    assert not any("no unlabeled" in warning for warning in proposal.warnings)
    (loss,) = recipe.losses
    assert (loss.gradient_ratio, loss.options["num_masks"], recipe.train.optimizer.lr) == (8, 6, 3e-3)
    splits = Batches(recipe).splits
    assert (len(splits["train"]), len(splits["val"])) == (6, 2)
    assert not set(splits["train"].files) & set(splits["val"].files)


def test_one_name_less_than_values_makes_the_last_one_void(tmp_path: Path) -> None:
    root = tiny.write_data(tmp_path / "data")
    recipe = config.load(init(root, classes=NAMES[:-1], unlabeled="data/images/val").file)
    assert recipe.data.ignore_index == len(NAMES) - 1
    assert recipe.data.unlabeled == root / "images/val"  # as a shell completes it
    with pytest.raises(AcamkdError, match=r"the values 0 to 5, but there are 2 names .*: give --classes"):
        init(root, classes=NAMES[:2], overwrite=True)


def test_a_recipe_that_cannot_be_written_is_told_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(AcamkdError, match=f"{tmp_path} is a folder: --out takes the name of a file"):
        init(tmp_path / "nowhere", out="~")
    with pytest.raises(AcamkdError, match=r"cannot write .*test_init\.py: File exists; --out writes elsewhere"):
        init(tmp_path / "nowhere", out=Path(__file__, "cells.yaml"))


def test_a_file_whose_name_has_blanks_loads_and_its_commands_are_quoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_measured", lambda recipe: None)  # which takes seconds
    root = tiny.write_data(tmp_path / "cells", "detection")
    proposal = init(root, out="my cells.yaml")
    assert proposal.file.name == "my cells.yaml"
    assert config.load(proposal.file).name == "my_cells"
    assert proposal.commands[1] == "acamkd train 'my cells.yaml'"
    assert "acamkd run 'my cells.yaml'   #" in str(proposal)
    assert "# acamkd run 'my cells.yaml' trains" in proposal.file.read_text()
    assert "name:" not in init(root, out="cells.yaml").file.read_text().split("losses:")[0]
    assert config.load(init(root, out="...yaml").file).name == "recipe"  # `..` would name the parent


def test_masks_of_0_and_255_get_their_meaning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_measured", lambda recipe: None)  # which takes seconds
    root = tiny.write_data(tmp_path / "data")
    for file in (root / "masks").rglob("*.png"):
        with Image.open(file) as mask:
            binary = mask.point(lambda value: 255 * (value > 0))
        binary.save(file)
    proposal = init(root, classes=["background", "thing"])
    recipe = config.load(proposal.file)
    assert recipe.data.mask_values == {"0": "background", "255": "thing"}
    assert "# the masks hold no 0, 1, 2, ...: a name for each value" in proposal.file.read_text()
    dataset = data.build(recipe.data, "segmentation", "train", seed=0, augment=False)
    assert all(count(dataset, decode=False).classes.values())
    # VOC's masks, which bring names of their own, are read in the same way where others are given.
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    for split in ("train", "val"):
        names = [file.stem for file in (root / "masks" / split).iterdir()]
        (root / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(names))
        for kind, folder in (("masks", "SegmentationClass"), ("images", "JPEGImages")):
            shutil.copytree(root / kind / split, root / folder, dirs_exist_ok=True)
            shutil.rmtree(root / kind / split)
    recipe = config.load(init(root, classes=["background", "thing"], overwrite=True).file)
    assert recipe.data.format == "voc"
    assert recipe.data.mask_values == {"0": "background", "255": "thing"}


def test_masks_in_color_need_mask_values(tmp_path: Path) -> None:
    root = tiny.write_data(tmp_path / "data")
    for file in (root / "masks").rglob("*.png"):
        Image.new("RGB", (8, 8)).save(file)
    with pytest.raises(
        AcamkdError, match=r"the masks hold colors, .* --classes sky,road,\.\.\.; .* data\.mask_values: "
    ):
        init(root)


def test_masks_with_problems_are_not_measured_and_the_recipe_names_them(tmp_path: Path) -> None:
    root = tiny.write_data(tmp_path / "data")
    for file in (root / "masks").rglob("*.png"):
        with Image.open(file) as mask:
            colored = mask.convert("RGB")
        colored.save(file)
    proposal = init(root, classes=NAMES)
    assert proposal.estimate is None
    (problem,) = [warning for warning in proposal.warnings if "problems to be mended first" in warning]
    assert "it is of mode RGB" in problem
    assert "say which color is which class with data.mask_values" in problem
    assert config.load(proposal.file).data.classes == tuple(NAMES)


def test_unlabeled_or_scored_images_among_the_labeled_ones_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_measured", lambda recipe: None)  # which takes seconds
    root = tmp_path / "flat"
    files = sorted((tiny.write_data(tmp_path / "data", "detection") / "images/train").iterdir())
    for folder in ("images", "images/unlabeled", "labels"):
        (root / folder).mkdir(parents=True)
    for number, file in enumerate(files):
        shutil.copy(file, root / "images" / ("unlabeled" if number > 5 else ""))
        if number < 6:
            (root / f"labels/{file.stem}.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    with pytest.raises(AcamkdError, match=r"images/unlabeled \(unlabeled\) lies in .*/images \(train\)"):
        init(root, classes=["cell"])
    (root / "images/unlabeled").rename(root / "unlabeled")
    recipe = config.load(init(root, classes=["cell"]).file)
    assert (recipe.data.classes, recipe.data.unlabeled) == (("cell",), Path("unlabeled"))
    for kind in ("images", "labels"):
        (root / kind / "val").mkdir()
        for file in files[:2]:
            name = file.name if kind == "images" else f"{file.stem}.txt"
            (root / kind / name).rename(root / kind / "val" / name)
    with pytest.raises(AcamkdError, match=r"images/val \(val\) lies in .*/images \(train\), .*: move it beside"):
        init(root, classes=["cell"], overwrite=True)


def test_unlabeled_images_that_are_not_there_are_told(tmp_path: Path) -> None:
    root = tiny.write_data(tmp_path / "data")
    with pytest.raises(AcamkdError, match=r"--unlabeled more: there is no such folder, neither in .*data nor in the"):
        init(root, classes=NAMES, unlabeled="more")
    (root / "more").mkdir()
    with pytest.raises(AcamkdError, match=r"data/more: the folder holds no images"):
        init(root, classes=NAMES, unlabeled="more")


def test_what_is_missing_is_asked_or_an_error(tmp_path: Path, acamkd: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tiny.write_data(tmp_path / "data")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False)
    failed = acamkd("init", root)
    assert failed.code == 1
    assert "--classes sky,road" in " ".join(failed.err.split())
    asked: list[str] = []

    def answer(question: str) -> str:
        asked.append(question)
        return " , ".join(NAMES)

    init(root, ask=answer)
    assert ["0 to 5" in question for question in asked] == [True]
    assert config.load(Path("data.yaml")).data.classes == tuple(NAMES)


def test_a_folder_of_boxes_and_masks_needs_a_task(tmp_path: Path) -> None:
    root = tiny.write_data(tmp_path / "both", "detection")
    shutil.copytree(tiny.write_data(tmp_path / "other") / "masks", root / "masks")
    with pytest.raises(AcamkdError, match="good for detection and segmentation: say which with --task"):
        init(root)
    assert config.load(init(root, ask=lambda _question: "det").file).task == "detection"
    tiny.write_data(tmp_path / "boxes", "detection")
    with pytest.raises(AcamkdError, match="nothing for segmentation, only for detection"):
        init(tmp_path / "boxes", task="segmentation")


def test_numbers_of_classes_without_names_are_asked_for(tmp_path: Path) -> None:
    root = tmp_path / "shards"
    root.mkdir()
    picture, label = BytesIO(), json.dumps({"objects": [{"bbox": [1, 2, 3, 4], "category": 1}]}).encode()
    Image.new("RGB", (64, 64)).save(picture, "PNG")
    for split in ("train", "val"):
        with tarfile.open(root / f"{split}-000000.tar", "w") as tar:
            for name, content in (("a.png", picture.getvalue()), ("a.json", label)):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, BytesIO(content))
    message = r"^nothing says what the numbers of the classes mean: give the names, --classes cat,dog,\.\.\.$"
    with pytest.raises(AcamkdError, match=message):
        init(root)


def test_a_segmenter_of_other_classes_is_no_teacher(tmp_path: Path) -> None:
    root = tiny.write_data(tmp_path / "data")
    file = root / "teacher.safetensors"
    (root / "recipe.yaml").write_text(config.dump(config.override(tiny.recipe(root), ["data.classes=[sky, road]"])))
    models.save_weights(models.build(config.Model(**tiny.FPN), "segmentation", 2).net, file)
    message = rf"^the teacher, fpn on .* with 2 classes, of the run {root}, has other classes than the data, 6: its log"
    with pytest.raises(AcamkdError, match=message):
        init(root, classes=NAMES, teacher=file)


def test_a_teachers_checkpoint_is_taken_over(tmp_path: Path) -> None:
    root = tiny.write_data(tmp_path / "data", "detection")
    section = config.Model.model_validate({
        "arch": "retinanet", "backbone": "mobilenetv3_small_050", "fpn_channels": 16, "backbone_weights": None,
    })  # fmt: skip
    for classes in (len(CLASSES), 80):
        models.save_weights(models.build(section, "detection", classes).net, tmp_path / "t.safetensors")
        recipe = config.load(init(root, teacher=tmp_path / "t.safetensors", overwrite=True).file)
        assert recipe.teacher is not None
        assert (recipe.teacher.arch, recipe.teacher.weights) == ("retinanet", str(tmp_path / "t.safetensors"))
        assert (recipe.student.arch, recipe.student.fpn_channels) == ("retinanet", 16)
        assert bool(recipe.student.inherit) == (classes == len(CLASSES))
        assert recipe.teacher.num_classes == (None if classes == len(CLASSES) else 80)


def test_the_guides_recommend_what_is_proposed() -> None:
    guides = Path(__file__).parents[3] / "docs/guides"
    for guide, task in (("detector", "detection"), ("segmenter", "segmentation")):
        block = (guides / f"{guide}.md").read_text(encoding="utf-8").split("```yaml\n")[1].split("```")[0]
        (loss,) = yaml.safe_load(block)["losses"]
        assert (loss["gradient_ratio"], loss["diversity_weight"]) == (RATIOS[task], 0.5)  # type: ignore[index]
        assert loss.get("level_decay") == (LEVEL_DECAY if task == "detection" else None)


def test_it_is_the_commands_function() -> None:
    assert package.init is init
