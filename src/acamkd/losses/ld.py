"""LD: the distributions of the edges of the student's boxes learn from the teacher's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from acamkd.losses.queries import QueryLoss, Source

if TYPE_CHECKING:
    from acamkd.models.base import Answers, QueryDecoder, TaskModel


def edge_positions(initial: Tensor, shifts: Tensor) -> Tensor:
    """Where each bin puts the left, top, right and bottom edge of a box.

    Args:
        initial: (N, Q, 4), center and size.
        shifts: (B,), outward, in sides of the box.

    Returns:
        (N, Q, 4, B).
    """
    centers, sides, outward = _axes(initial)
    return centers + outward * (0.5 + shifts) * sides


def to_shifts(positions: Tensor, initial: Tensor) -> Tensor:
    """The shifts that put the edges of a box at given positions, (N, Q, 4, B): the inverse of `edge_positions`."""
    centers, sides, outward = _axes(initial)
    return outward * (positions - centers) / sides.clamp_min(1e-6) - 0.5


def onto_bins(probabilities: Tensor, values: Tensor, bins: Tensor) -> Tensor:
    """Move a distribution over some values to bins: each probability is divided between the two nearest, linearly.

    Args:
        probabilities: (..., V).
        values: (..., V), of each probability; outside of the bins the last one takes all.
        bins: (B,), rising.

    Returns:
        (..., B), with the same sum, and the same mean if no value lies outside.
    """
    right = torch.searchsorted(bins, values.contiguous()).clamp(1, len(bins) - 1)
    left = right - 1
    share = ((values - bins[left]) / (bins[right] - bins[left])).clamp(0, 1)
    moved = probabilities.new_zeros((*probabilities.shape[:-1], len(bins)))
    return moved.scatter_add(-1, left, probabilities * (1 - share)).scatter_add(-1, right, probabilities * share)


def _axes(initial: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Center, side and outward direction of each edge, to be broadcast over bins."""
    x, y, w, h = initial.unsqueeze(-1).unbind(dim=-2)
    outward = initial.new_tensor([-1.0, -1.0, 1.0, 1.0])[:, None]
    return torch.stack([x, y, x, y], dim=-2), torch.stack([w, h, w, h], dim=-2), outward


class LD(QueryLoss):
    """The distributions over where the edges of the student's boxes are learn from those of the teacher.

    Paper: Zheng et al., Localization Distillation for Dense Object Detection, CVPR 2022.
    https://arxiv.org/abs/2102.12252
    Official code: https://github.com/HikariTJU/LD

    D-FINE and DEIMv2 predict, for each edge of a box, a distribution over shifts of an initial box. Both decoders are
    asked the same queries, as by `kddetr`. For edge e of query i, with logits z and temperature tau:

        p_t   softmax(z_t / tau), moved from the bins of the teacher's initial box to those of the student's
        p_s   softmax(z_s / tau)
        edge  tau^2 sum_i w_i 1/4 sum_e KL(p_t,ie || p_s,ie)

    w_i is the teacher's confidence as a share of all queries of the set. A bin of the teacher stands for a position in
    the image. Its probability goes to the two bins of the student that are nearest to that position, in proportion, so
    that the mean position stays. Where both initial boxes and bins are equal, nothing is moved.

    Deviations: the paper is about dense detectors, whose distributions at one location have a common origin, so that it
    compares them as they are. Its regions of valuable locations are replaced by shared queries and w. The temperature
    is the paper's; D-FINE distills its own layers at 5. This follows the paper; no official code was run.

    Code:
        - position of a bin: edge_positions
        - p_t, on the student's bins: onto_bins
        - edge: LD.compare

    Example:
        >>> section = Model(arch="hf/d_fine", options={"decoder_layers": 2})
        >>> student, teacher = (build(section, "detection", 2) for _ in range(2))
        >>> distiller = Distiller(student, teacher, pairs=[None], losses=[LD()])

    Args:
        weight: Factor of the loss.
        temperature: tau.
        queries: Sets of shared queries: `specific`, `general`, `targets`; see `kddetr`.
        count: Number of random boxes in the set `general`.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    TERMS = ("edge",)

    REQUIREMENTS = ("D-FINE or DEIMv2 of transformers on both sides",)

    def __init__(
        self,
        *,
        weight: float = 0.25,
        temperature: float = 10.0,
        queries: tuple[Source, ...] = ("specific",),
        count: int = 100,
    ) -> None:
        super().__init__(weight=weight, queries=queries, count=count)
        self.temperature = temperature

    def decoders(self, student: TaskModel, teacher: TaskModel) -> tuple[QueryDecoder, QueryDecoder]:
        """The decoders of both; raises ValueError unless both predict distributions of edges."""
        found = super().decoders(student, teacher)
        if not (found[0].has_corners and found[1].has_corners):
            kinds = f"{type(student.net).__name__} and {type(teacher.net).__name__}"
            raise ValueError(f"LD needs distributions of edges, of D-FINE or DEIMv2, on both sides, not {kinds}")
        return found

    def compare(self, student: Answers, teacher: Answers, share: Tensor) -> dict[str, Tensor]:
        """Return `edge`: see the class."""
        assert student.corners is not None
        assert student.initial is not None
        assert student.shifts is not None
        assert teacher.corners is not None
        assert teacher.initial is not None
        assert teacher.shifts is not None
        positions = edge_positions(teacher.initial, teacher.shifts)
        target = (teacher.corners / self.temperature).softmax(dim=-1)
        target = onto_bins(target, to_shifts(positions, student.initial.detach()), student.shifts)
        found = (student.corners / self.temperature).log_softmax(dim=-1)
        divergence = F.kl_div(found, target, reduction="none").sum(dim=-1).mean(dim=-1)
        return {"edge": self.weight * self.temperature**2 * (share * divergence).sum()}
