"""Attention in blocks, by itself: against a dense softmax map, and on a device without numbers."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from acamkd.losses.acam import sparse_attention as attention
from acamkd.losses.acam.sparse_attention import Condensed, cross_attention, heavy_hitters


def test_a_key_that_counts_three_times_is_three_keys() -> None:
    query, key, value = (torch.randn(2, 4, size, dtype=torch.float64) for size in (9, 5, 5))
    repeats = torch.tensor([1, 3, 1, 2, 1])
    counts = repeats.double().expand(2, -1)
    read, received = cross_attention(query, key, value, counts)
    dense = cross_attention(query, key.repeat_interleave(repeats, 2), value.repeat_interleave(repeats, 2))
    torch.testing.assert_close(read, dense[0], rtol=1e-12, atol=1e-12)
    owner = torch.arange(5).repeat_interleave(repeats)
    summed = torch.zeros_like(received).index_add_(1, owner, dense[1])
    torch.testing.assert_close(received, summed, rtol=1e-12, atol=1e-12)


def test_a_key_that_counts_zero_times_is_none() -> None:
    query, key, value = (torch.randn(2, 4, size, dtype=torch.float64) for size in (9, 5, 5))
    query, key = query + 100, key - 100  # all logits far below that of a key of zeros, as an empty window's is
    key[0, :, 2] = 0
    for tensor in (query, key, value):
        tensor.requires_grad_()
    counts = torch.tensor([[1.0, 1.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    read, received = cross_attention(query, key, value, counts)
    kept = [0, 1, 3, 4]
    without = cross_attention(query[:1], key[:1, :, kept], value[:1, :, kept])
    torch.testing.assert_close((read[:1], received[:1, kept]), without, rtol=1e-12, atol=1e-12)
    assert received[0, 2] == 0
    read.square().sum().backward()  # type: ignore[no-untyped-call]
    for tensor in (query, key, value):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
    assert not key.grad[0, :, 2].any()  # type: ignore[index]


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
    query, to_key = torch.ones(2, 1, 2, 3), torch.ones(1, 1)
    assert [set(row) for row in heavy_hitters(x, query, to_key).tolist()] == [
        {2, 4, 3},
        {4, 5, 1},
    ]  # half of them
    monkeypatch.setattr(attention, "KEYS", 4)
    assert heavy_hitters(x, -query, to_key).tolist() == [[5, 1], [0, 2]]
    monkeypatch.setattr(attention, "PROBES", 2)  # two of the first row
    query[:, :, 0] = -1
    assert heavy_hitters(x, query, to_key).tolist() == [[5, 1], [0, 2]]


def test_operations_are_counted_without_numbers() -> None:
    """Two products forward; backward the map again, and a product for each of dP, dV, dQ and dK, and the mean."""
    n, size, channels, values = 2, 6, 4, 3
    query, key = (torch.empty(n, channels, size, device="meta", requires_grad=True) for _ in range(2))
    value = torch.empty(n, values, size, device="meta", requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        read, received = cross_attention(query, key, value)
        (read.sum() + received.sum()).backward()  # type: ignore[no-untyped-call]
    assert counter.get_total_flops() == 2 * n * size**2 * (4 * channels + 3 * values + 1)
