"""Pictures with one mask of class ids each."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors

from acamkd.data.base import PictureDataset, Transform, describe
from acamkd.errors import AcamkdError
from acamkd.models.base import VOID, PixelSize, Target

PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


class MaskFolder(PictureDataset):
    """Semantic segmentation: a folder of pictures and a folder of PNG masks of the same names.

    Args:
        images: Folder of pictures (jpg, jpeg, png, bmp, webp).
        masks: Folder of PNG masks, 8-bit grey or palette, whose values are class ids.
        classes: Names of the ids 0..K-1.
        ignore_index: Value of pixels that neither train nor count.
        transform: Random changes.
        seed: Of the random changes.

    Raises:
        AcamkdError: A folder cannot be read.
    """

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
        pictures, by_stem = _files(images, PICTURES), _files(masks, (".png",))
        mask_of = {file.stem: file for file in by_stem}
        paired = [file for file in pictures if file.stem in mask_of]
        super().__init__(paired, [mask_of[file.stem] for file in paired], classes, transform=transform, seed=seed)
        self.ignore_index = ignore_index
        stems = {file.stem for file in pictures}
        if not pictures:
            self.problems.append(f"{images}: the folder holds no pictures ({', '.join(PICTURES)})")
        self.problems += [
            f"{file}: the picture has no mask {masks / file.stem}.png" for file in pictures if file.stem not in mask_of
        ]
        self.problems += [f"{file}: the mask has no picture in {images}" for file in by_stem if file.stem not in stems]
        for one, other in pairwise(pictures):
            if one.stem == other.stem:
                self.problems.append(f"{other}: the picture has the same name as {one.name}, and so the same mask")

    def target(self, index: int, size: PixelSize) -> Target:
        """`mask` (H, W) int64, VOID where the file has `ignore_index`."""
        mask = _read_mask(self.annotation_files[index]).long()
        return {"mask": tv_tensors.Mask(mask.masked_fill_(mask == self.ignore_index, VOID))}

    def inspect(self, index: int, size: PixelSize, *, decode: bool) -> list[str]:
        """The mask must have its picture's size, one channel, and known ids only."""
        file = self.annotation_files[index]
        try:
            with Image.open(file) as image:
                _require_ids(image)
                mask_size = (image.height, image.width)
            ids = torch.unique(_read_mask(file)).tolist() if decode else []
        except Exception as error:  # decoders of broken files raise whatever they meet first
            return [f"{file}: the mask cannot be read: {error}"]
        if mask_size != size:
            return [f"{file}: the mask has {describe(mask_size)}, but {self.files[index].name} has {describe(size)}"]
        unknown = [str(value) for value in ids if value >= len(self.classes) and value != self.ignore_index]
        if unknown:
            return [
                f"{file}: the mask holds {', '.join(unknown)}, but the ids of the {len(self.classes)} classes end at "
                f"{len(self.classes) - 1} and ignore_index is {self.ignore_index}"
            ]
        return []


def _files(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """Visible files of these types in one folder, in the order of their stems."""
    try:
        entries = list(folder.iterdir())
    except OSError as error:
        raise AcamkdError(f"cannot read the folder {folder}: {error.strerror}") from error
    chosen = [file for file in entries if file.suffix.lower() in suffixes and not file.name.startswith(".")]
    return sorted(chosen, key=lambda file: (file.stem, file.suffix))


def _read_mask(file: Path) -> Tensor:
    """(H, W) uint8, values as stored; a palette's colours do not matter."""
    with Image.open(file) as image:
        _require_ids(image)
        return torch.from_numpy(np.array(image, dtype=np.uint8))


def _require_ids(image: Image.Image) -> None:
    if image.mode not in ("1", "L", "P"):
        raise AcamkdError(f"it is of mode {image.mode}; save class ids, as 8-bit grey or with a palette, not colours")
