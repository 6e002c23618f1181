"""YOLO's text files: one per image, one line `class cx cy w h` or `class x y x y x y ...` per object, in shares."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from acamkd.config import Data, Split
from acamkd.data.boxes import Box, BoxDataset
from acamkd.data.checks import check_classes
from acamkd.data.dataset import SplitName, Transform
from acamkd.data.folders import Folder, described_ends, existing, no_images, twins
from acamkd.data.image_io import lines_of
from acamkd.errors import AcamkdError

log = logging.getLogger(__name__)

NAMES = "data.yaml"

ROUNDING = 1e-3
"""A center at most this far outside its image is taken for a rounding error and moved to the edge."""

BEGIN = "the files count classes from 0: do theirs begin with 1?"

ALIASES = {"val": "validation"}
"""Alternative keys of data.yaml for a split."""


class YoloDetection(BoxDataset):
    """Object detection: images, and text files of the same names beside them or in a folder of their own.

    Class k of the files is label k + 1. An image whose file is missing or empty has no boxes. The box of a polygon,
    three corners or more, is what encloses it. Keypoints behind a box are not read.

    Args:
        images: Folders of images, with all folders in them, or text files that list images, one per line.
        labels: Folder of the text files, at the same relative paths as their images. None: the images' folder with
            `labels` in place of the last `images` of its path, or else the images' folder itself.
        classes: Names in the order of their numbers.
        keypoint_values: How many numbers of keypoints follow a box; no line is a polygon then.
        transform: Augmentation.
        seed: Seed of the augmentation.

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
        classes, values = class_names(data.root, data.classes), keypoint_values(data.root)
        return cls(images, labels, classes, keypoint_values=values, transform=transform, seed=seed)

    def __init__(
        self,
        images: Path | Sequence[Path],
        labels: Path | None,
        classes: Sequence[str],
        *,
        keypoint_values: int = 0,
        transform: Transform | None = None,
        seed: int = 0,
    ) -> None:
        given = [images] if isinstance(images, Path) else list(images)
        pairs: list[tuple[Path, Path | None]] = []
        problems: list[str] = []
        warnings: list[str] = []
        for each in given:
            if each.suffix.lower() == ".txt" and each.is_file():
                listed, ends = _listed(each, labels)
                pairs += listed
                warnings += described_ends(ends, each)
                continue
            folder, texts = Folder(each), Folder(labels or labels_of(each), (".txt",))
            found = [(file, texts.find(folder.name(file))) for file in folder.files]
            pairs += found
            problems += no_images(folder)
            warnings += folder.described_left_out()
            if folder.files and not texts.files and texts.path == each:
                problems.append(
                    f"{each} has no `images` in its path and holds no text files: name the folder of labels in "
                    "annotations"
                )
            used = {text for _, text in found}
            # Some tools write a file `classes.txt` there.
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
        self.problems += [*problems, *twins(pairs, "boxes")]
        self.warnings += warnings
        self.keypoint_values = keypoint_values
        self.gather(
            (f"{text}:{number}", (index, line))
            for index, (_, text) in enumerate(pairs)
            if text is not None
            for number, line in enumerate(lines_of(text), start=1)
            if line.strip()
        )

    def why_absent(self, counts: Tensor) -> str:
        """Ask whether the numbers begin with 1, if class 0 is absent."""
        return BEGIN if counts[:-1].any() and not counts[0] else ""

    def parse(self, entry: tuple[int, str]) -> Box:
        """The index of an image, and one of its lines."""
        index, line = entry
        words = line.split()
        try:
            number, *shares = map(float, words)
            if len(shares) == 4 + self.keypoint_values:
                del shares[4:]
            if len(shares) != 4 and (self.keypoint_values or len(shares) < 6 or len(shares) % 2):
                raise ValueError("neither a box nor a polygon")
        except ValueError as error:
            given = line.strip()[:80]
            other = "a polygon, `class x y x y x y ...`, has 3 corners or more"
            if self.keypoint_values:
                other = f"as kpt_shape of {NAMES} says, {self.keypoint_values} numbers of keypoints follow it"
            raise AcamkdError(f"a box is `class cx cy w h`, not `{given}`; {other}") from error
        if number not in range(len(self.classes)):
            hint = f"; {BEGIN}" if number == len(self.classes) else ""
            raise AcamkdError(
                f"class {words[0]} is none of the {len(self.classes)}, 0 to {len(self.classes) - 1}{hint}"
            )
        if len(shares) > 4:
            return Box(index, int(number) + 1, _enclosing(shares))
        cx, cy, width, height = shares
        if not (-ROUNDING <= cx <= 1 + ROUNDING and -ROUNDING <= cy <= 1 + ROUNDING):
            raise AcamkdError(f"the center ({cx:g}, {cy:g}) must be shares of width and height from 0 to 1, not pixels")
        cx, cy = min(max(cx, 0.0), 1.0), min(max(cy, 0.0), 1.0)
        return Box(index, int(number) + 1, (cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2))


def sources(root: Path, split: str) -> list[Path]:
    """Locate a split's images: folders, or text files that list images.

    Paths of data.yaml are resolved as the format's authors do, below its `path`. That is relative to data.yaml's own
    folder, or else to the current folder or its `datasets`. Some exports write ../train/images for the folder
    train/images beside their data.yaml; this is accepted.

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
    for entry in (written.replace("\\", "/") for written in entries):
        places = dict.fromkeys([base / entry, base / entry.removeprefix("../"), base / split / "images"])
        place = next((spelled for place in places if (spelled := existing(place)).exists()), None)
        if place is None:
            raise AcamkdError(
                f"there is no folder of images for the split {split}; looked for {', '.join(map(str, places))}: "
                f"name it in {root / NAMES}, or with `images` in data.train and data.val; data.val: {{share: 0.2}} "
                "draws validation images"
            )
        found.append(place)
    return found


def labels_of(images: Path) -> Path:
    """The folder of labels of a folder of images: `labels` replaces the last `images` of its path."""
    parts = list(images.parts)
    if "images" in parts:
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    return Path(*parts)


def _base(root: Path, content: dict[str, Any]) -> Path:
    """The folder that data.yaml's paths are relative to."""
    given = content.get("path")
    if not given:
        return root
    path = Path(str(given).replace("\\", "/")).expanduser()
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


def _listed(file: Path, labels: Path | None) -> tuple[list[tuple[Path, Path | None]], dict[str, Path]]:
    """Images that a text file lists, relative to it or to the current folder, each with its labels.

    Also what `find_ends` has found of them.
    """
    lines = [line.replace("\\", "/") for line in map(str.strip, lines_of(file)) if line]
    places = {line: (file.parent / line, Path(line)) for line in lines}
    images = {line: next((place for place in places[line] if place.is_file()), None) for line in lines}
    ends: dict[str, Path] = {}
    if missing := [line for line, image in images.items() if image is None]:
        around = Folder(file.parent)
        images |= {line: around.find(Path(line).as_posix()) for line in missing}
        ends = {} if any(images.values()) else around.find_ends(lines)
    folders: dict[Path, Folder | None] = {}
    pairs: list[tuple[Path, Path | None]] = []
    for line in lines:
        image = images[line] or ends.get(line, places[line][0])
        beside = labels or labels_of(image.parent)
        if beside not in folders:
            folders[beside] = Folder(beside, (".txt",)) if beside.is_dir() else None
        texts = folders[beside]
        name = image.stem if labels is None else image.with_suffix("").as_posix()
        pairs.append((image, None if texts is None else texts.find_end(name)))
    return pairs, ends


def _enclosing(corners: Sequence[float]) -> tuple[float, float, float, float]:
    """The box around a polygon, x y x y ..., whose corners may lie a rounding error outside of the image.

    Raises:
        AcamkdError: One lies farther outside.
    """
    if not all(-ROUNDING <= share <= 1 + ROUNDING for share in corners):
        raise AcamkdError("a polygon's corners must be shares of width and height from 0 to 1, not pixels")
    across, down = ([min(max(share, 0.0), 1.0) for share in corners[axis::2]] for axis in (0, 1))
    return min(across), min(down), max(across), max(down)


def class_names(root: Path, given: Sequence[str] | None) -> tuple[str, ...]:
    """Class names, from data.yaml if there is one; raises AcamkdError if they are missing or differ from `given`."""
    names: Any = _content(root).get("names")
    file = root / NAMES
    if names is None:
        if given is None:
            raise AcamkdError(f"the class names are missing: give `names` in {file}, or data.classes")
        return tuple(given)
    if isinstance(names, dict):
        numbered = {str(number): name for number, name in names.items()}
        if set(numbered) != set(map(str, range(len(names)))):
            raise AcamkdError(f"{file}: names must be numbered 0 to {len(names) - 1}, not {', '.join(map(str, names))}")
        names = [numbered[str(number)] for number in range(len(names))]
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
    number = _content(root).get("nc", len(own))
    if number != len(own):
        raise AcamkdError(f"{file}: nc is {number}, but there are {len(own)} names: correct either")
    check_classes(given, own, f"the names of {file}")
    return own


def keypoint_values(root: Path) -> int:
    """How many numbers of keypoints follow a box, as `kpt_shape` of data.yaml says; 0 without it.

    Raises:
        AcamkdError: It is not two whole numbers.
    """
    shape = _content(root).get("kpt_shape", [0, 0])
    if not (isinstance(shape, list) and len(shape) == 2 and all(isinstance(each, int) for each in shape)):
        raise AcamkdError(
            f"{root / NAMES}: kpt_shape must be [KEYPOINTS, VALUES OF EACH], such as [17, 3], not {shape}"
        )
    return math.prod(shape)


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
