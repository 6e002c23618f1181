"""PictureDataset: pictures with targets, seeded by (seed, epoch, index), and the check before they are used."""

from __future__ import annotations

import hashlib
import logging
import math
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor, distributed
from torch.utils.data import Dataset, Sampler, get_worker_info
from torchvision import tv_tensors

from acamkd.config import Data
from acamkd.errors import AcamkdError, PictureError
from acamkd.models.base import PixelSize, Target

log = logging.getLogger(__name__)

Sample: TypeAlias = tuple[Tensor, Target]
"""A picture, (3, H, W) uint8 RGB, and what is known of it."""

Transform: TypeAlias = Callable[[Tensor, Target], Sample]
"""A joint change of picture and target (tv_tensors); draws from torch's default CPU generator only."""

UNNOTICED = 1.25
"""By this factor training and validation may differ in scale without a warning."""

LISTED_PROBLEMS = 10
"""An error lists this many problems and counts the others."""


def seed_of(*parts: object) -> int:
    """A 64-bit seed that is a function of the parts alone, such as (seed, epoch, index)."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big")


class PictureDataset(Dataset[Sample], ABC):
    """Pictures and their targets.

    An item's key is `epoch * len(dataset) + index`, so that the order of reading, the number of workers and a resumed
    run change nothing about what epoch 3 does to picture 7. What is wrong with the annotations is collected while they
    are read; `check` reports it together with what is wrong with the files.

    Args:
        files: Pictures.
        annotation_files: Every file that the targets come from.
        classes: Class names, background and void not counted.
        transform: Random changes, None for the pictures as they are.
        seed: Of the random changes.

    Attributes:
        problems: What makes the annotations unusable, one sentence per entry.
        warnings: What is legitimate but worth knowing.
    """

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
        self.reading: Tensor | None = None  # (W, 2): id and key of each loading process, shared with them

    @abstractmethod
    def target(self, index: int, size: PixelSize) -> Target:
        """What is known of one picture of this (height, width), as tv_tensors where torchvision has a type for it."""

    @abstractmethod
    def inspect(self, index: int, size: PixelSize, *, decode: bool) -> list[str]:
        """Problems of one entry whose picture has this (height, width); `decode` also looks at every pixel."""

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: int) -> Sample:
        epoch, index = divmod(key, len(self))
        note_reading(self.reading, key)
        image: Tensor = tv_tensors.Image(read_picture(self.files[index]))
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
        """Short name of the data's content: class names, names and sizes of the pictures, bytes of the annotations.

        Raises:
            PictureError: One of the files is not there.
        """
        digest = hashlib.sha256(repr(self.classes).encode())
        try:
            for file in self.files:
                digest.update(f"{file.name} {file.stat().st_size}\n".encode())
            for file in self.annotation_files:
                digest.update(file.read_bytes())
        except OSError as error:
            raise PictureError(f"{error.filename}: {error.strerror}") from error
        return digest.hexdigest()[:16]


def note_reading(reading: Tensor | None, key: int) -> None:
    """Leave word of the item that this loading process is about to read, in case that it dies of it."""
    if reading is not None and (worker := get_worker_info()):
        reading[worker.id] = torch.tensor([os.getpid(), key])


class SeededSampler(Sampler[int]):
    """Shuffled keys of one epoch, a function of (seed, epoch) alone.

    Pass after pass over the data set, each in an order of its own; an epoch is one pass, or the next `length` keys of
    every process. In a distributed run every process takes its own equal share of the common order; Lightning must not
    shard it once more (`Trainer(use_distributed_sampler=False)`), because its wrapper keeps `set_epoch` from arriving
    here.

    Args:
        n: Length of the data set.
        seed: Of the order.
        length: Keys per process and epoch; None for one pass.
    """

    def __init__(self, n: int, seed: int, length: int | None = None) -> None:
        self.n = n
        self.seed = seed
        self.length = length
        self.epoch = 0
        self.begin = (0, 0)
        """(epoch, keys): the one epoch that a resumed run begins in its middle, and how many of its keys were seen."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration belongs to; Lightning calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length or self.n // process()[1]

    def __iter__(self) -> Iterator[int]:
        epoch, seen = self.begin
        return iter(self.keys()[seen if epoch == self.epoch else 0 :])

    def keys(self) -> list[int]:
        """This process's keys of the whole current epoch."""
        rank, processes = process()
        count = len(self) * processes
        start = self.epoch * (count if self.length else self.n)
        passes = range(start // self.n, -(-(start + count) // self.n))
        order = torch.cat([self._pass(number) for number in passes])[start - passes[0] * self.n :]
        keys: list[int] = order[rank:count:processes].tolist()
        return keys

    def _pass(self, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed_of("order", self.seed, number))
        return number * self.n + torch.randperm(self.n, generator=generator)


class ShareSampler(Sampler[int]):
    """Every picture once, in order; of several processes each takes its share, and none repeats a picture.

    Args:
        n: Length of the data set.
    """

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return len(self._share())

    def __iter__(self) -> Iterator[int]:
        return iter(self._share())

    def _share(self) -> range:
        rank, processes = process()
        return range(rank, self.n, processes)


def check(dataset: PictureDataset, mode: Literal["full", "headers"]) -> list[str]:
    """Look at every picture and target before they are used.

    Args:
        dataset: What `build` returned.
        mode: `full` decodes every picture and mask, `headers` only reads their sizes.

    Returns:
        Warnings: what is legitimate but worth knowing.

    Raises:
        AcamkdError: Something cannot be used; lists the first problems with file and entry, and counts them all.
    """
    log.info("checking %d pictures (%s)", len(dataset), mode)
    with ThreadPoolExecutor() as pool:  # decoders release the interpreter's lock
        looks = pool.map(partial(look_at, dataset, decode=mode == "full"), range(len(dataset)))
        refuse([*dataset.problems, *(problem for _, problems in looks for problem in problems)])
    return list(dataset.warnings)


def check_same_classes(train: PictureDataset, val: PictureDataset) -> None:
    """Raise AcamkdError unless label k means the same in both splits."""
    if train.classes != val.classes:
        raise AcamkdError(
            f"train and val must list the same classes in the same order, but train has {', '.join(train.classes)} "
            f"and val has {', '.join(val.classes)}: give both annotation files the same categories"
        )


def compare_splits(
    train: PictureDataset, val: PictureDataset, options: Data, unlabelled: PictureDataset | None = None
) -> list[str]:
    """What is legitimate, but seldom meant, of training and validation together."""
    warnings = []
    scored = {file.resolve() for file in val.files}
    for kind, others in (("training", train), ("unlabelled", unlabelled)):
        if others is not None and (shared := scored & {file.resolve() for file in others.files}):
            warnings.append(
                f"{len(shared)} of {len(val)} validation pictures are {kind} pictures too: scores on them say nothing "
                "of others"
            )
    crop = options.augment.crop
    if crop is not None and isinstance(options.resize, tuple) and val.files:
        size = read_size(val.files[0])
        # A crop is of the picture as it lies on disk, and is then resized as a whole picture is.
        larger = math.sqrt(math.prod(size) / math.prod(crop))
        low, high = (larger * factor for factor in options.augment.scale or (1.0, 1.0))
        if not low / UNNOTICED <= 1 <= high * UNNOTICED:
            warnings.append(
                f"data.augment: training sees things {low:.2g} to {high:.2g} times as large as validation, where "
                f"{val.files[0].name}, {describe(size)}, is resized as a whole: make crop about as large as the "
                "pictures, or choose another scale"
            )
    return warnings


def check_classes(given: Sequence[str] | None, own: Sequence[str], whose: str) -> None:
    """Raise AcamkdError if a recipe gives other classes than the data's own."""
    if given is not None and tuple(given) != tuple(own):
        raise AcamkdError(
            f"data.classes is {', '.join(given)}, but {whose} are {', '.join(own)}: leave data.classes out, or list "
            "these"
        )


def refuse(problems: Sequence[str]) -> None:
    """Raise one AcamkdError that lists the first problems and counts them all; return if there are none."""
    if not problems:
        return
    first = f"the data cannot be used, {len(problems)} problem{'s' if len(problems) > 1 else ''}:"
    raise AcamkdError("\n  ".join([first, *listed(problems)]))


def listed(problems: Sequence[str]) -> list[str]:
    """The first problems, and how many more there are."""
    more = len(problems) - LISTED_PROBLEMS
    return [*problems[:LISTED_PROBLEMS], *([f"... and {more} more"] if more > 0 else [])]


def read_picture(file: Path) -> Tensor:
    """Decode a picture of any 8-bit mode to (3, H, W) uint8 RGB, rotated as its EXIF orientation says.

    Raises:
        PictureError: It is not there, cannot be decoded, or has more bits; the file is named.
    """
    with opened(file) as image:
        if image.mode[0] in "IF":  # Pillow would clip them to white without a word
            raise PictureError(f"its pixels are of mode {image.mode}; save it with 8 bits per channel")
        pixels = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def read_size(file: Path) -> PixelSize:
    """(height, width) after EXIF rotation, from the file's header; raises as `read_picture`."""
    with opened(file) as image:
        width, height = image.size
        # Without this question Pillow would decode a whole PNG in search of an entry after its pixels.
        says = any(entry in image.info for entry in ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"))
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1) if says else 1
    return (width, height) if orientation in (5, 6, 7, 8) else (height, width)  # there are no others that turn


@contextmanager
def opened(file: Path, what: str = "picture") -> Iterator[Image.Image]:
    """A picture; whatever goes wrong with it within becomes a PictureError that names it."""
    try:
        with Image.open(file) as image:
            yield image
    except FileNotFoundError as error:
        raise PictureError(f"{file}: there is no such {what}") from error
    except Exception as error:  # decoders of broken files raise whatever they meet first
        raise PictureError(f"{file}: the {what} cannot be read: {error}") from error


def files_of(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """Visible files of these types in one folder, in the order of their stems; AcamkdError if it cannot be read."""
    try:
        entries = list(folder.iterdir())
    except OSError as error:
        raise AcamkdError(f"cannot read the folder {folder}: {error.strerror}") from error
    chosen = [file for file in entries if file.suffix.lower() in suffixes and not file.name.startswith(".")]
    return sorted(chosen, key=lambda file: (file.stem, file.suffix))


def lines_of(file: Path) -> list[str]:
    """Lines of a text file, with or without a byte order mark; AcamkdError if it cannot be read."""
    try:
        return file.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise AcamkdError(f"cannot read {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise AcamkdError(f"{file} is not a text file: {error}") from error


def twins(pictures: Sequence[Path], what: str) -> list[str]:
    """Problems of pictures, as `files_of` lists them, that differ in their suffix alone and so share `what`."""
    return [
        f"{other}: the picture has the same name as {one.name}, and so the same {what}"
        for one, other in pairwise(pictures)
        if one.stem == other.stem
    ]


def describe(size: Sequence[int]) -> str:
    """(height, width) in the order and words that users know."""
    return f"{size[1]} x {size[0]} pixels"


def look_at(dataset: PictureDataset, index: int, *, decode: bool) -> tuple[PixelSize | None, list[str]]:
    """One picture's size, and what is wrong with it or, now that its size is known, with its target."""
    file = dataset.files[index]
    size: Any
    try:
        size = read_picture(file).shape[-2:] if decode else read_size(file)
    except PictureError as error:
        return None, [str(error)]
    return tuple(size), dataset.inspect(index, tuple(size), decode=decode)


def process() -> tuple[int, int]:
    """Rank of this process and number of processes."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1
