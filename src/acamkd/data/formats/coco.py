"""COCO: images with boxes, or with outlines that become one mask each, in one JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from faster_coco_eval.core import mask as coco_mask
from torch import Tensor
from torchvision import tv_tensors

from acamkd.config import Data
from acamkd.data.boxes import Box, BoxDataset
from acamkd.data.checks import check_classes, describe, describe_shown
from acamkd.data.dataset import ImageDataset, SplitName, Transform
from acamkd.data.formats.coco_file import CocoFile, coco_paths
from acamkd.errors import AcamkdError, ImageError
from acamkd.models.base import VOID, PixelSize, Target

BACKGROUND = "background"

BACKGROUNDS = frozenset({BACKGROUND, "_background_"})
"""Categories, in lower case, that mean what no other one covers."""

ONLY_GROUPS = "is it a category that only groups others? data.classes may leave out what no {} has"

Uncovered: TypeAlias = Literal["background", "void"]


class CocoDetection(BoxDataset):
    """Object detection in COCO's format; categories in the order of their ids become the labels 1..K.

    Args:
        images: Folder of images; see CocoFile.
        annotations: The JSON: `images` (id, file_name, width, height), `annotations` (image_id, category_id, bbox
            [x, y, width, height], iscrowd, area) and `categories` (id, name).
        classes: Names that the file must list, in its order; categories without boxes may be left out. None takes the
            file's own names.
        keep_crowd: Keep the boxes around crowds; see BoxDataset.
        transform: Augmentation.
        seed: Seed of the augmentation.

    Raises:
        AcamkdError: The file cannot be read, is not a COCO JSON, or lists other classes.
    """

    LEAVES_OUT_EMPTY = True  # train2017 has two
    ABSENT_ADVICE = ONLY_GROUPS.format("box")

    LAYOUT = ("annotations/instances_*.json",)
    SPLIT_KEYS = frozenset({"images", "annotations"})
    BESIDE_IMAGES = "annotations"

    @classmethod
    def open_split(cls, data: Data, split: SplitName, *, transform: Transform | None, seed: int) -> CocoDetection:
        """Open one split of a recipe's `data`."""
        images, annotations = coco_paths(data.root, getattr(data, split))
        return cls(images, annotations, classes=data.classes, keep_crowd=split == "val", transform=transform, seed=seed)

    def __init__(
        self,
        images: Path,
        annotations: Path,
        *,
        classes: Sequence[str] | None = None,
        keep_crowd: bool = True,
        transform: Transform | None = None,
        seed: int = 0,
    ) -> None:
        self._file = file = CocoFile(images, annotations, classes)
        check_classes(classes, file.names, f"the categories of {annotations}")
        super().__init__(
            file.files,
            [annotations],
            file.names,
            source=annotations,
            sizes=file.sizes,
            keep_crowd=keep_crowd,
            transform=transform,
            seed=seed,
        )
        self.warnings += file.warnings
        self.problems += file.problems
        self.gather((file.where(entry), entry) for entry in file.entries)
        del self._file  # loading processes need the table alone

    def parse(self, entry: Mapping[str, Any]) -> Box:
        """An element of `annotations`."""
        asked = "it needs image_id, category_id and bbox [x, y, width, height]; an area must be a number"
        try:
            x, y, width, height = (float(value) for value in entry["bbox"])
            area = float(entry.get("area") or 0)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise AcamkdError(asked) from error
        index, number, crowd = self._file.locate(entry, asked)
        return Box(index, number + 1, (x, y, x + width, y + height), crowd, area)


class CocoSegmentation(ImageDataset):
    """Semantic segmentation by the outlines of a COCO JSON: polygons and run-length encoded masks (RLE).

    Every annotation gives its category to the pixels that its `segmentation` covers. Where several overlap, the one of
    the fewest pixels is on top. Crowds (`iscrowd`) are painted first, so that every single object is above them.

    Args:
        images: Folder of images; see CocoFile.
        annotations: The JSON: `annotations` with image_id, category_id and segmentation: a list of polygons
            [x, y, x, y, ...], or RLE {size, counts}, compressed or not.
        classes: Names that the file must list, in its order, with the background's where it has an id; categories
            without outlines may be left out. None takes the file's own names.
        uncovered: What pixels without an outline are. `background`: a class; one that the file calls background, and
            otherwise a further one with the id 0. `void`: nothing, so that they neither train nor count.
        transform: Augmentation.
        seed: Seed of the augmentation.

    Raises:
        AcamkdError: The file cannot be read, is not a COCO JSON, or lists other classes.
    """

    TASK = "segmentation"
    SPARE_LAYOUT = CocoDetection.LAYOUT  # masks of the same images, where there are some, go before outlines
    SPLIT_KEYS = CocoDetection.SPLIT_KEYS
    BESIDE_IMAGES = CocoDetection.BESIDE_IMAGES
    DATA_KEYS = frozenset({"uncovered"})

    @classmethod
    def open_split(cls, data: Data, split: SplitName, *, transform: Transform | None, seed: int) -> CocoSegmentation:
        """Open one split of a recipe's `data`."""
        images, annotations = coco_paths(data.root, getattr(data, split))
        return cls(
            images, annotations, classes=data.classes, uncovered=data.uncovered, transform=transform, seed=seed,
        )  # fmt: skip

    def __init__(
        self,
        images: Path,
        annotations: Path,
        *,
        classes: Sequence[str] | None = None,
        uncovered: Uncovered = "background",
        transform: Transform | None = None,
        seed: int = 0,
    ) -> None:
        file = CocoFile(images, annotations, classes)
        named = [number for number, name in enumerate(file.names) if name.lower() in BACKGROUNDS]
        added = uncovered == "background" and not named
        self._first_id = int(added)
        own = (BACKGROUND, *file.names) if added else file.names
        check_classes(classes, own, f"the categories of {annotations}")
        super().__init__(file.files, [annotations], own, transform=transform, seed=seed)
        self._fill = VOID if uncovered == "void" else named[0] if named else 0
        self._sizes = file.sizes
        self.warnings += file.warnings
        self.problems += file.problems
        if len(own) > VOID:
            self.problems.append(f"{annotations}: {len(own)} classes, but a mask holds at most {VOID} and void")
        self._gather(file)

    def target(self, index: int, size: PixelSize) -> Target:
        """`mask` (H, W) int64, VOID where it is unknown; raises ImageError if the image has another size."""
        if size != self._sizes[index]:
            raise ImageError("; ".join(self.inspect(index, size)))
        mask = np.full(size, self._fill)
        for row in range(self._first[index], self._first[index + 1]):
            runs = self._runs[self._begin[row] : self._begin[row + 1]].numpy().tobytes()
            mask[coco_mask.decode({"size": list(size), "counts": runs}) > 0] = self._ids[row]
        return {"mask": tv_tensors.Mask(torch.from_numpy(mask))}

    def inspect(self, index: int, size: PixelSize) -> list[str]:
        """Check that the image has the size given in its annotations."""
        if self._sizes[index] == size:
            return []
        file, said = self.files[index], describe(self._sizes[index])
        return [f"{file} has {describe_shown(file, size)}, but {self.annotation_files[0]} says {said}"]

    def why_absent(self, counts: Tensor) -> str:
        """Advice on categories that only group others, if there are others."""
        return ONLY_GROUPS.format("outline") if counts[:-1].any() else ""

    def _gather(self, file: CocoFile) -> None:
        """Turn all annotations into one table of runs, sorted by image; loading processes share its few tensors."""
        rows: list[tuple[int, bool, int, int, bytes]] = []
        empty = 0
        for entry in file.entries:
            try:
                index, number, crowd = file.locate(entry, "it needs image_id, category_id and segmentation")
                runs, area = _runs(entry.get("segmentation"), file.sizes[index])
            except AcamkdError as error:
                self.problems.append(f"{file.where(entry)}: {error}")
                continue
            if area:
                rows.append((index, not crowd, -area, number + self._first_id, runs))
            else:
                empty += 1
        rows.sort(key=lambda row: row[:3])  # stable: of two of one size, the file's later one is on top
        counts = np.bincount([row[0] for row in rows], minlength=len(self)) if rows else np.zeros(len(self), int)
        self._first: list[int] = [0, *counts.cumsum().tolist()]
        self._ids = torch.tensor([row[3] for row in rows], dtype=torch.int64)
        self._begin = torch.tensor([0, *np.cumsum([len(row[4]) for row in rows], dtype=np.int64).tolist()])
        self._runs = torch.from_numpy(np.frombuffer(b"".join(row[4] for row in rows) + b"\0", np.uint8).copy())
        if empty:
            self.warnings.append(
                f"{file.path}: {empty} outlines have less than three corners or no pixel, and are left out"
            )
        if not rows and not self.problems:
            self.problems.append(f"{file.path}: there is no outline for any image")
        elif without := int((counts == 0).sum()):
            self.warnings.append(f"{file.path}: {without} of {len(self)} images have no outlines")


FAR = 10
"""Sides of an image that an outline may reach beyond it; its drawing takes memory for them."""


def _runs(given: Any, size: PixelSize) -> tuple[bytes, int]:
    """A `segmentation` as compressed runs, and the number of its pixels.

    Raises:
        AcamkdError: It is neither polygons nor RLE, or not of an image of this (height, width).
    """
    if not given:
        raise AcamkdError("it has no segmentation, and a box alone is no mask: outline the object, or delete the entry")
    try:
        if isinstance(given, dict):
            if list(given["size"]) != list(size):
                height, width = given["size"]
                raise AcamkdError(f"its RLE is of {describe((height, width))}, but the image has {describe(size)}")
            counts = given["counts"]
            runs = {"size": list(size), "counts": counts}
            if isinstance(counts, list):
                if min(counts) < 0 or sum(counts) != math.prod(size):
                    raise ValueError("runs that do not fill the image")
                runs = coco_mask.frPyObjects(runs, *size)
            elif isinstance(counts, str):
                coco_mask.decode(runs)  # which alone finds that runs do not fill the image
            else:
                raise TypeError("neither list nor text")
        else:
            polygons = [[float(value) for value in polygon] for polygon in given]
            if any(len(polygon) % 2 or not all(map(math.isfinite, polygon)) for polygon in polygons):
                raise ValueError("half a corner")
            if any(abs(value) > FAR * max(size) for polygon in polygons for value in polygon):
                raise AcamkdError("a corner of its segmentation lies far outside the image: are the numbers pixels?")
            # Two corners would be read as a box.
            polygons = [polygon for polygon in polygons if len(polygon) >= 6]
            if not polygons:
                return b"", 0
            runs = coco_mask.merge(coco_mask.frPyObjects(polygons, *size))
        area = int(coco_mask.area(runs))
    except AcamkdError:
        raise
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise AcamkdError(
            "its segmentation must be a list of polygons [x, y, x, y, ...], or RLE {size: [height, width], counts: "
            "...} whose runs fill the image"
        ) from error
    counts = runs["counts"]
    return counts.encode() if isinstance(counts, str) else counts, area
