"""YOLO's text files: one per image, one line `class cx cy w h` per box, in shares of the image."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from acamkd.config import Data, Split
from acamkd.data.boxes import Box, BoxDataset
from acamkd.data.checks import check_classes
from acamkd.data.dataset import SplitName, Transform
from acamkd.data.folders import Folder, existing, no_images, twins
from acamkd.data.image_io import lines_of
from acamkd.errors import AcamkdError

log = logging.getLogger(__name__)

NAMES = "data.yaml"

ROUNDING = 1e-3
"""A center that lies no farther outside of its image is rounded, and lies at the edge."""

ALIASES = {"val": "validation"}
"""Another key of data.yaml for a split."""


class YoloDetection(BoxDataset):
    """Object detection: images, and text files of the same names beside them or in a folder of their own.

    Class k of the files is label k + 1. An image whose file is missing or empty has no boxes.

    Args:
        images: Folders of images, with all folders in them, or text files that list images, one per line.
        labels: Folder of the text files, of which each lies where its image lies among the `images`. None: beside the
            images' folder, `labels` where its path has `images`, or else with the images.
        classes: Names in the order of their numbers.
        transform: Random changes.
        seed: Of the random changes.

    Raises:
        AcamkdError: A folder or file cannot be read.
    """

    LAYOUT = (NAMES,)
    SPLIT_KEYS = frozenset({"images", "annotations"})
    KNOWS_SIZES = False

    @classmethod
    def open_split(cls, data: Data, split: SplitName, *, transform: Transform | None, seed: int) -> YoloDetection:
        """Open one split of a recipe's `data`."""
        given: Split = getattr(data, split)
        images = [data.root / given.images] if given.images else sources(data.root, given.name or split)
        labels = data.root / given.annotations if given.annotations else None
        log.info("%s images: %s", split, ", ".join(map(str, images)))
        return cls(images, labels, class_names(data.root, data.classes), transform=transform, seed=seed)

    def __init__(
        self,
        images: Path | Sequence[Path],
        labels: Path | None,
        classes: Sequence[str],
        *,
        transform: Transform | None = None,
        seed: int = 0,
    ) -> None:
        given = [images] if isinstance(images, Path) else list(images)
        pairs: list[tuple[Path, Path | None]] = []
        problems: list[str] = []
        warnings: list[str] = []
        for each in given:
            if each.suffix.lower() == ".txt" and each.is_file():
                pairs += _listed(each, labels)
                continue
            folder, texts = Folder(each), Folder(labels or labels_of(each), (".txt",))
            found = [(file, texts.find(folder.name(file))) for file in folder.files]
            pairs += found
            problems += [*no_images(folder), *twins(folder, "boxes")]
            warnings += folder.described_left_out()
            if folder.files and not texts.files and texts.path == each:
                problems.append(
                    f"{each} has no `images` in its path and holds no text files: name the folder of labels in "
                    "annotations"
                )
            used = {text for _, text in found}
            # `classes` is what some tools write there.
            if lost := [text.name for text in texts.files if text not in used and text.stem != "classes"]:
                warnings.append(f"{texts.path}: {len(lost)} files have no image in {each} ({', '.join(lost[:3])})")
        super().__init__(
            [file for file, _ in pairs],
            [text for _, text in pairs if text is not None],
            classes,
            source=labels or (given[0] if given[0].is_file() else labels_of(given[0])),
            sizes=None,
            transform=transform,
            seed=seed,
        )
        if not pairs and not problems:
            problems.append(f"{given[0]}: the list is empty")
        self.problems += problems
        self.warnings += warnings
        self.gather(
            (f"{text}:{number}", (index, line))
            for index, (_, text) in enumerate(pairs)
            if text is not None
            for number, line in enumerate(lines_of(text), start=1)
            if line.strip()
        )

    def why_absent(self, counts: Tensor) -> str:
        """Whether the numbers may begin with 1."""
        return "the files count classes from 0: do theirs begin with 1?" if not counts[0] else ""

    def parse(self, entry: tuple[int, str]) -> Box:
        """The index of an image, and one of its lines."""
        index, line = entry
        words = line.split()
        try:
            number, cx, cy, width, height = map(float, words)
        except ValueError as error:
            raise AcamkdError(f"a box is `class cx cy w h`, not `{line.strip()}`") from error
        if number not in range(len(self.classes)):
            raise AcamkdError(f"class {words[0]} is none of the {len(self.classes)}, 0 to {len(self.classes) - 1}")
        if not (-ROUNDING <= cx <= 1 + ROUNDING and -ROUNDING <= cy <= 1 + ROUNDING):
            raise AcamkdError(f"the center ({cx:g}, {cy:g}) must be shares of width and height from 0 to 1, not pixels")
        cx, cy = min(max(cx, 0.0), 1.0), min(max(cy, 0.0), 1.0)
        return Box(index, int(number) + 1, (cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2))


def sources(root: Path, split: str) -> list[Path]:
    """Where a split's images lie: folders, or text files that list images.

    Paths of data.yaml are resolved as the format's authors do: below its `path`, which is relative to data.yaml's own
    folder, else to the current one or its `datasets`; and exports that say ../train/images for what is train/images
    beside their data.yaml are understood.

    Args:
        root: Folder of data.yaml.
        split: A key of data.yaml, or a folder in `images`.

    Raises:
        AcamkdError: There is no such folder or file.
    """
    content = _content(root)
    base = _base(root, content)
    given = content.get(split, content.get(ALIASES.get(split, split))) or f"images/{split}"
    entries = given if isinstance(given, list) else [given]
    if not all(isinstance(entry, str) for entry in entries):
        raise AcamkdError(f"{root / NAMES}: {split} must be folders of images or files that list them, not {given!r}")
    found = []
    for entry in entries:
        places = [base / entry, base / entry.removeprefix("../"), base / split / "images"]
        place = next((spelled for place in places if (spelled := existing(place)).exists()), None)
        if place is None:
            raise AcamkdError(
                f"there is no folder of images for the split {split}; looked for {', '.join(map(str, places))}: "
                "give the split's `images` in data.train and data.val"
            )
        found.append(place)
    return found


def labels_of(images: Path) -> Path:
    """The folder of labels that goes with a folder of images: `labels` for the last `images` of its path."""
    parts = list(images.parts)
    if "images" in parts:
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    return Path(*parts)


def _base(root: Path, content: dict[str, Any]) -> Path:
    """The folder that data.yaml's paths are relative to."""
    given = content.get("path")
    if not given:
        return root
    path = Path(str(given)).expanduser()
    places = [root / path, *([] if path.is_absolute() else [path, "datasets" / path])]
    if root.resolve().name == path.name:  # `path: coco8` in coco8/data.yaml
        places.append(root)
    base = next((place for place in places if place.is_dir()), None)
    if base is None:
        raise AcamkdError(
            f"{root / NAMES}: there is no folder for path {given}; looked for "
            f"{', '.join(str(place.resolve()) for place in places)}: correct path, or leave it out where data.yaml "
            "lies beside the images"
        )
    log.info("%s: path %s is %s", root / NAMES, given, base.resolve())
    return base


def _listed(file: Path, labels: Path | None) -> list[tuple[Path, Path | None]]:
    """Images that a text file lists, relative to it or to the current folder, each with its labels."""
    folders: dict[Path, Folder | None] = {}
    pairs = []
    for line in filter(None, map(str.strip, lines_of(file))):
        written = Path(line.replace("\\", "/"))
        places = [file.parent / written, written]
        image = next((spelled for place in places if (spelled := existing(place)).is_file()), places[0])
        beside = labels or labels_of(image.parent)
        if beside not in folders:
            folders[beside] = Folder(beside, (".txt",)) if beside.is_dir() else None
        texts = folders[beside]
        pairs.append((image, None if texts is None else texts.find(image.stem)))
    return pairs


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
    if wrong := [(number, name) for number, name in enumerate(names) if not isinstance(name, str)]:
        number, name = wrong[0]
        written = _content(root, yaml.BaseLoader)["names"]  # every scalar as text
        text = written[number] if isinstance(written, list) else written[str(number)]
        raise AcamkdError(
            f"{file}: names: class {number} is written {text}, which YAML reads as {name!r}, not as text: put it in "
            f'quotes, "{text}"' + (f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else "")
        )
    own = tuple(names)
    check_classes(given, own, f"the names of {file}")
    return own


def _content(root: Path, loader: type[yaml.SafeLoader] | type[yaml.BaseLoader] = yaml.SafeLoader) -> dict[str, Any]:
    file = root / NAMES
    if not file.is_file():
        return {}
    try:
        content = yaml.load("\n".join(lines_of(file)), Loader=loader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: of a date such as 2024-13-45
        raise AcamkdError(f"{file} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise AcamkdError(f"{file} must hold a mapping with train, val and names")
    return content
