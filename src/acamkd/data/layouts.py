"""Which format a folder's layout is, and what to say where it is none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from acamkd.config import Data
from acamkd.data.formats import FORMATS
from acamkd.models.base import Task

LOOKED_AT = 200
"""Folders that are looked at for a hint."""


def layouts(root: Path, task: Task) -> dict[str, str]:
    """Formats whose patterns all match something in a folder, each with the reason in words."""
    readers = [(name, reader) for name, readers in FORMATS.items() for reader in readers if task == reader.TASK]
    return _matching(root, [(name, reader.LAYOUT) for name, reader in readers]) or _matching(
        root, [(name, reader.SPARE_LAYOUT) for name, reader in readers if reader.SPARE_LAYOUT]
    )


def _matching(root: Path, patterns: Iterable[tuple[str, Sequence[str]]]) -> dict[str, str]:
    return {
        name: f"{' and '.join(entries)} {'are' if len(entries) > 1 else 'is'} in {root}"
        for name, entries in patterns
        if all(any(root.glob(entry)) for entry in entries)
    }


def hint(data: Data, task: Task) -> str:
    """What else is there, in the root or beside it, and how a recipe would name it; empty where nothing is known."""
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
    """Files of a known kind in a folder of an unknown layout."""
    if task == "segmentation":
        if any(folder.glob("*.png")) and any(word in folder.name.casefold() for word in ("mask", "label", "annot")):
            return f"Are there masks in {folder}? data.train: {{images: ..., masks: {folder.name}}} names them"
        return ""
    if file := next(folder.glob("*.json"), None):
        return f"Is {file} a COCO file? data.train: {{images: ..., annotations: ...}} names it, likewise data.val"
    if any(folder.glob("*.xml")):
        return (
            f"There are XML files in {folder}: data.format voc reads them, with data.train: {{images: ..., "
            "annotations: ...}, and data.val: {share: 0.2} if no images are for validation"
        )
    if any(folder.glob("*.txt")):
        return (
            f"There are text files in {folder}: data.format yolo reads them, with data.classes and data.train: "
            "{images: ..., annotations: ...}, likewise data.val"
        )
    return ""


def _folders(root: Path) -> Iterator[Path]:
    """Visible folders in a folder and in these."""

    def below(folder: Path) -> Iterator[Path]:
        return (each for each in sorted(folder.iterdir()) if each.is_dir() and each.name[0] != ".")

    both = [each for child in islice(below(root), LOOKED_AT) for each in (child, *islice(below(child), LOOKED_AT))]
    return islice(iter(both), LOOKED_AT)
