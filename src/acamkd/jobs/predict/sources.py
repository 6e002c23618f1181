"""Sources of frames: images, a video, and those that are live: a growing folder, a camera, a stream."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path, PurePosixPath
from threading import Event
from typing import ClassVar

from acamkd.errors import AcamkdError
from acamkd.files import IMAGE_SUFFIXES, files_below
from acamkd.jobs.export.onnx_model import Pixels, read_image

log = logging.getLogger(__name__)

POLL = 0.5
"""Seconds between two looks into a folder that grows."""


@dataclass(frozen=True)
class Frame:
    """One image to predict on.

    Attributes:
        pixels: (H, W, 3), RGB, upright.
        file_name: Path of the image in its folder, name of the video, or address of the stream.
        mask: Path of its mask in the folder of masks.
        number: Number of the frame from 0, dropped ones included; None of an image.
        seconds: Time in the video, or since the first frame of a stream; None if unknown.
        utc: Time of arrival from a live source, in ISO 8601.
    """

    pixels: Pixels
    file_name: str
    mask: str
    number: int | None = None
    seconds: float | None = None
    utc: str | None = None


class Source(ABC):
    """A source of frames; used within a `with` statement, which opens and closes it."""

    unit: ClassVar[str]
    """`image` or `frame`."""

    is_live: ClassVar[bool] = False
    """Whether it goes on until it is stopped."""

    stem: str
    """Name of an overlay video, without suffix."""

    total: int | None = None
    """Number of frames, if it is known before."""

    rate: float = 25.0
    """Frames per second of a video, or about so many; known within the `with` statement."""

    dropped: int = 0
    """Number of frames that came while the network was busy with another."""

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:  # noqa: B027 - most have nothing to close
        """Close what is open."""

    @abstractmethod
    def frames(self) -> Iterator[Frame]:
        """Every frame; raises AcamkdError if a source that is not live cannot be read to its end."""

    def check_masks(self) -> None:  # noqa: B027 - frames of a video have a name each
        """Raise AcamkdError if the masks of two images would have the same file name; called before the first one."""

    def problem(self) -> str | None:
        """Why frames are missing at the end, if they are."""
        return None


class Images(Source):
    """Images of a folder, in the order of their names.

    Args:
        files: Paths of the images.
        folder: Folder that their names are relative to.
    """

    unit = "image"

    def __init__(self, files: Sequence[Path], folder: Path) -> None:
        self.total = len(files)
        self.stem = folder.name
        self._files = files
        self._folder = folder
        self._unreadable: list[str] = []

    def frames(self) -> Iterator[Frame]:
        """See the base class; an image that cannot be read is left out."""
        for file in self._files:
            try:
                yield _image(file, self._folder)
            except AcamkdError as error:
                self._unreadable.append(str(error))

    def check_masks(self) -> None:
        """See the base class."""
        check_names(self._files, self._folder)

    def problem(self) -> str | None:
        """See the base class."""
        if not self._unreadable:
            return None
        first = "; ".join(self._unreadable[:3]) + ("; ..." if len(self._unreadable) > 3 else "")
        return f"{len(self._unreadable)} of {self.total} images are left out: {first}"


class GrowingFolder(Source):
    """Images of a folder, and those that come later.

    An image is read once its size and time have stayed the same between two looks. One that cannot be read is left out
    with a warning.

    Args:
        folder: Where to look, with all folders in it.
        without: Folders in it that are left out.
        stop: Ends the waiting.
    """

    unit = "image"
    is_live = True

    def __init__(self, folder: Path, *, without: Sequence[Path], stop: Event) -> None:
        self.stem = folder.name
        self._folder = folder
        self._without = without
        self._stop = stop
        self._checks_masks = False

    def check_masks(self) -> None:
        """See the base class; here at each look, too."""
        self._checks_masks = True

    def frames(self) -> Iterator[Frame]:
        """See the base class."""
        done: dict[Path, tuple[int, int]] = {}  # with its state then: a copy may have paused
        before: dict[Path, tuple[int, int]] = {}
        said = ""
        while not self._stop.is_set():
            try:
                files = images_below(self._folder, self._without)
            except AcamkdError as error:  # a folder that has just gone, or a share that is away for a moment
                if str(error) != said:
                    log.warning("%s; looking again", error)
                said = str(error)
                self._stop.wait(POLL)
                continue
            said = ""
            if self._checks_masks:
                check_names(files, self._folder)
            states = {file: state for file in files if (state := _state(file)) is not None}
            complete = [file for file, state in states.items() if before.get(file) == state != done.get(file)]
            for file in complete:
                if self._stop.is_set():
                    return
                done[file] = states[file]
                try:
                    yield _image(file, self._folder, utc=now())
                except AcamkdError as error:
                    log.warning("left out: %s", error)
            before = states
            self._stop.wait(POLL)


def _image(file: Path, folder: Path, utc: str | None = None) -> Frame:
    name = PurePosixPath(file.relative_to(folder).as_posix())
    return Frame(read_image(file), str(name), str(name.with_suffix(".png")), utc=utc)


def _state(file: Path) -> tuple[int, int] | None:
    """Size and time of a file; None if it has gone."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def now() -> str:
    """The time in UTC, to the millisecond."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


def images_below(folder: Path, without: Sequence[Path]) -> list[Path]:
    """All images of a folder and the folders below it; raises AcamkdError if one cannot be read."""
    try:
        return [file for file in files_below(folder, without=without) if file.suffix.lower() in IMAGE_SUFFIXES]
    except OSError as error:
        raise AcamkdError(f"cannot read the folder {error.filename or folder}: {error.strerror}") from error


def check_names(files: Sequence[Path], folder: Path) -> None:
    """Raise AcamkdError if the masks of two images would have the same file name."""
    found = Counter(file.with_suffix("") for file in files).most_common(1)
    if found and found[0][1] > 1:
        name, count = found[0]
        raise AcamkdError(
            f"{folder}: {count} images are called {name.name}, and their masks would be one file: rename them"
        )
