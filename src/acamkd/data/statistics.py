"""What a data set holds, counted in one look at every image and target."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import torch

from acamkd.data.boxes import BoxDataset
from acamkd.data.checks import describe, look_at
from acamkd.data.dataset import ImageDataset
from acamkd.errors import ImageError
from acamkd.models.base import VOID, PixelSize, Target

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
    with ThreadPoolExecutor() as pool:  # decoders release the interpreter's lock
        looks = list(pool.map(partial(look_at, dataset, decode=decode), range(len(dataset))))
    result = Statistics(
        images=len(dataset),
        problems=[*dataset.problems, *(problem for _, problems in looks for problem in problems)],
        warnings=list(dataset.warnings),
    )
    result.sizes = dict(Counter(describe(size) for size, _ in looks if size is not None).most_common())
    sound = [(index, size) for index, (size, problems) in enumerate(looks) if size is not None and not problems]
    targets = _readable(dataset, sound, result.problems)
    if not dataset.classes:  # nothing is known of unlabeled images
        return result
    if isinstance(dataset, BoxDataset):
        _count_boxes(result, list(targets), dataset.classes)
    else:
        _count_pixels(result, targets, dataset.classes)
    return result


def _readable(dataset: ImageDataset, sound: Sequence[tuple[int, PixelSize]], problems: list[str]) -> Iterator[Target]:
    """The targets of images whose headers are sound, as far as they can be read."""
    for index, size in sound:
        try:
            yield dataset.target(index, size)
        except ImageError as error:
            problems.append(str(error))


def _count_boxes(result: Statistics, targets: Sequence[Target], classes: Sequence[str]) -> None:
    counted = [target["iscrowd"] == 0 for target in targets]
    boxes = torch.cat([torch.empty(0, 4), *(t["boxes"][kept] for t, kept in zip(targets, counted, strict=True))])
    labels = [t["labels"][kept] for t, kept in zip(targets, counted, strict=True)]
    sides = boxes[:, 2:] - boxes[:, :2]
    outlines = torch.cat([torch.empty(0), *(t["area"][kept] for t, kept in zip(targets, counted, strict=True))])
    areas = torch.where(outlines > 0, outlines, sides.prod(dim=1))  # as the score by size goes
    numbers = torch.cat([torch.empty(0, dtype=torch.int64), *labels]).bincount(minlength=len(classes) + 1)
    result.classes = dict(zip(classes, numbers[1:].tolist(), strict=True))
    result.without = sum(len(each) == 0 for each in labels)
    result.boxes = {
        "small": int((areas < SMALL).sum()),
        "medium": int(((areas >= SMALL) & (areas < LARGE)).sum()),
        "large": int((areas >= LARGE).sum()),
        "ignored": sum(int((~kept).sum()) for kept in counted),
    }
    if len(boxes):
        figures = {"shortest": sides.min(), "median": sides.median(), "longest": sides.max()}
        result.sides = {name: round(value.item(), 1) for name, value in figures.items()}


def _count_pixels(result: Statistics, targets: Iterable[Target], classes: Sequence[str]) -> None:
    counts = torch.zeros(len(classes), dtype=torch.int64)
    for target in targets:
        known = target["mask"][target["mask"] != VOID]
        counts += known.bincount(minlength=len(classes))
        result.without += known.numel() == 0
    shares = 100 * counts / counts.sum().clamp_min(1)
    result.classes = dict(zip(classes, shares.tolist(), strict=True))
