"""Halve the pictures of a data set once, since small trainings would spend a third of their time on doing so again.

    python benchmarks/halve.py camvid camvid-half

Pictures (.jpg) are averaged, masks (.png) keep one of four ids, COCO files (.json) get their boxes scaled; everything
else is left out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from PIL import Image


def halve_picture(source: Path, target: Path, resampling: Image.Resampling) -> None:
    """Write a picture or mask of half the width and height."""
    with Image.open(source) as image:
        image.resize((image.width // 2, image.height // 2), resampling).save(target, quality=95)


def halve_coco(content: dict[str, Any]) -> dict[str, Any]:
    """The same annotations for pictures of half the width and height; polygons are dropped."""
    images = [image | {side: image[side] // 2 for side in ("width", "height")} for image in content["images"]]
    annotations = [
        {name: value for name, value in entry.items() if name != "segmentation"}
        | {"bbox": [side / 2 for side in entry["bbox"]], "area": entry["bbox"][2] * entry["bbox"][3] / 4}
        for entry in content["annotations"]
    ]
    return content | {"images": images, "annotations": annotations}


def main() -> None:
    """Walk the folder and write its half beside it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    arguments = parser.parse_args()
    written = 0
    for file in sorted(arguments.source.rglob("*.*")):
        target = arguments.target / file.relative_to(arguments.source)
        if file.suffix in (".jpg", ".png", ".json"):
            target.parent.mkdir(parents=True, exist_ok=True)
            written += 1
        if file.suffix == ".jpg":
            halve_picture(file, target, Image.Resampling.BOX)
        elif file.suffix == ".png":
            halve_picture(file, target, Image.Resampling.NEAREST)
        elif file.suffix == ".json":
            target.write_text(json.dumps(halve_coco(json.loads(file.read_text(encoding="utf-8")))), encoding="utf-8")
    print(f"{arguments.target}: {written} files")


if __name__ == "__main__":
    main()
