"""`weight: auto`: set a loss's weight by gradients, so that it has a given strength beside the task."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from statistics import median
from typing import Any, TypeAlias

import torch
from torch import Tensor

from acamkd.config import Loss
from acamkd.data.dataset import seed_of
from acamkd.distillation.build import build_distiller, suppress_logs
from acamkd.distillation.distiller import Distiller
from acamkd.distillation.methods import options, options_of
from acamkd.errors import AcamkdError
from acamkd.models.base import Batch, Target, TaskModel, to_device

log = logging.getLogger(__name__)

Images: TypeAlias = Iterable[tuple[Sequence[Tensor], Sequence[Target]]]
"""Batches as a loader gives them."""

BATCHES = 20
"""A weight is set by the median over this many batches."""


def calibrate(student: TaskModel, teacher: TaskModel, entries: Sequence[Loss], images: Images) -> tuple[Loss, ...]:
    """Put numbers in the place of `weight: auto`.

    Every weight of the method is multiplied by the one factor that makes the norm of the distillation's gradient
    `gradient_ratio` times the norm of the task's, over the student's parameters below the tapped layers: there the
    optimizer adds the two, and there levels of different size, and methods that compare heads, can be counted together.
    Each loss is measured alone, at full strength (without its ramp) and at the student's start. Neither network
    changes, and the run's random numbers are not used up.

    Args:
        student: The network to train, as it starts.
        teacher: The network to imitate.
        entries: The recipe's `losses`.
        images: Batches, read from the beginning for each loss; the first 20 are used.

    Raises:
        AcamkdError: A gradient is zero or not finite, or a loss cannot be built.
    """
    for entry in entries:
        if "weight" not in entry.options and entry.gradient_ratio != Loss.model_fields["gradient_ratio"].default:
            log.warning("%s: gradient_ratio acts only with `weight: auto`, which is not set", entry.name)
    plain = [uncalibrated(entry) for entry in entries]
    return tuple(
        _calibrate(student, teacher, plain, index, images) if entry.is_auto else entry
        for index, entry in enumerate(entries)
    )


def _calibrate(student: TaskModel, teacher: TaskModel, entries: Sequence[Loss], index: int, images: Images) -> Loss:
    entry, weights = entries[index], weights_of(entries[index])
    log.info("%s, weight: auto: measuring its gradient beside the task's", entry.name)
    alone = [other if other is entry else other.model_copy(update={"stop_epoch": 0}) for other in entries]
    with probe_distiller(student, teacher, alone) as distiller:
        norms = [total_norms(gradient_norms(distiller, batch)) for batch in prepared(student, islice(images, BATCHES))]
    where = f"at the student's parameters below {', '.join(map(str, entry.pairs)) or 'the heads'}"
    for which, values in zip(("distillation", "task"), zip(*norms, strict=True), strict=True):
        if bad := [value for value in values if not math.isfinite(value)]:
            raise AcamkdError(
                f"weight: auto of {entry.name}: the gradient of the {which} is {bad[0]} in {len(bad)} of {len(norms)} "
                f"batches {where}"
            )
    ratios = [distillation / task if task else math.inf for distillation, task in norms]
    ratio = median(ratios)
    if not 0 < ratio < math.inf:
        which = "distillation" if ratio == 0 else "task"
        raise AcamkdError(
            f"weight: auto of {entry.name}: the gradient of the {which} is 0 {where}; give the weight as a number"
        )
    scaled = {name: float(f"{value * entry.gradient_ratio / ratio:.3g}") for name, value in weights.items()}
    log.info(
        "%s: %s; %d batches: gradient %.3g times the task's (%.3g to %.3g) with %s, now %g",
        entry.name, _listed(scaled), len(ratios), ratio, min(ratios), max(ratios), _listed(weights),
        entry.gradient_ratio,
    )  # fmt: skip
    return entry.model_copy(update=scaled)


def dry_build(student: TaskModel, teacher: TaskModel, entries: Sequence[Loss]) -> Distiller:
    """The losses as far as they can be built without images, to find what is wrong with them before these are read.

    Raises:
        AcamkdError: As `build_distiller`, and where a loss has no weight that could be `auto`.
    """
    plain = [uncalibrated(entry) for entry in entries]
    for entry, given in zip(plain, entries, strict=True):
        if given.is_auto:
            weights_of(entry)
    with suppress_logs(), torch.random.fork_rng(devices=[]):
        return build_distiller(student, teacher, plain)


def uncalibrated(entry: Loss) -> Loss:
    """The entry without `weight: auto`, which leaves the weight of its preset or class."""
    if not entry.is_auto:
        return entry
    return Loss(**{name: value for name, value in entry.model_dump().items() if name != "weight"})


def reuse_weights(entries: Sequence[Loss], calibrated: Sequence[Loss]) -> tuple[Loss, ...]:
    """The entries with the weights that an earlier calibration of the same entries gave those with `weight: auto`."""
    if len(entries) != len(calibrated):
        return tuple(entries)
    return tuple(
        entry.model_copy(update=weights_of(found)) if entry.is_auto and entry.name == found.name else entry
        for entry, found in zip(entries, calibrated, strict=True)
    )


def weights_of(entry: Loss) -> dict[str, float]:
    """The options by which all terms that reach the student are scaled, with their values."""
    defaults = {name: field.default for name, field in options_of(entry.name).model_fields.items()}
    values = defaults | options(entry.name, entry.preset, entry.options)
    # ACAM's diversity reaches the student only where the masks' gradient does.
    names = ("weight", "diversity_weight") if values.get("mask_grad") == "joint" else ("weight",)
    if "weight" not in values:
        raise AcamkdError(f"{entry.name} has no option `weight` that `weight: auto` could set: leave it out")
    return {name: values[name] for name in names}


@contextmanager
def probe_distiller(student: TaskModel, teacher: TaskModel, entries: Sequence[Loss]) -> Iterator[Distiller]:
    """Within, a Distiller whose forwards leave no trace: not in the student, not in torch's state.

    Every layer stays in the mode that it is in, as in a training: single ones may be frozen. The losses are at full
    strength, whatever their schedules; one with `stop_epoch` 0 is left out. All of it is on the student's device.
    """
    buffers = {name: buffer.clone() for name, buffer in student.named_buffers()}
    device = student.mean.device
    with torch.random.fork_rng(devices=[]):
        unscheduled = [
            entry.model_copy(update={"ramp_epochs": 0, "stop_epoch": None if entry.stop_epoch else entry.stop_epoch})
            for entry in entries
        ]
        with suppress_logs():
            distiller = build_distiller(student, teacher, unscheduled)
        distiller.to(device)
        distiller.training = False  # of itself alone: its own audit is for the training
        try:
            yield distiller
        finally:
            for name, buffer in student.named_buffers():
                buffer.data.copy_(buffers[name])


def gradient_norms(distiller: Distiller, batch: Batch) -> dict[str, tuple[float, float]]:
    """Norms of the distillation's and of the task's gradient.

    Args:
        distiller: From `measuring`.
        batch: From its student's `prepare`.

    Returns:
        By name of each of the student's parameters below the tapped layers.
    """
    terms = distiller(batch)
    task = torch.stack([term for name, term in terms.items() if name.startswith("task/")]).sum()
    # What the teacher's own loss teaches the masks (`teacher/`) does not reach the student.
    distillation = torch.stack([term for name, term in terms.items() if not name.startswith(("task/", "teacher/"))])
    parameters = {name: p for name, p in distiller.student.net.named_parameters() if p.requires_grad}
    pulls = torch.autograd.grad(distillation.sum(), list(parameters.values()), retain_graph=True, allow_unused=True)
    reached = {name: pull for name, pull in zip(parameters, pulls, strict=True) if pull is not None}
    own = torch.autograd.grad(task, [parameters[name] for name in reached], allow_unused=True)
    return {
        name: (pull.norm().item(), 0.0 if gradient is None else gradient.norm().item())
        for (name, pull), gradient in zip(reached.items(), own, strict=True)
    }


def total_norms(norms: dict[str, tuple[float, float]]) -> tuple[float, float]:
    """Norms of the distillation's and of the task's gradient over several parameters together."""
    return math.hypot(*(pull for pull, _ in norms.values())), math.hypot(*(own for _, own in norms.values()))


def prepared(student: TaskModel, batches: Images) -> Iterator[Batch]:
    """Each batch in the student's frame, with torch's random state a function of its position."""
    for position, (images, targets) in enumerate(batches):
        torch.manual_seed(seed_of("calibrate", position))  # random masks, sampled boxes
        yield student.prepare(*to_device(images, targets, student.mean.device))


def _listed(weights: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in weights.items())
