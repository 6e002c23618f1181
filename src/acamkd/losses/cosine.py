"""Cosine: the direction of the teacher's features at every location."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from acamkd.losses.base import DistillationContext, FeatureLoss
from acamkd.losses.functional import align_layer


class Cosine(FeatureLoss):
    """Cosine alignment: at every location the projected student points where the teacher's features point.

    Paper: Liao et al., RT-DETRv4: Painlessly Furthering Real-Time Object Detection with Vision Foundation Models,
    arXiv 2025. https://arxiv.org/abs/2510.25257
    Official code: https://github.com/RT-DETRs/RT-DETRv4

    L = weight * (1 - mean_{n,p} <f(S)_{n,p}, T_{n,p}> / (|f(S)_{n,p}| |T_{n,p}|)),  f a 1x1 convolution.

    It suits a teacher without a head, such as DINOv3, whose features have another scale than the student's. The paper
    compares the encoder's coarsest map, and halves the teacher's input so that patches of 16 pixels meet stride 32.

    Defaults: weight 1 is the plain mean, and not a published value: the paper steers the weight by ratios of gradient
    norms.

    Deviations: the paper changes the weight in the course of the training, so that the gradient's share stays in a
    range. `weight: auto` does so once, before the first step, and the weight then stays. Where the sizes of the maps
    differ, the student's is resampled.

    Code:
        - f: align_layer
        - L: Cosine.terms

    Example:
        >>> student, teacher = torch.randn(2, 16, 8, 8, requires_grad=True), torch.randn(2, 32, 8, 8)
        >>> terms = Cosine(16, 32)(student, teacher)
        >>> sorted(terms)
        ['cosine']

    Args:
        student_channels: C_s.
        teacher_channels: C_t.
        weight: Factor of the loss.
        align: Project the student even where the channels agree.
    """

    def __init__(
        self, student_channels: int, teacher_channels: int, *, weight: float = 1.0, align: bool = True
    ) -> None:
        super().__init__(student_channels, teacher_channels)
        self.weight = weight
        self.align = align_layer(student_channels, teacher_channels, align)

    def terms(self, student: Tensor, teacher: Tensor, context: DistillationContext) -> dict[str, Tensor]:
        """Return `cosine`: see the class."""
        similarity = F.cosine_similarity(self.align(student), teacher, dim=1)  # (N, H, W)
        return {"cosine": self.weight * (1 - similarity.mean())}
