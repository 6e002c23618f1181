"""Attention in blocks, by itself: against a dense softmax map, and on a device without numbers."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from acamkd.losses.attention import cross_attention, window_counts


def test_a_key_that_counts_three_times_is_three_keys() -> None:
    query, key, value = (torch.randn(2, 4, size, dtype=torch.float64) for size in (9, 5, 5))
    counts = torch.tensor([1.0, 3.0, 1.0, 2.0, 1.0], dtype=torch.float64)
    repeats = counts.long()
    read, received = cross_attention(query, key, value, counts)
    dense = cross_attention(query, key.repeat_interleave(repeats, 2), value.repeat_interleave(repeats, 2))
    torch.testing.assert_close(read, dense[0], rtol=1e-12, atol=1e-12)
    owner = torch.arange(5).repeat_interleave(repeats)
    summed = torch.zeros_like(received).index_add_(1, owner, dense[1])
    torch.testing.assert_close(received, summed, rtol=1e-12, atol=1e-12)


def test_counts_are_the_positions_of_each_window() -> None:
    assert window_counts(torch.empty(2, 3, 5, 4), 3).tolist() == [9, 3, 6, 2]


def test_operations_are_counted_without_numbers() -> None:
    """Two products forward; backward the map again, and a product for each of dP, dV, dQ and dK, and the mean."""
    n, size, channels, values = 2, 6, 4, 3
    query, key = (torch.empty(n, channels, size, device="meta", requires_grad=True) for _ in range(2))
    value = torch.empty(n, values, size, device="meta", requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        read, received = cross_attention(query, key, value)
        (read.sum() + received.sum()).backward()  # type: ignore[no-untyped-call]
    assert counter.get_total_flops() == 2 * n * size**2 * (4 * channels + 3 * values + 1)
