from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from acamkd import config, data
from acamkd.data.duplicates import difference_hash, identical, near_copies
from acamkd.data.image_io import read_image
from acamkd.data.scenes import draw_scene
from acamkd.errors import AcamkdError
from acamkd.jobs.examine_data import examine_data


def _scene(index: int, size: tuple[int, int] = (96, 128)) -> Image.Image:
    return Image.fromarray(draw_scene(size, seed=0, split="train", index=index).pixels)


def _jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer)


def test_files_of_the_same_bytes(tmp_path: Path) -> None:
    content = {"a": b"x" * 5000, "b": b"x" * 4999 + b"y", "c": b"x" * 5000, "d": b"x" * 40, "e": b"x" * 5000}
    for name, each in content.items():
        (tmp_path / name).write_bytes(each)
    files = [tmp_path / name for name in content]
    assert identical(files) == [(tmp_path / "c", tmp_path / "a"), (tmp_path / "e", tmp_path / "a")]
    assert identical(files[:2], files[2:]) == [(tmp_path / "a", tmp_path / "c")]
    assert identical([*files, tmp_path / "gone"], [tmp_path / "gone"]) == []


def test_copies_look_alike_and_other_scenes_do_not(tmp_path: Path) -> None:
    scenes = [_scene(index) for index in range(6)]
    copies = [
        _jpeg(scenes[0], 40), scenes[1].resize((64, 48)), scenes[2].resize((180, 140)),
        Image.eval(scenes[3], lambda value: min(255, value + 8)),
    ]  # fmt: skip
    flat = [Image.new("RGB", (64, 64), (shade, shade, shade)) for shade in (0, 90)]
    found = []
    for group in ([*copies, *flat, *scenes[4:]], [*scenes[:4], *flat, _scene(7)]):
        hashes = []
        for number, image in enumerate(group):
            image.convert("RGB").save(tmp_path / f"{number}.png")
            hashes.append(difference_hash(read_image(tmp_path / f"{number}.png")))
        found.append(np.stack(hashes))
    assert near_copies(*found) == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert near_copies(found[0][:0], found[1]) == []


def _yolo(root: Path) -> config.Recipe:
    """Two images per split; those of validation are a renamed copy and a smaller JPEG of the training's."""
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
    for index, name in enumerate("ab"):
        _scene(index).save(root / f"images/train/{name}.png")
    (root / "images/val/c.png").write_bytes((root / "images/train/a.png").read_bytes())
    _scene(1).resize((96, 72)).save(root / "images/val/d.jpg")
    for file in ("train/a", "train/b", "val/c", "val/d"):
        (root / f"labels/{file}.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    (root / "data.yaml").write_text("names: [cat]")
    raw = {"name": "x", "task": "detection", "data": {"root": str(root)}, "student": {"arch": "none"}}
    return config.parse({**raw, "train": {"epochs": 1}})


def test_a_renamed_copy_and_one_of_another_size_are_told(tmp_path: Path) -> None:
    recipe = _yolo(tmp_path)
    train, val = (data.build(recipe.data, "detection", split, seed=0, augment=False) for split in ("train", "val"))
    (same,) = data.compare_splits(train, val, recipe.data)  # before the images are decoded
    assert same.startswith(f"1 of 2 validation images are training images too ({tmp_path}/images/val/c.png is ")
    for split in (train, val):
        assert data.check(split, "full") == []
    same, alike = data.compare_splits(train, val, recipe.data)
    assert f"({tmp_path}/images/val/d.jpg like {tmp_path}/images/train/b.png): are they copies in another size" in alike
    assert alike.startswith("1 of 2 validation images look like training images")
    _, unlabeled, _ = data.compare_splits(val, val, recipe.data, train)
    assert unlabeled.startswith("1 of 2 validation images are unlabeled images too")
    tested = recipe.model_copy(update={"data": recipe.data.model_copy(update={"test": config.Split(name="train")})})
    found = examine_data(tested).splits
    assert found["val"].warnings == [same, alike]
    assert [warning.partition(" (")[0] for warning in found["test"].warnings] == [
        "2 of 2 test images are training images too: scores on them say nothing of others",
        "1 of 2 test images are validation images too",
        "1 of 2 test images look like validation images",
    ]


def _coco(root: Path, images: list[str], boxes: list[dict[str, Any]]) -> data.CocoDetection:
    for index, name in enumerate(dict.fromkeys(images)):
        _scene(index).save(root / name)
    content = {
        "images": [{"id": k, "file_name": name, "width": 128, "height": 96} for k, name in enumerate(images)],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [{"id": k, "category_id": 1, **box} for k, box in enumerate(boxes)],
    }
    (root / "boxes.json").write_text(json.dumps(content))
    return data.CocoDetection(root, root / "boxes.json")


def test_one_file_under_two_ids_and_a_box_twice(tmp_path: Path) -> None:
    boxes = [{"image_id": 0, "bbox": [1, 1, 9, 9]}, {"image_id": 1, "bbox": [30, 30, 9, 9]}]
    (listed,) = data.check(_coco(tmp_path, ["a.png", "a.png"], boxes), "headers")
    assert listed.startswith(f"1 images are listed more than once ({tmp_path}/a.png): what one entry shows, the other")
    twice = [*boxes, boxes[0], {**boxes[1], "bbox": [30, 30, 9, 9.5]}]
    (again,) = data.check(_coco(tmp_path, ["a.png", "b.png"], twice), "headers")
    assert "boxes.json: 1 boxes are there twice, of the same class and place" in again
    dataset = _coco(tmp_path, ["a.png", "b.png"], boxes)
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes())
    (copied,) = data.check(dataset, "headers")
    assert copied.startswith(f"1 of 2 images are copies of others, byte for byte, with other annotations ({tmp_path}/b")


def test_numbers_that_are_none(tmp_path: Path) -> None:
    for change, message in (
        ({"area": float("inf")}, r"has the area inf, which must be a finite number from 0 on"),
        ({"area": -4}, "has the area -4, which must be"),
        ({"bbox": [1, 1, float("inf"), 5]}, "has no defined area: its numbers must be finite"),
    ):
        dataset = _coco(tmp_path, ["a.png"], [{"image_id": 0, "bbox": [1, 1, 9, 9], **change}])
        with pytest.raises(AcamkdError, match=message):
            data.check(dataset, "headers")
