"""What every distillation loss has in common: the contract, the context, float32 maths and a common size."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from acamkd.losses.functional import full_precision, resample

if TYPE_CHECKING:
    from acamkd.models.base import Batch, TaskModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DistillationContext:
    """All that a method may need beside the two maps; the Distiller fills in only what a loss declares in `needs`.

    Attributes:
        step: Optimization step, from 0.
        input_size: (height, width) of the batch's common input frame, in pixels.
        boxes: One (K, 4) tensor per image, x1 y1 x2 y2 in pixels of that frame.
        task_gradient: Gradient of the student's task loss at this student map, of its shape.
        labeled: Whether the images have targets. Without them there is no task gradient, whatever `needs` says, and
            a loss does what it can do without; one that needs boxes is not asked.
    """

    step: int = 0
    input_size: tuple[int, int] | None = None
    boxes: list[Tensor] | None = None
    task_gradient: Tensor | None = None
    labeled: bool = True


class FeatureLoss(nn.Module, ABC):
    """One distillation loss at one feature level.

    A method is a subclass that implements `terms`. What it learns (projections, generators, selection units) are its
    own sub-modules, so that an optimizer, a checkpoint and DDP find them. Its docstring's first line names the method
    in one sentence, a paragraph `Paper:` gives the citation and `Args:` documents every option: `acamkd methods` is
    derived from these and from the constructor's signature.

    Args:
        student_channels: C_s, channels of the student's map.
        teacher_channels: C_t, channels of the teacher's map.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Published settings by name: `ACAM(256, 256, **ACAM.PRESETS["paper"])`, or `preset: paper` in a recipe."""

    needs: frozenset[str] = frozenset()
    """Fields of DistillationContext without which the method, or this instance with its options, cannot work."""

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        super().__init__()
        self.student_channels = student_channels
        self.teacher_channels = teacher_channels
        self.statistics: dict[str, Tensor] = {}
        """Scalars of the last forward worth logging beside the terms, without gradient (the mean of the masks)."""
        self._resampling_logged = False

    @abstractmethod
    def terms(self, student: Tensor, teacher: Tensor, context: DistillationContext) -> dict[str, Tensor]:
        """Compute the loss on maps of one spatial size, in float32 or better, outside autocast.

        Args:
            student: (N, C_s, H, W).
            teacher: (N, C_t, H, W), without gradient.
            context: What `needs` names is present.

        Returns:
            Named scalar terms, already weighted.
        """

    @property
    def teacher_task(self) -> bool:
        """Whether the Distiller is to add the teacher's own loss on `masked` features, which trains the masks."""
        return False

    def masked(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The teacher's map as the teacher is to go on with it, where `teacher_task` holds; shapes as in `forward`."""
        raise NotImplementedError(f"{type(self).__name__} masks nothing for the teacher's own loss")

    def forward(
        self, student: Tensor, teacher: Tensor, context: DistillationContext | None = None
    ) -> dict[str, Tensor]:
        """Compare two maps.

        Args:
            student: (N, C_s, H_s, W_s); resampled to the teacher's size where the sizes differ (said once in the log).
            teacher: (N, C_t, H, W); never receives gradient.
            context: Needed only where `needs` says so.

        Returns:
            Named, already weighted scalar terms; their sum is what is added to the task loss.

        Raises:
            ValueError: The maps do not fit the channels given to the constructor, or `context` lacks what is needed.
        """
        context = context or DistillationContext()
        self._check(student, teacher, context)
        # The projections stay float32 under autocast, and half-precision sums over a map lose digits or overflow.
        with full_precision(student):
            student, teacher = self._to_common_form(student, teacher)
            return self.terms(student, teacher, context)

    def _to_common_form(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """At least float32, one spatial size, no gradient into the teacher."""
        student = student.to(torch.promote_types(student.dtype, torch.float32))
        teacher = teacher.detach().to(student.dtype)
        if student.shape[-2:] != teacher.shape[-2:]:
            if not self._resampling_logged:
                log.info(
                    "%s: student map %s is resampled to the teacher's %s",
                    type(self).__name__, tuple(student.shape[-2:]), tuple(teacher.shape[-2:]),
                )  # fmt: skip
                self._resampling_logged = True
            student = resample(student, teacher.shape[-2:])
        return student, teacher

    def _check(self, student: Tensor, teacher: Tensor, context: DistillationContext) -> None:
        name = type(self).__name__
        for who, tensor, channels in (
            ("student", student, self.student_channels),
            ("teacher", teacher, self.teacher_channels),
        ):
            if tensor.ndim != 4 or tensor.shape[1] != channels:
                raise ValueError(
                    f"{name}: the {who}'s map is {tuple(tensor.shape)}, but must be (N, {channels}, H, W), "
                    f"because the loss was built with {who}_channels={channels}"
                )
        if student.shape[0] != teacher.shape[0]:
            raise ValueError(f"{name}: batch sizes differ, student {student.shape[0]}, teacher {teacher.shape[0]}")
        learning = context.labeled and torch.is_grad_enabled()
        needs = self.needs if learning else self.needs - {"task_gradient"}
        missing = sorted(need for need in needs if getattr(context, need) is None)
        if missing:
            raise ValueError(f"{name} needs {', '.join(missing)} in the DistillationContext")


class HeadLoss(nn.Module, ABC):
    """A distillation loss that needs the networks' heads rather than a pair of maps (CrossKD).

    Args of `forward`:
        student, teacher: The two task models.
        student_taps, teacher_taps: Maps recorded at the layers that `layers` names.
        batch: The batch that both networks saw.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    TERMS: ClassVar[tuple[str, ...]]
    """Names of the terms that `forward` returns."""

    @abstractmethod
    def layers(self, student: TaskModel, teacher: TaskModel) -> tuple[list[str], list[str]]:
        """Name the layers of student and teacher that have to be tapped, in FeatureTap's grammar."""

    @abstractmethod
    def forward(
        self,
        student: TaskModel,
        teacher: TaskModel,
        student_taps: Mapping[str, Tensor],
        teacher_taps: Mapping[str, Tensor],
        batch: Batch,
    ) -> dict[str, Tensor]:
        """Return named, already weighted scalar terms."""
