"""List the layers of a teacher and a student that can be tapped, and propose pairs."""

from __future__ import annotations

import math
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
from torch import Tensor, nn

from acamkd import config, data, models
from acamkd.data.build import AUTO, reader_of
from acamkd.distillation.taps import entries_of, probe
from acamkd.engine.printing import Printable
from acamkd.errors import AcamkdError
from acamkd.jobs.init.layout import quiet
from acamkd.models.base import Batch, FeatureModel, PixelSize, Task, TaskModel
from acamkd.models.build import family_of

Pair: TypeAlias = "str | list[str]"
"""As in a recipe: one name for both networks, or the student's and the teacher's."""

SIDE = 256
"""Pixels of the blank square image that the networks are run on."""
DEPTH = 2
"""Depth of the listed layers, which are stages rather than single convolutions."""
RATIOS: Mapping[Task, int] = {"detection": 4, "segmentation": 8}
"""`gradient_ratio` of the gains that docs/research/results.md reports. Guides and `init` recommend the same."""
RATIO_ALL_LABELED = 0.5
"""Likewise where no image is unlabeled: stronger distillation harmed a short training (docs/research/log.md)."""
AUXILIARY = ("aux_classifier", "auxiliary_head")
"""How the names of heads begin that predict nothing."""
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
        losses: `losses` of a recipe: ACAM-KD at corresponding layers; cosine from a teacher without a head.
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
        recipe: A recipe or its file; or, with `student`, the teacher's name: ARCH/BACKBONE, torchvision/NAME,
            hf/NAME or, without a head, timm/NAME.
        student: The student's name.
        overrides: `key=value` assignments that change the recipe.

    Raises:
        AcamkdError: A network cannot be built, or the two have no layers in common.
    """
    all_labeled = False
    if student is None:
        recipe = config.as_recipe(recipe, overrides)
        networks, all_labeled = of_recipe(recipe), recipe.data.unlabeled is None
    else:
        networks = of_names(str(recipe), student)
    teacher, learner = networks
    batch = blank_batch(learner)
    names = (_name(teacher), _name(learner))
    losses = as_losses(propose(*networks), learner, all_labeled, headless=not isinstance(teacher, TaskModel))
    return Inspection(tuple(layers(teacher, batch)), tuple(layers(learner, batch)), names, losses)


def _name(model: FeatureModel) -> str:
    return type(model.net if isinstance(model, TaskModel) else model.backbone).__name__


def of_recipe(recipe: config.Recipe) -> tuple[FeatureModel, TaskModel]:
    """A recipe's teacher and student, without weights."""
    if recipe.teacher is None:
        raise AcamkdError(f"the recipe {recipe.name} has no `teacher` section")
    form = recipe.data.format
    with suppress(AcamkdError):  # the images need not exist yet
        form = data.resolve(recipe.data, recipe.task).format
    fixed = None if form == AUTO else reader_of(form, recipe.task).FIXED_CLASSES
    classes = len(recipe.data.classes or fixed or range(CLASSES))
    size = recipe.data.resize if isinstance(recipe.data.resize, tuple) else (SIDE, SIDE)
    teacher = _build_teacher(recipe.teacher, recipe.task, classes, size)
    return teacher, _build(recipe.student, recipe.task, classes, size)


def of_names(teacher: str, student: str) -> tuple[FeatureModel, TaskModel]:
    """Two networks by name, `ARCH/BACKBONE` such as retinanet/resnet50, torchvision/NAME or timm/NAME."""
    theirs, ours = (_parse(name) for name in (teacher, student))
    task = family_of(ours.arch).task
    its_task = task if theirs.is_headless else family_of(theirs.arch).task
    if its_task != task:
        raise AcamkdError(f"{teacher} is for {its_task} and {student} for {task}: both must do the same")
    return _build_teacher(theirs, task, CLASSES), _build(ours, task, CLASSES)


def _parse(name: str) -> config.Model:
    arch, _, backbone = name.partition("/")
    if arch in ("torchvision", "hf", "timm"):
        return config.Model(arch=name)
    return config.Model(arch=arch, **({"backbone": backbone} if backbone else {}))


def _build(section: config.Model, task: Task, classes: int, size: PixelSize = (SIDE, SIDE)) -> TaskModel:
    return models.build(_blank(section), task, classes, size).eval()


def _build_teacher(section: config.Model, task: Task, classes: int, size: PixelSize = (SIDE, SIDE)) -> FeatureModel:
    with quiet("acamkd.models"):  # which would miss its weights
        return models.build_teacher(_blank(section), task, classes, size).eval()


def _blank(section: config.Model) -> config.Model:
    return section.model_copy(update={"weights": None, "backbone_weights": None})


def blank_batch(student: TaskModel) -> Batch:
    """A black square image, as the student prepares it for both networks."""
    return student.prepare([torch.zeros(3, SIDE, SIDE)])


@torch.no_grad()
def layers(model: FeatureModel, batch: Batch) -> list[Layer]:
    """What of a network can be tapped, in the order in which it runs; of equal maps in a row the last.

    Then the layers that the network itself calls comparable, where they lie deeper.
    """
    found: list[Layer] = []
    calls: dict[str, int] = {}

    def record(name: str, module: nn.Module, output: Any) -> None:
        call = calls[name] = calls.get(name, -1) + 1
        for key, x in entries_of(output).items():
            if x.ndim == 4 and x.shape[-2] == x.shape[-1] > 1:  # as the image; queries are none
                layer = _layer(name + (f":{key}" if key else "") + (f"@{call}" if call else ""), x, batch)
                if found and (found[-1].channels, found[-1].stride) == (layer.channels, layer.stride):
                    found.pop()
                found.append(layer)

    handles = [
        module.register_forward_hook(lambda module, _inputs, output, name=name: record(name, module, output))
        for name, module in model.net.named_modules()
        if name and name.count(".") < DEPTH
    ]
    model(batch)
    for handle in handles:
        handle.remove()
    return [*found, *(layer for layer in _comparable(model, batch) if layer not in found)]


def _comparable(model: FeatureModel, batch: Batch) -> list[Layer]:
    """The layers that a network itself calls comparable."""
    return [_layer(name, x, batch) for name, x in probe(model, model.comparable_layers(), batch).items()]


def _layer(name: str, x: Tensor, batch: Batch) -> Layer:
    return Layer(name, x.shape[1], batch.input_size[1] // x.shape[-1])


def propose(teacher: FeatureModel, student: TaskModel) -> list[Pair]:
    """The layers that the methods were published for: every level of a detector's pyramid, a segmenter's logits.

    Segmenters without logits (a class and a mask per query) are paired by levels, as detectors are. Where a network
    names no layers for this, the last of each stride stands in. A teacher without a head that has no stride in common,
    such as a ViT with patches of 14 pixels, meets the student's level of the nearest stride.

    Raises:
        AcamkdError: The networks have no such layers in common.
    """
    batch = blank_batch(student)
    if student.task == "segmentation" and isinstance(teacher, TaskModel):
        ours, theirs = (_logits(layers(model, batch), model) for model in (student, teacher))
        if ours and theirs:
            return [_pair(ours, theirs)]
    rest = layers if isinstance(teacher, TaskModel) else _features
    levels = [
        {layer.stride: layer for layer in _comparable(model, batch) or rest(model, batch)}
        for model in (student, teacher)
    ]
    shared = [stride for stride in levels[0] if stride in levels[1]]
    if not shared and not isinstance(teacher, TaskModel):
        near = {min(levels[0], key=lambda own: abs(math.log(own / each))): each for each in levels[1]}
        return [_pair(levels[0][own], levels[1][each]) for own, each in near.items()]
    if not shared:
        strides = [sorted(each) for each in levels]
        raise AcamkdError(f"the feature maps have no stride in common: {strides[0]} in the student, {strides[1]}")
    names = student.comparable_layers()
    if names == teacher.comparable_layers() and len(shared) == len(levels[0]) == len(levels[1]) > 1:
        return list(names)
    return [_pair(levels[0][stride], levels[1][stride]) for stride in shared]


def _features(model: FeatureModel, batch: Batch) -> list[Layer]:
    """All layers but the logits."""
    found = layers(model, batch)
    logits = _logits(found, model) if isinstance(model, TaskModel) else None
    return [layer for layer in found if logits is None or layer.channels != logits.channels]


def _logits(found: Sequence[Layer], model: TaskModel) -> Layer | None:
    """The last map with one channel per class before it is brought to the image's size, where it is."""
    logits = [each for each in found if each.channels == model.num_classes and not each.name.startswith(AUXILIARY)]
    return next((layer for layer in reversed(logits) if layer.stride > 1), logits[-1] if logits else None)


def _pair(ours: Layer, theirs: Layer) -> Pair:
    return ours.name if ours.name == theirs.name else [ours.name, theirs.name]


def as_losses(
    pairs: Sequence[Pair], model: TaskModel, all_labeled: bool, *, headless: bool = False
) -> list[dict[str, Any]]:
    """A recipe's `losses`: ACAM-KD at these pairs, with the settings that gained; the one recommendation there is.

    From a teacher without a head, for which nothing was measured, the cosine that is published for such teachers.
    """
    if headless:
        return [{"name": "cosine", "pairs": list(pairs), "weight": "auto"}]
    masks = {"num_masks": model.num_classes} if model.task == "segmentation" else {}
    ratio = RATIO_ALL_LABELED if all_labeled else RATIOS[model.task]
    return [
        {"name": "acam", "pairs": list(pairs), **masks, "weight": "auto", "gradient_ratio": ratio,
         "diversity_weight": 0.5}
    ]  # fmt: skip
