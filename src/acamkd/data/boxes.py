"""Images with boxes, whatever file the boxes come from."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torchvision import tv_tensors

from acamkd.data.checks import describe, describe_shown
from acamkd.data.dataset import ImageDataset, Transform
from acamkd.errors import AcamkdError
from acamkd.models.base import PixelSize, Target

_THINNEST = 1e-6
"""A box that is no wider than this share of its image has no area: float32 could lose it at the far edge."""


class Box(NamedTuple):
    """One object: number of its image, label from 1, x1 y1 x2 y2, whether training does without it, and its area.

    The area is that of its outline in pixels, by which COCO calls it small or large; 0 where nothing but the box is
    known.
    """

    image: int
    label: int
    corners: tuple[float, float, float, float]
    crowd: bool = False
    area: float = 0.0


class BoxDataset(ImageDataset):
    """Object detection: a subclass reads one format and hands every entry to `gather`.

    Boxes that reach beyond the image are clipped to it, with a warning.

    Args:
        files: Images.
        annotation_files: One file of boxes for all images, or one for each.
        classes: Class names; label k is the k-th.
        source: What warnings name.
        sizes: (height, width) of each image as the format says it, None where it fails to; None altogether where
            boxes are shares of their image.
        keep_crowd: Keep the boxes that are ignored: crowds, and what is difficult. Evaluation needs them, since it
            forgives what a network finds there; training does without, since a box around a crowd would teach that a
            group is one large object.
        transform: Random changes.
        seed: Of the random changes.
    """

    TASK = "detection"

    ABSENT_ADVICE: ClassVar[str] = ""
    """What to do about classes that no box has."""

    LEAVES_OUT_EMPTY: ClassVar[bool] = False
    """Whether boxes without area are left out, with a warning, or refused."""

    def __init__(
        self,
        files: Sequence[Path],
        annotation_files: Sequence[Path],
        classes: Sequence[str],
        *,
        source: Path,
        sizes: Sequence[PixelSize | None] | None,
        keep_crowd: bool = True,
        transform: Transform | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(files, annotation_files, classes, transform=transform, seed=seed)
        self.source = source
        self.sizes = sizes
        self.keep_crowd = keep_crowd

    @abstractmethod
    def parse(self, entry: Any) -> Box:
        """One entry of the format; raises AcamkdError with what is wrong."""

    def target(self, index: int, size: PixelSize) -> Target:
        """`boxes` (K, 4) float32 x1 y1 x2 y2, `labels` (K,) and `iscrowd` (K,) int64, `area` (K,) as in Box."""
        rows = slice(self._first[index], self._first[index + 1])
        height, width = size if self.sizes is None else (1, 1)
        # A product is a copy: a transform that works in place must not reach the table.
        boxes = self._boxes[rows] * torch.tensor([width, height, width, height])
        return {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
            "labels": self._labels[rows].clone(),
            "iscrowd": self._iscrowd[rows].clone(),
            "area": self._area[rows].clone(),
        }

    def inspect(self, index: int, size: PixelSize) -> list[str]:
        """The image must have the size that its annotations say."""
        said = self.sizes[index] if self.sizes is not None else None
        if said is None or said == size:
            return []
        source = self.annotation_files[index % len(self.annotation_files)]
        file = self.files[index]
        return [f"{file} has {describe_shown(file, size)}, but {source} says {describe(said)}"]

    def why_absent(self, counts: Tensor) -> str:
        """What a reader of the format can do about them."""
        return self.ABSENT_ADVICE

    def gather(self, entries: Iterable[tuple[str, Any]]) -> None:
        """Turn entries, each with its place, into one table sorted by image: few large tensors are shared well."""
        rows: list[Box] = []
        clipped = empty = 0
        for where, entry in entries:
            try:
                given = self.parse(entry)
                box = self._clip(given)
            except AcamkdError as error:
                self.problems.append(f"{where}: {error}")
                continue
            if box is None:
                empty += 1
                continue
            clipped += box != given
            if self.keep_crowd or not box.crowd:
                rows.append(box)
        rows.sort(key=lambda box: box.image)
        counts = torch.bincount(torch.tensor([box.image for box in rows], dtype=torch.int64), minlength=len(self))
        self._first: list[int] = [0, *counts.cumsum(0).tolist()]
        self._labels = torch.tensor([box.label for box in rows], dtype=torch.int64)
        self._iscrowd = torch.tensor([box.crowd for box in rows], dtype=torch.int64)
        self._area = torch.tensor([box.area for box in rows], dtype=torch.float32)
        self._boxes = torch.tensor([box.corners for box in rows], dtype=torch.float32).reshape(-1, 4)
        last = len(self.classes)
        self.counts = torch.where(self._iscrowd == 1, last, self._labels - 1).bincount(minlength=last + 1)
        if empty:
            self.warnings.append(f"{self.source}: {empty} boxes have no area and are left out")
        if clipped:
            text = f"{self.source}: {clipped} boxes reach beyond their image and are clipped"
            much = f", of {len(rows)}: are their numbers in another order or unit?" if 5 * clipped > len(rows) else ""
            self.warnings.append(text + much)
        sides = (self._boxes[:, 2:] - self._boxes[:, :2]).amax(dim=1)
        if self.sizes is not None and 2 * (sides <= 1).sum() > len(rows):
            self.warnings.append(f"{self.source}: most boxes have a pixel or less: are they shares of the image?")
        if not rows and not self.problems:
            self.problems.append(f"{self.source}: there is no box for any image")
        elif without := int((counts == 0).sum()):
            self.warnings.append(f"{self.source}: {without} of {len(self)} images have no boxes")
        again = len(rows) - len({(box.image, box.label, box.corners) for box in rows})
        if again:
            self.warnings.append(
                f"{self.source}: {again} boxes are there twice, of the same class and place: a network that finds each "
                "object once misses the other"
            )

    def _clip(self, box: Box) -> Box | None:
        """What of a box lies within its image; None if it is to be left out. Raises AcamkdError if nothing does."""
        size = (1, 1) if self.sizes is None else self.sizes[box.image]
        if size is None:  # a problem of its own
            return box
        left, top, right, bottom = box.corners
        name = f"the box from ({left:g}, {top:g}) to ({right:g}, {bottom:g})"
        image = self.files[box.image].name
        if not all(map(math.isfinite, box.corners)):
            raise AcamkdError(f"{name} on {image} has no area that can be told: its numbers must be finite")
        if not 0 <= box.area < math.inf:
            raise AcamkdError(f"{name} on {image} has the area {box.area:g}, which must be a finite number from 0 on")
        if not _has_area(box.corners, size):
            if self.LEAVES_OUT_EMPTY and left <= right and top <= bottom:
                return None
            raise AcamkdError(f"{name} on {image} has no area")
        inside = max(left, 0.0), max(top, 0.0), min(right, float(size[1])), min(bottom, float(size[0]))
        if not _has_area(inside, size):
            raise AcamkdError(f"{name} lies outside {image}, which has {describe(size)}")
        return box._replace(corners=inside)


def _has_area(corners: tuple[float, float, float, float], size: PixelSize) -> bool:
    left, top, right, bottom = corners
    return right - left > _THINNEST * size[1] and bottom - top > _THINNEST * size[0]
