"""Subsets of a data set, for a share of the training images that serves as validation images."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from acamkd.data.dataset import ImageDataset, Transform, seed_of
from acamkd.errors import AcamkdError
from acamkd.models.base import PixelSize, Target


class Part(ImageDataset):
    """A subset of another data set, which reads the targets.

    Args:
        whole: The data set, without augmentation.
        rows: Indices of the subset's images, in ascending order.
        transform: Augmentation.
        seed: Seed of the augmentation.
    """

    def __init__(
        self, whole: ImageDataset, rows: Sequence[int], *, transform: Transform | None = None, seed: int = 0
    ) -> None:
        files = [whole.files[row] for row in rows]
        super().__init__(files, whole.annotation_files, whole.classes, transform=transform, seed=seed)
        self.TASK = whole.TASK
        self.KNOWS_SIZES = whole.KNOWS_SIZES
        self.whole = whole
        self.rows = list(rows)
        self.problems = list(whole.problems)
        if whole.groups is not None:
            group_of = np.repeat(np.arange(len(whole.groups)), whole.groups)
            self.groups = np.bincount(group_of[self.rows], minlength=len(whole.groups)).tolist()

    def target(self, index: int, size: PixelSize) -> Target:
        """Target of the image in the whole data set."""
        return self.whole.target(self.rows[index], size)

    def inspect(self, index: int, size: PixelSize) -> list[str]:
        """Problems of the image in the whole data set."""
        return self.whole.inspect(self.rows[index], size)

    def tally(self, index: int, size: PixelSize) -> Tensor:
        """Tally of the image in the whole data set."""
        return self.whole.tally(self.rows[index], size)

    def contradictions(self, other: ImageDataset) -> list[str]:
        """Problems between the whole data sets."""
        return self.whole.contradictions(other.whole if isinstance(other, Part) else other)

    def why_absent(self, counts: Tensor) -> str:
        """Reason given by the whole data set."""
        return self.whole.why_absent(counts)


def draw_share(files: Sequence[Path], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Split images into those that stay and those that are drawn, by their names and a seed.

    Names are paths below the images' common folder, so that neither the location of the data nor the order of the files
    matters. Images that are added later seldom move others from one side to the other.

    Args:
        files: Images; duplicates in the list stay on one side.
        share: Between 0 and 1; at least one image is drawn, and at least one stays.
        seed: Of the drawing.

    Raises:
        AcamkdError: There are fewer than two different images.
    """
    if len(set(files)) < 2:
        raise AcamkdError(f"data.val.share: {len(set(files))} images cannot be divided into training and validation")
    common = os.path.commonpath([file.parent.absolute() for file in files])
    names = [unicodedata.normalize("NFC", file.absolute().relative_to(common).as_posix()) for file in files]
    order = sorted(set(names), key=lambda name: seed_of("share", seed, name))
    count = min(max(1, round(share * len(order))), len(order) - 1)
    drawn = set(order[:count])
    return [k for k, name in enumerate(names) if name not in drawn], [
        k for k, name in enumerate(names) if name in drawn
    ]
