"""Images with boxes in one COCO JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from acamkd.config import Data, Split
from acamkd.data.boxes import Box, BoxDataset
from acamkd.data.checks import check_classes
from acamkd.data.dataset import SplitName, Transform
from acamkd.data.folders import Folder
from acamkd.errors import AcamkdError

NEEDED: Mapping[str, Sequence[str]] = {
    "images": ("id", "file_name", "width", "height"),
    "annotations": (),
    "categories": ("id", "name"),
}
"""Lists of a COCO file, and what each of their entries must have."""

MEANT: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "id": (lambda given: isinstance(given, (int, str)) and not isinstance(given, bool), "a number or text"),
    "file_name": (lambda given: isinstance(given, str), "text"),
    "name": (lambda given: isinstance(given, str), "text, in quotes"),
    "width": (lambda given: isinstance(given, int) and given > 0, "a whole number above 0"),
    "height": (lambda given: isinstance(given, int) and given > 0, "a whole number above 0"),
}
"""What a key's value may be, once `_plain` has made it plain, and in words."""


class CocoDetection(BoxDataset):
    """Object detection in COCO's format; categories in the order of their ids become the labels 1..K.

    An id is the same as a number and as text, `1` and `"1"`, and a whole number is one as `96.0`, too.

    Args:
        images: Folder that the JSON's `file_name` entries are relative to; see Folder on how they may be spelled.
        annotations: The JSON: `images` (id, file_name, width, height), `annotations` (image_id, category_id, bbox
            [x, y, width, height], iscrowd, area) and `categories` (id, name).
        classes: Names that the file must list, in its order; categories that no box has may be left out. None takes
            the file's own.
        keep_crowd: Keep the boxes around crowds; see BoxDataset.
        transform: Random changes.
        seed: Of the random changes.

    Raises:
        AcamkdError: The file cannot be read, is not a COCO JSON, or lists other classes.
    """

    LEAVES_OUT_EMPTY = True  # train2017 has two
    ABSENT_ADVICE = "is it a category that only groups others? data.classes may leave out what no box has"

    LAYOUT = ("annotations/instances_*.json",)
    SPLIT_KEYS = frozenset({"images", "annotations"})
    BESIDE_IMAGES = "annotations"

    @classmethod
    def open_split(cls, data: Data, split: SplitName, *, transform: Transform | None, seed: int) -> CocoDetection:
        """Open one split of a recipe's `data`."""
        images, annotations = _paths(data.root, getattr(data, split))
        return cls(images, annotations, classes=data.classes, keep_crowd=split == "val", transform=transform, seed=seed)

    def __init__(
        self,
        images: Path,
        annotations: Path,
        *,
        classes: Sequence[str] | None = None,
        keep_crowd: bool = True,
        transform: Transform | None = None,
        seed: int = 0,
    ) -> None:
        content = _read(annotations)
        used = {_id(entry.get("category_id")) for entry in content["annotations"]}
        categories = sorted(content["categories"], key=lambda category: _order(category["id"]))
        if classes is not None:
            categories = [each for each in categories if each["name"] in classes or _id(each["id"]) in used]
        names = tuple(category["name"] for category in categories)
        check_classes(classes, names, f"the categories of {annotations}")
        folder = Folder(images)
        super().__init__(
            [folder.find(image["file_name"]) or images / image["file_name"] for image in content["images"]],
            [annotations],
            names,
            source=annotations,
            sizes=[(image["height"], image["width"]) for image in content["images"]],
            keep_crowd=keep_crowd,
            transform=transform,
            seed=seed,
        )
        self._index_of = {_id(image["id"]): index for index, image in enumerate(content["images"])}
        self._label_of = {_id(category["id"]): label for label, category in enumerate(categories, start=1)}
        for what, ids, entries in (
            ("images", self._index_of, content["images"]),
            ("categories", self._label_of, categories),
        ):
            if not ids:
                self.problems.append(f"{annotations}: the list of {what} is empty")
            elif len(ids) < len(entries):
                self.problems.append(f"{annotations}: {len(entries) - len(ids)} {what} share an id with another")
        self.gather(
            (f"{annotations}: annotation {entry.get('id')} of image {entry.get('image_id')}", entry)
            for entry in content["annotations"]
        )

    def parse(self, entry: Mapping[str, Any]) -> Box:
        """An element of `annotations`."""
        try:
            image, category, crowd = entry["image_id"], entry["category_id"], entry.get("iscrowd", 0)
            x, y, width, height = (float(value) for value in entry["bbox"])
            area = float(entry.get("area") or 0)
            index, label = self._index_of.get(_id(image)), self._label_of.get(_id(category))
            if _id(image) is None or _id(category) is None:
                raise TypeError("they must be numbers or text")
        except (KeyError, TypeError, ValueError) as error:
            raise AcamkdError(
                "it needs image_id, category_id and bbox [x, y, width, height]; an area must be a number"
            ) from error
        if crowd not in (0, 1):
            raise AcamkdError(f"iscrowd must be 0 or 1, not {crowd}")
        if index is None:
            raise AcamkdError(f"the file lists no image {image}")
        if label is None:
            raise AcamkdError(f"the file lists no category {category}, only {', '.join(map(str, self._label_of))}")
        return Box(index, label, (x, y, x + width, y + height), bool(crowd), area)


def _paths(root: Path, split: Split) -> tuple[Path, Path]:
    if split.images is not None and split.annotations is not None:
        return root / split.images, root / split.annotations
    # COCO's own train and val are called so, and its archives lay their folders of images beside `annotations`.
    names = [str(split.name), f"{split.name}2017"]
    name = next((each for each in names if _instances(root, each).is_file()), names[0])
    annotations = root / split.annotations if split.annotations else _instances(root, name)
    folders = [folder for each in dict.fromkeys([name, *names]) for folder in (root / "images" / each, root / each)]
    return next((folder for folder in folders if folder.is_dir()), folders[0]), annotations


def _instances(root: Path, name: str) -> Path:
    return root / "annotations" / f"instances_{name}.json"


def _read(annotations: Path) -> dict[str, Any]:
    """The JSON, once every entry of its lists has the keys that are needed."""
    try:
        content = json.loads(annotations.read_bytes())
    except OSError as error:
        raise AcamkdError(f"cannot read the annotations {annotations}: {error.strerror}") from error
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
    """A value, with 96.0 as the whole number that it is."""
    return int(given) if isinstance(given, float) and given.is_integer() else given


def _id(given: Any) -> str | None:
    """What makes two ids the same; None if it can be none."""
    plain = _plain(given)
    return str(plain) if isinstance(plain, int | str) and not isinstance(plain, bool) else None


def _order(given: int | str) -> tuple[int, str]:
    """Sorts ids as numbers where they are, and after these as text."""
    text = str(given)
    return (int(text), "") if text.isdecimal() else (sys.maxsize, text)
