"""Some images of a data set: how a share of the training images becomes the validation images."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from acamkd.data.dataset import ImageDataset, Transform, seed_of
from acamkd.errors import AcamkdError
from acamkd.models.base import PixelSize, Target


class Part(ImageDataset):
    """Some images of another data set, which reads their targets.

    Args:
        whole: The data set, without random changes.
        rows: Which of its images.
        transform: Random changes.
        seed: Of the random changes.
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

    def target(self, index: int, size: PixelSize) -> Target:
        """As of the whole."""
        return self.whole.target(self.rows[index], size)

    def inspect(self, index: int, size: PixelSize) -> list[str]:
        """As of the whole."""
        return self.whole.inspect(self.rows[index], size)

    def tally(self, index: int, size: PixelSize) -> Tensor:
        """As of the whole."""
        return self.whole.tally(self.rows[index], size)

    def contradictions(self, other: ImageDataset) -> list[str]:
        """As of the wholes."""
        return self.whole.contradictions(other.whole if isinstance(other, Part) else other)

    def why_absent(self, counts: Tensor) -> str:
        """As of the whole."""
        return self.whole.why_absent(counts)


def draw_share(files: Sequence[Path], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of the images that stay, and of those that are drawn, which a function of names and seed decides.

    Names are paths below the folder that all images share, so that neither the place of the data nor the order of the
    files matters, and further images seldom move one from side to side.

    Args:
        files: Images; what is listed twice goes to one side.
        share: Between 0 and 1; one image at least is drawn, and one stays.
        seed: Of the drawing.

    Raises:
        AcamkdError: There are fewer than two images.
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
