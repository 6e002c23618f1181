"""MGD: the teacher's whole feature map generated from a randomly masked student's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acamkd.losses.base import DistillationContext, FeatureLoss
from acamkd.losses.functional import align_layer, check_choices


class MGD(FeatureLoss):
    """Masked generative distillation: a small generator restores the teacher's feature map from part of the student's.

    Paper: Yang et al., Masked Generative Distillation, ECCV 2022. https://arxiv.org/abs/2205.01529
    Official code: https://github.com/yzd-v/MGD

    L = weight / N sum_{n,c,p} (G(M f(S)) - T)^2

    M is 0 at a random share `mask_ratio` of the locations of each image and 1 elsewhere. G is a 3x3 convolution, ReLU
    and another 3x3 convolution, f a 1x1 convolution where the channels differ. The target is the teacher's whole
    feature map, not only the masked locations. M comes from torch's global generator of the feature map's device.

    Defaults: the published setting of one-stage detectors (RetinaNet, RepPoints). Presets carry those of two-stage
    detectors and of segmentation. The published segmentation runs compare the encoders' last stage and add CWD on the
    logits (temperature 4, weight 3): `recipes/combinations/mgd_segmentation.yaml`. The one-stage detectors' necks and
    heads start from the teacher's (`student.inherit`).

    Deviations: kept locations are not scaled up, as in the authors' code. Their classification code draws its channel
    mask as rand < mask_ratio, their other code as rand > 1 - mask_ratio: the same law, and here always the latter.

    Code:
        - M: MGD.random_mask
        - L: MGD.terms

    Example:
        >>> student, teacher = torch.randn(2, 16, 8, 8, requires_grad=True), torch.randn(2, 32, 8, 8)
        >>> terms = MGD(16, 32, **MGD.PRESETS["two_stage"])(student, teacher)
        >>> sorted(terms)
        ['generation']

    Args:
        student_channels: C_s.
        teacher_channels: C_t.
        weight: Factor of the loss, alpha in the paper; small, because the squares are summed and not averaged.
        mask_ratio: Share of masked locations, lambda in the paper.
        mask_on: "spatial", one mask of locations for all channels of an image, or "channel", whole channels, as the
            authors do for classification.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "one_stage": {"weight": 2e-5, "mask_ratio": 0.65},
        "two_stage": {"weight": 5e-7, "mask_ratio": 0.45},
        "segmentation": {"weight": 2e-5, "mask_ratio": 0.75},
    }

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        *,
        weight: float = 2e-5,
        mask_ratio: float = 0.65,
        mask_on: Literal["spatial", "channel"] = "spatial",
    ) -> None:
        super().__init__(student_channels, teacher_channels)
        check_choices(MGD.__init__, mask_on=mask_on)
        self.weight = weight
        self.mask_ratio = mask_ratio
        self.mask_on = mask_on
        self.align = align_layer(student_channels, teacher_channels)
        self.generator = nn.Sequential(
            nn.Conv2d(teacher_channels, teacher_channels, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(teacher_channels, teacher_channels, kernel_size=3, padding=1),
        )

    def terms(self, student: Tensor, teacher: Tensor, context: DistillationContext) -> dict[str, Tensor]:
        """Return `generation`: see the class."""
        aligned = self.align(student)
        generated = self.generator(aligned * self.random_mask(aligned))
        loss = F.mse_loss(generated, teacher, reduction="sum") / len(teacher)
        return {"generation": self.weight * loss}

    def random_mask(self, x: Tensor) -> Tensor:
        """Draw what is kept (True) of a feature map (N, C, H, W): (N, 1, H, W), or (N, C, 1, 1) for channels."""
        count, channels, height, width = x.shape
        shape = (count, 1, height, width) if self.mask_on == "spatial" else (count, channels, 1, 1)
        return torch.rand(shape, device=x.device) <= 1 - self.mask_ratio
