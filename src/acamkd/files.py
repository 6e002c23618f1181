"""Files: which ones are images, where they lie, and how one is there whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from acamkd.errors import AcamkdError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif")
"""Endings of what is read as an image, in any case."""

ARCHIVE_LEFTOVERS = "__MACOSX"
"""A folder that macOS adds to its archives; what it holds is called like the images and is none."""


def files_below(folder: Path, *, without: Sequence[Path] = ()) -> list[Path]:
    """Visible files of a folder and of all folders in it, in the order of their paths without suffix.

    Args:
        folder: Where to look. Links to folders are followed, none twice.
        without: Folders in it that are left out.

    Raises:
        OSError: A folder cannot be read.
    """
    found: list[Path] = []
    left_out, seen = {os.path.realpath(each) for each in without}, set[str]()
    real, links = [str(folder)], list[str]()
    while real or links:  # what is reached by a link and without one is found without
        path = real.pop() if real else links.pop(0)
        if (place := os.path.realpath(path)) in seen:
            continue
        seen.add(place)
        for entry in sorted(os.scandir(path), key=lambda each: each.name):
            if entry.name[0] == ".":
                continue
            if not entry.is_dir():
                found.append(Path(entry.path))
            elif entry.name != ARCHIVE_LEFTOVERS and os.path.realpath(entry.path) not in left_out:
                (links if entry.is_symlink() else real).append(entry.path)
    return sorted(found, key=lambda file: (str(file.parent), file.stem, file.suffix))


def check_writable(folder: Path, what: str = "", advice: str = "--out writes elsewhere") -> None:
    """Find out whether files can be written to a folder, which need not exist yet; nothing is left behind.

    Args:
        folder: Where to.
        what: What the folder is, for the message.
        advice: What to do where it cannot be written.

    Raises:
        AcamkdError: It cannot be made or written.
    """
    above = next(each for each in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(each))
    try:
        with suppress(FileNotFoundError):
            folder.stat()  # which says it of a name that is too long
        if above == folder.absolute():
            above.mkdir(exist_ok=True)  # which says it of a file in its place
        with TemporaryFile(dir=above):
            pass
    except OSError as error:
        named = f"{what} {folder}" if what else folder
        raise AcamkdError(f"cannot write {named}: {error.strerror or error}; {advice}") from error


def check_writable_file(file: Path) -> None:
    """Find out whether a file that --out names can be written; raises AcamkdError as `check_writable` does."""
    check_writable(file.parent)
    if file.is_dir():
        raise AcamkdError(f"{file} is a folder: --out takes the name of a file")


def unfinished_name(name: str) -> str:
    """Under which a file is written first; its suffix stays, since Pillow takes the format from it."""
    return f".unfinished-{name}"


@contextmanager
def written_whole(path: Path, *, previous: Path | None = None, durable: bool = True) -> Iterator[Path]:
    """A file to write to, which takes the place of `path` at the end; after an error, `path` is as it was.

    Args:
        path: Where it is to be.
        previous: Where to keep what was there; nothing = it is replaced.
        durable: Wait until it is on the disk, or a power cut leaves the name with nothing behind it.
    """
    unfinished = path.with_name(unfinished_name(path.name))
    try:
        yield unfinished
        if durable:
            with unfinished.open("rb+") as file:
                os.fsync(file.fileno())
        if previous is not None and path.exists():
            path.replace(previous)
        unfinished.replace(path)
    except BaseException:
        with suppress(OSError):  # the error above is the one to tell
            unfinished.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file completely or not at all, in a folder that is created if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8", errors="backslashreplace")  # of file names that are not UTF-8


def write_json(path: Path, content: Mapping[Any, Any]) -> None:
    """Write a JSON file completely or not at all; see `as_json`."""
    write_text(path, as_json(content) + "\n")


def as_json(content: Any) -> str:
    """Indented JSON, with null for NaN, which JSON lacks."""
    return json.dumps(_without_nan(content), indent=2)


def _without_nan(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {key: _without_nan(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and content != content else content
