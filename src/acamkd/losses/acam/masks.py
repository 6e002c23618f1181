"""ASCM: the masks, the units that make them, and what a feature map is under them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from acamkd.losses.base import TokenModule
from acamkd.losses.functional import dice_overlap


class Masks(NamedTuple):
    """The masks of one level; a kind that is not in use is None."""

    channel: Tensor | None
    """(N, M, C), in (0, 1)."""
    spatial: Tensor | None
    """(N, M, H, W), in (0, 1)."""

    def in_use(self) -> dict[str, Tensor]:
        """By kind, `channel` or `spatial`."""
        return {kind: mask for kind, mask in self._asdict().items() if mask is not None}


class ASCM(TokenModule):
    """Adaptive spatial-channel masking: M learnable selection units of each kind turn the fused feature map into masks.

    Args:
        channels: C.
        num_masks: M.
        kinds: Which of `channel` and `spatial`; only these get units.
    """

    def __init__(self, channels: int, num_masks: int, kinds: Sequence[str] = Masks._fields) -> None:
        super().__init__()
        self.channels = channels
        # Unit-variance logits for unit-variance features: the masks start around 0.5 and differ from each other.
        self.channel = nn.Parameter(torch.randn(num_masks, 1)) if "channel" in kinds else None
        self.spatial = nn.Parameter(torch.randn(num_masks, channels) * channels**-0.5) if "spatial" in kinds else None

    def forward(self, fused: Tensor) -> Masks:
        """Masks from the fused feature map F, (N, C, H, W)."""
        return self.masks(fused.mean(dim=(2, 3)), torch.einsum("mc,nchw->nmhw", self.spatial_units(), fused))

    def spatial_units(self) -> Tensor:
        """m_s, (M, C); none where there are only channel masks."""
        return self.spatial if self.spatial is not None else next(self.parameters()).new_empty(0, self.channels)

    def masks(self, pooled: Tensor, logits: Tensor) -> Masks:
        """Masks from v, (N, C), and m_s F, (N, M, H, W)."""
        return Masks(
            None if self.channel is None else torch.sigmoid(self.channel * pooled.unsqueeze(1)),  # (N, M, C)
            None if self.spatial is None else torch.sigmoid(logits),
        )

    def masked(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What fixed masks are learned from: (N, C, H, W) under its own masks, and their overlap."""
        masks = self(x)
        return apply_masks(masks, x), mask_overlap(masks)


def apply_masks(masks: Masks, x: Tensor) -> Tensor:
    """A feature map under its masks, mean_m M^s_m M^c_m X, (N, C, H, W); a kind that is not in use counts as 1."""
    channel, spatial = masks
    if channel is not None and spatial is not None:
        return torch.einsum("nmc,nmhw->nchw", channel, spatial) / channel.shape[1] * x
    if channel is not None:
        return channel.mean(dim=1)[:, :, None, None] * x
    assert spatial is not None
    return spatial.mean(dim=1, keepdim=True) * x


def mask_overlap(masks: Masks, form: str = "pairwise") -> Tensor:
    """Dice overlap of the masks of each kind, summed over the kinds."""
    return torch.stack([dice_overlap(mask.flatten(2), form) for mask in masks.in_use().values()]).sum()
