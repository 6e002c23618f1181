"""Distiller: a student, a frozen teacher, and the losses between their layers."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from math import isfinite, lcm
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from acamkd.distillation.audit import Audit
from acamkd.distillation.calls import recorded_calls
from acamkd.distillation.compiled import CompiledLoss, CompiledNetwork
from acamkd.distillation.fast_teacher import FastTeacher, Precision
from acamkd.distillation.schedule import WeightSchedule
from acamkd.distillation.split_backward import explaining_checkpoints, split_backward
from acamkd.distillation.taps import FeatureTap, probe_batch
from acamkd.distillation.teacher_maps import SharedMaps
from acamkd.errors import AcamkdError
from acamkd.losses.base import DistillationContext, FeatureLoss, HeadLoss
from acamkd.models.base import Batch, FeatureModel, TaskModel, explaining_norms, head_of
from acamkd.stopwatch import timed

log = logging.getLogger(__name__)

Pair: TypeAlias = tuple[str, str]
"""(student layer, teacher layer), in FeatureTap's grammar."""


class NonFiniteError(AcamkdError):
    """A loss term is NaN or infinite.

    Attributes:
        terms: All of that forward's, so that a process among several can still run the backward that others wait for.
    """

    def __init__(self, message: str, terms: Mapping[str, Tensor]) -> None:
        super().__init__(message)
        self.terms = dict(terms)


class Distiller(nn.Module):
    """Task loss of a student plus its distillation losses against a frozen teacher.

    The losses are sub-modules, the student too. The teacher is none: it is absent from `parameters()`, `state_dict()`
    and DDP. It stays in eval mode whatever `train()` says, receives no gradient, and still follows `to()`. Its forward
    ends at the last layer that a loss needs, but for the first of a training.

    A loss whose `teacher_task` is true (ACAM with mask_grad="task") learns its masks from the teacher's own loss. The
    teacher then runs a second time, with the loss's `masked(student_map, teacher_map)` in the place of the tapped
    feature map.

    For the first 20 steps with distillation, the Distiller watches whether it reaches the student. It is an error if
    the total stays exactly zero, or if a student parameter below a tapped layer never receives a distillation gradient.
    The log warns of a single loss that stays zero, or that compares a layer with nothing to train below.

    Args:
        student: The network to train.
        teacher: The network to learn from, with or without a head; None (with no losses) trains the baseline.
        pairs: The layers that each loss compares; None for a HeadLoss, which names its own.
        losses: One per pair.
        schedules: A factor by step for each loss; 1 throughout where not given.
        precision: Takes the teacher's feature maps from a faster copy of it, a FastTeacher; None = from the teacher
            itself, in the precision of the training.
    """

    def __init__(
        self,
        student: TaskModel,
        teacher: FeatureModel | None = None,
        pairs: Sequence[Pair | None] = (),
        losses: Sequence[FeatureLoss | HeadLoss] = (),
        schedules: Sequence[Callable[[int], float]] | None = None,
        precision: Precision | None = None,
    ) -> None:
        super().__init__()
        if len(pairs) != len(losses):
            raise AcamkdError(f"there must be one loss per pair of layers, not {len(losses)} for {len(pairs)}")
        if losses and teacher is None:
            raise AcamkdError("distillation losses need a teacher")
        self.student = student
        self.losses = nn.ModuleList(losses)
        self.pairs = list(pairs)
        self.levels: list[tuple[Pair | None, FeatureLoss | HeadLoss]] = list(zip(pairs, losses, strict=True))
        """Each loss with its pair, in order."""
        self.schedules = list(schedules) if schedules is not None else [WeightSchedule()] * len(losses)
        self._teacher = () if teacher is None else (teacher.eval().requires_grad_(False),)  # a tuple hides the module
        for pair, loss in self.levels:
            loss.title = f"{'head' if pair is None else pair[0]}/{type(loss).__name__.lower()}"
        if twice := [title for title, count in Counter(loss.title for loss in losses).items() if count > 1]:
            raise AcamkdError(f"the same method stands twice at one layer: {', '.join(sorted(twice))}")
        self._fast: FastTeacher | None = None
        if precision is not None and (asking := self._asking):
            log.warning("%s needs arguments of the teacher's modules, so that teacher.precision is not used", asking)
        elif losses and precision is not None:
            self._fast = FastTeacher(self.teacher, self._tapped(1), precision, probe_batch(student))
        self._compiled: list[CompiledNetwork | CompiledLoss] = []
        self.shared_maps: SharedMaps | None = None
        """Where trainings share the teacher's feature maps."""
        self._audit = Audit()
        self._sees_labels = False
        self._active: list[int] = []

    @property
    def teacher(self) -> FeatureModel:
        """The frozen teacher."""
        if not self._teacher:
            raise AcamkdError("this Distiller has no teacher: it trains the baseline")
        return self._teacher[0]

    def teacher_form(self, device: torch.device) -> str:
        """What taps and hardware decide of the teacher's forward: its data type and the batch norms that it folds."""
        return f"{self._fast.dtype_on(device)} {self._fast.folded}" if self._fast else ""

    @property
    def multiple(self) -> int:
        """What the sides of an input must be multiples of; a teacher without a head resizes by itself."""
        return lcm(*(model.multiple for model in (self.student, *self._teacher) if isinstance(model, TaskModel)))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Distiller:
        for teacher in (*self._teacher, *([self._fast.model] if self._fast else [])):
            teacher._apply(fn, recurse)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call, no-any-return]

    def compile_parts(self, backend: str = "inductor") -> None:
        """Run networks and losses by torch.compile, in parts between the taps; the networks from the second step on.

        Task losses stay as they are: their work depends on the number of objects. So do evaluations, whose images may
        have any size, the state, and its names.

        Args:
            backend: Of torch.compile.
        """
        if asking := self._asking:
            log.warning("train.compile: nothing is compiled, since %s needs arguments of the networks' modules", asking)
            return
        self._compiled = [CompiledNetwork(self.student.net, self._tapped(0), "student", backend)]
        if self.losses and self.shared_maps is None:  # what is shared must not depend on what ran before
            teacher = self._fast.model if self._fast else self.teacher
            self._compiled.append(CompiledNetwork(teacher.net, self._tapped(1), "teacher", backend))
        self._compiled += [CompiledLoss(loss, backend) for _, loss in self.levels if isinstance(loss, FeatureLoss)]

    def forward(self, batch: Batch, step: int = 0, *, labeled: bool = True, check: bool = True) -> dict[str, Tensor]:
        """Run both networks on one batch.

        Args:
            batch: What the student's `prepare` made of images and targets.
            step: Optimization step, from 0.
            labeled: Whether the images have targets. Otherwise there is no task loss, only those losses take part
                that need no targets, and the student too ends at its last tapped layer.
            check: Whether to look at the terms, for which the program waits for a GPU.

        Returns:
            Scalar terms, `task/TERM`, `LAYER/METHOD/TERM` and, where masks learn from the teacher's own loss,
            `teacher/TERM`. Their sum is the training loss. Where masks look ahead, the task's terms must keep one
            factor: their sum has been differentiated down to the tapped feature maps.

        Raises:
            NonFiniteError: A term is not finite, and it is to `check`.
            AcamkdError: A tap did not fire, or the distillation does not reach the student.
        """
        factors = [schedule(step) for schedule in self.schedules]
        active = self._active = [
            index
            for index, (factor, (_, loss)) in enumerate(zip(factors, self.levels, strict=True))
            if factor > 0 and (labeled or not loss.needs_targets)
        ]
        if not (labeled or active):
            return {}
        names = _flat(self._layers(index)[0] for index in active)
        with ExitStack() as stack:
            stack.enter_context(explaining_checkpoints())
            for compiled in self._compiled if self.training else ():
                stack.enter_context(compiled.running())
            # Keyed by the identity of the tapped output, which may have two names.
            continuation_edges: dict[int, GradientEdge] = {}

            def clone_and_record(_: str, student_map: Tensor) -> Tensor:
                copy = student_map.clone()
                if copy.requires_grad:  # noted before anything works on it in place
                    continuation_edges[id(student_map)] = get_gradient_edge(copy)
                return copy

            student_tap = stack.enter_context(FeatureTap(self.student.net, names, edit=clone_and_record))
            called = [_flat(self._called(index)[side] for index in active) for side in range(2)]
            student_calls = stack.enter_context(recorded_calls(self.student.net, called[0]))
            teacher_calls = stack.enter_context(recorded_calls(self.teacher.net, called[1])) if called[1] else {}
            # Whole once: a layer that runs again behind the last one needed is to be named with its call.
            whole = self.training and not self._audit.has_begun
            teacher_maps = self.teacher_maps(batch, active, whole=whole, calls=bool(called[1])) if active else {}
            terms = self._run_student(batch, student_tap, labeled=labeled, whole=labeled or bool(called[0]))
            gradients, terms = self._task_gradients(active, student_tap, continuation_edges, terms)
            compared: dict[str, dict[str, Tensor]] = {}  # by loss, whatever the schedules
            context = DistillationContext(step, batch.input_size, None, None, labeled, student_calls, teacher_calls)
            for index in active:
                key, at_maps = self.levels[index][1].title, replace(context, task_gradient=gradients.get(index))
                compared[key] = self._compare(index, student_tap, teacher_maps, batch, at_maps)
                terms |= {f"{key}/{name}": factors[index] * term for name, term in compared[key].items()}
            terms |= self._teacher_task(active, student_tap, batch)
            self._sees_labels |= labeled
            audits = labeled or not self._sees_labels  # where no image has labels, those without are as good
            if compared and audits and self.training and torch.is_grad_enabled():
                self._audit(self.student.net, student_tap.features(), compared, step)
        if check:
            _check_finite(terms, step)
        return terms

    def check_unlabeled(self) -> None:
        """Say which losses see labeled images only; raises AcamkdError if all of them do."""
        blind = [loss.title for _, loss in self.levels if loss.needs_targets]
        if len(blind) == len(self.levels):
            raise AcamkdError(
                f"no loss can learn from unlabeled images, since each needs targets: {', '.join(blind)}; leave "
                "data.unlabeled out, or add a loss without boxes that does not run the teacher's task (cwd, pkd, "
                "kddetr, acam with another mask_grad than task, ...)"
            )
        if blind:
            log.info("these losses need targets and see the labeled images only: %s", ", ".join(blind))

    def statistics(self) -> dict[str, Tensor]:
        """What the losses want logged of the last forward, `LAYER/METHOD/NAME`."""
        return {
            f"{loss.title}/{name}": value
            for loss in (self.levels[index][1] for index in self._active)
            for name, value in loss.statistics.items()
        }

    def weights(self, step: int) -> dict[str, float]:
        """Factors of the losses' terms at a step, schedules included: `LAYER/METHOD/OPTION`."""
        return {
            f"{loss.title}/{name}": self.schedules[index](step) * value
            for index, (_, loss) in enumerate(self.levels)
            for name, value in loss.factors.items()
        }

    def _layers(self, index: int) -> tuple[list[str], list[str]]:
        """Layers of student and teacher that one loss needs."""
        pair, loss = self.levels[index]
        if isinstance(loss, HeadLoss):
            return loss.layers(self.student, head_of(self.teacher))
        assert pair is not None
        return [pair[0]], [pair[1]]

    def _tapped(self, network: int) -> list[str]:
        """All layers of the student (0) or teacher (1) that losses need."""
        return _flat(self._layers(index)[network] for index in range(len(self.losses)))

    @property
    def _asking(self) -> str | None:
        """A loss that needs arguments of modules."""
        return next((loss.title for index, (_, loss) in enumerate(self.levels) if any(self._called(index))), None)

    def _called(self, index: int) -> tuple[list[str], list[str]]:
        """Modules of student and teacher whose arguments one loss needs."""
        loss = self.levels[index][1]
        return loss.called(self.student, head_of(self.teacher)) if isinstance(loss, HeadLoss) else ([], [])

    def teacher_maps(
        self, batch: Batch, active: Sequence[int] | None = None, *, whole: bool = False, calls: bool = False
    ) -> dict[str, Tensor]:
        """What the losses, or those of some indices, need of the teacher, by tap.

        It runs no layer behind the last of these, unless it is to run as a `whole`, and none where all are in
        `shared_maps`. Where a loss needs `calls` of its modules, it runs itself rather than its faster copy.
        """
        indices = range(len(self.losses)) if active is None else active
        names = _flat(self._layers(index)[1] for index in indices)
        if calls or self.shared_maps is None:
            return self._run_teacher(batch, names, None if calls else self._fast, whole=whole or calls)
        return self.shared_maps(
            batch, names, lambda missing: self._run_teacher(batch, missing, self._fast, whole=whole)
        )

    def _run_teacher(
        self, batch: Batch, names: Sequence[str], fast: FastTeacher | None, *, whole: bool
    ) -> dict[str, Tensor]:
        teacher = self.teacher if fast is None else fast.model
        precise = nullcontext() if fast is None else fast.on(batch.pixels.device)
        # Not inference_mode: a loss cannot keep its tensors for a backward, such as that of a trainable projection.
        with timed("teacher"), torch.no_grad(), precise, FeatureTap(teacher.net, names) as tap:
            with nullcontext() if whole else tap.early_stop():
                # Without targets, for which some networks already draw random numbers in their forward: how far the
                # teacher runs must not change what the student draws afterwards.
                teacher(replace(batch, targets=None))
            maps = tap.features()
        return maps if fast is None else {name: x.float() for name, x in maps.items()}

    def _run_student(self, batch: Batch, tap: FeatureTap, *, labeled: bool, whole: bool) -> dict[str, Tensor]:
        """Run the student, as a `whole` or up to its last tapped layer; its task's terms where there are labels."""
        with timed("student"), nullcontext() if whole else tap.early_stop(), explaining_norms():
            outputs = self.student(batch)
        if not labeled:
            return {}
        return {f"task/{name}": term for name, term in self.student.loss(outputs, batch).items()}

    def _task_gradients(
        self,
        active: Sequence[int],
        student_tap: FeatureTap,
        continuation_edges: Mapping[int, GradientEdge],
        terms: dict[str, Tensor],
    ) -> tuple[dict[int, Tensor], dict[str, Tensor]]:
        """The task loss's gradient at the student's feature maps, by loss that needs it; the terms for the backward."""
        layers = {
            index: pair[0]
            for index, (pair, loss) in ((index, self.levels[index]) for index in active)
            if pair is not None and "task_gradient" in loss.needs
        }
        if not layers or not terms or not torch.is_grad_enabled():
            return {}, terms
        maps = {index: student_tap[layer] for index, layer in layers.items()}
        # The maps of a frozen stage have no gradient.
        differentiable_maps = {id(x): x for x in maps.values() if id(x) in continuation_edges}
        at_maps: list[Tensor] = []
        if differentiable_maps:
            with timed("backward"):
                at_maps, terms = split_backward(
                    terms,
                    list(differentiable_maps.values()),
                    [continuation_edges[key] for key in differentiable_maps],
                    check=not self._audit.has_ended,  # a loop gives the same factors later
                )
        gradients = dict(zip(differentiable_maps, at_maps, strict=True))
        return {index: gradients.get(id(x), torch.zeros_like(x)) for index, x in maps.items()}, terms

    def _teacher_task(self, active: Sequence[int], student_tap: FeatureTap, batch: Batch) -> dict[str, Tensor]:
        """The teacher's own loss on masked feature maps; the gradient runs through the teacher to the masks."""
        masking = [
            (pair, loss)
            for pair, loss in (self.levels[index] for index in active)
            if pair is not None and isinstance(loss, FeatureLoss) and loss.teacher_task
        ]
        if not masking:
            return {}

        def masked(name: str, teacher_map: Tensor) -> Tensor:
            for (student_layer, teacher_layer), loss in masking:
                if teacher_layer == name:
                    teacher_map = loss.masked(student_tap[student_layer], teacher_map)
            return teacher_map

        with FeatureTap(self.teacher.net, _flat((pair[1],) for pair, _ in masking), edit=masked):
            teacher = head_of(self.teacher)
            terms = teacher.loss(teacher(batch), batch)
        return {f"teacher/{name}": term for name, term in terms.items()}

    def _compare(
        self,
        index: int,
        student_tap: FeatureTap,
        teacher_maps: Mapping[str, Tensor],
        batch: Batch,
        context: DistillationContext,
    ) -> dict[str, Tensor]:
        pair, loss = self.levels[index]
        if "boxes" in loss.needs:
            context = replace(context, boxes=batch.boxes)
        try:
            if isinstance(loss, HeadLoss):
                taps = student_tap.features(), teacher_maps
                return loss(self.student, head_of(self.teacher), *taps, batch, context)  # type: ignore[no-any-return]
            assert pair is not None
            return loss(student_tap[pair[0]], teacher_maps[pair[1]], context)  # type: ignore[no-any-return]
        except ValueError as error:
            raise AcamkdError(f"{loss.title}: {error}") from error


def _flat(names: Iterable[Sequence[str]]) -> list[str]:
    return list(dict.fromkeys(name for group in names for name in group))


def _check_finite(terms: Mapping[str, Tensor], step: int) -> None:
    values = torch.stack([term.detach().float() for term in terms.values()]).tolist()
    if fault := describe_nonfinite(dict(zip(terms, values, strict=True)), step):
        raise NonFiniteError(fault, terms)


def describe_nonfinite(terms: Mapping[str, float], step: int) -> str:
    """Describe the terms of a loss that are NaN or infinite; empty where all are finite."""
    bad = [f"{name} is {x}" for name, x in terms.items() if not isfinite(x)]
    if not bad:
        return ""
    return (
        f"step {step}: the loss is not finite, {', '.join(bad)}: "
        "lower the learning rate or the loss's weight, or clip the gradient (train.clip)"
    )
