"""mAP and mIoU over a whole data set, by torchmetrics."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassJaccardIndex
from torchmetrics.detection import MeanAveragePrecision

from acamkd.config import Recipe
from acamkd.data.samplers import rank_and_world_size
from acamkd.distillation.distiller import Distiller
from acamkd.errors import AcamkdError
from acamkd.models.base import VOID, FeatureModel, Prediction, Target, Task, TaskModel, keeping_modes, to_device
from acamkd.processes import is_distributed
from acamkd.progress import progress

T = TypeVar("T")

log = logging.getLogger(__name__)

MAX_DETECTIONS = 100
"""COCO's limit on the detections of one class that count in one image."""

_LIMITS = ("detections_per_img", "box_detections_per_img")
"""Options of a recipe's networks that limit the detections per image."""

METRICS: Mapping[Task, str] = {"detection": "mAP", "segmentation": "mIoU"}
"""The deciding metric of each task."""

_COCO_NAMES = {
    "mAP": "map", "AP50": "map_50", "AP75": "map_75", "AP_s": "map_small", "AP_m": "map_medium", "AP_l": "map_large",
}  # fmt: skip


class Validator(nn.Module, ABC):
    """What a training is judged by after an epoch, on the validation images.

    Attributes:
        metric: Name of the deciding metric; higher is better.
        classes: Class names in the order of their ids.
        why_undefined: What the images lack where that metric is NaN, and what to do.
    """

    metric: str
    classes: tuple[str, ...]
    why_undefined: str

    @abstractmethod
    def see(self, distiller: Distiller, images: Sequence[Tensor], targets: Sequence[Target]) -> None:
        """Add some images to what `compute` judges."""

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """Return every metric by name, over the images of all processes, and reset."""


class Scorer(Validator):
    """Collects predictions over a data set and computes the task's metrics, in percent.

    Detection: COCO's mAP, AP50, AP75, AP by object size, and `AP/CLASS`. Objects are small below 32^2 and large above
    96^2 pixels of the original image. Their size is the target's `area`, or that of the box if `area` is 0 or missing.
    Segmentation: mIoU from one confusion matrix over the whole data set, and `IoU/CLASS`.

    A metric that is undefined is NaN and does not enter a mean: the AP of a class or size without objects, or the IoU
    of a class that is neither in the masks nor predicted. The IoU of a class that is predicted but not in the masks is
    0. It enters the mean, as in torchmetrics and MMSegmentation; detectron2 leaves it out.

    With several processes, each adds its own images, in any number. All of them get the metrics of the whole data set.

    Args:
        task: `detection` or `segmentation`.
        classes: Class names in the order of their ids.
        max_detections: Detection: this many detections of each class count in an image, the best ones.

    Raises:
        AcamkdError: Segmentation with a single class.
    """

    why_undefined = (
        "in the validation images every pixel is void, or every box a crowd: check data.val and data.ignore_index"
    )

    def __init__(self, task: Task, classes: Sequence[str], max_detections: int = MAX_DETECTIONS) -> None:
        super().__init__()
        self.task: Task = task
        self.metric = METRICS[task]
        self.max_detections = max_detections
        self._has_warned = False
        self.classes = tuple(classes)
        self._images: list[tuple[dict[str, Tensor], ...]] = []
        if task == "detection":
            # torchmetrics' own synchronization hangs if the processes have unequal numbers of images.
            self.counter: Metric = MeanAveragePrecision(
                backend="faster_coco_eval", class_metrics=True, sync_on_compute=False,
                max_detection_thresholds=[1, 10, max_detections],
            )  # fmt: skip
            self.counter.warn_on_many_detections = False  # surplus detections are harmless; `_warn` reports objects
        else:
            if len(classes) < 2:
                raise AcamkdError(
                    f"a segmenter tells classes apart, and data.classes has {', '.join(classes)} alone: list the "
                    "background too, with an id of its own"
                )
            self.counter = MulticlassJaccardIndex(
                num_classes=len(classes), ignore_index=VOID, average="none", zero_division=math.nan
            )

    def see(self, distiller: Distiller, images: Sequence[Tensor], targets: Sequence[Target]) -> None:
        """Add the student's predictions for some images."""
        self.update(distiller.student.predict(images), targets)

    def update(self, predictions: Sequence[Prediction], targets: Sequence[Target]) -> None:
        """Add some images, both sides in each image's own pixels."""
        if self.task == "detection":
            pairs = zip(predictions, targets, strict=True)
            self._images += [tuple({name: x.cpu() for name, x in side.items()} for side in pair) for pair in pairs]
            return
        for prediction, target in zip(predictions, targets, strict=True):
            self.counter.update(prediction["mask"].unsqueeze(0), target["mask"].unsqueeze(0))

    def compute(self) -> dict[str, float]:
        """Return every metric by name, in percent, and reset."""
        if self.task == "detection":
            images = _interleaved(gathered(self._images))
            self._images = []
            for image in images:
                self.counter.update(*([side] for side in image))
            self._warn([target for _, target in images])
        result = self.counter.compute()
        self.counter.reset()
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

    def _warn(self, targets: Sequence[Mapping[str, Tensor]]) -> None:
        """Warn once that some images have more objects than detections count."""
        counts = [int((target["iscrowd"] == 0).sum()) for target in targets if "iscrowd" in target]
        full = [count for count in counts if count > self.max_detections]
        if full and not self._has_warned:
            log.warning(
                "%d images have more than %d objects (up to %d), and no more detections of a class count in an image: "
                "options: {detections_per_img: N} of the networks (box_detections_per_img of faster_rcnn) raises what "
                "they give and what the metric counts",
                len(full), self.max_detections, max(full),
            )  # fmt: skip
            self._has_warned = True


def why_unscored(model: FeatureModel, classes: int) -> str | None:
    """Why a teacher has no score on images of so many classes; None where it has one."""
    if not isinstance(model, TaskModel):
        return "it has no head"
    if model.num_classes != classes:
        return f"it has {model.num_classes} classes of its own, the data {classes}"
    return None


def scorer_of(recipe: Recipe, classes: Sequence[str]) -> Scorer:
    """Build a recipe's scorer; it counts 100 detections of a class per image, or as many as a network may give.

    Raises:
        AcamkdError: A network's number of detections is none.
    """
    asked = {
        f"{key}.options.{name}": section.options[name]
        for key, section in (("student", recipe.student), ("teacher", recipe.teacher)) if section is not None
        for name in _LIMITS if name in section.options
    }  # fmt: skip
    for key, number in asked.items():
        if not isinstance(number, int):
            raise AcamkdError(f"{key} must be a whole number, not {number!r}")
    return Scorer(recipe.task, classes, max([MAX_DETECTIONS, *asked.values()]))


@torch.no_grad()
def score(
    model: TaskModel, batches: Iterable[tuple[Sequence[Tensor], Sequence[Target]]], scorer: Scorer
) -> dict[str, float]:
    """Score a network on inputs.

    Args:
        model: The network; its modes are restored afterwards.
        batches: (images, targets) each.
        scorer: New, or reset by `compute`.
    """
    device = model.mean.device
    scorer.to(device)
    with keeping_modes(model):
        model.eval()
        for images, targets in progress(batches, "evaluating", unit=" batches"):
            inputs, truths = to_device(images, targets, device)
            scorer.update(model.predict(inputs), truths)
    return scorer.compute()


def gathered(own: T) -> list[T]:
    """Gather a value of every process, in the order of their ranks; a single process gets a list of one."""
    if not is_distributed():
        return [own]
    everything: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everything, own)
    return everything


def own_part(everything: Sequence[T]) -> T | None:
    """Return this process's entry of what `gathered` returned; None if fewer processes had gathered it."""
    rank, _ = rank_and_world_size()
    return everything[rank] if rank < len(everything) else None


def _interleaved(shares: Sequence[Sequence[T]]) -> list[T]:
    """Merge shares that were distributed round-robin, in the original order."""
    return [share[index] for index in range(max(map(len, shares))) for share in shares if index < len(share)]


def _percent(value: Tensor) -> float:
    return 100 * float(value) if value >= 0 else math.nan  # pycocotools gives -1 where there is no object


logging.getLogger("faster_coco_eval").setLevel(logging.WARNING)
