"""Ideas that might make ACAM better, for recipes, `name: studies.generality.ideas:CLASS`.

README.md says when each one runs, and what it is compared with. Its control is ACAM with its defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import log, prod

import torch
import torch.nn.functional as F
from studies.masks.variants import OtherTerm
from torch import Tensor

from acamkd.losses.acam.acam import ACAM
from acamkd.losses.acam.fusion import layer_norm
from acamkd.losses.acam.masks import Masks
from acamkd.losses.base import DistillationContext
from acamkd.losses.functional import safe_divide
from acamkd.losses.pkd import PKD


class LateMasks(OtherTerm):
    """The masks choose no locations before the warm-up has ended; they learn from the first step on.

    Until then each mask is its own mean, which keeps its strength. Early masks follow a student that knows nothing yet.
    """

    WARMUP = 100
    """Steps, a quarter to a third of a training."""

    def terms(self, student: Tensor, teacher: Tensor, context: DistillationContext) -> dict[str, Tensor]:
        """As ACAM, but for the masks of early steps."""
        self.is_early = context.step < self.WARMUP
        return super().terms(student, teacher, context)

    def imitation_under(self, mask: Tensor, error: Tensor) -> Tensor:
        """As ACAM's, at first under masks that are alike everywhere."""
        mask = mask.flatten(2)
        return super().imitation_under(mask.mean(dim=2, keepdim=True).expand_as(mask) if self.is_early else mask, error)


class SmoothReward(ACAM):
    """The reward of a location is the mean over its 3 x 3 neighbors, divided by the image's mean magnitude again.

    A reward is the product of two noisy gradients at one location of one image. An average over two augmentations
    would need a second forward of the student, which a loss cannot run. Neighbors are there already.
    """

    def _rewards(
        self, errors: Mapping[str, Tensor], student: Tensor, context: DistillationContext
    ) -> dict[str, Tensor]:
        rewards = super()._rewards(errors, student, context)
        image = rewards["spatial"].view(len(student), 1, *student.shape[2:])
        smooth = F.avg_pool2d(image, 3, stride=1, padding=1, count_include_pad=False).flatten(1)
        return rewards | {"spatial": safe_divide(smooth, smooth.abs().mean(dim=1, keepdim=True))}


class AgreeingTeacher(OtherTerm):
    """On labeled images the student follows the teacher only where that lowers its task loss, to first order.

    There the reward is not negative: the labels and the teacher agree. Yu et al. (Gradient Surgery for Multi-Task
    Learning, NeurIPS 2020, https://arxiv.org/abs/2001.06782) remove conflicts between the gradients of whole tasks.
    Here each location is judged by itself.
    """

    def terms(self, student: Tensor, teacher: Tensor, context: DistillationContext) -> dict[str, Tensor]:
        """As ACAM, without the locations of a negative reward."""
        self.agrees: Tensor | None = None  # unlabeled images have no reward
        return super().terms(student, teacher, context)

    def _rewards(
        self, errors: Mapping[str, Tensor], student: Tensor, context: DistillationContext
    ) -> dict[str, Tensor]:
        rewards = super()._rewards(errors, student, context)
        self.agrees = rewards["spatial"] >= 0
        return rewards

    def imitation_under(self, mask: Tensor, error: Tensor) -> Tensor:
        """As ACAM's, of the errors where both agree."""
        return super().imitation_under(mask, error if self.agrees is None else error * self.agrees)


class CertainTeacher(OtherTerm):
    """For logits: an error counts by the teacher's certainty there, 1 - H(softmax T) / log C.

    H is the entropy of its class probabilities. On unlabeled images nothing else tells where the teacher may be wrong.
    """

    def errors(self, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """As ACAM's, times the certainty."""
        scores = teacher.flatten(2).log_softmax(dim=1)
        entropy = -(scores.exp() * scores).sum(dim=1)
        errors = super().errors(student, teacher)
        return errors | {"spatial": (1 - entropy / log(teacher.shape[1])) * errors["spatial"]}


class ResidualFusion(ACAM):
    """The fused feature map is A V + T', with the query's own feature map added, as a Transformer's attention has it.

    T' is the teacher's feature map with layer norm. A V alone varies over locations only as far as attention does. On
    logits of small values attention is nearly uniform, and then so is every mask.
    """

    def _masks(self, student: Tensor, teacher: Tensor) -> Masks:
        units = self.selection.spatial_units()
        pooled, fused = self.fusion(teacher, student, units)
        return self.selection.masks(pooled, fused + torch.einsum("mc,nchw->nmhw", units, layer_norm(teacher)))


class EqualLevels(ACAM):
    """For pyramids: a level of P locations counts sqrt(P), relative to one of stride 8.

    Every level's term is a mean over its locations. Where these are independent, the norm of its gradient falls as
    1 / sqrt(P), so that a level of two locations pulls ten times as hard as one of two hundred.
    """

    needs = frozenset({"input_size"})

    def terms(self, student: Tensor, teacher: Tensor, context: DistillationContext) -> dict[str, Tensor]:
        """As ACAM, with its level's factor on the distillation terms."""
        terms = super().terms(student, teacher, context)
        return terms | {kind: level_factor(teacher, context) * terms[kind] for kind in self.kinds}


class EqualLevelsOfPKD(PKD):
    """The same for PKD, to tell whether it is masks that gain by it."""

    needs = frozenset({"input_size"})

    def terms(self, student: Tensor, teacher: Tensor, context: DistillationContext) -> dict[str, Tensor]:
        """As PKD, times its level's factor."""
        return {
            name: level_factor(teacher, context) * x for name, x in super().terms(student, teacher, context).items()
        }


STRIDE = 8


def level_factor(teacher: Tensor, context: DistillationContext) -> float:
    """sqrt(P / P_8) of a feature map of P locations, where one of stride 8 would have P_8."""
    assert context.input_size is not None  # `needs` names it
    return float((STRIDE**2 * prod(teacher.shape[2:]) / prod(context.input_size)) ** 0.5)
