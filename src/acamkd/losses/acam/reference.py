"""ACAM-KD as the paper writes it, dense and unoptimized: the oracle of the tests and benchmarks.

Lan and Tian, ICCV 2025, https://arxiv.org/abs/2503.06307. Equations are numbered as on docs/methods/acam.md.
N images, C channels, P = H W locations, M masks; `p` holds the parameters of `ACAM` by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def acam(p: Mapping[str, Tensor], student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
    """The terms of `ACAM(..., **ACAM.PRESETS["paper"])`, with alpha = lambda = 1; their sum is (8)."""
    aligned = conv1x1(p, "align", student) if "align.weight" in p else student  # (1) S' = f(S)
    channel, spatial = ascm(p, stca_ff(p, query=teacher, key_value=aligned))
    return {
        "channel": channel_loss(channel, teacher, aligned),
        "spatial": spatial_loss(spatial, teacher, aligned),
        "diversity": diversity(channel) + diversity(spatial),
    }


def stca_ff(p: Mapping[str, Tensor], query: Tensor, key_value: Tensor) -> Tensor:
    """Student-teacher cross-attention feature fusion of two (N, C, H, W): F, (N, C, P)."""
    q = conv1x1(p, "fusion.query", query).flatten(2)  # (2) Q = W_q T, (N, C/2, P)
    k = conv1x1(p, "fusion.key", key_value).flatten(2)  # (2) K = W_k S'
    v = conv1x1(p, "fusion.value", key_value).flatten(2)  # (2) V = W_v S', (N, C, P)
    attention = (q.mT @ k / math.sqrt(q.shape[1])).softmax(dim=2)  # (3) A, (N, P, P): a row for each query
    return v @ attention.mT  # (3) F = A V


def ascm(p: Mapping[str, Tensor], fused: Tensor) -> tuple[Tensor, Tensor]:
    """Adaptive spatial-channel masking of F: M^c, (N, M, C), and M^s, (N, M, P)."""
    v = fused.mean(dim=2, keepdim=True).mT  # (4) v, (N, 1, C)
    channel = torch.sigmoid(p["selection.channel"] @ v)  # (4) M^c = sigmoid(m_c v)
    spatial = torch.sigmoid(p["selection.spatial"] @ fused)  # (4) M^s = sigmoid(m_s F)
    return channel, spatial


def channel_loss(mask: Tensor, teacher: Tensor, aligned: Tensor) -> Tensor:
    """L_c of masks (N, M, C) and two (N, C, H, W); the mask is squared above the line, and not below."""
    masked = mask[..., None, None] * (teacher - aligned).unsqueeze(1)  # (N, M, C, H, W)
    return (masked.square().sum(dim=(2, 3, 4)) / (teacher[0, 0].numel() * mask.sum(dim=2))).mean()  # (5)


def spatial_loss(mask: Tensor, teacher: Tensor, aligned: Tensor) -> Tensor:
    """L_s of masks (N, M, P) and two (N, C, H, W)."""
    masked = mask.unsqueeze(2) * (teacher - aligned).flatten(2).unsqueeze(1)  # (N, M, C, P)
    return (masked.square().sum(dim=(2, 3)) / (teacher.shape[1] * mask.sum(dim=2))).mean()  # (6)


def diversity(mask: Tensor) -> Tensor:
    """L_div of masks (N, M, K) of one kind: 0 where they are disjoint, M - 1 where they are equal."""
    inner = mask @ mask.mT  # <M_i, M_j>, (N, M, M)
    norms = inner.diagonal(dim1=1, dim2=2).sum(dim=1)
    return ((inner.sum(dim=(1, 2)) - norms) / norms).mean()  # (7) sum_{i != j} <M_i, M_j> / sum_i |M_i|^2


def conv1x1(p: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    """W X + b at every location, (N, C, H, W)."""
    weight, bias = p[f"{name}.weight"], p[f"{name}.bias"]
    return torch.einsum("oc,nchw->nohw", weight[:, :, 0, 0], x) + bias[:, None, None]
