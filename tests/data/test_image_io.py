"""EXIF blocks: damaged ones stop nothing, and every orientation is read alike by every reader."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, TiffImagePlugin

from acamkd import data
from acamkd.data import MaskFolder
from acamkd.data.image_io import lines_of, read_header, read_image, read_reduced, read_size
from acamkd.errors import AcamkdError, ImageError
from acamkd.jobs.export import onnx_model

PIXELS = np.zeros((8, 24, 3), np.uint8)
PIXELS[:4, :6] = 255
PIXELS[:4, 6:12, 0] = 255


def _exif(orientation: int = 6) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = "maker"
    exif[0x011A] = 72.0
    exif[0x8825] = {1: "N", 2: (1.0, 2.0, 3.0)}
    exif[0x8769] = {0x9003: "2020:01:01 00:00:00"}
    return exif


def _damaged() -> list[bytes]:
    """Cut, with flipped bytes, of another byte order, empty."""
    good, rng = _exif().tobytes(), random.Random(0)
    found = [b"", good[:6], good[:10], good[:20], b"Exif\0\0II" + good[8:], b"Exif\0\0XX" + good[8:], b"no block"]
    for _ in range(150):
        block = bytearray(good)
        for _ in range(rng.choice([1, 2, 4])):
            block[rng.randrange(6, len(block))] = rng.randrange(256)
        found.append(bytes(block))
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
def test_damaged_exif_blocks_beside_sound_pixels(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    for block in _damaged():
        Image.fromarray(PIXELS).save(file, exif=block)
        size = tuple(read_image(file).shape[1:])
        assert size in ((8, 24), (24, 8))
        assert read_size(file) == size
        assert onnx_model.read_image(file).shape[:2] == size


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif"])
def test_every_reader_turns_the_image_upright(tmp_path: Path, name: str, orientation: int) -> None:
    file = tmp_path / name
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(PIXELS).save(file, exif=exif)
    with Image.open(file) as image:
        expected = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    pixels = read_image(file)
    assert torch.equal(pixels, torch.from_numpy(expected).permute(2, 0, 1))
    assert read_header(file)[0] == expected.shape[:2] == ((24, 8) if orientation > 4 else (8, 24))
    assert np.array_equal(onnx_model.read_image(file), expected)


def test_a_tiff_of_photo_software_is_turned_once(tmp_path: Path) -> None:
    file, tags = tmp_path / "a.tif", TiffImagePlugin.ImageFileDirectory_v2()
    tags[274], tags[700] = 6, b"<x:xmpmeta/>"
    Image.fromarray(PIXELS).save(file, tiffinfo=tags)
    assert read_header(file)[0] == tuple(read_image(file).shape[1:]) == (24, 8)


def test_postscript_is_no_image_whatever_its_name(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(ImageError, match=r"a\.jpg: the image cannot be read: cannot identify"):
        read_size(tmp_path / "a.jpg")
    with pytest.raises(AcamkdError, match=r"a\.jpg: the image cannot be read: cannot identify"):
        onnx_model.read_image(tmp_path / "a.jpg")


def test_half_turns_and_mirrors_are_told_since_sizes_do_not_tell_them(tmp_path: Path) -> None:
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.new("RGB", (24, 8), (orientation, 0, 0)).save(tmp_path / f"images/{orientation}.jpg", exif=exif)
        size = (8, 24) if orientation > 4 else (24, 8)
        Image.new("L", size, orientation % 2).save(tmp_path / f"masks/{orientation}.png")
    dataset = MaskFolder(tmp_path / "images", tmp_path / "masks", ("a", "b"))
    for mode in ("full", "headers"):
        (warning,) = data.check(dataset, mode)
        assert warning.startswith("3 images are mirrored or turned as their EXIF entry says (")
        assert "/images/2.jpg): their annotations must be of the image as it is shown" in warning


def test_a_mask_beside_a_rotated_image(tmp_path: Path) -> None:
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    Image.fromarray(PIXELS).save(tmp_path / "images/a.jpg", exif=_exif(6))
    Image.new("L", (24, 8)).save(tmp_path / "masks/a.png")
    dataset = MaskFolder(tmp_path / "images", tmp_path / "masks", ("a", "b"))
    message = r"mask has 24 x 8 pixels, but a\.jpg has 8 x 24 pixels \(rotated as its EXIF entry says\)"
    with pytest.raises(AcamkdError, match=message):
        data.check(dataset, "headers")


def test_a_jpeg_is_decoded_no_smaller_than_needed(tmp_path: Path) -> None:
    pixels = np.zeros((64, 96, 3), np.uint8)
    pixels[:, 48:] = 240
    exif = Image.Exif()
    exif[0x0112] = 6
    upright, turned, png = (tmp_path / name for name in ("upright.jpg", "turned.jpg", "same.png"))
    for file in (upright, png):
        Image.fromarray(pixels).save(file)
    Image.fromarray(pixels).save(turned, exif=exif)
    for least, shape in (((16, 24), (16, 24)), ((17, 24), (32, 48)), ((33, 40), (64, 96)), ((9, 9), (16, 24))):
        image, size = read_reduced(upright, {(64, 96): least}.__getitem__)
        assert (tuple(image.shape[1:]), size) == (shape, (64, 96))
        assert abs(int(image[:, :, -2].float().mean()) - 240) < 4
    image, size = read_reduced(turned, lambda _: (16, 24))
    assert (tuple(image.shape[1:]), size) == ((48, 32), (96, 64))
    for file in (upright, turned, png):
        assert torch.equal(read_reduced(file, lambda size: size)[0], read_image(file))
    assert read_reduced(png, lambda _: (16, 24))[0].shape == (3, 64, 96)


def test_a_text_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(AcamkdError, match=rf"^cannot read {tmp_path}: Is a directory$"):
        lines_of(tmp_path)
