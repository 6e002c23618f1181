"""Boxes that each image brings along, and the packed files of a split: what Parquet files and shards have in common."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, TypeAlias

from acamkd.data.boxes import Box, BoxDataset
from acamkd.data.image_io import read_size
from acamkd.errors import AcamkdError, ImageError, nearest
from acamkd.models.base import PixelSize

log = logging.getLogger(__name__)

BoxFormat: TypeAlias = Literal["xywh", "xyxy"]

BOXES = ("bbox", "bboxes", "box", "boxes")
"""What the boxes of objects are called."""

CATEGORIES = ("category", "categories", "category_id", "label", "labels", "class", "class_id")
"""What their classes are called."""

CROWDS = ("iscrowd", "is_crowd")

ALIASES: Mapping[str, Sequence[str]] = {"val": ("validation", "valid", "dev")}
"""Further names of a split's files."""

FOLDERS = ("", "data", "default")
"""Folders below `data.root` where files lie."""


class ObjectDataset(BoxDataset):
    """Object detection with the objects of each image as data sets of Hugging Face hold them.

    The objects are a list of mappings, or a mapping of lists. Each has a box, in pixels, and a class, by name or by
    number from 0, under a name of BOXES and CATEGORIES; `iscrowd` and `area` as in COCO where they are there.

    Args:
        files: Images.
        annotation_files: Where their objects come from.
        classes: Class names; class k of the objects is label k + 1.
        objects: Of each image.
        sizes: (height, width) of each image, None where nothing beside it says them: then they are read from its file.
        box_format: Whether a box is left, top, width, height, or left, top, right, bottom.
        options: Further ones of BoxDataset.
    """

    DATA_KEYS = frozenset({"box_format"})

    def __init__(
        self,
        files: Sequence[Path],
        annotation_files: Sequence[Path],
        classes: Sequence[str],
        objects: Iterable[Any],
        *,
        sizes: Sequence[PixelSize | None],
        box_format: BoxFormat = "xywh",
        **options: Any,
    ) -> None:
        super().__init__(files, annotation_files, classes, sizes=_with_headers(files, sizes), **options)
        self.KNOWS_SIZES = None not in sizes  # a header agrees with its own image in any case
        self.box_format = box_format
        entries: list[tuple[str, Any]] = []
        for index, given in enumerate(objects):
            try:
                listed = _listed(given)
            except AcamkdError as error:
                self.problems.append(f"{self.files[index]}: {error}")
                continue
            entries += [(f"{self.files[index]}: object {k}", (index, each)) for k, each in enumerate(listed, start=1)]
        self.gather(entries)

    def parse(self, entry: tuple[int, Mapping[str, Any]]) -> Box:
        """The index of an image, and one of its objects."""
        index, given = entry
        try:
            left, top, third, fourth = (float(value) for value in _first(given, BOXES))
            area = float(given.get("area") or 0)
        except (TypeError, ValueError) as error:
            raise AcamkdError(f"it needs {BOXES[0]}, four numbers ({self.box_format}); an area must be one") from error
        corners = (left, top, third, fourth)
        if self.box_format == "xywh":
            corners = (left, top, left + third, top + fourth)
        crowd = _first(given, CROWDS) or 0
        if crowd not in (0, 1):
            raise AcamkdError(f"{CROWDS[0]} must be 0 or 1, not {crowd}")
        return Box(index, self._label(_first(given, CATEGORIES)), corners, bool(crowd), area)

    def _label(self, given: Any) -> int:
        if isinstance(given, str):
            if given not in self.classes:
                raise AcamkdError(f"there is no class {given!r}; {nearest(given, self.classes)}")
            return self.classes.index(given) + 1
        if not isinstance(given, int) or isinstance(given, bool):
            raise AcamkdError(f"it needs {CATEGORIES[0]}, the name of a class or its number, not {given!r}")
        if not 0 <= given < len(self.classes):
            raise AcamkdError(f"class {given} is none of the {len(self.classes)}, 0 to {len(self.classes) - 1}")
        return given + 1


def _with_headers(files: Sequence[Path], known: Sequence[PixelSize | None]) -> list[PixelSize | None]:
    """(height, width) of each image: as known, or else from its header; None where that cannot be read."""
    if unknown := sum(size is None for size in known):
        log.info("reading the sizes of %d images, since nothing beside them says their width and height", unknown)

    def of(pair: tuple[Path, PixelSize | None]) -> PixelSize | None:
        file, size = pair
        if size is not None:
            return size
        try:
            return read_size(file)
        except ImageError:  # which the check of the images tells
            return None

    with ThreadPoolExecutor() as pool:
        return list(pool.map(of, zip(files, known, strict=True)))


def size_in(row: Mapping[str, Any]) -> PixelSize | None:
    """(height, width), where a row says both."""
    height, width = row.get("height"), row.get("width")
    return (height, width) if isinstance(height, int) and isinstance(width, int) and min(height, width) > 0 else None


def split_files(root: Path, name: str, suffix: str) -> list[Path]:
    """The packed files of a split, sorted: NAME.*, NAME-*.*, or those in a folder NAME; NAME may be a pattern.

    Raises:
        AcamkdError: There is none.
    """
    try:
        for each in (name, *ALIASES.get(name, ())):
            for folder in FOLDERS:
                patterns = (f"{each}{suffix}", f"{each}-*{suffix}", f"{each}/*{suffix}")
                if found := sorted({file for pattern in patterns for file in (root / folder).glob(pattern)}):
                    return found
    except (NotImplementedError, ValueError) as error:  # of an absolute path, and of a pattern such as tr**
        raise AcamkdError(f"{name} is no name of a split in data.root {root}, and no pattern of names") from error
    there = sorted(file.relative_to(root).as_posix() for file in root.glob(f"**/*{suffix}"))
    listed = (
        f"there are {', '.join(there[:4])}{', ...' if len(there) > 4 else ''}" if there else f"there is no *{suffix}"
    )
    raise AcamkdError(
        f"no file {name}{suffix}, {name}-*{suffix} or {name}/*{suffix} in {root}: {listed}; name the split with "
        "data.train.name and data.val.name; data.val: {share: 0.2} draws validation images"
    )


def _listed(given: Any) -> list[Mapping[str, Any]]:
    """Objects as a list of mappings."""
    if given is None:
        return []
    if isinstance(given, list) and all(isinstance(each, dict) for each in given):
        return given
    if isinstance(given, dict):
        columns = {name: values for name, values in given.items() if isinstance(values, list)}
        if len({len(values) for values in columns.values()}) <= 1:
            return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    raise AcamkdError("its objects must be a list of mappings, or a mapping of lists of one length")


def _first(given: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((given[name] for name in names if given.get(name) is not None), None)
