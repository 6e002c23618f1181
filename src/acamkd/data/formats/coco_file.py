"""COCO's JSON: one file that lists images, categories and annotations, of boxes as well as of outlines."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from acamkd.config import Split
from acamkd.data.folders import Folder, described_ends
from acamkd.errors import AcamkdError

NEEDED: Mapping[str, Sequence[str]] = {
    "images": ("id", "file_name", "width", "height"),
    "annotations": (),
    "categories": ("id", "name"),
}
"""Lists of a COCO file, and the keys that each of their entries needs."""

MEANT: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "id": (lambda given: isinstance(given, (int, str)) and not isinstance(given, bool), "a number or text"),
    "file_name": (lambda given: isinstance(given, str), "text"),
    "name": (lambda given: isinstance(given, str), "text, in quotes"),
    "width": (lambda given: isinstance(given, int) and given > 0, "a whole number above 0"),
    "height": (lambda given: isinstance(given, int) and given > 0, "a whole number above 0"),
}
"""Test of a key's value after `_plain`, and the allowed values in words."""


class CocoFile:
    """What a COCO JSON says of its images and categories; each task reads the annotations in its own way.

    The ids `1` and `"1"` are equal, and `96.0` counts as the whole number 96.

    Args:
        images: Folder that the JSON's `file_name` entries are relative to; see Folder on how they may be spelled.
        annotations: The JSON.
        classes: Categories without annotations may be left out of these names. None keeps all.

    Raises:
        AcamkdError: The file cannot be read, or is not a COCO JSON.

    Attributes:
        path: The JSON.
        entries: Its `annotations`.
        files: The images.
        sizes: (height, width) of each.
        names: Of the categories, in the order of their ids.
        problems: As in ImageDataset.
        warnings: As in ImageDataset.
    """

    def __init__(self, images: Path, annotations: Path, classes: Sequence[str] | None) -> None:
        content = _read(annotations)
        self.path = annotations
        self.entries: Sequence[Mapping[str, Any]] = content["annotations"]
        used = {_id(entry.get("category_id")) for entry in self.entries}
        categories = sorted(content["categories"], key=lambda category: _order(category["id"]))
        if classes is not None:
            categories = [each for each in categories if each["name"] in classes or _id(each["id"]) in used]
        self.names = tuple(category["name"] for category in categories)
        folder = Folder(images)
        listed = [image["file_name"] for image in content["images"]]
        files = {name: folder.find(name) or images / name for name in listed}
        ends = {} if any(file.is_file() for file in files.values()) else folder.find_ends(files)
        self.files = [ends.get(name, files[name]) for name in listed]
        self.sizes = [(image["height"], image["width"]) for image in content["images"]]
        self.warnings = described_ends(ends, annotations)
        self.problems: list[str] = []
        self._index_of = {_id(image["id"]): index for index, image in enumerate(content["images"])}
        self._number_of = {_id(category["id"]): number for number, category in enumerate(categories)}
        for what, ids, entries in (
            ("images", self._index_of, content["images"]),
            ("categories", self._number_of, categories),
        ):
            if not ids:
                self.problems.append(f"{annotations}: the list of {what} is empty")
            elif len(ids) < len(entries):
                self.problems.append(f"{annotations}: {len(entries) - len(ids)} {what} share an id with another")

    def where(self, entry: Mapping[str, Any]) -> str:
        """How messages name an annotation."""
        return f"{self.path}: annotation {entry.get('id')} of image {entry.get('image_id')}"

    def locate(self, entry: Mapping[str, Any], asked: str) -> tuple[int, int, bool]:
        """Index of an annotation's image, number of its category from 0, and whether it is a crowd's.

        Args:
            entry: An element of `annotations`.
            asked: Keys that the annotation must have, for the error.

        Raises:
            AcamkdError: The annotation does not say which, or the file lists no such image or category.
        """
        image, category, crowd = entry.get("image_id"), entry.get("category_id"), entry.get("iscrowd", 0)
        if _id(image) is None or _id(category) is None:
            raise AcamkdError(asked)
        if crowd not in (0, 1):
            raise AcamkdError(f"iscrowd must be 0 or 1, not {crowd}")
        index, number = self._index_of.get(_id(image)), self._number_of.get(_id(category))
        if index is None:
            raise AcamkdError(f"the file lists no image {image}")
        if number is None:
            raise AcamkdError(f"the file lists no category {category}, only {', '.join(map(str, self._number_of))}")
        return index, number, bool(crowd)


def coco_paths(root: Path, split: Split) -> tuple[Path, Path]:
    """Folder of images and JSON of one split of a recipe's `data`."""
    if split.images is not None and split.annotations is not None:
        return root / split.images, root / split.annotations
    # The names of COCO's own splits; its archives place the image folders beside `annotations`.
    names = [str(split.name), f"{split.name}2017"]
    name = next((each for each in names if _instances(root, each).is_file()), names[0])
    annotations = root / split.annotations if split.annotations else _instances(root, name)
    folders = [folder for each in dict.fromkeys([name, *names]) for folder in (root / "images" / each, root / each)]
    folders.append(root / "images")  # as CVAT writes them
    return next((folder for folder in folders if folder.is_dir()), folders[0]), annotations


def _instances(root: Path, name: str) -> Path:
    return root / "annotations" / f"instances_{name}.json"


def _read(annotations: Path) -> dict[str, Any]:
    """Read the JSON and check that every entry of its lists has the required keys."""
    try:
        content = json.loads(annotations.read_bytes())
    except OSError as error:
        raise AcamkdError(
            f"cannot read the annotations {annotations}: {error.strerror}; data.train and data.val name a split's "
            "files with {images: ..., annotations: ...}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise AcamkdError(f"{annotations} is not valid JSON: {error}") from error
    for what, keys in NEEDED.items():
        if not isinstance(content, dict) or not isinstance(content.get(what), list):
            raise AcamkdError(f"{annotations} is not a COCO file: it needs the lists {', '.join(NEEDED)}")
        for number, entry in enumerate(content[what]):
            if not isinstance(entry, dict):
                raise AcamkdError(f"{annotations}: {what}[{number}] is {entry!r}, but must be a mapping")
            entry |= {key: _plain(entry.get(key)) for key in keys}
            if wrong := [key for key in keys if not MEANT[key][0](entry[key])]:
                given = ", ".join(f"{key} is {json.dumps(entry[key])}" for key in wrong if entry[key] is not None)
                given = given and f" ({given})"
                asked = ", ".join(f"{key} {MEANT[key][1]}" for key in wrong)
                raise AcamkdError(
                    f"{annotations}: {what}[{number}] has no {', '.join(wrong)}, or one of a wrong type"
                    f"{given}: give {asked}"
                )
    result: dict[str, Any] = content
    return result


def _plain(given: Any) -> Any:
    """A value, with a float such as 96.0 as an integer."""
    return int(given) if isinstance(given, float) and given.is_integer() else given


def _id(given: Any) -> str | None:
    """Canonical text of an id; None if the value cannot be an id."""
    plain = _plain(given)
    return str(plain) if isinstance(plain, int | str) and not isinstance(plain, bool) else None


def _order(given: int | str) -> tuple[int, str]:
    """Sort key: numeric ids first, by value, then the others as text."""
    text = str(given)
    return (int(text), "") if text.isdecimal() else (sys.maxsize, text)
