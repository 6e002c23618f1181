"""Overlays of the report page: ground truth and predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torchvision.ops import box_iou

from acamkd.models.base import Prediction, Target
from acamkd.report.visualize import embed_mask, hex_color

HIT = 0.5
"""Smallest overlap (IoU) of a box with an object that it detects."""


@dataclass(frozen=True)
class Box:
    """One drawn box, in the image's own pixels."""

    x: float
    y: float
    width: float
    height: float
    color: str
    label: str
    right: bool


@dataclass(frozen=True)
class Panel:
    """Overlay of an image: boxes, or a label map as a data URI.

    Attributes:
        title: `truth`, or the name of the network.
        words: What is to be seen.
        boxes: Detection: the boxes.
        label_map: Segmentation: the classes' colors.
        score: Prediction: the metric on this image alone, percent.
    """

    title: str
    words: str
    boxes: tuple[Box, ...] = ()
    label_map: str = ""
    score: float | None = None


def truth_panel(target: Target, classes: Sequence[str]) -> Panel:
    """Panel of an image's ground truth."""
    if "mask" in target:
        return Panel("truth", "the true label map", label_map=embed_mask(target["mask"].numpy(), classes))
    single = target["iscrowd"] == 0
    boxes = _boxes(target["boxes"][single], target["labels"][single], [True] * int(single.sum()), classes)
    return Panel("truth", f"{len(boxes)} objects", boxes)


def prediction_panel(title: str, prediction: Prediction, target: Target, classes: Sequence[str], score: float) -> Panel:
    """Panel of a network's prediction: its label map, or as many of its best boxes as there are objects."""
    if "mask" in prediction:
        label_map = embed_mask(prediction["mask"].cpu().numpy(), classes)
        return Panel(title, f"the label map of the {title}", label_map=label_map, score=score)
    single = target["iscrowd"] == 0
    objects, labels = target["boxes"][single], target["labels"][single]
    best = prediction["scores"].argsort(descending=True)[: max(1, len(objects))]
    boxes, found = prediction["boxes"][best], prediction["labels"][best]
    overlaps = box_iou(boxes, objects) * (found[:, None] == labels)  # (boxes, objects)
    right = []
    for row in overlaps:  # best first; an object counts as found once
        hit = len(objects) > 0 and bool(row.max() >= HIT)
        if hit:
            overlaps[:, row.argmax()] = 0
        right.append(hit)
    words = f"{sum(right)} of {len(objects)} objects found by its {len(boxes)} best boxes"
    return Panel(title, words, _boxes(boxes, found, right, classes), score=score)


def _boxes(boxes: Tensor, labels: Tensor, right: Sequence[bool], classes: Sequence[str]) -> tuple[Box, ...]:
    return tuple(
        Box(x1, y1, x2 - x1, y2 - y1, hex_color(label), classes[label - 1], hit)
        for (x1, y1, x2, y2), label, hit in zip(boxes.round(decimals=1).tolist(), labels.tolist(), right, strict=True)
    )
