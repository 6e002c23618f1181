"""Pascal VOC: images with an XML of boxes, or a palette mask, each; splits are lists of names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias
from xml.etree import ElementTree

from acamkd.config import Data
from acamkd.data.boxes import Box, BoxDataset
from acamkd.data.dataset import SplitName, Transform
from acamkd.data.formats.masks import MaskDataset
from acamkd.data.image_io import lines_of
from acamkd.errors import AcamkdError, nearest
from acamkd.files import IMAGE_SUFFIXES
from acamkd.models.base import PixelSize

CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

Element: TypeAlias = "ElementTree.Element[str]"


class VocDetection(BoxDataset):
    """Object detection: `JPEGImages/NAME.jpg` by `Annotations/NAME.xml`, names in `ImageSets/Main/SPLIT.txt`.

    VOC counts pixels from 1 and includes the last one: (xmin, ymin, xmax, ymax) becomes the corners (xmin - 1,
    ymin - 1, xmax, ymax). An object that is `difficult` is ignored in evaluation, as COCO's crowds are, and does not
    train.

    Args:
        root: Folder with `JPEGImages`, `Annotations` and `ImageSets`.
        split: Such as `train`, `val` or `trainval`.
        classes: Names in the order of their labels. None takes VOC's 20 where `Annotations` has no others, and
            otherwise every name there, in alphabetical order.
        keep_crowd: Keep difficult objects; see BoxDataset.
        transform: Random changes.
        seed: Of the random changes.

    Raises:
        AcamkdError: There is no such split.
    """

    LAYOUT = ("Annotations", "ImageSets/Main")
    FIXED_CLASSES = CLASSES

    @classmethod
    def open_split(cls, data: Data, split: SplitName, *, transform: Transform | None, seed: int) -> VocDetection:
        """Open one split of a recipe's `data`."""
        name = getattr(data, split).name
        return cls(data.root, name, classes=data.classes, keep_crowd=split == "val", transform=transform, seed=seed)

    def __init__(
        self,
        root: Path,
        split: str,
        *,
        classes: Sequence[str] | None = None,
        keep_crowd: bool = True,
        transform: Transform | None = None,
        seed: int = 0,
    ) -> None:
        names, listing = _names(root, "Main", split)
        files = [root / "Annotations" / f"{name}.xml" for name in names]
        read: list[Element | str] = [_read(file) for file in files]  # or what is wrong with it
        sizes = [None if isinstance(each, str) else _size(each) for each in read]
        super().__init__(
            [_image(root, name) for name in names],
            files,
            classes or _classes(root),
            source=listing,
            sizes=sizes,
            keep_crowd=keep_crowd,
            transform=transform,
            seed=seed,
        )
        for file, each, size in zip(files, read, sizes, strict=True):
            if isinstance(each, str):
                self.problems.append(f"{file}: {each}")
            elif size is None:
                self.problems.append(f"{file}: it has no size with width and height above 0")
        if not names:
            self.problems.append(f"{listing}: the list is empty")
        self._gather(
            (f"{file}: object {number} ({entry.findtext('name')})", (index, entry))
            for index, (file, each) in enumerate(zip(files, read, strict=True))
            if not isinstance(each, str)
            for number, entry in enumerate(each.iterfind("object"), start=1)
        )

    def _parse(self, entry: tuple[int, Element]) -> Box:
        index, element = entry
        name = (element.findtext("name") or "").strip()
        if name not in self.classes:
            raise AcamkdError(f"there is no class {name!r}; {nearest(name, self.classes)}")
        try:
            x1, y1, x2, y2 = (_number(element, f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax"))
        except ValueError as error:
            raise AcamkdError("it needs a bndbox with the numbers xmin, ymin, xmax and ymax") from error
        try:
            difficult = element.find("difficult") is not None and bool(_number(element, "difficult"))
        except ValueError as error:
            raise AcamkdError(f"difficult must be 0 or 1, not {element.findtext('difficult')!r}") from error
        return Box(index, self.classes.index(name) + 1, (x1 - 1, y1 - 1, x2, y2), difficult)


class VocSegmentation(MaskDataset):
    """Semantic segmentation: `JPEGImages/NAME.jpg` by `SegmentationClass/NAME.png`, 255 = void.

    Args:
        root: Folder with `JPEGImages`, `SegmentationClass` and `ImageSets`.
        split: A list in `ImageSets/Segmentation`, such as `train` or `val`.
        classes: Names of the ids; None takes background and VOC's 20.
        transform: Random changes.
        seed: Of the random changes.

    Raises:
        AcamkdError: There is no such split.
    """

    LAYOUT = ("SegmentationClass", "ImageSets/Segmentation")
    FIXED_CLASSES = ("background", *CLASSES)

    @classmethod
    def open_split(cls, data: Data, split: SplitName, *, transform: Transform | None, seed: int) -> VocSegmentation:
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
        names, listing = _names(root, "Segmentation", split)
        super().__init__(
            [_image(root, name) for name in names],
            [root / "SegmentationClass" / f"{name}.png" for name in names],
            classes or ("background", *CLASSES),
            transform=transform,
            seed=seed,
        )
        if not names:
            self.problems.append(f"{listing}: the list is empty")


def _names(root: Path, task: str, split: str) -> tuple[list[str], Path]:
    """Names of a split's images, and the list that they stand in."""
    listing = root / "ImageSets" / task / f"{split}.txt"
    if not listing.is_file():
        known = sorted(file.stem for file in listing.parent.glob("*.txt") if "_" not in file.stem)
        raise AcamkdError(
            f"there is no list {listing}; name one with data.train.name and data.val.name (there are: "
            f"{', '.join(known) or 'none'})"
        )
    return [_name(root, line.strip()) for line in lines_of(listing) if line.strip()], listing


def _name(root: Path, line: str) -> str:
    """The name in a line; the lists of single classes have 1, 0 or -1 behind it, but a name may end like that, too."""
    name = re.sub(r"\s+(1|0|-1)$", "", line)
    return line if name != line and _image(root, line).is_file() else name


def _image(root: Path, name: str) -> Path:
    """The image of a name; VOC's own are .jpg."""
    found = (root / "JPEGImages" / f"{name}{suffix}" for suffix in IMAGE_SUFFIXES)
    return next((file for file in found if file.is_file()), root / "JPEGImages" / f"{name}.jpg")


def _read(file: Path) -> Element | str:
    """The root of an XML, or what is wrong with it."""
    try:
        return ElementTree.parse(file).getroot()
    except OSError as error:
        return f"the annotation cannot be read: {error.strerror}"
    except (ElementTree.ParseError, ValueError) as error:
        return f"it is not valid XML: {error}"


def _size(root: Element) -> PixelSize | None:
    try:
        height, width = (int(_number(root, f"size/{side}")) for side in ("height", "width"))
    except (ValueError, OverflowError):  # no number, or infinite
        return None
    return (height, width) if height > 0 and width > 0 else None


def _number(element: Element, path: str) -> float:
    """Raises ValueError if there is none."""
    return float(element.findtext(path, ""))


def _classes(root: Path) -> tuple[str, ...]:
    """What `Annotations` names, of all splits, so that they agree."""
    trees: list[Any] = [_read(file) for file in sorted((root / "Annotations").glob("*.xml"))]
    found = {
        (entry.findtext("name") or "").strip()
        for tree in trees
        if not isinstance(tree, str)
        for entry in tree.iterfind("object")
    } - {""}
    return CLASSES if found <= set(CLASSES) else tuple(sorted(found))
