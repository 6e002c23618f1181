"""How far the student is from the teacher in every channel and at every location: the four `imitation` options."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from acamkd.losses.functional import distribution_error, pearson, standardize


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
        teacher: (N, C, H, W).
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
        student, teacher = standardize(student), standardize(teacher)
    squared = (student - teacher).square()
    return {kind: squared.mean(dim) for kind, dim in reduced.items()}
