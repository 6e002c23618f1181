from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny_recipes
from acamkd import config
from acamkd.distillation.auto_weight import (
    BATCHES,
    calibrate,
    dry_build,
    gradient_norms,
    prepared,
    probe_distiller,
    reuse_weights,
    total_norms,
    with_objects,
)
from acamkd.distillation.build import build_distiller
from acamkd.distillation.distiller import Distiller
from acamkd.distillation.methods import METHODS
from acamkd.errors import AcamkdError
from acamkd.jobs.setup import Batches, build_network, build_teacher, teacher_section
from acamkd.jobs.train import distill
from acamkd.losses.base import DistillationContext, FeatureLoss
from acamkd.models import build
from acamkd.models.base import VOID, Target, TaskModel, head_of
from tiny_hf import OPTIONS


@pytest.fixture(scope="module")
def detection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_recipes.write_recipe(tmp_path_factory.mktemp("detection"), "detection")


@pytest.fixture(scope="module")
def segmentation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_recipes.write_recipe(tmp_path_factory.mktemp("segmentation"), "segmentation")


def networks(recipe: config.Recipe) -> tuple[TaskModel, TaskModel, Batches]:
    batches = Batches(recipe)
    teacher = build_teacher(recipe, teacher_section(recipe), batches.classes)
    return build_network(recipe, recipe.student, batches.classes), head_of(teacher), batches


def calibrated(
    student: TaskModel, teacher: TaskModel, entries: Sequence[config.Loss], images: Any
) -> tuple[config.Loss, ...]:
    return calibrate(dry_build(student, teacher, entries), entries, images)


def measured(
    student: TaskModel, teacher: TaskModel, losses: Sequence[config.Loss], batches: Batches
) -> tuple[float, dict[str, float]]:
    """Mean ratio of the gradients on the training images, and the terms of the last of them."""
    ratios = []
    with probe_distiller(student, teacher, losses) as distiller:
        for batch in prepared(student, batches.train):
            distillation, task = total_norms(gradient_norms(distiller, batch))
            ratios.append(distillation / task)
            terms = {name: term.item() for name, term in distiller(batch).items()}
    return sum(ratios) / len(ratios), terms


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"freekd", "kddetr", "ld"}))
def test_the_gradient_comes_out_as_strong_as_asked(detection: Path, method: str) -> None:
    recipe = config.load(detection, [f"losses.0.name={method}", "losses.0.weight=auto", "losses.0.gradient_ratio=0.3"])
    student, teacher, batches = networks(recipe)
    losses = calibrated(student, teacher, recipe.losses, batches.train)
    ratio, _ = measured(student, teacher, losses, batches)
    assert ratio == pytest.approx(0.3, rel=0.2)


def test_every_term_is_multiplied_by_one_factor(segmentation: Path) -> None:
    overrides = ["losses.0.name=acam", "losses.0.preset=paper", "losses.0.diversity_weight=0.2"]
    recipe = config.load(segmentation, overrides)
    student, teacher, batches = networks(recipe)
    auto = config.load(segmentation, [*overrides, "losses.0.weight=auto"]).losses
    found = calibrated(student, teacher, auto, batches.train)
    assert found[0].options["diversity_weight"] == pytest.approx(0.2 * found[0].options["weight"], rel=0.01)
    assert found[0].preset == "paper"
    _, before = measured(student, teacher, recipe.losses, batches)
    _, after = measured(student, teacher, found, batches)
    for name in before.keys() - {"task/cross_entropy"}:
        assert after[name] == pytest.approx(before[name] * found[0].options["weight"], rel=0.01)


def test_nothing_of_the_measurement_remains(segmentation: Path) -> None:
    recipe = config.load(segmentation, ["losses.0.name=cankd", "losses.0.weight=auto"])
    student, teacher, batches = networks(recipe)
    student.backbone.eval()
    modes = [module.training for module in student.modules()]
    state = {name: value.clone() for name, value in student.state_dict().items()}
    generator = torch.get_rng_state()
    first = calibrated(student, teacher, recipe.losses, batches.train)
    assert torch.equal(torch.get_rng_state(), generator)
    torch.rand(7)  # the result does not depend on torch's state
    assert calibrated(student, teacher, recipe.losses, batches.train) == first
    assert all(torch.equal(value, state[name]) for name, value in student.state_dict().items())
    assert [module.training for module in student.modules()] == modes
    assert all(parameter.grad is None for parameter in student.parameters())


def test_frozen_layers_are_measured_frozen(segmentation: Path) -> None:
    recipe = config.load(segmentation)
    student, teacher, batches = networks(recipe)
    student.backbone.eval()
    modes = [module.training for module in student.modules()]
    assert len(set(modes)) == 2
    with probe_distiller(student, teacher, recipe.losses) as distiller:
        gradient_norms(distiller, next(prepared(student, batches.train)))
        assert [module.training for module in student.modules()] == modes
        assert distiller.losses.training
        assert not distiller.teacher.training


def test_batch_norm_is_restored_where_a_device_changed_its_buffers(
    segmentation: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = config.load(segmentation, ["losses.0.weight=auto"])
    student, teacher, batches = networks(recipe)
    state = {name: value.clone() for name, value in student.state_dict().items()}
    # What a change of device does: every buffer becomes another tensor.
    monkeypatch.setattr(Distiller, "to", lambda self, _: self._apply(torch.clone))
    calibrated(student, teacher, recipe.losses, batches.train)
    assert all(torch.equal(value, state[name]) for name, value in student.state_dict().items())


def test_each_loss_gets_its_own_share_and_a_ramp_changes_nothing(segmentation: Path) -> None:
    recipe = config.load(
        segmentation,
        ["losses=[{name: cwd, pairs: [segmentation_head.0], weight: auto, ramp_epochs: 1},"
         " {name: fitnet, pairs: [encoder:5], weight: 2},"
         " {name: pkd, pairs: [encoder:5], weight: auto, gradient_ratio: 0.1, stop_epoch: 0.4}]"],
    )  # fmt: skip
    student, teacher, batches = networks(recipe)
    cwd, fitnet, pkd = calibrated(student, teacher, recipe.losses, batches.train)
    assert fitnet == recipe.losses[1]
    assert (cwd.ramp_epochs, pkd.stop_epoch) == (1, 0.4)
    for loss, ratio in ((cwd, 0.5), (pkd, 0.1)):
        assert measured(student, teacher, [loss], batches)[0] == pytest.approx(ratio, rel=0.2)
    assert calibrated(student, teacher, recipe.losses[:1], batches.train) == (cwd,)  # not what the others weigh


def test_only_the_first_batches_are_read(segmentation: Path) -> None:
    recipe = config.load(segmentation, ["losses.0.weight=auto"])
    student, teacher, batches = networks(recipe)
    read = 0

    class Endless:
        def __iter__(self) -> Any:
            nonlocal read
            batch: tuple[list[Tensor], list[Target]] = next(iter(batches.train))
            while True:
                read += 1
                yield batch

    calibrated(student, teacher, recipe.losses, Endless())
    assert read == BATCHES
    calibrated(student, teacher, config.load(segmentation).losses, Endless())
    assert read == BATCHES


def _emptied(batches: Batches, share: float, size: int) -> list[tuple[list[Tensor], list[Target]]]:
    """Batches of images that have objects, among which `share` have none: blank images, evenly among the others."""
    dataset = batches.splits["train"]
    pairs: list[tuple[Tensor, Target]] = []
    for index in range(12):
        pairs.append(dataset[index % len(dataset)])
        while sum(not len(target["boxes"]) for _, target in pairs) < share * (len(pairs) + 1) - 1e-9:
            image, target = dataset[index % len(dataset)]
            empty = {name: value[:0] for name, value in target.items()}
            pairs.append((torch.full_like(image, 114), empty))
    return [
        ([image for image, _ in pairs[i : i + size]], [target for _, target in pairs[i : i + size]])
        for i in range(0, len(pairs) - size + 1, size)
    ]


@pytest.mark.parametrize("method", ["acam", "pkd"])
def test_images_without_objects_do_not_move_the_weight(
    detection: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("acamkd.distillation.auto_weight.BATCHES", 3)
    recipe = config.load(detection, [f"losses.0.name={method}", "losses.0.weight=auto"])
    student, teacher, batches = networks(recipe)
    weights = [
        calibrated(student, teacher, recipe.losses, _emptied(batches, share, size=4))[0].weight
        for share in (0, 0.5, 0.7, 0.9)
    ]
    assert weights == [weights[0]] * 4


def test_where_every_image_has_objects_batches_pass_as_they_are(detection: Path) -> None:
    batches = Batches(config.load(detection))
    given = [([torch.rand(3, 8, 8)] * size, [{"boxes": torch.ones(1, 4)}] * size) for size in (3, 2, 3)]
    for (images, targets), (own_images, own_targets) in zip(with_objects(given), given, strict=True):
        assert images is own_images
        assert targets is own_targets
    assert len(list(with_objects(batches.train))) == 2


def test_a_few_images_with_objects_fill_one_batch_and_none_is_an_error() -> None:
    def batch(*counts: int, crowd: bool = False) -> tuple[list[Tensor], list[Target]]:
        targets = [{"boxes": torch.ones(n, 4), "iscrowd": torch.full((n,), int(crowd))} for n in counts]
        return [torch.full((3, 8, 8), float(n)) for n in counts], targets

    [(images, targets)] = with_objects([batch(0, 0, 0), batch(2, 0, 0), batch(3, 3, 3, crowd=True)])
    assert [len(target["boxes"]) for target in targets] == [2, 2, 2]
    assert [image.mean().item() for image in images] == [2, 2, 2]
    with pytest.raises(AcamkdError, match=r"none of the 6 training images that were read has an object .* as a number"):
        list(with_objects([batch(0, 0, 0), batch(3, 3, 3, crowd=True)]))
    void, known = torch.full((4, 4), VOID), torch.zeros(4, 4, dtype=torch.int64)
    masks = [([torch.rand(3, 4, 4)] * 2, [{"mask": void}, {"mask": known}])] * 2
    assert [target["mask"] is known for _, targets in with_objects(masks) for target in targets] == [True, True]


def test_a_run_holds_the_number_and_is_reproduced_by_it(
    segmentation: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # The weight not last: written as a number it may come elsewhere, which is no other recipe.
    overrides = ["losses.0.weight=auto", "losses.0.distance=l1"]
    auto = config.load(segmentation, overrides)
    caplog.set_level(logging.INFO, "acamkd")
    distill(auto, out=tmp_path / "auto")
    resolved = config.load(tmp_path / "auto/recipe.yaml")
    weight = resolved.losses[0].options["weight"]
    assert isinstance(weight, float)
    assert f"fitnet: weight {weight:g}; 2 batches of images with objects" in caplog.text
    distill(resolved, out=tmp_path / "number")
    for file in ("recipe.yaml", "student.safetensors"):
        assert (tmp_path / "auto" / file).read_bytes() == (tmp_path / "number" / file).read_bytes()

    (tmp_path / "auto/last.ckpt").unlink()
    caplog.clear()
    distill(auto, out=tmp_path / "auto", resume=True)  # does not measure again
    assert "measuring" not in caplog.text
    assert config.load(tmp_path / "auto/recipe.yaml") == resolved
    with pytest.raises(AcamkdError, match="another recipe"):
        distill(config.load(segmentation, [*overrides, "train.seed=1"]), out=tmp_path / "auto", resume=True)


def test_a_distiller_is_built_twice(segmentation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once to be checked and measured, and once for good, however many weights are to be set."""
    built: list[int] = []
    construct = Distiller.__init__

    def count(self: Distiller, *arguments: Any, **named: Any) -> None:
        built.append(len(arguments[2]))
        construct(self, *arguments, **named)

    monkeypatch.setattr(Distiller, "__init__", count)
    losses = "{name: cwd, pairs: [segmentation_head.0], weight: auto}, {name: pkd, pairs: [encoder:5], weight: auto}"
    distill(config.load(segmentation, [f"losses=[{losses}]"]), out=tmp_path / "run")
    assert built == [2, 2]


def test_weights_are_only_adopted_by_the_same_methods() -> None:
    auto = config.Loss(name="acam", weight="auto", mask_grad="joint")
    found = config.Loss(name="acam", weight=0.3, diversity_weight=0.1, mask_grad="joint")
    assert reuse_weights([auto], [found]) == (found,)
    assert reuse_weights([auto], [config.Loss(name="fitnet", weight=0.3)]) == (auto,)
    assert reuse_weights([auto], []) == (auto,)


def test_a_loss_without_gradient_is_an_error(segmentation: Path) -> None:
    recipe = config.load(segmentation, ["losses.0.name=crosskd", "losses.0.weight=auto"])
    student, teacher, batches = networks(recipe)
    with pytest.raises(AcamkdError, match=r"losses.0 \(crosskd\)"):
        calibrated(student, teacher, recipe.losses, batches.train)
    entry = config.Loss(name="fgd", pairs=("segmentation_head.0",), weight="auto")
    silent = config.Loss(name="dist", beta=0.0, gamma=0.0, pairs=("segmentation_head.0",), weight="auto")
    with pytest.raises(AcamkdError, match="this method needs boxes"):
        calibrated(student, teacher, [silent, entry], batches.train)
    with pytest.raises(AcamkdError, match=r"auto of dist: the gradient of the distillation is 0"):
        calibrated(student, teacher, [silent], batches.train)


@pytest.mark.parametrize("options", [{"name": "pkd"}, {"name": "fitnet", "align": True}, {"name": "acam"}], ids=str)
def test_a_loss_at_frozen_layers_is_an_error(segmentation: Path, options: dict[str, Any]) -> None:
    student, teacher, batches = networks(config.load(segmentation))
    student.backbone.requires_grad_(False)
    entry = config.Loss(pairs=("encoder:5",), weight="auto", **options)
    with pytest.raises(AcamkdError, match=r"no trainable student parameter lies below encoder:5: .*frozen ones"):
        calibrated(student, teacher, [entry], batches.train)


def test_a_loss_behind_a_layer_that_starts_at_zero_is_an_error() -> None:
    section = config.Model(arch="hf/d_fine", options=OPTIONS["d_fine"])  # the last layer of its edges starts at zero
    student, teacher = (build(section, "detection", 2, (64, 64)) for _ in range(2))
    target: Target = {"boxes": torch.tensor([[4.0, 6, 40, 30]]), "labels": torch.tensor([1])}
    batch = [torch.rand(3, 64, 64)] * 2, [target] * 2
    with pytest.raises(AcamkdError, match=r"ld: its gradient reaches \d of the \d{3} parameters .* give the weight as"):
        calibrated(student, teacher, [config.Loss(name="ld", weight="auto")], [batch])
    (entry,) = calibrated(student, teacher, [config.Loss(name="kddetr", weight="auto")], [batch])
    assert isinstance(entry.weight, float)


@pytest.mark.parametrize(("norms", "said"), [
    ((math.nan, 1.0), "distillation is nan"),
    ((1.0, math.inf), "task is inf"),
    ((math.inf, 0.0), "distillation is inf"),
])  # fmt: skip
def test_a_gradient_that_is_not_finite_is_named(
    norms: tuple[float, float], said: str, segmentation: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = config.load(segmentation, ["losses.0.weight=auto"])
    student, teacher, batches = networks(recipe)
    found = iter([{"a": (1.0, 1.0)}, {"a": norms, "b": (1.0, 1.0)}])
    monkeypatch.setattr("acamkd.distillation.auto_weight.gradient_norms", lambda *_: next(found))
    with pytest.raises(AcamkdError, match=f"auto of fitnet: the gradient of the {said} in 1 of 2 batches at"):
        calibrated(student, teacher, recipe.losses, batches.train)


def test_a_gradient_ratio_without_effect_is_said(segmentation: Path, caplog: pytest.LogCaptureFixture) -> None:
    student, teacher, batches = networks(config.load(segmentation))
    warning = "fitnet: gradient_ratio acts only with `weight: auto`, which is not set"
    for options, said in (({"gradient_ratio": 4}, True), ({"gradient_ratio": 4, "weight": 2.0}, False), ({}, False)):
        caplog.clear()
        entry = config.Loss(name="fitnet", pairs=("segmentation_head.0",), **options)
        assert calibrated(student, teacher, [entry], batches.train) == (entry,)
        assert (warning in caplog.messages) == said


class Weightless(FeatureLoss):
    """Compares maps. Paper: none, none, none 2026.

    Args:
        power: Of the difference.
    """

    def __init__(self, student_channels: int, teacher_channels: int, *, power: int = 2) -> None:
        super().__init__(student_channels, teacher_channels)
        self.power = power

    def terms(self, student: Tensor, teacher: Tensor, context: DistillationContext) -> dict[str, Tensor]:
        """`distance` alone."""
        return {"distance": (student - teacher).abs().pow(self.power).mean()}


def test_a_method_without_a_weight_cannot_be_scaled(segmentation: Path) -> None:
    name = f"{__name__}:Weightless"
    recipe = config.load(segmentation, [f"losses=[{{name: '{name}', pairs: [segmentation_head.0], weight: auto}}]"])
    student, teacher, batches = networks(recipe)
    coarse = config.Loss.model_validate({"name": name, "pairs": ["segmentation_head.0"], "level_decay": 0.5})
    with pytest.raises(AcamkdError, match=f"level_decay multiplies the option `weight`, and {name} has none"):
        build_distiller(student, teacher, [coarse])
    with pytest.raises(AcamkdError, match=f"{name} has no option `weight` that `weight: auto` could set"):
        calibrated(student, teacher, recipe.losses, batches.train)


def test_a_distiller_alone_cannot_calibrate(segmentation: Path) -> None:
    recipe = config.load(segmentation, ["losses.0.weight=auto"])
    student, teacher, _ = networks(recipe)
    with pytest.raises(AcamkdError, match=r"losses.0 \(fitnet\): `weight: auto` needs images"):
        build_distiller(student, teacher, recipe.losses)
