"""Images with one mask of class ids each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image, ImageFile
from torch import Tensor
from torchvision import tv_tensors

from acamkd.config import Data, Split, parse_mask_value
from acamkd.data.checks import describe, describe_shown
from acamkd.data.dataset import ImageDataset, SplitName, Transform
from acamkd.data.folders import Folder, existing, no_images, twins
from acamkd.data.image_io import opened, stored_values
from acamkd.errors import AcamkdError, ImageError, nearest
from acamkd.models.base import VOID, PixelSize, Target

MASK_SUFFIXES = (".png", ".bmp", ".tif", ".tiff")
"""Suffixes of masks: lossless file types."""

SHOWN = 8
"""Number of values that an error lists."""

Color: TypeAlias = tuple[int, int, int]


class MaskDataset(ImageDataset):
    """Semantic segmentation: one mask per image, 8-bit gray, with a palette, or in color.

    Args:
        files: Images.
        masks: Their masks, in the same order.
        classes: Names of the ids 0..K-1.
        ignore_index: Value of pixels that are ignored in training and evaluation.
        ids: Class id, or VOID, of each value that a mask may hold. Values are gray levels or palette indices, or colors
            (red, green, blue) whatever the masks' mode is. None means 0..K-1, unchanged, and `ignore_index`.
        same_palette: Refuse masks whose palettes give one value different colors, since its class would be ambiguous.
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
        ignore_index: int = VOID,
        ids: Mapping[int, int] | Mapping[Color, int] | None = None,
        same_palette: bool = True,
        transform: Transform | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(files, masks, classes, transform=transform, seed=seed)
        given = ids if ids is not None else {**{k: k for k in range(len(classes))}, ignore_index: VOID}
        self.by_default = ids is None
        self.by_color = any(isinstance(value, tuple) for value in given)
        self.ids = {_code(value): label for value, label in given.items()}
        self.same_palette = same_palette
        self.palette: dict[int, tuple[Color, Path]] = {}
        """Palette color of each value in use, with the first mask that defines it."""
        codes = sorted(self.ids)
        self._codes = torch.tensor(codes)
        self._labels = torch.tensor([self.ids[code] for code in codes])
        self._table = torch.tensor([self.ids.get(value, -1) for value in range(256)])

    def target(self, index: int, size: PixelSize) -> Target:
        """`mask` (H, W) int64, VOID where unlabeled; raises ImageError if it holds other values."""
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
        """See ImageDataset; also raises ImageError if a palette contradicts that of another mask."""
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
        """Check that the mask has its image's size and a mode that can hold ids."""
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
        """Problems of values whose palette colors differ between two splits."""
        known = other.palette if isinstance(other, MaskDataset) else {}
        return [
            contradiction(value, color, file, *known[value])
            for value, (color, file) in self.palette.items()
            if value in known and known[value][0] != color
        ]

    def why_absent(self, counts: Tensor) -> str:
        """Advice on `data.mask_values` for classes without pixels."""
        if not self.by_default or "mask_values" not in self.DATA_KEYS:
            return ""
        present, void = counts[:-1] > 0, bool(counts[-1])
        voids = [code for code, label in self.ids.items() if label == VOID]
        if void and voids[0] < len(self.classes):
            name = self.classes[voids[0]]
            return f"the value {voids[0]} is void, as data.ignore_index says, and so no pixel is {name}"
        if void and not present[1:].any():
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

    def _values(self, mask: ImageFile.ImageFile) -> Tensor:
        """(H, W) int64: values as stored, or codes of the colors."""
        if not self.by_color:
            return torch.from_numpy(stored_values(mask)).long()
        red, green, blue = torch.from_numpy(np.array(mask.convert("RGB"), dtype=np.int64)).unbind(-1)
        return (red << 16) + (green << 8) + blue

    def _unknown(self, values: Sequence[int]) -> str:
        """Describe invalid values of a mask; empty if all are valid."""
        unknown = [self._written(value) for value in values if value not in self.ids]
        if not unknown:
            return ""
        if len(unknown) > SHOWN:
            unknown[SHOWN:] = [f"{len(unknown) - SHOWN} more"]
        *most, last = sorted(self.ids)
        if most == list(range(len(most))) and len(most) > 1 and not self.by_color:
            known = f"0 to {last}" if last == len(most) else f"{most[0]} to {most[-1]} and {last}"
        else:
            known = ", ".join(map(self._written, [*most, last]))
        return (
            f"the mask holds {', '.join(unknown)}, but the values for the {len(self.classes)} classes and for void are "
            f"{known}{self._advice(values)}"
        )

    def _advice(self, values: Sequence[int]) -> str:
        """Advice on unknown values."""
        return ""

    def _written(self, code: int) -> str:
        return f"#{code:06x}" if self.by_color else str(code)

    @contextmanager
    def _opened(self, file: Path) -> Iterator[ImageFile.ImageFile]:
        """Open a mask and check its mode; raises as `opened` does."""
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
    """Describe a value with different colors in two palettes."""
    return (
        f"{file}: the palette's color {value} is #{_code(color):06x}, but #{_code(other):06x} in {first}: the values "
        "cannot mean the same class in both; say with data.mask_values which color is which class, or, where the "
        "values are right and the colors are not, which value is"
    )


def mask_ids(data: Data, classes: Sequence[str]) -> Mapping[int, int] | Mapping[Color, int] | None:
    """Convert `data.mask_values` to the `ids` of MaskDataset; None if the recipe does not set it.

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
    """A folder of images and a folder of masks with the same names, including the folders below; see Folder on names.

    Args:
        images: Folder of images.
        masks: Folder of masks (png, bmp, tif) whose values are class ids.
        classes: Names of the ids 0..K-1.
        ignore_index: Value of pixels that are ignored in training and evaluation.
        ids: Meaning of the values, instead of `classes` order and `ignore_index`; see MaskDataset.
        transform: Random changes.
        seed: Of the random changes.

    Raises:
        AcamkdError: A folder cannot be read.
    """

    LAYOUT = ("images", "masks")
    SPLIT_KEYS = frozenset({"images", "masks"})
    BESIDE_IMAGES = "masks"
    NEEDS_CLASSES = True
    DATA_KEYS = frozenset({"ignore_index", "mask_values"})

    @classmethod
    def open_split(cls, data: Data, split: SplitName, *, transform: Transform | None, seed: int) -> MaskFolder:
        """Open one split of a recipe's `data`."""
        paths: Split = getattr(data, split)
        images = data.root / (paths.images or f"images/{paths.name}")
        if not images.is_dir():
            raise AcamkdError(
                f"cannot read the folder {images}: data.train and data.val name a split's folders with {{images: ..., "
                "masks: ...}, and data.val: {share: 0.2} draws validation images"
            )
        return cls(
            images,
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
        if existing(images).resolve() == existing(masks).resolve():
            raise AcamkdError(f"{images}: images and masks are in one folder, where each would be both: give them two")
        folder = Folder(images, without=[masks])
        inside = Folder(masks, MASK_SUFFIXES)
        pairs = [(file, inside.find(folder.name(file))) for file in folder.files]
        super().__init__(
            [file for file, mask in pairs if mask is not None],
            [mask for _, mask in pairs if mask is not None],
            classes,
            ignore_index=ignore_index,
            ids=ids,
            same_palette=ids is None,
            transform=transform,
            seed=seed,
        )
        self.problems += no_images(folder)
        lossy = {file.stem: file.suffix for file in inside.left_out}
        used = set(self.annotation_files)
        if pairs and inside.files and not used:
            self.problems.append(
                f"no mask has the name of an image ({folder.name(pairs[0][0])} and {inside.name(inside.files[0])}, "
                f"for example, in {images} and {masks}): give each mask the name of its image"
            )
            return
        for file, mask in pairs:
            if mask is None:
                name = f"{masks / folder.name(file)}.png"
                kept = ", ".join(MASK_SUFFIXES)
                advice = f", but one of the type {lossy[file.stem]}: masks end in {kept}" if file.stem in lossy else ""
                self.problems.append(f"{file}: the image has no mask {name}{advice}")
        self.problems += [f"{file}: the mask has no image in {images}" for file in inside.files if file not in used]
        self.problems += twins(pairs, "mask")
        self.warnings += folder.described_left_out()

    def _advice(self, values: Sequence[int]) -> str:
        if self.by_color:
            blurred = len(set(values) - set(self.ids)) > SHOWN
            cause = "JPEG and resizing leave so many colors behind: save masks without either; " if blurred else ""
            return f" ({cause}data.mask_values says what further colors mean)"
        hints = ["data.ignore_index says what void is, and data.mask_values what other values mean"]
        if any(self.ids.get(k) == VOID for k in range(len(self.classes))):
            hints.append("a void that is one of the values from 0 on is listed in data.classes too")
        elif 0 not in values and len(self.classes) in values:
            hints.append("do the values begin with 1?")
        return f" ({'; '.join(hints)})"


def _code(value: int | Color) -> int:
    """A color as one number, 0xRRGGBB; other values unchanged."""
    return value if isinstance(value, int) else (value[0] << 16) + (value[1] << 8) + value[2]


def _used_colors(mask: Image.Image) -> dict[int, Color]:
    """Palette colors of the values that a mask holds; empty without a palette."""
    if mask.mode != "P" or mask.palette is None:
        return {}
    palette = mask.getpalette("RGB") or []
    used = [value for value, count in enumerate(mask.histogram()) if count]
    return {v: (palette[3 * v], palette[3 * v + 1], palette[3 * v + 2]) for v in used if 3 * v + 2 < len(palette)}
