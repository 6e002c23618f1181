"""Cityscapes: street scenes with fine masks, in the folder layout of its archives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from acamkd.config import Data
from acamkd.data.checks import check_classes
from acamkd.data.dataset import SplitName, Transform
from acamkd.data.folders import Folder
from acamkd.data.formats.masks import MaskDataset
from acamkd.errors import AcamkdError
from acamkd.models.base import VOID

TRAINED = {
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light",
    20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car", 27: "truck",
    28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle",
}  # fmt: skip
"""Value in labelIds masks -> name, of the 19 classes that count; their order is that of the train ids."""

CLASSES = tuple(TRAINED.values())

LABEL_IDS = {
    **dict.fromkeys(range(34), VOID),
    **{label: train for train, label in enumerate(TRAINED)},
    VOID: VOID,  # -1, the license plate, in 8 bits
}
"""Value in labelIds masks -> train id."""

IMAGE, TRAIN_IDS, IDS = "_leftImg8bit.png", "_gtFine_labelTrainIds.png", "_gtFine_labelIds.png"


class Cityscapes(MaskDataset):
    """Semantic segmentation of `leftImg8bit/SPLIT/CITY/*` by `gtFine/SPLIT/CITY/*`.

    If every image has a mask of train ids, as made by Cityscapes' own scripts, these masks are used. Otherwise the
    masks of label ids are mapped to train ids. Images with only coarse masks cannot be used.

    Args:
        root: Folder with `leftImg8bit` and `gtFine`.
        split: `train`, `val` or another folder in both.
        classes: None, or the names of the 19 classes.
        transform: Augmentation.
        seed: Seed of the augmentation.

    Raises:
        AcamkdError: The split has no folder, or `classes` differs from the 19 classes.
    """

    LAYOUT = ("leftImg8bit", "gtFine")
    FIXED_CLASSES = CLASSES

    @classmethod
    def open_split(cls, data: Data, split: SplitName, *, transform: Transform | None, seed: int) -> Cityscapes:
        """Open one split of a recipe's `data`."""
        return cls(data.root, getattr(data, split).name, classes=data.classes, transform=transform, seed=seed)

    def __init__(
        self,
        root: Path,
        split: str,
        *,
        classes: Sequence[str] | None = None,
        transform: Transform | None = None,
        seed: int = 0,
    ) -> None:
        check_classes(classes, CLASSES, "the classes of Cityscapes")
        images, fine = root / "leftImg8bit" / split, root / "gtFine" / split
        for folder in (images, fine):
            if not folder.is_dir():
                coarse = root / "gtCoarse" / split
                advice = f"; {coarse} is there, but coarse masks are not read" if coarse.is_dir() else ""
                raise AcamkdError(f"cannot read the folder {folder}: there is no such folder{advice}")
        frames, labels = Folder(images), Folder(fine, (".png",))
        files = [file for file in frames.files if file.name.casefold().endswith(IMAGE.casefold())]

        def masks(suffix: str) -> list[Path]:
            names = [frames.name(file)[: -len(Path(IMAGE).stem)] for file in files]
            return [labels.find(name + suffix) or fine / (name + suffix) for name in names]

        ready = bool(files) and all(mask.is_file() for mask in masks(TRAIN_IDS))
        super().__init__(
            files,
            masks(TRAIN_IDS if ready else IDS),
            CLASSES,
            ids=None if ready else LABEL_IDS,
            transform=transform,
            seed=seed,
        )
        if not files:
            self.problems.append(f"{images}: the folder holds no images CITY/*{IMAGE}")
        elif left_out := len(frames.files) + len(frames.left_out) - len(files):
            self.warnings.append(f"{images}: {left_out} images are left out, since their names do not end in {IMAGE}")
