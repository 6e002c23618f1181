"""List the layers of a teacher and a student that can be tapped, and propose pairs."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from acamkd import config, data, models
from acamkd.data.build import AUTO, reader_of
from acamkd.distillation.pairs import SIDE, GivenPair, Layer, NoPairsError, blank_batch, layers, propose
from acamkd.engine.printing import Printable
from acamkd.errors import AcamkdError
from acamkd.models.base import FeatureModel, PixelSize, Task, TaskModel
from acamkd.models.build import family_of
from acamkd.progress import muted

log = logging.getLogger(__name__)

RATIOS: Mapping[Task, int] = {"detection": 4, "segmentation": 8}
"""`gradient_ratio` of the gains that docs/research/results.md reports. Guides and `init` recommend the same."""
RATIO_ALL_LABELED = 0.5
"""Likewise where no image is unlabeled: stronger distillation harmed a short training (docs/research/log.md)."""
PYRAMID = "backbone:*"
"""All levels of a detector whose pyramid is torchvision's."""
LEVEL_DECAY = 0.5
"""`level_decay` there: without it the levels of one or two locations pull hardest (docs/research/results.md)."""
CLASSES = 19
"""Number of classes if it is unknown, that of Cityscapes."""


@dataclass(frozen=True)
class Inspection(Printable):
    """Layers of a teacher and a student that can be tapped, and proposed losses.

    Attributes:
        teacher: Layers of the teacher, in the order in which they run.
        student: Layers of the student, in the same order.
        networks: Class names of the teacher's and of the student's network.
        losses: `losses` of a recipe: ACAM-KD at corresponding layers; cosine from a teacher without a head. Empty
            where the two have no layers in common.
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

    Returns:
        The layers of both networks, and the proposed `losses`.

    Raises:
        AcamkdError: A network cannot be built.
    """
    all_labeled = False
    if student is None:
        recipe = config.as_recipe(recipe, overrides)
        networks, all_labeled = of_recipe(recipe), recipe.data.unlabeled is None
    else:
        networks = of_names(str(recipe), student)
    teacher, learner = networks
    batch = blank_batch(learner)
    names = (teacher.net_name, learner.net_name)
    try:
        losses = as_losses(propose(*networks), learner, all_labeled, headless=not isinstance(teacher, TaskModel))
    except NoPairsError as error:
        log.warning("no pairs are proposed: %s", error)
        losses = []
    return Inspection(tuple(layers(teacher, batch)), tuple(layers(learner, batch)), names, losses)


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
    theirs, ours = (model_of_name(name) for name in (teacher, student))
    task = family_of(ours.arch).task
    its_task = task if theirs.is_headless else family_of(theirs.arch).task
    if its_task != task:
        raise AcamkdError(f"{teacher} is for {its_task} and {student} for {task}: both must do the same")
    return _build_teacher(theirs, task, CLASSES), _build(ours, task, CLASSES)


def model_of_name(name: str) -> config.Model:
    """The section of a network's name: `ARCH/BACKBONE` such as retinanet/resnet50, torchvision/NAME or timm/NAME."""
    arch, _, backbone = name.partition("/")
    if arch in ("torchvision", "hf", "timm"):
        return config.Model(arch=name)
    return config.Model(arch=arch, **({"backbone": backbone} if backbone else {}))


def _build(section: config.Model, task: Task, classes: int, size: PixelSize = (SIDE, SIDE)) -> TaskModel:
    with muted("acamkd.models"):  # the size is not the recipe's
        return models.build(_blank(section), task, classes, size).eval()


def _build_teacher(section: config.Model, task: Task, classes: int, size: PixelSize = (SIDE, SIDE)) -> FeatureModel:
    with muted("acamkd.models"):  # which would miss its weights
        return models.build_teacher(_blank(section), task, classes, size).eval()


def _blank(section: config.Model) -> config.Model:
    return section.model_copy(update={"weights": None, "backbone_weights": None})


def as_losses(
    pairs: Sequence[GivenPair], model: TaskModel, all_labeled: bool, *, headless: bool = False
) -> list[dict[str, Any]]:
    """A recipe's `losses`: ACAM-KD at these pairs, with the settings that gained; the one recommendation there is.

    From a teacher without a head, for which nothing was measured, the cosine that is published for such teachers.
    """
    named = [pair if isinstance(pair, str) else list(pair) for pair in pairs]
    if headless:
        return [{"name": "cosine", "pairs": named, "weight": "auto"}]
    masks = {"num_masks": model.num_classes} if model.task == "segmentation" else {}
    levels = {"level_decay": LEVEL_DECAY} if PYRAMID in named else {}
    ratio = RATIO_ALL_LABELED if all_labeled else RATIOS[model.task]
    return [
        {"name": "acam", "pairs": named, **masks, "weight": "auto", "gradient_ratio": ratio, **levels,
         "diversity_weight": 0.5}
    ]  # fmt: skip
