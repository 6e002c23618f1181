"""ACAM-KD as a textbook would write it: a dense attention map, and masked differences (N, M, C, H, W)."""

from __future__ import annotations

import torch
from torch import Tensor

from acamkd.losses.acam.acam import ACAM
from acamkd.losses.base import DistillationContext


class Textbook(ACAM):
    """The attention and errors of ACAM with mask_grad="joint", its parameters and the same result, to rounding."""

    def terms(self, student: Tensor, teacher: Tensor, context: DistillationContext) -> dict[str, Tensor]:
        """Return `channel`, `spatial` and `diversity`."""
        student, fusion, (height, width) = self.align(student), self.fusion, teacher.shape[-2:]
        query, key, value = (
            project(x).flatten(2)
            for project, x in ((fusion.query, teacher), (fusion.key, student), (fusion.value, student))
        )
        attention = (query.transpose(1, 2) @ key / query.shape[1] ** 0.5).softmax(dim=2)  # (N, HW, HW)
        fused = (attention @ value.transpose(1, 2)).transpose(1, 2)  # (N, C, HW)
        channel = torch.sigmoid(self.selection.channel * fused.mean(dim=2).unsqueeze(1))  # (N, M, C)
        spatial = torch.sigmoid(self.selection.spatial @ fused)  # (N, M, HW)
        difference = (teacher - student).unsqueeze(1)  # (N, 1, C, H, W)
        by_channel = (channel[..., None, None] * difference).square().sum(dim=(2, 3, 4))
        by_position = (spatial.unflatten(2, (1, height, width)) * difference).square().sum(dim=(2, 3, 4))
        return {
            "channel": self.weight * (by_channel / (height * width * channel.sum(dim=2))).mean(),
            "spatial": self.weight * (by_position / (teacher.shape[1] * spatial.sum(dim=2))).mean(),
            "diversity": self.diversity_weight * (self._overlap(channel) + self._overlap(spatial)),
        }

    def _overlap(self, masks: Tensor) -> Tensor:
        """Mean Dice overlap of the pairs of masks (N, M, K)."""
        pairs = [(i, j) for i in range(masks.shape[1]) for j in range(masks.shape[1]) if i != j]
        dice = [
            2 * (masks[:, i] * masks[:, j]).sum(dim=1) / (masks[:, i].square() + masks[:, j].square()).sum(dim=1)
            for i, j in pairs
        ]
        return torch.stack(dice).mean()
