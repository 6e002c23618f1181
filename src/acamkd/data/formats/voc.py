"""Pascal VOC: images with an XML of boxes, or a palette mask, each; splits are lists of names, or folders."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias
from xml.etree import ElementTree

from acamkd.config import Data, Split
from acamkd.data.boxes import Box, BoxDataset
from acamkd.data.checks import check_classes
from acamkd.data.dataset import SplitName, Transform
from acamkd.data.folders import Folder, described_ends, existing, twins
from acamkd.data.formats.masks import MASK_SUFFIXES, Color, MaskDataset, mask_ids
from acamkd.data.image_io import lines_of
from acamkd.errors import AcamkdError, nearest
from acamkd.models.base import VOID, PixelSize

CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

LABELMAP = "labelmap.txt"
"""File of CVAT's exports that says the classes and the colors of their masks."""

VOID_COLOR: Color = (224, 224, 192)
"""Of VOC's own palette."""

Element: TypeAlias = "ElementTree.Element[str]"


class VocDetection(BoxDataset):
    """Object detection: `JPEGImages/NAME.jpg` by `Annotations/NAME.xml`, names in `ImageSets/Main/SPLIT.txt`.

    It also reads any folder of images, with the XML files beside them or in a separate folder, as annotation tools
    write them. VOC counts pixels from 1 and includes the last one: (xmin, ymin, xmax, ymax) becomes the corners (xmin -
    1, ymin - 1, xmax, ymax). A `difficult` object is ignored in evaluation, like COCO's crowds, and not used in
    training. Names are found as in Folder, in `JPEGImages`, `Annotations` and all folders below.

    Args:
        root: Folder with `JPEGImages`, `Annotations` and `ImageSets`.
        split: Such as `train`, `val` or `trainval`; None = every image that has an XML.
        images: Another folder of images, of which every one that has an XML is used.
        annotations: The folder of their XML files; None = `images`.
        classes: Names in the order of their labels. None takes VOC's 20 if `Annotations` has no others. Otherwise it
            takes every name there, in alphabetical order.
        keep_crowd: Keep difficult objects; see BoxDataset.
        transform: Random changes.
        seed: Of the random changes.

    Raises:
        AcamkdError: There is no such split or folder.
    """

    LAYOUT = ("Annotations", "ImageSets/Main")
    SPLIT_KEYS = frozenset({"images", "annotations"})
    SPARE_LAYOUT = ("Annotations/**/*.xml", "JPEGImages")
    FIXED_CLASSES = CLASSES
    ABSENT_ADVICE = "data.classes may list the others alone"

    @classmethod
    def open_split(cls, data: Data, split: SplitName, *, transform: Transform | None, seed: int) -> VocDetection:
        """Open one split of a recipe's `data`."""
        given: Split = getattr(data, split)
        folders = {each: _folders(data.root, getattr(data, each)) for each in ("train", "val")}
        classes = data.classes or _classes([annotations for _, annotations in folders.values()])
        images, annotations = folders[split]
        name = None if given.images is not None or _wants_all(data, "Main") else given.name
        return cls(
            data.root, name, images=images, annotations=annotations, classes=classes, keep_crowd=split == "val",
            transform=transform, seed=seed,
        )  # fmt: skip

    def __init__(
        self,
        root: Path,
        split: str | None,
        *,
        images: Path | None = None,
        annotations: Path | None = None,
        classes: Sequence[str] | None = None,
        keep_crowd: bool = True,
        transform: Transform | None = None,
        seed: int = 0,
    ) -> None:
        folder = Folder(images or root / "JPEGImages")
        texts = Folder(annotations or images or root / "Annotations", (".xml",))
        problems, warnings = [], folder.described_left_out()
        if split is None:
            source = texts.path
            pairs = [(folder.find(texts.name(file)), file) for file in texts.files]
            problems = [
                f"{file}: the annotation has no image in {folder.path}" for image, file in pairs if image is None
            ]
            found = [(image, file) for image, file in pairs if image is not None]
            if left_out := len(folder.files) - len({image for image, _ in found}):
                warnings.append(f"{folder.path}: {left_out} images have no XML in {texts.path} and are left out")
        else:
            names, source, ends = _names(root, "Main", split, folder)
            found = [(_image(folder, name), _beside(texts, _plain(folder, name))) for name in names]
            warnings += described_ends(ends, source)
            problems = twins(found, "XML")
        files = [file for _, file in found]
        read: list[Element | str] = [_read(file) for file in files]  # the root, or a description of the error
        sizes = [None if isinstance(each, str) else _size(each) for each in read]
        super().__init__(
            [image for image, _ in found],
            files,
            classes or _classes([texts.path]),
            source=source,
            sizes=sizes,
            keep_crowd=keep_crowd,
            transform=transform,
            seed=seed,
        )
        self.problems += problems
        self.warnings += warnings
        for file, each, size in zip(files, read, sizes, strict=True):
            if isinstance(each, str):
                self.problems.append(f"{file}: {each}")
            elif size is None:
                self.problems.append(f"{file}: it has no size with width and height above 0")
        if not found and not problems:
            what = "the list is empty" if split is not None else "the folder holds no XML files"
            self.problems.append(f"{source}: {what}")
        self.gather(
            (f"{file}: object {number} ({entry.findtext('name')})", (index, entry))
            for index, (file, each) in enumerate(zip(files, read, strict=True))
            if not isinstance(each, str)
            for number, entry in enumerate(each.iterfind("object"), start=1)
        )

    def parse(self, entry: tuple[int, Element]) -> Box:
        """The index of an image, and one of its `object` elements."""
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
    """Semantic segmentation: `JPEGImages/NAME.jpg` by `SegmentationClass/NAME.png`, void = `ignore_index`.

    Where CVAT's labelmap.txt is beside them, it says the classes, and the colors of the masks.

    Args:
        root: Folder with `JPEGImages`, `SegmentationClass` and `ImageSets`.
        split: A list in `ImageSets/Segmentation`, such as `train` or `val`.
        classes: Names of the ids; None takes background and VOC's 20.
        ignore_index: Value of pixels that are ignored in training and evaluation.
        ids: Meaning of the masks' values or colors, if it differs; see MaskDataset.
        all_masks: Take every mask, whatever the split.
        transform: Random changes.
        seed: Of the random changes.

    Raises:
        AcamkdError: There is no such split.
    """

    LAYOUT = ("SegmentationClass", "ImageSets/Segmentation")
    SPARE_LAYOUT = ("SegmentationClass", "JPEGImages")
    FIXED_CLASSES = ("background", *CLASSES)
    DATA_KEYS = frozenset({"ignore_index", "mask_values"})

    @classmethod
    def open_split(cls, data: Data, split: SplitName, *, transform: Transform | None, seed: int) -> VocSegmentation:
        """Open one split of a recipe's `data`."""
        colors = _labelmap(data.root) if data.mask_values is None else {}
        if colors:
            check_classes(data.classes, tuple(colors), f"the labels of {data.root / LABELMAP}")
            if data.ignore_index != VOID:
                raise AcamkdError(f"data.ignore_index: {data.root / LABELMAP} says which color is void: leave it out")
        classes = tuple(colors) or data.classes
        ids = {VOID_COLOR: VOID, **{color: k for k, color in enumerate(colors.values())}} if colors else None
        return cls(
            data.root, getattr(data, split).name, classes=classes, ignore_index=data.ignore_index,
            ids=ids or mask_ids(data, classes or cls.FIXED_CLASSES),
            all_masks=_wants_all(data, "Segmentation"), transform=transform, seed=seed,
        )  # fmt: skip

    def __init__(
        self,
        root: Path,
        split: str,
        *,
        classes: Sequence[str] | None = None,
        ignore_index: int = VOID,
        ids: Mapping[int, int] | Mapping[Color, int] | None = None,
        all_masks: bool = False,
        transform: Transform | None = None,
        seed: int = 0,
    ) -> None:
        folder, masks = Folder(root / "JPEGImages"), Folder(root / "SegmentationClass", MASK_SUFFIXES)
        ends: dict[str, Path] = {}
        if all_masks:
            names, source = [masks.name(file) for file in masks.files], masks.path
        else:
            names, source, ends = _names(root, "Segmentation", split, folder)
        super().__init__(
            [_image(folder, name) for name in names],
            [_beside(masks, _plain(folder, name)) for name in names],
            classes or ("background", *CLASSES),
            ignore_index=ignore_index,
            ids=ids,
            same_palette=ids is None,
            transform=transform,
            seed=seed,
        )
        self.warnings += [*folder.described_left_out(), *described_ends(ends, source)]
        self.problems += twins(zip(self.files, self.annotation_files, strict=True), "mask")
        if not names:
            self.problems.append(f"{source}: {'the folder holds no masks' if all_masks else 'the list is empty'}")


def _labelmap(root: Path) -> dict[str, Color]:
    """Color of each class, in CVAT's file LABELMAP; empty if there is none.

    Raises:
        AcamkdError: A line is none of CVAT's.
    """
    file = root / LABELMAP
    colors: dict[str, Color] = {}
    for number, line in enumerate(lines_of(file) if file.is_file() else (), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        name, _, rest = line.partition(":")
        try:
            red, green, blue = (int(part) for part in rest.partition(":")[0].split(","))
        except ValueError as error:
            raise AcamkdError(
                f"{file}:{number}: a line is `name:red,green,blue:parts:actions`, not `{line}`"
            ) from error
        colors[name.strip()] = (red, green, blue)
    return colors


def _wants_all(data: Data, task: str) -> bool:
    """Whether one split is divided into two and no list names its images."""
    return data.train == data.val and not any((data.root / "ImageSets" / task).glob("*.txt"))


def _folders(root: Path, split: Split) -> tuple[Path, Path]:
    """Where a split's images and XML files lie."""
    images = root / (split.images or "JPEGImages")
    return images, root / (split.annotations or split.images or "Annotations")


def _names(root: Path, task: str, split: str, folder: Folder) -> tuple[list[str], Path, dict[str, Path]]:
    """Names of a split's images, the file that lists them, and what `Folder.find_ends` found for them."""
    lists = Folder(existing(root / "ImageSets" / task), (".txt",)) if (root / "ImageSets" / task).is_dir() else None
    listing = (lists and lists.find(split)) or root / "ImageSets" / task / f"{split}.txt"
    if not listing.is_file():
        known = sorted(file.stem for file in (lists.files if lists else ()) if "_" not in file.stem)
        raise AcamkdError(
            f"there is no list {listing}; name one with data.train.name and data.val.name (there are: "
            f"{', '.join(known) or 'none; data.val: {share: 0.2} draws validation images from all of them'})"
        )
    names = [_name(folder, line.strip()) for line in lines_of(listing) if line.strip()]
    ends = {} if any(map(folder.find, names)) else folder.find_ends(names)
    return [folder.name(ends[name]) if name in ends else name for name in names], listing, ends


def _name(folder: Folder, line: str) -> str:
    """The name in a line. Lists of single classes append 1, 0 or -1, but a name may also end like that."""
    name = re.sub(r"\s+(1|0|-1)$", "", line)
    return line if name != line and folder.find(line) else name


def _image(folder: Folder, name: str) -> Path:
    """The image of a name; VOC's own are .jpg."""
    return folder.find(name) or folder.path / f"{name}.jpg"


def _beside(folder: Folder, name: str) -> Path:
    """The XML or mask of an image's name, in the same sub folder as the image or without that folder."""
    return folder.find_end(name) or folder.path / f"{name}{folder.suffixes[0]}"


def _plain(folder: Folder, name: str) -> str:
    """The name without the suffix that some lists give it."""
    image = folder.find(name)
    return name if image is None else folder.name(image)


def _read(file: Path) -> Element | str:
    """The root of an XML file, or a description of the error."""
    try:
        return ElementTree.parse(file).getroot()
    except OSError as error:
        return f"the annotation cannot be read: {error.strerror}"
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # LookupError: of an encoding
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


def class_names(folders: Iterable[Path]) -> tuple[str, ...]:
    """Class names in the XML files of these folders, in alphabetical order."""
    files = [file for folder in dict.fromkeys(folders) for file in Folder(folder, (".xml",)).files]
    trees: list[Any] = [_read(file) for file in dict.fromkeys(files)]
    found = {
        (entry.findtext("name") or "").strip()
        for tree in trees
        if not isinstance(tree, str)
        for entry in tree.iterfind("object")
    } - {""}
    return tuple(sorted(found))


def _classes(folders: Iterable[Path]) -> tuple[str, ...]:
    """Class names of all splits, so that the splits agree: VOC's where there are no others."""
    found = class_names(folders)
    return CLASSES if set(found) <= set(CLASSES) else found
