from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import tiny_recipes
from acamkd import cli, config, data, models
from acamkd.data.scenes import write_scenes
from acamkd.jobs import doctor
from acamkd.jobs.doctor import Finding, examine, ignorance
from acamkd.jobs.examine_data import examine_data
from acamkd.jobs.setup import build_network, build_teacher
from acamkd.models.base import VOID, TaskModel
from acamkd.models.weights import LoadReport


@pytest.fixture(scope="module")
def detection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_recipes.write_recipe(tmp_path_factory.mktemp("detection"), "detection")


@pytest.fixture(scope="module")
def segmentation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_recipes.write_recipe(tmp_path_factory.mktemp("segmentation"), "segmentation")


@pytest.fixture
def trained(segmentation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An override with a teacher that passes for trained: its batch norm has seen images, its score is good."""
    state = load_file(segmentation.parent / "teacher.safetensors")
    state = {name: x + 0.1 if name.endswith("running_var") else x for name, x in state.items()}
    save_file(state, tmp_path / "trained.safetensors")
    monkeypatch.setattr(doctor, "score", lambda _net, images, _scorer: {"mIoU": 60.0 * bool(list(images))})
    return f"teacher.weights={tmp_path / 'trained.safetensors'}"


def found(path: Path, *overrides: str) -> dict[str, list[Finding]]:
    """Findings by what was looked at."""
    result: dict[str, list[Finding]] = {}
    for finding in examine(config.load(path, overrides)):
        result.setdefault(finding.check, []).append(finding)
    return result


def test_a_sound_recipe_passes(segmentation: Path, trained: str) -> None:
    findings = found(segmentation, trained, "losses.0.weight=auto")
    assert {finding.status for group in findings.values() for finding in group} <= {"pass", "warn"}
    assert [finding.text for finding in findings["tap"]] == [
        "FitNet: segmentation_head.0 [6, 16, 16] <- segmentation_head.0 [6, 16, 16]"
    ]
    (weights,) = findings["teacher's weights"]
    assert "tensors matched" in weights.text
    (total,) = findings["gradient"]
    assert re.search(r"gradient-norm ratio \S+, before `weight: auto` sets fitnet$", total.text)
    assert {"gradient at encoder.model", "gradient at segmentation_head.0"} <= set(findings)
    assert found(segmentation, trained)["gradient"][0].text.partition(":")[0] == total.text.partition(":")[0]


def test_both_networks_are_on_one_device_after_the_score(
    segmentation: Path, trained: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    went: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(TaskModel, "to", lambda self, device: went.append(str(device)))
    recipe = config.load(segmentation, [trained, "train.accelerator=auto"])
    val = data.build(recipe.data, recipe.task, "val", seed=0, augment=False)
    assert recipe.teacher is not None
    teacher = build_teacher(recipe, recipe.teacher, val.classes)
    doctor._score(teacher, val, recipe)
    assert went == ["cuda:0", "cpu"]


def test_a_random_teacher_fails(detection: Path, segmentation: Path) -> None:
    for path in (detection, segmentation):
        findings = found(path)
        assert findings["teacher's score"][0].status == "fail"
        assert "weights were not trained on these classes" in findings["teacher's score"][0].advice
        assert findings["batch norm"][0].status == "fail"
        assert "statistics of an untrained network (" in findings["batch norm"][0].text
        assert findings["gradient"]  # goes on, so that all is mended in one go


def test_every_level_is_shown(detection: Path) -> None:
    taps = [finding.text for finding in found(detection)["tap"]]
    assert taps[0] == "FitNet: backbone:0 [16, 8, 8] <- backbone:0 [16, 8, 8]"
    assert len(taps) == 5
    heads = found(detection, "losses.0.name=crosskd", "losses.0.pairs=[]")["tap"]
    assert [finding.text for finding in heads] == ["CrossKD: 10 layers of the heads"]


@pytest.mark.parametrize(
    ("overrides", "check", "status", "text"),
    [
        (["losses.0.weight=1000"], "gradient", "warn", "gradient-norm ratio"),
        (["losses.0.weight=0"], "gradient", "fail", "no gradient of the distillation reaches the student"),
        (["losses.0.weight=1.0e+33"], "gradient", "fail", "distillation inf, task "),
        (["losses.0.pairs=[[segmentation_head.0, decoder.blocks]]"], "distillation", "fail", "there is no layer"),
        (["losses.0.pairs=[[segmentation_head.0, 'encoder:4']]"], "tap", "warn", "feature map is resampled"),
        (["losses.0.name=fgd"], "distillation", "fail", "needs boxes"),
        (["data.unlabeled=images/val", "losses.0.name=acam", "losses.0.mask_grad=task"], "distillation", "fail",
         "no loss can learn from unlabeled images"),
        (["student.mean=[0, 0, 0]"], "colors", "warn", "student 0.000 0.000 0.000 / "),
        (["train.batch_size=2"], "batch norm", "warn", "from 2 images at a time"),
        (["student.inherit=[neck]"], "student's weights", "fail", "no such part"),
        (["teacher.weights=null"], "teacher's weights", "fail", "the teacher has no weights"),
        (["teacher.options.decoder_pyramid_channels=16"], "teacher's weights", "fail", "every tensor is needed"),
        (["losses=[]"], "teacher's weights", "fail", "needs a `teacher` section and `losses`"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)  # fmt: skip
def test_what_is_wrong_is_found(
    segmentation: Path, trained: str, overrides: list[str], check: str, status: str, text: str
) -> None:
    finding = found(segmentation, trained, *overrides)[check][-1]
    assert finding.status == status
    assert text in finding.text
    assert finding.advice or status == "fail"


def test_a_missing_image_and_a_bad_box_of_the_validation_are_found(tmp_path: Path) -> None:
    recipe = tiny_recipes.write_recipe(tmp_path, "detection")
    next((tmp_path / "data/images/val").iterdir()).unlink()
    *_, last = examine(config.load(recipe))
    assert (last.check, last.status) == ("teacher's score", "fail")
    assert "images/val" in last.text
    assert "there is no such image" in last.text
    annotations = tmp_path / "data/annotations/instances_val.json"
    content = json.loads(annotations.read_text())
    content["annotations"][0]["bbox"] = [1, 1, -3, 4]
    annotations.write_text(json.dumps(content))
    (finding,) = examine(config.load(recipe))
    assert (finding.check, finding.status) == ("data", "fail")
    assert "has no area" in finding.text


def test_a_factory_may_bring_weights(segmentation: Path) -> None:
    recipe = config.load(segmentation)
    net = build_network(recipe, recipe.student, tuple(recipe.data.classes or ()))
    finding = doctor._weights("student's weights", net, config.Model(arch="own.nets:small"))
    assert (finding.status, finding.text) == ("pass", "as own.nets:small provides them")


def test_a_students_own_weights_are_counted(segmentation: Path, trained: str, tmp_path: Path) -> None:
    state = load_file(segmentation.parent / "teacher.safetensors")
    save_file({name: x for name, x in state.items() if "segmentation_head" not in name}, tmp_path / "part.safetensors")
    (finding,) = found(segmentation, trained, f"student.weights={tmp_path / 'part.safetensors'}")["student's weights"]
    assert finding.status == "warn"
    assert "2 missing (segmentation_head.0.weight, segmentation_head.0.bias)" in finding.text


def test_weights_are_counted_by_their_own_names(segmentation: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of another framework's detector are read by its convention, as when they were loaded."""
    recipe = config.load(segmentation)
    net = build_network(recipe, recipe.student, ("a", "b"))
    section = config.Model(arch="retinanet", backbone="torchvision/resnet50", weights="file",
                           options={"convention": "mmdetection"})  # fmt: skip
    asked: list[object] = []

    def load_weights(*_: object, **options: object) -> LoadReport:
        asked.append(options["convention"])
        return LoadReport("retinanet", "file", matched=("a",), missing=(), unexpected=(), deeper=(), mismatched=())

    monkeypatch.setattr(models, "load_weights", load_weights)
    assert doctor._weights("weights", net, section).status == "pass"
    assert asked == ["mmdetection"]


def test_knowing_nothing() -> None:
    mask = torch.tensor([[0, 0, 1, VOID]])
    assert ignorance([{"mask": mask}, {"mask": mask}], 5) == pytest.approx(100 * 2 / 3 / 2)


def test_a_teacher_of_other_classes_is_not_scored(segmentation: Path, tmp_path: Path) -> None:
    section = config.Model(**tiny_recipes.MODELS["segmentation"])
    models.save_weights(models.build(section, "segmentation", 9, (64, 64)).net, tmp_path / "nine.safetensors")
    overrides = [
        f"teacher.weights={tmp_path / 'nine.safetensors'}",
        "teacher.num_classes=9",
        "losses.0.pairs=[decoder]",
    ]
    findings = found(segmentation, *overrides)
    assert findings["teacher's score"] == [
        Finding("teacher's score", "pass", "not scored: it has 9 classes of its own, the data 6")
    ]
    assert findings["tap"][0].status == "pass"


def test_the_score_ends_in_time(segmentation: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SECONDS", -1.0)
    (finding,) = found(segmentation)["teacher's score"]
    assert "on 0 validation images" in finding.text
    assert finding.status == "warn"


def test_the_teacher_is_judged_on_images_from_all_over(
    segmentation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = config.load(segmentation)
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
        for number in range(80):
            pixels = np.zeros((8, 8), np.uint8)
            pixels[:, 4:] = number >= 70
            Image.fromarray(pixels).save(tmp_path / kind / f"{number:02d}.png")
    val = data.MaskFolder(tmp_path / "images", tmp_path / "masks", recipe.data.classes or ())
    assert recipe.teacher is not None
    teacher = build_teacher(recipe, recipe.teacher, val.classes)
    monkeypatch.setattr(doctor, "score", lambda _net, images, _scorer: {"mIoU": 100.0 * bool(list(images))})
    assert doctor._score(teacher, val, recipe).status == "pass"
    val.files, val.annotation_files = val.files[:70], val.annotation_files[:70]
    finding = doctor._score(teacher, val, recipe)
    assert finding.status == "warn"
    assert finding.text.endswith("a constant prediction has 100.00: they show too little to judge it by")


def test_the_command_says_it_in_lines_and_in_its_exit_code(segmentation: Path, trained: str) -> None:
    run = CliRunner()
    result = run.invoke(cli.app, ["doctor", str(segmentation), "--set", trained])
    assert result.exit_code == 0, result.output
    assert "pass  teacher's score: mIoU 60.00" in result.stdout
    result = run.invoke(cli.app, ["doctor", str(segmentation), "--set", "losses.0.weight=0", "--json"])
    assert result.exit_code == 1
    findings: list[dict[str, Any]] = json.loads(result.stdout)
    assert {"check", "status", "text", "advice"} == set(findings[0])
    assert findings[-1]["status"] == "fail"


def _image_recipe(root: Path, task: str, **options: Any) -> Path:
    """A recipe without teacher, weights or losses."""
    file = root.parent / "images.yaml"
    raw = {"task": task, "data": {"root": str(root), **options}, "student": {"arch": "none"}, "train": {"epochs": 1}}
    file.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return file


def _yolo(root: Path) -> Path:
    """Training: 3 images of 200 x 100 pixels and one of 50 x 50, boxes of 20, 40 and 96 pixels; validation: one."""
    boxes = {"a": "0 0.5 0.5 0.1 0.2\n1 0.5 0.5 0.2 0.4\n", "b": "1 0.5 0.5 0.48 0.96\n", "c": "", "d": None}
    for split in ("train", "val"):
        (root / "images" / split).mkdir(parents=True)
        (root / "labels" / split).mkdir(parents=True)
        for name, lines in boxes.items() if split == "train" else [("a", boxes["a"])]:
            color = (ord(name), len(split), 0)
            Image.new("RGB", (50, 50) if name == "d" else (200, 100), color).save(
                root / "images" / split / f"{name}.png"
            )
            if lines is not None:
                (root / "labels" / split / f"{name}.txt").write_text(lines)
    (root / "data.yaml").write_text("names: [cat, dog, cow]")
    return root


def test_boxes_are_counted(tmp_path: Path) -> None:
    recipe = _image_recipe(_yolo(tmp_path / "data"), "detection")
    result = CliRunner().invoke(cli.app, ["doctor", str(recipe), "--data", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["train"] == {
        "images": 4,
        "sizes": {"200 x 100 pixels": 3, "50 x 50 pixels": 1},
        "classes": {"cat": 1, "dog": 2, "cow": 0},
        "without": 2,
        "boxes": {"small": 1, "medium": 1, "large": 1, "ignored": 0},
        "sides": {"shortest": 20, "median": 40, "longest": 96},
        "problems": [],
        "warnings": [f"{tmp_path}/data/labels/train: 2 of 4 images have no boxes"],
    }
    assert found["val"]["classes"] == {"cat": 1, "dog": 1, "cow": 0}
    shown = CliRunner().invoke(cli.app, ["doctor", str(recipe), "--data"]).stdout
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if line.startswith("│")]
    assert ["images", "4", "1"] in rows
    assert ["dog", "2", "1"] in rows
    assert ["longest side", "96", "40"] in rows
    assert "warn  train: " in shown


def test_pixels_are_counted(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for number, rows in enumerate(([[0, 1], [1, 1]], [[0, 9], [9, 9]], [[9, 9], [9, 9]])):
            for folder in ("images", "masks"):
                (tmp_path / "d" / folder / split).mkdir(parents=True, exist_ok=True)
            color = (100 * number, len(split), 0)
            Image.new("RGB", (2, 2), color).save(tmp_path / f"d/images/{split}/{number}.png")
            Image.fromarray(np.array(rows, np.uint8)).save(tmp_path / f"d/masks/{split}/{number}.png")
    recipe = _image_recipe(tmp_path / "d", "segmentation", classes=["sky", "road", "car"], ignore_index=9)
    found = json.loads(CliRunner().invoke(cli.app, ["doctor", str(recipe), "--data", "--json"]).stdout)["val"]
    assert found["classes"] == pytest.approx({"sky": 40, "road": 60, "car": 0})
    assert (found["without"], found["boxes"], found["sides"]) == (1, {}, {})
    shown = CliRunner().invoke(cli.app, ["doctor", str(recipe), "--data"]).stdout
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if line.startswith("│")]
    assert ["road", "60.00 %", "60.00 %"] in cells
    for number in (1, 2):
        Image.fromarray(np.full((2, 2), 7, np.uint8)).save(tmp_path / f"d/masks/val/{number}.png")
    options = {"classes": ["sky", "road", "car"], "ignore_index": 9, "check": "headers"}
    val = examine_data(config.load(_image_recipe(tmp_path / "d", "segmentation", **options))).splits["val"]
    assert [problem.partition(": ")[0][-5:] for problem in val.problems] == ["1.png", "2.png"]
    assert (val.images, val.classes["sky"]) == (3, 25)  # of the mask that can be read


def test_every_problem_of_the_data_is_listed(tmp_path: Path) -> None:
    root = _yolo(tmp_path / "data")
    (root / "labels/train/a.txt").write_text("0 0.5 0.5 0.1 0.2\n" + "7 0.5 0.5 0.1 0.1\n" * 12)
    (root / "images/train/b.png").write_bytes(b"no image")
    (root / "images/val/a.png").unlink()
    recipe = _image_recipe(root, "detection")
    result = CliRunner().invoke(cli.app, ["doctor", str(recipe), "--data", "--json"])
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert len(found["train"]["problems"]) == 13
    assert found["train"]["problems"][11] == f"{root}/labels/train/a.txt:13: class 7 is none of the 3, 0 to 2"
    assert found["train"]["problems"][12].startswith(f"{root}/images/train/b.png: the image cannot be read")
    assert found["train"]["classes"] == {"cat": 1, "dog": 0, "cow": 0}  # what can be read is counted
    assert found["val"]["problems"][0].endswith(
        "images/val: the folder holds no images (.jpg, .jpeg, .jfif, .png, .bmp, .webp, .tif, .tiff, .gif)"
    )
    result = CliRunner().invoke(cli.app, ["doctor", str(recipe), "--data"])
    assert result.exit_code == 1
    assert result.stdout.count("fail  train: ") == 11
    assert "fail  train: ... and 3 more" in result.stdout


def test_classes_are_not_missed_where_something_cannot_be_read(tmp_path: Path) -> None:
    root = _yolo(tmp_path / "data")
    (root / "labels/train/a.txt").write_text("7 0.5 0.5 0.1 0.1")
    found = examine_data(config.load(_image_recipe(root, "detection"))).splits
    assert not any("no training image has a box" in warning for warning in found["val"].warnings)


def test_a_split_that_cannot_be_read_and_other_classes(tmp_path: Path) -> None:
    root = _yolo(tmp_path / "data")
    (root / "labels/val").rename(root / "gone")
    found = examine_data(config.load(_image_recipe(root, "detection"))).splits
    assert found["val"].problems == [f"cannot read the folder {root}/labels/val: No such file or directory"]
    assert found["train"].problems == []
    write_scenes(tmp_path / "s", train=1, val=1, size=(32, 32), seed=0, task="detection")
    file = tmp_path / "s/annotations/instances_val.json"
    file.write_text(file.read_text().replace('"disc"', '"disk"'))
    found = examine_data(config.load(_image_recipe(tmp_path / "s", "detection"))).splits
    assert found["val"].problems == [
        "the classes are disk, square, triangle, ring, cross, but those of train disc, square, triangle, ring, cross"
    ]


def test_a_student_is_made_used_to_int8_when_it_is_trained(
    segmentation: Path, trained: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "INT8" not in found(segmentation, trained)
    options = [trained, "train.quantize=int8"]
    monkeypatch.setattr("acamkd.engine.quantization.find_spec", lambda name: None)
    (missing,) = found(segmentation, *options)["INT8"]
    assert (missing.status, missing.text.partition(":")[0]) == ("fail", "train.quantize needs torchao")
    monkeypatch.setattr("acamkd.engine.quantization.find_spec", lambda name: name)
    (untrained,) = found(segmentation, *options)["INT8"]
    assert untrained.status == "warn"
    assert "student.weights" in untrained.advice
    options.append(f"student.weights={trained.partition('=')[2]}")
    assert found(segmentation, *options)["INT8"][0].status == "pass"
    (overwritten,) = found(segmentation, *options, "student.inherit=[segmentation_head]")["INT8"]
    assert overwritten.status == "warn"
    assert "puts the teacher's segmentation_head over student.weights" in overwritten.text
