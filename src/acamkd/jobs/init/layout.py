"""What lies in a folder of images: its format, its splits and its classes, as a recipe's `data` names them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
from acamkd.data.formats.yolo import NAMES, sources
from acamkd.data.image_io import lines_of, opened, stored_values
from acamkd.data.packed import parquet_file
from acamkd.errors import AcamkdError
from acamkd.jobs.init.splits import BOTH, WORDS, Keys, by_split, has_images, images_below, split_of
from acamkd.models.base import VOID, Task
from acamkd.progress import muted

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
        folders: Those that are read with all folders below them, by split; none where images are listed.
        leaves_out: Whether images without annotations are left out of these.
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
    folders: Mapping[str, Sequence[Path]] = field(default_factory=dict)
    leaves_out: bool = False


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
        for kind in LISTS.values():
            if lists := _lists(root, kind):
                raise AcamkdError(
                    f"{root / 'ImageSets' / kind}: none of the lists ({', '.join(lists)}) is for training and names "
                    "images: call them train.txt, val.txt and test.txt"
                )
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
    # What says its classes itself comes before what has to be told.
    return sorted(found, key=lambda layout: (layout.on_request, layout.needs_names and not layout.classes))


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
    if splits := _opened(root, "detection", "coco", by_split(candidates)):
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
            folders = {split: [place for place in sources(root, split) if place.is_dir()] for split in splits}
            yield Layout("detection", "yolo", splits, "there is a data.yaml", folders=folders)
        return
    candidates = []
    for images in images_below(root):
        relative = images.relative_to(root)
        parts = [("labels" if part == "images" else part) for part in relative.parts]
        labels = root.joinpath(*parts)
        if any(file.stem not in ("classes", "labels") for file in labels.glob("*.txt")):
            beside = {} if labels == images else {"annotations": str(labels.relative_to(root))}
            candidates.append((str(relative), {"images": str(relative), **beside}))
    given = by_split(candidates)
    texts = [root / keys.get("annotations", keys["images"]) for keys in given.values()]
    names = _names(root, texts)
    if names is None and not any(map(_holds_boxes, texts)):
        return
    classes, source = names or (None, "")
    splits = _opened(root, "detection", "yolo", given, classes=classes or EVERY_VALUE)
    if splits:
        reason = f"{splits['train'].get('annotations', splits['train']['images'])} holds text files"
        yield Layout(
            "detection", "yolo", splits, reason, classes, source, needs_names=True, folders=_folders(root, splits)
        )  # fmt: skip


def _holds_boxes(folder: Path) -> bool:
    """Whether a text file has YOLO's lines, since notes and captions may lie beside images, too."""
    for file in sorted(folder.glob("*.txt"))[:SAMPLED]:
        with suppress(AcamkdError, ValueError):
            lines = [[float(word) for word in line.split()] for line in lines_of(file) if line.strip()]
            if lines and all(len(line) > 4 and line[0].is_integer() for line in lines):
                return True
    return False


def _folders(root: Path, splits: Mapping[str, Keys]) -> dict[str, list[Path]]:
    return {split: [root / keys["images"]] for split, keys in splits.items()}


def _voc(root: Path) -> Iterator[Layout]:
    kinds: Sequence[tuple[Task, str]] = (("detection", "Annotations"), ("segmentation", "SegmentationClass"))
    found = False
    for task, labels in kinds:
        if not (root / labels).is_dir():
            continue
        listed = by_split((name, {"name": name}) for name in _lists(root, LISTS[task]))
        if splits := _opened(root, task, "voc", listed):
            reason = f"{labels} and ImageSets/{LISTS[task]} are there"
            own = _xml_classes([root / labels]) if task == "detection" else {}
            if task == "segmentation" and not (root / LABELMAP).is_file():
                own = {"values": _values([Folder(root / labels, MASK_SUFFIXES).files])}
            yield Layout(task, "voc", splits, reason, on_request=found, **own)
            found = True
    if found or _lists(root, LISTS["detection"]):  # which also keep images out of the training
        return
    # Without lists: XML files beside the images, or in a folder beside theirs.
    beside = []
    for images in images_below(root):
        for folder in (images, images.parent / "Annotations", images.parent / "annotations"):
            if any(folder.glob("*.xml")):
                keys = {} if folder == images else {"annotations": str(folder.relative_to(root))}
                beside.append((str(images.relative_to(root)), {"images": str(images.relative_to(root)), **keys}))
                break
    if splits := _opened(root, "detection", "voc", by_split(beside)):
        own = _xml_classes(root / keys.get("annotations", keys["images"]) for keys in splits.values())
        reason, folders = f"XML files belong to {splits['train']['images']}", _folders(root, splits)
        yield Layout("detection", "voc", splits, reason, folders=folders, leaves_out=True, **own)


LISTS: Mapping[Task, str] = {"detection": "Main", "segmentation": "Segmentation"}
"""Where VOC's lists of names lie, in `ImageSets`."""


def _lists(root: Path, kind: str) -> list[str]:
    """Names of VOC's lists, the shortest first: `train` before another one of that split.

    Lists of single classes, such as `cat_train`, are left out: they hold images without a cat, too.
    """
    names = {file.stem for file in (root / "ImageSets" / kind).glob("*.txt")}
    ends = {name: name.rpartition("_") for name in names}
    splits = {name for name in names if split_of(name) or name == BOTH}
    kept = (name for name, (one, _, end) in ends.items() if not one or (end not in splits and one not in VOC_CLASSES))
    return sorted(kept, key=lambda name: (len(name), name))


def _xml_classes(folders: Iterable[Path]) -> dict[str, Any]:
    """Names for the recipe where only some of VOC's classes are there, which all 20 would be read for."""
    found = class_names(folders)
    return {"classes": found, "names_from": "the XML files"} if set(found) < set(VOC_CLASSES) else {}


def _masks(root: Path) -> Iterator[Layout]:
    candidates = []
    for masks in images_below(root):
        relative = masks.relative_to(root)
        for word in ("masks", "labels", "annotations"):
            if word not in relative.parts:
                continue
            images = root.joinpath(*("images" if part == word else part for part in relative.parts))
            if images.is_dir() and has_images(masks, MASK_SUFFIXES):
                candidates.append((str(relative), {"images": str(images.relative_to(root)), "masks": str(relative)}))
    if not candidates and (root / JPEG_IMAGES).is_dir() and not (root / "ImageSets").is_dir():
        beside = [name for name in MASKS_BESIDE if has_images(root / name, MASK_SUFFIXES)]
        candidates = [(name, {"images": JPEG_IMAGES, "masks": name}) for name in beside[:1]]
    splits = _opened(root, "segmentation", "masks", by_split(candidates), classes=EVERY_VALUE)
    if not splits:
        return
    values = _values(Folder(root / keys["masks"], MASK_SUFFIXES).files for keys in splits.values())
    names = _names(root) or _beside_background(root, values)
    classes, source = names or (None, "")
    reason = f"{splits['train']['masks']} holds masks"
    yield Layout(
        "segmentation", "masks", splits, reason, classes, source, values, needs_names=True,
        folders=_folders(root, splits),
    )  # fmt: skip


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


def _names(root: Path, texts: Iterable[Path] = ()) -> tuple[tuple[str, ...], str] | None:
    """Class names, and the file that they stand in.

    Args:
        root: Where it may lie.
        texts: Folders of YOLO's text files, where LabelImg writes it.

    Raises:
        AcamkdError: It is not in UTF-8, or the folders' files differ.
    """
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
        elif listed := _without_blanks(lines):
            return tuple(listed), name
    files = [file for folder in texts if (file := folder / "classes.txt").is_file()]
    found = {tuple(listed): file for file in reversed(files) if (listed := _without_blanks(lines_of(file)))}
    if len(found) > 1:
        one, other = sorted(found.values())[:2]
        raise AcamkdError(f"{one} and {other} must list the same classes in the same order: class 0 is the first")
    return next(((names, str(file.relative_to(root))) for names, file in found.items()), None)


def _without_blanks(lines: Iterable[str]) -> list[str]:
    return [line.strip() for line in lines if line.strip() not in ("", IGNORED)]


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
