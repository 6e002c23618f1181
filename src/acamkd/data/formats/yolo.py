"""YOLO's text files: one per image, one line `class cx cy w h` per box, in shares of the image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from acamkd.config import Data, Split
from acamkd.data.boxes import Box, BoxDataset
from acamkd.data.checks import check_classes, twins
from acamkd.data.dataset import SplitName, Transform
from acamkd.data.image_io import files_of, lines_of
from acamkd.errors import AcamkdError
from acamkd.files import IMAGE_SUFFIXES

NAMES = "data.yaml"


class YoloDetection(BoxDataset):
    """Object detection: a folder of images, and beside it a folder of text files of the same names.

    Class k of the files is label k + 1. An image whose file is missing or empty has no boxes.

    Args:
        images: Folder of images; its labels lie in the folder that has `labels` where its path has `images`.
        labels: The folder of labels, if it lies elsewhere.
        classes: Names in the order of their numbers.
        transform: Random changes.
        seed: Of the random changes.

    Raises:
        AcamkdError: A folder or file cannot be read.
    """

    LAYOUT = (NAMES,)
    SPLIT_KEYS = frozenset({"images", "annotations"})

    @classmethod
    def open_split(cls, data: Data, split: SplitName, *, transform: Transform | None, seed: int) -> YoloDetection:
        """Open one split of a recipe's `data`."""
        given: Split = getattr(data, split)
        images, labels = folders(
            data.root,
            given.name or split,
            images=data.root / given.images if given.images else None,
            labels=data.root / given.annotations if given.annotations else None,
        )
        return cls(images, labels, class_names(data.root, data.classes), transform=transform, seed=seed)

    def __init__(
        self,
        images: Path,
        labels: Path,
        classes: Sequence[str],
        *,
        transform: Transform | None = None,
        seed: int = 0,
    ) -> None:
        files, texts = files_of(images, IMAGE_SUFFIXES), {file.stem: file for file in files_of(labels, (".txt",))}
        super().__init__(
            files,
            [texts[file.stem] for file in files if file.stem in texts],
            classes,
            source=labels,
            sizes=None,
            transform=transform,
            seed=seed,
        )
        if not files:
            self.problems.append(f"{images}: the folder holds no images ({', '.join(IMAGE_SUFFIXES)})")
        self.problems += twins(files, "boxes")
        stems = {file.stem for file in files} | {"classes"}  # which some tools write there
        if lost := [file.name for stem, file in texts.items() if stem not in stems]:
            self.warnings.append(f"{labels}: {len(lost)} files have no image in {images} ({', '.join(lost[:3])})")
        self._gather(
            (f"{texts[file.stem]}:{number}", (index, line))
            for index, file in enumerate(files)
            if file.stem in texts
            for number, line in enumerate(lines_of(texts[file.stem]), start=1)
            if line.strip()
        )

    def _parse(self, entry: tuple[int, str]) -> Box:
        index, line = entry
        words = line.split()
        try:
            number, (cx, cy, width, height) = int(words[0]), map(float, words[1:])
        except ValueError as error:
            raise AcamkdError(f"a box is `class cx cy w h`, not `{line.strip()}`") from error
        if not 0 <= number < len(self.classes):
            raise AcamkdError(f"class {number} is none of the {len(self.classes)}, 0 to {len(self.classes) - 1}")
        if not (0 <= cx <= 1 and 0 <= cy <= 1):
            raise AcamkdError(f"the center ({cx:g}, {cy:g}) must be shares of width and height from 0 to 1, not pixels")
        return Box(index, number + 1, (cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2))


def folders(root: Path, split: str, *, images: Path | None = None, labels: Path | None = None) -> tuple[Path, Path]:
    """Where a split's images and labels lie.

    Args:
        root: The data set.
        split: Name of the split: a key of data.yaml, or a folder in `images`.
        images: The folder of images, if it is known.
        labels: The folder of labels, likewise.

    Raises:
        AcamkdError: There is no such folder of images, or there are several, or the labels' place does not follow.
    """
    if images is None:
        given = _content(root).get(split) or f"images/{split}"
        if isinstance(given, list) and len(given) == 1:
            (given,) = given
        if not isinstance(given, str):
            raise AcamkdError(
                f"{root / NAMES}: {split} must be one folder of images, not {given!r}: lay them into one, or "
                "give the split's `images`"
            )
        # Exports of Roboflow say ../train/images for what is train/images beside their data.yaml.
        candidates = [root / given, root / given.removeprefix("../"), root / split / "images"]
        images = next((folder for folder in candidates if folder.is_dir()), None)
        if images is None:
            raise AcamkdError(
                f"there is no folder of images for the split {split}; looked for {', '.join(map(str, candidates))}: "
                "give the split's `images` in data.train and data.val"
            )
    if labels is None:
        parts = list(images.parts)
        if "images" not in parts:
            raise AcamkdError(f"{images} has no `images` in its path: name the folder of labels in annotations")
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
        labels = Path(*parts)
    return images, labels


def class_names(root: Path, given: Sequence[str] | None) -> tuple[str, ...]:
    """Names of the classes, from data.yaml where there is one; raises AcamkdError if there are none or others."""
    names: Any = _content(root).get("names")
    file = root / NAMES
    if names is None:
        if given is None:
            raise AcamkdError(f"the class names are missing: give `names` in {file}, or data.classes")
        return tuple(given)
    if isinstance(names, dict):
        if sorted(names, key=str) != sorted(range(len(names)), key=str):
            raise AcamkdError(f"{file}: names must be numbered 0 to {len(names) - 1}, not {', '.join(map(str, names))}")
        names = [names[number] for number in range(len(names))]
    if not (isinstance(names, list) and names):
        raise AcamkdError(f"{file}: names must be a list, or a mapping from number to name")
    own = tuple(map(str, names))
    check_classes(given, own, f"the names of {file}")
    return own


def _content(root: Path) -> dict[str, Any]:
    file = root / NAMES
    if not file.is_file():
        return {}
    try:
        content = yaml.safe_load("\n".join(lines_of(file)))
    except yaml.YAMLError as error:
        raise AcamkdError(f"{file} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise AcamkdError(f"{file} must hold a mapping with train, val and names")
    return content
