"""DIST: the teacher's relations between classes and between pixels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from acamkd.losses.base import DistillationContext, FeatureLoss
from acamkd.losses.functional import align_layer, pearson


class DIST(FeatureLoss):
    """One minus the Pearson correlation of class probabilities, over the classes of a pixel and the pixels of a class.

    Paper: Huang et al., Knowledge Distillation from A Stronger Teacher, NeurIPS 2022. https://arxiv.org/abs/2205.10536
    Official code: https://github.com/hunto/DIST_KD

    P = softmax over classes of logits / temperature, one row per pixel of the batch;
    L = weight * temperature^2 * (beta * (1 - mean_rows r(P_s, P_t)) + gamma * (1 - mean_classes r(P_s, P_t))).

    beta = gamma = 1, temperature 1 and weight 1 are the official segmentation setting, which gives the logits of an
    auxiliary head 0.4. The temperature and its square come from the classification code.

    Deviations: none for equal numbers of classes. Other class counts, which the paper has not, are aligned by a 1x1
    convolution. The official option to replace softmax by sigmoid, unused in the segmentation setting, is left out.

    Code:
        - r: pearson
        - P, L: DIST.terms

    Example:
        >>> student, teacher = torch.randn(2, 19, 8, 8, requires_grad=True), torch.randn(2, 19, 8, 8)
        >>> terms = DIST(19, 19)(student, teacher)
        >>> sorted(terms)
        ['inter', 'intra']

    Args:
        student_channels: Classes of the student's logits.
        teacher_channels: Classes of the teacher's logits, at least 2.
        weight: Factor of the whole loss.
        beta: Factor of the relation between the classes of a pixel.
        gamma: Factor of the relation between the pixels of a class.
        temperature: Divides the logits.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "segmentation": {"weight": 1.0},
        "segmentation_auxiliary": {"weight": 0.4},
    }

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        *,
        weight: float = 1.0,
        beta: float = 1.0,
        gamma: float = 1.0,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(student_channels, teacher_channels)
        self.weight = weight
        self.beta = beta
        self.gamma = gamma
        self.temperature = temperature
        self.align = align_layer(student_channels, teacher_channels)

    @property
    def needs_head(self) -> bool:
        """The channels are classes."""
        return True

    def terms(self, student: Tensor, teacher: Tensor, context: DistillationContext) -> dict[str, Tensor]:
        """Return `inter` (classes of a pixel) and `intra` (pixels of a class): see the class."""
        p_student, p_teacher = (
            (logits / self.temperature).softmax(dim=1).movedim(1, -1).flatten(0, 2)  # (NHW, C)
            for logits in (self.align(student), teacher)
        )
        scale = self.weight * self.temperature**2
        return {
            "inter": scale * self.beta * (1 - pearson(p_student, p_teacher, dim=1).mean()),
            "intra": scale * self.gamma * (1 - pearson(p_student, p_teacher, dim=0).mean()),
        }
