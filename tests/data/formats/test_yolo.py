from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from acamkd import config, data
from acamkd.data import YoloDetection
from acamkd.data.formats.yolo import class_names, folders
from acamkd.errors import AcamkdError

NAMES = ("cat", "dog")


def _write(root: Path, labels: dict[str, bytes] | None = None) -> Path:
    """Three images of 20 x 10 pixels: one with boxes, one with an empty file, one without a file."""
    labels = labels if labels is not None else {"a": b"1 0.5 0.5 0.5 0.4\n0 0.1 0.2 0.1 0.2\n", "b": b""}
    for split in ("train", "val"):
        (root / "images" / split).mkdir(parents=True)
        (root / "labels" / split).mkdir(parents=True)
        for name, mode in (("a.jpg", "RGB"), ("b.PNG", "RGBA"), ("c.bmp", "L")):
            Image.new(mode, (20, 10)).save(root / "images" / split / name)
        for name, content in labels.items():
            (root / "labels" / split / f"{name}.txt").write_bytes(content)
    (root / "data.yaml").write_text(
        "path: .\ntrain: images/train\nval: images/val\nnc: 2\nnames:\n  0: cat\n  1: dog\n"
    )
    return root


def _dataset(root: Path) -> YoloDetection:
    return YoloDetection(root / "images/train", root / "labels/train", NAMES)


def test_shares_become_pixels(tmp_path: Path) -> None:
    dataset = _dataset(_write(tmp_path))
    (warning,) = data.check(dataset, "full")
    assert warning.endswith("labels/train: 2 of 3 images have no boxes")
    image, target = dataset[0]
    assert image.shape == (3, 10, 20)
    assert torch.allclose(target["boxes"], torch.tensor([[5, 3, 15, 7], [1.0, 1, 3, 3]]))
    assert target["boxes"].dtype == torch.float32
    assert target["labels"].tolist() == [2, 1]
    assert target["iscrowd"].tolist() == [0, 0]
    for index in (1, 2):
        image, empty = dataset[index]
        assert image.shape == (3, 10, 20)
        assert empty["boxes"].shape == (0, 4)


def test_boxes_follow_the_rotated_image(tmp_path: Path) -> None:
    _write(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 10)).save(tmp_path / "images/train/a.jpg", exif=exif)
    image, target = _dataset(tmp_path)[0]
    assert image.shape == (3, 20, 10)
    assert target["boxes"][0].tolist() == pytest.approx([2.5, 6, 7.5, 14])


def test_a_byte_order_mark_and_the_line_ends_of_windows(tmp_path: Path) -> None:
    _write(tmp_path, {"a": b"\xef\xbb\xbf1 0.5 0.5 0.5 0.4\r\n\r\n0\t0.1 0.2 0.1 0.2\r\n"})
    assert _dataset(tmp_path)[0][1]["labels"].tolist() == [2, 1]


def test_boxes_beyond_the_image_are_clipped(tmp_path: Path) -> None:
    dataset = _dataset(_write(tmp_path, {"a": b"0 0.9 0.5 0.4 1.0000001\n"}))
    assert dataset[0][1]["boxes"][0].tolist() == pytest.approx([14, 0, 20, 10])
    assert "1 boxes reach beyond their image and are clipped" in data.check(dataset, "full")[0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"2 0.5 0.5 0.1 0.1", r"class 2 is none of the 2, 0 to 1"),
        (b"-1 0.5 0.5 0.1 0.1", r"class -1 is none of the 2"),
        (b"0 120 64 30 20", r"the center \(120, 64\) must be shares of width and height from 0 to 1, not pixels"),
        (b"0 nan 0.5 0.1 0.1", "the center"),
        (b"0 0.5 0.5 0 0.1", r"the box from \(0\.5, 0\.45\) to \(0\.5, 0\.55\) on a\.jpg has no area"),
        (b"0 0.5 0.5 nan 0.1", ".* has no area"),
        (b"0 0.5 0.5 0.1", r"a box is `class cx cy w h`, not `0 0\.5 0\.5 0\.1`"),
        (b"0 0.1 0.1 0.4 0.1 0.4 0.4", "a box is `class cx cy w h`, not"),
        (b"cat 0.5 0.5 0.1 0.1", "a box is `class cx cy w h`, not"),
    ],
)
def test_bad_lines(tmp_path: Path, line: bytes, message: str) -> None:
    _write(tmp_path, {"a": b"1 0.5 0.5 0.5 0.4\n" + line})
    with pytest.raises(AcamkdError, match=rf"1 problem:\n  .*labels/train/a\.txt:2: {message}"):
        data.check(_dataset(tmp_path), "full")


def test_images_and_files_that_do_not_go_together(tmp_path: Path) -> None:
    _write(tmp_path)
    for name in ("classes.txt", "lost.txt"):
        (tmp_path / "labels/train" / name).write_text("0 0.5 0.5 0.1 0.1")
    assert "labels/train: 1 files have no image in " in _dataset(tmp_path).warnings[0]
    Image.new("RGB", (20, 10)).save(tmp_path / "images/train/a.png")
    with pytest.raises(AcamkdError, match=r"a\.png: the image has the same name as a\.jpg, and so the same boxes"):
        data.check(_dataset(tmp_path), "full")


def test_no_boxes_no_images_no_text(tmp_path: Path) -> None:
    _write(tmp_path, {})
    with pytest.raises(AcamkdError, match=r"labels/train: there is no box for any image"):
        data.check(_dataset(tmp_path), "full")
    (tmp_path / "labels/train/a.txt").write_bytes(b"\xff\x00\x12")
    with pytest.raises(AcamkdError, match=r"a\.txt is not a text file"):
        _dataset(tmp_path)
    with pytest.raises(AcamkdError, match=r"images/val2: No such file"):
        YoloDetection(tmp_path / "images/val2", tmp_path / "labels/val", NAMES)
    (tmp_path / "images/none").mkdir()
    with pytest.raises(AcamkdError, match=r"images/none: the folder holds no images"):
        data.check(YoloDetection(tmp_path / "images/none", tmp_path / "labels/val", NAMES), "full")


@pytest.mark.parametrize("names", ["names: [cat, dog]", "names: {0: cat, 1: dog}", "names:\n- cat\n- dog"])
def test_names(tmp_path: Path, names: str) -> None:
    (tmp_path / "data.yaml").write_text(names)
    assert class_names(tmp_path, None) == class_names(tmp_path, NAMES) == NAMES
    with pytest.raises(AcamkdError, match=r"data\.classes is dog, cat, but the names of .*data\.yaml are cat, dog"):
        class_names(tmp_path, ("dog", "cat"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("names: {0: cat, 2: dog}", r"names must be numbered 0 to 1, not 0, 2"),
        ("names: cat", "names must be a list, or a mapping"),
        ("names: []", "names must be a list, or a mapping"),
        ("- cat", "must hold a mapping with train, val and names"),
        ("names: [cat", "is not valid YAML"),
        ("nc: 2", r"the class names are missing: give `names` in .*data\.yaml, or data\.classes"),
    ],
)
def test_bad_names(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "data.yaml").write_text(content)
    with pytest.raises(AcamkdError, match=message):
        class_names(tmp_path, None)


def test_names_of_the_recipe_do_without_a_file(tmp_path: Path) -> None:
    assert class_names(tmp_path, NAMES) == NAMES


def test_where_images_and_labels_lie(tmp_path: Path) -> None:
    _write(tmp_path)
    assert folders(tmp_path, "val") == (tmp_path / "images/val", tmp_path / "labels/val")
    (tmp_path / "data.yaml").write_text("train: ../train/images\nval: ../valid/images\n")
    (tmp_path / "valid/images").mkdir(parents=True)
    assert folders(tmp_path, "val") == (tmp_path / "valid/images", tmp_path / "valid/labels")
    (tmp_path / "several/images/a").mkdir(parents=True)
    (tmp_path / "several/data.yaml").write_text("train: [images/a]\n")
    assert folders(tmp_path / "several", "train")[0] == tmp_path / "several/images/a"
    (tmp_path / "several/data.yaml").write_text("train: [images/a, images/b]\n")
    with pytest.raises(AcamkdError, match=r"data\.yaml: train must be one folder of images, not \['images/a', 'imag"):
        folders(tmp_path / "several", "train")
    with pytest.raises(AcamkdError, match=r"no folder of images for the split train; looked for .*\.\./train/images"):
        folders(tmp_path, "train")
    given = folders(tmp_path, "train", images=tmp_path / "a/images/b", labels=None)
    assert given == (tmp_path / "a/images/b", tmp_path / "a/labels/b")
    with pytest.raises(AcamkdError, match="has no `images` in its path: name the folder of labels in annotations"):
        folders(tmp_path, "train", images=Path("/images"))


def test_a_recipe_may_name_the_folders(tmp_path: Path) -> None:
    _write(tmp_path)
    (tmp_path / "labels").rename(tmp_path / "boxes")
    train = config.Split(images=Path("images/train"), annotations=Path("boxes/train"))
    options = config.Data(format="yolo", root=tmp_path, train=train, val=train)
    assert data.build(options, "detection", "val", seed=0, augment=False)[0][1]["labels"].tolist() == [2, 1]
