from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from acamkd import data
from acamkd.data import MaskFolder
from acamkd.errors import AcamkdError, ImageError

SHARED = Path(__file__).parents[4] / "shared" / "data"
IDS = np.array([[0, 1, 2], [11, 1, 0]], np.uint8)


def _folders(root: Path, names: tuple[str, ...] = ("a.JPG", "b.jpeg", "c.png", "d.bmp", "e.webp")) -> tuple[Path, Path]:
    images, masks = root / "images", root / "masks"
    images.mkdir()
    masks.mkdir()
    for name in names:
        Image.new("RGB", (3, 2)).save(images / name)
        Image.fromarray(IDS).save((masks / name).with_suffix(".png"))
    return images, masks


def _dataset(root: Path, **options: Any) -> MaskFolder:
    return MaskFolder(root / "images", root / "masks", ("sky", "road", "car"), **{"ignore_index": 11, **options})


def test_pairs_by_stem_and_maps_ignore_index_to_void(tmp_path: Path) -> None:
    images, _ = _folders(tmp_path)
    (images / "._a.jpg").write_text("left by a Mac")
    (images / "notes.txt").write_text("not an image")
    dataset = _dataset(tmp_path)
    assert [file.name for file in dataset.files] == ["a.JPG", "b.jpeg", "c.png", "d.bmp", "e.webp"]
    assert data.check(dataset, "full") == []
    for image, target in dataset:
        assert image.shape == (3, 2, 3)
        assert target["mask"].dtype == torch.int64
        assert target["mask"].tolist() == [[0, 1, 2], [255, 1, 0]]


def test_palette_masks_are_ids(tmp_path: Path) -> None:
    _, masks = _folders(tmp_path, ("a.png",))
    palette = Image.fromarray(IDS).convert("P")
    palette.putdata(IDS.ravel().tolist())
    palette.putpalette([200, 10, 10] * 256)
    palette.save(masks / "a.png")
    dataset = _dataset(tmp_path)
    assert data.check(dataset, "full") == []
    assert dataset[0][1]["mask"].tolist() == [[0, 1, 2], [255, 1, 0]]


def test_black_and_white_masks_are_ids(tmp_path: Path) -> None:
    _, masks = _folders(tmp_path, ("a.png",))
    Image.fromarray(np.array([[0, 255, 0], [255, 0, 0]], np.uint8)).convert("1").save(masks / "a.png")
    assert _dataset(tmp_path)[0][1]["mask"].tolist() == [[0, 1, 0], [1, 0, 0]]


@pytest.mark.parametrize("mode", ["full", "headers"])
def test_color_masks_are_refused(tmp_path: Path, mode: Any) -> None:
    _, masks = _folders(tmp_path)
    Image.new("RGB", (3, 2)).save(masks / "b.png")
    with pytest.raises(
        AcamkdError, match=r"1 problem:\n.*b\.png: .* mode RGB; save class ids, as 8-bit gray or with a"
    ):
        data.check(_dataset(tmp_path), mode)


def test_16_bit_masks_are_refused(tmp_path: Path) -> None:
    _, masks = _folders(tmp_path, ("a.png",))
    Image.fromarray(np.full((2, 3), 1, np.uint16)).save(masks / "a.png")
    with pytest.raises(AcamkdError, match=r"a\.png: .* mode I;16; save class ids, as 8-bit gray .* or 16 bits"):
        data.check(_dataset(tmp_path), "full")


@pytest.mark.parametrize("mode", ["full", "headers"])
def test_mask_of_another_size(tmp_path: Path, mode: Any) -> None:
    _, masks = _folders(tmp_path)
    Image.fromarray(IDS.T.copy()).save(masks / "b.png")
    with pytest.raises(AcamkdError, match=r"b\.png: the mask has 2 x 3 pixels, but b\.jpeg has 3 x 2 pixels"):
        data.check(_dataset(tmp_path), mode)


def test_unknown_ids(tmp_path: Path) -> None:
    _folders(tmp_path, ("a.png",))
    dataset = _dataset(tmp_path, ignore_index=255)
    assert data.check(dataset, "headers") == []
    message = r"a\.png: the mask holds 11, but the values for the 3 classes and for void are 0 to 2 and 255"
    with pytest.raises(AcamkdError, match=message):
        data.check(dataset, "full")
    with pytest.raises(ImageError, match=message):  # which a look at the headers did not see
        dataset[0]


def test_a_void_among_the_ids_is_explained(tmp_path: Path) -> None:
    _folders(tmp_path, ("a.png",))
    message = r"the mask holds 11, but the values .* are 0 to 2 \(data.ignore_index .* is listed in data.classes too\)"
    with pytest.raises(AcamkdError, match=message):
        data.check(_dataset(tmp_path, ignore_index=0), "full")


def test_broken_mask(tmp_path: Path) -> None:
    _, masks = _folders(tmp_path)
    (masks / "b.png").write_bytes((masks / "b.png").read_bytes()[:45])
    with pytest.raises(AcamkdError, match=r"1 problem:\n.*b\.png: the mask cannot be read"):
        data.check(_dataset(tmp_path), "full")
    with pytest.raises(ImageError, match=r"b\.png: the mask cannot be read"):  # damaged after the check
        _dataset(tmp_path)[1]


def test_image_without_mask_and_mask_without_image(tmp_path: Path) -> None:
    images, masks = _folders(tmp_path)
    (masks / "a.png").unlink()
    (images / "d.bmp").unlink()
    message = r"2 problems:\n.*a\.JPG: the image has no mask .*a\.png\n.*d\.png: the mask has no image in "
    with pytest.raises(AcamkdError, match=message):
        data.check(_dataset(tmp_path), "full")


def test_two_images_of_one_name(tmp_path: Path) -> None:
    _folders(tmp_path, ("a.png", "a.jpg"))
    with pytest.raises(AcamkdError, match=r"a\.png: the image has the same name as a\.jpg"):
        data.check(_dataset(tmp_path), "full")


def test_no_images(tmp_path: Path) -> None:
    _folders(tmp_path, ())
    with pytest.raises(AcamkdError, match=r"images: the folder holds no images \(\.jpg, "):
        data.check(_dataset(tmp_path), "full")


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(AcamkdError, match=r"cannot read the folder .*images: No such file"):
        _dataset(tmp_path)


@pytest.mark.skipif(not (SHARED / "camvid").is_dir(), reason="the CamVid images are not beside the checkout")
def test_real_road_scenes() -> None:
    root = SHARED / "camvid"
    names = [f"class {number}" for number in range(11)]
    dataset = MaskFolder(root / "images" / "val", root / "masks" / "val", names, ignore_index=11)
    assert data.check(dataset, "full") == []
    assert len(dataset) == 101
    image, target = dataset[0]
    assert image.shape == (3, 360, 480)
    assert set(target["mask"].flatten().tolist()) <= {*range(11), 255}
