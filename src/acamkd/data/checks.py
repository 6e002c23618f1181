"""Checks of images and targets before they are used, and the report of their problems."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from acamkd.config import Data
from acamkd.data.dataset import ImageDataset
from acamkd.data.duplicates import Hash, difference_hash, identical, near_copies
from acamkd.data.image_io import read_header, read_image, read_size
from acamkd.errors import AcamkdError, ImageError
from acamkd.models.base import PixelSize, Task
from acamkd.progress import progress

log = logging.getLogger(__name__)

UNNOTICED = 1.25
"""Training and validation may differ in scale by this factor without a warning."""

LISTED_PROBLEMS = 10
"""An error lists this many problems and counts the others."""


def check(dataset: ImageDataset, mode: Literal["full", "headers"]) -> list[str]:
    """Check every image and target before they are used.

    Args:
        dataset: What `build` returned.
        mode: `full` decodes every image and mask, `headers` only reads their sizes.

    Returns:
        Warnings about what is legal but suspicious.

    Raises:
        AcamkdError: An image or target cannot be used. The message lists the first problems and counts all.
    """
    log.info("checking %d images (%s)", len(dataset), mode)
    found = examine(dataset, decode=mode == "full")
    refuse(found.problems)
    return found.warnings


class Look(NamedTuple):
    """Check of one image: (height, width), None if unreadable; problems; EXIF orientation; tally; hash."""

    size: PixelSize | None
    problems: list[str]
    orientation: int = 1
    tally: Tensor | None = None
    hash: Hash | None = None


class Findings(NamedTuple):
    """Checks of all images, with the problems and warnings of the data set and the sum of the tallies."""

    looks: list[Look]
    problems: list[str]
    warnings: list[str]
    counts: Tensor | None = None


def examine(dataset: ImageDataset, *, decode: bool, count: bool = False) -> Findings:
    """Check every image and target; the data set keeps its counts and hashes.

    Args:
        dataset: What `build` returned.
        decode: Decode every image; otherwise only its header is read.
        count: Read the pixels of every target even without `decode`.
    """
    with ThreadPoolExecutor() as pool:  # decoders release the interpreter's lock
        each = pool.map(partial(look_at, dataset, decode=decode, count=count), range(len(dataset)))
        looks = list(progress(each, "checking the data", total=len(dataset)))
    problems = [*dataset.problems, *(problem for look in looks for problem in look.problems)]
    warnings = [*dataset.warnings, *_repeated(dataset, looks)]
    if dataset.classes:
        warnings += _turned(dataset, looks)
    tallies = [look.tally for look in looks if look.tally is not None]
    counts = sum(tallies[1:], start=tallies[0]) if tallies and dataset.classes else None
    if counts is not None:
        empty = sum(not tally[:-1].any() for tally in tallies)
        if empty == len(looks) and not problems:
            reason = dataset.why_absent(counts)
            problems.append(
                f"none of the {empty} images has a {COUNTED[dataset.TASK]}: nothing can be learned or scored"
                f"{reason and f'; {reason}'}"
            )
        elif empty and dataset.TASK == "segmentation":
            warnings.append(f"{empty} of {len(looks)} masks hold nothing but void: nothing is learned from them")
    dataset.counts = None if problems else counts  # what cannot be read may show any class
    if looks and all(look.hash is not None for look in looks):
        dataset.hashes = np.stack([look.hash for look in looks if look.hash is not None])
    return Findings(looks, problems, warnings, counts)


COUNTED: Mapping[Task, str] = {
    "detection": "box that counts (crowds and difficult ones do not)",
    "segmentation": "pixel that is not void",
}

UNIT: Mapping[Task, str] = {"detection": "box", "segmentation": "pixel"}


def _repeated(dataset: ImageDataset, looks: Sequence[Look]) -> list[str]:
    """Images that a data set holds more than once, with different annotations."""
    warnings = []
    if again := [file for file, times in Counter(dataset.files).items() if times > 1]:
        warnings.append(
            f"{len(again)} images are listed more than once ({again[0]}): what one entry shows, the other calls "
            "background; give each image one entry with all that is known of it"
        )
    numbers = {file: number for number, file in enumerate(dataset.files)}
    pairs = identical(dataset.files) if dataset.classes else []
    copies = [(file, one) for file, one in pairs if not _same_target(dataset, looks, numbers[file], numbers[one])]
    if copies:
        warnings.append(
            f"{len(copies)} of {len(dataset)} images are copies of others, byte for byte, with other annotations "
            f"({copies[0][0]} of {copies[0][1]}): what one shows, the other calls background; keep one of each"
        )
    return warnings


def _same_target(dataset: ImageDataset, looks: Sequence[Look], one: int, other: int) -> bool:
    sizes = [looks[index].size for index in (one, other) if not looks[index].problems]
    if len(sizes) < 2 or None in sizes:
        return True  # reported as another problem
    try:
        first, second = (dataset.target(index, size) for index, size in zip((one, other), sizes, strict=True) if size)
    except ImageError:
        return True
    return all(torch.equal(first[key], second[key]) for key in first)


def _turned(dataset: ImageDataset, looks: Sequence[Look]) -> list[str]:
    """Images with an EXIF orientation for which sizes do not show whether the annotations follow it."""
    untold = range(2, 5 if dataset.KNOWS_SIZES else 9)
    turned = [file for file, look in zip(dataset.files, looks, strict=True) if look.orientation in untold]
    if not turned:
        return []
    return [
        f"{len(turned)} images are mirrored or turned as their EXIF entry says ({turned[0]}): their annotations must "
        "be of the image as it is shown, and sizes do not tell whether they are"
    ]


def check_same_classes(train: ImageDataset, other: ImageDataset, split: str = "val") -> None:
    """Raise AcamkdError unless label k means the same class in both splits, and there are classes."""
    if not train.classes:
        raise AcamkdError("data.format images has no labels to learn from: only `acamkd pretrain` does without")
    if train.classes != other.classes:
        raise AcamkdError(
            f"train and {split} must list the same classes in the same order, but train has "
            f"{', '.join(train.classes)} and {split} has {', '.join(other.classes)}: give both annotation files the "
            "same categories"
        )


def compare_splits(
    train: ImageDataset, val: ImageDataset, options: Data, unlabeled: ImageDataset | None = None
) -> list[str]:
    """Warnings about training and validation together, for what is legal but seldom intended.

    Copies that differ in their bytes are found only after `check` has decoded the images. Classes without a pixel are
    found only after it has read the masks.

    Raises:
        AcamkdError: A mask value has different palette colors in the two splits.
    """
    refuse(val.contradictions(train))
    warnings = _absent_classes(train, val)
    for kind, others in (("training", train), ("unlabeled", unlabeled)):
        if others is not None:
            warnings += _shared_images(val, "validation", others, kind)
    crop = options.augment.crop
    if crop is not None and isinstance(options.resize, tuple) and val.files:
        size = read_size(val.files[0])
        # A crop is taken from the original image and is then resized like a whole image.
        larger = math.sqrt(math.prod(size) / math.prod(crop))
        low, high = (larger * factor for factor in options.augment.scale or (1.0, 1.0))
        if not low / UNNOTICED <= 1 <= high * UNNOTICED:
            warnings.append(
                f"data.augment: training sees things {low:.2g} to {high:.2g} times as large as validation, where "
                f"{val.files[0].name}, {describe(size)}, is resized as a whole: make crop about as large as the "
                "images, or choose another scale"
            )
    return warnings


def compare_test(
    test: ImageDataset, train: ImageDataset, val: ImageDataset, unlabeled: ImageDataset | None = None
) -> list[str]:
    """Warnings about test images beside all others, as of `compare_splits`.

    Raises:
        AcamkdError: A mask value has other palette colors than in the training images.
    """
    refuse(test.contradictions(train))
    warnings = _unscored_classes(test, "test", train)
    for kind, others in (("training", train), ("validation", val), ("unlabeled", unlabeled)):
        if others is not None:
            warnings += _shared_images(test, "test", others, kind)
    return warnings


def _absent_classes(train: ImageDataset, val: ImageDataset) -> list[str]:
    """Warnings about classes that no image of a split contains."""
    warnings = []
    if missing := _absent(train):
        reason = train.why_absent(train.counts) if train.counts is not None else ""
        warnings.append(
            f"no training image has a {UNIT[train.TASK]} of {_some(missing, len(train.classes))}: the networks cannot "
            f"learn {'it' if len(missing) == 1 else 'them'}{reason and f'; {reason}'}"
        )
    return warnings + _unscored_classes(val, "validation", train)


def _unscored_classes(scored: ImageDataset, kind: str, train: ImageDataset) -> list[str]:
    untrained = _absent(train)
    missing = [name for name in _absent(scored) if name not in untrained]
    if not missing:
        return []
    return [
        f"no {kind} image has a {UNIT[scored.TASK]} of {_some(missing, len(scored.classes))}: the score says nothing "
        f"of {'it' if len(missing) == 1 else 'them'}"
    ]


def _absent(dataset: ImageDataset) -> list[str]:
    """Classes that no image contains, as far as the targets have been read."""
    counts = [] if dataset.counts is None else dataset.counts.tolist()
    return [name for name, count in zip(dataset.classes, counts, strict=False) if not count]


def _some(names: Sequence[str], of: int) -> str:
    if len(names) == 1:
        return f"the class {names[0]}"
    return f"{len(names)} of the {of} classes ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"


def _shared_images(scored: ImageDataset, own_kind: str, others: ImageDataset, kind: str) -> list[str]:
    """Scored images that also occur among the others: as the same file, the same bytes, or a near-duplicate."""
    warnings = []
    own, other = ([file.resolve() for file in dataset.files] for dataset in (scored, others))
    same = set(own) & set(other)
    copies = identical([file for file in own if file not in same], [file for file in other if file not in same])
    if same or copies:
        example = f" ({copies[0][0]} is {copies[0][1]})" if copies else ""
        warnings.append(
            f"{len(same) + len(copies)} of {len(scored)} {own_kind} images are {kind} images too{example}: scores on "
            "them say nothing of others"
        )
    if scored.hashes is not None and others.hashes is not None:
        known = same | {file for file, _ in copies}
        alike = [pair for pair in near_copies(scored.hashes, others.hashes) if own[pair[0]] not in known]
        if alike:
            first, second = scored.files[alike[0][0]], others.files[alike[0][1]]
            warnings.append(
                f"{len(alike)} of {len(scored)} {own_kind} images look like {kind} images ({first} like {second}): are "
                "they copies in another size or quality, or frames of one video?"
            )
    return warnings


def check_classes(given: Sequence[str] | None, own: Sequence[str], whose: str) -> None:
    """Raise AcamkdError if a recipe lists classes that differ from the data's own."""
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
    """The first problems, and the number of further ones."""
    more = len(problems) - LISTED_PROBLEMS
    return [*problems[:LISTED_PROBLEMS], *([f"... and {more} more"] if more > 0 else [])]


def describe(size: Sequence[int]) -> str:
    """(height, width) as text, `WIDTH x HEIGHT pixels`."""
    return f"{size[1]} x {size[0]} pixels"


def describe_shown(file: Path, size: PixelSize) -> str:
    """An image's size as text, with a note if EXIF rotates the image."""
    rotated = read_header(file)[1] >= 5
    return describe(size) + (" (rotated as its EXIF entry says)" if rotated else "")


def look_at(dataset: ImageDataset, index: int, *, decode: bool, count: bool = False) -> Look:
    """Check one image and, once its size is known, its target; see `examine`."""
    file = dataset.files[index]
    hashed = tally = None
    try:
        size, orientation = read_header(file)
        if decode:
            pixels = read_image(file)
            size, hashed = (pixels.shape[-2], pixels.shape[-1]), difference_hash(pixels)
        problems = dataset.inspect(index, size)
    except ImageError as error:
        return Look(None, [str(error)])
    if dataset.classes and not problems and (decode or count or dataset.TASK == "detection"):
        try:
            tally = dataset.tally(index, size)
        except ImageError as error:
            problems = [str(error)]
    return Look(size, problems, orientation, tally, hashed)
