"""Folders and files of a data set, and the splits that their names say."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import permutations
from pathlib import Path
from typing import TypeAlias

from acamkd.errors import AcamkdError
from acamkd.files import IMAGE_SUFFIXES

Keys: TypeAlias = dict[str, str]
"""One split, as a recipe writes it."""

WORDS: Mapping[str, frozenset[str]] = {
    "train": frozenset({"train", "training", "train2017"}),
    "val": frozenset({"val", "valid", "validation", "val2017"}),
    "test": frozenset({"test", "testing"}),
}
"""Split -> what exports of annotation tools call it."""

BOTH = "trainval"
"""What lists of training and validation images together are called."""

UNLABELED = frozenset({"unlabeled", "unlabelled", "rest", "extra", "unannotated"})
"""What folders of images without labels are called."""

VISUALIZATION = "Visualization"
"""End of the names of folders in LabelMe's exports with images that annotations are drawn on."""


def split_of(name: str) -> str | None:
    """`train`, `val` or `test`, where a word of a path says so: of its last part, or else of the folder, and so on.

    A part with words of two splits, such as `train_val`, says none.
    """
    for part in reversed(re.split(r"[/\\]", name)):
        told = [split for split, known in WORDS.items() if _words(part) & known]
        if len(told) == 1:
            return told[0]
    return None


def by_split(candidates: Iterable[tuple[str, Keys]]) -> dict[str, Keys]:
    """The first candidate of each split by its name; a single one without such a name is for training."""
    listed = list(candidates)
    named: dict[str, Keys] = {}
    for name, keys in listed:
        if split := split_of(name):
            named.setdefault(split, keys)
    if "train" not in named and (others := [(name, keys) for name, keys in listed if split_of(name) is None]):
        both = [(name, keys) for name, keys in others if BOTH in _words(name)]
        if len(both or others) > 1:
            return {}
        named["train"] = (both or others)[0][1]
        if both:
            named.pop("val", None)  # whose images it holds, too
    return {split: named[split] for split in WORDS if split in named}


def check_apart(folders: Mapping[str, Sequence[Path]]) -> None:
    """Raise AcamkdError if a folder lies in one of another split: whoever reads that one reads all folders below.

    Args:
        folders: Of each split, or of `unlabeled`.
    """
    listed = [(split, folder, folder.resolve()) for split, each in folders.items() for folder in each]
    for (split, folder, place), (other, outer, around) in permutations(listed, 2):
        if split != other and around in place.parents:
            also = "; --unlabeled FOLDER names it there" if split == "unlabeled" else ""
            raise AcamkdError(
                f"{folder} ({split}) lies in {outer} ({other}), which is read with all folders below it, so that its "
                f"images would be both: move it beside, out of {outer}{also}"
            )


def _words(text: str) -> set[str]:
    return set(re.split(r"[^a-z0-9]+", text.lower()))


def find_unlabeled(root: Path, labeled: Iterable[Path] = ()) -> list[str]:
    """Folders of images that are named as ones without labels, relative to the root.

    Args:
        root: The data set's folder.
        labeled: Folders of labeled images, in which they may lie, too.
    """
    parents = [parent for parent in dict.fromkeys([root, root / "images", *labeled]) if parent.is_dir()]
    folders = [folder for parent in parents for folder in sorted(parent.iterdir())]
    found = [folder for folder in folders if folder.name.lower() in UNLABELED and has_images(folder)]
    return [str(folder.relative_to(root)) for folder in found if folder.is_relative_to(root)]


def has_images(folder: Path, suffixes: Sequence[str] = IMAGE_SUFFIXES) -> bool:
    """Whether images, or files with other suffixes, lie in a folder itself."""
    with suppress(PermissionError):  # of a folder that is none of ours, such as lost+found
        return folder.is_dir() and any(file.suffix.lower() in suffixes for file in folder.iterdir())
    return False


def images_below(root: Path) -> list[Path]:
    """Folders that hold images, at most two levels down, the root first."""
    return [
        folder
        for folder in [root, *sorted(root.glob("*/")), *sorted(root.glob("*/*/"))]
        if folder.name[:1] != "." and not folder.name.endswith(VISUALIZATION) and has_images(folder)
    ]
