"""The guide to networks of transformers, and every job on tiny ones."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import acamkd
import tiny
from acamkd import cli, config
from acamkd.data.scenes import CLASSES, write_scenes
from acamkd.engine.runs import load_student
from acamkd.models import build, save_weights
from acamkd.models.base import head_of
from acamkd.models.hf_kinds import KINDS
from tiny_hf import OPTIONS

transformers: Any = pytest.importorskip("transformers")

GUIDE = (Path(__file__).parents[2] / "docs/guides/huggingface.md").read_text(encoding="utf-8")
LEVELS = [f"model.encoder.{name}" for name in ("fpn_blocks.1", "pan_blocks.0", "pan_blocks.1")]

DISTINCT: dict[str, Any] = {**OPTIONS["rt_detr_v2"], "initializer_range": 0.1}
"""Its queries differ from the start, so that rounding does not decide which are chosen."""


def call(*words: str) -> None:
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 0, (result.output, result.exception)


COMMANDS = [shlex.split(line)[1:] for line in re.findall(r"^acamkd .*", GUIDE, re.MULTILINE)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The guide's distilled run, with the guide's folder as the current one."""
    root = tmp_path_factory.mktemp("guide")
    write_scenes(root / "photos", train=4, val=2, size=(64, 64), seed=0, task="detection")
    (recipe,) = re.findall(r"^```yaml\n(.*?)^```", GUIDE, re.DOTALL | re.MULTILINE)
    (root / "rtdetr.yaml").write_text(recipe, encoding="utf-8")
    overrides = [
        "data.workers=0", "data.resize=[64, 64]", "train.epochs=1", "train.batch_size=2", "train.accelerator=cpu",
        *(f"{role}.{setting}" for role in ("teacher", "student") for setting in (
            "arch=hf/rt_detr_v2", f"options={json.dumps(DISTINCT)}",
        )),
    ]  # fmt: skip
    assert [words[0] for words in COMMANDS] == ["train", "train", "distill", "evaluate", "export", "predict"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for words in (COMMANDS[0], COMMANDS[2]):  # the baseline is trained as the teacher is
            call(*words, *(each for pair in overrides for each in ("--set", pair)))
        yield root / "runs/rtdetr/distilled"


def test_the_guide_trains_what_transformers_loads(folder: Path) -> None:
    assert f"{LEVELS[0]}/acam/spatial" in (folder / "history.csv").read_text().partition("\n")[0]
    net = transformers.AutoModelForObjectDetection.from_pretrained(folder)
    own = load_student(folder).net.state_dict()
    assert all(torch.equal(tensor, own[key]) for key, tensor in net.state_dict().items())
    assert net.config.id2label[0] != "LABEL_0"


@pytest.mark.slow
def test_the_guides_export_and_its_code_find_what_the_student_finds(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for words in COMMANDS[3:]:
        call(*words)
    file = sorted(Path("photos/images/val").iterdir())[0].absolute()
    for place in (Path(), folder / "export"):
        shutil.copy(file, place / "image.jpg")
    in_transformers, by_onnxruntime = re.findall(r"^```python\n(.*?)^```", GUIDE, re.DOTALL | re.MULTILINE)
    scope: dict[str, Any] = {}
    exec(in_transformers, scope)
    monkeypatch.chdir(folder / "export")
    exec(by_onnxruntime.replace("from onnx_model", "from acamkd.jobs.export.onnx_model"), scope)
    image = torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1)
    (ours,) = load_student(folder).predict([image])
    assert np.allclose(scope["found"]["scores"], ours["scores"], atol=1e-4)
    theirs = [each["score"] for each in scope["find"](str(file), threshold=0.0)]
    assert np.allclose(theirs, ours["scores"], atol=1e-4)
    card = Path("README.md").read_text(encoding="utf-8")
    exec(re.findall(r"^```python\n(.*?)^```", card, re.DOTALL | re.MULTILINE)[1], scope)
    own = load_student(folder).net.state_dict()
    assert all(torch.equal(tensor, own[key]) for key, tensor in scope["net"].state_dict().items())


def test_pairs_are_proposed_across_families() -> None:
    from acamkd.distillation.pairs import propose
    from acamkd.jobs.inspect_layers import of_names

    teacher, student = of_names("hf/rt_detr_v2", "retinanet/mobilenetv3_small_050")
    keys = [f"backbone:{level}" for level in range(3)]
    assert propose(teacher, student) == list(zip(keys, LEVELS, strict=True))
    assert propose(teacher, head_of(teacher)) == LEVELS


def raw_recipe(name: str, root: Path, **train: Any) -> dict[str, Any]:
    """A recipe of 4 labeled and 2 unlabeled images, whose teacher is trained beside them."""
    task = KINDS[name].task
    write_scenes(root, train=4, val=2, size=(64, 64), seed=0, task=task)
    write_scenes(root / "more", train=2, val=1, size=(64, 64), seed=1, task=task)
    raw = tiny.raw_recipe(root, task, epochs=2, batch_size=2, clip=0.1, **train)
    network = {"arch": f"hf/{name}", "options": OPTIONS[name]}
    layers = KINDS[name].layers
    return {
        **raw,
        "data": {**raw["data"], "resize": [64, 64], "unlabeled": "more/images/train"},
        "teacher": network,
        "student": network,
        "losses": [{"name": "acam", "pairs": list(layers[-2:]), "num_masks": 2}],
    }


@pytest.mark.slow
@pytest.mark.usefixtures("reports")
@pytest.mark.parametrize(
    ("name", "part"),
    [("rt_detr_v2", "model.backbone"), ("segformer", "segformer"), ("mask2former", "model.pixel_level_module")],
)
def test_every_job_works(name: str, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16, with unlabeled images and an inherited part; interrupted, it goes on bit for bit."""
    raw = raw_recipe(name, tmp_path / "data", precision="bf16-mixed", checkpoint_every=1)
    teacher = acamkd.train(config.parse(raw), "teacher", out=tmp_path / "teacher")
    raw["teacher"] = {**raw["teacher"], "weights": str(teacher.weights)}
    raw["student"] = {**raw["student"], "inherit": [part]}
    recipe = config.parse(raw)
    whole = acamkd.distill(recipe, out=tmp_path / "whole")
    tiny.resumed(monkeypatch, acamkd.distill, recipe, tmp_path / "parts")
    one, two = (
        torch.load(tmp_path / each / "last.ckpt", weights_only=True)["state_dict"] for each in ("whole", "parts")
    )
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert (whole.folder / "report.html").is_file()
    scores = acamkd.evaluate(whole)
    assert {k: v for k, v in whole.metrics["student"].items() if v is not None} == {
        k: v for k, v in scores.items() if v == v
    }
    assert "parameters" in str(tiny.in_notebook(acamkd.distill(recipe, dry_run=True))["text/plain"])
    assert {each.check for each in acamkd.doctor(recipe).findings if each.status == "fail"} <= {"teacher's score"}
    assert acamkd.compare(recipe, ["acam"], seeds=1, results=tmp_path / "compare").rows[0].n == 1


PROGRAM = """
import sys
sys.modules["acamkd"] = None
from pathlib import Path
import torch, transformers
boxes = transformers.pipeline("object-detection", model="boxes")("image.png", threshold=0.0)
masks = transformers.pipeline("image-segmentation", model="masks")("image.png", subtask="semantic")
masks = {each["label"]: torch.tensor(list(each["mask"].tobytes())) for each in masks}
torch.save({"boxes": boxes, "masks": masks}, "found.pt")
"""


@pytest.mark.slow
def test_transformers_alone_finds_the_same(tmp_path: Path) -> None:
    """In a process that cannot import acamkd."""
    models = {}
    for folder, name, options in (("boxes", "rt_detr_v2", DISTINCT), ("masks", "segformer", OPTIONS["segformer"])):
        torch.manual_seed(0)
        section = config.Model(arch=f"hf/{name}", options=options)
        models[folder] = model = build(section, KINDS[name].task, len(CLASSES), (64, 96)).eval()
        (tmp_path / folder).mkdir()
        save_weights(model.net, tmp_path / folder / "student.safetensors")
        model.write_config(tmp_path / folder / "student.safetensors", CLASSES)
    image = torch.randint(0, 256, (3, 80, 120), dtype=torch.uint8)
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "image.png")
    subprocess.run([sys.executable, "-c", PROGRAM], cwd=tmp_path, check=True, capture_output=True, timeout=120)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    (ours,) = models["boxes"].predict([image])
    assert np.allclose([each["score"] for each in found["boxes"]], ours["scores"], atol=1e-4)
    corners = torch.tensor([[*each["box"].values()] for each in found["boxes"]]).float()
    apart = torch.cdist(ours["boxes"], corners, p=torch.inf).min(dim=1)[0]
    assert apart.max() <= 1  # the pipeline cuts fractions off
    (own,) = models["masks"].predict([image])
    for name, mask in found["masks"].items():
        assert ((mask > 0) == (own["mask"].flatten() == CLASSES.index(name))).float().mean() > 0.99
