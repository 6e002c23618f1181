"""Attention in blocks, by itself: against a dense softmax map, and on a device without numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.utils.flop_counter import FlopCounterMode

from acamkd.losses.acam import sparse_attention as attention
from acamkd.losses.acam.sparse_attention import Condensed, cross_attention, heavy_hitters, probes_of
from tiny_maps import gradients_of


def received_by(key: Tensor) -> Tensor:
    """What averages to the share of all attention that each key of (N, C, K) receives."""
    return torch.eye(key.shape[2], dtype=key.dtype).expand(len(key), -1, -1)


def test_a_key_that_counts_three_times_is_three_keys() -> None:
    query, key, value = (torch.randn(2, 4, size, dtype=torch.float64) for size in (9, 5, 5))
    repeats = torch.tensor([1, 3, 1, 2, 1])
    offset = repeats.double().log().expand(2, -1)
    found = cross_attention(query, key, value, offset=offset, averaged=key)
    key, value = (x.repeat_interleave(repeats, 2) for x in (key, value))
    torch.testing.assert_close(found, cross_attention(query, key, value, averaged=key), rtol=1e-12, atol=1e-12)


def test_a_key_that_counts_zero_times_is_none() -> None:
    query, key, value = (torch.randn(2, 4, size, dtype=torch.float64) for size in (9, 5, 5))
    query, key = query + 100, key - 100  # all logits far below that of a key of zeros, as an empty window's is
    key[0, :, 2] = 0
    for tensor in (query, key, value):
        tensor.requires_grad_()
    counts = torch.tensor([[1.0, 1.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    read, received = cross_attention(query, key, value, offset=counts.log(), averaged=received_by(key))
    assert received is not None
    kept = [0, 1, 3, 4]
    key_left = key[:1, :, kept]
    without = cross_attention(query[:1], key_left, value[:1, :, kept], averaged=received_by(key_left))
    torch.testing.assert_close((read[:1], received[:1, kept]), without, rtol=1e-12, atol=1e-12)
    assert received[0, 2] == 0
    read.square().sum().backward()  # type: ignore[no-untyped-call]
    for tensor in (query, key, value):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
    assert not key.grad[0, :, 2].any()  # type: ignore[index]


def test_the_fused_kernel_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch's own dense form, since a CPU has no kernel that never holds the map."""
    query, key, value, averaged = (torch.randn(2, size, 9, dtype=torch.float64) for size in (5, 5, 3, 6))
    inputs = [x.requires_grad_() for x in (query, key, value, averaged)]
    assert attention.fused_backend(query) is None
    blocks = cross_attention(query, key, value, averaged=averaged)
    monkeypatch.setattr(attention, "fused_backend", lambda query: SDPBackend.MATH)
    fused = cross_attention(query, key, value, averaged=averaged)
    for ours, expected in zip(fused, blocks, strict=True):
        assert ours is not None
        assert expected is not None
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
        direction = torch.randn_like(ours)
        gradients = (gradients_of((x * direction).sum(), inputs) for x in (ours, expected))
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)
    assert cross_attention(query, key, value)[1] is None


def test_windows_leave_out_the_single_locations() -> None:
    x = torch.arange(20.0).view(1, 1, 5, 4)
    keys = Condensed.of(x, 3, torch.tensor([[3, 7, 11, 0]]))
    assert keys.counts.tolist() == [[8, 0, 6, 2]]
    assert keys.means.tolist() == [[[45 / 8, 0, 15, 17]]]  # rows of 0 to 3, 4 to 7, ...: the first lacks 0
    assert keys.singles.tolist() == [[[3, 7, 11, 0]]]
    members = [[1, 2, 4, 5, 6, 8, 9, 10], [12, 13, 14, 16, 17, 18], [15, 19]]
    variance = sum(float(torch.tensor(window).float().var(correction=0)) * len(window) for window in members) / 16
    torch.testing.assert_close(keys.covariance(torch.tensor([[[2.0]]])), torch.tensor([[[2 * variance]]]))


def test_heavy_hitters_get_the_most_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """A feature map of one channel, where a query of 1 attends by value."""
    x = torch.tensor([[3.0, 1.0, 9.0, 4.0, 7.0, 0.0], [0.0, 5.0, 1.0, 2.0, 8.0, 6.0]]).view(2, 1, 2, 3)
    query = torch.ones(2, 1, 2, 3)
    assert [set(row) for row in heavy_hitters(x, probes_of(query).flatten(2)).tolist()] == [
        {2, 4, 3},
        {4, 5, 1},
    ]  # half of them
    monkeypatch.setattr(attention, "KEYS", 4)
    assert heavy_hitters(x, -probes_of(query).flatten(2)).tolist() == [[5, 1], [0, 2]]
    monkeypatch.setattr(attention, "PROBES", 2)  # two of the first row
    query[:, :, 0] = -1
    assert heavy_hitters(x, probes_of(query).flatten(2)).tolist() == [[5, 1], [0, 2]]


def test_operations_are_counted_without_numbers() -> None:
    """Two products forward; backward the map again, and a product for each of dP, dV, dQ and dK, and the mean."""
    n, size, channels, values = 2, 6, 4, 3
    query, key = (torch.empty(n, channels, size, device="meta", requires_grad=True) for _ in range(2))
    value = torch.empty(n, values, size, device="meta", requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        read, average = cross_attention(query, key, value, averaged=key)
        (read.sum() + average.sum()).backward()  # type: ignore[union-attr]
    attention_map = 2 * n * size**2 * (4 * channels + 3 * values + 1)
    assert counter.get_total_flops() == attention_map + 3 * 2 * n * channels * size  # and the average, forward and back
