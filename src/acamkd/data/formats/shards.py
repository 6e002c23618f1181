"""Tar files as WebDataset packs them: the files of one image lie together and have its name.

The library webdataset streams them, so that it knows neither the place in an epoch nor an image by its number. Here
each tar file is listed once, and every image is then read at its place.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from acamkd.config import Data
from acamkd.data.dataset import SplitName, Transform
from acamkd.data.formats.masks import MaskDataset, mask_ids
from acamkd.data.formats.objects import ObjectDataset, size_in, split_files
from acamkd.data.packed import read_packed, tar_members
from acamkd.errors import AcamkdError
from acamkd.files import IMAGE_SUFFIXES

MASKS = ("mask.png", "seg.png", "png")
"""Endings of masks; the last one beside an image of another type."""

BOXES = ("json",)

PATTERN = "*-00*.tar or train/*00*.tar"
"""Not every tar file, since archives are often left beside what they held."""


class Shards:
    """The images of tar files, each with one more file.

    Args:
        tars: The files.
        endings: Endings of the further file, of which an image has one; empty = images alone.

    Raises:
        AcamkdError: A file cannot be read, or none of its images has such a file.

    Attributes:
        images: Paths of the images, in the order of the tar files.
        beside: Paths of the further files.
        groups: Images of each tar file.
        problems: Images without such a file, and tar files without an image.
    """

    def __init__(self, tars: Sequence[Path], endings: Sequence[str] = ()) -> None:
        self.images: list[Path] = []
        self.beside: list[Path] = []
        self.groups: list[int] = []
        self.problems: list[str] = []
        for tar in tars:
            before = len(self.images)
            for files in _samples(tar_members(tar)).values():
                # An image is no .png where there is one of another type.
                kinds = sorted((f for f in files if f".{f}" in IMAGE_SUFFIXES), key=lambda ending: ending == "png")
                if not kinds:
                    self.problems += [
                        f"{tar / name}: the key of an image ends at the first dot of its name: rename it"
                        for ending, name in files.items()
                        if ending.endswith(IMAGE_SUFFIXES) and ending not in MASKS
                    ]
                    continue
                other = next((ending for ending in endings if ending in files and ending != kinds[0]), None)
                if endings and other is None:
                    what = " or ".join(f".{ending}" for ending in endings)
                    self.problems.append(f"{tar / files[kinds[0]]}: the image has no file {what} beside it")
                    continue
                self.images.append(tar / files[kinds[0]])
                self.beside += [] if other is None else [tar / files[other]]
            self.groups.append(len(self.images) - before)
            if not self.groups[-1] and not self.problems:
                self.problems.append(f"{tar}: the tar file holds no images ({', '.join(IMAGE_SUFFIXES)})")
        if not self.images and self.problems:
            raise AcamkdError(self.problems[0])


class ShardDetection(ObjectDataset):
    """Object detection: KEY.jpg and KEY.json, a mapping with `objects` or `annotations`; see ObjectDataset.

    The JSON's `width` and `height`, where they are there, spare reading the image's header at the start.
    """

    SPARE_LAYOUT = (PATTERN,)
    NEEDS_CLASSES = True

    @classmethod
    def open_split(cls, data: Data, split: SplitName, *, transform: Transform | None, seed: int) -> ShardDetection:
        """Open one split of a recipe's `data`."""
        tars = split_files(data.root, getattr(data, split).name or split, ".tar")
        shards = Shards(tars, BOXES)
        rows = [_parsed(file) for file in shards.beside]
        reader = cls(
            shards.images, shards.beside, data.classes or (),
            [row.get("objects", row.get("annotations")) for row in rows], box_format=data.box_format,
            source=tars[0].parent, sizes=[size_in(row) for row in rows],
            keep_crowd=split == "val", transform=transform, seed=seed,
        )  # fmt: skip
        reader.groups = shards.groups
        reader.problems += shards.problems
        return reader


class ShardSegmentation(MaskDataset):
    """Semantic segmentation: KEY.jpg and KEY.png, KEY.mask.png or KEY.seg.png, a mask of class ids."""

    SPARE_LAYOUT = (PATTERN,)
    DATA_KEYS = frozenset({"ignore_index", "mask_values"})
    NEEDS_CLASSES = True

    @classmethod
    def open_split(cls, data: Data, split: SplitName, *, transform: Transform | None, seed: int) -> ShardSegmentation:
        """Open one split of a recipe's `data`."""
        shards = Shards(split_files(data.root, getattr(data, split).name or split, ".tar"), MASKS)
        classes = data.classes or ()
        ids = mask_ids(data, classes)
        reader = cls(
            shards.images, shards.beside, classes,
            ignore_index=data.ignore_index, ids=ids, same_palette=ids is None, transform=transform, seed=seed,
        )  # fmt: skip
        reader.groups = shards.groups
        reader.problems += shards.problems
        return reader


def _samples(names: Iterable[str]) -> Mapping[str, dict[str, str]]:
    """Key of each image -> ending -> name. The key is the path up to the first dot of its last part."""
    samples: dict[str, dict[str, str]] = {}
    for name in names:
        path = PurePosixPath(name)
        stem, _, ending = path.name.partition(".")
        if stem:  # not of a hidden file
            samples.setdefault(str(path.with_name(stem)), {})[ending.lower()] = name
    return samples


def _parsed(file: Path) -> dict[str, Any]:
    """A JSON of objects."""
    try:
        content = json.loads(read_packed(file) or b"")
    except (OSError, ValueError, RecursionError) as error:
        raise AcamkdError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict) or not {"objects", "annotations"} & set(content):
        raise AcamkdError(f"{file} must be a mapping with `objects`, each with bbox and category")
    return content
