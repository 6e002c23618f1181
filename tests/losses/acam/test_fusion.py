"""STCA-FF against the paper's reference and, with windows, against a loop over them."""

from __future__ import annotations

from collections.abc import Mapping
from math import log
from typing import Any

import pytest
import torch
from torch import Tensor

from acamkd.losses.acam import reference
from acamkd.losses.acam import sparse_attention as attention
from acamkd.losses.acam.fusion import STCAFF, layer_norm
from acamkd.losses.acam.sparse_attention import window_side
from tiny_maps import gradients_of, joint, maps

SHAPES = [(1, 3, 5, 7), (3, 6, 5, 3), (3, 1, 4, 3), (2, 2, 1, 5), (2, 16, 4, 3)]
"""(N, C, H, W); only the last has windows few enough that queries are not computed."""


def windowed(
    q: Tensor, k: Tensor, v: Tensor, units: Tensor, size: tuple[int, int], stride: int
) -> tuple[Tensor, Tensor]:
    """F of one image from its queries, keys and values (C, HW), and what units (M, C) see of it, window by window."""
    height, width = size
    scale = float(q.shape[0]) ** -0.5
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
    sources = torch.stack([v[:, window].mean(dim=1) for window in members] + [v[:, p] for p in singles], dim=1)
    varied = torch.zeros_like(v @ k.T)
    for window in members:
        dv, dk = (x[:, window] - x[:, window].mean(dim=1, keepdim=True) for x in (v, k))
        varied = varied + dv @ dk.T / sum(map(len, members))
    fused = sources @ shares
    shift = units @ varied @ q * scale
    variance = torch.zeros(len(units), dtype=q.dtype)
    for window in members:
        variance = variance + (units @ v[:, window]).var(dim=1, correction=0) * len(window) / sum(map(len, members))
    damped = shift / (1 + shift.square() / variance.clamp_min(1e-300)[:, None]).sqrt()
    return fused, units @ fused + shares[: len(members)].sum(dim=0) * damped


def compare(fusion: STCAFF, shape: tuple[int, ...], stride: int) -> None:
    """The average of F and its products with units, and every gradient of both."""
    n, channels, height, width = shape
    key_value, query = maps(n, channels, channels, height, width)
    query.requires_grad_()
    units = torch.randn(4, channels, dtype=torch.float64, requires_grad=True)
    found = fusion(query, key_value, units)
    p = {f"fusion.{name}": parameter for name, parameter in fusion.named_parameters()}
    asked, kept = (layer_norm(x) if fusion.normalize else x for x in (query, key_value))
    if stride == 1:
        fused = reference.stca_ff(p, asked, kept)
        seen = units @ fused
    else:
        q = reference.conv1x1(p, "fusion.query", asked).flatten(2)
        k, v = (reference.conv1x1(p, f"fusion.{part}", kept).flatten(2) for part in ("key", "value"))
        images = [windowed(*image, units, (height, width), stride) for image in zip(q, k, v, strict=True)]
        fused, seen = (torch.stack(each) for each in zip(*images, strict=True))
    inputs = [query, key_value, units, *fusion.parameters()]
    for ours, expected in zip(found, (fused.mean(dim=2), seen.view(n, -1, height, width)), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
        direction = torch.randn_like(ours)
        gradients = (gradients_of((x * direction).sum(), inputs) for x in (ours, expected))
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_values_and_gradients_are_those_of_the_dense_version(
    stride: int, normalize: bool, shape: tuple[int, ...]
) -> None:
    compare(STCAFF(shape[1], stride, normalize).double(), shape, stride)


@pytest.mark.parametrize("stride", [1, 2])
def test_the_average_of_f_is_left_out_where_nothing_reads_it(stride: int) -> None:
    student, teacher = maps(2, 6, 6, 5, 3)
    whole, seen = STCAFF(6, stride).double(), STCAFF(6, stride, average=False).double()
    seen.load_state_dict(whole.state_dict())
    units = torch.randn(4, 6, dtype=torch.float64)
    average, logits = seen(teacher, student, units)
    assert average.shape == (2, 0)
    inputs = [student, *whole.parameters()], [student, *seen.parameters()]
    expected = whole(teacher, student, units)[1]
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)
    ours, theirs = (gradients_of(x.square().sum(), list(y)) for x, y in zip((expected, logits), inputs, strict=True))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("block", [1, 7, 100])
@pytest.mark.parametrize("stride", [1, 2])
def test_attention_in_blocks_is_the_same(stride: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "BLOCK", block)
    compare(STCAFF(6, stride).double(), (3, 6, 5, 3), stride)


@pytest.mark.parametrize("stride", [2, 3])
def test_acam_hands_its_windows_on(stride: int) -> None:
    student, teacher = maps(2, 3, 3, 5, 4)
    loss = joint(3, 3, kv_stride=stride).double()
    made = loss.selection.masks(*loss.fusion(teacher, student, loss.selection.spatial_units())).in_use()
    assert loss.fusion.kv_stride == stride
    for kind, mask in loss.masks(student, teacher).items():
        torch.testing.assert_close(mask, made[kind], rtol=1e-12, atol=0)


def test_auto_leaves_at_most_256_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [(100, 168), (50, 84), (25, 42), (16, 16), (1, 257), (129, 257), (1, 1)]
    assert [window_side(size) for size in sizes] == [12, 6, 3, 1, 3, 17, 1]
    fusion = STCAFF(3, "auto").double()
    compare(fusion, (2, 3, 7, 5), 1)  # 35 locations
    monkeypatch.setattr(attention, "KEYS", 12)  # 3 x 2 windows and 6 locations
    monkeypatch.setattr(attention, "PROBES", 10)  # 4 x 2 queries on the corners of 2 x 2 ones
    compare(fusion, (2, 3, 7, 5), 3)


def correlations(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> list[float]:
    """Of each mask of one image with its other form."""
    pairs = [
        torch.stack([one.flatten(), other.flatten()])
        for kind, masks in ours.items()
        for one, other in zip(masks[0], theirs[kind][0], strict=True)
    ]
    return [float(torch.corrcoef(pair)[0, 1]) for pair in pairs]


@pytest.mark.parametrize("sharpness", [1.0, 30.0])
def test_windows_keep_the_masks(sharpness: float) -> None:
    """Feature maps without structure: of soft attention averages alone would say nothing, of sharp one even less."""
    student, teacher = maps(1, 8, 8, 24, 24)
    whole, windowed = joint(8, 8).double(), joint(8, 8, kv_stride=4).double()
    with torch.no_grad():
        whole.fusion.query.weight *= sharpness
    windowed.load_state_dict(whole.state_dict())
    assert min(correlations(windowed.masks(student, teacher), whole.masks(student, teacher))) > 0.95


def test_smaller_windows_at_the_border_count_less() -> None:
    """Where all keys are alike, the fused feature map is the mean over locations, and not over windows."""
    student, teacher = maps(2, 4, 4, 7, 5)
    whole, windowed = joint(4, 4).double(), joint(4, 4, kv_stride=3).double()
    torch.nn.init.zeros_(whole.fusion.key.weight)
    windowed.load_state_dict(whole.state_dict())
    torch.testing.assert_close(windowed.masks(student, teacher), whole.masks(student, teacher), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kv_stride", [*(pytest.param(stride, marks=pytest.mark.slow) for stride in (1, "auto")), 2])
def test_compiled_the_fusion_is_one_graph(kv_stride: Any) -> None:
    student, teacher = maps(2, 4, 4, 18, 16)
    loss = joint(4, 4, kv_stride=kv_stride).double()
    units = loss.selection.spatial_units()
    plain = loss.fusion(teacher, student, units)
    torch.compiler.reset()
    compiled: Any = torch.compile(loss.fusion, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(teacher, student, units), plain)
