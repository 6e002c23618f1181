"""The data set that every format is one of: images with targets, random changes seeded by (seed, epoch, index)."""

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

from acamkd.config import Data
from acamkd.data.image_io import read_image
from acamkd.errors import ImageError
from acamkd.models.base import VOID, PixelSize, Target, Task

Sample: TypeAlias = tuple[Tensor, Target]
"""An image, (3, H, W) uint8 RGB, and what is known of it."""

SplitName: TypeAlias = Literal["train", "val"]
"""Of a recipe: `data.train` and `data.val`."""

Transform: TypeAlias = Callable[[Tensor, Target], Sample]
"""A joint change of image and target (tv_tensors); draws from torch's default CPU generator only."""


def seed_of(*parts: object) -> int:
    """A 64-bit seed that is a function of the parts alone, such as (seed, epoch, index)."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big")


class ImageDataset(Dataset[Sample], ABC):
    """Images and their targets.

    An item's key is `epoch * len(dataset) + index`, so that the order of reading, the number of workers and a resumed
    run change nothing about what epoch 3 does to image 7. What is wrong with the annotations is collected while they
    are read; `check` reports it together with what is wrong with the files.

    Args:
        files: Images.
        annotation_files: Every file that the targets come from.
        classes: Class names, background and void not counted.
        transform: Random changes, None for the images as they are.
        seed: Of the random changes.

    Attributes:
        problems: What makes the annotations unusable, one sentence per entry.
        warnings: What is legitimate but worth knowing.
        counts: Sum of `tally` over the images, and
        hashes: `difference_hash` of each image, (N, 32) uint8; both None until `check` has looked at every pixel.

    A class that a recipe names, in `data.format`, also says what follows here.
    """

    TASK: Task
    """What its targets are for."""

    LAYOUT: ClassVar[tuple[str, ...]] = ()
    """Patterns below `data.root`; `data.format: auto` takes the class whose patterns all match something."""

    SPARE_LAYOUT: ClassVar[tuple[str, ...]] = ()
    """Patterns that do for `auto` where no class's LAYOUT matches."""

    SPLIT_KEYS: ClassVar[frozenset[str]] = frozenset()
    """Paths of a recipe's split that it reads: of `images`, `masks` and `annotations`."""

    BESIDE_IMAGES: ClassVar[str | None] = None
    """The path that a split needs where it gives `images`."""

    NEEDS_CLASSES: ClassVar[bool] = False
    """Whether only a recipe, in `data.classes`, can name the classes."""

    FIXED_CLASSES: ClassVar[tuple[str, ...] | None] = None
    """Class names, where the format itself says them."""

    READS_MASK_VALUES: ClassVar[bool] = False
    """Whether `data.mask_values` may say what its masks' values or colors mean."""

    KNOWS_SIZES: bool = True
    """Whether the annotations say their image's size, so that a quarter turn would be noticed."""

    @classmethod
    def open_split(cls, data: Data, split: SplitName, *, transform: Transform | None, seed: int) -> ImageDataset:
        """Open one split of a recipe's `data`; raises AcamkdError if a file or folder cannot be read."""
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
        self.warnings: list[str] = []
        self.counts: Tensor | None = None
        self.hashes: npt.NDArray[np.uint8] | None = None
        self.reading: Tensor | None = None  # (W, 2): id and key of each loading process, shared with them

    @abstractmethod
    def target(self, index: int, size: PixelSize) -> Target:
        """What is known of one image of this (height, width), as tv_tensors where torchvision has a type for it."""

    @abstractmethod
    def inspect(self, index: int, size: PixelSize) -> list[str]:
        """Problems of one entry whose image has this (height, width), as far as files' headers tell."""

    def tally(self, index: int, size: PixelSize) -> Tensor:
        """(K + 1,) int64: boxes or pixels of each class in one image, then the boxes that are ignored or void pixels.

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
        """Problems of this split and another one together, once `check` has looked at both."""
        return []

    def why_absent(self, counts: Tensor) -> str:
        """The likely reason why `counts`, (K + 1,) as in `tally`, has none of some classes, and what to do."""
        return ""

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: int) -> Sample:
        epoch, index = divmod(key, len(self))
        note_reading(self.reading, key)
        image: Tensor = tv_tensors.Image(read_image(self.files[index]))
        target = self.target(index, (image.shape[-2], image.shape[-1]))
        if self.transform is not None:
            with torch.random.fork_rng(devices=[]):
                # torch.manual_seed would also reseed the GPUs, and fork_rng restores only the CPU here.
                torch.default_generator.manual_seed(seed_of(self.seed, epoch, index))
                image, target = self.transform(image, target)
        return image.as_subclass(Tensor), {name: value.as_subclass(Tensor) for name, value in target.items()}

    def sources(self, key: int) -> list[Path]:
        """The files that an item is made of, without those of its target."""
        return [self.files[key % len(self)]]

    def __iter__(self) -> Iterator[Sample]:
        # Every key is valid, so Python's own iteration by index would never end.
        return (self[index] for index in range(len(self)))

    def fingerprint(self) -> str:
        """Short name of the data's content: class names, names and sizes of the images, bytes of the annotations.

        Raises:
            ImageError: One of the files is not there.
        """
        digest = hashlib.sha256(repr(self.classes).encode())
        try:
            for file in self.files:
                digest.update(f"{file.name} {file.stat().st_size}\n".encode())
            for file in self.annotation_files:
                digest.update(file.read_bytes())
        except OSError as error:
            raise ImageError(f"{error.filename}: {error.strerror}") from error
        return digest.hexdigest()[:16]


def note_reading(reading: Tensor | None, key: int) -> None:
    """Leave word of the item that this loading process is about to read, in case that it dies of it."""
    if reading is not None and (worker := get_worker_info()):
        reading[worker.id] = torch.tensor([os.getpid(), key])
