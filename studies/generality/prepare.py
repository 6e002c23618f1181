"""Make the study's images from the five data sets: small, with a report split, and with labels for few of them.

    python studies/generality/prepare.py SOURCE TARGET

SOURCE holds the folders animals7, bccd, camvid, facade11 and voc07mini, each with images/{train,val}/*.jpg, and with
masks/{train,val}/*.png or annotations/instances_{train,val}.json. TARGET gets the same folders, each with the splits

- `report`: a fifth of the training images, in whole groups that are no neighbors of the others;
- `train`: the other training images;
- `few`: one in eight of `train`, with labels;
- `rest`: the images of `train` that are not in `few`, without labels;
- `val`: the validation images.

Everything is drawn by names alone, so that every machine draws the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

REPORT_SHARE = 1 / 5
FEW = 8
BLOCK = 8
"""Photos that are neighbors by name and stay together."""


@dataclass(frozen=True)
class Source:
    """A data set.

    Attributes:
        size: Width and height of every image that is written, whatever its own are.
        photo: What of a file's name names the photo; crops of one photo stay together.
        report_drive: Beginning of the names of the report split; without it blocks of neighbors are drawn.
    """

    size: tuple[int, int]
    photo: str = ".*"
    report_drive: str | None = None


SOURCES = {
    "animals7": Source((200, 200)),
    "bccd": Source((240, 180)),
    "camvid": Source((240, 180), report_drive="0006R0"),
    "facade11": Source((200, 200), photo=r".*(?=_scaled_\d+)"),
    "voc07mini": Source((240, 180)),
}


def split(names: Sequence[str], source: Source) -> dict[str, list[str]]:
    """Names of `report`, `train`, `few` and `rest` among the training images' names, without suffix."""
    names = sorted(names, key=_by_number)
    if source.report_drive is not None:
        report = {name for name in names if name.startswith(source.report_drive)}
    else:
        report = set(_drawn(names, source.photo))
    train = [name for name in names if name not in report]
    few = train[::FEW]
    return {
        "report": [name for name in names if name in report],
        "train": train,
        "few": few,
        "rest": [name for name in train if name not in few],
    }


def _drawn(names: Sequence[str], photo: str) -> Iterable[str]:
    """Whole blocks of neighboring photos, in the order of their hashes, until there are enough images."""
    photos: dict[str, list[str]] = {}
    for name in names:
        found = re.match(photo, name)
        photos.setdefault(found[0] if found else name, []).append(name)
    ordered = list(photos)
    blocks = [ordered[start : start + BLOCK] for start in range(0, len(ordered), BLOCK)]
    drawn: list[str] = []
    for block in sorted(blocks, key=lambda block: hashlib.sha1(block[0].encode()).hexdigest()):
        if len(drawn) >= REPORT_SHARE * len(names):
            break
        drawn += [name for key in block for name in photos[key]]
    return drawn


def _by_number(name: str) -> list[tuple[int, str]]:
    """Sort key that takes digits as numbers."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def prepare(source: Path, target: Path, how: Source) -> dict[str, int]:
    """Write a data set's splits; returns their numbers of images."""
    names = split([file.stem for file in (source / "images/train").glob("*.jpg")], how)
    names["val"] = sorted(file.stem for file in (source / "images/val").glob("*.jpg"))
    for name, chosen in names.items():
        origin = "val" if name == "val" else "train"
        for stem in chosen:
            _resize(source / f"images/{origin}/{stem}.jpg", target / f"images/{name}/{stem}.jpg", how.size)
            mask = source / f"masks/{origin}/{stem}.png"
            if mask.is_file() and name != "rest":
                _resize(mask, target / f"masks/{name}/{stem}.png", how.size)
        annotations = source / f"annotations/instances_{origin}.json"
        if annotations.is_file() and name != "rest":
            content = json.loads(annotations.read_text(encoding="utf-8"))
            file = target / f"annotations/instances_{name}.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(_scaled(content, set(chosen), how.size)), encoding="utf-8")
    return {name: len(chosen) for name, chosen in names.items()}


def _resize(source: Path, target: Path, size: tuple[int, int]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    is_mask = source.suffix == ".png"
    with Image.open(source) as image:
        image.resize(size, Image.Resampling.NEAREST if is_mask else Image.Resampling.LANCZOS).save(target, quality=92)


def _scaled(content: dict[str, Any], names: set[str], size: tuple[int, int]) -> dict[str, Any]:
    """The chosen images' boxes in the new size, without polygons; boxes under a pixel are left out."""
    images = {entry["id"]: entry for entry in content["images"] if Path(entry["file_name"]).stem in names}
    annotations = []
    for entry in content["annotations"]:
        if entry["image_id"] not in images:
            continue
        own = images[entry["image_id"]]
        across, down = size[0] / own["width"], size[1] / own["height"]
        left, top, width, height = entry["bbox"]
        box = [left * across, top * down, width * across, height * down]
        if min(box[2:]) < 1:
            continue
        kept = {key: value for key, value in entry.items() if key != "segmentation"}
        annotations.append(kept | {"bbox": box, "area": box[2] * box[3]})
    resized = [entry | {"width": size[0], "height": size[1]} for entry in images.values()]
    return content | {"images": resized, "annotations": annotations}


def main() -> None:
    """Prepare all five."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    arguments = parser.parse_args()
    for name, how in SOURCES.items():
        found = prepare(arguments.source / name, arguments.target / name, how)
        print(f"{name}: " + ", ".join(f"{count} {split}" for split, count in found.items()))


if __name__ == "__main__":
    main()
