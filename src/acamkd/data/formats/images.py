"""Images without labels, for pretraining alone."""

from __future__ import annotations

from acamkd.config import Data
from acamkd.data.dataset import SplitName, Transform
from acamkd.data.unlabeled import UnlabeledImages
from acamkd.errors import AcamkdError
from acamkd.models.base import Task


class _Images(UnlabeledImages):
    """A folder of images, with the folders below it."""

    SPLIT_KEYS = frozenset({"images"})
    TASK: Task

    @classmethod
    def open_split(cls, data: Data, split: SplitName, *, transform: Transform | None, seed: int) -> _Images:
        """Open one split; raises AcamkdError if its folder cannot be read."""
        folder = (data.train if split == "train" else data.val).images
        if folder is None:
            other = "" if split == "train" else ", or a share of the training images (val: 0.1)"
            raise AcamkdError(f"data.{split}.images is missing: data.format images needs a folder of images{other}")
        return cls(data.root / folder, cls.TASK, transform=transform, seed=seed)


class DetectionImages(_Images):
    """Without boxes."""

    TASK = "detection"


class SegmentationImages(_Images):
    """With nothing but void."""

    TASK = "segmentation"
