"""Pretraining on images alone."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import tiny
from acamkd import config, models
from acamkd.distillation.distiller import Distiller
from acamkd.engine.runs import Run, load_student, open_run
from acamkd.errors import AcamkdError
from acamkd.jobs.evaluate import evaluate
from acamkd.jobs.pretrain import pretrain
from acamkd.jobs.train import distill, train
from acamkd.models.base import Task
from acamkd.report.run import write_report
from command import Command
from tiny import COSINE, VIT

OF: dict[Task, dict[str, Any]] = {
    "segmentation": COSINE, "detection": {"name": "cosine", "pairs": [["backbone.body:3", "levels:0"]]},
}  # fmt: skip


def raw(root: Path, task: Task = "segmentation", **train: Any) -> dict[str, Any]:
    return {**tiny.raw_recipe(root, task, **train), "teacher": VIT, "losses": [OF[task]]}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_data(tmp_path_factory.mktemp("data"))


def longer(root: Path) -> dict[str, Any]:
    return raw(root, steps_per_epoch=8, optimizer={"lr": 3e-3}, schedule={"name": "constant"})


@pytest.fixture(scope="module")
def whole(root: Path) -> Run:
    with pytest.MonkeyPatch.context() as patch:  # as outside of the tests; it is to leave no report
        patch.setattr("acamkd.jobs.fit.write_report", write_report)
        return pretrain(config.parse(longer(root)), out=root / "whole")


@pytest.mark.parametrize("job", [distill, pretrain], ids=["distill", "pretrain"])
def test_losses_that_were_built_to_be_checked_are_gone_when_the_training_begins(
    job: Callable[..., Run], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    construct, made, gone = Distiller.__init__, [], []  # type: ignore[var-annotated]

    def note(self: Distiller, *arguments: Any, **named: Any) -> None:
        construct(self, *arguments, **named)
        made.append(weakref.ref(self))

    def fit(run: Run, *_: Any, **__: Any) -> Run:
        gone.extend(each() is None for each in made)
        return run

    monkeypatch.setattr(Distiller, "__init__", note)
    monkeypatch.setattr(f"{job.__module__}.fit", fit)
    job(config.parse(raw(root) | {"losses": [COSINE | {"weight": "auto"}]}), out=tmp_path / "run")
    assert gone == [True, False]


def test_the_backbone_alone_is_trained_judged_and_written(whole: Run) -> None:
    start = models.build(config.Model(**tiny.FPN), "segmentation", 6)
    trained = load_file(whole.weights)
    assert trained.keys() == start.backbone.state_dict().keys()
    history = tiny.rows(whole.folder / "history.csv")
    assert [name for name in history[0] if name.startswith("loss/")] == ["loss/encoder:4/cosine/cosine"]
    assert float(history[1]["loss/encoder:4/cosine/cosine"]) < float(history[0]["loss/encoder:4/cosine/cosine"])
    scores = whole.metrics["backbone"]
    assert 0 <= scores["kNN"] <= 100
    assert {"kNN/background", "kNN/disc"} <= scores.keys()
    assert whole.metrics["teacher"]["kNN"] is not None
    assert not (whole.folder / "report.html").exists()


def test_it_resumes_bit_for_bit(whole: Run, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = tiny.resumed(monkeypatch, pretrain, config.parse(longer(root)), root / "parts")
    tiny.assert_same(parts.folder, whole.folder)


def test_a_training_starts_from_it(whole: Run, root: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = raw(root, epochs=1)
    content["student"] = {**tiny.FPN, "backbone_weights": str(whole.weights)}
    count = len([name for name in load_file(whole.weights) if not name.endswith("num_batches_tracked")])
    with caplog.at_level(logging.INFO):
        train(config.parse(content), out=root / "after")
    assert f"{count} of {count} tensors matched" in caplog.text


def test_it_predicts_nothing(whole: Run) -> None:
    opened = open_run(whole.folder)
    assert opened.role == "backbone"
    assert "kNN backbone" in repr(opened)
    for job in (load_student, evaluate):
        with pytest.raises(AcamkdError, match=r"holds a pretrained backbone, which predicts nothing: train a network"):
            job(opened)
    with pytest.raises(AcamkdError, match=r"nothing to show but its history.csv"):
        write_report(opened)


def test_labels_are_not_needed(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A folder of images is enough; a held-out loss judges."""
    content = raw(root)
    content["data"] = {"format": "images", "root": str(root), "workers": 0, "train": {"images": "images/train"},
                       "val": 0.25}  # fmt: skip
    with caplog.at_level(logging.INFO):
        run = pretrain(config.parse(content), out=root / "unlabeled")
    assert "6 images to learn from, without labels; judged on 2 others by the loss" in caplog.text
    scores = run.metrics["backbone"]["alignment"]
    assert run.metrics["metric"] == "alignment"
    assert -200 < scores < 0
    assert run.metrics["teacher"] == {"alignment": None}
    with pytest.raises(AcamkdError, match=r"data.format images has no labels to learn from: only `acamkd pretrain`"):
        train(config.parse(content), out=root / "no")
    del content["data"]["val"]
    with pytest.raises(AcamkdError, match=r"data.val.images is missing: .*, or a share of the training images"):
        pretrain(config.parse(content), out=root / "no")


def test_a_detector_and_unlabeled_images(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, acamkd: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content = raw(tiny.write_data(tmp_path / "data", "detection"), "detection", epochs=1)
    content["data"]["unlabeled"] = "images/val"
    (tmp_path / "recipe.yaml").write_text(config.dump(config.parse(content)), encoding="utf-8")
    with caplog.at_level(logging.INFO):
        assert acamkd("pretrain", "recipe.yaml", "--set", "losses.0.weight=auto").code == 0
    run = open_run("runs/tiny/pretrained")
    assert 0 <= run.metrics["backbone"]["kNN"] <= 100
    assert "4 images to learn from, without labels; judged on 4 others" in caplog.text
    assert "weight: auto: there is no task to compare with" in caplog.text
    assert "4 of 4 validation images are training images too" in caplog.text
    assert "conv_stem.weight" in load_file(run.weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": None, "losses": []}, "needs a `teacher` section and `losses` to pretrain"),
        (
            {"losses": [{"name": "acam", "pairs": COSINE["pairs"]}]},
            "acam: its masks learn from the task's loss, and pre"
            ".* set mask_source to uniform or mask_grad to detached, or take cosine",
        ),
        (
            {"losses": [{"name": "acam", "pairs": COSINE["pairs"], "mask_grad": "joint"}]},
            "acam: its masks learn to make the loss itself small, and without a task .* set mask_source to uniform",
        ),
        ({"losses": [{**COSINE, "stop_epoch": 1}]}, "stop_epoch: in pretraining nothing else is learned"),
        (
            {"student": {**tiny.FPN, "inherit": ["decoder"]}},
            r"^student\.inherit and train\.quantize are for the training after it: set \[\] and null$",
        ),
        (
            {"student": {"arch": f"{__name__}:stemmed"}, "losses": [{**COSINE, "pairs": [["stem", "levels:0"]]}]},
            r"^no loss reaches the student's backbone, only stem\.weight and the like: tap other layers$",
        ),
        ({"losses": [{"name": "cwd", "pairs": [["segmentation_head.0", "levels:0"]]}]}, None),
    ],
)
def test_what_cannot_be_learned_without_labels(
    change: dict[str, Any], message: str | None, root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = config.parse({**raw(root, epochs=1), **change})
    if message is None:  # trained, but not in the file
        pretrain(recipe, out=tmp_path / "run")
        assert "lie outside of the backbone and are not in its file (decoder." in caplog.text
        return
    with pytest.raises(AcamkdError, match=message):
        pretrain(recipe, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Stemmed(nn.Module):
    """A segmenter with a layer before what it calls its backbone."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.backbone = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.ConvTranspose2d(8, num_classes, 4, stride=4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.backbone(self.stem(x)))
        return logits


def stemmed(num_classes: int) -> Stemmed:
    return Stemmed(num_classes)


@pytest.mark.parametrize(
    ("name", "loss", "message"),
    [
        ("crosskd", {}, "^crosskd compares heads, and pretraining has none: take cosine, pkd, fitnet or another$"),
        ("fgd", {"pairs": ["backbone:0"]}, "^fgd needs labels, and pretraining has none: take cosine, pkd, fitnet or"),
    ],
)
def test_what_compares_heads_or_needs_boxes_is_refused(
    name: str, loss: dict[str, Any], message: str, tmp_path: Path
) -> None:
    root = tiny.write_data(tmp_path / "data", "detection")
    weights = root / "teacher.safetensors"
    models.save_weights(models.build(config.Model(**tiny.RETINANET), "detection", 5).net, weights)
    teacher = {**tiny.RETINANET, "weights": str(weights)}
    recipe = {**tiny.raw_recipe(root, "detection"), "teacher": teacher, "losses": [{"name": name, **loss}]}
    with pytest.raises(AcamkdError, match=message):
        pretrain(config.parse(recipe), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_head_stays_as_it_was(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tiny.write_data(tmp_path / "data")
    for number in range(2, 5):
        (root / f"images/val/{number:05}.jpg").unlink()
        (root / f"masks/val/{number:05}.png").unlink()
    run = pretrain(config.parse(raw(root, epochs=1)), out=tmp_path / "run")
    assert "kNN is undefined: no class has objects in two of the validation images" in caplog.text
    state = torch.load(run.checkpoint, weights_only=False)["state_dict"]
    torch.manual_seed(0)
    fresh = models.build(config.Model(**tiny.FPN), "segmentation", 6).net.state_dict()
    head = "distiller.student.net.segmentation_head.0.weight"
    assert torch.equal(state[head], fresh["segmentation_head.0.weight"])
    changed = "distiller.student.net.encoder.model.conv_stem.weight"
    assert not torch.equal(state[changed], fresh[changed.removeprefix("distiller.student.net.")])
