"""Halve the images of a data set once, since small trainings would spend a third of their time on doing so again.

    python studies/downscale_dataset.py camvid camvid-half --few 4

Images (.jpg) are averaged, masks (.png) keep one of four ids, COCO files (.json) get their boxes scaled; everything
else is left out. With --few 4, every fourth training image goes with its labels to a split `few` as well, and the
others go without theirs to images/rest, for `data.unlabeled`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from PIL import Image


def halve_image(source: Path, target: Path, resampling: Image.Resampling) -> None:
    """Write an image or mask of half the width and height."""
    with Image.open(source) as image:
        image.resize((image.width // 2, image.height // 2), resampling).save(target, quality=95)


def halve_coco(content: dict[str, Any]) -> dict[str, Any]:
    """The same annotations for images of half the width and height; polygons are dropped."""
    images = [image | {side: image[side] // 2 for side in ("width", "height")} for image in content["images"]]
    annotations = [
        {name: value for name, value in entry.items() if name != "segmentation"}
        | {"bbox": [side / 2 for side in entry["bbox"]], "area": entry["bbox"][2] * entry["bbox"][3] / 4}
        for entry in content["annotations"]
    ]
    return content | {"images": images, "annotations": annotations}


def few_labels(root: Path, every: int) -> tuple[int, int]:
    """Make `few` and `rest` of `train`, with hard links; returns how many images each has."""
    every_image = sorted((root / "images/train").iterdir())
    few = every_image[::every]
    for folder, files in {"few": few, "rest": [file for file in every_image if file not in few]}.items():
        for file in files:
            _link(file, root / "images" / folder / file.name)
    for mask in root.glob("masks/train/*.png"):
        if mask.stem in {file.stem for file in few}:
            _link(mask, root / "masks/few" / mask.name)
    for coco in root.glob("annotations/instances_train.json"):
        content = json.loads(coco.read_text(encoding="utf-8"))
        images = [image for image in content["images"] if image["file_name"] in {file.name for file in few}]
        known = {image["id"] for image in images}
        annotations = [entry for entry in content["annotations"] if entry["image_id"] in known]
        coco.with_name("instances_few.json").write_text(
            json.dumps(content | {"images": images, "annotations": annotations}), encoding="utf-8"
        )
    return len(few), len(every_image) - len(few)


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    target.hardlink_to(source)


def main() -> None:
    """Walk the folder and write its half beside it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--few", type=int, metavar="N", help="keep the labels of one training image in N")
    arguments = parser.parse_args()
    written = 0
    for file in sorted(arguments.source.rglob("*.*")):
        target = arguments.target / file.relative_to(arguments.source)
        if file.suffix in (".jpg", ".png", ".json"):
            target.parent.mkdir(parents=True, exist_ok=True)
            written += 1
        if file.suffix == ".jpg":
            halve_image(file, target, Image.Resampling.BOX)
        elif file.suffix == ".png":
            halve_image(file, target, Image.Resampling.NEAREST)
        elif file.suffix == ".json":
            target.write_text(json.dumps(halve_coco(json.loads(file.read_text(encoding="utf-8")))), encoding="utf-8")
    print(f"{arguments.target}: {written} files")
    if arguments.few:
        few, rest = few_labels(arguments.target, arguments.few)
        print(f"{arguments.target}: {few} training images in few, with labels, and {rest} in rest, without")


if __name__ == "__main__":
    main()
