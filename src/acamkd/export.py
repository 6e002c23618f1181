"""Export a run's network to ONNX, prove that the file gives the same predictions, and describe it in a model card."""

from __future__ import annotations

import json
import logging
import os
import shutil
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from acamkd import __version__, config, data, models
from acamkd.data import PictureDataset
from acamkd.engine import METRICS, Scorer
from acamkd.errors import AcamkdError
from acamkd.model_card import model_card
from acamkd.models.base import Batch, PixelSize, TaskModel
from acamkd.models.detection import DenseDetector, Detector, FCOSDetector
from acamkd.models.segmentation import Segmenter
from acamkd.onnx_model import STRIDE, OnnxModel
from acamkd.runs import METRICS as METRICS_FILE
from acamkd.runs import Run

log = logging.getLogger(__name__)

LARGEST_DIFFERENCE = 1e-3
"""Between the outputs of the two runtimes, as a share of an output's largest value."""

LARGEST_METRIC_DIFFERENCE = 0.1
"""In points."""

COMPARED_PICTURES = 8
TIMED_RUNS = 20


@dataclass(frozen=True)
class Export:
    """What was exported, and how it compares.

    Attributes:
        folder: Where the files are.
        difference: Largest difference between the outputs of onnxruntime and PyTorch, and the same as a share of that
            output's largest value.
        metric: Name of the deciding metric.
        pytorch: Every metric on the validation pictures by PyTorch, in percent.
        onnxruntime: The same through the exported file.
        teacher: The teacher's, as the run scored it; empty where there is none.
        milliseconds: Median of one picture, by network and runtime.
        threads: That the times were taken with.
        parameters: Of the exported network.
        gflops: Of one picture at `input_size`, 2 per multiply-add.
        input_size: (height, width) of the frame of the pictures that were timed and counted.
        dynamic_size: Whether the file takes frames of other sizes.
    """

    folder: Path
    difference: tuple[float, float]
    metric: str
    pytorch: dict[str, float]
    onnxruntime: dict[str, float]
    teacher: dict[str, float]
    milliseconds: dict[str, float]
    threads: int
    parameters: int
    gflops: float
    input_size: PixelSize
    dynamic_size: bool

    def __str__(self) -> str:
        times = ", ".join(f"{name} {value:.1f} ms" for name, value in self.milliseconds.items())
        metric = self.metric
        return (
            f"largest difference {self.difference[0]:.2e} ({self.difference[1]:.2e} of the largest value)\n"
            f"{metric} {self.pytorch[metric]:.2f} by PyTorch, {self.onnxruntime[metric]:.2f} by onnxruntime\n"
            f"{times} ({self.threads} threads)\n"
            f"{self.parameters / 1e6:.2f} M parameters, {self.gflops:.2f} GFLOPs"
        )


def export(run: Run, *, out: Path | None = None, with_nms: bool = False) -> Export:
    """Export a run's network; the files appear once every check has passed.

    Writes the network's weights (`student.safetensors`), `student.onnx` and `model-card.md`. Outputs of the graph are
    those of OnnxModel.

    Args:
        run: A run with weights.
        out: Where to; `export` in the run folder where not given.
        with_nms: Detection: put everything up to the non-maximum suppression into the graph, for single pictures of
            the recipe's size. Faster R-CNN has no other export.

    Raises:
        AcamkdError: A package or the data is missing, the network cannot be exported, or the file gives other outputs
            or another score than PyTorch.
    """
    needed = ("onnx", "onnxruntime") if with_nms else ("onnx", "onnxscript", "onnxruntime")
    if missing := [name for name in needed if find_spec(name) is None]:
        raise AcamkdError(f"export needs {', '.join(missing)}: pip install 'acamkd[export]'")
    recipe = run.recipe
    model = run.load()
    _check_exportable(model, recipe, with_nms=with_nms)
    pictures = data.build(recipe.data, recipe.task, "val", seed=recipe.train.seed, augment=False)
    for warning in data.check(pictures, "headers"):
        log.warning("%s", warning)
    out = out or run.folder / "export"
    with _all_or_nothing(out) as folder:
        file = folder / f"{run.role}.onnx"
        graph = _graph(model, recipe, with_nms=with_nms)
        log.info("writing the graph")
        dynamic = _write_graph(graph, file, recipe)
        _write_metadata(file, _metadata(model, recipe, with_nms=with_nms))
        figures = _compare(run, model, graph, file, pictures, out, dynamic=dynamic)
        shutil.copyfile(run.weights, folder / run.weights.name)
        card = model_card(recipe, run.role, figures, with_nms=with_nms, pictures=len(pictures))
        (folder / "model-card.md").write_text(card, encoding="utf-8")
    log.info("%s", figures)
    log.info("%s holds %s.onnx, %s and model-card.md", out, run.role, run.weights.name)
    return figures


class Graph(nn.Module):
    """What goes into an ONNX file: (N, 3, H, W) RGB in [0, 1] -> outputs as in OnnxModel.

    Args:
        model: In eval mode.
        output_names: Names of what `forward` gives.
    """

    def __init__(self, model: TaskModel, *output_names: str) -> None:
        super().__init__()
        self.model = model
        self.output_names = output_names
        self.eval()  # the exporters put back the mode that they find


class SegmentationGraph(Graph):
    """`logits` (N, K, H, W)."""

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """See the class."""
        return (self.model(_batch(pixels))["out"],)


class DenseGraph(Graph):
    """`scores` (N, A, K + 1), `boxes` (N, A, 4) in the frame, `levels` (A,): all but thresholds and suppression."""

    model: DenseDetector

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """See the class."""
        outputs = self.model(_batch(pixels))
        scores = outputs["cls_logits"].sigmoid()
        if "bbox_ctrness" in outputs:
            scores = (scores * outputs["bbox_ctrness"].sigmoid()).sqrt()
        coder = self.model.net.box_coder
        decode = coder.decode if isinstance(self.model, FCOSDetector) else coder.decode_single
        deltas: Tensor = outputs["bbox_regression"]
        boxes = decode(deltas.flatten(0, 1), outputs["anchors"][0].repeat(len(pixels), 1)).view_as(deltas)
        counts = self.model._anchors_per_level(outputs)
        levels = torch.cat([torch.full((count,), level) for level, count in enumerate(counts)])
        return scores, boxes, levels


class DetectionsGraph(Graph):
    """`boxes` (K, 4) in the frame, `scores` and `labels` (K,) of one picture of one size."""

    def __init__(self, model: Detector, size: PixelSize) -> None:
        super().__init__(model, "boxes", "scores", "labels")
        self.size = size

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """See the class."""
        batch = Batch(pixels, [self.size], [self.size])
        found = self.model.decode(self.model(batch), batch)[0]
        return tuple(found[name] for name in self.output_names)


def _batch(pixels: Tensor) -> Batch:
    size = (pixels.shape[-2], pixels.shape[-1])
    return Batch(pixels, [size], [size])


def _check_exportable(model: TaskModel, recipe: config.Recipe, *, with_nms: bool) -> None:
    if not isinstance(model, (Segmenter, Detector)):
        raise AcamkdError(
            f"{type(model).__name__} cannot be exported: only torchvision's detectors and segmenters that turn pixels "
            "into logits can"
        )
    if isinstance(model, Segmenter) and with_nms:
        raise AcamkdError("--with-nms: segmentation has no non-maximum suppression; leave the option out")
    if isinstance(model, Detector) and not isinstance(model, DenseDetector) and not with_nms:
        raise AcamkdError(
            f"{type(model.net).__name__} suppresses boxes between its two stages, and the exporter for any batch size "
            "cannot write that: use --with-nms, which writes the full graph for single pictures"
        )
    if with_nms and not isinstance(recipe.data.resize, tuple):
        raise AcamkdError("--with-nms writes a graph for pictures of one size: --set data.resize='[HEIGHT, WIDTH]'")


def _graph(model: TaskModel, recipe: config.Recipe, *, with_nms: bool) -> Graph:
    if with_nms:
        assert isinstance(model, Detector)
        assert isinstance(recipe.data.resize, tuple)
        return DetectionsGraph(model, recipe.data.resize)
    if isinstance(model, DenseDetector):
        return DenseGraph(model, "scores", "boxes", "levels")
    return SegmentationGraph(model, "logits")


def _frame(recipe: config.Recipe) -> PixelSize | None:
    """The padded frame, where every picture has the same."""
    if not isinstance(recipe.data.resize, tuple):
        return None
    height, width = (-(-side // STRIDE) * STRIDE for side in recipe.data.resize)
    return height, width


def _write_graph(graph: Graph, file: Path, recipe: config.Recipe) -> bool:
    """Write the ONNX file; return whether it takes frames of any size."""
    frame = _frame(recipe)
    names: dict[str, Any] = {"input_names": ["pixels"], "output_names": list(graph.output_names)}
    if isinstance(graph, DetectionsGraph):
        assert frame is not None
        with warnings.catch_warnings(), _export_errors(graph):
            warnings.simplefilter("ignore")  # it warns of its own age and of every shape that it takes as constant
            torch.onnx.export(graph, (torch.rand(1, 3, *frame),), file, dynamo=False, **names)
        return False
    # Every map of the pyramid must be larger than 1 here, or the graph would only fit such maps.
    attempts = [((0, 2, 3), (8 * STRIDE, 12 * STRIDE)), *([((0,), frame)] if frame else [])]
    for dynamic, size in attempts:
        shapes = dict.fromkeys(dynamic, torch.export.Dim.DYNAMIC)
        try:
            with warnings.catch_warnings(), _export_errors(graph):
                warnings.simplefilter("ignore")
                program = torch.onnx.export(
                    graph, (torch.rand(2, 3, *size),), dynamo=True, verbose=False, dynamic_shapes=(shapes,), **names
                )
                assert program is not None
                program.save(file, external_data=False)
                return len(dynamic) > 1
        except AcamkdError as error:
            if size == attempts[-1][1]:
                raise
            log.warning("a graph for any size is not possible (%s): trying %d x %d", error, *reversed(attempts[-1][1]))
    raise AssertionError


@contextmanager
def _export_errors(graph: Graph) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the exporters fail with whatever they meet
        what = type(graph.model.net).__name__
        raise AcamkdError(f"PyTorch {torch.__version__} cannot export {what}: {str(error).strip()[:500]}") from error


def _metadata(model: TaskModel, recipe: config.Recipe, *, with_nms: bool) -> dict[str, Any]:
    resize = recipe.data.resize
    return {
        "acamkd_version": __version__,
        "task": recipe.task,
        "classes": recipe.data.classes,
        "resize": resize.model_dump() if isinstance(resize, config.ShortLong) else resize,
        "mean": model.mean.flatten().tolist(),
        "nms": {
            "score_threshold": model.net.score_thresh,
            "candidates": model.net.topk_candidates,
            "iou_threshold": model.net.nms_thresh,
            "detections": model.net.detections_per_img,
        }
        if isinstance(model, DenseDetector) and not with_nms
        else None,
    }


def _write_metadata(file: Path, metadata: Mapping[str, Any]) -> None:
    import onnx

    content = onnx.load(file)
    onnx.helper.set_model_props(content, {name: json.dumps(value) for name, value in metadata.items()})
    onnx.save(content, file)


def _compare(
    run: Run, model: TaskModel, graph: Graph, file: Path, pictures: PictureDataset, out: Path, *, dynamic: bool
) -> Export:
    """Every figure of the export; raises AcamkdError where the file and PyTorch disagree."""
    threads, metric = torch.get_num_threads(), METRICS[run.recipe.task]
    exported = OnnxModel(file, threads=threads)
    difference = _difference(model, graph, exported, pictures)
    log.info("scoring %d pictures by PyTorch and by onnxruntime", len(pictures))
    pytorch, onnxruntime = _scores(model, exported, pictures)
    if not abs(pytorch[metric] - onnxruntime[metric]) <= LARGEST_METRIC_DIFFERENCE:
        raise AcamkdError(
            f"the exported file is wrong: {metric} {onnxruntime[metric]:.2f} by onnxruntime, {pytorch[metric]:.2f} by "
            "PyTorch; nothing was written"
        )
    image, _ = pictures[0]
    batch = model.prepare([image])
    with FlopCounterMode(display=False) as counter:
        _detect(model, batch)
    frame, size = batch.pixels.numpy(), batch.sizes[0]
    milliseconds = {
        f"{run.role}, PyTorch": _median_milliseconds(lambda: _detect(model, batch)),
        f"{run.role}, onnxruntime": _median_milliseconds(lambda: exported.decode(exported.run(frame), size, size)),
    }
    if (teacher := _load_teacher(run)) is not None:
        milliseconds = {"teacher, PyTorch": _median_milliseconds(lambda: _detect(teacher, batch)), **milliseconds}
    metrics_file = run.folder / METRICS_FILE
    written = json.loads(metrics_file.read_text(encoding="utf-8")) if metrics_file.is_file() else {}
    return Export(
        folder=out, difference=difference, metric=metric, pytorch=pytorch, onnxruntime=onnxruntime,
        teacher=written.get("teacher", {}) if run.role == "student" else {},
        milliseconds=milliseconds, threads=threads,
        parameters=sum(parameter.numel() for parameter in model.net.parameters()),
        gflops=counter.get_total_flops() / 1e9, input_size=batch.input_size, dynamic_size=dynamic,
    )  # fmt: skip


@torch.no_grad()
def _detect(model: TaskModel, batch: Batch) -> None:
    model.decode(model(batch), batch)


@torch.no_grad()
def _difference(model: TaskModel, graph: Graph, exported: OnnxModel, pictures: PictureDataset) -> tuple[float, float]:
    """Largest difference of any output on real pictures, and the largest as a share of the output's largest value."""
    largest = relative = 0.0
    for index in range(min(COMPARED_PICTURES, len(pictures))):
        pixels = model.prepare([pictures[index][0]]).pixels
        if index == 0 and not isinstance(graph, DetectionsGraph):
            pixels = pixels.expand(3, -1, -1, -1)
        expected, actual = dict(zip(graph.output_names, graph(pixels), strict=True)), exported.run(pixels.numpy())
        # Suppressed detections are compared by their sorted scores: rounding may swap two, or let one more pass.
        for name in ("scores",) if isinstance(graph, DetectionsGraph) else graph.output_names:
            ours, theirs = expected[name].numpy(), actual[name]
            if isinstance(graph, DetectionsGraph):
                count = min(len(ours), len(theirs))
                ours, theirs = ours[:count], theirs[:count]
            if ours.shape != theirs.shape:
                raise AcamkdError(f"the exported file is wrong: {name} has shape {theirs.shape}, not {ours.shape}")
            gap = float(np.abs(ours - theirs).max(initial=0))
            largest = max(largest, gap)
            relative = max(relative, gap / max(float(np.abs(ours).max(initial=0)), 1e-12))
    log.info("largest difference between onnxruntime and PyTorch: %.2e, %.2e relative", largest, relative)
    if not relative <= LARGEST_DIFFERENCE:
        raise AcamkdError(
            f"the exported file is wrong: its outputs differ from PyTorch's by {relative:.1e} of their largest value "
            f"(allowed: {LARGEST_DIFFERENCE:g}); nothing was written"
        )
    return largest, relative


def _scores(
    model: TaskModel, exported: OnnxModel, pictures: PictureDataset
) -> tuple[dict[str, float], dict[str, float]]:
    """Every metric by PyTorch and by onnxruntime, picture by picture: padding to a batch's size would change one."""
    ours, theirs = Scorer(model.task, pictures.classes), Scorer(model.task, pictures.classes)
    for image, target in pictures:
        ours.update(model.predict([image]), [target])
        found = exported.predict(image.permute(1, 2, 0).numpy())
        theirs.update([{name: torch.from_numpy(values) for name, values in found.items()}], [target])
    return ours.compute(), theirs.compute()


def _load_teacher(run: Run) -> TaskModel | None:
    recipe = run.recipe
    if run.role == "teacher" or recipe.teacher is None:
        return None
    try:
        return models.build(
            recipe.teacher, recipe.task, len(recipe.data.classes or ()), recipe.data.resize, teacher=True
        ).eval()
    except AcamkdError as error:
        log.warning("the teacher cannot be loaded, so its time is left out: %s", error)
        return None


def _median_milliseconds(call: Callable[[], object]) -> float:
    for _ in range(3):
        call()
    seconds = []
    for _ in range(TIMED_RUNS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds)


@contextmanager
def _all_or_nothing(out: Path) -> Iterator[Path]:
    """A folder to write to; its files are moved to `out` when everything has gone well."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=out, prefix=".unfinished-") as unfinished:
            yield Path(unfinished)
            for file in Path(unfinished).iterdir():
                os.replace(file, out / file.name)
    except OSError as error:
        raise AcamkdError(f"cannot write to {out}: {error.strerror or error}") from error
    finally:
        if out.is_dir() and not any(out.iterdir()):
            out.rmdir()
