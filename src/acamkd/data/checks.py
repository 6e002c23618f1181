"""What is looked at before images are used, and how problems are told."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from acamkd.config import Data
from acamkd.data.dataset import ImageDataset
from acamkd.data.image_io import read_image, read_size
from acamkd.errors import AcamkdError, ImageError
from acamkd.models.base import PixelSize

log = logging.getLogger(__name__)

UNNOTICED = 1.25
"""By this factor training and validation may differ in scale without a warning."""

LISTED_PROBLEMS = 10
"""An error lists this many problems and counts the others."""


def check(dataset: ImageDataset, mode: Literal["full", "headers"]) -> list[str]:
    """Look at every image and target before they are used.

    Args:
        dataset: What `build` returned.
        mode: `full` decodes every image and mask, `headers` only reads their sizes.

    Returns:
        Warnings: what is legitimate but worth knowing.

    Raises:
        AcamkdError: Something cannot be used; lists the first problems with file and entry, and counts them all.
    """
    log.info("checking %d images (%s)", len(dataset), mode)
    with ThreadPoolExecutor() as pool:  # decoders release the interpreter's lock
        looks = pool.map(partial(look_at, dataset, decode=mode == "full"), range(len(dataset)))
        refuse([*dataset.problems, *(problem for _, problems in looks for problem in problems)])
    return list(dataset.warnings)


def check_same_classes(train: ImageDataset, val: ImageDataset) -> None:
    """Raise AcamkdError unless label k means the same in both splits."""
    if train.classes != val.classes:
        raise AcamkdError(
            f"train and val must list the same classes in the same order, but train has {', '.join(train.classes)} "
            f"and val has {', '.join(val.classes)}: give both annotation files the same categories"
        )


def compare_splits(
    train: ImageDataset, val: ImageDataset, options: Data, unlabeled: ImageDataset | None = None
) -> list[str]:
    """What is legitimate, but seldom meant, of training and validation together."""
    warnings = []
    scored = {file.resolve() for file in val.files}
    for kind, others in (("training", train), ("unlabelled", unlabeled)):
        if others is not None and (shared := scored & {file.resolve() for file in others.files}):
            warnings.append(
                f"{len(shared)} of {len(val)} validation images are {kind} images too: scores on them say nothing "
                "of others"
            )
    crop = options.augment.crop
    if crop is not None and isinstance(options.resize, tuple) and val.files:
        size = read_size(val.files[0])
        # A crop is of the image as it lies on disk, and is then resized as a whole image is.
        larger = math.sqrt(math.prod(size) / math.prod(crop))
        low, high = (larger * factor for factor in options.augment.scale or (1.0, 1.0))
        if not low / UNNOTICED <= 1 <= high * UNNOTICED:
            warnings.append(
                f"data.augment: training sees things {low:.2g} to {high:.2g} times as large as validation, where "
                f"{val.files[0].name}, {describe(size)}, is resized as a whole: make crop about as large as the "
                "images, or choose another scale"
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


def twins(images: Sequence[Path], what: str) -> list[str]:
    """Problems of images, as `files_of` lists them, that differ in their suffix alone and so share `what`."""
    return [
        f"{other}: the image has the same name as {one.name}, and so the same {what}"
        for one, other in pairwise(images)
        if one.stem == other.stem
    ]


def describe(size: Sequence[int]) -> str:
    """(height, width) in the order and words that users know."""
    return f"{size[1]} x {size[0]} pixels"


def look_at(dataset: ImageDataset, index: int, *, decode: bool) -> tuple[PixelSize | None, list[str]]:
    """One image's size, and what is wrong with it or, now that its size is known, with its target."""
    file = dataset.files[index]
    size: Any
    try:
        size = read_image(file).shape[-2:] if decode else read_size(file)
    except ImageError as error:
        return None, [str(error)]
    return tuple(size), dataset.inspect(index, tuple(size), decode=decode)
