"""Predict with a run or with an exported file; the latter needs no torch."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Timer
from typing import Any

from tqdm import tqdm

from acamkd.engine.runs import RECIPE, Run, as_run
from acamkd.errors import AcamkdError, nearest, without_password
from acamkd.files import IMAGE_SUFFIXES, check_writable
from acamkd.jobs.export.onnx_model import ExportedModel, OnnxModel, Pixels, Prediction
from acamkd.jobs.export.openvino_model import OpenVinoModel
from acamkd.jobs.predict.result import Predictions
from acamkd.jobs.predict.sinks import LINES, MARK, MASKS, OVERLAYS, WRITTEN, sinks_of, whole
from acamkd.jobs.predict.sources import GrowingFolder, Images, Source, images_below
from acamkd.jobs.predict.video import VIDEOS, PacedVideo, Stream, VideoFile, camera

log = logging.getLogger(__name__)

LIST = "predictions.json"
"""A detector's boxes in one list."""

EXPORTED: dict[str, type[OnnxModel] | type[OpenVinoModel]] = {".onnx": OnnxModel, ".xml": OpenVinoModel}
"""Runtime of an exported file, by its suffix."""


def predict(
    model: Run | Path | str,
    source: Path | str | int,
    *,
    out: Path | str | None = None,
    score: float = 0.3,
    write: Collection[str] = WRITTEN,
    live: bool = False,
    watch: bool = False,
    seconds: float | None = None,
) -> Predictions:
    """Predict on images, a video or a live source, and write the predictions.

    The output folder holds:

    - `overlays/`: the images or the video with the predictions drawn on them, in the colors of the report. A
      segmenter's have a legend below: the classes in the image, or all classes in a video.
    - `masks/`, of a segmenter: PNG files of class ids; a video gets a folder with one file per frame.
    - `predictions.jsonl`: one line of JSON per image or frame, see `acamkd.jobs.predict.sinks.line_of`.
    - `predictions.json`, of a detector, unless the source is live: the boxes of all lines in one list. Its entries have
      `file_name`, `category_id` (the recipe's classes, counted from 1), `category_name`, `bbox` [x, y, width, height]
      in pixels and `score`, and for a video `frame`, counted from 0.

    A live source ends at Ctrl-C, a request to terminate or after `seconds`, and its files are then complete. Its frames
    are dropped where the network is slower than they come.

    Args:
        model: A run, its folder, or a file that `acamkd export` wrote.
        source: An image, a folder of images, or a video. Live are the number of a camera and an address such as
            rtsp://HOST/PATH. Videos and live frames need `pip install 'acamkd[video]'`. A folder's subfolders are
            included, and are created in the output.
        out: Output folder; by default `predictions` in the run folder, or beside a file that lies in no run.
        score: Detections with a lower score are left out.
        write: What to write: `overlays`, `masks` and `json`.
        live: Play a video file at its own pace, as if it came from a camera.
        watch: Wait for more images in the folder.
        seconds: End of a live source.

    Returns:
        The folder, how many images or frames it holds, and how fast they came.

    Raises:
        AcamkdError: The model, the source or one of its images cannot be read.
    """
    for name in write:
        if name not in WRITTEN:
            raise AcamkdError(f"predict cannot write {name!r}; {nearest(name, WRITTEN)}")
    model = model if isinstance(model, Run) else Path(model).expanduser()
    folder = Path(out).expanduser() if out else _beside(model) / "predictions"
    stop = Event()
    ours = [folder, folder / OVERLAYS, folder / MASKS]
    given = open_source(source, without=ours, live=live, watch=watch, stop=stop)
    if seconds is not None and not given.is_live:
        raise AcamkdError("a number of seconds is for a camera, an address, --live or --watch")
    check_writable(folder)
    network = _open(model)
    if network.task == "detection" and not set(write) - {MASKS}:
        raise AcamkdError("a detector gives boxes, no masks: write overlays or json")
    if network.task == "segmentation" and MASKS in write:
        given.check_masks()
    if out:  # the folder by default is ours
        kinds = (OVERLAYS, MASKS) if network.task == "segmentation" else (OVERLAYS,)
        _check_ours(folder, set(kinds) & set(write))
    if (folder / LINES).exists():
        (folder / MARK).touch()
    for name in (LINES, LIST):  # an earlier prediction's would be taken for this one's
        (folder / name).unlink(missing_ok=True)
    full, busy, count = 0, 0.0, 0
    with given, _stopping(stop if given.is_live else None, seconds):
        start = time.monotonic()
        with sinks_of(given, folder, network.classes, masks=network.task == "segmentation", write=write) as sinks:
            for frame in tqdm(given.frames(), total=given.total, unit=f" {given.unit}s", disable=None):
                begin = time.perf_counter()
                found = network.predict(frame.pixels)
                busy += time.perf_counter() - begin
                if network.task == "detection":
                    good = found["scores"] >= score
                    found = {name: values[good] for name, values in found.items()}
                    full += len(found["scores"]) == network.limit
                for sink in sinks:
                    sink.write(frame, found)
                if not count:
                    (folder / MARK).touch()
                count += 1
            if not count and given.unit == "frame":
                raise AcamkdError(given.problem() or f"{without_password(str(source))}: no frame came")
        rates = count / (time.monotonic() - start), count / max(busy, 1e-9)
    made = Predictions(folder, count, given.unit, *rates, given.dropped, tuple(network.classes))
    if network.task == "detection" and "json" in write and not given.is_live:
        _write_list(made)
    log.info("%s", made)
    if full:
        log.warning(
            "the network's limit of %d detections was reached in %d %s, so some may be missing (options: "
            "{detections_per_img: N} in the recipe, box_detections_per_img of faster_rcnn, raises it)",
            network.limit, full, made.unit,
        )  # fmt: skip
    if problem := given.problem():
        raise AcamkdError(problem)
    return made


def _check_ours(folder: Path, written: Collection[str]) -> None:
    """Raise AcamkdError if what would be written over is of somebody else.

    Args:
        folder: Where predictions go.
        written: Names of the folders in it that this prediction writes.
    """
    if (folder / MARK).exists() or (folder / LINES).exists():
        return
    for theirs in (folder / name for name in written):
        if theirs.is_dir() and any(theirs.iterdir()):
            raise AcamkdError(f"{theirs} is there, and of no earlier prediction: choose another folder with --out")


def open_source(source: Path | str | int, *, without: Sequence[Path], live: bool, watch: bool, stop: Event) -> Source:
    """The source that is meant.

    Args:
        source: See `predict`.
        without: Folders whose images are left out.
        live: Play a video file at its own pace.
        watch: Wait for more images in the folder.
        stop: Ends a live source.

    Raises:
        AcamkdError: There is none, or it has no images.
    """
    text = str(source)
    path = Path(os.path.expanduser(text))  # which leaves a name such as ~1.png as it is
    shown = without_password(text)
    if watch:
        if live:
            raise AcamkdError("--live plays a video file and --watch waits for images in a folder: give one of them")
        if not path.is_dir():
            raise AcamkdError(f"--watch waits for images in a folder, and {shown} is none")
        return GrowingFolder(path, without=without, stop=stop)
    if live and not (path.is_file() and path.suffix.lower() in VIDEOS):
        raise AcamkdError(f"--live plays a video file ({', '.join(VIDEOS)}), and {shown} is none")
    if "://" in text:
        return Stream(text, stop)
    if text.isdecimal() and not path.exists():
        return camera(int(text), stop)
    if text.startswith("/dev/"):
        return Stream(text, stop, format="v4l2")
    if path.is_file() and path.suffix.lower() in VIDEOS:
        return PacedVideo(path, stop) if live else VideoFile(path)
    if path.is_dir():
        files = images_below(path, without)
        if not files:
            raise AcamkdError(f"{path}: the folder holds no images ({', '.join(IMAGE_SUFFIXES)})")
        return Images(files, path)
    if not path.exists():
        raise AcamkdError(f"{path}: there is no such image, folder or video")
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        raise AcamkdError(
            f"{path}: give an image ({', '.join(IMAGE_SUFFIXES)}), a folder of them, a video ({', '.join(VIDEOS)}), an "
            "address such as rtsp://HOST/PATH, or the number of a camera"
        )
    return Images([path], path.parent)


@dataclass(frozen=True)
class _Network:
    """What predicts.

    Attributes:
        task: `detection` or `segmentation`.
        classes: Class names.
        predict: Gives the predictions of an image.
        limit: Largest number of its boxes, if known.
    """

    task: str
    classes: Sequence[str]
    predict: Callable[[Pixels], Prediction]
    limit: int | None


def _beside(model: Run | Path) -> Path:
    """The folder that holds the model; for a run's export the run folder, since an export is replaced as a whole."""
    if isinstance(model, Run):
        return model.folder
    if model.suffix not in EXPORTED:
        return model
    run = model.absolute().parent.parent
    is_of_run = (run / RECIPE).is_file() and (model.parent / "onnx_model.py").is_file()
    return run if is_of_run else model.parent


def _open(model: Run | Path) -> _Network:
    if not isinstance(model, Run) and model.suffix in EXPORTED:
        exported: ExportedModel = EXPORTED[model.suffix](model)
        suppression = exported.metadata["nms"] or {}
        return _Network(exported.task, exported.classes, exported.predict, suppression.get("detections"))
    import torch  # an exported file needs none

    from acamkd.engine.devices import device_of

    run = as_run(model)
    device = device_of(run.recipe.train)
    network = run.load().to(device)

    def predict_one(image: Pixels) -> Prediction:
        pixels = torch.from_numpy(image).permute(2, 0, 1).to(device)
        return {name: values.cpu().numpy() for name, values in network.predict([pixels])[0].items()}

    return _Network(run.recipe.task, run.recipe.data.classes or (), predict_one, network.max_detections)


@contextmanager
def _stopping(stop: Event | None, seconds: float | None) -> Iterator[None]:
    """Let Ctrl-C, a request to terminate or the end of the time set an event; a second Ctrl-C interrupts at once."""
    if stop is None:
        yield
        return
    timer = Timer(seconds or 0, stop.set)
    timer.daemon = True
    if seconds is not None:
        timer.start()
    before: dict[int, Any] = {}

    def ask(*_: object) -> None:
        stop.set()
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    if threading.current_thread() is threading.main_thread():  # only there Python allows it
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        timer.cancel()
        restore()


def _write_list(made: Predictions) -> None:
    """Write the boxes of all lines in one list."""
    entries = [
        {"file_name": line["file_name"], **({"frame": line["frame"]} if "frame" in line else {}), **each}
        for line in made.lines()
        for each in line["objects"]
    ]
    with whole(made.folder / LIST) as unfinished:
        unfinished.write_text(json.dumps(entries, indent=1), encoding="utf-8")
