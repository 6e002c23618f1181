"""What every distillation loss has in common: the contract, the context, float32 arithmetic and a common size."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from acamkd.losses.functional import full_precision, resample

if TYPE_CHECKING:
    from acamkd.models.base import Batch, Call, TaskModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DistillationContext:
    """All that a method may need beside the two feature maps.

    The Distiller fills in `boxes` and `task_gradient` only where a loss declares them in `needs`.

    Attributes:
        step: Optimization step, from 0.
        input_size: (height, width) of the batch's padded input, in pixels.
        boxes: One (K, 4) tensor per image, x1 y1 x2 y2 in pixels of the padded input.
        task_gradient: Gradient of the student's task loss at this student's feature map, of its shape.
        labeled: Whether the images have targets. Without them there is no task gradient, whatever `needs` says. A loss
            then does what it can do without; one that needs boxes is not asked.
        student_calls: Arguments of the student's modules that a HeadLoss names in `called`, by name.
        teacher_calls: Those of the teacher's, without gradient.
    """

    step: int = 0
    input_size: tuple[int, int] | None = None
    boxes: list[Tensor] | None = None
    task_gradient: Tensor | None = None
    labeled: bool = True
    student_calls: Mapping[str, Call] = field(default_factory=dict)
    teacher_calls: Mapping[str, Call] = field(default_factory=dict)


class TokenModule(nn.Module, ABC):
    """What a loss learns before the distillation, on the frozen teacher alone: `acamkd tokens RECIPE`."""

    @abstractmethod
    def masked(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mask the teacher's feature map with its own masks.

        Args:
            x: (N, C_t, H, W).

        Returns:
            The masked feature map, of the same shape, which takes the place of `x` in the teacher; and the overlap of
            the masks, a scalar, which is added to the teacher's loss on it.
        """


class DistillationLoss(nn.Module, ABC):
    """What every distillation loss may be asked, with the answers of a loss that has nothing special.

    A subclass is a FeatureLoss or a HeadLoss. It overrides:

        PRESETS           published settings, by name
        REQUIREMENTS      what the networks must be, in words
        needs             fields of DistillationContext that it cannot work without
        needs_targets     whether it is left out for unlabeled images
        teacher_task      whether its masks learn from the teacher's own loss
        masks_minimize    whether its masks learn to make this loss small
        needs_head        whether it cannot learn from a teacher without a head
        tokens            what it learns before the distillation
        masks             its masks, for the report
        attention_module  its part whose cost the estimate shows as `attention`
        scaled_options    its options that `weight: auto` multiplies
        statistics        scalars worth logging, filled by its forward

    What it learns (projections, generators, selection units) are its own sub-modules, so that an optimizer, a
    checkpoint and DDP find them. Its options are the keyword-only parameters of its constructor. A factor of its terms
    is an attribute named `weight` or `..._weight` that each forward reads: logs show it, and `weight: auto` sets it.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Published settings by name: `ACAM(256, 256, **ACAM.PRESETS["paper"])`, or `preset: paper` in a recipe."""

    REQUIREMENTS: ClassVar[tuple[str, ...]] = ()
    """What student and teacher must be, beside `needs`, in words: the table of methods shows it."""

    needs: frozenset[str] = frozenset()
    """Fields of DistillationContext without which the method, or this instance with its options, cannot work."""

    def __init__(self) -> None:
        super().__init__()
        self.title = type(self).__name__
        """What the log calls it; in a Distiller LAYER/METHOD."""
        self.statistics: dict[str, Tensor] = {}
        """Scalars of the last forward worth logging beside the terms, without gradient (the mean of the masks)."""

    @property
    def factors(self) -> dict[str, float]:
        """Factors of its terms: its numbers named `weight` or `..._weight`."""
        numbers = {name: value for name, value in vars(self).items() if isinstance(value, int | float)}
        return {name: value for name, value in numbers.items() if name.endswith("weight")}

    @property
    def teacher_task(self) -> bool:
        """Whether the Distiller is to add the teacher's own loss on `masked` features, which trains the masks."""
        return False

    @property
    def masks_minimize(self) -> bool:
        """Whether its masks learn to make this loss itself small, so that without labels they collapse."""
        return False

    @property
    def needs_head(self) -> bool:
        """Whether the loss reads what a teacher's head gives, and so cannot learn from a teacher without one."""
        return self.teacher_task

    @property
    def needs_targets(self) -> bool:
        """Whether the loss is left out for unlabeled images."""
        return self.teacher_task or "boxes" in self.needs

    @property
    def tokens(self) -> TokenModule | None:
        """What this level learns before the distillation, for `acamkd tokens`; None if nothing."""
        return None

    @property
    def attention_module(self) -> nn.Module | None:
        """The part whose forward and backward the estimate counts by themselves, as `attention`; None if there is none.

        The estimate calls it again with the tensors that it was called with.
        """
        return None

    @classmethod
    def scaled_options(cls, options: Mapping[str, Any]) -> tuple[str, ...]:
        """Options that `weight: auto` multiplies by one factor: those of every term that reaches the student.

        Args:
            options: All of the method's options, with their values.
        """
        return ("weight",)

    def masks(self, student: Tensor, teacher: Tensor, context: DistillationContext | None = None) -> dict[str, Tensor]:
        """The masks under which two feature maps are compared, without gradient; none by default.

        Args:
            student: (N, C_s, H_s, W_s).
            teacher: (N, C_t, H_t, W_t).
            context: With what `needs` names, but for the task's gradient.

        Returns:
            By name, (N, M, H, W) or (N, M, C). `spatial` and `channel` have values in (0, 1), and the report judges
            whether they have collapsed. Others are weights of any scale, such as FGD's of the boxes.
        """
        return {}


class FeatureLoss(DistillationLoss):
    """One distillation loss at one feature level.

    A method is a subclass that implements `terms`; DistillationLoss lists what else it may override.

    Its docstring's first line names the method in one sentence. A paragraph `Paper:` gives the citation and its link,
    and `Args:` documents every option. `acamkd methods` and the method's page are derived from these and from the
    constructor's signature.

    Args:
        student_channels: C_s, channels of the student's feature map.
        teacher_channels: C_t, channels of the teacher's feature map.
    """

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        super().__init__()
        self.student_channels = student_channels
        self.teacher_channels = teacher_channels
        self._resampling_logged = False

    @abstractmethod
    def terms(self, student: Tensor, teacher: Tensor, context: DistillationContext) -> dict[str, Tensor]:
        """Compute the loss on feature maps of one spatial size, in float32 or better, outside autocast.

        Args:
            student: (N, C_s, H, W).
            teacher: (N, C_t, H, W), without gradient.
            context: What `needs` names is present.

        Returns:
            Named scalar terms, already weighted.
        """

    def masked(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The teacher's feature map as the teacher goes on with it, where `teacher_task` holds; shapes as `forward`."""
        raise NotImplementedError(f"{type(self).__name__} masks nothing for the teacher's own loss")

    def forward(
        self, student: Tensor, teacher: Tensor, context: DistillationContext | None = None
    ) -> dict[str, Tensor]:
        """Compare two feature maps.

        Args:
            student: (N, C_s, H_s, W_s). Of another size than the teacher's it is resampled, which the log says.
            teacher: (N, C_t, H, W); never receives gradient.
            context: Needed only where `needs` says so.

        Returns:
            Named, already weighted scalar terms; their sum is what is added to the task loss.

        Raises:
            ValueError: The feature maps do not fit the constructor's channels, or `context` lacks what is needed.
        """
        context = context or DistillationContext()
        self._check(student, teacher, context)
        # The projections stay float32 under autocast. Half-precision sums over a feature map lose digits or overflow.
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
                    "%s: the student's feature map %s is resampled to the teacher's %s",
                    self.title, tuple(student.shape[-2:]), tuple(teacher.shape[-2:]),
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
                    f"{name}: the {who}'s feature map is {tuple(tensor.shape)}, but must be (N, {channels}, H, W), "
                    f"because the loss was built with {who}_channels={channels}"
                )
        if student.shape[0] != teacher.shape[0]:
            raise ValueError(f"{name}: batch sizes differ, student {student.shape[0]}, teacher {teacher.shape[0]}")
        learning = context.labeled and torch.is_grad_enabled()
        needs = self.needs if learning else self.needs - {"task_gradient"}
        missing = sorted(need for need in needs if getattr(context, need) is None)
        if missing:
            raise ValueError(f"{name} needs {', '.join(missing)} in the DistillationContext")


class HeadLoss(DistillationLoss):
    """A distillation loss that needs the networks' heads rather than a pair of feature maps (CrossKD, KD-DETR).

    A method is a subclass that sets TERMS and implements `layers` and `forward`; all arguments of its constructor are
    options with defaults. It overrides `called` if it needs what goes into a
    module, such as a decoder; DistillationLoss lists what else it may override.
    """

    TERMS: ClassVar[tuple[str, ...]]
    """Names of the terms that `forward` returns."""

    @property
    def needs_head(self) -> bool:
        """It compares heads."""
        return True

    @property
    def needs_targets(self) -> bool:
        """Heads are compared on labeled images only, unless a class says otherwise."""
        return True

    @abstractmethod
    def layers(self, student: TaskModel, teacher: TaskModel) -> tuple[list[str], list[str]]:
        """Name the layers of student and teacher that have to be tapped, in FeatureTap's grammar."""

    def called(self, student: TaskModel, teacher: TaskModel) -> tuple[list[str], list[str]]:
        """Name the modules of student and teacher whose arguments are to be in the context; none by default."""
        return [], []

    @abstractmethod
    def forward(
        self,
        student: TaskModel,
        teacher: TaskModel,
        student_taps: Mapping[str, Tensor],
        teacher_taps: Mapping[str, Tensor],
        batch: Batch,
        context: DistillationContext,
    ) -> dict[str, Tensor]:
        """Compare two networks.

        Args:
            student: The network that learns.
            teacher: The frozen one.
            student_taps: Outputs of the student's `layers`, by name.
            teacher_taps: Outputs of the teacher's `layers`, by name.
            batch: What both networks saw.
            context: The step, and what `called` names.

        Returns:
            Named, already weighted scalar terms, those of `TERMS`.
        """
