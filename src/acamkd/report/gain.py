"""Breakdown of a gain by class, object size and image."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from acamkd.config import Recipe
from acamkd.data import ImageDataset
from acamkd.engine.evidence import ImageInterval
from acamkd.engine.image_statistics import collect, image_interval
from acamkd.engine.mask_history import spread
from acamkd.models.base import TaskModel
from acamkd.report.panels import Panel, prediction_panel, truth_panel
from acamkd.report.visualize import embed

BARS = 200
"""At most this many images have a bar of their own."""
EXAMPLES = 4
"""Number of images that are drawn of each kind."""
SIZES = {"AP_s": "small objects", "AP_m": "medium objects", "AP_l": "large objects"}


@dataclass(frozen=True)
class Row:
    """Metric of one class or object size, before and after; None if the data set has no such object.

    Attributes:
        name: Name of the class or size.
        before: Percent.
        after: Percent.
        count: Number of its objects in the validation set; None where they are not counted.
    """

    name: str
    before: float | None
    after: float | None
    count: int | None = None

    @property
    def gain(self) -> float:
        """Gain in points; 0 if a value is missing."""
        return 0.0 if self.before is None or self.after is None else self.after - self.before


@dataclass(frozen=True)
class Change:
    """One image: its index in the validation set, and its own metric before and after."""

    index: int
    name: str
    before: float
    after: float

    @property
    def gain(self) -> float:
        """Points gained."""
        return self.after - self.before


@dataclass(frozen=True)
class Example:
    """One drawn image: ground truth, and each network's prediction with its score on this image alone."""

    index: int
    name: str
    source: str
    width: int
    height: int
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Gain:
    """Changes of the metric on single images.

    Attributes:
        changes: One per image with a defined metric on both sides, best first.
        improved: The most improved images, drawn.
        harmed: The most harmed images, drawn.
        interval: What the choice of the images leaves open; None with a single image.
    """

    changes: list[Change]
    improved: list[Example]
    harmed: list[Example]
    interval: ImageInterval | None

    @property
    def better(self) -> int:
        """Number of images that improved."""
        return sum(change.gain > 0 for change in self.changes)

    @property
    def worse(self) -> int:
        """Number of images that got worse."""
        return sum(change.gain < 0 for change in self.changes)

    @property
    def median(self) -> float:
        """Median change, in points."""
        return statistics.median(change.gain for change in self.changes)

    @property
    def bars(self) -> list[Change]:
        """Up to BARS evenly chosen changes, best first."""
        return [self.changes[index] for index in spread(len(self.changes), BARS)]


Named = tuple[str, TaskModel]
"""A network in eval mode, and its name on the page."""


def rows(
    before: Mapping[str, Any], after: Mapping[str, Any], objects: Mapping[str, int]
) -> tuple[list[Row], list[Row]]:
    """Compare two sets of scores by class, most improved first, and by object size; `objects` counts by metric."""
    classes = [
        Row(name.partition("/")[2], before.get(name), value, objects.get(name))
        for name, value in after.items() if "/" in name
    ]  # fmt: skip
    sizes = [Row(words, before.get(name), after[name], objects.get(name)) for name, words in SIZES.items()
             if name in after]  # fmt: skip
    return sorted(classes, key=lambda row: -row.gain), sizes


def compare(images: ImageDataset, recipe: Recipe, before: Named, after: Named) -> tuple[Gain, Mapping[str, int]]:
    """Score two networks on every image, and draw the images with the largest differences in each direction.

    Args:
        images: The validation set.
        recipe: Its batch size, workers and device are used.
        before: The one to compare with.
        after: The one that may have gained.

    Returns:
        The changes, and the number of objects by metric.
    """
    found = collect([before[1], after[1]], images, recipe)
    scores = np.stack([each.of_each() for each in found], axis=1)  # (N, 2)
    changes = [
        Change(index, images.files[index].name, *scores[index].tolist())
        for index in np.flatnonzero(~np.isnan(scores).any(axis=1)).tolist()  # without objects nothing is defined
    ]
    changes.sort(key=lambda change: -change.gain)

    def drawn(chosen: Sequence[Change]) -> list[Example]:
        return [_draw(images, change.index, [(*before, change.before), (*after, change.after)]) for change in chosen]

    gain = Gain(
        changes,
        drawn([change for change in changes[:EXAMPLES] if change.gain > 0]),
        drawn([change for change in changes[: -EXAMPLES - 1 : -1] if change.gain < 0]),
        image_interval(*found),
    )
    return gain, found[0].objects()


def sample(images: ImageDataset, recipe: Recipe, own: Named) -> tuple[list[Example], Mapping[str, int]]:
    """Score one network on every image, and draw the best, the worst and evenly ranked ones between them.

    Returns:
        The images, best first, and the number of objects by metric.
    """
    [found] = collect([own[1]], images, recipe)
    scores = found.of_each()
    ranked = [index for index in np.argsort(-scores, kind="stable").tolist() if scores[index] == scores[index]]
    places = np.linspace(0, len(ranked) - 1, min(EXAMPLES, len(ranked))).round().astype(int).tolist()
    examples = [_draw(images, ranked[place], [(*own, float(scores[ranked[place]]))]) for place in places]
    return examples, found.objects()


def _draw(images: ImageDataset, index: int, networks: Sequence[tuple[str, TaskModel, float]]) -> Example:
    image, target = images[index]
    panels = [truth_panel(target, images.classes)]
    for name, model, score in networks:
        [prediction] = model.predict([image.to(model.mean.device)])
        there = {key: values.cpu() for key, values in prediction.items()}
        panels.append(prediction_panel(name, there, target, images.classes, score))
    source = embed(image.permute(1, 2, 0).numpy())
    return Example(index, images.files[index].name, source, image.shape[-1], image.shape[-2], tuple(panels))
