"""Images with one mask of class ids each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors

from acamkd.config import Data, Split
from acamkd.data.checks import describe, twins
from acamkd.data.dataset import ImageDataset, SplitName, Transform
from acamkd.data.image_io import files_of, opened
from acamkd.errors import AcamkdError, ImageError
from acamkd.files import IMAGE_SUFFIXES
from acamkd.models.base import VOID, PixelSize, Target


class MaskDataset(ImageDataset):
    """Semantic segmentation: images and as many PNG masks, 8-bit gray or palette.

    Args:
        files: Images.
        masks: Their masks, in the same order.
        classes: Names of the ids 0..K-1.
        ids: Class id, or VOID, of each value that a mask may hold; None for 0..K-1 and VOID as they are.
        transform: Random changes.
        seed: Of the random changes.
    """

    TASK = "segmentation"

    def __init__(
        self,
        files: Sequence[Path],
        masks: Sequence[Path],
        classes: Sequence[str],
        *,
        ids: Mapping[int, int] | None = None,
        transform: Transform | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(files, masks, classes, transform=transform, seed=seed)
        self.ids = dict(ids) if ids is not None else {**{k: k for k in range(len(classes))}, VOID: VOID}
        self._table = torch.tensor([self.ids.get(value, -1) for value in range(256)])

    def target(self, index: int, size: PixelSize) -> Target:
        """`mask` (H, W) int64, VOID where nothing is known; a ImageError if it holds other values."""
        file = self.annotation_files[index]
        with _opened_mask(file) as image:
            values = _ids(image)
        mask = self._table[values.long()]
        if mask.min() < 0:
            raise ImageError(f"{file}: {self._unknown(torch.unique(values).tolist())}")
        return {"mask": tv_tensors.Mask(mask)}

    def inspect(self, index: int, size: PixelSize, *, decode: bool) -> list[str]:
        """The mask must have its image's size, one channel, and known ids only."""
        file = self.annotation_files[index]
        try:
            with _opened_mask(file) as image:
                mask_size = (image.height, image.width)
                values = torch.unique(_ids(image)).tolist() if decode else []
        except ImageError as error:
            return [str(error)]
        if mask_size != size:
            return [f"{file}: the mask has {describe(mask_size)}, but {self.files[index].name} has {describe(size)}"]
        return [f"{file}: {unknown}"] if (unknown := self._unknown(values)) else []

    def _unknown(self, values: Sequence[int]) -> str:
        """What is wrong with a mask's values; empty where nothing is."""
        unknown = [str(value) for value in values if value not in self.ids]
        if not unknown:
            return ""
        *most, last = sorted(self.ids)
        known = f"0 to {last}" if last == len(most) else f"{most[0]} to {most[-1]} and {last}"
        return (
            f"the mask holds {', '.join(unknown)}, but the values for the {len(self.classes)} classes and for void are "
            f"{known}"
        )


class MaskFolder(MaskDataset):
    """A folder of images and a folder of PNG masks of the same names.

    Args:
        images: Folder of images (jpg, jpeg, png, bmp, webp).
        masks: Folder of PNG masks whose values are class ids.
        classes: Names of the ids 0..K-1.
        ignore_index: Value of pixels that neither train nor count.
        transform: Random changes.
        seed: Of the random changes.

    Raises:
        AcamkdError: A folder cannot be read.
    """

    LAYOUT = ("images", "masks")
    SPLIT_KEYS = frozenset({"images", "masks"})
    BESIDE_IMAGES = "masks"
    NEEDS_CLASSES = True

    @classmethod
    def open_split(cls, data: Data, split: SplitName, *, transform: Transform | None, seed: int) -> MaskFolder:
        """Open one split of a recipe's `data`."""
        paths: Split = getattr(data, split)
        return cls(
            data.root / (paths.images or f"images/{paths.name}"),
            data.root / (paths.masks or f"masks/{paths.name}"),
            data.classes or (),
            ignore_index=data.ignore_index,
            transform=transform,
            seed=seed,
        )

    def __init__(
        self,
        images: Path,
        masks: Path,
        classes: Sequence[str],
        *,
        ignore_index: int = VOID,
        transform: Transform | None = None,
        seed: int = 0,
    ) -> None:
        files, by_stem = files_of(images, IMAGE_SUFFIXES), files_of(masks, (".png",))
        mask_of = {file.stem: file for file in by_stem}
        paired = [file for file in files if file.stem in mask_of]
        super().__init__(
            paired,
            [mask_of[file.stem] for file in paired],
            classes,
            ids={**{k: k for k in range(len(classes))}, ignore_index: VOID},
            transform=transform,
            seed=seed,
        )
        stems = {file.stem for file in files}
        if not files:
            self.problems.append(f"{images}: the folder holds no images ({', '.join(IMAGE_SUFFIXES)})")
        self.problems += [
            f"{file}: the image has no mask {masks / file.stem}.png" for file in files if file.stem not in mask_of
        ]
        self.problems += [f"{file}: the mask has no image in {images}" for file in by_stem if file.stem not in stems]
        self.problems += twins(files, "mask")

    def _unknown(self, values: Sequence[int]) -> str:
        text = super()._unknown(values)
        among = any(self.ids[k] == VOID for k in range(len(self.classes)))
        hint = "; a void that is one of the values from 0 on is listed in data.classes too" if among else ""
        return text and f"{text} (data.ignore_index says what void is{hint})"


def _ids(mask: Image.Image) -> Tensor:
    """(H, W) uint8, values as stored; a palette's colors do not matter."""
    return torch.from_numpy(np.array(mask, dtype=np.uint8))


@contextmanager
def _opened_mask(file: Path) -> Iterator[Image.Image]:
    """A mask whose mode can hold class ids; raises as `opened` does."""
    with opened(file, "mask") as image:
        if image.mode not in ("1", "L", "P"):
            raise AcamkdError(
                f"it is of mode {image.mode}; save class ids, as 8-bit gray or with a palette, not colors or 16 bits"
            )
        yield image
