"""FitNet: imitation of the teacher's features by mean squared error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from acamkd.losses.base import DistillationContext, FeatureLoss
from acamkd.losses.functional import align_layer


class FitNet(FeatureLoss):
    """Mean squared error between the aligned student's map and the teacher's.

    Paper: Romero et al., FitNets: Hints for Thin Deep Nets, ICLR 2015.

    L = weight * mean_{n,c,p} (f(S) - T)^2, f a 1x1 convolution.

    Deviations: the paper trains hints in a stage of their own and regresses with a convolution as large as the map
    needs; dense-prediction practice (MasKD's and FreeKD's code) adds the hint to the task loss and uses a 1x1
    convolution, which this follows.

    Args:
        student_channels: C_s.
        teacher_channels: C_t.
        weight: Factor of the loss. 1 is the plain mean; published detectors use 5 (RetinaNet), 10 (FCOS), 1 (Faster
            R-CNN) and 2 (Faster R-CNN from a cascade), available as presets.
        align: Project the student even where the channels agree, as the published detection settings do.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "retinanet": {"weight": 5.0, "align": True},
        "fcos": {"weight": 10.0, "align": True},
        "faster_rcnn": {"weight": 1.0, "align": True},
        "faster_rcnn_cascade_teacher": {"weight": 2.0, "align": True},
    }

    def __init__(
        self, student_channels: int, teacher_channels: int, *, weight: float = 1.0, align: bool = False
    ) -> None:
        super().__init__(student_channels, teacher_channels)
        self.weight = weight
        self.align = align_layer(student_channels, teacher_channels, align)

    def terms(self, student: Tensor, teacher: Tensor, context: DistillationContext) -> dict[str, Tensor]:
        """Return `feature`: see the class."""
        return {"feature": self.weight * F.mse_loss(self.align(student), teacher)}
