"""`data.val: {share: 0.2}` for every format."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from acamkd import config, data
from acamkd.data.part import draw_share
from acamkd.errors import AcamkdError
from acamkd.models.base import Task

VOC = """<annotation><size><width>20</width><height>10</height></size><object><name>{}</name><difficult>{}</difficult>
<bndbox><xmin>{}</xmin><ymin>3</ymin><xmax>19</xmax><ymax>6</ymax></bndbox></object></annotation>"""


def _images(folder: Path) -> list[Path]:
    folder.mkdir(parents=True)
    files = [folder / f"{number}.png" for number in range(10)]
    for number, file in enumerate(files):
        Image.new("RGB", (20, 10), (number, 0, 0)).save(file)
    return files


def _exported(root: Path) -> dict[str, Any]:
    """Images and XML files side by side, as annotation tools write them."""
    for number, file in enumerate(_images(root / "photos")):
        file.with_suffix(".xml").write_text(
            VOC.format("cat" if number % 2 else "cow", int(number % 3 == 0), number + 1)
        )
    return {"format": "voc", "train": {"images": "photos"}}


def _voc(root: Path) -> dict[str, Any]:
    """JPEGImages and Annotations without lists."""
    (root / "Annotations").mkdir(parents=True)
    for number, file in enumerate(_images(root / "JPEGImages")):
        (root / "Annotations" / f"{file.stem}.xml").write_text(VOC.format("cat", 0, number + 1))
    return {}


def _yolo(root: Path) -> dict[str, Any]:
    (root / "labels").mkdir(parents=True)
    for number, file in enumerate(_images(root / "images")):
        (root / "labels" / f"{file.stem}.txt").write_text(f"0 0.5 0.5 0.{number + 1:02} 0.2")
    (root / "data.yaml").write_text("names: [cat]")
    return {"train": {"images": "images"}}


def _coco(root: Path) -> dict[str, Any]:
    files = _images(root / "images")
    content = {
        "images": [{"id": k, "file_name": file.name, "width": 20, "height": 10} for k, file in enumerate(files)],
        "categories": [{"id": 1, "name": "dog"}],
        "annotations": [
            {"id": k, "image_id": k, "category_id": 1, "bbox": [k, 2, 4, 4], "iscrowd": int(k % 3 == 0)}
            for k in range(len(files))
        ],
    }
    (root / "all.json").write_text(json.dumps(content))
    return {"train": {"images": "images", "annotations": "all.json"}}


def _masks(root: Path) -> dict[str, Any]:
    (root / "masks").mkdir(parents=True)
    for number, file in enumerate(_images(root / "images")):
        Image.new("L", (20, 10), number % 2).save(root / "masks" / file.name)
    return {"train": {"images": "images", "masks": "masks"}, "classes": ["sky", "road"]}


def _voc_masks(root: Path) -> dict[str, Any]:
    (root / "SegmentationClass").mkdir(parents=True)
    for number, file in enumerate(_images(root / "JPEGImages")):
        Image.new("L", (20, 10), number % 2).save(root / "SegmentationClass" / file.name)
    return {"classes": ["sky", "road"]}


def _cityscapes(root: Path) -> dict[str, Any]:
    city = root / "gtFine/train/ulm"
    city.mkdir(parents=True)
    for number, file in enumerate(_images(root / "leftImg8bit/train/ulm")):
        file.rename(file.with_name(f"{file.stem}_leftImg8bit.png"))
        Image.new("L", (20, 10), 7 + number % 2).save(city / f"{file.stem}_gtFine_labelIds.png")
    return {}


@pytest.mark.parametrize(
    ("task", "write"),
    [("detection", _exported), ("detection", _voc), ("detection", _yolo), ("detection", _coco),
     ("segmentation", _masks), ("segmentation", _voc_masks), ("segmentation", _cityscapes)],
)  # fmt: skip
def test_a_share_of_the_training_images_validates(
    tmp_path: Path, task: Task, write: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    raw = {"root": str(tmp_path / "data"), **write(tmp_path / "data"), "val": {"share": 0.3, "seed": 1}}
    options = config.parse(
        {"name": "x", "task": task, "data": raw, "student": {"arch": "none"}, "train": {"epochs": 1}}
    ).data
    before = sorted(tmp_path.rglob("*"))
    train, val = (data.build(options, task, split, seed=0, augment=False) for split in ("train", "val"))
    assert (len(train), len(val)) == (7, 3)
    assert not set(train.files) & set(val.files)
    assert "3 of 10 training images, a share of 0.3 drawn with seed 1" in caplog.text
    for split in (train, val):
        data.check(split, "full")
    warnings = data.compare_splits(train, val, options)
    assert not [warning for warning in warnings if "images too" in warning]
    assert sorted(tmp_path.rglob("*")) == before
    again = data.build(options, task, "val", seed=5, augment=False)  # train.seed does not matter
    assert again.files == val.files
    for index, file in enumerate(val.files):
        number = int(val[index][0][0, 0, 0])  # the red of image k is k
        assert int(file.name.partition("_")[0].partition(".")[0]) == number
        if task == "segmentation":
            assert set(val[index][1]["mask"].flatten().tolist()) == {number % 2}
        elif write is not _yolo:
            assert val[index][1]["boxes"][0, 0] == number


def test_crowds_stay_in_the_share_and_not_in_training(tmp_path: Path) -> None:
    options = config.Data(root=tmp_path / "d", val=config.Split(share=0.5), **_coco(tmp_path / "d"))
    train, val = (data.build(options, "detection", split, seed=0, augment=False) for split in ("train", "val"))
    kept = [[int(target["iscrowd"].sum()) for _, target in split] for split in (train, val)]
    assert (sum(kept[0]), sum(kept[1])) == (0, sum(int(file.stem) % 3 == 0 for file in val.files))
    assert sum(kept[1]) > 0


def test_the_drawing_depends_on_names_and_seed_alone(tmp_path: Path) -> None:
    files = [tmp_path / "here" / f"{number}.png" for number in range(100)]
    stay, drawn = draw_share(files, 0.2, 0)
    assert (len(stay), len(drawn)) == (80, 20)
    names = {files[k].name for k in drawn}
    moved = [Path("/elsewhere") / file.name for file in reversed(files)]
    assert {moved[k].name for k in draw_share(moved, 0.2, 0)[1]} == names
    assert {files[k].name for k in draw_share(files, 0.2, 1)[1]} != names
    assert len(names - {files[k].name for k in draw_share(files[:90], 0.2, 0)[1]}) <= 10
    assert draw_share([files[0], files[1], files[0]], 0.01, 0) in (([0, 2], [1]), ([1], [0, 2]))
    with pytest.raises(AcamkdError, match="1 images cannot be divided"):
        draw_share(files[:1], 0.2, 0)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"train": {"share": 0.2}}, "train.share: only `val` can be a share"),
        ({"test": {"share": 0.1}}, "test.share: only `val` can be a share"),
        ({"val": {"share": 1.0}}, "less than 1"),
        ({"val": 0}, r"data\.val\.share: .*greater than 0"),
        ({"val": "photos"}, r"data.val: must hold keys \(given: 'photos'\); known: name, images, masks"),
        ({"val": {"share": 0.2, "name": "val"}}, "give either the split's `name`"),
        ({"val": {"share": 0.2, "masks": "m"}}, "leave both out"),
    ],
)
def test_what_is_no_share(section: dict[str, Any], message: str) -> None:
    raw = {"name": "x", "task": "detection", "student": {"arch": "none"}, "train": {"epochs": 1}, "data": section}
    with pytest.raises(AcamkdError, match=message):
        config.parse(raw)


def test_a_number_is_a_share() -> None:
    raw = {"name": "x", "task": "detection", "student": {"arch": "none"}, "train": {"epochs": 1}}
    data_of = config.parse({**raw, "data": {"val": 0.2}}).data
    assert data_of.val == config.Split(share=0.2)


def test_no_lists_and_no_share(tmp_path: Path) -> None:
    options = config.Data(root=tmp_path / "d", **_voc(tmp_path / "d"))
    with pytest.raises(AcamkdError, match=r"no list .*train\.txt; .*\(there are: none; data\.val: \{share"):
        data.build(options, "detection", "train", seed=0, augment=False)


def test_a_flipped_share_keeps_its_boxes(tmp_path: Path) -> None:
    flips = config.Augmentation(flip=1)
    options = config.Data(root=tmp_path / "d", val=config.Split(share=0.5), augment=flips, **_coco(tmp_path / "d"))
    plain, flipped = (data.build(options, "detection", "train", seed=0, augment=each) for each in (False, True))
    for (image, target), (other, changed) in zip(plain, flipped, strict=True):
        assert torch.equal(image.flip(-1), other)
        assert torch.equal(20 - target["boxes"][:, 2], changed["boxes"][:, 0])
