"""Look into a teacher and a student: what can be tapped, and which layers of the two belong together."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

from acamkd import config, data, models
from acamkd.data.formats import voc
from acamkd.distillation.taps import entries_of
from acamkd.errors import AcamkdError
from acamkd.models.base import Task, TaskModel
from acamkd.models.detection import ARCHITECTURES

Pair: TypeAlias = "str | list[str]"
"""As in a recipe: one name for both networks, or the student's and the teacher's."""

SIDE = 256
"""Pixels of the blank square image that the networks are run on."""
DEPTH = 2
"""Layers down to this depth are listed, which are stages rather than single convolutions."""
CLASSES = 19
"""Of networks whose classes are not known, as Cityscapes has."""


@dataclass(frozen=True)
class Layer:
    """An output that can be tapped.

    Attributes:
        name: In the grammar of `pairs`.
        channels: C.
        stride: Pixels of the image per position of the map.
    """

    name: str
    channels: int
    stride: int


def of_recipe(recipe: config.Recipe) -> tuple[TaskModel, TaskModel]:
    """A recipe's teacher and student, without weights."""
    if recipe.teacher is None:
        raise AcamkdError(f"the recipe {recipe.name} has no `teacher` section")
    background = recipe.task == "segmentation"
    form = recipe.data.format
    with suppress(AcamkdError):  # the images need not be there yet
        form = data.resolve(recipe.data, recipe.task).format
    usual = len(voc.CLASSES) + background if form == "voc" else CLASSES
    classes = len(recipe.data.classes or range(usual))
    return _build(recipe.teacher, recipe.task, classes), _build(recipe.student, recipe.task, classes)


def of_names(teacher: str, student: str) -> tuple[TaskModel, TaskModel]:
    """Two networks by name, `ARCH/BACKBONE` such as retinanet/resnet50, or torchvision/NAME."""
    sections = [_parse(name) for name in (teacher, student)]
    tasks: list[Task] = ["detection" if each.arch in ARCHITECTURES else "segmentation" for each in sections]
    if tasks[0] != tasks[1]:
        raise AcamkdError(f"{teacher} is for {tasks[0]} and {student} for {tasks[1]}: both must do the same")
    built = [_build(section, task, CLASSES) for section, task in zip(sections, tasks, strict=True)]
    return built[0], built[1]


def _parse(name: str) -> config.Model:
    arch, _, backbone = name.partition("/")
    if arch == "torchvision":
        return config.Model(arch=name)
    return config.Model(arch=arch, **({"backbone": backbone} if backbone else {}))


def _build(section: config.Model, task: Task, classes: int) -> TaskModel:
    blank = section.model_copy(update={"weights": None, "backbone_weights": None})
    return models.build(blank, task, classes, (SIDE, SIDE)).eval()


@torch.no_grad()
def layers(model: TaskModel) -> list[Layer]:
    """What of a network can be tapped, in the order in which it runs; of equal maps in a row the last."""
    found: list[Layer] = []
    calls: dict[str, int] = {}

    def record(name: str, module: nn.Module, output: Any) -> None:
        call = calls[name] = calls.get(name, -1) + 1
        for key, x in entries_of(output).items():
            if x.ndim == 4 and x.shape[-1] > 1:
                tapped = name + (f":{key}" if key else "") + (f"@{call}" if call else "")
                layer = Layer(tapped, x.shape[1], SIDE // x.shape[-1])
                if found and (found[-1].channels, found[-1].stride) == (layer.channels, layer.stride):
                    found.pop()
                found.append(layer)

    handles = [
        module.register_forward_hook(lambda module, _inputs, output, name=name: record(name, module, output))
        for name, module in model.net.named_modules()
        if name and name.count(".") < DEPTH
    ]
    model(model.prepare([torch.zeros(3, SIDE, SIDE)]))
    for handle in handles:
        handle.remove()
    return found


def propose(teacher: TaskModel, student: TaskModel) -> list[Pair]:
    """The layers that the methods were published for: every level of a detector's pyramid, a segmenter's logits.

    Raises:
        AcamkdError: The networks have no such layers in common.
    """
    theirs, ours = layers(teacher), layers(student)
    if student.task == "segmentation":
        return [_pair(_logits(ours, student), _logits(theirs, teacher))]
    pyramids = [[each for each in found if each.name.partition(":")[0] == "backbone"] for found in (ours, theirs)]
    strides = [[level.stride for level in pyramid] for pyramid in pyramids]
    if strides[0] == strides[1] and len(strides[0]) > 1:
        return ["backbone:*"]
    pairs = [_pair(level, other) for level in pyramids[0] for other in pyramids[1] if level.stride == other.stride]
    if not pairs:
        raise AcamkdError(f"the pyramids have no stride in common: {strides[0]} in the student, {strides[1]}")
    return pairs


def _logits(found: Sequence[Layer], model: TaskModel) -> Layer:
    """The last map with one channel per class before it is brought to the image's size, where it is."""
    logits = [
        each for each in found if each.channels == model.num_classes and not each.name.startswith("aux_classifier")
    ]
    if not logits:
        raise AcamkdError(f"{type(model.net).__name__} has no map of {model.num_classes} channels, one for each class")
    return next((layer for layer in reversed(logits) if layer.stride > 1), logits[-1])


def _pair(ours: Layer, theirs: Layer) -> Pair:
    return ours.name if ours.name == theirs.name else [ours.name, theirs.name]


def as_losses(pairs: Sequence[Pair], model: TaskModel) -> list[dict[str, Any]]:
    """A recipe's `losses` with ACAM-KD at these pairs."""
    masks = {"num_masks": model.num_classes} if model.task == "segmentation" else {}
    return [{"name": "acam", "pairs": list(pairs), **masks, "weight": "auto"}]
