"""How far the student is from the teacher in every channel and at every location: the four `imitation` options."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from acamkd.losses.functional import center, distribution_error, pearson


def distillation_distances(
    student: Tensor, teacher: Tensor, kinds: Collection[str], form: str = "squared", temperature: float = 1.0
) -> dict[str, Tensor]:
    """Distance of two feature maps in every channel (`channel`) and at every location (`spatial`).

    `squared`: mean squared difference.
    `standardized`: the same of feature maps whose channels have mean 0 and standard deviation 1 over the batch (PKD).
    `softmax`, for logits: tau^2 KL of each channel's distribution over the locations (CWD), and of each location's
    distribution over the channels.
    `correlation`, for logits: tau^2 (1 - r), as in DIST. r is Pearson's correlation of the channels' probabilities,
    which are the softmax of each location. It runs over the locations of a channel, and over the channels of a
    location.

    Args:
        student: (N, C, H, W).
        teacher: (N, C, H, W), without gradient.
        kinds: Which of `channel` and `spatial`.
        form: `squared`, `standardized`, `softmax` or `correlation`.
        temperature: tau.

    Returns:
        `channel`, (N, C), and `spatial`, (N, HW), as far as asked for.
    """
    reduced = {kind: {"channel": 2, "spatial": 1}[kind] for kind in kinds}
    student, teacher = student.flatten(2), teacher.flatten(2)  # (N, C, HW)
    if form == "softmax":
        return {kind: distribution_error(student, teacher, temperature, dim) for kind, dim in reduced.items()}
    if form == "correlation":
        student, teacher = ((x / temperature).softmax(dim=1) for x in (student, teacher))
        return {kind: temperature**2 * (1 - pearson(student, teacher, dim)) for kind, dim in reduced.items()}
    if form == "standardized":
        channel, spatial = _StandardizedDistance.apply(student, teacher)
        return {kind: {"channel": channel, "spatial": spatial}[kind] for kind in kinds}
    squared = (student - teacher).square()
    return {kind: squared.mean(dim) for kind, dim in reduced.items()}


class _StandardizedDistance(torch.autograd.Function):
    """Mean squared difference of `standardize(student)` and `standardize(teacher)`, by channel and by location.

    What this costs is reading and writing maps, which autograd would do three times as often. The gradient reaches the
    student, and is not to be differentiated by it once more.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Two (N, C, HW) -> (N, C), (N, HW)."""
        standard, deviation, scale = center(student)
        standard *= scale
        difference, _, of_teacher = center(teacher)
        torch.sub(standard, difference.mul_(of_teacher), out=difference)
        ctx.save_for_backward(standard, difference, deviation, scale)
        ctx.set_materialize_grads(False)
        squared = difference.square()
        return squared.mean(dim=2), squared.mean(dim=1)

    @staticmethod
    def backward(ctx: Any, of_channel: Tensor | None, of_spatial: Tensor | None) -> tuple[Tensor, None]:
        """With Z = r (S - mean) and dZ: dS = r (dZ - mean dZ) - Z sum(dZ Z) / (deviation (n - 1)), in each channel."""
        standard, difference, deviation, scale = ctx.saved_tensors
        images, channels, locations = standard.shape
        factor = standard.new_zeros(()) if of_spatial is None else (2 / channels * of_spatial).unsqueeze(1)
        if of_channel is not None:
            factor = factor + (2 / locations * of_channel).unsqueeze(2)
        d_standard = difference * factor
        shared = (d_standard * standard).sum(dim=(0, 2), keepdim=True) / (images * locations - 1)
        shared = torch.where(scale > 0, shared / deviation, 0)
        d_standard -= d_standard.mean(dim=(0, 2), keepdim=True)
        return d_standard.mul_(scale).addcmul_(standard, shared, value=-1), None
