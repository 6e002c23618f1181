"""mAP and mIoU over a whole data set, by torchmetrics."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassJaccardIndex
from torchmetrics.detection import MeanAveragePrecision

from acamkd.config import Recipe
from acamkd.data.samplers import rank_and_world_size
from acamkd.errors import AcamkdError
from acamkd.models.base import VOID, Prediction, Target, Task, TaskModel, keeping_modes, to_device

T = TypeVar("T")

log = logging.getLogger(__name__)

MAX_DETECTIONS = 100
"""COCO's: what counts of one class in one image."""

_LIMITS = ("detections_per_img", "box_detections_per_img")
"""Options of a recipe's networks that say how many detections an image gets."""

METRICS: Mapping[Task, str] = {"detection": "mAP", "segmentation": "mIoU"}
"""The one figure that decides, per task."""

_COCO_NAMES = {
    "mAP": "map", "AP50": "map_50", "AP75": "map_75", "AP_s": "map_small", "AP_m": "map_medium", "AP_l": "map_large",
}  # fmt: skip


class Scorer(nn.Module):
    """Collects predictions over a data set and turns them into the task's metrics, in percent.

    Detection: COCO's mAP, AP50, AP75, AP by object size (small below 32^2, large above 96^2 pixels of the image as
    it lies on disk, by the target's `area`, or that of the box where there is none) and `AP/CLASS`. Segmentation: mIoU
    from one confusion matrix over the whole set, and `IoU/CLASS`.

    A figure that has no basis is NaN and does not enter a mean: an AP without such an object in the set, an IoU of a
    class that is neither in the masks nor predicted. A class that is predicted alone has an IoU of 0, which does enter
    the mean, as in torchmetrics and MMSegmentation; detectron2 leaves it out.

    Of several processes each adds its own images, in any number, and all of them get the figures of the whole set.

    Args:
        task: `detection` or `segmentation`.
        classes: Class names in the order of their ids.
        max_detections: Detection: the best so many of each class count in an image.

    Raises:
        AcamkdError: There is a single class to segment.
    """

    def __init__(self, task: Task, classes: Sequence[str], max_detections: int = MAX_DETECTIONS) -> None:
        super().__init__()
        self.task: Task = task
        self.max_detections = max_detections
        self._crowded: list[int] = []  # numbers of objects beyond the limit
        self._has_warned = False
        self.classes = tuple(classes)
        self._images: list[tuple[dict[str, Tensor], ...]] = []
        if task == "detection":
            # Its own exchange between processes waits for ever where they have unequal numbers of images.
            self.metric: Metric = MeanAveragePrecision(
                backend="faster_coco_eval", class_metrics=True, sync_on_compute=False,
                max_detection_thresholds=[1, 10, max_detections],
            )  # fmt: skip
            self.metric.warn_on_many_detections = False  # which are no loss; objects are, and told below
        else:
            if len(classes) < 2:
                raise AcamkdError(
                    f"a segmenter tells classes apart, and data.classes has {', '.join(classes)} alone: list the "
                    "background too, with an id of its own"
                )
            self.metric = MulticlassJaccardIndex(
                num_classes=len(classes), ignore_index=VOID, average="none", zero_division=math.nan
            )

    def update(self, predictions: Sequence[Prediction], targets: Sequence[Target]) -> None:
        """Add some images, both sides in each image's own pixels."""
        if self.task == "detection":
            pairs = zip(predictions, targets, strict=True)
            self._images += [tuple({name: x.cpu() for name, x in side.items()} for side in pair) for pair in pairs]
            counts = [len(target["boxes"]) - int(target["iscrowd"].sum()) for target in targets if "iscrowd" in target]
            self._crowded += [count for count in counts if count > self.max_detections]
            return
        for prediction, target in zip(predictions, targets, strict=True):
            self.metric.update(prediction["mask"].unsqueeze(0), target["mask"].unsqueeze(0))

    def compute(self) -> dict[str, float]:
        """Return every figure by name, in percent, and start anew."""
        if self.task == "detection":
            for image in _interleaved(gathered(self._images)):
                self.metric.update(*([side] for side in image))
            self._images = []
            self._warn()
        result = self.metric.compute()
        self.metric.reset()
        if self.task == "segmentation":
            per_class = dict(zip(self.classes, result, strict=True))
            return {
                "mIoU": 100 * float(result.nanmean()),
                **{f"IoU/{name}": 100 * float(value) for name, value in per_class.items()},
            }
        scores = {name: _percent(result[key]) for name, key in _COCO_NAMES.items()}
        found = dict(zip(result["classes"].reshape(-1).tolist(), result["map_per_class"].reshape(-1), strict=True))
        for label, name in enumerate(self.classes, start=1):
            scores[f"AP/{name}"] = _percent(found[label]) if label in found else math.nan
        return scores

    def _warn(self) -> None:
        """Say once that no network could find every object."""
        if self._crowded and not self._has_warned:
            log.warning(
                "%d images have more than %d objects (up to %d), and no more detections of a class count in an image: "
                "options: {detections_per_img: N} of the networks (box_detections_per_img of faster_rcnn) raises what "
                "they give and what the metric counts",
                len(self._crowded), self.max_detections, max(self._crowded),
            )  # fmt: skip
            self._has_warned = True
        self._crowded = []


def scorer_of(recipe: Recipe, classes: Sequence[str]) -> Scorer:
    """The scorer of a recipe: it counts 100 detections, or as many as the options of one of its networks ask for."""
    sections = [section for section in (recipe.student, recipe.teacher) if section is not None]
    asked = [section.options[name] for section in sections for name in _LIMITS if name in section.options]
    return Scorer(recipe.task, classes, max([MAX_DETECTIONS, *asked]))


@torch.no_grad()
def score(
    model: TaskModel, batches: Iterable[tuple[Sequence[Tensor], Sequence[Target]]], scorer: Scorer
) -> dict[str, float]:
    """Score a network on inputs.

    Args:
        model: The network; its modes are restored afterwards.
        batches: (images, targets) each.
        scorer: Fresh, or computed before.
    """
    device = model.mean.device
    scorer.to(device)
    with keeping_modes(model):
        model.eval()
        for images, targets in batches:
            inputs, truths = to_device(images, targets, device)
            scorer.update(model.predict(inputs), truths)
    return scorer.compute()


def gathered(own: T) -> list[T]:
    """What every process has, in the order of their ranks; alone, a list of one."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return [own]
    everything: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everything, own)
    return everything


def own_part(everything: Sequence[T]) -> T | None:
    """What `gathered` had of this process; nothing where there were fewer of them."""
    rank, _ = rank_and_world_size()
    return everything[rank] if rank < len(everything) else None


def _interleaved(shares: Sequence[Sequence[T]]) -> list[T]:
    """Shares that were dealt out like cards, in the order of the pack."""
    return [share[index] for index in range(max(map(len, shares))) for share in shares if index < len(share)]


def _percent(value: Tensor) -> float:
    return 100 * float(value) if value >= 0 else math.nan  # pycocotools' -1: nothing to find


logging.getLogger("faster_coco_eval").setLevel(logging.WARNING)
