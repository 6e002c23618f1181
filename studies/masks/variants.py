"""Ways of training ACAM's masks that did not become options: for recipes, `name: studies.masks.variants:CLASS`.

    PYTHONPATH=. acamkd compare studies/masks/recipe.yaml --seeds 1

docs/research/log.md has what they are for and what they did.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from acamkd.losses.acam.acam import ACAM
from acamkd.losses.acam.distances import distillation_distances
from acamkd.losses.acam.masks import Masks
from acamkd.losses.base import DistillationContext
from acamkd.losses.functional import masked_error, safe_divide


class OtherTerm(ACAM):
    """ACAM with another imitation under its masks, which learn as usual."""

    def terms(self, student: Tensor, teacher: Tensor, context: DistillationContext) -> dict[str, Tensor]:
        """As ACAM, but for `channel` and `spatial`, which are of `imitation_under`."""
        terms = super().terms(student, teacher, context)
        aligned = self.align(student)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.mask_grad == "joint"):
            masks = self._masks(aligned, teacher)
        errors = self.errors(aligned, teacher)
        for kind, mask in masks._asdict().items():
            if mask is not None:
                terms[kind] = self.weight * self.imitation_under(mask, errors[kind]).mean()
        return terms

    def errors(self, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """`channel`, (N, C), and `spatial`, (N, HW), as far as in use."""
        return distillation_distances(student, teacher, self.kinds, self.imitation, self.temperature)

    def imitation_under(self, mask: Tensor, error: Tensor) -> Tensor:
        """(N, M) of masks (N, M, C) or (N, M, H, W) and errors (N, C) or (N, HW)."""
        return masked_error(error, mask.flatten(2))


class Shuffled(OtherTerm):
    """Control: every image is imitated under the masks of the image before it in the batch.

    If they do as well on the wrong image, they need not be of the right one; but images that are alike, as a
    driving car's, may share the right places.
    """

    def imitation_under(self, mask: Tensor, error: Tensor) -> Tensor:
        """As ACAM's, under masks that belong elsewhere."""
        return super().imitation_under(self.misplaced(mask), error)

    def misplaced(self, mask: Tensor) -> Tensor:
        """(N, M, C) or (N, M, H, W), where they do not belong."""
        return mask.roll(1, dims=0)


class ShiftedMasks(Shuffled):
    """Control: masks moved by half the image's height, so that they miss what they were made for.

    They learn for a student that imitates elsewhere, so that they come to be others than ACAM's.
    """

    def misplaced(self, mask: Tensor) -> Tensor:
        """(N, M, H, W), cyclically; a level of one row stays."""
        if mask.dim() != 4:
            raise ValueError("only spatial masks can be moved: set masks: spatial")
        return mask.roll(mask.shape[2] // 2, dims=2)


class StrengthNormalized(OtherTerm):
    """sum M^2 e / sum M^2 in place of sum M^2 e / sum M, so that masks do not pull harder as they harden.

    Of soft masks, around 1/2, the latter is half as strong as of hard ones, and `weight: auto` is set at the start.
    """

    def imitation_under(self, mask: Tensor, error: Tensor) -> Tensor:
        """Each mask's term divided by its strength, sum M^2 / sum M."""
        squares = mask.flatten(2).square()
        return safe_divide(torch.einsum("nmk,nk->nm", squares, error), squares.sum(dim=2))


class Scaled(OtherTerm):
    """Squares of maps divided by the teacher's deviation of each channel.

    Channels count alike, as under imitation="standardized", but the student has to meet their scale and mean.
    """

    def errors(self, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """As ACAM's with imitation="squared", of scaled maps."""
        deviation = teacher.std(dim=(0, 2, 3), correction=0, keepdim=True)
        return distillation_distances(safe_divide(student, deviation), safe_divide(teacher, deviation), self.kinds)


class HardRandomMasks(ACAM):
    """Control: untrained masks that are as hard as trained ones and open about half of each image.

    With `mask_source: random`. The logits of each mask and image are standardized and stretched, so that these masks
    vary by 0.46, as learned ones do, where untrained ones vary by 0.2.
    """

    def _masks(self, student: Tensor, teacher: Tensor) -> Masks:
        masks = super()._masks(student, teacher)
        hard = [None if mask is None else torch.sigmoid(10 * self._standardized(mask)) for mask in masks]
        return Masks(*hard)

    @staticmethod
    def _standardized(mask: Tensor) -> Tensor:
        logits = torch.logit(mask, eps=1e-6).flatten(2)
        centered = logits - logits.mean(dim=2, keepdim=True)
        return safe_divide(centered, centered.square().mean(dim=2, keepdim=True).sqrt()).view_as(mask)


class DegreeZero(OtherTerm):
    """Joint training with sum M e / sum M: no pull on the masks' scale, but on every place harder than the mean.

    dL/dM_p is proportional to e_p - L: the masks leave the places where the student is far from the teacher.
    """

    def imitation_under(self, mask: Tensor, error: Tensor) -> Tensor:
        """Of degree 0 in the masks."""
        mask = mask.flatten(2)
        return safe_divide(torch.einsum("nmk,nk->nm", mask, error), mask.sum(dim=2))


class Adversarial(ACAM):
    """The masks collect error instead of reward, within the same budget: they rise where the student lags."""

    def _rewards(
        self, errors: Mapping[str, Tensor], student: Tensor, context: DistillationContext
    ) -> dict[str, Tensor]:
        return {kind: safe_divide(x.detach(), x.detach().mean(dim=1, keepdim=True)) for kind, x in errors.items()}


class Difference(ACAM):
    """Masks fed by the difference to the teacher: the student's part of the fusion is T - S'."""

    def _masks(self, student: Tensor, teacher: Tensor) -> Masks:
        return super()._masks(teacher - student, teacher)


class ExactReward(ACAM):
    """The reward of a place is what weighing its own error changes, <dL_task/dS', de_k/dS'>, statistics included.

    Under imitation="standardized" an error moves every other place of its channel, too; ACAM's reward looks only at
    what the place itself does.
    """

    def _rewards(
        self, errors: Mapping[str, Tensor], student: Tensor, context: DistillationContext
    ) -> dict[str, Tensor]:
        assert context.task_gradient is not None
        # A backward is linear in what it starts from: its derivative by that is the derivative forward.
        starts = [torch.zeros_like(error, requires_grad=True) for error in errors.values()]
        (backward,) = torch.autograd.grad(tuple(errors.values()), student, starts, create_graph=True)
        rewards = torch.autograd.grad(backward, starts, context.task_gradient)
        return {
            kind: safe_divide(x, x.abs().mean(dim=1, keepdim=True)) for kind, x in zip(errors, rewards, strict=True)
        }
