"""`weight: auto`: set a loss's weight by its gradient-norm ratio to the task."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from statistics import median
from typing import Any, TypeAlias

import torch
from torch import Tensor

from acamkd.config import Loss
from acamkd.data.dataset import seed_of
from acamkd.distillation.build import SPEAKING, build_levels
from acamkd.distillation.distiller import Distiller
from acamkd.distillation.methods import all_options, find
from acamkd.distillation.schedule import WeightSchedule
from acamkd.errors import AcamkdError
from acamkd.models.base import VOID, Batch, FeatureModel, Target, TaskModel, to_device
from acamkd.progress import muted, progress

log = logging.getLogger(__name__)

Images: TypeAlias = Iterable[tuple[Sequence[Tensor], Sequence[Target]]]
"""Batches as a loader gives them."""

BATCHES = 20
"""A weight is set by the median over this many batches ..."""
TRIED = 1000
"""... for which at most this many are read, where images have nothing to learn from."""


@dataclass(frozen=True)
class DryBuild:
    """A recipe's losses at full strength, built to be checked and measured, and not to be trained.

    Attributes:
        distiller: Has the weights of presets and classes in the place of `weight: auto`, and no schedules.
        owners: For each of its losses the index of the entry that asks for it.
    """

    distiller: Distiller
    owners: tuple[int, ...]


def dry_build(student: TaskModel, teacher: FeatureModel, entries: Sequence[Loss]) -> DryBuild:
    """Build the losses before any image is read, to find what is wrong with them.

    Nothing is logged, and torch's random state is what it was.

    Raises:
        AcamkdError: As `build_distiller`, and where a loss has no weight that could be `auto`.
    """
    plain = [uncalibrated(entry) for entry in entries]
    for entry, given in zip(plain, entries, strict=True):
        if given.is_auto:
            weights_of(entry)
    with muted(*SPEAKING), torch.random.fork_rng(devices=[]):
        levels = build_levels(student, teacher, plain)
    distiller = Distiller(student, teacher, [level.pair for level in levels], [level.loss for level in levels])
    return DryBuild(distiller, tuple(level.entry for level in levels))


def calibrate(built: DryBuild, entries: Sequence[Loss], images: Images) -> tuple[Loss, ...]:
    """Put numbers in the place of `weight: auto`.

    One factor multiplies every weight of the method. It makes the norm of the distillation's gradient `gradient_ratio`
    times the norm of the task's, over the student's parameters below the tapped layers. There the optimizer adds the
    two, and levels of different size, and methods that compare heads, can be counted together.

    Each loss is measured alone, at full strength (without its ramp) and at the student's start, on the images that the
    task learns from (`with_objects`). Neither network changes, and the run's random numbers are not used up.

    Args:
        built: `dry_build` of the same entries.
        entries: The recipe's `losses`.
        images: Batches, read from the beginning for each loss until 20 are full of images with objects.

    Raises:
        AcamkdError: A gradient is zero, in most parameters or in all, or not finite; all parameters below the layers
            are frozen; or no image has an object.
    """
    for entry in entries:
        if entry.weight is None and entry.gradient_ratio != Loss.model_fields["gradient_ratio"].default:
            log.warning("%s: gradient_ratio acts only with `weight: auto`, which is not set", entry.name)
    return tuple(
        _calibrate(built, index, entry, images) if entry.is_auto else entry for index, entry in enumerate(entries)
    )


def _calibrate(built: DryBuild, index: int, entry: Loss, images: Images) -> Loss:
    weights = weights_of(entry)
    log.info("%s, weight: auto: measuring its gradient beside the task's", entry.name)
    built.distiller.schedules = [WeightSchedule(stop_epoch=None if owner == index else 0) for owner in built.owners]
    with probing(built.distiller) as distiller:
        batches = prepared(distiller.student, islice(with_objects(images), BATCHES))
        measured = progress(batches, f"measuring {entry.name}", total=BATCHES, unit=" batches")
        by_parameter = [gradient_norms(distiller, batch) for batch in measured]
    layers = ", ".join(map(str, entry.pairs)) or "the heads"
    if not any(by_parameter):
        raise AcamkdError(
            f"weight: auto of {entry.name}: no trainable student parameter lies below {layers}: nothing can be "
            "distilled there; name layers behind the frozen ones"
        )
    norms = [total_norms(found) for found in by_parameter]
    where = f"at the student's parameters below {layers}"
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
    learning = [[distilled > 0 for distilled, task in found.values() if task > 0] for found in by_parameter]
    reached, most = max(map(sum, learning)), max(map(len, learning))
    if reached < most / 2:
        raise AcamkdError(
            f"weight: auto of {entry.name}: its gradient reaches {reached} of the {most} parameters that the task's "
            "does, since a layer behind them starts at zero and passes nothing on yet; give the weight as a number"
        )
    scaled = {name: float(f"{value * entry.gradient_ratio / ratio:.3g}") for name, value in weights.items()}
    log.info(
        "%s: %s; %d batches of images with objects: gradient-norm ratio to the task %.3g (%.3g to %.3g) with %s, "
        "now %g",
        entry.name, _listed(scaled), len(ratios), ratio, min(ratios), max(ratios), _listed(weights),
        entry.gradient_ratio,
    )  # fmt: skip
    return entry.model_copy(update=scaled)


def uncalibrated(entry: Loss) -> Loss:
    """The entry without `weight: auto`, which leaves the weight of its preset or class."""
    return entry.model_copy(update={"weight": None}) if entry.is_auto else entry


def reuse_weights(entries: Sequence[Loss], calibrated: Sequence[Loss]) -> tuple[Loss, ...]:
    """The entries with the weights that an earlier calibration of the same entries gave those with `weight: auto`."""
    if len(entries) != len(calibrated):
        return tuple(entries)
    return tuple(
        entry.model_copy(update=weights_of(found)) if entry.is_auto and entry.name == found.name else entry
        for entry, found in zip(entries, calibrated, strict=True)
    )


def weights_of(entry: Loss) -> dict[str, float]:
    """The options that `weight: auto` multiplies, with the values that they have without it."""
    entry = uncalibrated(entry)
    values = all_options(entry.name, entry.preset, entry.options)
    if "weight" not in values:
        raise AcamkdError(f"{entry.name} has no option `weight` that `weight: auto` could set: leave it out")
    return {name: values[name] for name in find(entry.name).scaled_options(values)}


@contextmanager
def probe_distiller(student: TaskModel, teacher: FeatureModel, entries: Sequence[Loss]) -> Iterator[Distiller]:
    """Within, a Distiller of a `dry_build`, as `probing` has it; raises as `dry_build`."""
    with probing(dry_build(student, teacher, entries).distiller) as distiller:
        yield distiller


@contextmanager
def probing(distiller: Distiller) -> Iterator[Distiller]:
    """Within, forwards leave no trace: not in the student, not in torch's random state.

    Every layer stays in the mode that it is in, as in a training: single ones may be frozen. Networks and losses are on
    the student's device.
    """
    student = distiller.student
    buffers = {name: buffer.clone() for name, buffer in student.named_buffers()}
    device = student.mean.device
    with torch.random.fork_rng(devices=[]):
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
        distiller: From `probing`.
        batch: From its student's `prepare`.

    Returns:
        By name of each of the student's trainable parameters below the tapped layers; empty where all are frozen.
    """
    terms = distiller(batch)
    task = torch.stack([term for name, term in terms.items() if name.startswith("task/")]).sum()
    # What the teacher's own loss teaches the masks (`teacher/`) does not reach the student.
    distillation = torch.stack([term for name, term in terms.items() if not name.startswith(("task/", "teacher/"))])
    parameters = {name: p for name, p in distiller.student.net.named_parameters() if p.requires_grad}
    if not distillation.requires_grad:
        return {}
    found = torch.autograd.grad(distillation.sum(), list(parameters.values()), retain_graph=True, allow_unused=True)
    reached = {name: gradient for name, gradient in zip(parameters, found, strict=True) if gradient is not None}
    if not reached:  # what the loss itself learns has a gradient
        return {}
    own = torch.autograd.grad(task, [parameters[name] for name in reached], allow_unused=True)
    return {
        name: (distilled.norm().item(), 0.0 if gradient is None else gradient.norm().item())
        for (name, distilled), gradient in zip(reached.items(), own, strict=True)
    }


def total_norms(norms: dict[str, tuple[float, float]]) -> tuple[float, float]:
    """Norms of the distillation's and of the task's gradient over several parameters together."""
    return math.hypot(*(distilled for distilled, _ in norms.values())), math.hypot(*(own for _, own in norms.values()))


def with_objects(batches: Images) -> Iterator[tuple[Sequence[Tensor], Sequence[Target]]]:
    """Batches of the images that a task learns from: with a box that is no crowd, or with a pixel that is not void.

    On others the task's gradient nearly vanishes while the distillation's does not, so that a ratio of the two would
    say how many of them there are. Batches that need no image left out pass as they are.

    Raises:
        AcamkdError: There is no such image in the first 1,000 batches.
    """
    kept: list[tuple[Tensor, Target]] = []
    size = read = given = 0
    for images, targets in islice(batches, TRIED):
        pairs = [pair for pair in zip(images, targets, strict=True) if _has_object(pair[1])]
        size, read = max(size, len(images)), read + len(images)
        if len(pairs) == len(images) and not kept:
            given += 1
            yield images, targets
            continue
        kept += pairs
        if len(kept) >= size:
            given += 1
            yield _apart(kept[:size])
            kept = kept[size:]
    if given:
        return
    if not kept:
        raise AcamkdError(
            f"none of the {read} training images that were read has an object (or a pixel that is not void), so that "
            "the task has no gradient to compare with: check the annotations, or give the weight as a number"
        )
    yield _apart((kept * size)[:size])  # several times, since a batch norm may need a whole batch


def _has_object(target: Target) -> bool:
    if "boxes" in target:
        crowds = int(target["iscrowd"].count_nonzero()) if "iscrowd" in target else 0
        return len(target["boxes"]) > crowds
    return "mask" not in target or bool((target["mask"] != VOID).any())


def _apart(pairs: Sequence[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    return [image for image, _ in pairs], [target for _, target in pairs]


def prepared(student: TaskModel, batches: Images) -> Iterator[Batch]:
    """Each batch as the student's padded input, with torch's random state a function of its index."""
    for index, (images, targets) in enumerate(batches):
        torch.manual_seed(seed_of("calibrate", index))  # random masks, sampled boxes
        yield student.prepare(*to_device(images, targets, student.mean.device))


def _listed(weights: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in weights.items())
