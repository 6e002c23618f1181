"""FitNet: mean squared error of features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from acamkd.losses.base import DistillationContext, FeatureLoss
from acamkd.losses.functional import align_layer, check_choices

DISTANCES = {"mse": F.mse_loss, "l1": F.l1_loss, "smooth_l1": F.smooth_l1_loss}


class FitNet(FeatureLoss):
    """Mean squared error between the aligned student's feature map and the teacher's.

    Paper: Romero et al., FitNets: Hints for Thin Deep Nets, ICLR 2015. https://arxiv.org/abs/1412.6550
    Official code: https://github.com/adri-romsor/FitNets

    L = weight * mean_{n,c,p} (f(S) - T)^2, f a 1x1 convolution.

    The released configurations of MasKD and FreeKD add a box term to their methods. It is this loss on the feature maps
    of a box head, with `distance` l1 or smooth_l1.

    Deviations: the paper trains hints in a stage of their own, and its convolution is as large as the feature map
    needs. Dense-prediction practice (MasKD's and FreeKD's code) adds the hint to the task loss and uses a 1x1
    convolution, which this follows.

    Code:
        - f: align_layer
        - L: FitNet.terms

    Example:
        >>> student, teacher = torch.randn(2, 16, 8, 8, requires_grad=True), torch.randn(2, 32, 8, 8)
        >>> terms = FitNet(16, 32)(student, teacher)
        >>> sorted(terms)
        ['feature']

    Args:
        student_channels: C_s.
        teacher_channels: C_t.
        weight: Factor of the loss. 1 is the plain mean; published detectors use 5 (RetinaNet), 10 (FCOS), 1 (Faster
            R-CNN) and 2 (Faster R-CNN from a cascade), available as presets.
        distance: `mse`; `l1`, the mean |f(S) - T|; or `smooth_l1`, quadratic up to a difference of 1.
        align: Project the student even where the channels agree, as the published detection settings do.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "retinanet": {"weight": 5.0, "align": True},
        "fcos": {"weight": 10.0, "align": True},
        "faster_rcnn": {"weight": 1.0, "align": True},
        "faster_rcnn_cascade_teacher": {"weight": 2.0, "align": True},
    }

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        *,
        weight: float = 1.0,
        distance: Literal["mse", "l1", "smooth_l1"] = "mse",
        align: bool = False,
    ) -> None:
        super().__init__(student_channels, teacher_channels)
        check_choices(FitNet.__init__, distance=distance)
        self.weight = weight
        self.distance = distance
        self.align = align_layer(student_channels, teacher_channels, align)

    def terms(self, student: Tensor, teacher: Tensor, context: DistillationContext) -> dict[str, Tensor]:
        """Return `feature`: see the class."""
        return {"feature": self.weight * DISTANCES[self.distance](self.align(student), teacher)}
