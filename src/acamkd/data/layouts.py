"""Detection of a folder's data format, and hints where none is found."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path

from acamkd.config import Data
from acamkd.data.formats import FORMATS
from acamkd.data.formats.masks import MASK_SUFFIXES
from acamkd.data.formats.yolo import NAMES
from acamkd.data.image_io import lines_of
from acamkd.errors import AcamkdError
from acamkd.models.base import Task

LOOKED_AT = 200
"""Number of folders that are searched for a hint."""


def layouts(root: Path, task: Task) -> dict[str, str]:
    """Formats whose patterns all match in a folder, each with the reason as text."""
    readers = [(name, reader) for name, readers in FORMATS.items() for reader in readers if task == reader.TASK]
    return _matching(root, [(name, reader.LAYOUT) for name, reader in readers]) or _matching(
        root, [(name, reader.SPARE_LAYOUT) for name, reader in readers]
    )


def _matching(root: Path, patterns: Iterable[tuple[str, Sequence[str]]]) -> dict[str, str]:
    return {
        name: f"{' and '.join(entries)} {'are' if len(entries) > 1 else 'is'} in {root}"
        for name, entries in patterns
        if entries and all(any(any(root.glob(each)) for each in entry.split(" or ")) for entry in entries)
    }


def hint(data: Data, task: Task) -> str:
    """Hint at other data in the root or beside it, with the keys that a recipe would need; empty if there is none."""
    other: Task = "segmentation" if task == "detection" else "detection"
    for folder in (data.root.absolute().parent, *_folders(data.root)):
        if reasons := layouts(folder, task):
            return f". Is data.root {folder}? {next(iter(reasons.values()))} ({next(iter(reasons))})"
    for folder in (data.root, *_folders(data.root)):
        if found := _files(folder, task):
            return f". {found}"
    if reasons := layouts(data.root, other):
        return f". For {other} it would be {next(iter(reasons))}: is task right?"
    return ""


def _files(folder: Path, task: Task) -> str:
    """Hint at known files in a folder of an unknown layout."""
    if task == "segmentation":
        named = any(word in folder.name.casefold() for word in ("mask", "label", "annot"))
        if named and any(file.suffix.lower() in MASK_SUFFIXES for file in folder.iterdir()):
            return f"Are there masks in {folder}? data.train: {{images: ..., masks: {folder.name}}} names them"
        return ""
    if file := next(folder.glob("*.json"), None):
        return f"Is {file} a COCO file? data.train: {{images: ..., annotations: ...}} names it, likewise data.val"
    if any(folder.glob("*.xml")):
        return (
            f"There are XML files in {folder}: data.format voc reads them, with data.train: {{images: ..., "
            "annotations: ...}, and data.val: {share: 0.2} if no images are for validation"
        )
    for file in sorted(folder.glob("*.y*ml")):
        with suppress(AcamkdError):  # of a file that is no text
            if re.search(r"^names:", "\n".join(lines_of(file)), re.MULTILINE):
                return f"Is {file} for format yolo? It is read under the name {NAMES}"
    if any(folder.glob("*.txt")):
        return (
            f"There are text files in {folder}: data.format yolo reads them, with data.classes and data.train: "
            "{images: ..., annotations: ...}, likewise data.val"
        )
    return ""


def _folders(root: Path) -> Iterator[Path]:
    """Visible folders of a folder, and those one level below."""

    def below(folder: Path) -> list[Path]:
        with suppress(PermissionError):  # of a folder that is none of ours, such as lost+found
            return [each for each in sorted(folder.iterdir()) if each.is_dir() and each.name[0] != "."]
        return []

    both = [each for child in islice(below(root), LOOKED_AT) for each in (child, *islice(below(child), LOOKED_AT))]
    return islice(iter(both), LOOKED_AT)
