"""Attention of one feature map to another in blocks, over all locations or windows of them: what STCA-FF is made of."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from acamkd.losses.functional import full_precision

BLOCK = 2**22
"""Elements of an attention map that exist at a time, 16 MiB in float32."""

KEYS = 256
"""Keys that kv_stride="auto" leaves at most: half of them windows, half single locations."""

PROBES = 128
"""Queries at most that find the single locations."""


def cross_attention(
    query: Tensor, key: Tensor, value: Tensor, *, offset: Tensor | None = None, averaged: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """A V, and the average over the queries of A U, with A = softmax(Q^T K + offset) over the keys.

    On a GPU torch's fused attention computes A V and A U together, without ever holding A. Elsewhere A exists in blocks
    of at most BLOCK elements, and the average row of A is all that A U needs. An offset is for few keys: with one the
    blocks are used everywhere.

    Args:
        query: (N, C_q, HW).
        key: (N, C_q, K), scaled.
        value: V^T, (N, C, K); C may be 0.
        offset: (N, K), added to the logits of each key: log n, where a key stands for n equal ones.
        averaged: U^T, (N, C_u, K).

    Returns:
        (N, C, HW); and (N, C_u), or None without `averaged`.
    """
    fused = fused_backend(query) if offset is None else None
    if fused is not None:
        values = value if averaged is None else torch.cat([value, averaged], dim=1)
        read = _fused_attention(query, key, values, fused)
        return read[:, : value.shape[1]], None if averaged is None else read[:, value.shape[1] :].mean(dim=2)
    offset = None if offset is None else offset.unsqueeze(1)
    read, received = _BlockAttention.apply(query.mT, key.mT, value.mT, offset, averaged is not None)
    if averaged is not None:
        averaged = torch.einsum("nck,nk->nc", averaged, received) / query.shape[2]
    return read.mT, averaged


def fused_backend(query: Tensor) -> SDPBackend | None:
    """The device's kernel of exact attention that never holds A, in float32; None where there is none."""
    fused = query.is_cuda and query.dtype is torch.float32 and torch.version.cuda is not None
    return SDPBackend.EFFICIENT_ATTENTION if fused else None


def _fused_attention(query: Tensor, key: Tensor, value: Tensor, backend: SDPBackend) -> Tensor:
    """A V of (N, C_q, HW), (N, C_q, K) and (N, C, K): (N, C, HW). Channels are padded to what the kernels take."""
    q, k, v = (F.pad(x.mT, (0, -x.shape[1] % 8)).contiguous().unsqueeze(1) for x in (query, key, value))
    with sdpa_kernel(backend):
        read = F.scaled_dot_product_attention(q, k, v, scale=1.0)
    return read[:, 0, :, : value.shape[1]].mT


class _BlockAttention(torch.autograd.Function):
    """P V and the column sums of P = softmax(Q K^T + offset), some rows of P at a time.

    Whatever outlives a block is allocated beforehand; otherwise it would settle in the memory that a block has freed,
    which the next one could not take again.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, offset: Tensor | None, summed: bool
    ) -> tuple[Tensor, Tensor | None]:
        """(N, HW, C_q), (N, K, C_q), (N, K, C), (N, 1, K) -> (N, HW, C), and (N, K) if the columns are summed."""
        rows = max(1, BLOCK // (len(query) * key.shape[1]))
        read = query.new_empty(*query.shape[:2], value.shape[2])
        received = query.new_zeros(len(query), 1, key.shape[1]) if summed else None
        # P is kept where it is no larger than Q, and computed anew in the backward otherwise.
        kept: list[Tensor] | None = [] if key.shape[1] <= query.shape[2] and any(ctx.needs_input_grad) else None
        for q, out in zip(torch.split(query, rows, 1), torch.split(read, rows, 1), strict=True):
            attention = _attention(q, key, offset)
            out.copy_(attention @ value)
            if received is not None:
                received += attention.sum(dim=1, keepdim=True)
            if kept is not None:
                kept.append(attention)
        ctx.rows = rows
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, key, value, offset, read, *(kept or []))
        return read, None if received is None else received.squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_read: Tensor | None, of_received: Tensor | None) -> tuple[Tensor | None, ...]:
        """With dP = dR V^T + 1 dr^T: dS = P (dP - sum_k P dP) for S = Q K^T + offset."""
        query, key, value, offset, read, *kept = ctx.saved_tensors
        d_read = torch.zeros_like(read) if of_read is None else of_read
        d_query, d_key, d_value, d_offset = (
            torch.zeros_like(x) if needed else None
            for x, needed in zip((query, key, value, offset), ctx.needs_input_grad[:4], strict=True)
        )
        split = [torch.split(x, ctx.rows, 1) for x in (query, read, d_read)]
        with full_precision(query):  # a gradient may be asked for within autocast
            for number, (q, out, d_out) in enumerate(zip(*split, strict=True)):
                attention = kept[number] if kept else _attention(q, key, offset)
                mean = (d_out * out).sum(dim=2, keepdim=True)  # sum_k P dP
                if of_received is None:
                    d_scores = torch.baddbmm(mean, d_out, value.mT, beta=-1)
                else:
                    mean += attention @ of_received.unsqueeze(2)
                    d_scores = (d_out @ value.mT).add_(of_received.unsqueeze(1)).sub_(mean)
                d_scores *= attention
                if d_query is not None:
                    torch.split(d_query, ctx.rows, 1)[number].copy_(d_scores @ key)
                if d_key is not None:
                    d_key += d_scores.mT @ q
                if d_value is not None and of_read is not None:
                    d_value += (d_out.mT @ attention).mT  # the faster order
                if d_offset is not None:
                    d_offset += d_scores.sum(dim=1, keepdim=True)
        return d_query, d_key, None if of_read is None else d_value, d_offset, None


def _attention(query: Tensor, key: Tensor, offset: Tensor | None) -> Tensor:
    """Softmax over the keys, (N, rows, K)."""
    logits = query @ key.mT if offset is None else torch.baddbmm(offset, query, key.mT)
    return logits.softmax(dim=2)


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
def heavy_hitters(x: Tensor, probes: Tensor) -> Tensor:
    """The locations of a feature map that get the most attention: KEYS / 2, but no more than half of them.

    Args:
        x: (N, C, H, W), the feature map, which is its own keys.
        probes: (N, C, P), scaled queries.

    Returns:
        Their indices in the flattened feature map, (N, S).
    """
    keys = x.flatten(2).mT
    _, received = _BlockAttention.apply(probes.mT, keys, keys[:, :, :0], None, True)
    indices: Tensor = received.topk(min(KEYS, keys.shape[1]) // 2, dim=1).indices
    return indices


def probes_of(x: Tensor) -> Tensor:
    """At most PROBES locations of a feature map, on a grid: (N, C, H, W) -> (N, C, h, w)."""
    side = _side(x.shape[2:], PROBES)
    return x[:, :, ::side, ::side]


class Condensed(NamedTuple):
    """A feature map (N, C, H, W) as K windows, and S single locations, which the windows leave out."""

    means: Tensor
    """Of the windows, (N, C, K)."""
    counts: Tensor
    """How many locations each window has, (N, K): fewer at the right and bottom border, and 0 where all are single."""
    singles: Tensor
    """(N, C, S)."""
    locations: Tensor
    """The feature map, (N, C, HW)."""
    pooled: Tensor
    """1 where a location is in a window, and 0 where it is single, (N, HW)."""

    @classmethod
    def of(cls, x: Tensor, side: int, indices: Tensor) -> Condensed:
        """Windows of this side over (N, C, H, W), and single locations by their indices (N, S) in the flattened one."""
        pooled = torch.ones_like(x[:, 0]).flatten(1).scatter(1, indices, 0)
        inside = pooled.view_as(x[:, :1])
        sums, counts = (
            F.avg_pool2d(y, side, ceil_mode=True, divisor_override=1).flatten(2) for y in (x * inside, inside)
        )
        singles = x.flatten(2).gather(2, indices.unsqueeze(1).expand(-1, x.shape[1], -1))
        return cls(sums / counts.clamp_min(1), counts.squeeze(1), singles, x.flatten(2), pooled)

    def covariance(self, vectors: Tensor) -> Tensor:
        """E[D D^T] Y, with D the difference of a location from its window's mean, averaged over all such locations.

        Args:
            vectors: Y, (N, C, R).

        Returns:
            (N, C, R); the covariance itself, (N, C, C), is never made.
        """
        of_means = self.means @ (self.counts.unsqueeze(2) * (self.means.mT @ vectors))
        seen = (vectors.mT @ self.locations) * self.pooled.unsqueeze(1)
        return ((seen @ self.locations.mT).mT - of_means) / (self.locations.shape[2] - self.singles.shape[2])
