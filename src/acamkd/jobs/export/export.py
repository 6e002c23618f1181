"""Export a run's network to ONNX, verify the file against PyTorch, and publish it."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor

from acamkd import __version__, config, data
from acamkd.data import ImageDataset
from acamkd.engine.cost import Cost, cost, median_milliseconds, threads
from acamkd.engine.mask_history import spread
from acamkd.engine.metrics import METRICS, score, scorer_of, why_unscored
from acamkd.engine.printing import Printable
from acamkd.engine.runs import RECIPE, Run, as_run
from acamkd.errors import AcamkdError
from acamkd.files import check_writable
from acamkd.jobs.export import onnx_benchmark, onnx_forms, onnx_model, openvino_model
from acamkd.jobs.export.card import write_card
from acamkd.jobs.export.graph import Graph, build_graph, write_graph
from acamkd.jobs.export.onnx_model import ExportedModel, OnnxModel, Pixels
from acamkd.jobs.export.openvino_model import OpenVinoModel, write_openvino
from acamkd.jobs.export.parity import compare_outputs, compare_scores
from acamkd.jobs.export.quantize import CALIBRATION_IMAGES, Quantized, quantize
from acamkd.models.base import TaskModel, head_of
from acamkd.progress import progress

log = logging.getLogger(__name__)

PROGRAMS = (onnx_model, onnx_forms, onnx_benchmark)
"""What runs and measures an ONNX file without acamkd."""

CARD = "README.md"
"""The model card, by the name under which the Hub shows it."""


@dataclass(frozen=True)
class Measured:
    """Measurements of one network in one runtime.

    Attributes:
        network: `teacher` or `student`.
        runtime: `PyTorch`, `onnxruntime` or `OpenVINO`, the latter two with ` int8` after them for an INT8 file.
        scores: Every metric on the validation images, in percent.
        cost: Cost of one prediction; None if a teacher's weights are missing.
    """

    network: str
    runtime: str
    scores: dict[str, float]
    cost: Cost | None


@dataclass(frozen=True)
class Export(Printable):
    """Summary of an export, with scores and costs.

    Attributes:
        folder: Folder of the files.
        metric: Name of the deciding metric.
        difference: Largest difference between an output of onnxruntime and of PyTorch.
        relative_difference: This difference as a share of the output's largest value.
        measured: The teacher, if there is one, and the exported network in every runtime that was asked for.
        threads: Number of CPU threads in the time measurements.
        images: Number of validation images.
        quantized: How the INT8 file was made; None without one.
    """

    folder: Path
    metric: str
    difference: float
    relative_difference: float
    measured: tuple[Measured, ...]
    threads: int
    images: int
    quantized: Quantized | None = None

    def __rich__(self) -> RenderableType:
        table = Table("network", "runtime", self.metric, "ms", "parameters", "GFLOPs")
        for row in self.measured:
            reached, each = row.scores.get(self.metric), row.cost
            spent = [f"{each.milliseconds:.1f}", f"{each.parameters:,}", f"{each.gflops:.2f}"] if each else []
            table.add_row(row.network, row.runtime, "" if reached is None else f"{reached:.2f}", *spent)
        words = (
            f"largest difference of the outputs {self.difference:.1e}, {self.relative_difference:.1e} of their largest "
            f"value; times on {self.threads} CPU thread{'s' if self.threads > 1 else ''}"
        )
        return Group(table, Text(words), *([Text(str(self.quantized))] if self.quantized else []))


def export(
    run: Run | Path | str,
    *,
    overrides: Sequence[str] = (),
    out: Path | str | None = None,
    overwrite: bool = False,
    with_nms: bool = False,
    int8: bool = False,
    openvino: bool = False,
    max_drop: float = 1.0,
    license: str | None = None,
) -> Export:
    """Export a run's network; the folder appears once every check has passed.

    The folder holds the weights (`student.safetensors`), `student.onnx`, and a model card, `README.md`. Its
    `onnx_model.py` runs the ONNX file without acamkd, and its `onnx_benchmark.py` measures it.

    Args:
        run: A run with weights, or its folder.
        overrides: `key=value` assignments that change its recipe, such as `data.root=FOLDER`.
        out: Output folder; by default `export` in the run folder.
        overwrite: Replace the export that the folder holds.
        with_nms: Detection: put everything up to the non-maximum suppression into the graph, for single images of
            the recipe's size. Faster R-CNN has no other export.
        int8: Also write `student.int8.onnx`, quantized with images of the training split.
        openvino: Also write each file in OpenVINO's own form, `student.xml` and `student.bin`, checked like the ONNX
            file. `openvino_model.py` beside them runs them without acamkd.
        max_drop: Points of the metric that an INT8 file may lose.
        license: License of the weights for the model card, by the Hub's name (`apache-2.0`).

    Returns:
        The files, with the scores and the times that were measured.

    Raises:
        AcamkdError: A package or the data is missing, the network cannot be exported, a file gives other outputs or
            another score than PyTorch, or an INT8 file loses more than `max_drop`.
    """
    require("onnx", "onnxruntime", *([] if with_nms else ["onnxscript"]))
    if openvino:
        require("openvino", extra="openvino")
    run = as_run(run, overrides)
    out = Path(out).expanduser() if out else run.folder / "export"
    model, recipe = run.load(), run.recipe
    graph = build_graph(model, recipe.data.resize, with_nms=with_nms, openvino=openvino)
    _check_free(out, overwrite)
    images = data.build(recipe.data, recipe.task, "val", seed=recipe.train.seed, augment=False)
    for warning in data.check(images, "headers"):
        log.warning("%s", warning)
    with _appearing(out) as folder:
        file = folder / f"{run.role}.onnx"
        log.info("writing the graph of %s", run.weights)
        write_graph(graph, file, recipe)
        exported = OnnxModel(file, threads=threads())
        difference, relative = compare_outputs(graph, exported, images)
        measured = _measure(run, model, exported, images)
        small, quantized = folder / f"{run.role}.int8.onnx", None
        if int8:
            quantized = _quantize(run, file, small, images, measured[-1].scores, max_drop)
            by_onnxruntime = OnnxModel(small, threads=threads())
            scores = _score_file(run, by_onnxruntime, images)
            measured += (_timed(by_onnxruntime, "onnxruntime int8", scores, images, measured[-1]),)
        if openvino:
            shutil.copy(str(openvino_model.__file__), folder)
            pytorch = next(row for row in measured if (row.network, row.runtime) == (run.role, "PyTorch"))
            for each in (file, small) if quantized else (file,):
                measured += (_write_openvino(run, graph, each, images, pytorch, max_drop),)
        figures = Export(out, METRICS[recipe.task], difference, relative, measured, threads(), len(images), quantized)
        kept = folder / run.weights.name
        shutil.copyfile(run.weights, kept)
        model.write_config(kept, images.classes)
        for module in PROGRAMS:
            shutil.copy(str(module.__file__), folder)
        write_card(folder / CARD, run, model, exported, figures, license)
    log.info("%s holds %s", out, ", ".join(sorted(each.name for each in out.iterdir())))
    return figures


def push_to_hub(folder: Path, repository: str) -> str:
    """Upload an export to the Hugging Face Hub; a new repository is private.

    Args:
        folder: Output folder of `export`.
        repository: Repository as OWNER/NAME.

    Returns:
        URL of the repository.

    Raises:
        AcamkdError: The Hub cannot be reached or refuses.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi()
    try:
        address = str(api.create_repo(repository, private=True, exist_ok=True))
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message=f"acamkd {__version__} export")
    except Exception as error:  # errors of the Hub, the network or the files
        raise AcamkdError(
            f"{repository} could not be uploaded: {error}\n  {folder} is complete; `hf auth login` stores a token, and "
            f"`hf upload {repository} {folder}` uploads it later"
        ) from error
    log.info("uploaded to %s", address)
    return address


def check_repository(name: str) -> None:
    """Raise AcamkdError unless an upload to OWNER/NAME is possible; called before the export."""
    require("huggingface_hub")
    if name.count("/") != 1:
        raise AcamkdError(f"--push-to-hub {name}: give OWNER/NAME")


def require(*packages: str, extra: str = "export") -> None:
    """Raise AcamkdError unless these packages of an extra are installed."""
    if missing := [name for name in packages if find_spec(name) is None]:
        raise AcamkdError(f"export needs {', '.join(missing)}: pip install 'acamkd[{extra}]'")


def _measure(run: Run, model: TaskModel, exported: OnnxModel, images: ImageDataset) -> tuple[Measured, ...]:
    """Score and time every network; raises AcamkdError where the two runtimes' scores differ."""
    log.info("scoring %d images by PyTorch and by onnxruntime", len(images))
    ours, theirs = _score(run, model, exported, images)
    compare_scores(METRICS[model.task], ours, theirs, "onnxruntime")
    by_pytorch = Measured(run.role, "PyTorch", ours, cost(model, images[0][0]))
    return (*_measure_teacher(run, images), by_pytorch, _timed(exported, "onnxruntime", theirs, images, by_pytorch))


def _measure_teacher(run: Run, images: ImageDataset) -> list[Measured]:
    """Measure the teacher of a distillation; the run's scores are reused for the same images at the same size."""
    if run.role == "teacher" or run.recipe.teacher is None:
        return []
    scores = run.metrics.get("teacher", {}) if run.has_ended else {}
    if scores.get(METRICS[run.recipe.task]) is None:  # of a teacher that is not scored
        scores = {}
    try:
        loaded = run.load_teacher()
        if why := why_unscored(loaded, len(images.classes)):
            log.info("the teacher is left out of the measurements: %s", why)
            return []
        teacher = head_of(loaded)
    except AcamkdError as error:
        log.warning("the teacher's cost is left out: %s", error)
        return [Measured("teacher", "PyTorch", scores, None)] if scores and _is_as_trained(run, images) else []
    if scores and not _is_as_trained(run, images):
        log.info("other validation images or another data.resize than in the run: scoring the teacher again, too")
        batches = (([image], [target]) for image, target in (images[index] for index in range(len(images))))
        scores = score(teacher, batches, scorer_of(run.recipe, images.classes))
    return [Measured("teacher", "PyTorch", scores, cost(teacher, images[0][0]))]


def _is_as_trained(run: Run, images: ImageDataset) -> bool:
    """Whether the run was scored on these images at the recipe's present size."""
    trained = config.load(run.folder / RECIPE).data.resize
    return bool(trained == run.recipe.data.resize and images.fingerprint() == run.metrics["data"]["val"])


def _quantize(
    run: Run, file: Path, out: Path, images: ImageDataset, before: Mapping[str, float], max_drop: float
) -> Quantized:
    """Write the INT8 file, calibrated on images of the training split."""
    recipe, metric = run.recipe, METRICS[run.recipe.task]
    training = data.build(recipe.data, recipe.task, "train", seed=recipe.train.seed, augment=False)
    shown = [_pixels(training[index][0]) for index in spread(len(training), CALIBRATION_IMAGES)]

    def score_of(trial: Path) -> float:
        return _score_file(run, OnnxModel(trial, threads=threads()), images)[metric]

    return quantize(file, out, shown, score_of, before=before[metric], max_drop=max_drop)


def _write_openvino(
    run: Run, graph: Graph, file: Path, images: ImageDataset, pytorch: Measured, max_drop: float
) -> Measured:
    """Write one ONNX file in OpenVINO's form, and measure that; raises AcamkdError where it is wrong or loses much."""
    out, metric, is_int8 = file.with_suffix(".xml"), METRICS[run.recipe.task], file.stem.endswith(".int8")
    log.info("writing %s, and scoring it by OpenVINO", out.name)
    write_openvino(file, out)
    exported = OpenVinoModel(out, threads=threads(), precision="f32")
    scores = _score_file(run, exported, images)
    if not is_int8:
        compare_outputs(graph, exported, images, "OpenVINO")
        compare_scores(metric, pytorch.scores, scores, "OpenVINO")
    elif not pytorch.scores[metric] - scores[metric] <= max_drop:
        raise AcamkdError(
            f"INT8 loses more in OpenVINO than in onnxruntime: {metric} {pytorch.scores[metric]:.2f} before, "
            f"{scores[metric]:.2f} after (allowed: {max_drop:g} points); nothing was written; --max-drop allows more"
        )
    return _timed(exported, "OpenVINO int8" if is_int8 else "OpenVINO", scores, images, pytorch)


def _timed(
    exported: ExportedModel, runtime: str, scores: dict[str, float], images: ImageDataset, other: Measured
) -> Measured:
    """Time a file of the network that was measured before in another runtime."""
    array = _pixels(images[0][0])
    assert other.cost is not None
    exported.predict(array)
    spent = replace(other.cost, milliseconds=median_milliseconds(lambda: exported.predict(array)))
    return Measured(other.network, runtime, scores, spent)


def _score(
    run: Run, model: TaskModel, exported: OnnxModel, images: ImageDataset
) -> tuple[dict[str, float], dict[str, float]]:
    """Every metric in PyTorch and in onnxruntime, image by image, since padding in a batch would change results."""
    ours = scorer_of(run.recipe, images.classes)
    for image, target in progress(images, "evaluating"):
        ours.update(model.predict([image]), [target])
    return ours.compute(), _score_file(run, exported, images)


def _score_file(run: Run, exported: ExportedModel, images: ImageDataset) -> dict[str, float]:
    """Every metric of an exported file."""
    scorer = scorer_of(run.recipe, images.classes)
    for image, target in progress(images, "evaluating"):
        found = exported.predict(_pixels(image))
        scorer.update([{name: torch.from_numpy(values) for name, values in found.items()}], [target])
    return scorer.compute()


def _pixels(image: Tensor) -> Pixels:
    """(3, H, W) uint8 as (H, W, 3)."""
    pixels: Pixels = image.permute(1, 2, 0).numpy()
    return pixels


def _check_free(out: Path, overwrite: bool) -> None:
    """Raise AcamkdError if the folder cannot be written or holds other files; called before the export."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        if not (out / "onnx_model.py").is_file():  # files of other programs must never be replaced
            raise AcamkdError(f"{out} exists and is not an export: choose another folder with --out")
        if foreign := [each.name for each in out.iterdir() if not _is_written(each)]:
            raise AcamkdError(
                f"{out} also holds {foreign[0]}, which no export writes: choose another folder with --out"
            )
        if not overwrite:
            raise AcamkdError(f"{out} already holds an export: --overwrite replaces it, --out FOLDER writes elsewhere")
    check_writable(out.parent)


def _is_written(file: Path) -> bool:
    """Whether an export may have written a file."""
    programs = [Path(str(module.__file__)).name for module in (*PROGRAMS, openvino_model)]
    if file.is_dir():
        return file.name == "__pycache__"  # of these programs
    return file.name in (CARD, *programs) or file.suffix in (".onnx", ".xml", ".bin", ".safetensors", ".json")


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """Temporary folder within the context, which becomes `out` if no error occurs."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as unfinished:
            folder = Path(unfinished, out.name)
            folder.mkdir()
            yield folder
            if out.exists():
                os.replace(out, Path(unfinished, "replaced"))
            os.replace(folder, out)
    except AcamkdError:  # such as of an image that cannot be read, which is an OSError too
        raise
    except OSError as error:
        raise AcamkdError(f"cannot write {out}: {error.strerror or error}") from error
