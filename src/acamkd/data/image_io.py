"""Images and text files from disk, with errors that name the file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from acamkd.errors import AcamkdError, ImageError
from acamkd.models.base import PixelSize


def read_image(file: Path) -> Tensor:
    """Decode an image of any 8-bit mode to (3, H, W) uint8 RGB, rotated as its EXIF orientation says.

    Raises:
        ImageError: It is not there, cannot be decoded, or has more bits; the file is named.
    """
    with opened(file) as image:
        if image.mode[0] in "IF":  # Pillow would clip them to white without a word
            raise ImageError(f"its pixels are of mode {image.mode}; save it with 8 bits per channel")
        pixels = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def read_size(file: Path) -> PixelSize:
    """(height, width) after EXIF rotation, from the file's header; raises as `read_image`."""
    with opened(file) as image:
        width, height = image.size
        # Without this question Pillow would decode a whole PNG in search of an entry after its pixels.
        says = any(entry in image.info for entry in ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"))
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1) if says else 1
    return (width, height) if orientation in (5, 6, 7, 8) else (height, width)  # there are no others that turn


@contextmanager
def opened(file: Path, what: str = "image") -> Iterator[Image.Image]:
    """An image; whatever goes wrong with it within becomes a ImageError that names it."""
    try:
        with Image.open(file) as image:
            yield image
    except FileNotFoundError as error:
        raise ImageError(f"{file}: there is no such {what}") from error
    except Exception as error:  # decoders of broken files raise whatever they meet first
        raise ImageError(f"{file}: the {what} cannot be read: {error}") from error


def files_of(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """Visible files of these types in one folder, in the order of their stems; AcamkdError if it cannot be read."""
    try:
        entries = list(folder.iterdir())
    except OSError as error:
        raise AcamkdError(f"cannot read the folder {folder}: {error.strerror}") from error
    chosen = [file for file in entries if file.suffix.lower() in suffixes and not file.name.startswith(".")]
    return sorted(chosen, key=lambda file: (file.stem, file.suffix))


def lines_of(file: Path) -> list[str]:
    """Lines of a text file, with or without a byte order mark; AcamkdError if it cannot be read."""
    try:
        return file.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise AcamkdError(f"cannot read {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise AcamkdError(f"{file} is not a text file: {error}") from error
