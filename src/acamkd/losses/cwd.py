"""CWD: each channel as a distribution over locations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor

from acamkd.losses.base import DistillationContext, FeatureLoss
from acamkd.losses.functional import align_layer, check_choices, distribution_error


def distribution_loss(student: Tensor, teacher: Tensor, temperature: float, divergence: str) -> Tensor:
    """tau^2 times the mean divergence between the rows' softmax distributions.

    Args:
        student: (R, K), R distributions over K entries before the softmax.
        teacher: (R, K).
        temperature: tau, divides the entries.
        divergence: "kl", KL(teacher || student), or "mse", the sum of squared differences.
    """
    if divergence == "kl":
        return distribution_error(student, teacher, temperature, dim=1).mean()
    difference = (student / temperature).softmax(dim=1) - (teacher / temperature).softmax(dim=1)
    return temperature**2 * difference.square().sum(dim=1).mean()


class CWD(FeatureLoss):
    """Channel-wise distillation: every channel's softmax over the locations follows the teacher's.

    Paper: Shu et al., Channel-wise Knowledge Distillation for Dense Prediction, ICCV 2021.
    https://arxiv.org/abs/2011.13256
    Official code: https://github.com/irfanICMLL/TorchDistiller

    phi(X)_{n,c} = softmax_p(X_{n,c,p} / tau)
    L = weight * tau^2 / (N C) sum_{n,c} KL(phi(T)_{n,c} || phi(S)_{n,c})

    It works on logits before upsampling as well as on features.

    Defaults: weight 5 and temperature 1, the authors' setting for RetinaNet, on the outputs of the pyramid's
    convolutions. The preset `segmentation_logits` is the authors' segmentation code. `segmentation_features` is what
    the paper is quoted with; no released setting confirms its 50. `mmrazor_segmentation` and `mmrazor_detection` are
    MMRazor's configurations.

    Deviations: the authors' detection code leaves out the teacher's entropy, a constant without gradient, so that its
    value lies above this one. It divides by the student's channels before the projection, this by the teacher's. Their
    segmentation code projects features with a convolution, batch norm and ReLU. Here a 1x1 convolution does, as
    everywhere, where the channels differ.

    Code:
        - tau^2 KL(softmax(T / tau) || softmax(S / tau)): distribution_loss
        - phi over locations or over channels: CWD._rows
        - L: CWD.terms

    Example:
        >>> student, teacher = torch.randn(2, 16, 8, 8, requires_grad=True), torch.randn(2, 32, 8, 8)
        >>> terms = CWD(16, 32, **CWD.PRESETS["segmentation_logits"])(student, teacher)
        >>> sorted(terms)
        ['channel']

    Args:
        student_channels: C_s.
        teacher_channels: C_t.
        weight: Factor of the loss, alpha in the paper.
        temperature: tau; larger values compare more of the feature map than its peaks.
        normalization: "channel", a softmax over the locations of each channel (the method). Or "spatial", a softmax
            over the channels of each location, divided by N H W (the pixel-wise competing method).
        divergence: "kl" or "mse", the squared difference of the distributions, summed where KL sums.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "detection": {"weight": 5.0, "temperature": 1.0},
        "segmentation_logits": {"weight": 3.0, "temperature": 4.0},
        "segmentation_features": {"weight": 50.0, "temperature": 4.0},
        "mmrazor_detection": {"weight": 10.0, "temperature": 1.0},
        "mmrazor_segmentation": {"weight": 5.0, "temperature": 1.0},
    }

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        *,
        weight: float = 5.0,
        temperature: float = 1.0,
        normalization: Literal["channel", "spatial"] = "channel",
        divergence: Literal["kl", "mse"] = "kl",
    ) -> None:
        super().__init__(student_channels, teacher_channels)
        check_choices(CWD.__init__, normalization=normalization, divergence=divergence)
        self.weight = weight
        self.temperature = temperature
        self.normalization = normalization
        self.divergence = divergence
        self.align = align_layer(student_channels, teacher_channels)

    def terms(self, student: Tensor, teacher: Tensor, context: DistillationContext) -> dict[str, Tensor]:
        """Return `channel` or `spatial`: see the class."""
        loss = distribution_loss(
            self._rows(self.align(student)), self._rows(teacher), self.temperature, self.divergence
        )
        return {self.normalization: self.weight * loss}

    def _rows(self, x: Tensor) -> Tensor:
        if self.normalization == "channel":
            return x.flatten(2).flatten(0, 1)  # (N C, HW)
        return x.flatten(2).transpose(1, 2).flatten(0, 1)  # (N HW, C)
