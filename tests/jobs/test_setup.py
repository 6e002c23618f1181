"""What is said of data and teachers; the jobs' own tests cover the rest."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest
import torch

import tiny
from acamkd import config, models
from acamkd.engine.runs import Run
from acamkd.errors import AcamkdError
from acamkd.files import write_json
from acamkd.jobs.compare.trials import plan
from acamkd.jobs.doctor import examine
from acamkd.jobs.examine_data import examine_data
from acamkd.jobs.pretrain import ImagesAlone
from acamkd.jobs.setup import (
    ALL_LABELED,
    Batches,
    build_network,
    describe_data,
    describe_lead,
    score_of_run,
    with_normalization,
)
from acamkd.jobs.train import train
from acamkd.models.base import Task, TaskModel
from acamkd.models.segmentation import Segmenter


def _ended(folder: Path, role: str, score: float) -> None:
    folder.mkdir(parents=True)
    write_json(folder / "metrics.json", {role: {"mIoU": score}})


def test_a_teacher_that_is_not_ahead_of_the_baseline_is_told(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path)
    assert describe_lead(recipe, 50.0, tmp_path / "baseline") is None  # no run there
    _ended(tmp_path / "baseline", "student", 50.35)
    told = describe_lead(recipe, 50.23, tmp_path / "baseline")
    assert told is not None
    assert "the teacher, mIoU 50.23, is not ahead of the baseline, 50.35" in told
    for score in (50.36, None, math.nan):
        assert describe_lead(recipe, score, tmp_path / "baseline") is None


def test_a_teachers_score_is_read_from_its_run(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path)
    section = config.Model(**tiny.FPN, weights=str(tmp_path / "run/teacher.safetensors"))
    assert score_of_run(recipe, section) is None
    _ended(tmp_path / "run", "teacher", 61.5)
    assert score_of_run(recipe, section) == 61.5
    assert score_of_run(recipe, section.model_copy(update={"weights": None})) is None


def test_the_doctor_says_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    root = tiny.write_data(tmp_path / "runs/tiny/teacher")  # with teacher.safetensors
    write_json(root / "metrics.json", {"teacher": {"mIoU": 40.0}})
    _ended(tmp_path / "runs/tiny/baseline", "student", 45.0)
    findings = list(examine(tiny.recipe(root)))
    assert [finding.status for finding in findings if finding.text == ALL_LABELED] == ["pass"]
    assert any("is not ahead of the baseline, 45.00" in finding.text for finding in findings)


def test_labeled_images_alone_are_told_once_where_one_distills(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    recipe = tiny.recipe(tiny.write_data(tmp_path))
    Batches(recipe).check()
    assert ALL_LABELED not in caplog.text
    batches = Batches(recipe, with_unlabeled=True)
    batches.check()
    assert caplog.text.count(ALL_LABELED) == 1
    train, val = (batches.splits[split] for split in ("train", "val"))
    assert describe_data(train, val) == "8 training and 4 validation images, 6 classes"
    train.classes = ("cell",)
    assert describe_data(train, val).endswith("images, 1 class")


def test_what_is_odd_about_the_data_is_said_with_its_split(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tiny.write_data(tmp_path)
    (root / "images/val/more.ppm").touch()
    recipe = config.override(tiny.recipe(root), ["data.test={images: images/val, masks: masks/val}"])
    Batches(recipe, with_test=True).check()
    left_out = "images/val: 1 images of other types are left out (more.ppm); those that are read end in"
    for split in ("val", "test"):
        assert any(text.startswith(f"{split} data: {root}/{left_out}") for text in caplog.messages)
    assert "4 of 4 test images are validation images too: scores on them say nothing of others" in caplog.messages


def test_a_student_inherits_from_no_teacher(tmp_path: Path) -> None:
    recipe = tiny.recipe(tiny.write_data(tmp_path / "data"))
    alone = recipe.model_copy(
        update={"teacher": None, "losses": (), "student": recipe.student.model_copy(update={"inherit": ("decoder",)})}
    )
    with pytest.raises(AcamkdError, match=r"^the recipe tiny needs a `teacher` section$"):
        train(alone, out=tmp_path / "run")


def test_a_detectors_table_has_no_row_of_masks(tmp_path: Path) -> None:
    root = tiny.write_data(tmp_path / "data", "detection")
    for file in (root / "annotations").iterdir():
        file.write_text('{"images": [], "annotations": [], "categories": []}')
    shown = str(examine_data(tiny.recipe(root, "detection")))
    assert "without boxes" in shown
    assert "all void" not in shown


@pytest.mark.parametrize("task", ["detection", "segmentation"])
@pytest.mark.parametrize("cache", ["null", "ram"])
def test_large_photographs_may_be_decoded_smaller(task: Task, cache: str, tmp_path: Path) -> None:
    recipe = tiny.recipe(tiny.write_data(tmp_path, task), task)
    reduced = ["data.decode=reduced", "data.resize=[30, 20]", "data.augment.flip=0", f"data.cache={cache}"]
    plain, small = Batches(config.override(recipe, reduced[2:3])), Batches(config.override(recipe, reduced))
    small.check()
    side = 128 if task == "detection" else 64
    for _ in range(2):
        (image, target), (whole, true) = small.splits["train"][0], plain.splits["train"][0]
        assert (image.shape, whole.shape) == ((3, 32, 32), (3, side, side))
        assert list(target) == list(true)
        if task == "detection":
            assert torch.allclose(target["boxes"], true["boxes"] / 4)
            assert torch.allclose(target["area"], true["area"] / 16)
        else:
            assert set(target["mask"].flatten().tolist()) == set(true["mask"].flatten().tolist())
            assert (target["mask"] == true["mask"][::2, ::2]).float().mean() > 0.9
    assert small.splits["val"][0][0].shape == (3, side, side)
    with pytest.raises(AcamkdError, match=r"decode: reduced needs `resize`, and no `augment.crop`"):
        config.override(recipe, ["data.decode=reduced"])


def test_normalization_follows_the_weights_of_a_run(tmp_path: Path) -> None:
    """For a pretrained backbone and a whole network; the recipe's own statistics win."""
    recipe = tiny.recipe(tmp_path)
    half, tenth = (0.5, 0.5, 0.5), (0.1, 0.1, 0.1)
    trained = recipe.model_copy(update={"student": recipe.student.model_copy(update={"mean": half, "std": half})})
    run = Run(tmp_path / "pretrained", trained, "backbone")
    with run.entered(resume=False, overwrite=False):
        network = build_network(trained, trained.student, ("a", "b"))
    models.save_weights(network.backbone, run.weights)
    models.save_weights(network.net, run.folder / "student.safetensors")
    for given in ({"backbone_weights": str(run.weights)}, {"weights": str(run.folder / "student.safetensors")}):
        section = recipe.student.model_copy(update={**given, "std": tenth})
        model = build_network(recipe, section, ("a", "b"))
        assert model.mean.flatten().tolist() == [0.5] * 3
        kept = with_normalization(recipe, section, model)
        assert (kept.mean, kept.std) == (half, tenth)
    elsewhere = recipe.student.model_copy(update={"backbone_weights": str(tmp_path / "backbone.safetensors")})
    run.weights.rename(tmp_path / "backbone.safetensors")
    assert build_network(recipe, elsewhere, ("a", "b")).mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert with_normalization(recipe, elsewhere, network) == elsewhere


def test_batches_go_to_a_gpu_from_pinned_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny.recipe(tiny.write_data(tmp_path))
    monkeypatch.setattr("acamkd.jobs.setup.device_of", lambda _: torch.device("cuda"))
    for loaders in (Batches(recipe), ImagesAlone(recipe)):
        assert loaders.mixed.pin_memory
        assert loaders.val.pin_memory


def test_what_a_network_cannot_do_is_said_before_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny.recipe(tmp_path, multiscale=[1, 2], patience=3, optimizer={"backbone_lr": 1e-4})
    assert build_network(recipe, recipe.student, ("a", "b")).net.encoder is not None
    with pytest.raises(AcamkdError, match=r"train.patience: a comparison gives every method the same epochs"):
        plan(recipe, ["fitnet"], 1, tmp_path)
    monkeypatch.setattr(Segmenter, "backbone", TaskModel.backbone)
    with pytest.raises(
        AcamkdError, match=r"optimizer.backbone_lr: Segmenter does not say which part .* leave backbone"
    ):
        build_network(recipe, recipe.student, ("a", "b"))
    monkeypatch.setattr(Segmenter, "takes_one_size", True)
    with pytest.raises(AcamkdError, match=r"train.multiscale: fpn on tu-test_efficientnet takes inputs of one size"):
        build_network(recipe, recipe.student, ("a", "b"))
