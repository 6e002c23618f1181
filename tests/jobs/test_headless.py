"""Every job on a recipe whose teacher has no head."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from acamkd import config
from acamkd.distillation.build import build_distiller
from acamkd.distillation.methods import METHODS
from acamkd.distillation.pairs import propose
from acamkd.engine.pretraining import student_maps
from acamkd.errors import AcamkdError
from acamkd.jobs.benchmark.networks import networks_of
from acamkd.jobs.doctor import doctor
from acamkd.jobs.estimate import estimate
from acamkd.jobs.export.card import license_of_teacher
from acamkd.jobs.inspect_layers import as_losses, inspect, of_names
from acamkd.jobs.run_all import run
from acamkd.jobs.tokens import learn_tokens
from acamkd.jobs.train import distill, train
from acamkd.models import Batch, FeatureModel, TaskModel, build, build_teacher, save_weights
from tiny import COSINE, VIT

RECIPES = Path(__file__).parents[2] / "recipes/foundation"


def raw(root: Path, **more: Any) -> dict[str, Any]:
    return {**tiny.raw_recipe(root, epochs=1), "teacher": VIT, "losses": [COSINE], **more}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_data(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student": VIT}, "student.arch timm/vit_small_patch16_dinov3 has no head: name a detector or a segmenter"),
        ({"student": {**tiny.FPN, "resize": 0.5}}, "student.resize: the student's input size is data.resize"),
        ({"teacher": {**tiny.FPN, "resize": 0.5}}, "teacher.resize: only a teacher without a head"),
        ({"teacher": {**VIT, "weights": "a.pth"}}, "teacher.weights: a teacher without a head is a backbone"),
        ({"teacher": {**VIT, "num_classes": 3}}, "teacher.num_classes: a teacher without a head has no classes"),
        ({"teacher": {**VIT, "resize": -1}}, "teacher.resize: Input should be greater than 0"),
    ],
)
def test_what_a_recipe_cannot_say(change: dict[str, Any], message: str, root: Path) -> None:
    with pytest.raises(AcamkdError, match=message):
        config.parse(raw(root, **change))


def test_pretrained_is_imagenet() -> None:
    assert config.Model(arch="timm/resnet18", backbone_weights="pretrained").backbone_weights == "imagenet"


@pytest.fixture(scope="module")
def networks() -> tuple[TaskModel, FeatureModel, Batch]:
    torch.manual_seed(0)
    student = build(config.Model(**tiny.FPN), "segmentation", 3, (64, 64))
    masks = [{"mask": torch.randint(3, (64, 64))} for _ in range(2)]
    batch = student.prepare([torch.rand(3, 64, 64) for _ in masks], masks)
    return student, build_teacher(config.Model(**VIT), "segmentation", 3), batch


@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, {}) for name in METHODS if name != "fgd"), ("acam", {"num_masks": 2, "mask_grad": "task"})],
)
def test_every_feature_loss_works_and_what_needs_a_head_is_refused(
    name: str, options: dict[str, Any], networks: tuple[TaskModel, FeatureModel, Batch]
) -> None:
    student, teacher, batch = networks
    entries = [config.Loss(name=name, pairs=[("encoder:4", "levels:0")], **options)]
    if options or name in ("dist", "crosskd", "kddetr", "ld"):
        with pytest.raises(AcamkdError, match=rf"losses.0 \({name}\): it needs the teacher's head, and"):
            build_distiller(student, teacher, entries)
        return
    terms = build_distiller(student, teacher, entries)(batch)
    distillation = [term for key, term in terms.items() if not key.startswith("task/")]
    assert distillation
    assert all(term.isfinite() and term.requires_grad for term in distillation)


@pytest.mark.usefixtures("reports")
def test_it_is_distilled_reported_and_left_out_where_it_has_no_part(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "vit.safetensors"
    save_weights(build_teacher(config.Model(**VIT), "segmentation", 3).backbone, file)
    recipe = config.parse(
        raw(root, teacher={**VIT, "backbone_weights": str(file)}, losses=[{**COSINE, "weight": "auto"}])
    )
    with caplog.at_level(logging.INFO):
        distilled = distill(recipe, out=tmp_path / "run")
    assert "the report omits the teacher's score and cost" in caplog.text
    page = (distilled.folder / "report.html").read_text(encoding="utf-8")
    assert "Unknown: no baseline was scored on these images. The student reaches" in page
    assert "the teacher \N{EN DASH}" not in page
    assert "Where the two differ" not in page
    assert distilled.metrics["teacher"] == {"mIoU": None}
    assert distilled.metrics["teacher_license"] == "dinov3-license"
    assert "loss/encoder:4/cosine/cosine" in (distilled.folder / "history.csv").read_text().partition("\n")[0]
    assert [network.name for network in networks_of(distilled, None)] == ["distilled"]
    assert license_of_teacher(distilled.recipe) == "dinov3-license"


@pytest.mark.slow
@pytest.mark.usefixtures("reports")
def test_one_command_trains_baseline_and_student(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.INFO):
        result = run(config.parse(raw(root)))
    assert "the teacher has no head: there is nothing to train of it and no score to compare with" in caplog.text
    assert result.scores.keys() == {"baseline", "distilled"}
    assert not Path("runs/tiny/teacher").exists()


def test_there_is_nothing_to_train_or_to_learn_tokens_from(root: Path, tmp_path: Path) -> None:
    recipe = config.parse(raw(root))
    with pytest.raises(AcamkdError, match="vit_small_patch16_dinov3 has no head to train, and needs no training"):
        train(recipe, "teacher")
    with pytest.raises(AcamkdError, match="which a teacher without a head does not have"):
        learn_tokens(recipe, out=tmp_path / "tokens.safetensors")


def test_the_doctor_says_what_it_leaves_out(root: Path) -> None:
    found = doctor(config.parse(raw(root)))
    by_check = {finding.check: finding for finding in found.findings}
    assert not found.failed
    assert by_check["teacher's score"].text == "not scored: it has no head"
    assert by_check["teacher's weights"].text == "nothing is pretrained"
    assert by_check["tap"].text == "Cosine: encoder:4 [48, 4, 4] <- levels:0 [16, 4, 4]"


def test_a_blank_cnn_is_found(root: Path) -> None:
    teacher = {"arch": "timm/mobilenetv3_small_050", "backbone_weights": None}
    found = doctor(config.parse(raw(root, teacher=teacher, losses=[{**COSINE, "pairs": [["encoder:4", "levels:3"]]}])))
    assert any("statistics of an untrained network" in finding.text for finding in found.findings)


@pytest.fixture(scope="module")
def named() -> tuple[FeatureModel, TaskModel]:
    return of_names("timm/mobilenetv3_small_050", "retinanet/mobilenetv3_small_050")


def test_pairs_are_proposed_by_stride(named: tuple[FeatureModel, TaskModel], root: Path) -> None:
    networks = named
    assert propose(*networks) == [("backbone:0", "levels:2"), ("backbone:1", "levels:3"), ("backbone:2", "levels:4")]
    assert as_losses(["a"], networks[1], all_labeled=True, headless=True)[0]["name"] == "cosine"
    recipe = config.parse(raw(root, losses=[]))
    found = inspect(recipe)
    assert [(layer.name, layer.stride) for layer in found.teacher if layer.name == "levels:0"] == [("levels:0", 16)]
    assert found.losses[0]["pairs"][0][1] == "levels:0"
    proposed = ["losses=[{name: cosine, pairs: auto, weight: 1}]"]
    assert math.isfinite(estimate(config.override(recipe, proposed)).seconds)


def test_a_vit_meets_the_nearest_stride(named: tuple[FeatureModel, TaskModel]) -> None:
    for name, options, expected in (
        ("vit_small_patch16_dinov3", {}, "backbone:1"), ("vit_small_patch16_dinov3", {"resize": 0.5}, "backbone:2"),
        ("vit_small_patch14_dinov2", {}, "backbone:1"),
    ):  # fmt: skip
        section = config.Model(**{**VIT, "arch": f"timm/{name}", **options})
        assert propose(build_teacher(section, "detection", 3).eval(), named[1]) == [(expected, "levels:0")]


@pytest.mark.parametrize("name", ["dinov3_detection", "dinov3_pretrain"])
def test_the_recipes_build(name: str) -> None:
    recipe = config.load(RECIPES / f"{name}.yaml")
    assert recipe.teacher is not None
    small = recipe.teacher.model_copy(update={"backbone_weights": None, "options": VIT["options"]})
    classes, (height, width) = 3, (64, 96)
    blank = recipe.student.model_copy(update={"backbone_weights": None})
    student = build(blank, recipe.task, classes, (height, width))
    losses = [loss.model_copy(update={"weight": None}) for loss in recipe.losses]
    distiller = build_distiller(student, build_teacher(small, recipe.task, classes), losses).eval()
    batch = student.prepare([torch.rand(3, height, width)])
    (teacher_map,) = distiller.teacher_maps(batch).values()
    assert teacher_map.shape == (1, 16, 2, 3)
    assert student_maps(distiller, batch)[recipe.losses[0].pairs[0][0]].shape[-2:] == (2, 3)


@pytest.mark.slow
def test_unlabeled_images_and_resume(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = raw(root)
    content["data"]["unlabeled"] = "images/val"
    content["train"]["epochs"] = 2
    recipe = config.parse(content)
    whole = distill(recipe, out=tmp_path / "whole")
    tiny.assert_same(tiny.resumed(monkeypatch, distill, recipe, tmp_path / "parts").folder, whole.folder)
