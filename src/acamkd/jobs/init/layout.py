"""What lies in a folder of images: its format, its splits and its classes, as a recipe's `data` names them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from acamkd import config, data
from acamkd.data import ImageDataset
from acamkd.data.folders import Folder
from acamkd.data.formats import FORMATS
from acamkd.data.formats.coco import BACKGROUNDS
from acamkd.data.formats.coco_file import CocoFile
from acamkd.data.formats.masks import MASK_SUFFIXES
from acamkd.data.formats.voc import CLASSES as VOC_CLASSES
from acamkd.data.formats.voc import LABELMAP, class_names
from acamkd.data.formats.yolo import NAMES
from acamkd.data.image_io import lines_of, opened, stored_values
from acamkd.data.packed import parquet_file
from acamkd.errors import AcamkdError
from acamkd.files import IMAGE_SUFFIXES
from acamkd.models.base import VOID, Task
from acamkd.progress import muted

Keys: TypeAlias = dict[str, str]
"""One split, as a recipe writes it."""

WORDS: Mapping[str, frozenset[str]] = {
    "train": frozenset({"train", "training", "train2017"}),
    "val": frozenset({"val", "valid", "validation", "val2017"}),
    "test": frozenset({"test", "testing"}),
}
"""Split -> what exports of annotation tools call it."""

UNLABELED = frozenset({"unlabeled", "unlabelled", "rest", "extra", "unannotated"})
"""What folders of images without labels are called."""

NAME_FILES = (
    "class_names.txt",
    "classes.txt",
    "labels.txt",
    "obj.names",
    "labels/classes.txt",
    "classes.json",
    "id2label.json",
)
"""Where class names may stand, one per line or as JSON."""

IGNORED = "__ignore__"
"""A line in LabelMe's lists that is no class."""

VISUALIZATION = "Visualization"
"""End of the names of folders in LabelMe's exports with images that annotations are drawn on."""

JPEG_IMAGES, MASKS_BESIDE = "JPEGImages", ("SegmentationClassPNG", "SegmentationClass")
"""Folders of images and masks in LabelMe's exports."""

EVERY_VALUE = tuple(str(value) for value in range(VOID))
"""Names for masks whose classes are not known yet."""

SAMPLED = 400
"""Masks that are read to see which values there are."""


@dataclass(frozen=True)
class Layout:
    """One way to read a folder.

    Attributes:
        task: What the annotations are for.
        format: As in `data.format`.
        splits: `train`, and as far as they are there `val` and `test`: the keys of each in a recipe.
        reason: How the format was recognized, in words.
        classes: Names, where the recipe has to give them and the folder says them.
        names_from: Where they stand.
        values: Formats with masks whose classes the recipe names: the values that the masks hold; of colors none.
        needs_names: Whether the recipe has to give the class names.
        on_request: Whether it is meant only where its task is asked for.
    """

    task: Task
    format: str
    splits: dict[str, Keys]
    reason: str
    classes: tuple[str, ...] | None = None
    names_from: str = ""
    values: tuple[int, ...] = ()
    needs_names: bool = False
    on_request: bool = False


def find_layouts(root: Path) -> list[Layout]:
    """Every way to read a folder of which the images and annotations are there.

    Raises:
        AcamkdError: There is no such folder, or none that is known.
    """
    if not root.is_dir():
        raise AcamkdError(f"{root}: there is no such folder")
    finders: Sequence[Callable[[Path], Iterator[Layout]]] = (_coco, _yolo, _voc, _masks, _cityscapes)
    with muted("acamkd.data"):  # of what is only tried
        found = [layout for finder in finders for layout in finder(root)] or [*_packed(root)]
    if not found:
        for file in sorted(root.glob("**/*.parquet"))[:1]:
            parquet_file(file)  # which says that pyarrow is missing
        if (root / NAMES).is_file():
            _open(root, "detection", "yolo", {"name": "train"})  # which says what is wrong with it
        patterns = "; ".join(
            f"{name}: {' and '.join(reader.LAYOUT or reader.SPARE_LAYOUT)}"
            for name, readers in FORMATS.items()
            for reader in readers
            if reader.LAYOUT or reader.SPARE_LAYOUT
        )
        raise AcamkdError(
            f"{root}: no images with annotations that are known; looked for a COCO JSON, YOLO's text files, and "
            f"{patterns}. Give the folder that holds these (docs/guides/data.md shows every layout)"
        )
    return sorted(found, key=lambda layout: layout.on_request)


def find_unlabeled(root: Path) -> str | None:
    """A folder of images that is named as one without labels, relative to the root."""
    folders = [folder for parent in (root, root / "images") if parent.is_dir() for folder in sorted(parent.iterdir())]
    found = (folder for folder in folders if folder.is_dir() and folder.name.lower() in UNLABELED)
    return next((str(folder.relative_to(root)) for folder in found if _has_images(folder)), None)


def split_of(name: str) -> str | None:
    """`train`, `val` or `test`, where a word of a file's or folder's name says so."""
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    return next((split for split, known in WORDS.items() if words & known), None)


def _has_images(folder: Path, suffixes: Sequence[str] = IMAGE_SUFFIXES) -> bool:
    with suppress(PermissionError):  # of a folder that is none of ours, such as lost+found
        return folder.is_dir() and any(file.suffix.lower() in suffixes for file in folder.iterdir())
    return False


def _images_below(root: Path) -> list[Path]:
    """Folders that hold images, at most two levels down, the root first."""
    return [
        folder
        for folder in [root, *sorted(root.glob("*/")), *sorted(root.glob("*/*/"))]
        if folder.name[:1] != "." and not folder.name.endswith(VISUALIZATION) and _has_images(folder)
    ]


def _open(root: Path, task: Task, form: str, keys: Keys, **more: Any) -> ImageDataset:
    raw = {"format": form, "root": str(root), "train": keys, "val": keys, **more}
    return data.build(config.Data.model_validate(raw), task, "val", seed=0, augment=False)


def _opened(root: Path, task: Task, form: str, splits: Mapping[str, Keys], **more: Any) -> dict[str, Keys]:
    """Those of the splits that can be opened and hold images; without a training split none."""
    opened = {}
    for split, keys in splits.items():
        with suppress(AcamkdError):
            if len(_open(root, task, form, keys, **more)):
                opened[split] = keys
    return opened if "train" in opened else {}


def _by_split(candidates: Iterable[tuple[str, Keys]]) -> dict[str, Keys]:
    """The first candidate of each split by its name; a single one without such a name is for training."""
    listed = list(candidates)
    named: dict[str, Keys] = {}
    for name, keys in listed:
        if split := split_of(name):
            named.setdefault(split, keys)
    if "train" not in named and (others := [keys for name, keys in listed if split_of(name) is None]):
        if len(others) > 1:
            return {}
        named["train"] = others[0]
    return {split: named[split] for split in WORDS if split in named}


def _coco(root: Path) -> Iterator[Layout]:
    candidates = []
    # A file of boxes before those of key points and captions of the same split.
    files = sorted(
        (file for pattern in ("*.json", "*/*.json", "*/*/*.json") for file in root.glob(pattern)),
        key=lambda file: (not file.name.startswith("instances"), file),
    )
    for file in files:
        if (first := _first_image(file)) is None:
            continue
        name = file.stem.removeprefix("instances_")
        relative = str(file.relative_to(root).with_suffix(""))
        places = [root / "images" / name, root / name, file.parent, file.parent / "images", root / "images", root]
        # A name may begin on another machine or as an URL: then its longest end counts.
        parts = first.replace("\\", "/").strip("/").split("/")
        ends = ["/".join(parts[k:]) for k in range(len(parts))]
        images = next((place for end in ends for place in places if (place / end).is_file()), None)
        if images is not None:
            keys = {"images": str(images.relative_to(root)), "annotations": str(file.relative_to(root))}
            candidates.append((relative, keys))
    if splits := _opened(root, "detection", "coco", _by_split(candidates)):
        images, file = (root / splits["train"][key] for key in ("images", "annotations"))
        listed = CocoFile(images, file, None)
        reason = f"{splits['train']['annotations']} is a COCO file"
        own: dict[str, Any] = {}
        if any(name.lower() in BACKGROUNDS for name in listed.names):
            used = CocoFile(images, file, ()).names
            boxed = [name for name in listed.names if name in used or name.lower() not in BACKGROUNDS]
            own = {"classes": tuple(boxed), "names_from": "the categories that boxes have"}
        yield Layout("detection", "coco", splits, reason, **own)
        if any(entry.get("segmentation") for entry in listed.entries):
            yield Layout("segmentation", "coco", splits, f"{reason} with outlines", on_request=True)


def _first_image(file: Path) -> str | None:
    """The first `file_name` of a COCO file that has boxes; None where it is no such file."""
    with suppress(OSError, ValueError, RecursionError, KeyError, TypeError, IndexError):
        content = json.loads(file.read_bytes())
        if content["categories"] and any("bbox" in entry for entry in content["annotations"][:50]):
            return str(content["images"][0]["file_name"])
    return None


def _yolo(root: Path) -> Iterator[Layout]:
    if (root / NAMES).is_file():
        splits = _opened(root, "detection", "yolo", {split: {"name": split} for split in WORDS})
        if splits:
            yield Layout("detection", "yolo", splits, "there is a data.yaml")
        return
    names = _names(root)
    candidates = []
    for images in _images_below(root):
        relative = images.relative_to(root)
        parts = [("labels" if part == "images" else part) for part in relative.parts]
        labels = root.joinpath(*parts)
        if any(file.stem not in ("classes", "labels") for file in labels.glob("*.txt")):
            beside = {} if labels == images else {"annotations": str(labels.relative_to(root))}
            candidates.append((str(relative), {"images": str(relative), **beside}))
    if not candidates or names is None:
        return
    splits = _opened(root, "detection", "yolo", _by_split(candidates), classes=names[0])
    if splits:
        reason = f"{splits['train'].get('annotations', splits['train']['images'])} holds text files"
        yield Layout("detection", "yolo", splits, reason, classes=names[0], names_from=names[1])


def _voc(root: Path) -> Iterator[Layout]:
    kinds: Sequence[tuple[Task, str, str]] = (
        ("detection", "Annotations", "Main"), ("segmentation", "SegmentationClass", "Segmentation"),
    )  # fmt: skip
    found = False
    for task, labels, lists in kinds:
        if not (root / labels).is_dir():
            continue
        names = {file.stem for file in (root / "ImageSets" / lists).glob("*.txt")}
        candidates = {split: {"name": split} for split in WORDS if split in names}
        others = names & {"trainval"} or {name for name in names if split_of(name) is None}
        if "train" not in candidates and len(others) == 1:
            candidates["train"] = {"name": next(iter(others))}
        if splits := _opened(root, task, "voc", candidates):
            reason = f"{labels} and ImageSets/{lists} are there"
            own = _xml_classes([root / labels]) if task == "detection" else {}
            if task == "segmentation" and not (root / LABELMAP).is_file():
                own = {"values": _values([Folder(root / labels, MASK_SUFFIXES).files])}
            yield Layout(task, "voc", splits, reason, on_request=found, **own)
            found = True
    if found:
        return
    # Without lists: XML files beside the images, or in a folder beside theirs.
    beside = []
    for images in _images_below(root):
        for folder in (images, images.parent / "Annotations", images.parent / "annotations"):
            if any(folder.glob("*.xml")):
                keys = {} if folder == images else {"annotations": str(folder.relative_to(root))}
                beside.append((str(images.relative_to(root)), {"images": str(images.relative_to(root)), **keys}))
                break
    if splits := _opened(root, "detection", "voc", _by_split(beside)):
        own = _xml_classes(root / keys.get("annotations", keys["images"]) for keys in splits.values())
        yield Layout("detection", "voc", splits, f"XML files belong to {splits['train']['images']}", **own)


def _xml_classes(folders: Iterable[Path]) -> dict[str, Any]:
    """Names for the recipe where only some of VOC's classes are there, which all 20 would be read for."""
    found = class_names(folders)
    return {"classes": found, "names_from": "the XML files"} if set(found) < set(VOC_CLASSES) else {}


def _masks(root: Path) -> Iterator[Layout]:
    candidates = []
    for masks in _images_below(root):
        relative = masks.relative_to(root)
        for word in ("masks", "labels", "annotations"):
            if word not in relative.parts:
                continue
            images = root.joinpath(*("images" if part == word else part for part in relative.parts))
            if images.is_dir() and _has_images(masks, MASK_SUFFIXES):
                candidates.append((str(relative), {"images": str(images.relative_to(root)), "masks": str(relative)}))
    if not candidates and (root / JPEG_IMAGES).is_dir() and not (root / "ImageSets").is_dir():
        beside = [name for name in MASKS_BESIDE if _has_images(root / name, MASK_SUFFIXES)]
        candidates = [(name, {"images": JPEG_IMAGES, "masks": name}) for name in beside[:1]]
    splits = _opened(root, "segmentation", "masks", _by_split(candidates), classes=EVERY_VALUE)
    if not splits:
        return
    values = _values(Folder(root / keys["masks"], MASK_SUFFIXES).files for keys in splits.values())
    names = _names(root) or _beside_background(root, values)
    classes, source = names or (None, "")
    reason = f"{splits['train']['masks']} holds masks"
    yield Layout("segmentation", "masks", splits, reason, classes, source, values, needs_names=True)


def _cityscapes(root: Path) -> Iterator[Layout]:
    if (root / "leftImg8bit").is_dir():
        splits = _opened(root, "segmentation", "cityscapes", {split: {"name": split} for split in ("train", "val")})
        if splits:
            yield Layout("segmentation", "cityscapes", splits, "leftImg8bit and gtFine are there")


def _packed(root: Path) -> Iterator[Layout]:
    """Parquet files and shards."""
    named = {split: {"name": split} for split in WORDS}
    for form, suffix in (("parquet", ".parquet"), ("shards", ".tar")):
        if not any(root.glob(f"**/*{suffix}")):
            continue
        reason = f"the splits are files *{suffix}"
        names = _names(root)
        classes, source = names or (None, "")
        if form == "parquet" and (splits := _opened(root, "detection", form, named)):
            yield Layout("detection", form, splits, reason)
        elif splits := _opened(root, "detection", form, named, classes=EVERY_VALUE):
            yield Layout("detection", form, splits, reason, classes, source, needs_names=True)
        if splits := _opened(root, "segmentation", form, named, classes=EVERY_VALUE):
            raw = {"format": form, "root": root, "train": splits["train"], "classes": EVERY_VALUE}
            masks = data.build(config.Data.model_validate(raw), "segmentation", "train", seed=0, augment=False)
            values = _values([masks.annotation_files])
            yield Layout("segmentation", form, splits, reason, classes, source, values, needs_names=True)


def _values(folders: Iterable[Sequence[Path]]) -> tuple[int, ...]:
    """Which values gray masks and those with a palette hold, of an even sample of them; of other masks none."""
    found: set[int] = set()
    for files in folders:
        for file in files[:: max(1, len(files) // SAMPLED)]:
            with opened(file, "mask") as image:
                if image.mode not in ("1", "L", "P"):
                    return ()
                found.update(np.unique(stored_values(image)).tolist())
    return tuple(sorted(found))


def _names(root: Path) -> tuple[tuple[str, ...], str] | None:
    """Class names, and the file that they stand in; raises AcamkdError if it is not in UTF-8."""
    for name in NAME_FILES:
        file = root / name
        if not file.is_file():
            continue
        lines = lines_of(file)
        if file.suffix == ".json":
            with suppress(ValueError):
                content = json.loads("\n".join(lines))
                listed = content.get("classes", content.get("names")) if isinstance(content, dict) else content
                if isinstance(content, dict) and set(content) == {str(number) for number in range(len(content))}:
                    listed = [content[str(number)] for number in range(len(content))]
                if isinstance(listed, list) and listed and all(isinstance(each, str) for each in listed):
                    return tuple(listed), name
        elif listed := [line.strip() for line in lines if line.strip() not in ("", IGNORED)]:
            return tuple(listed), name
    return None


def _beside_background(root: Path, values: Sequence[int]) -> tuple[tuple[str, ...], str] | None:
    """Background and the categories of a COCO file beside the masks, where those are numbered 1, 2, and so on."""
    for file in sorted(root.glob("annotations/*.json")):
        if _first_image(file) is None:
            continue
        names = {each["id"]: str(each["name"]) for each in json.loads(file.read_bytes())["categories"]}
        numbered = list(range(1, len(names) + 1))
        known = {0, *numbered, VOID}
        if sorted(names) == numbered and set(values) <= known:
            return ("background", *(names[number] for number in numbered)), str(file.relative_to(root))
    return None
