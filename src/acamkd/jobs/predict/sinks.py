"""What becomes of predictions: overlays, masks, JSON lines."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from PIL import Image

from acamkd.errors import AcamkdError
from acamkd.files import written_whole
from acamkd.jobs.export.onnx_model import Pixels, Prediction
from acamkd.jobs.predict.sources import Frame, Source
from acamkd.jobs.predict.video import VideoWriter
from acamkd.report.visualize import draw_predictions, is_background, with_legend

LINES = "predictions.jsonl"
MASKS, OVERLAYS = "masks", "overlays"

MARK = ".predictions"
"""An empty file in a folder of predictions, whose masks and overlays the next one may replace."""

WRITTEN = ("overlays", "masks", "json")
"""What can be written; masks by a segmenter alone."""


class Sink(ABC):
    """Writes the predictions of each frame."""

    @abstractmethod
    def write(self, frame: Frame, found: Prediction) -> None:
        """Add one frame; raises AcamkdError if it cannot be written."""


class ImageOverlays(Sink):
    """Images with the predictions drawn on them.

    Args:
        folder: Output folder; the images keep their names.
        classes: Class names.
    """

    def __init__(self, folder: Path, classes: Sequence[str]) -> None:
        self._folder = folder
        self._classes = classes

    def write(self, frame: Frame, found: Prediction) -> None:
        """See the base class."""
        labels = np.unique(found["mask"]).tolist() if "mask" in found else []
        _save(_draw(frame, found, self._classes, labels), self._folder / frame.file_name)


class VideoOverlay(Sink):
    """The video with the predictions drawn on it.

    Args:
        writer: Writes the video.
        classes: Class names. A legend has them all, since every frame of a video has one size.
    """

    def __init__(self, writer: VideoWriter, classes: Sequence[str]) -> None:
        self._writer = writer
        self._classes = classes

    def write(self, frame: Frame, found: Prediction) -> None:
        """See the base class."""
        self._writer.write(_draw(frame, found, self._classes, range(len(self._classes))), frame.seconds)


class Masks(Sink):
    """PNG files of class ids.

    Args:
        folder: Output folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, frame: Frame, found: Prediction) -> None:
        """See the base class."""
        _save(found["mask"].astype(np.uint8), self._folder / frame.mask)


class Lines(Sink):
    """One line of JSON per frame, as `line_of` gives it; each is in the file at once, so that programs can follow it.

    Args:
        file: Open file.
        classes: Class names.
        with_masks: Whether the masks are written, too.
    """

    def __init__(self, file: TextIO, classes: Sequence[str], *, with_masks: bool) -> None:
        self._file = file
        self._classes = classes
        self._with_masks = with_masks

    def write(self, frame: Frame, found: Prediction) -> None:
        """See the base class."""
        line = line_of(frame, found, self._classes, with_mask=self._with_masks)
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as error:
            raise AcamkdError(f"cannot write {self._file.name}: {error.strerror or error}") from error


def line_of(frame: Frame, found: Prediction, classes: Sequence[str], *, with_mask: bool) -> dict[str, Any]:
    """One frame's predictions in plain types.

    Returns:
        `file_name`, `width` and `height`; of a video or stream `frame` (number from 0) and `seconds`; of a live source
        `utc`. Detection: `objects`, each with `category_id` (from 1), `category_name`, `bbox` [x, y, width, height] in
        pixels of the frame, and `score`. Segmentation: `shares`, each class's share of the area, and `mask`, the path
        of its mask in the output folder.
    """
    height, width = frame.pixels.shape[:2]
    line: dict[str, Any] = {"file_name": frame.file_name, "width": width, "height": height}
    if frame.number is not None:
        line |= {"frame": frame.number, "seconds": None if frame.seconds is None else round(frame.seconds, 3)}
    if frame.utc is not None:
        line["utc"] = frame.utc
    if "mask" in found:
        counts = np.bincount(found["mask"].reshape(-1), minlength=len(classes)) / found["mask"].size
        line["shares"] = {name: round(share, 4) for name, share in zip(classes, counts.tolist(), strict=False) if share}
        return {**line, "mask": f"{MASKS}/{frame.mask}"} if with_mask else line
    corners = found["boxes"].astype(np.float64)
    boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1).round(4).tolist()
    line["objects"] = [
        {"category_id": label, "category_name": classes[label - 1], "bbox": box, "score": score}
        for box, score, label in zip(boxes, found["scores"].tolist(), found["labels"].tolist(), strict=True)
    ]
    return line


@contextmanager
def sinks_of(
    source: Source, folder: Path, classes: Sequence[str], *, masks: bool, write: Collection[str]
) -> Iterator[list[Sink]]:
    """Open the sinks of a source, which is open.

    Files of all frames appear at the end. The lines of a live source grow in place.

    Args:
        source: The source.
        folder: Output folder.
        classes: Class names.
        masks: Whether the predictions are masks.
        write: Names of WRITTEN.
    """
    with ExitStack() as stack:
        sinks: list[Sink] = []
        if "overlays" in write and source.unit == "frame":
            file = stack.enter_context(whole(folder / OVERLAYS / f"{source.stem}.mp4"))
            sinks.append(VideoOverlay(stack.enter_context(VideoWriter(file, source.rate)), classes))
        elif "overlays" in write:
            sinks.append(ImageOverlays(folder / OVERLAYS, classes))
        with_masks = masks and "masks" in write
        if with_masks:
            sinks.append(Masks(folder / MASKS))
        if "json" in write:
            file = folder / LINES if source.is_live else stack.enter_context(whole(folder / LINES))
            sinks.append(Lines(stack.enter_context(_open(file)), classes, with_masks=with_masks))
        yield sinks


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Use `written_whole` in a folder that is created if needed; raises AcamkdError if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path, durable=False) as unfinished:
            yield unfinished
    except OSError as error:
        raise AcamkdError(f"cannot write {path}: {error.strerror or error}") from error


def _open(file: Path) -> TextIO:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        return file.open("w", encoding="utf-8")
    except OSError as error:
        raise AcamkdError(f"cannot write {file}: {error.strerror or error}") from error


def _draw(frame: Frame, found: Prediction, classes: Sequence[str], labels: Sequence[int]) -> Pixels:
    """The predictions over the frame; a mask with a legend of these labels, boxes with their names."""
    drawn = draw_predictions(frame.pixels, found, classes)
    legend = {classes[label]: label for label in labels if not is_background(classes[label])}
    return with_legend(drawn, legend) if "mask" in found else drawn


def _save(pixels: Pixels, path: Path) -> None:
    with whole(path) as unfinished:
        Image.fromarray(pixels).save(unfinished)
