"""Attention of one map to another in blocks, over all positions or windows of them: what ACAM's fusion is made of."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from acamkd.losses.functional import full_precision

BLOCK = 2**22
"""Elements of an attention map that exist at a time, 16 MiB in float32."""

KEYS = 256
"""Key positions that kv_stride="auto" leaves at most."""


def cross_attention(query: Tensor, key: Tensor, value: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A V and the average row of A = softmax(Q^T K / sqrt(C_q)), over the key positions.

    A exists in blocks of at most BLOCK elements, which the backward computes anew.

    Args:
        query: (N, C_q, HW).
        key: (N, C_q, K).
        value: (N, C, K); C may be 0.
        counts: How many equal keys each of them stands for, (K,); one where not given.

    Returns:
        (N, C, HW), and the attention that each key receives, (N, K), of sum 1.
    """
    rows = max(1, BLOCK // (len(query) * key.shape[2]))
    queries, keys = query.mT * query.shape[1] ** -0.5, key.mT
    if counts is not None:  # n exp(q k) = exp(q k + log n): one channel more, which is 1 in every query
        queries = F.pad(queries, (0, 1), value=1.0)
        keys = torch.cat([keys, counts.log().expand(len(keys), 1, -1).mT], dim=2)
    read, received = _BlockAttention.apply(queries, keys, value.mT, rows)
    return read.mT, received[:, 0] / query.shape[2]


class _BlockAttention(torch.autograd.Function):
    """P V and the column sums of P = softmax(Q K^T), some rows of P at a time.

    Whatever outlives a block is allocated beforehand; otherwise it would settle in the memory that a block has freed,
    which the next one could not take again.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """(N, HW, C_q), (N, K, C_q), (N, K, C) -> (N, HW, C), (N, 1, K)."""
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
    def backward(
        ctx: Any, of_read: Tensor | None, of_received: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, None]:
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
        return d_query, d_key, None if of_read is None else d_value, None


def window_side(size: Sequence[int]) -> int:
    """Smallest side of square windows of which at most KEYS cover a map of this (height, width)."""
    return next(side for side in count(1) if prod(-(-length // side) for length in size) <= KEYS)


def window_counts(x: Tensor, side: int) -> Tensor:
    """Positions in each window, (H_k W_k,): those at the right and bottom of a map (N, C, H, W) may be smaller."""
    return F.avg_pool2d(torch.ones_like(x[:1, :1]), side, ceil_mode=True, divisor_override=1).flatten()


def window_covariance(x: Tensor, means: Tensor, counts: Tensor, vectors: Tensor) -> Tensor:
    """E[D D^T] Y, with D what a position differs by from the mean of its window, averaged over all positions.

    Args:
        x: (N, C, H, W).
        means: Over the windows, (N, C, H_k, W_k).
        counts: Their positions, (H_k W_k,).
        vectors: Y, (N, C, R).

    Returns:
        (N, C, R); the covariance itself, (N, C, C), is never made.
    """
    values, averages = x.flatten(2), means.flatten(2)
    moments = values @ (values.mT @ vectors) - averages @ (counts.unsqueeze(1) * (averages.mT @ vectors))
    return moments / values.shape[2]


def layer_norm(x: Tensor) -> Tensor:
    """Mean 0 and deviation 1 over the channels of each position, (N, C, H, W)."""
    return F.layer_norm(x.movedim(1, 3), x.shape[1:2]).movedim(3, 1)
