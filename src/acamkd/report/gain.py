"""Breakdown of a gain by class, object size and image."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from acamkd.data import ImageDataset
from acamkd.engine.metrics import METRICS, Scorer
from acamkd.models.base import Prediction, TaskModel
from acamkd.report.panels import Panel, prediction_panel, truth_panel
from acamkd.report.visualize import embed

IMAGES = 200
"""At most this many images are compared one by one."""
EXAMPLES = 4
"""Number of the most improved, and of the most harmed, images that are drawn."""
SIZES = {"AP_s": "small objects", "AP_m": "medium objects", "AP_l": "large objects"}


@dataclass(frozen=True)
class Row:
    """Metric of one class or object size, before and after; None if the data set has no such object."""

    name: str
    before: float | None
    after: float | None

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
    """One drawn image."""

    change: Change
    source: str
    width: int
    height: int
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Gain:
    """Changes of the metric on single images.

    Attributes:
        changes: One per compared image with a defined metric on both sides, best first.
        improved: The most improved images, drawn.
        harmed: The most harmed images, drawn.
    """

    changes: list[Change]
    improved: list[Example]
    harmed: list[Example]

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


def rows(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[list[Row], list[Row]]:
    """Compare two sets of scores by class, most improved first, and by object size."""
    classes = [Row(name.partition("/")[2], before.get(name), value) for name, value in after.items() if "/" in name]
    sizes = [Row(words, before.get(name), after[name]) for name, words in SIZES.items() if name in after]
    return sorted(classes, key=lambda row: -row.gain), sizes


def compare(
    images: ImageDataset, indices: list[int], before: tuple[str, TaskModel], after: tuple[str, TaskModel]
) -> Gain:
    """Score two networks on single images, and draw those with the largest differences.

    Args:
        images: The validation set.
        indices: Indices of the images to compare.
        before: Name of a network, and the network in eval mode.
        after: Likewise.
    """
    scorer = Scorer(after[1].task, images.classes)
    changes = []
    for index in indices:
        image, target = images[index]
        figures = []
        for _, model in (before, after):
            scorer.update([_predict(model, image)], [target])
            figures.append(scorer.compute()[METRICS[model.task]])
        if not any(map(math.isnan, figures)):  # an image without objects
            changes.append(Change(index, images.files[index].name, *figures))
    changes.sort(key=lambda change: -change.gain)

    def example(change: Change) -> Example:
        image, target = images[change.index]
        panels = [truth_panel(target, images.classes)]
        panels += [
            prediction_panel(name, _predict(model, image), target, images.classes) for name, model in (before, after)
        ]
        return Example(change, embed(image.permute(1, 2, 0).numpy()), image.shape[-1], image.shape[-2], tuple(panels))

    return Gain(
        changes,
        [example(change) for change in changes[:EXAMPLES] if change.gain > 0],
        [example(change) for change in changes[: -EXAMPLES - 1 : -1] if change.gain < 0],
    )


def _predict(model: TaskModel, image: torch.Tensor) -> Prediction:
    [prediction] = model.predict([image.to(model.mean.device)])
    return {name: value.cpu() for name, value in prediction.items()}
