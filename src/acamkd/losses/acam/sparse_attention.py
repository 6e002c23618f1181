"""Attention of one feature map to another in blocks, over all locations or windows of them: what STCA-FF is made of."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from acamkd.losses.functional import full_precision

BLOCK = 2**22
"""Elements of an attention map that exist at a time, 16 MiB in float32."""

KEYS = 256
"""Keys that kv_stride="auto" leaves at most: half of them windows, half single locations."""

PROBES = 128
"""Queries at most that find the single locations."""


def cross_attention(query: Tensor, key: Tensor, value: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A V and the average row of A = softmax(Q^T K / sqrt(C_q)), over the K keys.

    A exists in blocks of at most BLOCK elements, which the backward computes anew.

    Args:
        query: (N, C_q, HW).
        key: (N, C_q, K).
        value: (N, C, K); C may be 0.
        counts: How many equal keys each of them stands for, (N, K); one where not given.

    Returns:
        (N, C, HW), and the attention that each key receives, (N, K), of sum 1.
    """
    queries, keys = query.mT * query.shape[1] ** -0.5, key.mT
    if counts is not None:  # n exp(q k) = exp(q k + log n): one channel more, which is 1 in every query
        queries = F.pad(queries, (0, 1), value=1.0)
        # A key that stands for none is out of reach of every logit, and finite: its gradient is 0 times it.
        keys = torch.cat([keys, counts.log().clamp_min(-1e30).unsqueeze(2)], dim=2)
    read, received = _BlockAttention.apply(queries, keys, value.mT)
    return read.mT, received[:, 0] / query.shape[2]


class _BlockAttention(torch.autograd.Function):
    """P V and the column sums of P = softmax(Q K^T), some rows of P at a time.

    Whatever outlives a block is allocated beforehand; otherwise it would settle in the memory that a block has freed,
    which the next one could not take again.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """(N, HW, C_q), (N, K, C_q), (N, K, C) -> (N, HW, C), (N, 1, K)."""
        rows = max(1, BLOCK // (len(query) * key.shape[1]))
        read = query.new_empty(*query.shape[:2], value.shape[2])
        received = query.new_zeros(len(query), 1, key.shape[1])
        for q, out in zip(torch.split(query, rows, 1), torch.split(read, rows, 1), strict=True):
            attention = (q @ key.mT).softmax(dim=2)
            out.copy_(attention @ value)
            received += attention.sum(dim=1, keepdim=True)
        ctx.rows = rows
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, key, value, read)
        return read, received

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_read: Tensor | None, of_received: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """With dP = dR V^T + 1 dr^T: dS = P (dP - sum_k P dP) for S = Q K^T."""
        query, key, value, read = ctx.saved_tensors
        d_read = torch.zeros_like(read) if of_read is None else of_read
        d_received = key.new_zeros(len(key), 1, key.shape[1]) if of_received is None else of_received
        d_query, d_key, d_value = (torch.zeros_like(x) for x in (query, key, value))
        blocks = zip(*(torch.split(x, ctx.rows, 1) for x in (query, read, d_read, d_query)), strict=True)
        with full_precision(query):  # a gradient may be asked for within autocast
            for q, out, d_out, d_q in blocks:
                attention = (q @ key.mT).softmax(dim=2)
                d_value += attention.mT @ d_out
                mean = (d_out * out).sum(dim=2, keepdim=True) + attention @ d_received.mT  # sum_k P dP
                d_scores = (d_out @ value.mT).add_(d_received).sub_(mean).mul_(attention)
                d_q.copy_(d_scores @ key)
                d_key += d_scores.mT @ q
        return d_query, d_key, None if of_read is None else d_value


def window_side(size: Sequence[int]) -> int:
    """For kv_stride="auto": 1 for a (height, width) of at most KEYS locations, otherwise at most KEYS / 2 windows."""
    return 1 if prod(size) <= KEYS else _side(size, KEYS // 2)


def _side(size: Sequence[int], most: int) -> int:
    """Smallest side of so many square windows, at most, that cover a feature map of this (height, width)."""
    side = 1  # a plain loop, which torch.compile does not break at
    while prod([-(-length // side) for length in size]) > most:
        side += 1
    return side


@torch.no_grad()
def heavy_hitters(x: Tensor, query: Tensor, to_key: Tensor) -> Tensor:
    """The locations of a feature map that get the most attention: KEYS / 2, but no more than half of them.

    Args:
        x: (N, C, H, W), the feature map.
        query: (N, C_q, H_q, W_q), of which PROBES at most, on a grid, are asked.
        to_key: (C_q, C), what makes keys of the feature map.

    Returns:
        Their indices in the flattened feature map, (N, S).
    """
    side = _side(query.shape[2:], PROBES)
    probes = to_key.mT @ query[:, :, ::side, ::side].flatten(2)
    keys = x.flatten(2).mT
    _, received = _BlockAttention.apply(probes.mT, keys, keys[:, :, :0])
    indices: Tensor = received[:, 0].topk(min(KEYS, keys.shape[1]) // 2, dim=1).indices
    return indices


class Condensed(NamedTuple):
    """A feature map (N, C, H, W) as K windows, and S single locations, which the windows leave out."""

    means: Tensor
    """Of the windows, (N, C, K)."""
    counts: Tensor
    """How many locations each window has, (N, K): fewer at the right and bottom border, and 0 where all are single."""
    singles: Tensor
    """(N, C, S)."""
    rest: Tensor
    """The feature map with 0 at the single locations, (N, C, HW)."""

    @classmethod
    def of(cls, x: Tensor, side: int, indices: Tensor) -> Condensed:
        """Windows of this side over (N, C, H, W), and single locations by their indices (N, S) in the flattened one."""
        pooled = torch.ones_like(x[:, 0]).flatten(1).scatter(1, indices, 0).view_as(x[:, :1])
        rest = x * pooled
        sums, counts = (F.avg_pool2d(y, side, ceil_mode=True, divisor_override=1).flatten(2) for y in (rest, pooled))
        singles = x.flatten(2).gather(2, indices.unsqueeze(1).expand(-1, x.shape[1], -1))
        return cls(sums / counts.clamp_min(1), counts.squeeze(1), singles, rest.flatten(2))

    def covariance(self, vectors: Tensor) -> Tensor:
        """E[D D^T] Y, with D the difference of a location from its window's mean, averaged over all such locations.

        Args:
            vectors: Y, (N, C, R).

        Returns:
            (N, C, R); the covariance itself, (N, C, C), is never made.
        """
        of_means = self.means @ (self.counts.unsqueeze(2) * (self.means.mT @ vectors))
        return (self.rest @ (self.rest.mT @ vectors) - of_means) / (self.rest.shape[2] - self.singles.shape[2])
