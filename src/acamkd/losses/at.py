"""AT: the student's feature map is to be strong where the teacher's is, whatever its channels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from acamkd.losses.base import DistillationContext, FeatureLoss
from acamkd.losses.functional import check_choices


def attention_vector(x: Tensor) -> Tensor:
    """Energy of every location, mean_c x^2, scaled to length 1 per image: (N, C, H, W) -> (N, HW)."""
    return F.normalize(x.square().mean(dim=1).flatten(1), dim=1)


class AT(FeatureLoss):
    """Attention transfer: the normalized energy per location of the student follows the teacher's.

    Paper: Zagoruyko and Komodakis, Paying More Attention to Attention, ICLR 2017. https://arxiv.org/abs/1612.03928
    Official code: https://github.com/szagoruyko/attention-transfer

    a(X) = vec(mean_c X^2) / ||vec(mean_c X^2)||_2, one vector of P = HW locations per image; then
    form "code":  L = weight * 1/(N P) sum_n ||a(S_n) - a(T_n)||_2^2
    form "paper": L = weight * 1/N sum_n ||a(S_n) - a(T_n)||_2

    Defaults: form "code" and weight 1000, beta of the authors' classification code. Nothing is learned, and the
    channels may differ.

    Deviations of the authors' code from their paper: the norm is squared and divided by P, and beta is not halved. The
    paper sums over channels where the code averages; the normalization cancels this.

    Code:
        - a(X): attention_vector
        - L, both forms: AT.terms

    Example:
        >>> student, teacher = torch.randn(2, 16, 8, 8, requires_grad=True), torch.randn(2, 32, 8, 8)
        >>> terms = AT(16, 32)(student, teacher)
        >>> sorted(terms)
        ['attention']

    Args:
        student_channels: C_s.
        teacher_channels: C_t.
        weight: Factor of the loss, beta in the code and beta/2 in the paper.
        form: "code" or "paper", see above.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {"classification": {"weight": 1000.0, "form": "code"}}

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        *,
        weight: float = 1000.0,
        form: Literal["code", "paper"] = "code",
    ) -> None:
        super().__init__(student_channels, teacher_channels)
        check_choices(AT.__init__, form=form)
        self.weight = weight
        self.form = form

    def terms(self, student: Tensor, teacher: Tensor, context: DistillationContext) -> dict[str, Tensor]:
        """Return `attention`: see the class."""
        difference = attention_vector(student) - attention_vector(teacher)  # (N, HW)
        if self.form == "code":
            return {"attention": self.weight * difference.square().mean()}
        return {"attention": self.weight * torch.linalg.vector_norm(difference, dim=1).mean()}
