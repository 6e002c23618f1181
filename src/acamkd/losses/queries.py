"""What methods have in common that ask both decoders the same queries."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from acamkd.losses.base import DistillationContext, HeadLoss
from acamkd.losses.functional import full_precision, safe_divide

if TYPE_CHECKING:
    from acamkd.models.base import Answers, Batch, QueryDecoder, TaskModel

Source: TypeAlias = Literal["specific", "general", "targets"]
"""Where shared queries start from: the teacher's own boxes, random ones, or those of the objects."""

SIDES = (0.02, 0.5)
"""Range of the sides of random boxes, as fractions of the image."""


class QueryLoss(HeadLoss):
    """Compares what both decoders answer when their queries start from the same boxes.

    A method is a subclass that implements `compare`. Sets of queries are asked one after the other, so that they do not
    see each other in the decoders' self-attention.

    Args:
        weight: Factor of the whole loss.
        queries: Sets of shared queries; see Source.
        count: Number of random boxes in a set.
    """

    REQUIREMENTS = ("detectors of transformers whose queries start from boxes",)

    def __init__(self, *, weight: float, queries: Sequence[Source], count: int) -> None:
        super().__init__()
        if not queries or count < 1 or not set(queries) <= set(get_args(Source)):
            raise ValueError(
                f"queries must be some of {', '.join(get_args(Source))}, and count 1 or more, not {queries} and {count}"
            )
        self.weight = weight
        self.queries = tuple(queries)
        self.count = count

    @property
    def needs_targets(self) -> bool:
        """Only where queries start from the objects' boxes."""
        return "targets" in self.queries

    @abstractmethod
    def compare(self, student: Answers, teacher: Answers, share: Tensor) -> dict[str, Tensor]:
        """Compare the answers to one set of queries, in float32.

        Args:
            student: Of the student, its boxes in the teacher's units.
            teacher: Of the teacher, without gradient.
            share: (N, Q), the queries' shares of the loss; their sum is 1.

        Returns:
            Named, already weighted scalar terms, those of `TERMS`.
        """

    def layers(self, student: TaskModel, teacher: TaskModel) -> tuple[list[str], list[str]]:
        """Name the student's last feature map before its decoder: what lies below it is to be reached.

        Raises:
            ValueError: A network is no such detector.
        """
        self.decoders(student, teacher)
        maps = student.comparable_layers()
        if not maps:
            raise ValueError(f"{type(self).__name__}: no feature map is known of this {type(student.net).__name__}")
        return [maps[-1]], []

    def called(self, student: TaskModel, teacher: TaskModel) -> tuple[list[str], list[str]]:
        """Name both decoders."""
        of_student, of_teacher = self.decoders(student, teacher)
        return [of_student.layer], [of_teacher.layer]

    def decoders(self, student: TaskModel, teacher: TaskModel) -> tuple[QueryDecoder, QueryDecoder]:
        """The decoders of both; raises ValueError if one has none whose queries start from boxes."""
        found = student.query_decoder, teacher.query_decoder
        if found[0] is None or found[1] is None:
            which, model = ("student", student) if found[0] is None else ("teacher", teacher)
            raise ValueError(
                f"{type(self).__name__} needs detectors of transformers whose queries start from boxes (RT-DETR, "
                "RT-DETRv2, D-FINE, DEIMv2, RF-DETR, LW-DETR, DAB-DETR without patterns, two-stage Deformable DETR) on "
                f"both sides, and the {which} is {type(model.net).__name__}. Queries of DETR, Conditional DETR, YOLOS "
                "and one-stage Deformable DETR are learned vectors, and no box can be put in their place: compare "
                "feature maps there, such as by pkd with `pairs: auto`"
            )
        return found[0], found[1]

    def forward(
        self,
        student: TaskModel,
        teacher: TaskModel,
        student_taps: Mapping[str, Tensor],
        teacher_taps: Mapping[str, Tensor],
        batch: Batch,
        context: DistillationContext,
    ) -> dict[str, Tensor]:
        """Return the terms of all sets of queries together.

        Raises:
            ValueError: A set starts from the objects' boxes, and the batch has none.
        """
        of_student, of_teacher = self.decoders(student, teacher)
        calls = context.student_calls[of_student.layer], context.teacher_calls[of_teacher.layer]
        units = of_student.units(batch)[:, None], of_teacher.units(batch)[:, None]
        terms = {name: batch.pixels.new_zeros(()) for name in self.TERMS}
        for boxes in self._sets(of_teacher.own_boxes(calls[1]), units[1], batch):
            with torch.no_grad():
                target = of_teacher.answer(calls[1], boxes)
            found = scaled(of_student.answer(calls[0], boxes * units[1] / units[0]), units[0] / units[1])
            with full_precision(batch.pixels):
                importance = target.logits.sigmoid().amax(dim=2)
                compared = self.compare(found, target, safe_divide(importance, importance.sum()))
            terms = {name: terms[name] + compared[name] for name in terms}
        return terms

    def _sets(self, own: Tensor, unit: Tensor, batch: Batch) -> Iterator[Tensor]:
        """Boxes of each set, (N, Q, 4) center and size in the teacher's units."""
        for source in self.queries:
            if source == "specific":
                yield own
            elif source == "general":
                yield random_boxes(own, self.count)
            else:
                if batch.boxes is None:
                    raise ValueError(f"{type(self).__name__} needs boxes for queries that start from the objects")
                most = max(len(each) for each in batch.boxes)
                if most:
                    boxes = random_boxes(own, most)  # images with fewer objects are filled up
                    for index, each in enumerate(batch.boxes):
                        boxes[index, : len(each)] = to_centers(each.to(boxes)) / unit[index]
                    yield boxes


def random_boxes(like: Tensor, count: int) -> Tensor:
    """Random boxes, (N, count, 4) center and size: centers uniform in the image, sides uniform in SIDES."""
    drawn = torch.rand(len(like), count, 4, device=like.device)
    low, high = SIDES
    return torch.cat([drawn[..., :2], low + (high - low) * drawn[..., 2:]], dim=-1).to(like.dtype)


def to_corners(boxes: Tensor) -> Tensor:
    """(..., 4) center and size -> x1 y1 x2 y2."""
    centers, sides = boxes.chunk(2, dim=-1)
    return torch.cat([centers - sides / 2, centers + sides / 2], dim=-1)


def to_centers(boxes: Tensor) -> Tensor:
    """(..., 4) x1 y1 x2 y2 -> center and size."""
    starts, ends = boxes.chunk(2, dim=-1)
    return torch.cat([(starts + ends) / 2, ends - starts], dim=-1)


def scaled(answers: Answers, factors: Tensor) -> Answers:
    """Answers with their boxes in other units; factors (N, 1, 4)."""
    initial = None if answers.initial is None else answers.initial * factors
    return answers._replace(boxes=answers.boxes * factors, initial=initial)
