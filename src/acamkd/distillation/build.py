"""From a recipe's `losses` to a Distiller."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from acamkd import config
from acamkd.distillation.distiller import Distiller, Pair
from acamkd.distillation.fast_teacher import Precision
from acamkd.distillation.methods import all_options, find, options
from acamkd.distillation.pairs import class_parts, resolve_pairs
from acamkd.distillation.schedule import WeightSchedule
from acamkd.distillation.taps import PROBE_SIZE, layer_of, probe
from acamkd.errors import AcamkdError
from acamkd.losses.base import FeatureLoss, HeadLoss
from acamkd.models.base import Batch, FeatureModel, TaskModel, head_of
from acamkd.models.weights import read_tensors

log = logging.getLogger(__name__)


class Level(NamedTuple):
    """One loss, the pair of layers that it compares, and the index of the entry that asks for it."""

    entry: int
    pair: Pair | None
    loss: FeatureLoss | HeadLoss


SPEAKING = ("acamkd.distillation.build", "acamkd.distillation.pairs", "acamkd.losses")
"""What tells of layers and untrained tokens, which is said once: of the losses that are trained."""


def build_distiller(
    student: TaskModel, teacher: FeatureModel, entries: Sequence[config.Loss], precision: Precision | None = None
) -> Distiller:
    """Build every loss that a recipe lists, with the channels that both networks turn out to have.

    Args:
        student: The network to train.
        teacher: The network to learn from.
        entries: The recipe's `losses`.
        precision: The recipe's `teacher.precision`.

    Raises:
        AcamkdError: A method, option or layer does not exist, or a pair does not match; the entry is named.
    """
    levels = build_levels(student, teacher, entries)
    schedules = [WeightSchedule(entry.ramp_epochs, entry.stop_epoch) for entry in entries]
    return Distiller(
        student,
        teacher,
        [level.pair for level in levels],
        [level.loss for level in levels],
        [schedules[level.entry] for level in levels],
        precision,
    )


def build_levels(student: TaskModel, teacher: FeatureModel, entries: Sequence[config.Loss]) -> list[Level]:
    """Build the losses of every entry, one for each pair of layers; args and raises as `build_distiller`."""
    batch = student.prepare([torch.rand(3, *PROBE_SIZE).to(student.mean.device)])
    levels: list[Level] = []
    for index, entry in enumerate(resolve_pairs(student, teacher, entries)):
        try:
            levels += [Level(index, pair, loss) for pair, loss in _build(entry, student, teacher, batch)]
        except ValueError as error:
            raise AcamkdError(f"losses.{index} ({entry.name}): {error}") from error
    return levels


def _build(
    entry: config.Loss, student: TaskModel, teacher: FeatureModel, batch: Batch
) -> list[tuple[Pair | None, FeatureLoss | HeadLoss]]:
    method = find(entry.name)
    if entry.is_auto:
        raise AcamkdError("`weight: auto` needs images: `acamkd.distillation.auto_weight.calibrate` makes it a number")
    checked = options(entry.name, entry.preset, entry.options)
    tokens = read_tensors(str(Path(checked["tokens"]).expanduser())) if checked.get("tokens") else None
    if issubclass(method, HeadLoss):
        if entry.pairs:
            log.warning("%s works on the heads and names its layers itself: `pairs` is not used", entry.name)
        if entry.level_decay != 1:
            raise AcamkdError("level_decay is for methods that compare pairs of layers: leave it out")
        loss = method(**checked)
        _require_same_classes("it compares heads", student, head_of(teacher))
        loss.layers(student, head_of(teacher))  # refuses networks that it cannot work on
        return [(None, loss)]
    if "boxes" in method.needs and student.task != "detection":
        raise AcamkdError(f"this method needs boxes, and {student.task} has none")
    if not entry.pairs:
        raise AcamkdError(
            "`pairs` is missing: set it to auto, or name the layers, such as [backbone:*] or [segmentation_head.0]"
        )
    built: list[tuple[Pair | None, FeatureLoss | HeadLoss]] = []
    locations: list[int] = []
    for given in entry.pairs:
        student_name, teacher_name = (given, given) if isinstance(given, str) else given
        student_maps = _maps_of("student", student, student_name, batch)
        teacher_maps = _maps_of("teacher", teacher, teacher_name, batch)
        if len(student_maps) != len(teacher_maps):
            raise AcamkdError(
                f"{student_name} stands for {len(student_maps)} outputs of the student, "
                f"{teacher_name} for {len(teacher_maps)} of the teacher: name them one by one"
            )
        for (s_name, s_map), (t_name, t_map) in zip(student_maps.items(), teacher_maps.items(), strict=True):
            log.info("%s: %s %s <- %s %s", entry.name, s_name, list(s_map.shape[1:]), t_name, list(t_map.shape[1:]))
            if tokens is not None:
                checked["tokens"] = _level_tokens(tokens, t_name)
            level = method(s_map.shape[1], t_map.shape[1], **checked)
            with_head = head_of(teacher) if level.needs_head or isinstance(teacher, TaskModel) else None
            if with_head and with_head.num_classes != student.num_classes:
                both = ((s_name, s_map, student), (t_name, t_map, with_head))
                if all(_holds_classes(name, x, model, batch) for name, x, model in both):
                    _require_same_classes(f"the channels of {s_name} and {t_name} are classes", student, with_head)
            if with_head and level.teacher_task:
                _require_same_classes("its masks learn from the teacher's own loss", student, with_head)
            built.append(((s_name, t_name), level))
            locations.append(s_map.shape[-2:].numel())
    if entry.level_decay != 1:
        _decay([level for _, level in built], locations, entry)
    return built


def _decay(levels: Sequence[FeatureLoss | HeadLoss], locations: Sequence[int], entry: config.Loss) -> None:
    """Multiply the weights of levels, of which each has so many locations, by the entry's `level_decay`."""
    values = all_options(entry.name, entry.preset, entry.options)
    if "weight" not in values:
        raise AcamkdError(f"level_decay multiplies the option `weight`, and {entry.name} has none: leave it out")
    for level, count in zip(levels, locations, strict=True):
        doublings = math.log2(max(locations) / count) / 2  # of the stride
        for name in level.scaled_options(values):
            setattr(level, name, entry.level_decay**doublings * getattr(level, name))


def _holds_classes(name: str, x: Tensor, model: TaskModel, batch: Batch) -> bool:
    """Whether a feature map is a network's logits, and has not as many channels by chance."""
    if model.task == "detection":
        return "cls_logits" in name
    return x.shape[1] == model.num_classes and layer_of(name).split(".")[0] in class_parts(model, batch)


def _require_same_classes(why: str, student: TaskModel, teacher: TaskModel) -> None:
    if student.num_classes != teacher.num_classes:
        raise AcamkdError(
            f"{why}, but the teacher has {teacher.num_classes} classes of its own and the student "
            f"{student.num_classes}: compare features instead, such as [backbone:*] or [encoder:4]"
        )


def _maps_of(who: str, model: FeatureModel, name: str, batch: Batch) -> dict[str, Tensor]:
    """What one name stands for in one of the networks, if it is feature maps."""
    try:
        maps = probe(model, [name], batch)
    except AcamkdError as error:
        raise AcamkdError(f"{who}: {error}") from error
    for tapped, tensor in maps.items():
        if tensor.ndim != 4:
            raise AcamkdError(f"{who}: {tapped} is {tuple(tensor.shape)}, not a feature map (N, C, H, W)")
    return maps


def _level_tokens(tokens: Mapping[str, Tensor], layer: str) -> dict[str, Tensor]:
    """The entries of one level, `LAYER/NAME` in the file that `acamkd tokens` wrote."""
    found = {name.removeprefix(f"{layer}/"): tensor for name, tensor in tokens.items() if name.startswith(f"{layer}/")}
    if not found:
        layers = sorted({name.rpartition("/")[0] for name in tokens})
        only = f"only for {', '.join(layers)}" if any(layers) else "nor for another: `acamkd tokens` did not write it"
        raise AcamkdError(f"the tokens file has none for the teacher's layer {layer}, {only}")
    return found
