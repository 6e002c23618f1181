"""ACAM against the paper's reference; what the paper has not is composed of the reference's parts."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from acamkd.losses.acam import reference
from acamkd.losses.acam.acam import ACAM
from acamkd.losses.acam.distances import distillation_distances
from acamkd.losses.acam.fusion import layer_norm
from acamkd.losses.acam.masks import ASCM, Masks, apply_masks
from acamkd.losses.base import DistillationContext
from acamkd.losses.functional import dice_overlap, standardize
from acamkd.losses.pkd import PKD
from tiny_maps import gradients_of, joint, maps, vanishing_terms

SHAPES = [(1, 3, 3, 5, 7), (3, 4, 6, 5, 3), (3, 1, 1, 4, 3), (2, 2, 1, 1, 5)]
"""(N, C_s, C_t, H, W)."""

OPTIONS: list[Mapping[str, Any]] = [
    {},
    {"num_masks": 1},
    {"num_masks": 3, "weight": 2.5, "diversity_weight": 0.3},
    {"align": True},
    {"query": "student"},
    {"masks": "channel"},
    {"masks": "spatial"},
    {"masks": "both", "diversity": "literal"},
    {"mask_source": "teacher"},
    {"mask_source": "teacher", "query": "student"},
    {"mask_source": "random"},
    {"mask_source": "random", "mask_grad": "detached"},
    {"mask_source": "uniform"},
    {"mask_source": "uniform", "masks": "spatial", "weight": 3.0},
    {"mask_grad": "detached"},
    {"mask_grad": "detached", "diversity": "literal", "masks": "spatial"},
    {"mask_grad": "task", "masks": "channel"},
    {"mask_grad": "task", "query": "student"},
    {"diversity": "literal", "num_masks": 4},
    {"normalize": True},
    {"normalize": True, "mask_source": "teacher", "mask_grad": "look_ahead"},
    {"normalize": True, "mask_source": "random"},
    {"imitation": "standardized"},
    {"imitation": "softmax"},
    {"imitation": "softmax", "temperature": 4.0, "mask_grad": "detached"},
    {"imitation": "correlation", "temperature": 2.0},
    {"mask_grad": "look_ahead"},
    {"mask_grad": "look_ahead", "mask_source": "teacher", "masks": "spatial", "weight": 3.0},
]


def masks_of(
    loss: ACAM, p: Mapping[str, Tensor], student: Tensor, teacher: Tensor, masks: str | list[str]
) -> dict[str, Tensor]:
    """Of an aligned student's feature map: (N, M, C) and (N, M, P), as far as in use."""
    if loss.mask_source == "uniform":
        made = teacher.new_ones(len(teacher), loss.num_masks, 1)
        both = (made.expand(-1, -1, teacher.shape[1]), made.expand(-1, -1, teacher[0, 0].numel()))
    else:
        partner = teacher if loss.mask_source == "teacher" else student
        query, key_value = (teacher, partner) if loss.query == "teacher" else (partner, teacher)
        # Of a kind that is not in use there are no units: any stand for them.
        blank = {"selection.channel": teacher.new_zeros(1, 1), "selection.spatial": teacher.new_zeros(1, 1)}
        if loss.mask_source == "fixed":
            fused = teacher.flatten(2)
        else:
            if loss.fusion.normalize:
                query, key_value = layer_norm(query), layer_norm(key_value)
            fused = reference.stca_ff(p, query, key_value)
        blank["selection.spatial"] = teacher.new_zeros(1, fused.shape[1])
        both = reference.ascm({**blank, **p}, fused)
    if loss.mask_source in ("fixed", "random"):
        both = (both[0].detach(), both[1].detach())
    kinds = ("channel", "spatial") if masks == "both" else (masks,) if isinstance(masks, str) else masks
    return {kind: mask for kind, mask in zip(("channel", "spatial"), both, strict=True) if kind in kinds}


def expected_terms(
    loss: ACAM, student: Tensor, teacher: Tensor, options: Mapping[str, Any], task_gradient: Tensor | None
) -> dict[str, Tensor]:
    """Every term, by the options that the loss was built with."""
    p = dict(loss.named_parameters())
    if "align.weight" in p:
        student = reference.conv1x1(p, "align", student)
        if task_gradient is not None:
            blank = {**p, "align.bias": torch.zeros_like(p["align.bias"])}
            task_gradient = reference.conv1x1(blank, "align", task_gradient).detach()
    felt = student if loss.mask_grad == "joint" else student.detach()
    made = masks_of(loss, p, felt, teacher, options.get("masks", "both"))
    terms: dict[str, Tensor] = {}
    for kind, mask in made.items():
        read = mask if loss.mask_grad == "joint" else mask.detach()
        if loss.imitation in ("softmax", "correlation"):
            (distance,) = distillation_distances(student, teacher, (kind,), loss.imitation, loss.temperature).values()
            term = ((read.square() * distance.unsqueeze(1)).sum(dim=2) / read.sum(dim=2)).mean()
        else:
            compared = (teacher, student)
            if loss.imitation == "standardized":
                compared = (standardize(teacher), standardize(student))
            term = {"channel": reference.channel_loss, "spatial": reference.spatial_loss}[kind](read, *compared)
        terms[kind] = loss.weight * term
        if task_gradient is not None:
            summed = {"channel": 2, "spatial": 1}[kind]  # what a mask of this kind does not tell apart
            slope = (student - teacher).detach().flatten(2)  # of the squared error, up to a factor
            reward = (slope * task_gradient.flatten(2)).sum(dim=summed)
            reward = reward / reward.abs().mean(dim=1, keepdim=True)
            collected = (mask * reward.unsqueeze(1)).sum(dim=2) / mask.sum(dim=2)
            terms[f"{kind}_selection"] = (10 * (mask.mean(dim=2) - 0.5) ** 2 - collected).mean()
    if loss.mask_source != "uniform":
        overlap = reference.diversity if loss.diversity == "literal" else dice_overlap
        terms["diversity"] = loss.diversity_weight * torch.stack([overlap(mask) for mask in made.values()]).sum()
    return terms


def compare(loss: ACAM, options: Mapping[str, Any], student: Tensor, teacher: Tensor, resized: Tensor) -> None:
    """Values and gradients of every term; `resized` is what the reference takes for the student's feature map."""
    task_gradient = torch.randn_like(resized) if loss.needs else None
    terms = loss(student, teacher, DistillationContext(task_gradient=task_gradient))
    expected = expected_terms(loss, resized, teacher, options, task_gradient)
    assert set(terms) == set(expected)
    learned = [student, *(parameter for parameter in loss.parameters() if parameter.requires_grad)]
    for name, term in terms.items():
        torch.testing.assert_close(term, expected[name], rtol=1e-10, atol=1e-12)
        gradients = gradients_of(term, learned)
        assert all(gradient.isfinite().all() for gradient in gradients)
        torch.testing.assert_close(gradients, gradients_of(expected[name], learned), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("query", ["teacher", "student"])
def test_the_paper_preset_is_the_reference(query: Any, shape: tuple[int, ...]) -> None:
    n, c_s, c_t, height, width = shape
    student, teacher = maps(n, c_s, c_t, height, width)
    loss = ACAM(c_s, c_t, **{**ACAM.PRESETS["paper"], "query": query}).double()
    p = dict(loss.named_parameters())
    if query == "teacher":
        expected = reference.acam(p, student, teacher)
        for name, term in loss(student, teacher).items():
            torch.testing.assert_close(term, expected[name], rtol=1e-10, atol=1e-12)
    compare(loss, {}, student, teacher, student)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_values_and_gradients_are_composed_of_the_reference(options: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    n, c_s, c_t, height, width = shape
    student, teacher = maps(n, c_s, c_t, height, width)
    compare(joint(c_s, c_t, **options).double(), options, student, teacher, student)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("masks", ["both", "channel", "spatial"])
def test_fixed_masks_come_from_the_tokens_given(shape: tuple[int, ...], masks: Any) -> None:
    n, c_s, c_t, height, width = shape
    student, teacher = maps(n, c_s, c_t, height, width)
    kinds = ("channel", "spatial") if masks == "both" else (masks,)
    tokens = ASCM(c_t, 4, kinds).double().state_dict()
    options = {"mask_source": "fixed", "num_masks": 4, "masks": masks, "tokens": tokens}
    loss = joint(c_s, c_t, **options).double()
    # Tokens are loaded into float32 and then widened: the same numbers on both sides of the comparison.
    for name, tensor in tokens.items():
        torch.testing.assert_close(loss.selection.state_dict()[name], tensor, rtol=1e-6, atol=1e-6)
    compare(loss, options, student, teacher, student)
    assert not any(parameter.requires_grad for parameter in loss.selection.parameters())


@pytest.mark.parametrize(("student_size", "teacher_size"), [((9, 7), (5, 4)), ((3, 4), (5, 7)), ((3, 9), (5, 4))])
def test_the_student_is_resampled_to_the_teachers_size(
    student_size: tuple[int, int], teacher_size: tuple[int, int], caplog: pytest.LogCaptureFixture
) -> None:
    student = torch.randn(2, 3, *student_size, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 4, *teacher_size, dtype=torch.float64)
    shrinks = student_size[0] >= teacher_size[0] and student_size[1] >= teacher_size[1]
    resized = (
        F.adaptive_avg_pool2d(student, teacher_size)
        if shrinks
        else F.interpolate(student, teacher_size, mode="bilinear", align_corners=False)
    )
    loss = joint(3, 4).double()
    with caplog.at_level(logging.INFO, logger="acamkd"):
        compare(loss, {}, student, teacher, resized)
        loss(student, teacher)
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"ACAM: the student's feature map {student_size} is resampled to the teacher's {teacher_size}"]
    assert [x.shape[2:] for x in loss.masks(student, teacher).values()] == [(4,), teacher_size]


def test_without_masks_it_is_twice_pkd() -> None:
    student, teacher = maps(2, 6, 6, 5, 4)
    terms = ACAM(6, 6, mask_source="uniform", mask_grad="detached", weight=1.0).double()(student, teacher)
    expected = 2 * PKD(6, 6, weight=1.0).double()(student, teacher)["correlation"]
    assert list(terms) == ["spatial"]
    torch.testing.assert_close(terms["spatial"], expected, rtol=1e-12, atol=0)


def test_uniform_masks_are_two_mean_squared_errors() -> None:
    student, teacher = maps(2, 3, 3, 5, 4)
    terms = joint(3, 3, mask_source="uniform", weight=2.0)(student, teacher)
    expected = 2 * F.mse_loss(student, teacher)
    assert list(terms) == ["channel", "spatial"]
    for term in terms.values():
        torch.testing.assert_close(term, expected, rtol=1e-12, atol=0)


def test_identical_masks_have_the_largest_overlap() -> None:
    student, teacher = maps(2, 3, 3, 4, 4)
    for form, largest in (("pairwise", 1.0), ("literal", 4.0)):
        loss = joint(3, 3, num_masks=5, diversity=form).double()
        for units in loss.selection.parameters():
            torch.nn.init.constant_(units, 0.3)
        assert loss(student, teacher)["diversity"].item() == pytest.approx(2 * largest)  # both kinds


def with_logits(value: float, dtype: torch.dtype, **options: Any) -> ACAM:
    """A loss all of whose masks are sigmoid(value): the attention averages values that are 1 everywhere."""
    loss = joint(4, 4, **options).to(dtype)
    torch.nn.init.zeros_(loss.fusion.value.weight)
    torch.nn.init.ones_(loss.fusion.value.bias)  # type: ignore[arg-type]
    with torch.no_grad():
        loss.selection.channel.fill_(value)  # type: ignore[union-attr]
        loss.selection.spatial.fill_(value / 4)  # type: ignore[union-attr]
    return loss


@pytest.mark.parametrize("diversity", ["pairwise", "literal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [-20.0, -44.0, -45.2, -60.0, -88.0, -200.0, 200.0])
def test_vanishing_masks_stay_finite(value: float, dtype: torch.dtype, diversity: str) -> None:
    loss = with_logits(value, dtype, diversity=diversity)
    student, teacher = maps(1, 4, 4, 3, 5, dtype)
    terms = loss(student, teacher)
    torch.stack(list(terms.values())).sum().backward()  # type: ignore[no-untyped-call]
    assert all(term.isfinite() for term in terms.values())
    assert terms["channel"].item() <= 1.01 * F.mse_loss(student, teacher).item() / (1 + torch.tensor(-value).exp())
    for gradient in (student.grad, *(parameter.grad for parameter in loss.parameters())):
        assert gradient is not None
        assert gradient.isfinite().all()


def test_terms_are_linear_in_their_weights() -> None:
    student, teacher = maps(2, 3, 3, 5, 4)
    one, other = joint(3, 3), joint(3, 3, weight=2.5, diversity_weight=0.25)
    other.load_state_dict(one.state_dict())
    first, second = one.double()(student, teacher), other.double()(student, teacher)
    for name, factor in (("channel", 2.5), ("spatial", 2.5), ("diversity", 0.25)):
        torch.testing.assert_close(second[name], factor * first[name], rtol=1e-12, atol=0)


def test_autocast_computes_in_float32() -> None:
    student, teacher = maps(2, 3, 4, 5, 7, torch.bfloat16)
    loss = joint(3, 4)
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        terms = loss(student, teacher)
    plain = loss(student.float(), teacher.float())
    for name, term in terms.items():
        assert term.dtype == torch.float32
        assert term.item() == plain[name].item()


def test_masks_are_probabilities_without_gradient() -> None:
    student, teacher = maps(2, 3, 4, 6, 5)
    found = joint(3, 4, num_masks=5).double().masks(student, teacher)
    assert {kind: tuple(mask.shape) for kind, mask in found.items()} == {"channel": (2, 5, 4), "spatial": (2, 5, 6, 5)}
    for mask in found.values():
        assert not mask.requires_grad
        assert ((mask > 0) & (mask < 1)).all()
    assert list(joint(3, 4, masks="channel").double().masks(student, teacher)) == ["channel"]
    uniform = joint(3, 4, mask_source="uniform", masks="spatial", num_masks=2).double().masks(student, teacher)
    assert list(uniform) == ["spatial"]
    assert torch.equal(uniform["spatial"], torch.ones(2, 2, 6, 5, dtype=torch.float64))


def test_task_gradients_reach_what_makes_the_masks_and_nothing_else() -> None:
    student, teacher = maps(2, 3, 4, 6, 5)
    loss = joint(3, 4, mask_grad="task").double()
    seen = loss.masked(student, teacher)
    assert loss.teacher_task
    torch.testing.assert_close(seen, apply_masks(Masks(**loss.masks(student, teacher)), teacher))
    seen.square().sum().backward()  # type: ignore[no-untyped-call]
    reached = {name for name, parameter in loss.named_parameters() if parameter.grad is not None}
    assert reached == {name for name, _ in loss.named_parameters() if not name.startswith("align")}
    assert student.grad is None


def test_task_gradients_reach_the_masks_of_an_earlier_layer() -> None:
    student, teacher = maps(2, 3, 4, 6, 5)
    earlier, later = (joint(3, 4, mask_grad="task").double() for _ in range(2))
    seen = later.masked(student, earlier.masked(student, teacher))
    seen.square().sum().backward()  # type: ignore[no-untyped-call]
    for loss in (earlier, later):
        assert all(p.grad is not None and p.grad.any() for p in loss.selection.parameters())


def test_the_student_takes_part_in_its_masks() -> None:
    student, teacher = maps(2, 3, 3, 6, 5)
    other = torch.randn_like(student)
    for source, depends in (("cooperative", True), ("random", True), ("teacher", False), ("fixed", False)):
        loss = joint(3, 3, mask_source=source).double()
        first, second = loss.masks(student, teacher), loss.masks(other, teacher)
        assert all(torch.equal(mask, second[kind]) != depends for kind, mask in first.items())


def test_between_equal_feature_maps_only_the_overlap_of_the_masks_remains() -> None:
    assert vanishing_terms(ACAM(8, 8)) == {"spatial"}
