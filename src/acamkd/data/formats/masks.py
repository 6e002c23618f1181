"""Images with one mask of class ids each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors

from acamkd.config import Data, Split, parse_mask_value
from acamkd.data.checks import describe, describe_shown
from acamkd.data.dataset import ImageDataset, SplitName, Transform
from acamkd.data.folders import Folder, no_images, twins
from acamkd.data.image_io import opened
from acamkd.errors import AcamkdError, ImageError, nearest
from acamkd.models.base import VOID, PixelSize, Target

MASK_SUFFIXES = (".png", ".bmp", ".tif", ".tiff")
"""Endings of masks: types that keep every value."""

SHOWN = 8
"""Values that an error lists."""

Color: TypeAlias = tuple[int, int, int]


class MaskDataset(ImageDataset):
    """Semantic segmentation: images and as many masks, 8-bit gray, with a palette, or of colors.

    Args:
        files: Images.
        masks: Their masks, in the same order.
        classes: Names of the ids 0..K-1.
        ids: Class id, or VOID, of each value that a mask may hold: numbers, which are gray levels or a palette's
            indices, or colors (red, green, blue), whatever mode the masks have. None for 0..K-1 and VOID as they are.
        same_palette: Refuse masks whose palettes give one value different colors, since its meaning cannot be the same.
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
        ids: Mapping[int, int] | Mapping[Color, int] | None = None,
        same_palette: bool = True,
        transform: Transform | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(files, masks, classes, transform=transform, seed=seed)
        given = ids if ids is not None else {**{k: k for k in range(len(classes))}, VOID: VOID}
        self.by_color = any(isinstance(value, tuple) for value in given)
        self.ids = {_code(value): label for value, label in given.items()}
        self.same_palette = same_palette
        self.palette: dict[int, tuple[Color, Path]] = {}
        """Of each value that a palette mask holds: its color, and the first mask that says so."""
        codes = sorted(self.ids)
        self._codes = torch.tensor(codes)
        self._labels = torch.tensor([self.ids[code] for code in codes])
        self._table = torch.tensor([self.ids.get(value, -1) for value in range(256)])

    def target(self, index: int, size: PixelSize) -> Target:
        """`mask` (H, W) int64, VOID where nothing is known; a ImageError if it holds other values."""
        file = self.annotation_files[index]
        with self._opened(file) as image:
            values = self._values(image)
        if self.by_color:
            place = torch.searchsorted(self._codes, values).clamp_(max=len(self._codes) - 1)
            mask = self._labels[place].masked_fill_(self._codes[place] != values, -1)
        else:
            mask = self._table[values]
        if mask.min() < 0:
            raise ImageError(f"{file}: {self._unknown(torch.unique(values).tolist())}")
        return {"mask": tv_tensors.Mask(mask)}

    def tally(self, index: int, size: PixelSize) -> Tensor:
        """As of every data set; raises ImageError, too, where a palette contradicts that of another mask."""
        counts = super().tally(index, size)
        file = self.annotation_files[index]
        if self.same_palette and not self.by_color:
            with self._opened(file) as image:
                colors = _used_colors(image)
            for value, color in colors.items():
                other, first = self.palette.setdefault(value, (color, file))
                if color != other:
                    raise ImageError(contradiction(value, color, file, other, first))
        return counts

    def inspect(self, index: int, size: PixelSize) -> list[str]:
        """The mask must have its image's size and a mode that can hold ids."""
        file = self.annotation_files[index]
        try:
            with self._opened(file) as image:
                mask_size = (image.height, image.width)
        except ImageError as error:
            return [str(error)]
        if mask_size == size:
            return []
        shown = describe_shown(self.files[index], size)
        return [f"{file}: the mask has {describe(mask_size)}, but {self.files[index].name} has {shown}"]

    def contradictions(self, other: ImageDataset) -> list[str]:
        """Values whose colors differ between the palettes of two splits."""
        known = other.palette if isinstance(other, MaskDataset) else {}
        return [
            contradiction(value, color, file, *known[value])
            for value, (color, file) in self.palette.items()
            if value in known and known[value][0] != color
        ]

    def why_absent(self, counts: Tensor) -> str:
        """Whether another reading of the values would give the classes their pixels."""
        present, void = counts[:-1] > 0, bool(counts[-1])
        voids = [code for code, label in self.ids.items() if label == VOID]
        if void and present.sum() <= 1 and not self.by_color:
            meant = "{0: " + self.classes[0] + f", {voids[0]}: {self.classes[-1]}" + "}"
            return (
                f"the other pixels have the value {voids[0]}, which is void: if it is a class, say so with "
                f"data.mask_values: {meant}"
            )
        if not present[0] and present[1:].any():
            return "if the masks' values begin with 1, say what they mean with data.mask_values: {1: NAME, ...}"
        return (
            "class k of data.classes is value k of the masks, whatever color a palette gives it; data.mask_values says "
            "otherwise"
        )

    def _values(self, mask: Image.Image) -> Tensor:
        """(H, W) int64: values as stored, or codes of the colors."""
        if not self.by_color:
            return torch.from_numpy(np.array(mask, dtype=np.uint8)).long()
        red, green, blue = torch.from_numpy(np.array(mask.convert("RGB"), dtype=np.int64)).unbind(-1)
        return (red << 16) + (green << 8) + blue

    def _unknown(self, values: Sequence[int]) -> str:
        """What is wrong with a mask's values; empty where nothing is."""
        unknown = [self._written(value) for value in values if value not in self.ids]
        if not unknown:
            return ""
        if len(unknown) > SHOWN:
            unknown[SHOWN:] = [f"{len(unknown) - SHOWN} more"]
        *most, last = sorted(self.ids)
        if most == list(range(len(most))):
            known = f"0 to {last}" if last == len(most) else f"{most[0]} to {most[-1]} and {last}"
        else:
            known = ", ".join(map(self._written, [*most, last]))
        return (
            f"the mask holds {', '.join(unknown)}, but the values for the {len(self.classes)} classes and for void are "
            f"{known}{self._advice(values)}"
        )

    def _advice(self, values: Sequence[int]) -> str:
        """What to do about values that are unknown."""
        return ""

    def _written(self, code: int) -> str:
        return f"#{code:06x}" if self.by_color else str(code)

    @contextmanager
    def _opened(self, file: Path) -> Iterator[Image.Image]:
        """A mask whose mode can hold what its values mean; raises as `opened` does."""
        with opened(file, "mask") as image:
            allowed = ("1", "L", "P", "RGB", "RGBA", "LA", "PA") if self.by_color else ("1", "L", "P")
            if image.mode not in allowed:
                wanted = (
                    "colors of 8 bits per channel"
                    if self.by_color
                    else "class ids, as 8-bit gray or with a palette, not colors or 16 bits, or say which color is "
                    "which class with data.mask_values"
                )
                raise AcamkdError(f"it is of mode {image.mode}; save {wanted}")
            yield image


def contradiction(value: int, color: Color, file: Path, other: Color, first: Path) -> str:
    """What is wrong where two palettes give one value different colors."""
    return (
        f"{file}: the palette's color {value} is #{_code(color):06x}, but #{_code(other):06x} in {first}: the values "
        "cannot mean the same class in both; say with data.mask_values which color is which class, or, where the "
        "values are right and the colors are not, which value is"
    )


def mask_ids(data: Data, classes: Sequence[str]) -> Mapping[int, int] | Mapping[Color, int] | None:
    """What `data.mask_values` says, as MaskDataset takes it; None where a recipe says nothing.

    Raises:
        AcamkdError: A class has no value, or a value's class is unknown.
    """
    if data.mask_values is None:
        return None
    ids: dict[int, int] = {}
    colors: dict[Color, int] = {}
    for value, name in data.mask_values.items():
        if name is None or (name == "void" and name not in classes):
            label = VOID
        elif name in classes:
            label = list(classes).index(str(name))
        elif isinstance(name, int) and 0 <= name < len(classes):
            label = name
        else:
            raise AcamkdError(
                f"data.mask_values: {value} is {name!r}, which is no class; {nearest(str(name), [*classes, 'void'])}"
            )
        parsed = parse_mask_value(value)
        if isinstance(parsed, int):
            ids[parsed] = label
        else:
            colors[parsed] = label
    if missing := [name for k, name in enumerate(classes) if k not in {*ids.values(), *colors.values()}]:
        raise AcamkdError(f"data.mask_values names no value for {', '.join(missing)}, which data.classes lists")
    return colors or {data.ignore_index: VOID, **ids}


class MaskFolder(MaskDataset):
    """A folder of images and a folder of masks of the same names, with all folders in them; see Folder on names.

    Args:
        images: Folder of images.
        masks: Folder of masks (png, bmp, tif) whose values are class ids.
        classes: Names of the ids 0..K-1.
        ignore_index: Value of pixels that neither train nor count.
        ids: What values mean, in place of both; see MaskDataset.
        transform: Random changes.
        seed: Of the random changes.

    Raises:
        AcamkdError: A folder cannot be read.
    """

    LAYOUT = ("images", "masks")
    SPLIT_KEYS = frozenset({"images", "masks"})
    BESIDE_IMAGES = "masks"
    NEEDS_CLASSES = True
    READS_MASK_VALUES = True

    @classmethod
    def open_split(cls, data: Data, split: SplitName, *, transform: Transform | None, seed: int) -> MaskFolder:
        """Open one split of a recipe's `data`."""
        paths: Split = getattr(data, split)
        return cls(
            data.root / (paths.images or f"images/{paths.name}"),
            data.root / (paths.masks or f"masks/{paths.name}"),
            data.classes or (),
            ignore_index=data.ignore_index,
            ids=mask_ids(data, data.classes or ()),
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
        ids: Mapping[int, int] | Mapping[Color, int] | None = None,
        transform: Transform | None = None,
        seed: int = 0,
    ) -> None:
        folder = Folder(images, without=[masks])
        inside = Folder(masks, MASK_SUFFIXES)
        pairs = [(file, inside.find(folder.name(file))) for file in folder.files]
        super().__init__(
            [file for file, mask in pairs if mask is not None],
            [mask for _, mask in pairs if mask is not None],
            classes,
            ids=ids if ids is not None else {**{k: k for k in range(len(classes))}, ignore_index: VOID},
            same_palette=ids is None,
            transform=transform,
            seed=seed,
        )
        self.problems += no_images(folder)
        lossy = {file.stem for file in inside.left_out}
        for file, mask in pairs:
            if mask is None:
                name = f"{masks / folder.name(file)}.png"
                advice = "; its type changes values, save it as PNG" if file.stem in lossy else ""
                self.problems.append(f"{file}: the image has no mask {name}{advice}")
        used = set(self.annotation_files)
        self.problems += [f"{file}: the mask has no image in {images}" for file in inside.files if file not in used]
        self.problems += twins(folder, "mask")
        self.warnings += folder.described_left_out()

    def _advice(self, values: Sequence[int]) -> str:
        hints = ["data.ignore_index says what void is, and data.mask_values what other values mean"]
        if any(self.ids.get(k) == VOID for k in range(len(self.classes))):
            hints.append("a void that is one of the values from 0 on is listed in data.classes too")
        elif 0 not in values and len(self.classes) in values and not self.by_color:
            hints.append("do the values begin with 1?")
        return f" ({'; '.join(hints)})"


def _code(value: int | Color) -> int:
    """A color as one number, 0xRRGGBB; a value as it is."""
    return value if isinstance(value, int) else (value[0] << 16) + (value[1] << 8) + value[2]


def _used_colors(mask: Image.Image) -> dict[int, Color]:
    """The colors of the values that a palette mask holds; none where it has no palette."""
    if mask.mode != "P" or mask.palette is None:
        return {}
    palette = mask.getpalette("RGB") or []
    used = [value for value, count in enumerate(mask.histogram()) if count]
    return {v: (palette[3 * v], palette[3 * v + 1], palette[3 * v + 2]) for v in used if 3 * v + 2 < len(palette)}
