"""One rule for names and suffixes, and sub folders, in every format."""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from acamkd import config, data
from acamkd.data import MaskDataset
from acamkd.data.folders import Folder, existing
from acamkd.data.unlabeled import UnlabeledImages
from acamkd.errors import AcamkdError
from acamkd.files import write_text
from acamkd.models.base import Task

DECOMPOSED = unicodedata.normalize("NFD", "Käfer")


def _image(file: Path, number: int = 0, mode: str = "RGB") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (20, 10), (40 * number, 0, 0) if mode == "RGB" else number).save(file)
    return file


def _text(file: Path, content: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content, encoding="utf-8")


VOC = """<annotation><size><width>20</width><height>10</height></size>
<object><name>dog</name><bndbox><xmin>2</xmin><ymin>3</ymin><xmax>5</xmax><ymax>6</ymax></bndbox></object></annotation>
"""

PLACES = ("a.jpg", "camera2/b.JPG", "camera2/deep/c.JPEG", "camera3/a.tif", f"{DECOMPOSED}.gif", "d.jfif")


def test_a_name_is_found_under_other_spellings(tmp_path: Path) -> None:
    for number, place in enumerate(PLACES):
        _image(tmp_path / place, number)
    for hidden in (".thumbs/a.jpg", "__MACOSX/a.jpg", "._a.jpg"):
        _image(tmp_path / hidden)
    _image(tmp_path / "notes.ppm")
    folder = Folder(tmp_path)
    assert sorted(file.relative_to(tmp_path).as_posix() for file in folder.files) == sorted(PLACES)
    assert folder.find("camera2/b") == folder.find("camera2\\B") == folder.find("camera2/b.jpg") == tmp_path / PLACES[1]
    assert folder.find("Käfer") == tmp_path / PLACES[4]
    assert folder.find("b") is None
    (warning,) = folder.described_left_out()
    assert "1 images of other types are left out (notes.ppm)" in warning
    _image(tmp_path / "A.jpg", 9)  # no longer one alone
    assert folder.find("A") == Folder(tmp_path).find("a") == tmp_path / "a.jpg"
    assert Folder(tmp_path).find("A") == tmp_path / "A.jpg"
    assert existing(tmp_path / "CAMERA2" / "Deep") == tmp_path / "camera2/deep"


def test_links_in_a_circle_end(tmp_path: Path) -> None:
    _image(tmp_path / "sub/a.png")
    (tmp_path / "sub/up").symlink_to(tmp_path)
    assert Folder(tmp_path).files == [tmp_path / "sub/a.png"]


def test_names_that_are_no_utf_8_have_a_hash(tmp_path: Path) -> None:
    _image(tmp_path / "images/a.png")
    (tmp_path / "images/a.png").rename(os.fsdecode(bytes(tmp_path / "images") + b"/caf\xe9.png"))
    read = MaskDataset([*(tmp_path / "images").iterdir()], [], ["sky"])
    assert len(read.fingerprint()) == 16
    write_text(tmp_path / "report.html", read.files[0].name)
    assert (tmp_path / "report.html").read_text() == "caf\\udce9.png"


def test_a_folder_and_a_link_to_it_are_read_once(tmp_path: Path) -> None:
    _image(tmp_path / "a/x.png")
    for name in ("0", "b"):
        (tmp_path / name).symlink_to(tmp_path / "a")
    assert Folder(tmp_path).files == [tmp_path / "a/x.png"]


def _masks(root: Path) -> dict[str, Any]:
    for number, place in enumerate(PLACES):
        _image(root / "images/train" / place, number)
        _image((root / "masks/train" / unicodedata.normalize("NFC", place)).with_suffix(".PNG"), number % 2, "L")
    return {"classes": ["sky", "road"]}


def _yolo(root: Path) -> dict[str, Any]:
    for number, place in enumerate(PLACES):
        _image(root / "images/train" / place, number)
        label = (root / "labels/train" / unicodedata.normalize("NFC", place)).with_suffix(".TXT")
        _text(label, f"{number % 2} 0.5 0.5 0.1 0.2\n")
    _text(root / "data.yaml", "names: [cat, dog]")
    return {}


def _voc(root: Path) -> dict[str, Any]:
    names = [unicodedata.normalize("NFC", Path(place).with_suffix("").as_posix()) for place in PLACES]
    for number, place in enumerate(PLACES):
        _image(root / "JPEGImages" / place, number)
        _text((root / "Annotations" / place).with_suffix(".XML"), VOC)
    _text(root / "ImageSets/Main/train.txt", "\n".join(names))
    return {}


def _coco(root: Path) -> dict[str, Any]:
    names = ["a.jpg", "camera2\\b.jpg", "camera2/deep/c.jpeg", "camera3/a.tif", "Käfer.gif", "D.JFIF"]
    for number, place in enumerate(PLACES):
        _image(root / "images/train" / place, number)
    content = {
        "images": [{"id": k, "file_name": name, "width": 20, "height": 10} for k, name in enumerate(names)],
        "categories": [{"id": 1, "name": "dog"}],
        "annotations": [{"id": k, "image_id": k, "category_id": 1, "bbox": [1, 2, 4, 4]} for k in range(len(names))],
    }
    _text(root / "annotations/instances_train.json", json.dumps(content))
    return {}


@pytest.mark.parametrize(
    ("task", "write"), [("segmentation", _masks), ("detection", _yolo), ("detection", _voc), ("detection", _coco)]
)
def test_every_format_reads_sub_folders_and_suffixes(tmp_path: Path, task: Task, write: Any) -> None:
    options = config.Data(root=tmp_path, **write(tmp_path))
    dataset = data.build(options, task, "train", seed=0, augment=False)
    assert sorted(file.name for file in dataset.files) == sorted(Path(place).name for place in PLACES)
    assert data.check(dataset, "full") == []
    assert dataset.counts is not None
    assert int(dataset.counts.sum()) == (6 * 200 if task == "segmentation" else 6)


def test_unlabeled_images_lie_in_sub_folders_too(tmp_path: Path) -> None:
    for number, place in enumerate(PLACES):
        _image(tmp_path / place, number)
    _image(tmp_path / "x.ppm")
    images = UnlabeledImages(tmp_path, "detection")
    assert len(images) == len(PLACES)
    assert "x.ppm" in data.check(images, "full")[0]


def test_masks_within_the_images_folder_are_no_images(tmp_path: Path) -> None:
    _image(tmp_path / "a.png", 5)
    _image(tmp_path / "masks/a.png", 1, "L")
    dataset = data.MaskFolder(tmp_path, tmp_path / "masks", ("sky", "road"))
    assert dataset.files == [tmp_path / "a.png"]
    assert dataset.problems == []


def test_a_mask_of_a_lossy_type_is_named(tmp_path: Path) -> None:
    _image(tmp_path / "images/a.png", 5)
    _image(tmp_path / "masks/a.jpg", 1, "L")
    with pytest.raises(AcamkdError, match=r"has no mask .*masks/a\.png, but one of the type \.jpg"):
        data.check(data.MaskFolder(tmp_path / "images", tmp_path / "masks", ("sky", "road")), "full")


def test_paths_of_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _yolo(tmp_path / "Daten")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert config.Data(root=Path("~/Daten")).root == tmp_path / "Daten"
    assert config.Split(images=Path("images\\train")).images == Path("images/train")
    split = config.Split(images=Path("IMAGES\\train"))
    options = config.Data(format="yolo", root=Path("~/daten"), train=split, val=split)
    assert len(data.build(options, "detection", "train", seed=0, augment=False)) == len(PLACES)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AcamkdError, match=rf"data\.root gone: there is no such folder in {tmp_path}, where"):
        data.build(config.Data(root=Path("gone")), "detection", "train", seed=0, augment=False)
    with pytest.raises(AcamkdError, match=r"data\.root gone: there is no such folder in"):
        data.build(config.Data(format="voc", root=Path("gone")), "detection", "train", seed=0, augment=False)


@pytest.mark.parametrize(
    ("root", "file", "message"),
    [
        ("sets", "sets/voc/Annotations/a.xml", r"Is data\.root .*/sets/voc\? Annotations/\*\*/\*\.xml and JPEGImages"),
        ("sets/voc/JPEGImages", "sets/voc/Annotations/a.xml", r"Is data\.root .*/sets/voc\?"),
        ("sets", "sets/train/_annotations.coco.json", r"Is .*/train/_annotations\.coco\.json a COCO file\?"),
        (
            "sets",
            "sets/export/pets.yml",
            r"Is .*/export/pets\.yml for format yolo\? It is read under the name data\.yaml",
        ),
        ("sets", "sets/export/a.xml", r"There are XML files in .*/export: data\.format voc reads them"),
        ("sets", "sets/export/a.txt", r"There are text files in .*/export: data\.format yolo reads them"),
    ],
)
def test_an_unknown_layout_and_its_answer_beside_it(tmp_path: Path, root: str, file: str, message: str) -> None:
    _text(tmp_path / file, "names: [cat]" if file.endswith(".yml") else VOC)
    (tmp_path / "sets/voc/JPEGImages").mkdir(parents=True, exist_ok=True)
    with pytest.raises(AcamkdError, match=message):
        data.build(config.Data(root=tmp_path / root), "detection", "train", seed=0, augment=False)
