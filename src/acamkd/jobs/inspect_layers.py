"""List the layers of a teacher and a student that can be tapped, and propose pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from torch import nn

from acamkd import config, data, models
from acamkd.data.build import AUTO, reader_of
from acamkd.distillation.taps import entries_of
from acamkd.engine.printing import Printable
from acamkd.errors import AcamkdError
from acamkd.models.base import Task, TaskModel
from acamkd.models.build import family_of

Pair: TypeAlias = "str | list[str]"
"""As in a recipe: one name for both networks, or the student's and the teacher's."""

SIDE = 256
"""Pixels of the blank square image that the networks are run on."""
DEPTH = 2
"""Depth of the listed layers, which are stages rather than single convolutions."""
RATIOS: Mapping[Task, int] = {"detection": 4, "segmentation": 8}
"""`gradient_ratio` of the gains that docs/research/results.md reports. Guides and `init` recommend the same."""
CLASSES = 19
"""Number of classes if it is unknown, that of Cityscapes."""


@dataclass(frozen=True)
class Layer:
    """A layer output that can be tapped.

    Attributes:
        name: Name in the grammar of `pairs`.
        channels: Number of channels.
        stride: Image pixels per location of the feature map.
    """

    name: str
    channels: int
    stride: int


@dataclass(frozen=True)
class Inspection(Printable):
    """Layers of a teacher and a student that can be tapped, and proposed losses.

    Attributes:
        teacher: Layers of the teacher, in the order in which they run.
        student: Layers of the student, in the same order.
        networks: Class names of the teacher's and of the student's network.
        losses: `losses` of a recipe: ACAM-KD at corresponding layers.
    """

    teacher: tuple[Layer, ...]
    student: tuple[Layer, ...]
    networks: tuple[str, str]
    losses: list[dict[str, Any]]

    @property
    def yaml(self) -> str:
        """The losses, to paste into a recipe."""
        return config.write_yaml({"losses": self.losses}, flow=None)

    def __rich__(self) -> Group:
        return Group(
            _table(f"teacher: {self.networks[0]}", self.teacher),
            _table(f"student: {self.networks[1]}", self.student),
            Text(f"# for the recipe\n{self.yaml}"),
        )


def _table(title: str, found: Sequence[Layer]) -> Table:
    table = Table("layer", "channels", "stride", title=title, title_justify="left")
    for layer in found:
        table.add_row(escape(layer.name), str(layer.channels), str(layer.stride))
    return table


def inspect(
    recipe: config.Recipe | Path | str, student: str | None = None, *, overrides: Sequence[str] = ()
) -> Inspection:
    """List the layers of a teacher and a student that can be tapped, and propose a recipe's `losses`.

    Args:
        recipe: A recipe or its file; or, with `student`, the teacher's name: ARCH/BACKBONE, or torchvision/NAME.
        student: The student's name.
        overrides: `key=value` assignments that change the recipe.

    Raises:
        AcamkdError: A network cannot be built, or the two have no layers in common.
    """
    networks = of_recipe(config.as_recipe(recipe, overrides)) if student is None else of_names(str(recipe), student)
    teacher_layers, student_layers = (tuple(layers(network)) for network in networks)
    names = (type(networks[0].net).__name__, type(networks[1].net).__name__)
    return Inspection(teacher_layers, student_layers, names, as_losses(propose(*networks), networks[1]))


def of_recipe(recipe: config.Recipe) -> tuple[TaskModel, TaskModel]:
    """A recipe's teacher and student, without weights."""
    if recipe.teacher is None:
        raise AcamkdError(f"the recipe {recipe.name} has no `teacher` section")
    form = recipe.data.format
    with suppress(AcamkdError):  # the images need not exist yet
        form = data.resolve(recipe.data, recipe.task).format
    fixed = None if form == AUTO else reader_of(form, recipe.task).FIXED_CLASSES
    classes = len(recipe.data.classes or fixed or range(CLASSES))
    return _build(recipe.teacher, recipe.task, classes), _build(recipe.student, recipe.task, classes)


def of_names(teacher: str, student: str) -> tuple[TaskModel, TaskModel]:
    """Two networks by name, `ARCH/BACKBONE` such as retinanet/resnet50, or torchvision/NAME."""
    sections = [_parse(name) for name in (teacher, student)]
    tasks = [family_of(each.arch).task for each in sections]
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
    """Layers that can be tapped, in the order in which they run; of consecutive equal feature maps only the last."""
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
    """The last feature map with one channel per class, before any resizing to the image's size."""
    logits = [
        each for each in found if each.channels == model.num_classes and not each.name.startswith("aux_classifier")
    ]
    if not logits:
        raise AcamkdError(f"{type(model.net).__name__} has no map of {model.num_classes} channels, one for each class")
    return next((layer for layer in reversed(logits) if layer.stride > 1), logits[-1])


def _pair(ours: Layer, theirs: Layer) -> Pair:
    return ours.name if ours.name == theirs.name else [ours.name, theirs.name]


def as_losses(pairs: Sequence[Pair], model: TaskModel) -> list[dict[str, Any]]:
    """A recipe's `losses`: ACAM-KD at these pairs, with the settings that gained; the one recommendation there is."""
    masks = {"num_masks": model.num_classes} if model.task == "segmentation" else {}
    ratio = RATIOS[model.task]
    return [
        {"name": "acam", "pairs": list(pairs), **masks, "weight": "auto", "gradient_ratio": ratio,
         "diversity_weight": 0.5}
    ]  # fmt: skip
