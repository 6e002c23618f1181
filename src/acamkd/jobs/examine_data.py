"""Examine the images of a recipe: count what they hold, and list all problems."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from acamkd import config, data
from acamkd.data import ImageDataset
from acamkd.data.checks import listed
from acamkd.data.dataset import SplitName
from acamkd.data.statistics import Statistics, count
from acamkd.engine.printing import Printable
from acamkd.errors import AcamkdError, ImageError
from acamkd.models.base import Task


@dataclass(frozen=True)
class DataReport(Printable):
    """What the splits of a recipe's data hold, by their names, and which task they are for."""

    splits: dict[str, Statistics]
    task: Task

    @property
    def failed(self) -> bool:
        """Whether any split has a problem."""
        return any(split.problems for split in self.splits.values())

    def __rich__(self) -> Group:
        lines = []
        for name, split in self.splits.items():
            lines += [Text.assemble(("warn", "yellow"), f"  {name}: {warning}") for warning in split.warnings]
            lines += [Text.assemble(("fail", "bold red"), f"  {name}: {problem}") for problem in listed(split.problems)]
        return Group(_table(self.splits, self.task), *lines)


def examine_data(recipe: config.Recipe) -> DataReport:
    """Count what the splits of a recipe's data hold, and list all their problems.

    Args:
        recipe: Recipe; its networks are not examined.

    Returns:
        Statistics by split; an unreadable split has only this problem.

    Raises:
        AcamkdError: The data format is unknown.
    """
    source = data.resolve(recipe.data, recipe.task)
    found: dict[str, Statistics] = {}
    datasets: dict[str, ImageDataset] = {}

    def open_test() -> ImageDataset:
        classes = datasets["train"].classes if "train" in datasets else source.classes
        return data.build(
            source.model_copy(update={"classes": classes or None}), recipe.task, "test", seed=0, augment=False
        )

    splits: tuple[SplitName, ...] = ("train", "val")
    opening: dict[str, Callable[[], ImageDataset]] = {
        split: partial(data.build, source, recipe.task, split, seed=0, augment=False) for split in splits
    }
    if source.test is not None:
        opening["test"] = open_test
    if source.unlabeled is not None:
        opening["unlabeled"] = partial(data.build_unlabeled, source, recipe.task, seed=0)
    for name, open_it in opening.items():
        try:
            datasets[name] = open_it()
            found[name] = count(datasets[name], decode=recipe.data.check == "full")
        except AcamkdError as error:
            found[name] = Statistics(problems=[str(error)])
    train, val, test, unlabeled = (datasets.get(name) for name in ("train", "val", "test", "unlabeled"))
    if train is not None and val is not None:
        _compare(found["val"], val, train, partial(data.compare_splits, train, val, source, unlabeled))
        if test is not None:
            _compare(found["test"], test, train, partial(data.compare_test, test, train, val, unlabeled))
    return DataReport(found, recipe.task)


def _compare(found: Statistics, scored: ImageDataset, train: ImageDataset, warnings: Callable[[], list[str]]) -> None:
    """Add what a split shows beside the training images."""
    if contradictions := scored.contradictions(train):
        found.problems += contradictions
    else:
        with suppress(ImageError):  # an unreadable image is reported already
            found.warnings += warnings()
    if scored.classes != train.classes:
        found.problems.append(
            f"the classes are {', '.join(scored.classes)}, but those of train {', '.join(train.classes)}"
        )


def _table(splits: Mapping[str, Statistics], task: Task) -> Table:
    found = splits.values()
    table = Table("", *splits)
    table.add_row("images", *(f"{each.images:,}" for each in found))
    table.add_row("image sizes", *(_most_frequent(each.sizes) for each in found))
    boxes = task == "detection"
    table.add_row("without boxes" if boxes else "all void", *(f"{each.without:,}" for each in found))
    for key in ("small", "medium", "large", "ignored") if boxes else ():
        table.add_row(f"{key} boxes", *(f"{each.boxes.get(key, 0):,}" for each in found))
    for key in ("shortest", "median", "longest") if boxes else ():
        table.add_row(f"{key} side", *(f"{each.sides[key]:g}" if each.sides else "" for each in found))
    for name in dict.fromkeys(name for each in found for name in each.classes):
        numbers = (each.classes.get(name) for each in found)
        table.add_row(escape(name), *("" if n is None else f"{n:,}" if boxes else f"{n:.2f} %" for n in numbers))
    return table


def _most_frequent(sizes: Mapping[str, int]) -> str:
    lines = [f"{size}: {number:,}" for size, number in list(sizes.items())[:3]]
    return "\n".join([*lines, *([f"{len(sizes) - 3} other sizes"] if len(sizes) > 3 else [])])
