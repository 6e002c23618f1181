"""The networks that a benchmark sets side by side, and their exported files."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from acamkd import config
from acamkd.engine.runs import Run, as_run, open_run
from acamkd.errors import AcamkdError
from acamkd.jobs.export.export import require
from acamkd.jobs.export.graph import build_graph, needs_nms, write_graph
from acamkd.jobs.export.onnx_model import OnnxModel
from acamkd.models.base import TaskModel, head_of
from acamkd.report.answers import BASELINE, DISTILLED, TEACHER
from acamkd.report.run import BESIDE

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Network:
    """One network.

    Attributes:
        name: `teacher`, `baseline` or `distilled`; of a single file its stem.
        weights: File of its weights.
        build: Builds it in eval mode; None if only its exported file is known.
        files: Its exported files.
    """

    name: str
    weights: Path
    build: Callable[[], TaskModel] | None
    files: tuple[Path, ...] = ()


def networks_of(run: Run, baseline: Run | Path | str | None) -> list[Network]:
    """Teacher, baseline and the run's own network, as far as there are any.

    Args:
        run: A run with weights.
        baseline: A run of the baseline; by default the folder `baseline` beside the run.

    Raises:
        AcamkdError: The given baseline is none, or has other classes.
    """
    if run.role == "teacher":
        return [Network(TEACHER, run.weights, run.load)]
    own = Network(DISTILLED if run.recipe.losses else BASELINE, run.weights, run.load)
    if own.name == BASELINE:
        if baseline is not None:
            raise AcamkdError(f"{run.folder} is no distillation: there is nothing to compare with a baseline")
        return [own]
    return [*_teacher(run), *_baseline(run, baseline), own]


def _teacher(run: Run) -> list[Network]:
    section = run.recipe.teacher
    if section is not None and section.is_headless:
        log.info("the teacher has no head, predicts nothing and is left out")
        return []
    if section is not None and section.num_classes not in (None, len(run.recipe.data.classes or ())):
        log.info("the teacher has %d classes of its own, has no score and is left out", section.num_classes)
        return []
    if section is None or section.weights is None or not Path(section.weights).is_file():
        log.warning("the teacher is left out: its weights are not there")
        return []
    return [Network(TEACHER, Path(section.weights), partial(_load_teacher, run))]


def _load_teacher(run: Run) -> TaskModel:
    return head_of(run.load_teacher())


def _baseline(run: Run, given: Run | Path | str | None) -> list[Network]:
    beside = [folder for name in BESIDE if (folder := run.folder.parent / name).is_dir()]
    if given is None and not beside:
        return []
    try:
        found = as_run(given) if given is not None else open_run(beside[0])
        if found.role == "teacher" or found.recipe.losses:
            raise AcamkdError(f"{found.folder} is no run of a baseline")
        if found.recipe.data.classes != run.recipe.data.classes:
            raise AcamkdError(f"{found.folder} and {run.folder} have different classes")
    except AcamkdError as error:
        if given is not None:
            raise
        log.warning("the baseline is left out: %s", error)
        return []
    # At the run's size, so that both see the same input.
    same = Run(found.folder, found.recipe.model_copy(update={"data": run.recipe.data}), found.role)
    return [Network(BASELINE, same.weights, same.load)]


def files_of_run(run: Run) -> tuple[Path, ...]:
    """The ONNX files of the run's own export; none if that was made of other weights or at another size.

    Other files there are not of the export, such as one that was made of it for another runtime.
    """
    folder = run.folder / "export"
    files = tuple(file for end in ("onnx", "int8.onnx") if (file := folder / f"{run.role}.{end}").is_file())
    if not files:
        return ()
    kept = folder / run.weights.name
    if not kept.is_file() or kept.read_bytes() != run.weights.read_bytes():
        log.warning("%s is left out: it was made of other weights (acamkd export --overwrite makes it anew)", folder)
        return ()
    if any(OnnxModel(file).metadata["resize"] != run.recipe.data.model_dump(mode="json")["resize"] for file in files):
        log.warning("%s is left out: it was made at another data.resize", folder)
        return ()
    return files


def write_file(network: Network, folder: Path, recipe: config.Recipe) -> Path:
    """Write a network's ONNX file; raises AcamkdError if it has none."""
    require("onnx", "onnxruntime", "onnxscript")
    assert network.build is not None
    model, resize = network.build(), recipe.data.resize
    graph = build_graph(model, resize, with_nms=needs_nms(model))
    file = folder / f"{network.name}.onnx"
    log.info("writing the graph of the %s", network.name)
    write_graph(graph, file, recipe)
    return file
