"""Videos, cameras and network streams by PyAV, and the video that is written."""

from __future__ import annotations

import logging
import re
import sys
import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from acamkd.errors import AcamkdError, without_password
from acamkd.jobs.export.onnx_model import Pixels
from acamkd.jobs.predict.sources import Frame, Source, now

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer

log = logging.getLogger(__name__)

VIDEOS = (".mp4", ".mov", ".mkv", ".avi", ".webm", ".m4v")

CLOCK = 90_000
"""Units per second of the times in a video that is written."""

TIMEOUT = 10.0
"""Seconds without an answer after which a stream counts as broken."""

DELAYS = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds before each attempt to connect again; a frame that arrives sets the count back."""

WAIT = 0.1
"""Seconds between two looks whether a live source is to stop."""

CAMERAS: Mapping[str, tuple[str, str]] = {"linux": ("/dev/video{}", "v4l2"), "darwin": ("{}", "avfoundation")}
"""System -> address of a camera by its number, and FFmpeg's format for it."""


def require_av() -> None:
    """Raise AcamkdError unless PyAV is installed."""
    try:
        import av  # noqa: F401
    except ImportError as error:
        raise AcamkdError("a video needs PyAV: pip install 'acamkd[video]'") from error


class VideoFile(Source):
    """Every frame of a video.

    Args:
        file: The video.

    Raises:
        AcamkdError: PyAV is missing; on opening, the video cannot be read.
    """

    unit = "frame"

    def __init__(self, file: Path) -> None:
        require_av()
        self.stem = file.stem
        self._file = file

    def __enter__(self) -> VideoFile:
        self._container = _open(str(self._file), "the video")
        stream = self._container.streams.video[0]
        self.rate = float(stream.average_rate or self.rate)
        self.total = stream.frames or None
        return self

    def __exit__(self, *_: object) -> None:
        self._container.close()

    def frames(self) -> Iterator[Frame]:
        """See the base class."""
        import av

        count = 0
        try:
            for count, frame in enumerate(self._container.decode(video=0), 1):
                yield Frame(_pixels(frame), self._file.name, _mask(self.stem, count - 1), count - 1, frame.time)
        except av.FFmpegError as error:
            raise AcamkdError(f"{self._file}: the video cannot be read to its end: {_why(error)}") from error
        if not count:
            raise AcamkdError(f"{self._file}: the video holds no frames")


class LiveVideo(Source):
    """Frames that come at their own pace; a thread reads them, and the newest one waits for the network.

    So predictions never fall behind: a frame that comes while the network is busy takes the place of the one that
    waits.

    Args:
        address: Address for FFmpeg.
        name: What the predictions call it.
        stop: Ends it.
        options: `format` and `options` of FFmpeg.
    """

    unit = "frame"
    is_live = True

    def __init__(self, address: str, name: str, stop: Event, **options: Any) -> None:
        require_av()
        self.stem = re.sub(r"\W+", "-", name).strip("-")
        self._address = address
        self._name = name
        self._stop = stop
        self._options = options
        self._waiting: Queue[tuple[VideoFrame, int, float, str]] = Queue(1)
        self._problem: str | None = None
        self._thread = Thread(target=self._read, daemon=True)  # a stream that hangs must not keep the process

    def __enter__(self) -> LiveVideo:
        self._container = self.open()
        self.rate = float(self._container.streams.video[0].average_rate or self.rate)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(TIMEOUT)
        if not self._thread.is_alive():  # FFmpeg must not be closed while it reads
            self._container.close()

    def open(self) -> InputContainer:
        """Connect; raises AcamkdError if that fails."""
        return _open(self._address, "the stream", name=self._name, timeout=TIMEOUT, **self._options)

    def frames(self) -> Iterator[Frame]:
        """See the base class."""
        self._thread.start()
        while not self._stop.is_set():
            has_ended = not self._thread.is_alive()
            try:
                frame, number, seconds, utc = self._waiting.get(timeout=0 if has_ended else WAIT)
            except Empty:
                if has_ended:
                    return
                continue
            yield Frame(_pixels(frame), self._name, _mask(self.stem, number), number, seconds, utc)

    def problem(self) -> str | None:
        """See the base class."""
        return self._problem

    @abstractmethod
    def arrivals(self) -> Iterator[tuple[VideoFrame, float]]:
        """Each frame when it comes, with its time in seconds; raises AcamkdError if no more can come."""

    def _read(self) -> None:
        try:
            for number, (frame, seconds) in enumerate(self.arrivals()):
                if self._stop.is_set():
                    return
                self._offer((frame, number, seconds, now()))
        except Exception as error:  # a thread would lose it
            self._problem = str(error)

    def _offer(self, newest: tuple[VideoFrame, int, float, str]) -> None:
        while True:
            try:
                self._waiting.put_nowait(newest)
            except Full:
                try:
                    self._waiting.get_nowait()
                except Empty:  # it was taken just now
                    continue
                self.dropped += 1
            else:
                return


class PacedVideo(LiveVideo):
    """A video file that is played at its own pace, as if it came from a camera.

    Args:
        file: The video.
        stop: Ends it.
    """

    def __init__(self, file: Path, stop: Event) -> None:
        super().__init__(str(file), file.name, stop)
        self.stem = file.stem

    def arrivals(self) -> Iterator[tuple[VideoFrame, float]]:
        """See the base class."""
        import av

        begin, number = time.monotonic(), 0
        try:
            for number, frame in enumerate(self._container.decode(video=0)):
                at = frame.time if frame.time is not None else number / self.rate
                if self._stop.wait(max(0.0, begin + at - time.monotonic())):
                    return
                yield frame, at
        except av.FFmpegError as error:
            raise AcamkdError(f"{self._name}: the video cannot be read beyond frame {number}: {_why(error)}") from error


class Stream(LiveVideo):
    """A camera or a network stream, which is connected again when it breaks.

    Args:
        address: Address for FFmpeg, such as rtsp://HOST/PATH.
        stop: Ends it.
        options: `format` and `options` of FFmpeg.
    """

    def __init__(self, address: str, stop: Event, **options: Any) -> None:
        if address.startswith("rtsp"):
            options = {"options": {"rtsp_transport": "tcp"}, **options}  # by UDP, lost packets smear the images
        super().__init__(address, without_password(address), stop, **options)
        self._attempts = 0

    def arrivals(self) -> Iterator[tuple[VideoFrame, float]]:
        """See the base class."""
        import av

        begin: float | None = None
        while True:
            try:
                for frame in self._container.decode(video=0):
                    begin, self._attempts = begin or time.monotonic(), 0
                    yield frame, time.monotonic() - begin
                if self._container.duration:  # a file behind an address
                    return
                reason = "it ended"
            except av.FFmpegError as error:
                reason = _why(error)
            if not self._connect_again(reason):
                return

    def _connect_again(self, reason: str) -> bool:
        """Whether it was not stopped before a new connection stood; raises AcamkdError after the last attempt."""
        while self._attempts < len(DELAYS):
            delay = DELAYS[self._attempts]
            self._attempts += 1
            log.warning("%s: the stream broke (%s); connecting again in %g s", self._name, reason, delay)
            if self._stop.wait(delay):
                return False
            try:
                container = self.open()
            except AcamkdError as error:
                reason = str(error).removeprefix(f"{self._name}: ")
                continue
            self._container.close()
            self._container = container
            return True
        raise AcamkdError(f"{self._name}: the stream broke ({reason}), also after {self._attempts} new connections")


def camera(number: int, stop: Event) -> Stream:
    """The camera with this number; raises AcamkdError on other systems than CAMERAS."""
    if sys.platform not in CAMERAS:
        raise AcamkdError(
            f"camera {number}: cameras are read on Linux and macOS alone; give an address, rtsp://HOST/PATH"
        )
    address, form = CAMERAS[sys.platform]
    return Stream(address.format(number), stop, format=form)


class VideoWriter:
    """Writes a video of frames that need not be equally spaced; its size is made even, as the encoder requires.

    Args:
        file: Video to write, with the suffix .mp4.
        rate: About how many frames per second.
    """

    def __init__(self, file: Path, rate: float) -> None:
        import av

        self._container = av.open(file, "w")
        exact = Fraction(rate).limit_denominator(1001)
        self._stream = self._container.add_stream("libx264", rate=exact, options={"preset": "veryfast"})
        self._stream.codec_context.time_base = Fraction(1, CLOCK)
        self._usual = round(CLOCK / rate)
        self._written: int | None = None  # time of the last frame

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is None and self._stream.codec_context.is_open:
            self._container.mux(self._stream.encode())
        self._container.close()

    def write(self, image: Pixels, seconds: float | None) -> None:
        """Add a frame; one without a time, or with a wrong one, follows the last one at the usual distance.

        Raises:
            AcamkdError: The file cannot be written.
        """
        import av

        height, width = (max(2, side // 2 * 2) for side in image.shape[:2])
        even = np.asarray(Image.fromarray(image).crop((0, 0, width, height)))
        if not self._stream.codec_context.is_open:
            self._stream.width, self._stream.height = width, height
        frame = av.VideoFrame.from_ndarray(even, format="rgb24")
        at = None if seconds is None else round(seconds * CLOCK)
        if at is None or (self._written is not None and at <= self._written):
            at = 0 if self._written is None else self._written + self._usual
        frame.pts = self._written = at
        frame.time_base = self._stream.codec_context.time_base
        try:
            self._container.mux(self._stream.encode(frame))
        except av.FFmpegError as error:
            raise AcamkdError(f"cannot write {self._container.name}: {_why(error)}") from error


def _open(address: str, what: str, name: str = "", **options: Any) -> InputContainer:
    import av

    name = name or address
    try:
        container: InputContainer = av.open(address, **options)
    except (av.FFmpegError, ValueError) as error:  # ValueError: FFmpeg was built without the format
        raise AcamkdError(f"{name}: {what} cannot be read: {_why(error)}") from error
    if not container.streams.video:
        container.close()
        raise AcamkdError(f"{name}: {what} holds no video")
    return container


def _why(error: Exception) -> str:
    """An error's reason alone: the rest may hold the address with its password."""
    import av

    if isinstance(error, OSError | av.FFmpegError):
        return error.strerror or type(error).__name__
    return str(error)


def _pixels(frame: VideoFrame) -> Pixels:
    """The frame upright."""
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90))


def _mask(stem: str, number: int) -> str:
    return f"{stem}/{number:06d}.png"
