"""What a data set holds, counted in one look at every image and target."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from acamkd.data.checks import describe, examine
from acamkd.data.dataset import ImageDataset
from acamkd.models.base import Target

SMALL, LARGE = 32**2, 96**2
"""Areas in pixels of the image that part COCO's small, medium and large boxes."""


@dataclass
class Statistics:
    """One split.

    Attributes:
        images: Number of images.
        sizes: "640 x 480 pixels" -> number of images, the most frequent first.
        classes: Class -> number of boxes, or share of the pixels that are not void, in percent.
        without: Images that have no box, or nothing but void.
        boxes: Detection: number of `small`, `medium` and `large` boxes by COCO's areas, and of the `ignored` ones,
            which the other figures leave out.
        sides: Detection: `shortest`, `median` and `longest` of all widths and heights, in pixels.
        problems: What makes the split unusable, each with its file and line or entry.
        warnings: What is legitimate but worth knowing.
    """

    images: int = 0
    sizes: dict[str, int] = field(default_factory=dict)
    classes: dict[str, float] = field(default_factory=dict)
    without: int = 0
    boxes: dict[str, int] = field(default_factory=dict)
    sides: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def count(dataset: ImageDataset, *, decode: bool) -> Statistics:
    """Look at every image and target; images with a problem count as images, and no further.

    Args:
        dataset: What `build` returned, unchanged by augmentation.
        decode: Decode every image rather than read its header.
    """
    looks, problems, warnings = examine(dataset, decode=decode, count=True)
    result = Statistics(images=len(dataset), problems=problems, warnings=warnings)
    result.sizes = dict(Counter(describe(look.size) for look in looks if look.size is not None).most_common())
    if not dataset.classes:  # nothing is known of unlabeled images
        return result
    result.without = sum(look.tally is not None and not look.tally[:-1].any() for look in looks)
    counts = torch.zeros(len(dataset.classes)) if dataset.counts is None else dataset.counts[:-1]
    if dataset.TASK == "detection":
        result.classes = dict(zip(dataset.classes, counts.long().tolist(), strict=True))
        sound = ((index, look.size) for index, look in enumerate(looks) if look.tally is not None)
        _describe_boxes(result, [dataset.target(index, size) for index, size in sound if size is not None])
    else:
        shares = 100 * counts / counts.sum().clamp_min(1)
        result.classes = dict(zip(dataset.classes, shares.tolist(), strict=True))
    return result


def _describe_boxes(result: Statistics, targets: Sequence[Target]) -> None:
    counted = [target["iscrowd"] == 0 for target in targets]
    boxes = torch.cat([torch.empty(0, 4), *(t["boxes"][kept] for t, kept in zip(targets, counted, strict=True))])
    sides = boxes[:, 2:] - boxes[:, :2]
    outlines = torch.cat([torch.empty(0), *(t["area"][kept] for t, kept in zip(targets, counted, strict=True))])
    areas = torch.where(outlines > 0, outlines, sides.prod(dim=1))  # as the score by size goes
    result.boxes = {
        "small": int((areas < SMALL).sum()),
        "medium": int(((areas >= SMALL) & (areas < LARGE)).sum()),
        "large": int((areas >= LARGE).sum()),
        "ignored": sum(int((~kept).sum()) for kept in counted),
    }
    if len(boxes):
        figures = {"shortest": sides.min(), "median": sides.median(), "longest": sides.max()}
        result.sides = {name: round(value.item(), 1) for name, value in figures.items()}
