"""Export a run's network to ONNX, prove that the file finds what PyTorch finds, and publish it."""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from acamkd import __version__, config, data
from acamkd.data import ImageDataset
from acamkd.engine.cost import Cost, cost, median_milliseconds, threads
from acamkd.engine.metrics import METRICS, score, scorer_of
from acamkd.engine.printing import Printable
from acamkd.engine.runs import RECIPE, Run, as_run
from acamkd.errors import AcamkdError
from acamkd.files import check_writable
from acamkd.jobs.export import onnx_model
from acamkd.jobs.export.card import write_card
from acamkd.jobs.export.graph import DetectionsGraph, Graph, build_graph, write_graph
from acamkd.jobs.export.onnx_model import OnnxModel
from acamkd.models.base import TaskModel

log = logging.getLogger(__name__)

CARD = "README.md"
"""The model card, by the name under which the Hub shows it."""

LARGEST_DIFFERENCE = 1e-3
"""Between the outputs of the two runtimes, as a share of an output's largest value."""

LARGEST_METRIC_DIFFERENCE = 0.1
"""In points."""

COMPARED_IMAGES = 8


@dataclass(frozen=True)
class Measured:
    """One network in one runtime.

    Attributes:
        network: `teacher` or `student`.
        runtime: `PyTorch` or `onnxruntime`.
        scores: Every metric on the validation images, in percent.
        cost: Of one prediction; None where a teacher's weights are gone.
    """

    network: str
    runtime: str
    scores: dict[str, float]
    cost: Cost | None


@dataclass(frozen=True)
class Export(Printable):
    """What was exported, and how it compares.

    Attributes:
        folder: Where the files are.
        metric: Name of the deciding metric.
        difference: Largest difference between an output of onnxruntime and of PyTorch.
        relative_difference: The same as a share of that output's largest value.
        measured: The teacher where there is one, and the exported network in both runtimes.
        threads: That the times were taken with.
        images: Number of validation images.
    """

    folder: Path
    metric: str
    difference: float
    relative_difference: float
    measured: tuple[Measured, ...]
    threads: int
    images: int

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
        return Group(table, Text(words))


def export(
    run: Run | Path | str,
    *,
    overrides: Sequence[str] = (),
    out: Path | str | None = None,
    overwrite: bool = False,
    with_nms: bool = False,
    license: str | None = None,
) -> Export:
    """Export a run's network; the folder appears once every check has passed.

    It then holds the network's weights (`student.safetensors`), `student.onnx`, `onnx_model.py`, which runs that file
    without acamkd, and a model card, `README.md`.

    Args:
        run: A run with weights, or its folder.
        overrides: `key=value` assignments that change its recipe, such as `data.root=FOLDER`.
        out: Where to; `export` in the run folder where not given.
        overwrite: Replace the export that the folder holds.
        with_nms: Detection: put everything up to the non-maximum suppression into the graph, for single images of
            the recipe's size. Faster R-CNN has no other export.
        license: Of the weights, for the model card, as the Hub names it (`apache-2.0`).

    Raises:
        AcamkdError: A package or the data is missing, the network cannot be exported, or the file gives other outputs
            or another score than PyTorch.
    """
    require("onnx", "onnxruntime", *([] if with_nms else ["onnxscript"]))
    run = as_run(run, overrides)
    out = Path(out) if out else run.folder / "export"
    model, recipe = run.load(), run.recipe
    graph = build_graph(model, recipe.data.resize, with_nms=with_nms)
    _check_free(out, overwrite)
    images = data.build(recipe.data, recipe.task, "val", seed=recipe.train.seed, augment=False)
    for warning in data.check(images, "headers"):
        log.warning("%s", warning)
    with _appearing(out) as folder:
        file = folder / f"{run.role}.onnx"
        log.info("writing the graph of %s", run.weights)
        write_graph(graph, file, recipe)
        exported = OnnxModel(file, threads=threads())
        difference, relative = _compare_outputs(graph, exported, images)
        measured = _measure(run, model, exported, images)
        figures = Export(out, METRICS[recipe.task], difference, relative, measured, threads(), len(images))
        shutil.copyfile(run.weights, folder / run.weights.name)
        shutil.copyfile(onnx_model.__file__, folder / "onnx_model.py")
        write_card(folder / CARD, run, model, exported, figures, license)
    log.info("%s holds %s", out, ", ".join(sorted(each.name for each in out.iterdir())))
    return figures


def push_to_hub(folder: Path, repository: str) -> str:
    """Upload an export to the Hugging Face Hub, into a private repository if there is none yet.

    Args:
        folder: What `export` wrote.
        repository: OWNER/NAME.

    Returns:
        Its address.

    Raises:
        AcamkdError: The Hub cannot be reached or refuses.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi()
    try:
        address = str(api.create_repo(repository, private=True, exist_ok=True))
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message=f"acamkd {__version__} export")
    except Exception as error:  # of the Hub, of its transport, of the files
        raise AcamkdError(
            f"{repository} could not be uploaded: {error}\n  {folder} is complete; `hf auth login` stores a token, and "
            f"`hf upload {repository} {folder}` uploads it later"
        ) from error
    log.info("uploaded to %s", address)
    return address


def check_repository(name: str) -> None:
    """Raise AcamkdError, before anything is exported, unless an upload to OWNER/NAME can be tried."""
    require("huggingface_hub")
    if name.count("/") != 1:
        raise AcamkdError(f"--push-to-hub {name}: give OWNER/NAME")


def require(*packages: str) -> None:
    """Raise AcamkdError unless these packages of the extra are installed."""
    if missing := [name for name in packages if find_spec(name) is None]:
        raise AcamkdError(f"export needs {', '.join(missing)}: pip install '.[export]' in the checkout")


@torch.no_grad()
def _compare_outputs(graph: Graph, exported: OnnxModel, images: ImageDataset) -> tuple[float, float]:
    """Largest difference of any output on real images, and the largest as a share of its output's largest value."""
    largest = relative = 0.0
    for index in range(min(COMPARED_IMAGES, len(images))):
        pixels = graph.model.prepare([images[index][0]]).pixels
        names: tuple[str, ...] = graph.output_names
        if isinstance(graph, DetectionsGraph):
            names = ("scores",)  # rounding may swap two boxes, or let one more pass: their sorted scores are compared
        else:
            pixels = pixels.expand(1 + index % 2, -1, -1, -1)  # batches of different sizes
        expected = dict(zip(graph.output_names, graph(pixels), strict=True))
        actual = exported.run(pixels.numpy())
        for name in names:
            ours, theirs = expected[name].numpy(), actual[name]
            if isinstance(graph, DetectionsGraph):
                count = min(len(ours), len(theirs))
                ours, theirs = ours[:count], theirs[:count]
            if ours.shape != theirs.shape:
                raise AcamkdError(f"the exported file is wrong: {name} has shape {theirs.shape}, not {ours.shape}")
            difference = float(np.abs(ours - theirs).max(initial=0))
            largest = max(largest, difference)
            relative = max(relative, difference / max(float(np.abs(ours).max(initial=0)), 1e-12))
    log.info("largest difference between onnxruntime and PyTorch: %.1e, %.1e relative", largest, relative)
    if not relative <= LARGEST_DIFFERENCE:
        raise AcamkdError(
            f"the exported file is wrong: its outputs differ from PyTorch's by {relative:.1e} of their largest value "
            f"(allowed: {LARGEST_DIFFERENCE:g}); nothing was written"
        )
    return largest, relative


def _measure(run: Run, model: TaskModel, exported: OnnxModel, images: ImageDataset) -> tuple[Measured, ...]:
    """Score and time every network; raises AcamkdError where the two runtimes' scores differ."""
    log.info("scoring %d images by PyTorch and by onnxruntime", len(images))
    ours, theirs = _score(run, model, exported, images)
    metric = METRICS[model.task]
    same = abs(ours[metric] - theirs[metric]) <= LARGEST_METRIC_DIFFERENCE
    if not (same or (math.isnan(ours[metric]) and math.isnan(theirs[metric]))):
        raise AcamkdError(
            f"the exported file is wrong: {metric} {theirs[metric]:.2f} by onnxruntime, {ours[metric]:.2f} by PyTorch; "
            "nothing was written"
        )
    image = images[0][0]
    array = image.permute(1, 2, 0).numpy()
    spent = cost(model, image)
    by_onnxruntime = replace(spent, milliseconds=median_milliseconds(lambda: exported.predict(array)))
    return (
        *_measure_teacher(run, images),
        Measured(run.role, "PyTorch", ours, spent),
        Measured(run.role, "onnxruntime", theirs, by_onnxruntime),
    )


def _measure_teacher(run: Run, images: ImageDataset) -> list[Measured]:
    """The teacher of a distillation, with the scores that the run gave it: on the same images, at the same size."""
    if run.role == "teacher" or run.recipe.teacher is None:
        return []
    scores = run.metrics.get("teacher", {}) if run.has_ended else {}
    try:
        teacher = run.load_teacher()
    except AcamkdError as error:
        log.warning("the teacher's cost is left out: %s", error)
        return [Measured("teacher", "PyTorch", scores, None)] if scores and _is_as_trained(run, images) else []
    if scores and not _is_as_trained(run, images):
        log.info("other validation images or another data.resize than in the run: scoring the teacher again, too")
        batches = (([image], [target]) for image, target in (images[index] for index in range(len(images))))
        scores = score(teacher, batches, scorer_of(run.recipe, images.classes))
    return [Measured("teacher", "PyTorch", scores, cost(teacher, images[0][0]))]


def _is_as_trained(run: Run, images: ImageDataset) -> bool:
    """Whether the run was scored on these images, and at the size that its recipe says now."""
    trained = config.load(run.folder / RECIPE).data.resize
    return bool(trained == run.recipe.data.resize and images.fingerprint() == run.metrics["data"]["val"])


def _score(
    run: Run, model: TaskModel, exported: OnnxModel, images: ImageDataset
) -> tuple[dict[str, float], dict[str, float]]:
    """Every metric by PyTorch and by onnxruntime, image by image: padding to a batch's size would change one."""
    ours, theirs = scorer_of(run.recipe, images.classes), scorer_of(run.recipe, images.classes)
    for index in range(len(images)):
        image, target = images[index]
        ours.update(model.predict([image]), [target])
        found = exported.predict(image.permute(1, 2, 0).numpy())
        theirs.update([{name: torch.from_numpy(values) for name, values in found.items()}], [target])
    return ours.compute(), theirs.compute()


def _check_free(out: Path, overwrite: bool) -> None:
    """Raise AcamkdError, before anything is exported, if the folder cannot be written or holds something else."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        if not (out / "onnx_model.py").is_file():  # what somebody else wrote must never be replaced
            raise AcamkdError(f"{out} exists and is not an export: choose another folder with --out")
        if not overwrite:
            raise AcamkdError(f"{out} already holds an export: --overwrite replaces it, --out FOLDER writes elsewhere")
    check_writable(out.parent)


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A folder to write to, which becomes `out` when everything has gone well."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as unfinished:
            folder = Path(unfinished, out.name)
            folder.mkdir()
            yield folder
            if out.exists():
                os.replace(out, Path(unfinished, "replaced"))
            os.replace(folder, out)
    except OSError as error:
        raise AcamkdError(f"cannot write {out}: {error.strerror or error}") from error
