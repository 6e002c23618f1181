from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from acamkd import config, data
from acamkd.data import CocoDetection, VocDetection, VocSegmentation
from acamkd.data.formats.voc import CLASSES
from acamkd.errors import AcamkdError

SHARED = Path(__file__).parents[4] / "shared" / "data"

ANNOTATION = """<annotation>
	<folder>VOC2012</folder>
	<filename>2007_000027.jpg</filename>
	<size><width>20</width><height>10</height><depth>3</depth></size>
	<segmented>0</segmented>
{}</annotation>
"""


def _object(name: str, *corners: float | str, difficult: int | str | None = 0, part: str = "") -> str:
    sides = zip(("xmax", "xmin", "ymax", "ymin"), (corners[2], corners[0], corners[3], corners[1]), strict=True)
    box = "".join(f"<{side}>{value}</{side}>" for side, value in sides)  # the order in which VOC2012 writes them
    flag = "" if difficult is None else f"<difficult>{difficult}</difficult>"
    return f"\t<object><name>{name}</name><pose>Left</pose>{flag}<bndbox>{box}</bndbox>{part}</object>\n"


OBJECTS = {
    "2007_000027": [_object("person", 2, 3, 4, 6), _object("dog", 1, 1, 20, 10, difficult=1)],
    "2007_000032": [
        _object("cat", 5.5, 1, 7.25, 3, difficult=None,
                part="<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"),
    ],
    "2007_000033": [],
}  # fmt: skip


def _write(root: Path, objects: dict[str, list[str]] | None = None) -> Path:
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main", "ImageSets/Segmentation", "SegmentationClass"):
        (root / folder).mkdir(parents=True)
    objects = objects or OBJECTS
    for number, (name, found) in enumerate(objects.items()):
        Image.new("RGB", (20, 10), (40 * number, 0, 0)).save(root / f"JPEGImages/{name}.jpg")
        (root / f"Annotations/{name}.xml").write_text(ANNOTATION.format("".join(found)))
    listing = "".join(f"{name}\n" for name in objects)
    (root / "ImageSets/Main/train.txt").write_text(listing)
    (root / "ImageSets/Main/val.txt").write_text(listing)
    (root / "ImageSets/Main/dog_train.txt").write_text("".join(f"{name} -1\n" for name in objects))
    return root


def test_boxes_count_from_0_and_end_behind_their_last_pixel(tmp_path: Path) -> None:
    dataset = VocDetection(_write(tmp_path), "train")
    (warning,) = data.check(dataset, "full")
    assert warning.endswith("ImageSets/Main/train.txt: 1 of 3 images have no boxes")
    assert dataset.classes == CLASSES
    image, target = dataset[0]
    assert image.shape == (3, 10, 20)
    assert target["boxes"].tolist() == [[1, 2, 4, 6], [0, 0, 20, 10]]
    assert target["labels"].tolist() == [CLASSES.index("person") + 1, CLASSES.index("dog") + 1]
    assert target["iscrowd"].tolist() == [0, 1]
    assert dataset[1][1]["boxes"].tolist() == [[4.5, 0, 7.25, 3]]
    assert dataset[2][1]["boxes"].shape == (0, 4)


def test_difficult_objects_are_for_evaluation_only(tmp_path: Path) -> None:
    options = config.Data(format="voc", root=_write(tmp_path))
    train = data.build(options, "detection", "train", seed=0, augment=False)
    val = data.build(options, "detection", "val", seed=0, augment=False)
    assert train[0][1]["boxes"].tolist() == [[1, 2, 4, 6]]
    assert val[0][1]["iscrowd"].tolist() == [0, 1]


def test_names_may_hold_blanks_and_lists_of_one_class_a_flag(tmp_path: Path) -> None:
    _write(tmp_path, {"my image 1": [_object("dog", 1, 1, 5, 5)], "other 2": []})
    (tmp_path / "ImageSets/Main/mine.txt").write_text("my image 1\n\nother 2\n")
    (tmp_path / "ImageSets/Main/dog_mine.txt").write_text("my image 1  1\nother 2 -1\n")
    for split in ("mine", "dog_mine"):
        dataset = VocDetection(tmp_path, split)
        assert [file.stem for file in dataset.files] == ["my image 1", "other 2"]


def test_an_infinite_size_is_a_problem(tmp_path: Path) -> None:
    file = _write(tmp_path) / "Annotations/2007_000027.xml"
    file.write_text(file.read_text().replace("<width>20</width>", "<width>inf</width>"))
    with pytest.raises(AcamkdError, match=r"2007_000027\.xml: it has no size with width and height above 0"):
        data.check(VocDetection(tmp_path, "train"), "headers")


def test_a_box_of_one_pixel_has_an_area_and_an_empty_one_has_none(tmp_path: Path) -> None:
    _write(tmp_path, {"a": [_object("cow", 3, 3, 3, 3), _object("cow", 4, 3, 3, 9), _object("cow", 9, 9, 8, 8)]})
    dataset = VocDetection(tmp_path, "train")
    assert dataset.target(0, (10, 20))["boxes"].tolist() == [[2, 2, 3, 3]]
    assert [problem.rpartition("xml: ")[2] for problem in dataset.problems] == [
        "object 2 (cow): the box from (3, 2) to (3, 9) on a.jpg has no area",
        "object 3 (cow): the box from (8, 8) to (8, 8) on a.jpg has no area",
    ]


def test_boxes_that_count_from_0_after_all_are_clipped(tmp_path: Path) -> None:
    dataset = VocDetection(_write(tmp_path, {"a": [_object("cow", 0, 0, 21, 5)]}), "train")
    assert dataset[0][1]["boxes"].tolist() == [[0, 0, 20, 5]]
    assert "1 boxes reach beyond their image and are clipped" in data.check(dataset, "headers")[0]


def test_other_names_than_vocs_are_the_classes(tmp_path: Path) -> None:
    _write(tmp_path, {"a": [_object("wbc", 1, 1, 5, 5)], "b": [_object("rbc", 1, 1, 5, 5)]})
    (tmp_path / "ImageSets/Main/val.txt").write_text("b\n")
    train, val = VocDetection(tmp_path, "train"), VocDetection(tmp_path, "val")
    assert train.classes == val.classes == ("rbc", "wbc")
    assert val[0][1]["labels"].tolist() == [1]
    assert VocDetection(tmp_path, "train", classes=("wbc", "rbc"))[0][1]["labels"].tolist() == [1]


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        ([_object("dgo", 1, 1, 5, 5)], r"a\.xml: object 1 \(dgo\): there is no class 'dgo'; did you mean dog"),
        ([_object("dog", 1, 1, 5, "x")], r"object 1 \(dog\): it needs a bndbox with the numbers xmin, ymin"),
        (["<object><name>dog</name></object>"], r"object 1 \(dog\): it needs a bndbox"),
        (["<object/>"], r"object 1 \(None\): there is no class ''"),
        ([_object("dog", 1, 1, 5, 5, difficult="Hard")], r"object 1 \(dog\): difficult must be 0 or 1, not 'Hard'"),
        ([_object("dog", 22, 1, 25, 5)], r"the box from \(21, 0\) to \(25, 5\) lies outside a\.jpg, which has 20 x 10"),
        (["</annotation>"], r"a\.xml: it is not valid XML: .*line 6"),
        ([], r"train\.txt: there is no box for any image"),
    ],
)
def test_bad_annotations(tmp_path: Path, objects: list[str], message: str) -> None:
    dataset = VocDetection(_write(tmp_path, {"a": objects}), "train", classes=CLASSES)
    with pytest.raises(AcamkdError, match=message) as caught:
        data.check(dataset, "full")
    assert "1 problem:" in str(caught.value)


def test_an_unknown_encoding_is_named(tmp_path: Path) -> None:
    root = _write(tmp_path, {"a": []})
    (root / "Annotations/a.xml").write_text('<?xml version="1.0" encoding="utf8mb4"?><annotation/>')
    with pytest.raises(AcamkdError, match=r"a\.xml: it is not valid XML: unknown encoding"):
        data.check(VocDetection(root, "train", classes=CLASSES), "full")


def test_files_that_are_missing_or_broken(tmp_path: Path) -> None:
    _write(tmp_path)
    (tmp_path / "Annotations/2007_000027.xml").write_bytes(b"\xff\xfe not xml")
    (tmp_path / "JPEGImages/2007_000032.jpg").unlink()
    xml = tmp_path / "Annotations/2007_000033.xml"
    xml.write_text(xml.read_text().replace("<width>20</width>", "<width>0</width>"))
    (tmp_path / "ImageSets/Main/train.txt").write_bytes(
        b"\xef\xbb\xbf2007_000027\r\n2007_000032\r\n\r\n2007_000033\r\n2008_1\r\n"
    )
    with pytest.raises(AcamkdError) as caught:
        data.check(VocDetection(tmp_path, "train"), "headers")
    assert [line.rpartition("/")[2] for line in str(caught.value).splitlines()[1:]] == [
        "2007_000027.xml: it is not valid XML: syntax error: line 1, column 1",
        "2007_000033.xml: it has no size with width and height above 0",
        "2008_1.xml: the annotation cannot be read: No such file or directory",
        "2007_000032.jpg: there is no such image",
        "2008_1.jpg: there is no such image",
    ]


def test_an_image_of_another_size_and_one_that_is_rotated(tmp_path: Path) -> None:
    _write(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 10)).save(tmp_path / "JPEGImages/2007_000027.jpg", exif=exif)
    Image.new("L", (20, 11)).save(tmp_path / "JPEGImages/2007_000032.jpg")
    with pytest.raises(AcamkdError) as caught:
        data.check(VocDetection(tmp_path, "train"), "full")
    first, second = str(caught.value).splitlines()[1:]
    assert "2007_000027.jpg has 10 x 20 pixels (rotated as its EXIF entry says), but " in first
    assert first.endswith("Annotations/2007_000027.xml says 20 x 10 pixels")
    assert "2007_000032.jpg has 20 x 11 pixels" in second


def test_images_of_another_type_are_found(tmp_path: Path) -> None:
    _write(tmp_path)
    (tmp_path / "JPEGImages/2007_000027.jpg").unlink()
    Image.new("RGBA", (20, 10), (9, 8, 7, 0)).save(tmp_path / "JPEGImages/2007_000027.png")
    image, _ = VocDetection(tmp_path, "train")[0]
    assert image[:, 0, 0].tolist() == [9, 8, 7]


@pytest.mark.parametrize("reader", [VocDetection, VocSegmentation])
def test_a_split_without_a_list(tmp_path: Path, reader: Any) -> None:
    (_write(tmp_path) / "ImageSets/Segmentation/train.txt").write_text("")
    with pytest.raises(AcamkdError, match=r"there is no list .*minival\.txt; name one .* \(there are: train"):
        reader(tmp_path, "minival")
    (tmp_path / "ImageSets/Main/train.txt").write_text("")
    with pytest.raises(AcamkdError, match=r"train\.txt: the list is empty"):
        data.check(reader(tmp_path, "train"), "full")


def _palette(values: np.ndarray[Any, np.dtype[np.uint8]], file: Path) -> None:
    image = Image.fromarray(values).convert("P")
    image.putdata(values.ravel().tolist())
    image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0] + [9, 9, 9] * 253)
    image.save(file)


def test_palette_masks(tmp_path: Path) -> None:
    _write(tmp_path)
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text("2007_000032\n")
    values = np.zeros((10, 20), np.uint8)
    values[0, :3] = (1, 20, 255)
    _palette(values, tmp_path / "SegmentationClass/2007_000032.png")
    dataset = VocSegmentation(tmp_path, "val")
    assert data.check(dataset, "full") == []
    assert dataset.classes == ("background", *CLASSES)
    assert len(dataset.classes) == 21
    assert dataset[0][1]["mask"][0, :4].tolist() == [1, 20, 255, 0]
    assert dataset[0][1]["mask"].dtype == torch.int64


def test_masks_that_cannot_be_used(tmp_path: Path) -> None:
    _write(tmp_path)
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text("".join(f"{name}\n" for name in OBJECTS))
    _palette(np.full((10, 20), 21, np.uint8), tmp_path / "SegmentationClass/2007_000027.png")
    Image.new("RGB", (20, 10)).save(tmp_path / "SegmentationClass/2007_000032.png")
    with pytest.raises(AcamkdError) as caught:
        data.check(VocSegmentation(tmp_path, "val"), "full")
    lines = [line.rpartition("/")[2] for line in str(caught.value).splitlines()[1:]]
    assert lines[0].startswith("2007_000027.png: the mask holds 21, but the values for the 21 classes and for void are")
    assert lines[1].startswith("2007_000032.png: the mask cannot be read: it is of mode RGB; save class ids, as 8-bit")
    assert lines[2] == "2007_000033.png: there is no such mask"


@pytest.mark.skipif(not (SHARED / "bccd").is_dir(), reason="the BCCD images are not beside the checkout")
@pytest.mark.parametrize("split", ["train", "val"])
def test_real_blood_cells(tmp_path: Path, split: str) -> None:
    """The COCO file took xmin and ymin as they are; VOC's convention moves both by one pixel, and nothing else."""
    root = SHARED / "bccd"
    (tmp_path / "JPEGImages").symlink_to(root / "images" / split)
    (tmp_path / "Annotations").symlink_to(root / "annotations/voc" / split)
    coco = CocoDetection(root / "images" / split, root / f"annotations/instances_{split}.json")
    (tmp_path / "ImageSets/Main").mkdir(parents=True)
    (tmp_path / f"ImageSets/Main/{split}.txt").write_text("".join(f"{file.stem}\n" for file in coco.files))
    voc = VocDetection(tmp_path, split)
    assert data.check(voc, "headers") == data.check(coco, "headers") == []
    assert voc.classes == ("Platelets", "RBC", "WBC")
    points, differing = 0, 0
    for index in range(len(coco)):
        expected, found = coco.target(index, (480, 640)), voc.target(index, (480, 640))
        moved = found["boxes"].as_subclass(torch.Tensor) + torch.tensor([1, 1, 0, 0])
        sides = (moved[:, 2:] - moved[:, :2]).amin(dim=1)
        points += int((sides == 0).sum())  # a click without a drag: one pixel by VOC's convention
        assert torch.equal(moved[sides > 0], expected["boxes"].as_subclass(torch.Tensor))
        names = [voc.classes[label - 1] for label in found["labels"][sides > 0]]
        assert names == [coco.classes[label - 1] for label in expected["labels"]]
        differing += len(moved) - len(expected["boxes"])
    assert points == differing == 1


def test_18_classes_that_nobody_shows(tmp_path: Path) -> None:
    dataset = VocDetection(_write(tmp_path), "train")
    (warning, *_) = data.compare_splits(dataset, dataset, config.Data())
    assert warning.startswith(
        "no training image has a box of 18 of the 20 classes (aeroplane, bicycle, bird, boat, bottle"
    )
    assert warning.endswith("data.classes may list the others alone")


def test_folders_of_ones_own(tmp_path: Path) -> None:
    """Images and XML files side by side, of other names than VOC's, in folders for training and validation."""
    for split, name in (("train", "wbc"), ("valid", "rbc")):
        (tmp_path / split / "deep").mkdir(parents=True)
        Image.new("RGB", (20, 10)).save(tmp_path / split / "deep/a.JPG")
        (tmp_path / split / "deep/a.XML").write_text(ANNOTATION.format(_object(name, 1, 1, 5, 5)))
    splits = {"train": config.Split(images=Path("train")), "val": config.Split(images=Path("valid"))}
    options = config.Data(format="voc", root=tmp_path, **splits)
    train, val = (data.build(options, "detection", split, seed=0, augment=False) for split in ("train", "val"))
    assert train.classes == val.classes == ("rbc", "wbc")  # of both, so that they agree
    assert (train[0][1]["labels"].item(), val[0][1]["labels"].item()) == (2, 1)
    Image.new("RGB", (20, 10)).save(tmp_path / "train/b.jpg")
    (tmp_path / "train/c.xml").write_text(ANNOTATION.format(""))
    train = data.build(options, "detection", "train", seed=0, augment=False)
    assert "1 images have no XML in" in train.warnings[0]
    assert train.problems == [f"{tmp_path}/train/c.xml: the annotation has no image in {tmp_path}/train"]


def test_classes_of_sub_folders_and_lists_with_suffixes(tmp_path: Path) -> None:
    _write(tmp_path, {"a": [_object("wbc", 1, 1, 5, 5)], "b": [_object("rbc", 1, 1, 5, 5)]})
    for folder, file in (("JPEGImages", "b.jpg"), ("Annotations", "b.xml")):
        (tmp_path / folder / "2024").mkdir()
        (tmp_path / folder / file).rename(tmp_path / folder / "2024" / file)
    (tmp_path / "ImageSets/Main/train.txt").write_text("a.jpg\n2024/b.jpg\n")
    dataset = VocDetection(tmp_path, "train")
    assert data.check(dataset, "full") == []
    assert dataset.classes == ("rbc", "wbc")
    assert [target["labels"].item() for _, target in dataset] == [2, 1]


def test_lists_may_leave_out_the_sub_folder(tmp_path: Path) -> None:
    _write(tmp_path)
    for folder in ("JPEGImages", "Annotations"):
        (tmp_path / folder / "2007").mkdir()
        for file in (tmp_path / folder).glob("*.*"):
            file.rename(tmp_path / folder / "2007" / file.name)
    dataset = VocDetection(tmp_path, "train")
    assert [target["labels"].tolist() for _, target in dataset] == [[15, 12], [8], []]
    assert "none of its names is there, but 3 files end alike" in dataset.warnings[0]
    for file in (tmp_path / "Annotations/2007").iterdir():
        file.rename(tmp_path / "Annotations" / file.name)
    assert VocDetection(tmp_path, "train").problems == []


def test_masks_of_colors(tmp_path: Path) -> None:
    _write(tmp_path, {"a": []})
    Image.new("RGB", (20, 10), (0, 128, 0)).save(tmp_path / "SegmentationClass/a.png")
    (tmp_path / "ImageSets/Segmentation/train.txt").write_text("a\n")
    values = {"0, 0, 0": "background", "#008000": "crack"}
    options = config.Data(format="voc", root=tmp_path, classes=("background", "crack"), mask_values=values)
    dataset = data.build(options, "segmentation", "train", seed=0, augment=False)
    assert set(dataset[0][1]["mask"].flatten().tolist()) == {1}


def test_another_void(tmp_path: Path) -> None:
    _write(tmp_path, {"a": []})
    Image.fromarray(np.eye(10, 20, dtype=np.uint8)).save(tmp_path / "SegmentationClass/a.png")
    (tmp_path / "ImageSets/Segmentation/train.txt").write_text("a\n")
    options = config.Data(format="voc", root=tmp_path, classes=("background", "crack"), ignore_index=0)
    dataset = data.build(options, "segmentation", "train", seed=0, augment=False)
    assert set(dataset[0][1]["mask"].flatten().tolist()) == {1, 255}
    (tmp_path / "labelmap.txt").write_text("background:0,0,0::\ncrack:0,128,0::\n")
    with pytest.raises(AcamkdError, match=r"data\.ignore_index: .*labelmap.txt says which color is void"):
        data.build(options, "segmentation", "train", seed=0, augment=False)
    (tmp_path / "labelmap.txt").write_text("# label:color_rgb:parts:actions\nbackground:0,0,0::\ncrack:green::\n")
    with pytest.raises(AcamkdError, match=r"labelmap\.txt:3: a line is `name:red,green,blue:parts:actions`, not `cra"):
        data.build(options, "segmentation", "train", seed=0, augment=False)
