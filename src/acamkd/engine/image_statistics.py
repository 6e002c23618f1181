"""mAP and mIoU of any choice of the images: of single images, and of the samples of a bootstrap."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from acamkd import data
from acamkd.config import Recipe
from acamkd.data import ImageDataset
from acamkd.engine.devices import device_of, moved_to
from acamkd.engine.evidence import ImageInterval
from acamkd.engine.metrics import MAX_DETECTIONS, scorer_of
from acamkd.models.base import VOID, Prediction, Target, Task, TaskModel, to_device
from acamkd.progress import progress

Floats: TypeAlias = npt.NDArray[np.floating[Any]]

RESAMPLES = 1000

# Rounded as in torchmetrics: a recall of exactly 0.35 then counts here as in the scores.
OVERLAPS = np.array(torch.linspace(0.5, 0.95, 10).tolist())
"""IoU thresholds of COCO's mAP."""
RECALLS = np.array(torch.linspace(0, 1, 101).tolist())
"""Recalls at which COCO reads the precision."""
SIZES = {"AP_s": (0.0, 32.0**2), "AP_m": (32.0**2, 96.0**2), "AP_l": (96.0**2, np.inf)}
"""Metric -> areas of its objects in pixels, both ends included, as in COCO."""


class ImageStatistics(ABC):
    """What each image adds to a network's metric. The metric of any choice of the images follows, as often as needed.

    Args:
        classes: Class names in the order of their ids.
    """

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = tuple(classes)

    @abstractmethod
    def __len__(self) -> int:
        """Number of images."""

    @abstractmethod
    def update(self, predictions: Sequence[Prediction], targets: Sequence[Target]) -> None:
        """Add some images, both sides in each image's own pixels."""

    @abstractmethod
    def metric(self, times: Floats) -> Floats:
        """The metric of R choices of the N images.

        Args:
            times: (R, N), how often each image is in each choice.

        Returns:
            (R,), percent; NaN where it is undefined.
        """

    @abstractmethod
    def of_each(self) -> Floats:
        """The metric of every image alone: (N,), percent; NaN where it is undefined."""

    def objects(self) -> Mapping[str, int]:
        """Number of objects by the metric that they enter, such as `AP_s` and `AP/CLASS`; nothing for masks."""
        return {}


class MaskStatistics(ImageStatistics):
    """mIoU from each image's pixels of each class: those found, those predicted and those in the mask."""

    def __init__(self, classes: Sequence[str]) -> None:
        super().__init__(classes)
        self._pixels: list[npt.NDArray[np.int64]] = []  # (3, K) each

    def __len__(self) -> int:
        return len(self._pixels)

    def update(self, predictions: Sequence[Prediction], targets: Sequence[Target]) -> None:
        """Count the pixels of some images."""
        for prediction, target in zip(predictions, targets, strict=True):
            found, true = prediction["mask"].cpu(), target["mask"].cpu()
            found, true = found[true != VOID], true[true != VOID]
            sides = (true[found == true], found, true)
            counts = [side.flatten().bincount(minlength=len(self.classes)).numpy() for side in sides]
            self._pixels.append(np.stack(counts))

    def metric(self, times: Floats) -> Floats:
        """mIoU, percent."""
        pixels = np.stack(self._pixels).astype(float)
        return _miou((times @ pixels.reshape(len(self), -1)).reshape(-1, *pixels.shape[1:]))

    def of_each(self) -> Floats:
        """MIoU of each image."""
        return _miou(np.stack(self._pixels).astype(float))


def _miou(pixels: Floats) -> Floats:
    """mIoU, (R,), from the pixels found, predicted and in the mask, (R, 3, K)."""
    both, found, true = pixels.swapaxes(0, 1)
    union = found + true - both
    return 100 * _mean_of_defined(np.where(union > 0, both / np.maximum(union, 1), np.nan))


class BoxStatistics(ImageStatistics):
    """COCO's mAP from each image's detections, of which each is right, wrong or ignored at every overlap.

    Args:
        classes: Class names in the order of their ids.
        max_detections: This many detections of each class count in an image, the best ones.
    """

    def __init__(self, classes: Sequence[str], max_detections: int = MAX_DETECTIONS) -> None:
        super().__init__(classes)
        self.max_detections = max_detections
        self._objects: list[npt.NDArray[np.int64]] = []  # (K,) each, without crowds
        self._areas: list[Floats] = []
        # By image and class: index of the image, label, scores (D,), right (D, 10), ignored (D, 10).
        self._found: list[tuple[int, int, Floats, npt.NDArray[np.bool_], npt.NDArray[np.bool_]]] = []

    def __len__(self) -> int:
        return len(self._objects)

    def update(self, predictions: Sequence[Prediction], targets: Sequence[Target]) -> None:
        """Count the detections of some images."""
        for prediction, target in zip(predictions, targets, strict=True):
            found = {name: values.cpu().numpy() for name, values in prediction.items()}
            true = {name: values.cpu().numpy() for name, values in target.items()}
            boxes, labels, crowd = true["boxes"].astype(float), true["labels"], true["iscrowd"] != 0
            for label in np.unique(found["labels"]):
                best = np.flatnonzero(found["labels"] == label)
                best = best[np.argsort(-found["scores"][best], kind="stable")][: self.max_detections]
                same = labels == label
                right, ignored = _matches(found["boxes"][best].astype(float), boxes[same], crowd[same])
                self._found.append((len(self), int(label), found["scores"][best], right, ignored))
            self._objects.append(np.bincount(labels[~crowd] - 1, minlength=len(self.classes)))
            areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
            known = true.get("area", np.zeros(len(boxes)))
            self._areas.append(np.where(known > 0, known, areas)[~crowd])

    def metric(self, times: Floats) -> Floats:
        """mAP, percent."""
        objects = times @ np.stack(self._objects)
        found = np.full(objects.shape, np.nan)
        for label in range(1, len(self.classes) + 1):
            own = [each for each in self._found if each[1] == label]
            images = np.repeat([each[0] for each in own], [len(each[2]) for each in own]).astype(int)
            scores = np.concatenate([np.empty(0), *(each[2] for each in own)])
            right, ignored = (np.concatenate([np.empty((0, len(OVERLAPS)), bool), *(each[k] for each in own)])
                              for k in (3, 4))  # fmt: skip
            order = np.argsort(-scores, kind="stable")
            found[:, label - 1] = _average_precision(
                times[:, images[order]], right[order], ignored[order], objects[:, label - 1]
            )
        return 100 * _mean_of_defined(found)

    def of_each(self) -> Floats:
        """MAP of each image."""
        objects = np.stack(self._objects)
        found = np.where(objects > 0, 0.0, np.nan)
        for image, label, scores, right, ignored in self._found:
            alone = np.ones((1, len(scores)))
            of_class = objects[image, label - 1 : label].astype(float)
            found[image, label - 1] = _average_precision(alone, right, ignored, of_class)[0]
        return 100 * _mean_of_defined(found)

    def objects(self) -> Mapping[str, int]:
        """Number of objects by size and by class, without crowds."""
        areas, labels = np.concatenate(self._areas), np.stack(self._objects).sum(axis=0)
        sizes = {name: int(((areas >= low) & (areas <= high)).sum()) for name, (low, high) in SIZES.items()}
        return sizes | {f"AP/{name}": int(count) for name, count in zip(self.classes, labels, strict=True)}


def _matches(
    boxes: Floats, objects: Floats, crowd: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Assign detections of a class, best first, to the image's objects of this class, as COCO does.

    Returns:
        Right and ignored, (D, 10) each. Ignored are those that lie in a crowd and find no single object.
    """
    corner = np.maximum(boxes[:, None, :2], objects[:, :2])
    common = (np.minimum(boxes[:, None, 2:], objects[:, 2:]) - corner).clip(0).prod(axis=-1)
    own, others = ((each[:, 2:] - each[:, :2]).prod(axis=1) for each in (boxes, objects))
    union = np.where(crowd, own[:, None], own[:, None] + others - common)
    overlaps = common / np.maximum(union, 1e-12)
    right = np.zeros((len(boxes), len(OVERLAPS)), bool)
    ignored = right.copy()
    free = np.tile(~crowd, (len(OVERLAPS), 1))  # (10, G)
    for index, row in enumerate(overlaps):
        if not len(row) or row.max() < OVERLAPS[0]:
            continue
        fitting = np.where(free & (row >= OVERLAPS[:, None]), row, -1.0)
        best = fitting.argmax(axis=1)
        right[index] = fitting.max(axis=1) > 0
        free[right[index], best[right[index]]] = False
        ignored[index] = ~right[index] & (np.where(crowd, row, -1.0).max() >= OVERLAPS)
    return right, ignored


def _average_precision(
    times: Floats, right: npt.NDArray[np.bool_], ignored: npt.NDArray[np.bool_], objects: Floats
) -> Floats:
    """Average precision of a class, the mean over the overlaps.

    Args:
        times: (R, D), how often each detection's image is in each choice; best detections first.
        right: (D, 10).
        ignored: (D, 10).
        objects: (R,), number of objects in each choice.

    Returns:
        (R,), from 0 to 1; NaN without objects.
    """
    total = np.zeros(len(times))
    all_so_far = times.cumsum(axis=1)
    for k in range(len(OVERLAPS)):
        hits = np.flatnonzero(right[:, k])  # between them precision only falls
        counted = all_so_far[:, hits]
        if ignored[:, k].any():
            counted = counted - (times * ignored[:, k]).cumsum(axis=1)[:, hits]
        found = times[:, hits].cumsum(axis=1)
        precision = found / np.maximum(counted, 1)
        precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        reached = np.searchsorted(RECALLS, found / np.maximum(objects, 1)[:, None], side="right")
        total += (np.diff(reached, axis=1, prepend=0) * precision).sum(axis=1) / len(RECALLS)
    return np.where(objects > 0, total / len(OVERLAPS), np.nan)


def _mean_of_defined(values: Floats) -> Floats:
    """Mean over the last axis without NaN; NaN where nothing else is there."""
    defined = ~np.isnan(values)
    means = np.where(defined, values, 0).sum(axis=-1) / np.maximum(defined.sum(axis=-1), 1)
    return np.where(defined.any(axis=-1), means, np.nan)


def collect(models: Sequence[TaskModel], images: ImageDataset, recipe: Recipe) -> list[ImageStatistics]:
    """Statistics of each network, in eval mode, on all images; they are read once."""
    found = [new_statistics(recipe.task, images.classes, recipe) for _ in models]
    batches = data.loader(images, recipe.train.batch_size, recipe.data.workers, shuffle=False, seed=0)
    device = device_of(recipe.train)
    with data.reading(batches), moved_to(device, *models):
        for pixels, targets in progress(batches, "evaluating image by image", unit=" batches"):
            inputs, _ = to_device(pixels, [], device)
            for model, statistics in zip(models, found, strict=True):
                statistics.update(model.predict(inputs), targets)
    return found


def new_statistics(task: Task, classes: Sequence[str], recipe: Recipe) -> ImageStatistics:
    """Empty statistics of a task; as many detections count as in the recipe's scores."""
    if task == "segmentation":
        return MaskStatistics(classes)
    return BoxStatistics(classes, scorer_of(recipe, classes).max_detections)


def image_interval(before: ImageStatistics, after: ImageStatistics) -> ImageInterval | None:
    """Paired bootstrap over the images of the metric's difference, after minus before.

    Percentiles of the difference over RESAMPLES samples of as many images, drawn with replacement from a fixed seed;
    each network's metric is computed anew on each sample (Efron and Tibshirani, An Introduction to the Bootstrap, 1993,
    chapter 13).

    Returns:
        The interval; None with a single image, or where the metric has no basis.
    """
    count = len(before)
    times = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), RESAMPLES).astype(np.float32)
    parts = np.array_split(times, RESAMPLES // 100)  # a large set's detections would fill the memory
    differences = np.concatenate([after.metric(part) - before.metric(part) for part in parts])
    differences = differences[~np.isnan(differences)]
    if count < 2 or not len(differences):
        return None
    low, high = np.percentile(differences, (2.5, 97.5))
    return ImageInterval(float(low), float(high), count)
