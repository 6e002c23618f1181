from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from acamkd import config, data
from acamkd.data import YoloDetection
from acamkd.data.formats.yolo import class_names, labels_of, sources
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
        (b"2 0.5 0.5 0.1 0.1", r"class 2 is none of the 2, 0 to 1; .* do theirs begin with 1\?"),
        (b"-1 0.5 0.5 0.1 0.1", r"class -1 is none of the 2"),
        (b"0 120 64 30 20", r"the center \(120, 64\) must be shares of width and height from 0 to 1, not pixels"),
        (b"0 nan 0.5 0.1 0.1", "the center"),
        (b"0 0.5 0.5 0 0.1", r"the box from \(0\.5, 0\.45\) to \(0\.5, 0\.55\) on a\.jpg has no area"),
        (b"0 0.5 0.5 nan 0.1", ".* has no defined area"),
        (b"0 0.5 0.5 0.1", r"a box is `class cx cy w h`, not `0 0\.5 0\.5 0\.1`"),
        (b"0 0.1 0.1 0.4 0.1 0.4", r"a box is `class cx cy w h`, not .*; a polygon, .* has 3 corners or more"),
        (b"0 0.1 0.1 0.4 0.1 40 0.4", "a polygon's corners must be shares"),
        (b"cat 0.5 0.5 0.1 0.1", "a box is `class cx cy w h`, not"),
    ],
)
def test_bad_lines(tmp_path: Path, line: bytes, message: str) -> None:
    _write(tmp_path, {"a": b"1 0.5 0.5 0.5 0.4\n" + line})
    with pytest.raises(AcamkdError, match=rf"1 problem:\n  .*labels/train/a\.txt:2: {message}"):
        data.check(_dataset(tmp_path), "full")


def test_a_polygon_becomes_the_box_around_it(tmp_path: Path) -> None:
    lines = b"1 0.1 0.4 0.5 0.2 0.3 0.6\n0 0 0 1.0000001 0 1 1 0 1\n"
    dataset = _dataset(_write(tmp_path, {"a": lines}))
    assert torch.allclose(dataset[0][1]["boxes"], torch.tensor([[2, 2, 10, 6], [0, 0, 20, 10.0]]))
    assert dataset[0][1]["labels"].tolist() == [2, 1]


def _cameras(root: Path, listed: str) -> None:
    """Images of one name in the folders x and y, class 0 in x and class 1 in y, and a list of both."""
    for label, camera in enumerate("xy"):
        for folder in (f"photos/{camera}", f"texts/{camera}"):
            (root / folder).mkdir(parents=True)
        Image.new("RGB", (20, 10)).save(root / f"photos/{camera}/1.jpg")
        (root / f"texts/{camera}/1.txt").write_text(f"{label} 0.5 0.5 0.2 0.2")
    (root / "train.txt").write_text("".join(listed.format(camera) + "\n" for camera in "xy"))


@pytest.mark.parametrize("listed", ["photos/{}/1.jpg", "photos\\{}\\1.JPG", "/home/me/photos/{}/1.jpg"])
def test_listed_images_of_one_name_have_boxes_of_their_own(tmp_path: Path, listed: str) -> None:
    _cameras(tmp_path, listed)
    dataset = YoloDetection(tmp_path / "train.txt", tmp_path / "texts", NAMES)
    assert dataset.problems == []
    assert [target["labels"].tolist() for _, target in dataset] == [[1], [2]]
    ends = [warning for warning in dataset.warnings if "end alike" in warning]
    assert len(ends) == listed.startswith("/")


def test_listed_images_that_would_share_boxes_are_refused(tmp_path: Path) -> None:
    _cameras(tmp_path, "photos/{}/1.jpg")
    (tmp_path / "texts/x/1.txt").rename(tmp_path / "texts/1.txt")
    (tmp_path / "texts/y/1.txt").unlink()
    with pytest.raises(AcamkdError, match=r"y/1\.jpg: the image has the same name as 1\.jpg, and so the same boxes"):
        data.check(YoloDetection(tmp_path / "train.txt", tmp_path / "texts", NAMES), "full")


def test_another_camera_s_boxes_are_not_taken(tmp_path: Path) -> None:
    _cameras(tmp_path, "photos/{}/1.jpg")
    (tmp_path / "texts/y/1.txt").unlink()
    dataset = YoloDetection(tmp_path / "train.txt", tmp_path / "texts", NAMES)
    assert [target["labels"].tolist() for _, target in dataset] == [[1], []]


def test_paths_of_windows(tmp_path: Path) -> None:
    _write(tmp_path / "pets")
    (tmp_path / "pets/data.yaml").write_text("path: C:\\data\\pets\ntrain: images\\train\nnames: [cat, dog]")
    assert sources(tmp_path / "pets", "train") == [tmp_path / "pets/images/train"]


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


@pytest.mark.parametrize(
    "names",
    ["names: [cat, dog]", "names: {0: cat, 1: dog}", "names: {'1': dog, '0': cat}\nnc: 2", "names:\n- cat\n- dog"],
)
def test_names(tmp_path: Path, names: str) -> None:
    (tmp_path / "data.yaml").write_text(names)
    assert class_names(tmp_path, None) == class_names(tmp_path, NAMES) == NAMES
    with pytest.raises(AcamkdError, match=r"data\.classes is dog, cat, but the names of .*data\.yaml are cat, dog"):
        class_names(tmp_path, ("dog", "cat"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("names: {0: cat, 2: dog}", r"names must be numbered 0 to 1, not 0, 2"),
        ("nc: 3\nnames: [cat, dog]", r"data\.yaml: nc is 3, but there are 2 names"),
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
    assert sources(tmp_path, "val") == [tmp_path / "images/val"]
    assert labels_of(tmp_path / "images/val") == tmp_path / "labels/val"
    assert labels_of(Path("a/images/images/val")) == Path("a/images/labels/val")
    assert labels_of(Path("photos")) == Path("photos")  # with the images
    exported = tmp_path / "exported"
    (exported / "valid/images").mkdir(parents=True)
    (exported / "data.yaml").write_text("train: ../train/images\nvalidation: ../valid/images\n")
    assert sources(exported, "val") == [exported / "valid/images"]
    with pytest.raises(AcamkdError, match=r"no folder of images for the split train; looked for .*\.\./train/images"):
        sources(exported, "train")
    (exported / "data.yaml").write_text("train: [valid/images, 7]\n")
    with pytest.raises(AcamkdError, match=r"train must be folders of images or files that list them, not \['valid/im"):
        sources(exported, "train")


def test_several_folders_are_read(tmp_path: Path) -> None:
    _write(tmp_path)
    (tmp_path / "data.yaml").write_text("train: [images/train, images/val]\nnames: [cat, dog]\n")
    dataset = data.build(config.Data(root=tmp_path), "detection", "train", seed=0, augment=False)
    assert [file.parent.name for file in dataset.files] == ["train"] * 3 + ["val"] * 3
    assert dataset[3][1]["labels"].tolist() == [2, 1]


def test_a_recipe_may_name_the_folders(tmp_path: Path) -> None:
    _write(tmp_path)
    (tmp_path / "labels").rename(tmp_path / "boxes")
    train = config.Split(images=Path("images/train"), annotations=Path("boxes/train"))
    options = config.Data(format="yolo", root=tmp_path, train=train, val=train)
    assert data.build(options, "detection", "val", seed=0, augment=False)[0][1]["labels"].tolist() == [2, 1]


def _named(root: Path, content: str, split: str = "train", **options: Any) -> data.ImageDataset:
    (root / "data.yaml").write_text(f"names: [cat, dog]\n{content}", encoding="utf-8")
    recipe = config.Data(format="yolo", root=root, **options)
    return data.build(recipe, "detection", split, seed=0, augment=False)  # type: ignore[arg-type]


def test_boxes_before_keypoints_are_read(tmp_path: Path) -> None:
    """Such a line has as many numbers as one of a polygon."""
    pose, polygon = b"0 .5 .5 .2 .2 .45 .45 .55 .45 .55 .55 .45 .55", b"0 .1 .4 .5 .2 .3 .6"
    root = _write(tmp_path, {"a": pose + b"\n1 .1 .2 .1 .2"})
    dataset = _named(root, "kpt_shape: [4, 2]\n")
    assert torch.allclose(dataset[0][1]["boxes"], torch.tensor([[8.0, 4, 12, 6], [1, 1, 3, 3]]))
    assert torch.allclose(_named(root, "")[0][1]["boxes"][0], torch.tensor([4, 2, 11, 5.5]))
    (root / "labels/train/a.txt").write_bytes(polygon)
    [problem] = _named(root, "kpt_shape: [4, 2]\n").problems
    assert problem.endswith("; as kpt_shape of data.yaml says, 8 numbers of keypoints follow it")
    with pytest.raises(AcamkdError, match=r"data\.yaml: kpt_shape must be .* such as \[17, 3\], not 17"):
        _named(root, "kpt_shape: 17\n")


def test_path_is_the_folder_that_the_splits_lie_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    root = _write(tmp_path / "old")
    (root / "images/train/c.bmp").unlink()  # so that the older images are told from the newer ones
    new = _write(tmp_path / "old/new")
    elsewhere = _write(tmp_path / "work/datasets/far")
    monkeypatch.chdir(tmp_path / "work")
    for path, place in (
        ("new", new), (".", root), (str(new), new), ("../old/new", new), ("far", elsewhere),
        ("datasets/far", elsewhere), ("old", root), ("", root), ("~/old/new", new),
    ):  # fmt: skip
        monkeypatch.setenv("HOME", str(tmp_path))
        dataset = _named(root, f"path: {path}\ntrain: images/train\n")
        assert {file.parent.resolve() for file in dataset.files} == {(place / "images/train").resolve()}, path
        assert dataset[0][1]["labels"].tolist() == [2, 1]
        assert f"train images: {dataset.files[0].parent}" in caplog.text
    with pytest.raises(
        AcamkdError, match=r"data\.yaml: there is no folder for path gone; looked for .*/old/gone, .*gone"
    ):
        _named(root, "path: gone\ntrain: images/train\n")


def test_lists_of_images_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = _write(tmp_path)
    lines = ["./images/train/a.jpg", "images/val/b.png", str(root / "images/train/c.bmp"), "", "images\\val\\a.JPG"]
    (root / "train.txt").write_text("\n".join(lines))
    expected = ["train/a.jpg", "val/b.PNG", "train/c.bmp", "val/a.jpg"]
    for dataset in (
        _named(root, "train: train.txt\n"),
        _named(root, "train: [train.txt]\n"),
        _named(root, "", train=config.Split(images=Path("train.txt"))),
    ):
        assert [file.relative_to(root / "images").as_posix() for file in dataset.files] == expected
        assert [len(target["labels"]) for _, target in dataset] == [2, 0, 0, 2]
    (root / "train.txt").write_text("images/train/gone.jpg\nimages/train/a.jpg")
    with pytest.raises(AcamkdError, match=r"images/train/gone\.jpg: there is no such image"):
        data.check(_named(root, "train: train.txt\n"), "headers")
    (root / "train.txt").write_text("")
    with pytest.raises(AcamkdError, match=r"train\.txt: the list is empty"):
        data.check(_named(root, "train: train.txt\n"), "headers")


def test_labels_beside_the_images(tmp_path: Path) -> None:
    _write(tmp_path)
    (tmp_path / "images/train").rename(tmp_path / "photos")
    with pytest.raises(
        AcamkdError, match=r"photos has no `images` in its path and holds no text files: name the folder"
    ):
        data.check(_named(tmp_path, "train: photos\n"), "headers")
    (tmp_path / "labels/train/a.txt").rename(tmp_path / "photos/a.txt")
    assert _named(tmp_path, "train: photos\n")[0][1]["labels"].tolist() == [2, 1]


@pytest.mark.parametrize("line", [b"1.0 0.5 0.5 0.5 0.4", b"1 0.5000 5e-1 0.5 0.4", b"1 0.5 0.5 0.50 0.4\t"])
def test_numbers_as_other_tools_write_them(tmp_path: Path, line: bytes) -> None:
    dataset = _dataset(_write(tmp_path, {"a": line}))
    assert dataset[0][1]["labels"].tolist() == [2]
    assert dataset[0][1]["boxes"][0].tolist() == pytest.approx([5, 3, 15, 7])


def test_a_rounded_center_lies_at_the_edge(tmp_path: Path) -> None:
    dataset = _dataset(_write(tmp_path, {"a": b"0 1.0000001 -0.0000001 0.5 0.4"}))
    assert dataset.problems == []
    assert dataset[0][1]["boxes"][0].tolist() == pytest.approx([15, 0, 20, 2])
    assert (
        "the center (1.002, 0.5) must be" in _dataset(_write(tmp_path / "b", {"a": b"0 1.002 0.5 0.5 0.4"})).problems[0]
    )
    assert "class 0.5 is none of the 2" in _dataset(_write(tmp_path / "c", {"a": b"0.5 0.5 0.5 0.5 0.4"})).problems[0]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            "[yes, cat]",
            r'names: class 0 is written yes, which YAML reads as True, not as text: put it in quotes, "yes"',
        ),
        ("{0: cat, 1: no}", r'class 1 is written no, which YAML reads as False, .*, "no"'),
        ("[12:30, cat]", r'class 0 is written 12:30, which YAML reads as 750, .*, "12:30"'),
        ("[2024-01-01, cat]", r'class 0 is written 2024-01-01, .*, "2024-01-01"'),
        ("[cat, 010, 1.50]", r'class 1 is written 010, which YAML reads as 8, .*, "010" \(and 1 more\)'),
        ("[cat, ~]", "class 1 is written ~, which YAML reads as None"),
    ],
)
def test_names_that_yaml_takes_for_something_else(tmp_path: Path, names: str, message: str) -> None:
    (tmp_path / "data.yaml").write_text(f"names: {names}")
    with pytest.raises(AcamkdError, match=message):
        class_names(tmp_path, None)
    (tmp_path / "data.yaml").write_text('names: ["yes", "12:30", "1e3"]')
    assert class_names(tmp_path, None) == ("yes", "12:30", "1e3")


def test_numbers_from_1_are_told(tmp_path: Path) -> None:
    dataset = _dataset(_write(tmp_path, {"a": b"1 0.5 0.5 0.5 0.4"}))
    data.check(dataset, "headers")
    warning, *_ = data.compare_splits(dataset, dataset, config.Data())
    assert warning == (
        "no training image has a box of the class cat: the networks cannot learn it; the files count classes from 0: "
        "do theirs begin with 1?"
    )


def test_turned_images_are_told_since_shares_fit_every_size(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 10)).save(_write(tmp_path) / "images/train/a.jpg", exif=exif)
    assert "1 images are mirrored or turned as their EXIF entry says" in data.check(_dataset(tmp_path), "headers")[-1]
