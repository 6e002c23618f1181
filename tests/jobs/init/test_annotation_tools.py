"""What LabelMe, CVAT and Label Studio export, in miniature: `init` knows it, and the data check finds no fault."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from acamkd import config, data
from acamkd.data.statistics import Statistics, count
from acamkd.errors import AcamkdError
from acamkd.jobs.init.choices import CPU
from acamkd.jobs.init.init import init
from acamkd.jobs.init.layout import Layout, find_layouts
from acamkd.models.base import Task

WIDTH, HEIGHT = 12, 8
POLYGON = [1.0, 1.0, 5.0, 1.0, 5.0, 5.0, 1.0, 5.0]
CORNERS = (1, 1, 5, 5)


def _image(file: Path, pixels: Any = None, **options: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    shown = np.zeros((HEIGHT, WIDTH, 3), np.uint8) if pixels is None else np.asarray(pixels, np.uint8)
    Image.fromarray(shown).save(file, **options)


def _text(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def _coco(file: Path, names: list[str], categories: list[dict[str, Any]], **annotation: Any) -> None:
    """A JSON of these images, each with one object of the last category."""
    images = [{"id": k, "width": WIDTH, "height": HEIGHT, "file_name": name} for k, name in enumerate(names, start=1)]
    left, top, right, bottom = CORNERS
    boxes = [
        {"id": k, "image_id": k, "category_id": categories[-1]["id"], "segmentation": [POLYGON], "area": 16.0,
         "bbox": [left, top, right - left, bottom - top], "iscrowd": 0, **annotation}
        for k in range(1, len(names) + 1)
    ]  # fmt: skip
    _text(file, json.dumps({"info": {}, "images": images, "categories": categories, "annotations": boxes}))


def _xml(file: Path, name: str, label: str) -> None:
    sides = zip(("xmin", "ymin", "xmax", "ymax"), (CORNERS[0] + 1, CORNERS[1] + 1, *CORNERS[2:]), strict=True)
    box = "".join(f"<{side}>{value}</{side}>" for side, value in sides)
    size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"
    _text(
        file,
        f"<annotation><folder/><filename>{name}</filename>{size}<segmented>0</segmented>"
        f"<object><name>{label}</name><occluded>0</occluded><bndbox>{box}</bndbox></object></annotation>",
    )


def _square(inside: Any, outside: Any) -> Any:
    left, top, right, bottom = CORNERS
    mask = np.full((HEIGHT, WIDTH, *np.shape(inside)), outside, np.uint8)
    mask[top:bottom, left:right] = inside
    return mask


CVAT = [{"id": 1, "name": "cat", "supercategory": ""}, {"id": 2, "name": "dog", "supercategory": ""}]


def cvat_coco(root: Path) -> None:
    for name in ("a.jpg", "b.jpg"):
        _image(root / "images/default" / name)
    _coco(root / "annotations/instances_default.json", ["a.jpg", "b.jpg"], CVAT, attributes={"occluded": False})


def cvat_coco_of_an_older_version(root: Path) -> None:
    for name in ("a.jpg", "b.jpg"):
        _image(root / "images" / name)
    _coco(root / "annotations/instances_default.json", ["a.jpg", "b.jpg"], CVAT)


def cvat_coco_of_subsets(root: Path) -> None:
    for split in ("Train", "Validation"):
        _image(root / f"images/{split}/a.jpg")
        _coco(root / f"annotations/instances_{split}.json", ["a.jpg"], CVAT)


def cvat_voc(root: Path) -> None:
    for name in ("a", "b"):
        _image(root / f"JPEGImages/{name}.jpg")
        _xml(root / f"Annotations/{name}.xml", f"{name}.jpg", "dog")
    _text(root / "ImageSets/Main/default.txt", "a\nb\n")
    _text(root / "labelmap.txt", "# label:color_rgb:parts:actions\nbackground:0,0,0::\ncat:250,50,83::\ndog:1,2,3::\n")


def cvat_masks(root: Path) -> None:
    for name in ("a", "b"):
        _image(root / f"JPEGImages/{name}.jpg")
        _image(root / f"SegmentationClass/{name}.png", _square((1, 2, 3), (0, 0, 0)))
        _image(root / f"SegmentationObject/{name}.png", _square((9, 9, 9), (0, 0, 0)))
    _text(root / "ImageSets/Segmentation/default.txt", "a\nb\n")
    _text(root / "labelmap.txt", "# label:color_rgb:parts:actions\nbackground:0,0,0::\ncat:250,50,83::\ndog:1,2,3::\n")


def cvat_yolo(root: Path) -> None:
    for name in ("a", "b"):
        _image(root / f"obj_train_data/{name}.jpg")
        _text(root / f"obj_train_data/{name}.txt", f"1 {3 / WIDTH} {3 / HEIGHT} {4 / WIDTH} {4 / HEIGHT}\n")
    _text(root / "obj.names", "cat\ndog\n")
    _text(root / "obj.data", "classes = 2\nnames = data/obj.names\ntrain = data/train.txt\nbackup = backup/\n")
    _text(root / "train.txt", "data/obj_train_data/a.jpg\ndata/obj_train_data/b.jpg\n")


def cvat_ultralytics(root: Path) -> None:
    for name in ("a", "b"):
        _image(root / f"images/train/{name}.jpg")
        _text(root / f"labels/train/{name}.txt", f"1 {3 / WIDTH} {3 / HEIGHT} {4 / WIDTH} {4 / HEIGHT}\n")
    _text(root / "train.txt", "data/images/train/a.jpg\ndata/images/train/b.jpg\n")
    _text(root / "data.yaml", "names:\n  0: cat\n  1: dog\npath: .\ntrain: train.txt\n")


def label_studio_coco(root: Path) -> None:
    for name in ("a.jpg", "b.jpg"):
        _image(root / "images" / f"1f2e-{name}")
    categories = [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}]
    _coco(root / "result.json", ["images\\1f2e-a.jpg", "images\\1f2e-b.jpg"], categories, ignore=0)


def label_studio_coco_without_images(root: Path) -> None:
    for name in ("a.jpg", "b.jpg"):
        _image(root / "images" / f"1f2e-{name}")
    names = ["/data/upload/7/1f2e-a.jpg", "/data/upload/7/1f2e-b.jpg"]
    _coco(root / "result.json", names, [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}], ignore=0)


def label_studio_yolo(root: Path) -> None:
    for name in ("1f2e-a", "1f2e-b"):
        _image(root / f"images/{name}.jpg")
        _text(root / f"labels/{name}.txt", f"1 {3 / WIDTH} {3 / HEIGHT} {4 / WIDTH} {4 / HEIGHT}")
    _text(root / "classes.txt", "cat\ndog\n")
    _text(root / "notes.json", '{"categories": [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}], "info": {}}')


def label_studio_voc(root: Path) -> None:
    for name in ("1f2e-a", "1f2e-b"):
        _image(root / f"images/{name}.jpg")
        _xml(root / f"Annotations/{name}.xml", name, "dog")
    _xml(root / "Annotations/1f2e-b.xml", "1f2e-b", "cat")


def labelme_coco(root: Path) -> None:
    for name in ("a.jpg", "b.jpg"):
        _image(root / "JPEGImages" / name)
        _image(root / "Visualization" / name)
    names = ["_background_", "cat", "dog"]
    categories = [{"supercategory": None, "id": k, "name": name} for k, name in enumerate(names)]
    _coco(root / "annotations.json", ["JPEGImages/a.jpg", "JPEGImages/b.jpg"], categories)


def labelme_voc_boxes(root: Path) -> None:
    for name in ("a", "b"):
        _image(root / f"JPEGImages/{name}.jpg")
        _image(root / f"AnnotationsVisualization/{name}.jpg")
        _xml(root / f"Annotations/{name}.xml", f"{name}.jpg", "dog" if name == "a" else "cat")
    _text(root / "class_names.txt", "_background_\ncat\ndog\n")


def _labelme_masks(root: Path, folder: str) -> None:
    for name in ("a", "b"):
        _image(root / f"JPEGImages/{name}.jpg")
        _image(root / f"SegmentationClassVisualization/{name}.jpg")
        file = root / f"{folder}/{name}.png"
        ids = _square(2, 0)
        ids[0, 0] = 255  # __ignore__, which is -1
        _image(file, ids)
        with Image.open(file) as gray:
            palette = gray.convert("P")
        palette.putpalette([value for k in range(256) for value in (k, 7 * k % 256, 0)])
        palette.save(file)
    _text(root / "class_names.txt", "_background_\ncat\ndog")


def labelme_voc_masks(root: Path) -> None:
    _labelme_masks(root, "SegmentationClassPNG")
    np.save(root / "array.npy", np.zeros(3))
    (root / "SegmentationClass").mkdir()
    (root / "array.npy").rename(root / "SegmentationClass/a.npy")


def labelme_voc_masks_of_a_newer_version(root: Path) -> None:
    _labelme_masks(root, "SegmentationClass")
    _text(root / "labels.txt", "__ignore__\n_background_\ncat\ndog\n")


def _open(root: Path, task: Task) -> tuple[Layout, data.ImageDataset]:
    layout = next(layout for layout in find_layouts(root) if layout.task == task)
    assert layout.splits["train"]
    raw = {"format": layout.format, "root": root, "val": {"share": 0.5}, **layout.splits, "classes": layout.classes}
    options = config.Data.model_validate(raw)
    return layout, data.build(options, task, "train" if "val" in layout.splits else "val", seed=0, augment=False)


def _counted(dataset: data.ImageDataset) -> Statistics:
    found = count(dataset, decode=True)
    assert found.problems == []
    return found


@pytest.mark.parametrize(
    ("write", "form", "classes"),
    [
        (cvat_coco, "coco", ["cat", "dog"]),
        (cvat_coco_of_an_older_version, "coco", ["cat", "dog"]),
        (cvat_coco_of_subsets, "coco", ["cat", "dog"]),
        (cvat_voc, "voc", ["dog"]),
        (cvat_yolo, "yolo", ["cat", "dog"]),
        (cvat_ultralytics, "yolo", ["cat", "dog"]),
        (label_studio_coco, "coco", ["cat", "dog"]),
        (label_studio_coco_without_images, "coco", ["cat", "dog"]),
        (label_studio_yolo, "yolo", ["cat", "dog"]),
        (label_studio_voc, "voc", ["cat", "dog"]),
        (labelme_coco, "coco", ["cat", "dog"]),
        (labelme_voc_boxes, "voc", ["cat", "dog"]),
    ],
)
def test_boxes(tmp_path: Path, write: Callable[[Path], None], form: str, classes: list[str]) -> None:
    write(tmp_path)
    layout, dataset = _open(tmp_path, "detection")
    assert layout.format == form
    found = _counted(dataset)
    assert (found.images, list(found.classes)) == (1, classes)
    (_, target) = dataset[0]
    assert target["boxes"].tolist() == [pytest.approx([1, 1, 5, 5], abs=1e-4)]
    assert sum(found.classes.values()) == 1


@pytest.mark.parametrize(
    ("write", "form", "classes"),
    [
        (cvat_coco, "coco", ["background", "cat", "dog"]),
        (cvat_masks, "voc", ["background", "cat", "dog"]),
        (label_studio_coco, "coco", ["background", "cat", "dog"]),
        (labelme_coco, "coco", ["_background_", "cat", "dog"]),
        (labelme_voc_masks, "masks", ["_background_", "cat", "dog"]),
        (labelme_voc_masks_of_a_newer_version, "masks", ["_background_", "cat", "dog"]),
    ],
)
def test_masks(tmp_path: Path, write: Callable[[Path], None], form: str, classes: list[str]) -> None:
    write(tmp_path)
    layout, dataset = _open(tmp_path, "segmentation")
    assert layout.format == form
    assert list(_counted(dataset).classes) == classes
    expected = _square(2, 0)
    if form == "masks":
        expected[0, 0] = 255
    assert dataset[0][1]["mask"].tolist() == expected.tolist()


def test_a_plain_recipe_reads_what_init_would(tmp_path: Path) -> None:
    cvat_masks(tmp_path)
    raw = {"root": tmp_path, "train": {"name": "default"}, "val": 0.5}
    assert data.build(config.Data.model_validate(raw), "segmentation", "val", seed=0, augment=False).classes[1:] == (
        "cat",
        "dog",
    )
    _text(tmp_path / "labelmap.txt", "background:0,0,0::\ncat:250,50\n")
    with pytest.raises(AcamkdError, match=r"labelmap\.txt:2: a line is `name:red,green,blue:parts:actions`"):
        data.build(config.Data.model_validate(raw), "segmentation", "val", seed=0, augment=False)


def test_init_takes_the_outlines_where_masks_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cvat_coco(tmp_path / "cvat")
    assert [layout.on_request for layout in find_layouts(tmp_path / "cvat")] == [False, True]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("acamkd.jobs.init.init._measured", lambda recipe: None)
    network = {"arch": "fpn", "backbone": "tu-mobilenetv3_small_050"}
    machine = dataclasses.replace(CPU, networks={"segmentation": (network, network)})
    monkeypatch.setattr("acamkd.jobs.init.init.this_machine", lambda: machine)
    proposal = init(tmp_path / "cvat", task="segmentation")
    recipe = config.load(proposal.file)
    assert (recipe.task, recipe.data.format, recipe.data.classes) == ("segmentation", "coco", None)
    assert "1 train, 1 val images" in proposal.found
    assert "3 classes" in proposal.found
