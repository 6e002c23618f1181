"""Predict on images or a video with a run or with an exported ONNX file; the latter needs no torch."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.text import Text
from tqdm import tqdm

from acamkd.engine.printing import Printable
from acamkd.engine.runs import Run, as_run
from acamkd.errors import AcamkdError
from acamkd.files import IMAGE_SUFFIXES, check_writable, files_below, written_whole
from acamkd.jobs.export.onnx_model import OnnxModel, Pixels, Prediction, read_image
from acamkd.report.visualize import draw_predictions, is_background, with_legend

log = logging.getLogger(__name__)

VIDEOS = (".mp4", ".mov", ".mkv", ".avi", ".webm", ".m4v")


@dataclass(frozen=True)
class Predictions(Printable):
    """Summary of a prediction run.

    Attributes:
        folder: Output folder, with `overlays/`, and `predictions.json` (detection) or `masks/` (segmentation).
        count: Number of images or frames.
        unit: `image` or `frame`.
        per_second: Images or frames per second, including reading, drawing and writing.
    """

    folder: Path
    count: int
    unit: str
    per_second: float

    def __rich__(self) -> Text:
        plural = "" if self.count == 1 else "s"
        return Text(f"{self.count} {self.unit}{plural}, {self.per_second:.1f} per second, in {self.folder}")


def predict(
    model: Run | Path | str, source: Path | str, *, out: Path | str | None = None, score: float = 0.3
) -> Predictions:
    """Predict on images or on a video, and write the predictions.

    The output folder holds `overlays/`, the images or the video with the predictions drawn on them, in the colors of
    the report. A segmenter's have a legend below: the classes in the image, or all classes in a video. Detection also
    writes `predictions.json`. Its entries have `file_name`, `category_id` (the recipe's classes, counted from 1),
    `category_name`, `bbox` [x, y, width, height] in pixels and `score`, and for a video `frame`, counted from 0.
    Segmentation also writes `masks/`, PNG files of class ids; a video gets a folder with one file per frame.

    Args:
        model: A run, its folder, or a file that `acamkd export` wrote.
        source: An image, a folder of images, or a video, which needs `pip install '.[video]'`. Its subfolders are
            included, and are created in the output.
        out: Output folder; by default `predictions` beside the model.
        score: Detections with a lower score are left out.

    Raises:
        AcamkdError: The model, the source or one of its images cannot be read.
    """
    source = Path(source)
    is_video = source.is_file() and source.suffix.lower() in VIDEOS
    folder = Path(out) if out else _beside(model) / "predictions"
    files = [] if is_video else images_of(source, without=[folder])
    check_writable(folder)
    task, classes, network, limit = _open(model)
    if task == "segmentation" and files:
        _check_names(files, source)
    results: list[dict[str, Any]] = []
    full = 0

    def look(image: Pixels, mask: str, **where: Any) -> Image.Image:
        nonlocal full
        found = network(image)
        if task == "detection":
            good = found["scores"] >= score
            found = {name: values[good] for name, values in found.items()}
            full += len(found["scores"]) == limit
            results.extend(_as_coco(found, classes, where))
            return Image.fromarray(draw_predictions(image, found, classes))  # each box is labeled
        _save(Image.fromarray(found["mask"].astype(np.uint8)), folder / "masks" / mask)
        # Every frame of a video has one size, and so one legend.
        labels = range(len(classes)) if is_video else np.unique(found["mask"]).tolist()
        legend = {classes[label]: label for label in labels if not is_background(classes[label])}
        return Image.fromarray(with_legend(draw_predictions(image, found, classes), legend))

    start, count = time.monotonic(), len(files)
    if is_video:
        with _whole(folder / "overlays" / f"{source.stem}.mp4") as unfinished, Video(source, unfinished) as film:
            for count, image in enumerate(tqdm(film.frames(), total=film.length, unit=" frames", disable=None), 1):
                mask = f"{source.stem}/{count - 1:06d}.png"
                film.write(look(image, mask, file_name=source.name, frame=count - 1))
    unreadable: list[str] = []
    for file in tqdm(files, unit=" images", disable=None):
        try:
            image = read_image(file)
        except AcamkdError as error:
            unreadable.append(str(error))
            continue
        name = file.relative_to(source) if source.is_dir() else Path(file.name)
        mask = name.with_suffix(".png").as_posix()
        _save(look(image, mask, file_name=name.as_posix()), folder / "overlays" / name)
    if task == "detection":
        with _whole(folder / "predictions.json") as unfinished:
            unfinished.write_text(json.dumps(results, indent=1), encoding="utf-8")
    count -= len(unreadable)
    made = Predictions(folder, count, "frame" if is_video else "image", count / (time.monotonic() - start))
    log.info("%s", made)
    if full:
        log.warning(
            "the network's limit of %d detections was reached in %d %s, so some may be missing (options: "
            "{detections_per_img: N} in the recipe, box_detections_per_img of faster_rcnn, raises it)",
            limit, full, made.unit,
        )  # fmt: skip
    if unreadable:
        first = "; ".join(unreadable[:3]) + ("; ..." if len(unreadable) > 3 else "")
        raise AcamkdError(f"{len(unreadable)} of {len(files)} images are left out: {first}")
    return made


class Video:
    """Reads a video, and writes another one with the same frame times.

    The output size is made even, as the encoder requires.

    Args:
        source: Video to read.
        out: Video to write, with the suffix .mp4.

    Raises:
        AcamkdError: PyAV is missing, or the video cannot be read.
    """

    def __init__(self, source: Path, out: Path) -> None:
        try:
            import av
        except ImportError as error:
            raise AcamkdError("a video needs PyAV: pip install '.[video]' in the checkout") from error
        self.source = source
        self.failure: type[Exception] = av.FFmpegError
        try:
            self.reader = av.open(source)
            if not self.reader.streams.video:
                raise AcamkdError(f"{source}: the file holds no video")
            stream = self.reader.streams.video[0]
            self.writer = av.open(out, "w")
            rate = stream.average_rate or 25
            self.stream = self.writer.add_stream("libx264", rate=rate)
        except av.FFmpegError as error:
            raise AcamkdError(f"{source}: the video cannot be read: {error}") from error
        self.time_base = stream.time_base or 1 / Fraction(rate)
        self.stream.codec_context.time_base = self.time_base
        self._usual = max(1, round(1 / (rate * self.time_base)))
        self._time: int | None = None  # of the last frame read
        self._written: int | None = None  # of the last frame written, in units of the time base
        self.length = stream.frames or None
        """Number of frames, if the file states it."""

    def __enter__(self) -> Video:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is None:
            self.writer.mux(self.stream.encode())
        self.writer.close()
        self.reader.close()

    def frames(self) -> Iterator[Pixels]:
        """Every frame, upright."""
        frame = None
        try:
            for frame in self.reader.decode(video=0):
                self._time = frame.pts
                yield np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90))
        except self.failure as error:
            raise AcamkdError(f"{self.source}: the video cannot be read to its end: {error}") from error
        if frame is None:
            raise AcamkdError(f"{self.source}: the video holds no frames")

    def write(self, image: Image.Image) -> None:
        """Add a frame at the time of the last frame read; frames need not be equally spaced."""
        import av

        even = image.crop((0, 0, max(2, image.width // 2 * 2), max(2, image.height // 2 * 2)))
        if not self.stream.codec_context.is_open:
            self.stream.width, self.stream.height = even.size
        frame = av.VideoFrame.from_ndarray(np.asarray(even), format="rgb24")
        expected = 0 if self._written is None else self._written + self._usual
        after = self._written is None or (self._time is not None and self._time > self._written)
        frame.pts = self._written = self._time if after and self._time is not None else expected
        frame.time_base = self.time_base
        self.writer.mux(self.stream.encode(frame))


def images_of(source: Path, *, without: Sequence[Path] = ()) -> list[Path]:
    """The given image, or all images of a folder and the folders below it, without the folders `without`.

    Raises:
        AcamkdError: There are none, or a folder cannot be read.
    """
    if not source.is_dir():
        if not source.exists():
            raise AcamkdError(f"{source}: there is no such image, folder or video")
        if source.suffix.lower() not in IMAGE_SUFFIXES:
            raise AcamkdError(
                f"{source}: give an image ({', '.join(IMAGE_SUFFIXES)}), a folder of them or a video "
                f"({', '.join(VIDEOS)})"
            )
        return [source]
    try:
        files = [file for file in files_below(source, without=without) if file.suffix.lower() in IMAGE_SUFFIXES]
    except OSError as error:
        raise AcamkdError(f"cannot read the folder {error.filename or source}: {error.strerror}") from error
    if not files:
        raise AcamkdError(f"{source}: the folder holds no images ({', '.join(IMAGE_SUFFIXES)})")
    return files


def _check_names(files: Sequence[Path], source: Path) -> None:
    """Raise AcamkdError if the masks of two images would have the same file name."""
    name, count = Counter(file.with_suffix("") for file in files).most_common(1)[0]
    if count > 1:
        raise AcamkdError(
            f"{source}: {count} images are called {name.name}, and their masks would be one file: rename them"
        )


def _beside(model: Run | Path | str) -> Path:
    """The folder that holds the model."""
    if isinstance(model, Run):
        return model.folder
    return Path(model).parent if Path(model).suffix == ".onnx" else Path(model)


def _open(model: Run | Path | str) -> tuple[str, Sequence[str], Callable[[Pixels], Prediction], int | None]:
    """Return task, class names, the prediction function of an image, and its limit of boxes, if known."""
    if not isinstance(model, Run) and Path(model).suffix == ".onnx":
        exported = OnnxModel(Path(model))
        suppression = exported.metadata["nms"] or {}
        return exported.task, exported.classes, exported.predict, suppression.get("detections")
    import torch  # an exported file needs none

    from acamkd.engine.devices import device_of

    run = as_run(model)
    device = device_of(run.recipe.train)
    network = run.load().to(device)

    def predict_one(image: Pixels) -> Prediction:
        pixels = torch.from_numpy(image).permute(2, 0, 1).to(device)
        return {name: values.cpu().numpy() for name, values in network.predict([pixels])[0].items()}

    return run.recipe.task, run.recipe.data.classes or (), predict_one, network.max_detections


def _as_coco(found: Prediction, classes: Sequence[str], where: Mapping[str, Any]) -> list[dict[str, Any]]:
    corners = found["boxes"].astype(np.float64)
    boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1).round(2).tolist()
    return [
        {**where, "category_id": label, "category_name": classes[label - 1], "bbox": box, "score": score}
        for box, score, label in zip(boxes, found["scores"].tolist(), found["labels"].tolist(), strict=True)
    ]


def _save(image: Image.Image, path: Path) -> None:
    with _whole(path) as unfinished:
        image.save(unfinished)


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """Use `written_whole` in a folder that is created if needed; raises AcamkdError if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path, durable=False) as unfinished:
            yield unfinished
    except OSError as error:
        raise AcamkdError(f"cannot write {path}: {error.strerror or error}") from error
