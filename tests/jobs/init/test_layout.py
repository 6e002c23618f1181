from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import tiny
from acamkd import config, data
from acamkd.data.scenes import CLASSES
from acamkd.errors import AcamkdError
from acamkd.jobs.init.layout import find_layouts


def _images(folder: Path, count: int = 3) -> None:
    folder.mkdir(parents=True)
    for number in range(count):
        Image.new("RGB", (40, 20)).save(folder / f"{number}.jpg")


def _coco(file: Path, count: int = 3) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "images": [{"id": n, "file_name": f"{n}.jpg", "width": 40, "height": 20} for n in range(count)],
        "annotations": [{"id": 1, "image_id": 0, "category_id": 1, "bbox": [1, 2, 3, 4]}],
        "categories": [{"id": 1, "name": "cell"}],
    }
    file.write_text(json.dumps(content))


def test_the_layouts_of_scenes_are_found(tmp_path: Path) -> None:
    tiny.write_data(tmp_path / "boxes", "detection")
    (boxes,) = find_layouts(tmp_path / "boxes")
    assert (boxes.task, boxes.format, boxes.classes) == ("detection", "coco", None)
    assert boxes.splits["val"] == {"images": "images/val", "annotations": "annotations/instances_val.json"}
    tiny.write_data(tmp_path / "masks")
    (masks,) = find_layouts(tmp_path / "masks")
    assert (masks.task, masks.format, masks.classes) == ("segmentation", "masks", None)
    assert masks.splits["train"] == {"images": "images/train", "masks": "masks/train"}
    assert set(masks.values) <= set(range(1 + len(CLASSES)))


def test_a_coco_export_with_images_beside_the_json(tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        _images(tmp_path / split)
        _coco(tmp_path / split / "_annotations.coco.json")
    (found,) = find_layouts(tmp_path)
    assert found.splits == {
        name: {"images": folder, "annotations": f"{folder}/_annotations.coco.json"}
        for name, folder in (("train", "train"), ("val", "valid"), ("test", "test"))
    }


def test_a_files_name_says_more_than_its_folders(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        _images(tmp_path / "images" / split)
        _coco(tmp_path / f"training_data/{split}.json")
    (found,) = find_layouts(tmp_path)
    assert {name: keys["annotations"] for name, keys in found.splits.items()} == {
        split: f"training_data/{split}.json" for split in ("train", "val", "test")
    }


def test_a_coco_export_of_one_file_is_for_training(tmp_path: Path) -> None:
    _images(tmp_path / "images")
    _coco(tmp_path / "result.json")
    (found,) = find_layouts(tmp_path)
    assert found.splits == {"train": {"images": "images", "annotations": "result.json"}}


def test_yolo_exports_with_and_without_data_yaml(tmp_path: Path) -> None:
    for split in ("train", "valid"):
        _images(tmp_path / "a" / split / "images")
        (tmp_path / "a" / split / "labels").mkdir()
        (tmp_path / "a" / split / "labels/0.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    (tmp_path / "a/data.yaml").write_text("train: ../train/images\nval: ../valid/images\nnames: [cell]\n")
    (found,) = find_layouts(tmp_path / "a")
    assert found.splits == {"train": {"name": "train"}, "val": {"name": "val"}}
    _images(tmp_path / "b/images")
    (tmp_path / "b/labels").mkdir()
    (tmp_path / "b/labels/0.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    (tmp_path / "b/classes.txt").write_text("cell\n")
    (found,) = find_layouts(tmp_path / "b")
    assert found.splits == {"train": {"images": "images", "annotations": "labels"}}
    assert (found.classes, found.names_from) == (("cell",), "classes.txt")


def test_yolo_files_whose_classes_nothing_says(tmp_path: Path) -> None:
    for split in ("train", "val"):
        _images(tmp_path / "images" / split)
        (tmp_path / "labels" / split).mkdir(parents=True)
        (tmp_path / f"labels/{split}/0.txt").write_text("a cell, seen from above\n")
    with pytest.raises(AcamkdError, match="no images with annotations that are known"):
        find_layouts(tmp_path)  # captions
    for split in ("train", "val"):
        (tmp_path / f"labels/{split}/1.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    (found,) = find_layouts(tmp_path)
    assert (found.format, found.classes, found.needs_names) == ("yolo", None, True)
    assert found.splits["val"] == {"images": "images/val", "annotations": "labels/val"}
    (tmp_path / "labels/train/classes.txt").write_text("cell\nnucleus\n")  # as LabelImg writes it
    (found,) = find_layouts(tmp_path)
    assert (found.classes, found.names_from) == (("cell", "nucleus"), "labels/train/classes.txt")
    (tmp_path / "labels/val/classes.txt").write_text("nucleus\ncell\n")
    with pytest.raises(AcamkdError, match=r"train/classes\.txt and .*val/classes\.txt must list the same classes"):
        find_layouts(tmp_path)


def test_what_says_its_classes_comes_before_what_does_not(tmp_path: Path) -> None:
    _images(tmp_path / "images")
    for folder, text in (("labels", "0 0.5 0.5 0.2 0.2\n"), ("Annotations", "<annotation/>")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"0.{'txt' if folder == 'labels' else 'xml'}").write_text(text)
    assert [layout.format for layout in find_layouts(tmp_path)] == ["voc", "yolo"]


def test_pascal_xml_with_lists_and_without(tmp_path: Path) -> None:
    box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
    xml = (
        "<annotation><size><width>40</width><height>20</height></size><object><name>cell</name>"
        f"{box}</object></annotation>"
    )
    _images(tmp_path / "a/JPEGImages", 1)
    (tmp_path / "a/Annotations").mkdir()
    (tmp_path / "a/Annotations/0.xml").write_text(xml)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "a/ImageSets/Main").mkdir(parents=True)
    for split in ("trainval", "test"):
        (tmp_path / f"a/ImageSets/Main/{split}.txt").write_text("0\n")
    (found,) = find_layouts(tmp_path / "a")
    assert found.splits == {"train": {"name": "trainval"}, "test": {"name": "test"}}
    (found,) = find_layouts(tmp_path / "b")
    assert found.splits == {"train": {"images": "JPEGImages", "annotations": "Annotations"}}


@pytest.mark.parametrize("labels", ["Annotations", "SegmentationClass"])
@pytest.mark.parametrize(
    ("lists", "splits"),
    [
        (["Train", "Validation", "Test"], ["Train", "Validation", "Test"]),  # of CVAT's subsets
        (["train", "valid", "test"], ["train", "valid", "test"]),
        (["train", "val", "trainval", "cat_train", "cat_val"], ["train", "val"]),
        (["trainval", "val", "cat_trainval", "cat_val"], ["trainval"]),  # which holds the images of val, too
        (["default", "set_test"], ["default", None, "set_test"]),
    ],
)
def test_lists_say_their_split_as_folders_do(
    tmp_path: Path, labels: str, lists: list[str], splits: list[str | None]
) -> None:
    _images(tmp_path / "JPEGImages")
    (tmp_path / labels).mkdir()
    for number in range(3):
        (tmp_path / f"{labels}/{number}.xml").write_text("<annotation/>")
        Image.new("L", (40, 20)).save(tmp_path / f"{labels}/{number}.png")
    folder = tmp_path / "ImageSets" / ("Main" if labels == "Annotations" else "Segmentation")
    folder.mkdir(parents=True)
    for number, name in enumerate(lists):
        (folder / f"{name}.txt").write_text(f"{number % 3}\n")
    (found,) = find_layouts(tmp_path)
    assert found.splits == {
        split: {"name": name} for split, name in zip(("train", "val", "test"), splits, strict=False) if name
    }


def test_lists_that_name_no_split_are_refused(tmp_path: Path) -> None:
    _images(tmp_path / "JPEGImages")
    for folder in ("Annotations", "ImageSets/Main"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "Annotations/0.xml").write_text("<annotation/>")
    for name in ("night", "day", "val"):
        (tmp_path / f"ImageSets/Main/{name}.txt").write_text("0\n")
    with pytest.raises(
        AcamkdError, match=r"ImageSets/Main: none of the lists \(day, val, night\) .* call them train\.txt"
    ):
        find_layouts(tmp_path)


def test_class_names_of_masks_come_from_files_beside_them(tmp_path: Path) -> None:
    _images(tmp_path / "images/train")
    (tmp_path / "masks/train").mkdir(parents=True)
    for number in range(3):
        Image.fromarray(np.full((20, 40), number % 2, np.uint8)).save(tmp_path / f"masks/train/{number}.png")
    (found,) = find_layouts(tmp_path)
    assert (found.classes, found.values) == (None, (0, 1))
    _coco(tmp_path / "annotations/instances_train.json")
    boxes, masks = find_layouts(tmp_path)
    assert (boxes.task, masks.classes) == ("detection", ("background", "cell"))
    (tmp_path / "classes.json").write_text('{"classes": ["sky", "road"]}')
    assert find_layouts(tmp_path)[1].classes == ("sky", "road")


@pytest.mark.parametrize(("suffix", "mode"), [(".TIF", "L"), (".bmp", "P"), (".png", "1")])
def test_masks_of_every_type_that_is_read_are_found(tmp_path: Path, suffix: str, mode: str) -> None:
    _images(tmp_path / "images")
    (tmp_path / "masks").mkdir()
    for number in range(3):
        mask = Image.new(mode, (40, 20))
        mask.putpixel((0, 0), number % 2)
        mask.save(tmp_path / f"masks/{number}{suffix}")
    (found,) = find_layouts(tmp_path)
    assert (found.format, found.values) == ("masks", (0, 1))


def test_files_of_names_as_windows_writes_them(tmp_path: Path) -> None:
    for folder in ("images", "masks"):
        _images(tmp_path / folder, 0)
    Image.new("RGB", (4, 2)).save(tmp_path / "images/0.jpg")
    Image.new("L", (4, 2)).save(tmp_path / "masks/0.png")
    (tmp_path / "classes.json").write_bytes(b'\xef\xbb\xbf["cat", "dog"]')
    assert find_layouts(tmp_path)[0].classes == ("cat", "dog")
    (tmp_path / "classes.txt").write_bytes(b"\xef\xbb\xbfsky\r\nroad\r\n")
    assert find_layouts(tmp_path)[0].classes == ("sky", "road")
    (tmp_path / "classes.txt").write_bytes("Löwe\n".encode("latin-1"))
    with pytest.raises(AcamkdError, match=r"classes\.txt is not a text file: .* byte 0xf6"):
        find_layouts(tmp_path)


def test_what_is_not_known_is_said(tmp_path: Path) -> None:
    with pytest.raises(AcamkdError, match="there is no such folder"):
        find_layouts(tmp_path / "nowhere")
    with pytest.raises(AcamkdError, match="no images with annotations that are known"):
        find_layouts(tmp_path)
    _images(tmp_path / "train/images")
    (tmp_path / "data.yaml").write_text("train: train/images\nval: train/images\nnc: 2\nnames: [a, b, c]\n")
    with pytest.raises(AcamkdError, match=r"data\.yaml.*nc"):
        find_layouts(tmp_path)


def test_folders_of_somebody_else_hold_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(folder))

    (tmp_path / "lost+found").mkdir()
    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(AcamkdError, match="no images with annotations that are known"):
        find_layouts(tmp_path)
    monkeypatch.setattr(Path, "exists", refuse)
    with pytest.raises(AcamkdError, match=r"data\.root /home/x: /home/x cannot be read: Permission denied"):
        data.resolve(config.Data(root=Path("/home/x")), "detection")
