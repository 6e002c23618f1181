"""Base class of every data format: images with targets, and augmentation seeded by (seed, epoch, index)."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info
from torchvision import tv_tensors
from torchvision.transforms.v2.functional import resize

from acamkd.config import Data
from acamkd.data.disk_cache import Shelf
from acamkd.data.image_io import read_image, read_reduced
from acamkd.data.packed import read_packed, size_of, stamp_of
from acamkd.errors import ImageError
from acamkd.models.base import VOID, PixelSize, Target, Task
from acamkd.stopwatch import timed

Sample: TypeAlias = tuple[Tensor, Target]
"""An image, (3, H, W) uint8 RGB, and its target."""

OPTIONAL_KEYS = ("ignore_index", "mask_values", "uncovered", "columns", "box_format")
"""Keys of a recipe's `data` that only formats read which declare them."""

SplitName: TypeAlias = Literal["train", "val"]
"""Split of a recipe: `data.train` or `data.val`."""

Transform: TypeAlias = Callable[[Tensor, Target], Sample]
"""Joint augmentation of image and target (tv_tensors); it draws only from torch's default CPU generator."""


def seed_of(*parts: object) -> int:
    """A 64-bit seed that depends only on the given parts, such as (seed, epoch, index)."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big")


class ImageDataset(Dataset[Sample], ABC):
    """Images and their targets.

    An item's key is `epoch * len(dataset) + index`. The augmentation of image 7 in epoch 3 therefore does not depend on
    the reading order, the number of workers or a resume. Problems of the annotations are collected while they are read;
    `check` reports them together with those of the files.

    Args:
        files: Images.
        annotation_files: All files that the targets are read from.
        classes: Class names, background and void not counted.
        transform: Augmentation; None leaves the images unchanged.
        seed: Seed of the augmentation.

    Attributes:
        problems: Errors that make the annotations unusable, one sentence each.
        warnings: Remarks about what is legal but suspicious.
        counts: Sum of `tally` over the images; None until the targets have been read, or if `check` found problems.
        hashes: `difference_hash` of each image, (N, 32) uint8; None until `check` has decoded every image.
        least_size: From an image's size to the smallest that it may be decoded at; None decodes all pixels.
        cache: Where decoded images and masks are kept; None decodes them anew in every epoch.
        shared: Where trainings share augmented images; None until several do.
        groups: Lengths of the runs of images that lie together, in one shard or row group, and so are read together;
            None where every image is a file of its own.

    A class that a recipe names in `data.format` also sets the following class attributes.
    """

    TASK: Task
    """The task of its targets."""

    LAYOUT: ClassVar[tuple[str, ...]] = ()
    """Patterns below `data.root`, or several with " or " between them; `data.format: auto` takes the class whose
    patterns all match something."""

    SPARE_LAYOUT: ClassVar[tuple[str, ...]] = ()
    """Patterns that `auto` tries if no class's LAYOUT matches."""

    SPLIT_KEYS: ClassVar[frozenset[str]] = frozenset()
    """Keys of a recipe's split that it reads, out of `images`, `masks` and `annotations`."""

    BESIDE_IMAGES: ClassVar[str | None] = None
    """The key that a split needs beside `images`."""

    NEEDS_CLASSES: ClassVar[bool] = False
    """Whether the recipe must name the classes, in `data.classes`."""

    FIXED_CLASSES: ClassVar[tuple[str, ...] | None] = None
    """Class names, if the format fixes them."""

    DATA_KEYS: ClassVar[frozenset[str]] = frozenset()
    """Which of the keys of a recipe's `data` that are for some formats alone it reads: see OPTIONAL_KEYS."""

    KNOWS_SIZES: bool = True
    """Whether the annotations hold their image's size, so that a quarter turn is detected."""

    @classmethod
    def open_split(cls, data: Data, split: SplitName, *, transform: Transform | None, seed: int) -> ImageDataset:
        """Open one split of a recipe's `data`.

        Args:
            data: The recipe's `data`, whose `train` and `val` may be others than the recipe's. Test images are opened
                as `val`, and where `val` is a share of `train`, both are the same.
            split: `train` or `val`: which of the two says where the images lie, `getattr(data, split)`, and whether
                they are for training or for scores.
            transform: Random changes.
            seed: Of the random changes.

        Raises:
            AcamkdError: A file or folder cannot be read.
        """
        raise NotImplementedError(f"{cls.__name__} must define open_split to be named in data.format")

    def __init__(
        self,
        files: Sequence[Path],
        annotation_files: Sequence[Path],
        classes: Sequence[str],
        *,
        transform: Transform | None = None,
        seed: int = 0,
    ) -> None:
        self.files = list(files)
        self.annotation_files = list(annotation_files)
        self.classes = tuple(classes)
        self.transform = transform
        self.seed = seed
        self.problems = [
            f"the class {name} is listed {times} times: each needs a name of its own"
            for name, times in Counter(classes).items()
            if times > 1
        ]
        first: dict[str, str] = {}
        self.warnings = [
            f"the classes {one} and {name} differ in case or blanks alone: are they one?"
            for name in dict.fromkeys(classes)
            if (one := first.setdefault("".join(name.split()).casefold(), name)) != name
        ]
        self.counts: Tensor | None = None
        self.groups: list[int] | None = None
        self.hashes: npt.NDArray[np.uint8] | None = None
        self.least_size: Callable[[PixelSize], PixelSize] | None = None
        self.cache: Shelf | None = None
        self.shared: Shelf | None = None
        self.reading: Tensor | None = None  # (W, 2), shared: process id and current key of each loading process

    @abstractmethod
    def target(self, index: int, size: PixelSize) -> Target:
        """Target of one image of this (height, width), as tv_tensors where torchvision has a type."""

    @abstractmethod
    def inspect(self, index: int, size: PixelSize) -> list[str]:
        """Problems of one entry whose image has this (height, width), as far as file headers show."""

    def tally(self, index: int, size: PixelSize) -> Tensor:
        """(K + 1,) int64: number of boxes or pixels of each class in one image, then of ignored boxes or void pixels.

        Raises ImageError as `target` does.
        """
        target = self.target(index, size)
        if "mask" in target:
            labels, void = target["mask"].flatten().as_subclass(Tensor), target["mask"].flatten() == VOID
        else:
            labels, void = target["labels"].as_subclass(Tensor) - 1, target["iscrowd"] != 0
        last = len(self.classes)
        return torch.where(void.as_subclass(Tensor), last, labels).bincount(minlength=last + 1)

    def contradictions(self, other: ImageDataset) -> list[str]:
        """Problems between this split and another one, after `check` has examined both."""
        return []

    def why_absent(self, counts: Tensor) -> str:
        """The likely reason why classes are absent in `counts`, (K + 1,) as in `tally`, with advice."""
        return ""

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: int) -> Sample:
        epoch, index = divmod(key, len(self))
        note_reading(self.reading, key)
        if self.shared is None or self.transform is None:
            return self._sample(epoch, index)
        name = f"{epoch} {index} {stamp_of(self.files[index])}"

        def compute(_: object) -> dict[str, dict[str, Tensor]]:
            image, target = self._sample(epoch, index)
            return {name: {"": image, **target}}

        entry = self.shared.fetch([name], compute)[name]
        return entry[""], {part: tensor for part, tensor in entry.items() if part}

    def _sample(self, epoch: int, index: int) -> Sample:
        with timed("decoding"):
            image, target = self._decoded(index)
        if self.transform is not None:
            with timed("augmentation"), torch.random.fork_rng(devices=[]):
                # torch.manual_seed would also reseed the GPUs, and fork_rng restores only the CPU here.
                torch.default_generator.manual_seed(seed_of(self.seed, epoch, index))
                image, target = self.transform(image, target)
        return image.as_subclass(Tensor), {name: value.as_subclass(Tensor) for name, value in target.items()}

    def _decoded(self, index: int) -> Sample:
        """The image and its target as tv_tensors."""
        file = self.files[index]
        if self.cache is None:
            pixels, size = self._read(file)
            return tv_tensors.Image(pixels), _scaled(self.target(index, size), size, pixels)
        name = f"{file} {stamp_of(file)}"

        def decode(_: object) -> dict[str, Target]:
            pixels, size = self._read(file)
            target = _scaled(self.target(index, size), size, pixels)
            # Boxes come from a table, and only a mask is decoded, too.
            kept = {"mask": target["mask"]} if "mask" in target else {}
            return {name: {"image": pixels, "size": torch.tensor(size), **kept}}

        entry = self.cache.fetch([name], decode)[name]
        pixels = entry["image"]
        if "mask" in entry:
            return tv_tensors.Image(pixels), {"mask": tv_tensors.Mask(entry["mask"])}
        height, width = entry["size"].tolist()
        return tv_tensors.Image(pixels), _scaled(self.target(index, (height, width)), (height, width), pixels)

    def _read(self, file: Path) -> tuple[Tensor, PixelSize]:
        if self.least_size is None:
            pixels = read_image(file)
            return pixels, (pixels.shape[-2], pixels.shape[-1])
        return read_reduced(file, self.least_size)

    def sources(self, key: int) -> list[Path]:
        """The image files of an item, without those of its target."""
        return [self.files[key % len(self)]]

    def __iter__(self) -> Iterator[Sample]:
        # Every key is valid, so Python's own iteration by index would never end.
        return (self[index] for index in range(len(self)))

    def fingerprint(self) -> str:
        """Hash of the data's content: class names, names and sizes of the images, bytes of the annotations.

        Raises:
            ImageError: A file does not exist.
        """
        digest = hashlib.sha256(repr(self.classes).encode())
        try:
            for file in self.files:
                digest.update(f"{file.name} {size_of(file)}\n".encode("utf-8", "surrogateescape"))  # names of any bytes
            for file in self.annotation_files:
                packed = read_packed(file)
                digest.update(file.read_bytes() if packed is None else packed)
        except OSError as error:
            raise ImageError(f"{error.filename}: {error.strerror}") from error
        return digest.hexdigest()[:16]


def _scaled(target: Target, size: PixelSize, pixels: Tensor) -> Target:
    """A target of an image of this (height, width), for the pixels that it was decoded to."""
    height, width = pixels.shape[-2:]
    if (height, width) == size:
        return target
    scaled = {
        name: resize(value, [height, width])
        if isinstance(value, (tv_tensors.Mask, tv_tensors.BoundingBoxes))
        else value
        for name, value in target.items()
    }
    if "area" in scaled:
        scaled["area"] = scaled["area"] * (height * width / (size[0] * size[1]))
    return scaled


def note_reading(reading: Tensor | None, key: int) -> None:
    """Record the item that this loading process reads next, so that a crash can be traced to it."""
    if reading is not None and (worker := get_worker_info()):
        reading[worker.id] = torch.tensor([os.getpid(), key])
