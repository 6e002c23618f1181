"""The demo: a small detector and a small segmenter, trained, distilled and compared on drawn scenes, in minutes."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from rich.table import Column, Table
from torch import Tensor

from acamkd import config, data, models
from acamkd.data.scenes import CLASSES, write_scenes
from acamkd.distillation.build import build_distiller, probe
from acamkd.engine.cost import median_milliseconds
from acamkd.engine.metrics import METRICS
from acamkd.engine.printing import Printable
from acamkd.engine.runs import Run, open_run, write_json
from acamkd.files import check_writable
from acamkd.jobs.train import count_parameters, distill, train
from acamkd.models.base import Prediction, Task, TaskModel
from acamkd.report.visualize import (
    ENLARGEMENT,
    MIN_SCORE,
    Block,
    Pixels,
    draw_predictions,
    draw_sheet,
    draw_spatial_masks,
    enlarge,
)

log = logging.getLogger(__name__)

TRAIN_IMAGES = 320
VAL_IMAGES = 80
SIZE = (96, 96)
"""(height, width) of a scene, in pixels."""

SHOWN = 3
"""Validation images per task on the sheet."""

FOLDERS = {"teacher": "teacher", "student": "baseline", "distilled": "distilled"}
"""Network in metrics.json -> its run folder."""

TITLES = {"teacher": "teacher", "student": "baseline", "distilled": "distilled student"}


class Cost(NamedTuple):
    """What a network costs; milliseconds are those of one image."""

    parameters: int
    milliseconds: float


@dataclass(frozen=True)
class Demo(Printable):
    """What the demo measured.

    Attributes:
        folder: With `metrics.json`, `pictures.png` and the run folders.
        results: What metrics.json holds: per task the name of the metric, and its value in percent of the teacher, the
            baseline and the distilled student.
        costs: Per task and network.
    """

    folder: Path
    results: dict[Task, dict[str, Any]]
    costs: dict[Task, dict[str, Cost]]

    def __rich__(self) -> Table:
        return _table(self.results, self.costs)


def demo(out: Path | str = "runs/demo", *, task: Task | Literal["both"] = "both") -> Demo:
    """Draw scenes, train a teacher and a student, distill the student, and compare; once per task.

    `out` then holds `metrics.json`, `pictures.png` and per task the scenes (`TASK/data`, drawn once) and the three run
    folders (`TASK/teacher`, `TASK/baseline`, `TASK/distilled`, replaced by every demo).

    Args:
        out: Folder to write to.
        task: Which of the two, or both.

    Raises:
        AcamkdError: The folder cannot be used.
    """
    started, out = time.monotonic(), Path(out)
    check_writable(out)
    tasks: Sequence[Task] = ("detection", "segmentation") if task == "both" else (task,)
    results: dict[Task, dict[str, Any]] = {}
    costs: dict[Task, dict[str, Cost]] = {}
    blocks = []
    for number, each in enumerate(tasks):
        recipe = read_recipe(each, out)
        write_scenes(recipe.data.root, train=TRAIN_IMAGES, val=VAL_IMAGES, size=SIZE, seed=0, task=each)
        scores = _train_all(recipe, out / each, before=3 * number, total=3 * len(tasks))
        runs = {name: open_run(out / each / folder) for name, folder in FOLDERS.items()}
        results[each] = {"metric": METRICS[each], **scores}
        costs[each] = {name: _cost(run.load()) for name, run in runs.items()}
        blocks.append(_block(runs, results[each]))
    write_json(out / "metrics.json", results)
    draw_sheet(blocks, {name: label for label, name in enumerate(CLASSES, start=1)}).savefig(out / "pictures.png")
    took = timedelta(seconds=round(time.monotonic() - started))
    log.info("the demo took %s; %s holds metrics.json and pictures.png", took, out)
    return Demo(out, results, costs)


def read_recipe(task: Task, out: Path) -> config.Recipe:
    """The packaged recipe of a task, with its data below `out` and the teacher that the demo itself trains."""
    folder = out / task
    with resources.as_file(resources.files("acamkd.jobs") / f"demo_{task}.yaml") as file:
        return config.load(file, [f"data.root={json.dumps(str(folder / 'data'))}"])


def _train_all(recipe: config.Recipe, folder: Path, before: int, total: int) -> dict[str, float]:
    """Train the three networks into their run folders; the metric of each."""
    metric = METRICS[recipe.task]
    for existing in (folder / name for name in FOLDERS.values()):
        if existing.exists():
            log.info("%s holds an earlier demo's run: it is replaced", existing)
    log.info("%s, training %d of %d: the teacher", recipe.task, before + 1, total)
    teacher = train(recipe, "teacher", out=folder / FOLDERS["teacher"], overwrite=True)
    log.info("%s, training %d of %d: the baseline", recipe.task, before + 2, total)
    student = train(recipe, out=folder / FOLDERS["student"], overwrite=True)
    log.info("%s, training %d of %d: the same student, distilled", recipe.task, before + 3, total)
    assert recipe.teacher is not None
    weights = str(folder / FOLDERS["teacher"] / "teacher.safetensors")
    taught = recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update={"weights": weights})})
    distilled = distill(taught, out=folder / FOLDERS["distilled"], overwrite=True)
    return {
        "teacher": teacher.metrics["teacher"][metric],
        "student": student.metrics["student"][metric],
        "distilled": distilled.metrics["student"][metric],
    }


def _cost(model: TaskModel) -> Cost:
    batch = model.prepare([torch.rand(3, *SIZE)])
    with torch.no_grad():
        model(batch)
        return Cost(count_parameters(model.net), median_milliseconds(lambda: model(batch)))


def _block(runs: dict[str, Run], result: dict[str, Any]) -> Block:
    """What the networks find in the first validation images, and ACAM's masks there."""
    recipe = runs["distilled"].recipe
    samples = data.build(recipe.data, recipe.task, "val", seed=0, augment=False)
    images = [samples[index][0] for index in range(SHOWN)]
    truths = [samples[index][1] for index in range(SHOWN)]
    findings = [truths, *(run.load().predict(images) for run in runs.values())]
    masks = spatial_masks(runs["distilled"], images)
    rows = [
        [
            *(_drawn(image, column[index], recipe) for column in findings),
            draw_spatial_masks(_array(image), masks[index].numpy()),
        ]
        for index, image in enumerate(images)
    ]
    columns = ["ground truth", *(f"{title}: {result[name]:.1f}" for name, title in TITLES.items())]
    title = f"{recipe.task.capitalize()} ({result['metric']} on {len(samples)} validation images)"
    return Block(title, [*columns, "spatial masks of ACAM"], rows)


def _array(image: Tensor) -> Pixels:
    return image.permute(1, 2, 0).numpy()


def _drawn(image: Tensor, found: Prediction, recipe: config.Recipe) -> Pixels:
    """A small image, enlarged, with what is known or predicted of it."""
    arrays = {name: x.numpy() for name, x in found.items()}
    if "mask" in arrays:
        arrays = {"mask": enlarge(arrays["mask"])}
    else:
        kept = arrays.get("scores", np.ones(len(arrays["boxes"]))) >= MIN_SCORE
        arrays = {"boxes": ENLARGEMENT * arrays["boxes"][kept], "labels": arrays["labels"][kept]}
    return draw_predictions(enlarge(_array(image)), arrays, recipe.data.classes or (), with_names=False, opacity=0.75)


def spatial_masks(run: Run, images: Sequence[Tensor]) -> Tensor:
    """The spatial masks of the first loss of a distilled run at the end: (N, M, H, W) for N images."""
    recipe = run.recipe
    assert recipe.teacher is not None
    assert recipe.data.classes is not None
    student = run.load()
    teacher = models.build(recipe.teacher, recipe.task, len(recipe.data.classes), recipe.data.resize, teacher=True)
    distiller = build_distiller(student, teacher, recipe.losses)
    # The masks belong to the loss, and only the checkpoint, which holds the last student too, has the loss.
    state = torch.load(run.checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    distiller.load_state_dict({name.removeprefix("distiller."): value for name, value in state.items()})
    batch, (pair, loss) = student.prepare(images), distiller.levels[0]
    assert pair is not None
    student_map, teacher_map = (
        probe(model, [name], batch)[name] for model, name in zip((student, teacher), pair, strict=True)
    )
    return loss.masks(student_map, teacher_map)["spatial"]


def _table(results: Mapping[Task, Mapping[str, Any]], costs: Mapping[Task, Mapping[str, Cost]]) -> Table:
    table = Table("task", "network", *(Column(title, justify="right") for title in ("metric", "parameters", "ms")))
    for task, result in results.items():
        for name, title in TITLES.items():
            table.add_row(
                task if name == "teacher" else "", title, f"{result['metric']} {result[name]:.2f}",
                f"{costs[task][name].parameters:,}", f"{costs[task][name].milliseconds:.1f}",
                end_section=name == "distilled",
            )  # fmt: skip
    table.caption = f"metric in percent; ms: median CPU time of one forward over one {SIZE[1]} x {SIZE[0]} image"
    return table
