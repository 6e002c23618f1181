"""CanKD: the student's features, enhanced by cross-attention to the teacher's, are compared with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acamkd.losses.base import DistillationContext, FeatureLoss
from acamkd.losses.functional import align_layer


class CanKD(FeatureLoss):
    """Mean squared error of instance-normalized feature maps, the student's after a non-local block on the teacher's.

    Paper: Sun and Ohyama, CanKD: Cross-Attention-based Non-local operation for Feature-based Knowledge Distillation,
    WACV 2026. https://arxiv.org/abs/2511.21503
    Official code: https://github.com/tori-hotaru/CanKD

    Y = theta(f(S))^T phi(T) g(T)^T / n, dot products without softmax
    S' = f(S) + BN(W Y)
    L = weight / 2 * mean_{n,c,p} (IN(S') - IN(T))^2

    n is the number of locations of phi(T). theta, phi and g are 1x1, C -> C/2; phi and g are followed by 2x2
    max-pooling. W is 1x1, C/2 -> C. IN is per image and channel, without affine parameters. BN starts at zero, so that
    L starts at weight * (1 - mean Pearson correlation of the channels).

    The weight is that of the official configurations. The paper leaves the 1/2 out and quotes half of it.

    Without a softmax, (theta^T phi) g^T is theta^T (phi g^T). It is computed so, without a matrix of all pairs of
    locations.

    Deviations: a side of one location is not pooled, since pooling would leave nothing of it.

    Code:
        - Y, S', L: CanKD.terms
        - IN: _instance_norm

    Example:
        >>> student, teacher = torch.randn(2, 16, 8, 8, requires_grad=True), torch.randn(2, 32, 8, 8)
        >>> terms = CanKD(16, 32)(student, teacher)
        >>> sorted(terms)
        ['feature']

    Args:
        student_channels: C_s; where it is not C_t, a 1x1 convolution f aligns the student.
        teacher_channels: C_t, at least 2.
        weight: Factor of the loss.
        subsample: Max-pool phi(T) and g(T), which leaves a quarter of the work.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "retinanet": {"weight": 10.0},
        "fcos": {"weight": 10.0},
        "faster_rcnn": {"weight": 10.0},
        "reppoints": {"weight": 10.0},
        "segmentation": {"weight": 10.0},
        "segmentation_pspnet_to_deeplabv3": {"weight": 20.0},
    }

    def __init__(
        self, student_channels: int, teacher_channels: int, *, weight: float = 10.0, subsample: bool = True
    ) -> None:
        super().__init__(student_channels, teacher_channels)
        self.weight = weight
        self.subsample = subsample
        inner = teacher_channels // 2
        self.align = align_layer(student_channels, teacher_channels)
        self.theta = nn.Conv2d(teacher_channels, inner, kernel_size=1)
        self.phi = nn.Conv2d(teacher_channels, inner, kernel_size=1)
        self.g = nn.Conv2d(teacher_channels, inner, kernel_size=1)
        normalization = nn.BatchNorm2d(teacher_channels)
        nn.init.zeros_(normalization.weight)
        self.output = nn.Sequential(nn.Conv2d(inner, teacher_channels, kernel_size=1), normalization)

    def terms(self, student: Tensor, teacher: Tensor, context: DistillationContext) -> dict[str, Tensor]:
        """Return `feature`: see the class."""
        student = self.align(student)
        keys, values = self.phi(teacher), self.g(teacher)
        if self.subsample:
            window = [min(2, side) for side in teacher.shape[-2:]]
            keys, values = F.max_pool2d(keys, window), F.max_pool2d(values, window)
        relation = torch.einsum("nkhw,nvhw->nkv", keys, values) / keys[0, 0].numel()  # (N, C/2, C/2)
        attended = torch.einsum("nkhw,nkv->nvhw", self.theta(student), relation)
        enhanced = student + self.output(attended)
        return {"feature": self.weight / 2 * F.mse_loss(_instance_norm(enhanced), _instance_norm(teacher))}


def _instance_norm(x: Tensor) -> Tensor:
    """Zero mean and unit biased variance per image and channel, (N, C, H, W); unlike F.instance_norm also for 1 x 1."""
    return F.layer_norm(x, x.shape[-2:])
