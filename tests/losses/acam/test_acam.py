"""ACAM against a dense version from the paper: an explicit softmax map, (N, M, C, H, W) norms, loops over pairs."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from math import log
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from acamkd.errors import AcamkdError
from acamkd.losses.acam import fusion as attention
from acamkd.losses.acam.acam import ACAM, ASCM
from acamkd.losses.acam.fusion import window_side
from acamkd.losses.acam.masks import WATCH_EVERY, Masks, apply_masks, mask_overlap
from acamkd.losses.base import DistillationContext

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
    {"masks": ["spatial", "channel"], "diversity": "literal"},
    {"mask_source": "teacher"},
    {"mask_source": "teacher", "query": "student", "kv_stride": 2},
    {"mask_source": "random"},
    {"mask_source": "random", "mask_grad": "detached"},
    {"mask_source": "uniform"},
    {"mask_source": "uniform", "masks": "spatial", "weight": 3.0},
    {"mask_grad": "detached"},
    {"mask_grad": "detached", "diversity": "literal", "masks": "spatial"},
    {"mask_grad": "task", "masks": "channel"},
    {"mask_grad": "task", "query": "student", "kv_stride": 2},
    {"diversity": "literal", "num_masks": 4},
    {"kv_stride": 2},
    {"kv_stride": 3, "query": "student"},
    {"normalize": True, "kv_stride": 2},
    {"normalize": True, "mask_source": "teacher", "mask_grad": "look_ahead"},
    {"normalize": True, "mask_source": "random"},
    {"imitation": "standardized"},
    {"imitation": "softmax"},
    {"imitation": "softmax", "temperature": 4.0, "mask_grad": "detached"},
    {"imitation": "correlation", "temperature": 2.0},
    {"mask_grad": "look_ahead"},
    {"mask_grad": "look_ahead", "mask_source": "teacher", "masks": "spatial", "weight": 3.0},
    ACAM.PRESETS["paper"],
]


def joint(student_channels: int, teacher_channels: int, **options: Any) -> ACAM:
    """ACAM with the published masks, their published training and imitation, unless the options name others."""
    published = {"masks": "both", "mask_grad": "joint", "imitation": "squared"}
    return ACAM(student_channels, teacher_channels, **(published | options))


def maps(
    n: int, c_s: int, c_t: int, height: int, width: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    student = torch.randn(n, c_s, height, width, dtype=dtype, requires_grad=True)
    return student, torch.randn(n, c_t, height, width, dtype=dtype)


def projected(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """A 1x1 convolution: (N, C, H, W) -> (N, C', H, W)."""
    return torch.einsum("oc,nchw->nohw", weight[:, :, 0, 0], x) + bias[:, None, None]


def fuse(
    q: Tensor, k: Tensor, v: Tensor, units: Tensor | None, size: tuple[int, int], stride: int
) -> tuple[Tensor, Tensor]:
    """F of one image from its queries, keys and values (C, HW), and its products with units (M, C)."""
    height, width = size
    scale = float(q.shape[0]) ** -0.5
    if stride == 1:
        fused = v @ (q.T @ k * scale).softmax(dim=1).T
        return fused, fused if units is None else units @ fused
    grid = next(s for s in range(1, 999) if -(-height // s) * -(-width // s) <= attention.PROBES)
    probes = [i * width + j for i in range(0, height, grid) for j in range(0, width, grid)]
    received = (q[:, probes].T @ k * scale).softmax(dim=1).sum(dim=0)
    singles = received.topk(min(attention.KEYS, height * width) // 2).indices.tolist()
    members = [
        [p for p in range(height * width) if (p // width // stride, p % width // stride) == (i, j) and p not in singles]
        for i in range(-(-height // stride))
        for j in range(-(-width // stride))
    ]
    members = [window for window in members if window]
    scores = [scale * q.T @ k[:, window].mean(dim=1) + log(len(window)) for window in members]
    scores += [scale * q.T @ k[:, p] for p in singles]
    shares = torch.stack(scores).softmax(dim=0)  # (K, HW)
    answers = torch.stack([v[:, window].mean(dim=1) for window in members] + [v[:, p] for p in singles], dim=1)
    varied = torch.zeros_like(v @ k.T)
    for window in members:
        dv, dk = (x[:, window] - x[:, window].mean(dim=1, keepdim=True) for x in (v, k))
        varied = varied + dv @ dk.T / sum(map(len, members))
    fused = answers @ shares
    if units is None:
        return fused, fused
    shift = units @ varied @ q * scale
    variance = torch.zeros(len(units), dtype=q.dtype)
    for window in members:
        variance = variance + (units @ v[:, window]).var(dim=1, correction=0) * len(window) / sum(map(len, members))
    damped = shift / (1 + shift.square() / variance.clamp_min(1e-300)[:, None]).sqrt()
    return fused, units @ fused + shares[: len(members)].sum(dim=0) * damped


def overlap(masks: Tensor, form: str) -> Tensor:
    """Dice overlap of (N, M, K), pair by pair."""
    count, per_image = masks.shape[1], []
    pairs = [(i, j) for i in range(count) for j in range(count) if i != j]
    for image in masks:
        if form == "literal":
            inner = [image[i] @ image[j] for i, j in pairs]
            per_image.append(sum(inner, image.new_zeros(())) / sum(row @ row for row in image))
        else:
            dice = [2 * image[i] @ image[j] / (image[i] @ image[i] + image[j] @ image[j]) for i, j in pairs]
            per_image.append(sum(dice, image.new_zeros(())) / max(1, len(pairs)))
    return torch.stack(per_image).mean()


def textbook(
    parameters: Mapping[str, Tensor],
    student: Tensor,
    teacher: Tensor,
    *,
    num_masks: int = 6,
    weight: float = 1.0,
    diversity_weight: float = 1.0,
    query: str = "teacher",
    masks: str | list[str] = "both",
    mask_source: str = "cooperative",
    mask_grad: str = "joint",
    diversity: str = "pairwise",
    kv_stride: int = 1,
    normalize: bool = False,
    align: bool = False,
    tokens: Mapping[str, Tensor] | None = None,
    imitation: str = "squared",
    temperature: float = 1.0,
    task_gradient: Tensor | None = None,
) -> dict[str, Tensor]:
    """The class's docstring, literally; `parameters` are the module's own by name."""
    p = parameters
    if task_gradient is not None and (align or student.shape[1] != teacher.shape[1]):
        task_gradient = projected(p["align.weight"], torch.zeros_like(p["align.bias"]), task_gradient).detach()
    if align or student.shape[1] != teacher.shape[1]:
        student = projected(p["align.weight"], p["align.bias"], student)
    n, channels, height, width = teacher.shape
    kinds = ["channel", "spatial"] if masks == "both" else [masks] if isinstance(masks, str) else masks

    made: dict[str, Tensor] = {}
    if mask_source == "uniform":
        made = {
            "channel": teacher.new_ones(n, num_masks, channels),
            "spatial": teacher.new_ones(n, num_masks, height * width),
        }
    else:
        if mask_source == "fixed":
            fused = teacher.flatten(2)
            seen = p["selection.spatial"] @ fused if "spatial" in kinds else fused
        else:
            partner = teacher if mask_source == "teacher" else student if mask_grad == "joint" else student.detach()
            asking, answering = (teacher, partner) if query == "teacher" else (partner, teacher)
            if normalize:
                asking, answering = (
                    (x - x.mean(dim=1, keepdim=True)) / (x.var(dim=1, keepdim=True, correction=0) + 1e-5).sqrt()
                    for x in (asking, answering)
                )
            q = projected(p["fusion.query.weight"], p["fusion.query.bias"], asking).flatten(2)
            k = projected(p["fusion.key.weight"], p["fusion.key.bias"], answering).flatten(2)
            v = projected(p["fusion.value.weight"], p["fusion.value.bias"], answering).flatten(2)
            units = p.get("selection.spatial")
            images = [fuse(*image, units, (height, width), kv_stride) for image in zip(q, k, v, strict=True)]
            fused, seen = (torch.stack(each) for each in zip(*images, strict=True))
        if mask_source in ("fixed", "random"):
            fused, seen = fused.detach(), seen.detach()
        if "channel" in kinds:
            made["channel"] = torch.sigmoid(p["selection.channel"] @ fused.mean(dim=2).unsqueeze(1))
        if "spatial" in kinds:
            made["spatial"] = torch.sigmoid(seen)

    compared = [student, teacher]
    if imitation == "standardized":
        compared = [
            torch.stack([(x[:, k] - x[:, k].mean()) / (x[:, k].std() + 1e-6) for k in range(channels)], dim=1)
            for x in compared
        ]
    difference = (compared[1] - compared[0]).unsqueeze(1)  # (N, 1, C, H, W)
    shapes = {"channel": (n, num_masks, channels, 1, 1), "spatial": (n, num_masks, 1, height, width)}
    complement = {"channel": height * width, "spatial": channels}
    summed = {"channel": 2, "spatial": 1}  # what a mask of this kind does not tell apart
    terms: dict[str, Tensor] = {}
    for kind in ("channel", "spatial"):
        if kind not in kinds:
            continue
        made[kind] = mask = made[kind].flatten(2)
        read = mask if mask_grad == "joint" else mask.detach()
        if imitation == "softmax":
            p_student, p_teacher = ((x.flatten(2) / temperature).softmax(dim=summed[kind]) for x in (student, teacher))
            divergence = temperature**2 * (p_teacher * (p_teacher / p_student).log()).sum(dim=summed[kind])  # (N, K)
            normalized = (read.square() * divergence.unsqueeze(1)).sum(dim=2) / read.sum(dim=2)
        elif imitation == "correlation":
            p_student, p_teacher = ((x.flatten(2) / temperature).softmax(dim=1) for x in (student, teacher))
            centered = [p - p.mean(dim=summed[kind], keepdim=True) for p in (p_student, p_teacher)]
            lengths = [p.norm(dim=summed[kind]) for p in centered]
            similar = (centered[0] * centered[1]).sum(dim=summed[kind]) / (lengths[0] * lengths[1] + 1e-8)
            distance = temperature**2 * (1 - similar)
            normalized = (read.square() * distance.unsqueeze(1)).sum(dim=2) / read.sum(dim=2)
        else:
            norms = (read.view(shapes[kind]) * difference).square().sum(dim=(2, 3, 4))  # (N, M)
            normalized = norms / (complement[kind] * read.sum(dim=2))
        terms[kind] = weight * normalized.mean()
        if mask_grad == "look_ahead":
            assert task_gradient is not None
            slope = 2 * (student - teacher).detach().flatten(2) / complement[kind]  # of the mean squared error
            reward = (slope * task_gradient.flatten(2)).sum(dim=summed[kind])
            reward = reward / reward.abs().mean(dim=1, keepdim=True)
            collected = (mask * reward.unsqueeze(1)).sum(dim=2) / mask.sum(dim=2)
            terms[f"{kind}_selection"] = (10 * (mask.mean(dim=2) - 0.5) ** 2 - collected).mean()
    if mask_source != "uniform":
        overlaps = [overlap(mask, diversity) for mask in made.values()]
        terms["diversity"] = diversity_weight * sum(overlaps, teacher.new_zeros(()))
    return terms


def compare(loss: ACAM, options: Mapping[str, Any], student: Tensor, teacher: Tensor, resized: Tensor) -> None:
    """Values and gradients of every term; `resized` is what the dense version takes for the student's map."""
    parameters = dict(loss.named_parameters())
    task_gradient = torch.randn_like(resized) if loss.needs else None
    terms = loss(student, teacher, DistillationContext(task_gradient=task_gradient))
    expected = textbook(parameters, resized, teacher, task_gradient=task_gradient, **options)
    assert set(terms) == set(expected)
    learned = [student, *(parameter for parameter in parameters.values() if parameter.requires_grad)]
    for name, term in terms.items():
        torch.testing.assert_close(term, expected[name], rtol=1e-10, atol=1e-12)
        gradients = gradients_of(term, learned)
        assert all(gradient.isfinite().all() for gradient in gradients)
        torch.testing.assert_close(gradients, gradients_of(expected[name], learned), rtol=1e-10, atol=1e-12)


def gradients_of(term: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """Gradient of one term; zero where it depends on nothing."""
    if not term.requires_grad:
        return [torch.zeros_like(tensor) for tensor in tensors]
    return list(torch.autograd.grad(term, tensors, retain_graph=True, materialize_grads=True))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_values_and_gradients_are_those_of_the_dense_version(
    options: Mapping[str, Any], shape: tuple[int, ...]
) -> None:
    n, c_s, c_t, height, width = shape
    student, teacher = maps(n, c_s, c_t, height, width)
    compare(joint(c_s, c_t, **options).double(), options, student, teacher, student)


@pytest.mark.parametrize("block", [1, 7, 100])
@pytest.mark.parametrize("options", [{}, {"masks": "channel", "query": "student"}, {"kv_stride": 2}], ids=str)
def test_attention_in_blocks_is_the_same(
    options: Mapping[str, Any], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "BLOCK", block)
    student, teacher = maps(3, 4, 6, 5, 3)
    compare(joint(4, 6, **options).double(), options, student, teacher, student)


def test_auto_leaves_at_most_256_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [(100, 168), (50, 84), (25, 42), (16, 16), (1, 257), (129, 257), (1, 1)]
    assert [window_side(size) for size in sizes] == [12, 6, 3, 1, 3, 17, 1]
    student, teacher = maps(2, 3, 3, 7, 5)
    whole, auto = joint(3, 3).double(), joint(3, 3, kv_stride="auto").double()
    auto.load_state_dict(whole.state_dict())
    assert auto(student, teacher) == whole(student, teacher)  # 35 positions
    monkeypatch.setattr(attention, "KEYS", 12)  # 3 x 2 windows and 6 positions
    monkeypatch.setattr(attention, "PROBES", 10)  # 4 x 2 queries on the corners of 2 x 2 ones
    compare(auto, {"kv_stride": 3}, student, teacher, student)


def correlations(ours: Masks, theirs: Masks) -> list[float]:
    """Of each mask of one image with its other form."""
    pairs = [
        torch.stack([one.flatten(), other.flatten()])
        for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None
        for one, other in zip(a[0], b[0], strict=True)
    ]  # fmt: skip
    return [float(torch.corrcoef(pair)[0, 1]) for pair in pairs]


@pytest.mark.parametrize("sharpness", [1.0, 30.0])
def test_windows_keep_the_masks(sharpness: float) -> None:
    """Maps without any structure: of soft attention averages alone would say nothing, of sharp attention even less."""
    student, teacher = maps(1, 8, 8, 24, 24)
    whole, windowed = joint(8, 8).double(), joint(8, 8, kv_stride=4).double()
    with torch.no_grad():
        whole.fusion.query.weight *= sharpness
    windowed.load_state_dict(whole.state_dict())
    assert min(correlations(windowed.masks_of(student, teacher), whole.masks_of(student, teacher))) > 0.95


def test_smaller_windows_at_the_border_count_less() -> None:
    """Where all keys are alike, the fused map is the mean over positions, and not over windows."""
    student, teacher = maps(2, 4, 4, 7, 5)
    whole, windowed = joint(4, 4).double(), joint(4, 4, kv_stride=3).double()
    torch.nn.init.zeros_(whole.fusion.key.weight)
    windowed.load_state_dict(whole.state_dict())
    torch.testing.assert_close(
        windowed.masks_of(student, teacher), whole.masks_of(student, teacher), rtol=1e-12, atol=1e-12
    )


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
    loss = joint(3, 4, kv_stride=2).double()
    with caplog.at_level(logging.INFO, logger="acamkd"):
        compare(loss, {"kv_stride": 2}, student, teacher, resized)
        loss(student, teacher)
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"ACAM: student map {student_size} is resampled to the teacher's {teacher_size}"]
    assert [x.shape[2:] for x in loss.masks_of(student, teacher) if x is not None] == [(4,), teacher_size]


def test_uniform_masks_are_two_mean_squared_errors() -> None:
    student, teacher = maps(2, 3, 3, 5, 4)
    terms = joint(3, 3, mask_source="uniform", weight=2.0)(student, teacher)
    expected = 2 * F.mse_loss(student, teacher)
    assert list(terms) == ["channel", "spatial"]
    for term in terms.values():
        torch.testing.assert_close(term, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["fusion", "channel", "spatial"]),
        ({"align": True}, ["align", "fusion", "channel", "spatial"]),
        ({"masks": "channel"}, ["fusion", "channel"]),
        ({"masks": ["spatial"]}, ["fusion", "spatial"]),
        ({"mask_source": "teacher", "masks": "spatial"}, ["fusion", "spatial"]),
        ({"mask_source": "random"}, ["fusion", "channel", "spatial"]),
        ({"mask_source": "fixed"}, ["channel", "spatial"]),
        ({"mask_source": "uniform"}, []),
        ({"mask_source": "uniform", "align": True}, ["align"]),
        (ACAM.PRESETS["paper"], ["fusion", "channel", "spatial"]),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_only_the_parameters_in_use_exist(options: dict[str, Any], expected: list[str]) -> None:
    shapes: dict[str, dict[str, tuple[int, ...]]] = {
        "align": {"align.weight": (8, 8, 1, 1), "align.bias": (8,)},
        "fusion": {
            "fusion.query.weight": (4, 8, 1, 1), "fusion.query.bias": (4,),
            "fusion.key.weight": (4, 8, 1, 1), "fusion.key.bias": (4,),
            "fusion.value.weight": (8, 8, 1, 1), "fusion.value.bias": (8,),
        },
        "channel": {"selection.channel": (6, 1)},
        "spatial": {"selection.spatial": (6, 8)},
    }  # fmt: skip
    wanted = {name: shape for part in expected for name, shape in shapes[part].items()}
    assert {name: tuple(tensor.shape) for name, tensor in joint(8, 8, **options).state_dict().items()} == wanted


def test_unequal_channels_are_aligned() -> None:
    assert tuple(joint(3, 8).state_dict()["align.weight"].shape) == (8, 3, 1, 1)
    assert tuple(joint(3, 1).state_dict()["fusion.query.weight"].shape) == (1, 1, 1, 1)


@pytest.mark.parametrize("source", ["cooperative", "teacher", "fixed", "random", "uniform"])
def test_frozen_masks_leave_only_the_projection_to_learn(source: Any) -> None:
    learned = {
        name for name, parameter in joint(3, 4, mask_source=source).named_parameters() if parameter.requires_grad
    }
    assert {"align.weight", "align.bias"} <= learned
    assert (learned == {"align.weight", "align.bias"}) == (source in ("fixed", "random", "uniform"))


def test_the_paper_preset_is_the_literal_method() -> None:
    assert ACAM.PRESETS["paper"] == {
        "num_masks": 6, "weight": 1.0, "diversity_weight": 1.0, "query": "teacher", "masks": "both",
        "mask_source": "cooperative", "mask_grad": "joint", "imitation": "squared", "diversity": "literal",
        "kv_stride": 1, "normalize": False,
    }  # fmt: skip


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
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = loss(student, teacher)
    plain = loss(student.float(), teacher.float())
    for name, term in terms.items():
        assert term.dtype == torch.float32
        assert term.item() == plain[name].item()


class _Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Remembers the number of elements of the largest tensor that any operator gives, backward included."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.numel = max(self.numel, *(x.numel() for x in _tensors(result)), 0)
        return result


def _tensors(result: Any) -> Iterator[Tensor]:
    for each in result if isinstance(result, (list, tuple)) else (result,):
        if isinstance(each, Tensor):
            yield each


@pytest.mark.parametrize("options", [{}, {"kv_stride": 2}, {"kv_stride": "auto"}, {"query": "student"}], ids=str)
def test_nothing_is_ever_as_large_as_the_dense_maps(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    n, channels, side = 2, 32, 60
    one_map = n * channels * side**2
    monkeypatch.setattr(attention, "BLOCK", one_map)
    student, teacher = maps(n, channels, channels, side, side, torch.float32)
    loss, saved = joint(channels, channels, **options), [0]

    def pack(x: Tensor) -> Tensor:
        saved.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), _Largest() as largest:
        torch.stack(list(loss(student, teacher).values())).sum().backward()  # type: ignore[no-untyped-call]
    assert max(saved) <= one_map
    assert largest.numel <= 2 * one_map  # 1/56 of the attention map, and 1/3 of one (N, M, C, H, W)
    assert 2 * one_map < min(n * (side**2) ** 2 // 50, n * 6 * channels * side**2 // 2)


def test_masks_of_gives_probabilities_without_gradient() -> None:
    student, teacher = maps(2, 3, 4, 6, 5)
    channel, spatial = joint(3, 4, num_masks=5).double().masks_of(student, teacher)
    assert channel is not None
    assert spatial is not None
    assert channel.shape == (2, 5, 4)
    assert spatial.shape == (2, 5, 6, 5)
    for masks in (channel, spatial):
        assert not masks.requires_grad
        assert ((masks > 0) & (masks < 1)).all()
    assert joint(3, 4, masks="channel").double().masks_of(student, teacher).spatial is None
    uniform = joint(3, 4, mask_source="uniform", masks="spatial", num_masks=2).double().masks_of(student, teacher)
    assert uniform.channel is None
    assert torch.equal(uniform.spatial, torch.ones(2, 2, 6, 5, dtype=torch.float64))  # type: ignore[arg-type]


@pytest.mark.parametrize("kinds", [("channel", "spatial"), ("channel",), ("spatial",)])
def test_the_token_stage_masks_the_map_and_measures_the_overlap(kinds: tuple[str, ...]) -> None:
    units, x = ASCM(3, 4, kinds), torch.randn(2, 3, 5, 4)
    rebuilt, measured = units.masked(x)
    masks = units(x)
    torch.testing.assert_close(rebuilt, apply_masks(masks, x))
    torch.testing.assert_close(measured, mask_overlap(masks))
    (rebuilt.sum() + measured).backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in units.parameters())


def test_task_gradients_reach_what_makes_the_masks_and_nothing_else() -> None:
    student, teacher = maps(2, 3, 4, 6, 5)
    loss = joint(3, 4, mask_grad="task").double()
    seen = loss.masked(student, teacher)
    assert loss.teacher_task
    torch.testing.assert_close(seen, apply_masks(loss.masks_of(student, teacher), teacher))
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


def test_the_masks_of_the_last_forward_are_measured() -> None:
    student, teacher = maps(2, 3, 4, 6, 5)
    loss = joint(3, 4).double()
    loss(student, teacher)
    for kind, mask in loss.masks_of(student, teacher)._asdict().items():
        torch.testing.assert_close(loss.statistics[f"{kind}_mask"], mask.mean())


@pytest.mark.parametrize("numbered", [True, False])  # a loop of one's own may pass no step
def test_a_collapse_is_said_once_or_stops(numbered: bool, caplog: pytest.LogCaptureFixture) -> None:
    student, teacher = maps(2, 3, 4, 6, 5)

    def train(**options: Any) -> None:
        loss = joint(3, 4, masks="spatial", **options).double()
        assert loss.selection.spatial is not None
        torch.nn.init.normal_(loss.fusion.key.weight, std=20)  # sharp attention, and so masks that vary
        torch.nn.init.normal_(loss.selection.spatial, std=5)
        for step in range(3 * WATCH_EVERY):
            if step == WATCH_EVERY:
                torch.nn.init.zeros_(loss.selection.spatial)
            loss(student, teacher, DistillationContext(step=step) if numbered else None)

    said = "the spatial masks have collapsed by step 200: they vary by 0.000 only, less than 0.02: they choose nothing"
    train()
    assert caplog.messages == [said]
    with pytest.raises(AcamkdError) as stopped:
        train(on_mask_collapse="stop")
    assert str(stopped.value) == f"{said} (on_mask_collapse: stop)"
    train(mask_source="random")  # never meant to live
    assert len(caplog.messages) == 1


def test_masks_of_a_single_position_have_not_collapsed() -> None:
    """The last level of a pyramid over small images: nothing to choose, and no reason to stop."""
    loss = ACAM(3, 4, masks="spatial", mask_grad="detached", on_mask_collapse="stop").double()
    loss(*maps(2, 3, 4, 1, 1), DistillationContext(step=WATCH_EVERY - 1))
    assert loss.statistics["spatial_mask_std"] == 0
    assert 0.1 < loss.statistics["spatial_mask"] < 0.9


def test_an_align_carries_the_task_gradient_to_the_teachers_channels() -> None:
    student, teacher = maps(1, 2, 3, 2, 2)
    loss = joint(2, 3, num_masks=1, mask_grad="look_ahead").double()
    gradient = torch.randn_like(student)
    rewards = loss._rewards(loss.align(student), teacher, DistillationContext(task_gradient=gradient))
    for kind, dims in (("channel", (2, 3)), ("spatial", 1)):
        reward = rewards[kind]
        squared = (loss.align(student) - teacher).square().mean(dim=dims).flatten()
        felt = torch.stack([
            (torch.autograd.grad(error, student, retain_graph=True)[0] * gradient).sum() for error in squared
        ])  # fmt: skip
        torch.testing.assert_close(reward[0], felt / felt.abs().mean())


def test_look_ahead_masks_rise_where_imitation_pays_and_stay_alive() -> None:
    """The task wants the teacher's map on the left half and the opposite on the right."""
    teacher = torch.randn(4, 6, 8, 8)
    teacher[:, 0, :, :4] += 3  # by which the masks can tell them apart
    student = teacher / 2
    sign = torch.where(torch.arange(8) < 4, 1.0, -1.0)
    context = DistillationContext(task_gradient=(student - teacher) * sign)
    loss = joint(6, 6, num_masks=2, mask_grad="look_ahead", diversity_weight=0.0)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.02)
    for _ in range(100):
        optimizer.zero_grad()
        loss(student, teacher, context)["spatial_selection"].backward()
        optimizer.step()
    mask = loss.masks_of(student, teacher).spatial
    assert mask is not None
    assert 0.3 < mask.mean() < 0.7
    assert mask[..., :4].mean() > 0.7
    assert mask[..., 4:].mean() < 0.3


def test_only_the_masks_learn_from_the_look_ahead() -> None:
    student, teacher = maps(2, 3, 4, 6, 5)
    loss = joint(3, 4, mask_grad="look_ahead").double()
    context = DistillationContext(task_gradient=torch.randn_like(student))
    terms = loss(student, teacher, context)
    assert set(terms) == {"channel", "channel_selection", "spatial", "spatial_selection", "diversity"}
    for name, kind in (("channel_selection", "spatial"), ("spatial_selection", "channel"), ("diversity", "none")):
        gradients = torch.autograd.grad(
            terms[name], [student, *loss.parameters()], retain_graph=True, allow_unused=True
        )
        reached = {n for (n, _), g in zip(loss.named_parameters(), gradients[1:], strict=True) if g is not None}
        assert gradients[0] is None
        assert reached == {
            n for n, _ in loss.named_parameters() if not n.startswith("align") and n != f"selection.{kind}"
        }
    for name in ("channel", "spatial"):  # the student feels the masks, and does not move them
        gradients = torch.autograd.grad(terms[name], list(loss.parameters()), retain_graph=True, allow_unused=True)
        reached = {n for (n, _), g in zip(loss.named_parameters(), gradients, strict=True) if g is not None}
        assert reached == {"align.weight", "align.bias"}
    with pytest.raises(ValueError, match="ACAM needs task_gradient in the DistillationContext"):
        loss(student, teacher)
    with torch.no_grad():  # a validation's loss: nothing learns
        assert set(loss(student, teacher)) == {"channel", "spatial", "diversity"}


@pytest.mark.parametrize("source", ["random", "uniform", "fixed"])
def test_what_trains_the_masks_does_not_matter_where_none_learn(source: Any) -> None:
    student, teacher = maps(2, 3, 4, 6, 5)
    found = []
    for how in ("look_ahead", "joint", "detached"):
        torch.manual_seed(0)
        terms = ACAM(3, 4, mask_source=source, mask_grad=how).double()(student, teacher)  # without a task gradient
        found.append((terms, torch.autograd.grad(torch.stack(list(terms.values())).sum(), student)[0]))
    for terms, gradient in found[1:]:
        assert terms == found[0][0]
        assert torch.equal(gradient, found[0][1])


def test_the_student_takes_part_in_its_masks() -> None:
    student, teacher = maps(2, 3, 3, 6, 5)
    other = torch.randn_like(student)
    for source, depends in (("cooperative", True), ("random", True), ("teacher", False), ("fixed", False)):
        loss = joint(3, 3, mask_source=source).double()
        first, second = loss.masks_of(student, teacher), loss.masks_of(other, teacher)
        assert all(torch.equal(x, y) != depends for x, y in zip(first, second, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"query": "both"}, "query must be one of 'teacher', 'student', not 'both'"),
        ({"mask_source": "none"}, "mask_source must be one of 'cooperative', .* not 'none'"),
        ({"mask_grad": "none"}, "mask_grad must be one of 'look_ahead', 'joint', 'detached', 'task', not 'none'"),
        ({"mask_grad": "task", "mask_source": "uniform"}, "mask_source='uniform' has none"),
        ({"mask_grad": "task", "mask_source": "random"}, "mask_source='random' has none"),
        (
            {"imitation": "cosine"},
            "imitation must be one of 'squared', 'standardized', 'softmax', 'correlation', not 'cosine'",
        ),
        ({"diversity": "dice"}, "diversity must be one of 'pairwise', 'literal', not 'dice'"),
        ({"masks": "position"}, "masks must be 'spatial', 'channel' or 'both', .* not 'position'"),
        ({"masks": ["channel", "both"]}, r"masks must be 'spatial', .* not \['channel', 'both'\]"),
        ({"masks": []}, r"masks must be 'spatial', .* not \[\]"),
        ({"num_masks": 0}, "num_masks must be at least 1, not 0"),
        ({"kv_stride": 0}, "kv_stride must be a whole number from 1, or 'auto', not 0"),
        ({"kv_stride": "half"}, "kv_stride must be a whole number from 1, or 'auto', not 'half'"),
        (
            {"normalize": True, "mask_source": "uniform"},
            "normalize acts on the fusion, and mask_source='uniform' has none",
        ),
        ({"tokens": {}}, "tokens belong to mask_source='fixed', not to 'cooperative'"),
        (
            {"mask_source": "fixed", "masks": "channel", "tokens": {"channel": torch.zeros(3, 1)}},
            r"the tokens given are \{'channel': \(3, 1\)\}, but must be \{'channel': \(6, 1\)\}",
        ),
    ],
    ids=str,
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ACAM(4, 4, **options)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ((2, 5, 4, 4), (2, 4, 4, 4), r"the student's map is \(2, 5, 4, 4\), but must be \(N, 3, H, W\)"),
        ((2, 3, 4, 4), (2, 3, 4, 4), r"the teacher's map is \(2, 3, 4, 4\), but must be \(N, 4, H, W\)"),
        ((2, 3, 4), (2, 4, 4, 4), r"the student's map is \(2, 3, 4\)"),
        ((2, 3, 4, 4), (1, 4, 4, 4), "batch sizes differ, student 2, teacher 1"),
    ],
)
def test_maps_that_do_not_fit_are_refused(student: tuple[int, ...], teacher: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        joint(3, 4)(torch.zeros(student), torch.zeros(teacher))


@pytest.mark.parametrize("kv_stride", [1, 2, "auto"])
def test_compiled_the_fusion_is_one_graph(kv_stride: Any) -> None:
    student, teacher = maps(2, 4, 4, 18, 16)
    loss = joint(4, 4, kv_stride=kv_stride).double()
    units = loss.selection.spatial_units()
    plain = loss.fusion(teacher, student, units)
    torch.compiler.reset()
    compiled: Any = torch.compile(loss.fusion, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(teacher, student, units), plain)
