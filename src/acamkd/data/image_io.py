"""Images and text files from disk, with errors that name the file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import ExifTags, Image, ImageFile
from torch import Tensor

from acamkd.data.packed import read_packed
from acamkd.errors import AcamkdError, ImageError
from acamkd.models.base import PixelSize

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> transposition that makes the image upright."""

GRAY_STEPS = {"L;2": 85, "L;4": 17}
"""Factors by which Pillow spreads gray of 2 and 4 bits over 0 to 255."""


def read_image(file: Path) -> Tensor:
    """Decode an image of any 8-bit mode to (3, H, W) uint8 RGB, rotated as its EXIF orientation says.

    Raises:
        ImageError: The file is missing, cannot be decoded, or has more than 8 bits; the message names it.
    """
    return read_reduced(file, lambda size: size)[0]


def read_reduced(file: Path, least: Callable[[PixelSize], PixelSize]) -> tuple[Tensor, PixelSize]:
    """Decode an image as `read_image`, but a JPEG at 1/2, 1/4 or 1/8 of its size, which the decoder averages itself.

    Args:
        file: The image.
        least: From an image's (height, width) to that which is needed; it is decoded no smaller.

    Returns:
        (3, H, W) uint8 RGB, and the image's own (height, width).
    """
    with opened(file) as image:
        if image.mode[0] in "IF":  # Pillow would silently clip them to white
            raise ImageError(f"its pixels are of mode {image.mode}; save it with 8 bits per channel")
        width, height = image.size
        if image.format == "JPEG":  # whose EXIF block is before the pixels
            turned = orientation_of(image) >= 5
            least_height, least_width = least((width, height) if turned else (height, width))
            image.draft(None, (least_height, least_width) if turned else (least_width, least_height))
        image.load()
        orientation = orientation_of(image)
        turn = TURNS.get(orientation)
        pixels = np.array((image if turn is None else image.transpose(turn)).convert("RGB"))
    size = (width, height) if orientation >= 5 else (height, width)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), size


def stored_values(image: ImageFile.ImageFile) -> npt.NDArray[np.uint8]:
    """(H, W): gray levels or palette indices as the file holds them, also those of fewer than 8 bits."""
    coding = str(image.tile[:1])  # which Pillow forgets once it has decoded the pixels
    values = np.array(image, dtype=np.uint8)
    for mode, step in GRAY_STEPS.items():
        if mode in coding:
            values //= step
    return values


def read_size(file: Path) -> PixelSize:
    """(height, width) after EXIF rotation, from the file's header; raises as `read_image`."""
    return read_header(file)[0]


def read_header(file: Path) -> tuple[PixelSize, int]:
    """(height, width) after EXIF rotation, and the EXIF orientation, 1 to 8; raises as `read_image`."""
    with opened(file) as image:
        width, height = image.size
        # Without this test, Pillow would decode a whole PNG to look for an entry after its pixels.
        says = any(entry in image.info for entry in ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"))
        # Pillow turns the size of a TIFF by itself.
        orientation = orientation_of(image) if says and image.format != "TIFF" else 1
    return ((width, height) if orientation >= 5 else (height, width)), orientation


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 if the EXIF block is damaged, as image viewers assume."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        return orientation if orientation in TURNS else 1
    except Exception:  # parsing a damaged block may raise any error
        return 1


FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF")
"""What is decoded, whatever a file's name ends with: Pillow would run Ghostscript for PostScript."""


@contextmanager
def opened(file: Path, what: str = "image") -> Iterator[ImageFile.ImageFile]:
    """Open an image; any error within the context becomes an ImageError that names the file."""
    try:
        packed = read_packed(file)
        with Image.open(file if packed is None else BytesIO(packed), formats=FORMATS) as image:
            yield image
    except FileNotFoundError as error:
        raise ImageError(f"{file}: there is no such {what}") from error
    except Exception as error:  # decoding a damaged file may raise any error
        raise ImageError(f"{file}: the {what} cannot be read: {error}") from error


def lines_of(file: Path) -> list[str]:
    """Lines of a text file, with or without a byte order mark; AcamkdError if it cannot be read."""
    try:
        return file.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise AcamkdError(f"cannot read {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise AcamkdError(f"{file} is not a text file: {error}") from error
