"""ACAM-KD's dense reference as a loss."""

from __future__ import annotations

from torch import Tensor

from acamkd.losses.acam import reference
from acamkd.losses.acam.acam import ACAM
from acamkd.losses.base import DistillationContext


class Textbook(ACAM):
    """The preset `paper` as its reference computes it: the same parameters and result, to rounding."""

    def terms(self, student: Tensor, teacher: Tensor, context: DistillationContext) -> dict[str, Tensor]:
        """Return `channel`, `spatial` and `diversity`."""
        return reference.acam(dict(self.named_parameters()), student, teacher)
