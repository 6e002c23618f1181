"""PKD: the teacher's feature map up to a scale and an offset per channel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from acamkd.losses.base import DistillationContext, FeatureLoss
from acamkd.losses.functional import align_layer, standardize


class PKD(FeatureLoss):
    """Pearson correlation distillation: each channel of the student correlates with the teacher's.

    Paper: Cao et al., PKD: General Distillation Framework for Object Detectors via Pearson Correlation Coefficient,
    NeurIPS 2022. https://arxiv.org/abs/2207.02039
    Official code: https://github.com/open-mmlab/mmrazor

    z(X) = (X - mean X) / (std X + 1e-6), per channel over the images and locations of the batch together
    L = weight * 1/2 mean_{n,c,p} (z(S) - z(T))^2 = weight * (1 - mean_c r_c) (n - 1) / n,  n = N H W values

    r_c is the correlation of channel c, so that the scale and the offset of the teacher's channels do not matter.

    Defaults: weight 10, as published for RetinaNet (teachers RetinaNet and FCOS) and RepPoints. Faster R-CNN, and
    RetinaNet with a Mask R-CNN as teacher, have 6. The published settings distill the first four levels of the pyramid.

    Deviations: mean and standard deviation are those of the batch on one device, so that the value depends on its size.
    A batch of one 1x1 feature map has no standard deviation, an error. The authors need equal channels; where they
    differ, the student is projected by a 1x1 convolution here. A student's feature map that is larger than the
    teacher's is averaged over areas, where their code samples it bilinearly.

    Code:
        - z: standardize
        - L: PKD.terms

    Example:
        >>> student, teacher = torch.randn(2, 16, 8, 8, requires_grad=True), torch.randn(2, 32, 8, 8)
        >>> terms = PKD(16, 32)(student, teacher)
        >>> sorted(terms)
        ['correlation']

    Args:
        student_channels: C_s.
        teacher_channels: C_t.
        weight: Factor of the loss.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "retinanet": {"weight": 10.0},
        "retinanet_mask_rcnn_teacher": {"weight": 6.0},
        "reppoints": {"weight": 10.0},
        "faster_rcnn": {"weight": 6.0},
    }

    def __init__(self, student_channels: int, teacher_channels: int, *, weight: float = 10.0) -> None:
        super().__init__(student_channels, teacher_channels)
        self.weight = weight
        self.align = align_layer(student_channels, teacher_channels)

    def terms(self, student: Tensor, teacher: Tensor, context: DistillationContext) -> dict[str, Tensor]:
        """Return `correlation`: see the class."""
        loss = F.mse_loss(standardize(self.align(student)), standardize(teacher)) / 2
        return {"correlation": self.weight * loss}
