"""The demo: a strong teacher, few labeled images and many without labels; what distillation brings to a student."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Group
from rich.table import Column, Table
from rich.text import Text
from torch import Tensor

from acamkd import config, data, models
from acamkd.data.scenes import CLASSES, write_scenes
from acamkd.distillation.build import build_distiller, probe
from acamkd.engine.cost import median_milliseconds
from acamkd.engine.metrics import METRICS
from acamkd.engine.printing import Printable
from acamkd.engine.runs import OtherRunError, Run, write_json
from acamkd.errors import AcamkdError
from acamkd.files import check_writable
from acamkd.jobs.train import count_parameters, distill, train
from acamkd.models.base import Prediction, Task, TaskModel
from acamkd.report.run import REPORT
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

HERE = Path(__file__).parent
"""Holds the recipes and the teachers' weights; README.md there says how the teachers were made."""

LABELED, UNLABELED, VAL = 32, 480, 160
"""Numbers of drawn images."""

SIZE = (96, 96)
"""(height, width) of a scene, in pixels."""

FIRST_SEED = 2
"""Seed of the scenes of demo 0, and so on; the teachers learned from those of seed 1."""

SHOWN = 3
"""Validation images on the sheet, the first ones."""

TASKS: tuple[Task, ...] = ("detection", "segmentation")

NOTES, SHEET = "metrics.json", "pictures.png"

TITLES = {"teacher": "teacher", "student": "baseline", "distilled": "distilled student"}
"""Network in metrics.json -> its name in table and sheet."""


@dataclass(frozen=True)
class Demo(Printable):
    """Results of the demo.

    Attributes:
        folder: Output folder. Its folder TASK has `metrics.json`, `pictures.png` and the run folders.
        results: By task the content of metrics.json: the name of the metric, its percentage for `teacher`, `student`
            (the baseline) and `distilled`, and the networks' `costs`, the milliseconds of one forward over one image.
    """

    folder: Path
    results: dict[Task, dict[str, Any]]

    def __rich__(self) -> Group:
        folders = [self.folder / task for task in self.results]
        return Group(
            _table(self.results),
            *(Text(f"predictions and masks: {folder / SHEET}") for folder in folders),
            *(Text(f"the report: {folder / 'distilled' / REPORT}") for folder in folders),
            Text("with your own images: acamkd init FOLDER"),
        )


def demo(
    out: Path | str = "runs/demo", *, task: Task | Literal["both"] = "both", seed: int = 0, keep: bool = False
) -> Demo:
    """Train a student on a few labeled scenes, distill it with many unlabeled ones too, and compare; once per task.

    The teachers come with the package: networks trained on thousands of other scenes. So does the backbone that
    baseline and distilled student start with; it was pretrained on scenes of other classes.

    `out/TASK` then holds the scenes (`data-seedN`, drawn once), the run folders `baseline` and `distilled`,
    `metrics.json` and `pictures.png`.

    Args:
        out: Folder to write to.
        task: One task, or both, each in a process of its own.
        seed: Seed of the scenes and of the trainings.
        keep: Keep trainings that an earlier demo finished, and resume the one that it began; otherwise they are
            replaced.

    Raises:
        AcamkdError: The folder cannot be used, or `keep` found trainings of another seed.
    """
    started, out = time.monotonic(), Path(out)
    check_writable(out)
    if task == "both":
        with ThreadPoolExecutor(min(len(TASKS), os.cpu_count() or 1)) as pool:
            list(pool.map(lambda each: _in_own_process(each, out, seed, keep), TASKS))
    else:
        _run(task, out, seed, keep)
    done: Sequence[Task] = TASKS if task == "both" else (task,)
    results: dict[Task, dict[str, Any]] = {
        each: json.loads((out / each / NOTES).read_text(encoding="utf-8")) for each in done
    }
    log.info("the demo took %s", timedelta(seconds=round(time.monotonic() - started)))
    return Demo(out, results)


def _in_own_process(task: Task, out: Path, seed: int, keep: bool) -> None:
    """Run the demo of one task as a command, with one thread, and log its lines."""
    words = ["demo", "--task", task, "--out", str(out), "--seed", str(seed), *(["--keep"] if keep else [])]
    line = ""
    with subprocess.Popen(
        [sys.executable, "-m", "acamkd", *words], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, encoding="utf-8", errors="replace", env={"OMP_NUM_THREADS": "1", **os.environ},
    ) as process:  # fmt: skip
        assert process.stderr is not None
        for line in process.stderr:
            if said := re.match(r"\d\d:\d\d:\d\d (.*)", line):
                log.info("%s: %s", task, said[1])
    if process.returncode:
        raise AcamkdError(f"the demo of {task} failed: {line.strip().removeprefix('error: ')}")


def _run(task: Task, out: Path, seed: int, keep: bool) -> None:
    """The demo of one task."""
    recipe, metric = read_recipe(task, out, seed), METRICS[task]
    write_scenes(
        recipe.data.root, train=LABELED, val=VAL, unlabeled=UNLABELED, size=SIZE, seed=FIRST_SEED + seed, task=task
    )
    log.info("training 1 of 2: the baseline, on %d labeled images", LABELED)
    baseline = _carry_out(train, recipe, out / task / "baseline", keep)
    log.info("training 2 of 2: the same student, distilled on these and %d unlabeled images", UNLABELED)
    distilled = _carry_out(distill, recipe, out / task / "distilled", keep)
    networks = {"teacher": _teacher(distilled.recipe), "student": baseline.load(), "distilled": distilled.load()}
    result = {
        "metric": metric,
        "teacher": distilled.metrics["teacher"][metric],
        "student": baseline.metrics["student"][metric],
        "distilled": distilled.metrics["student"][metric],
        "costs": {name: _cost(network) for name, network in networks.items()},
    }
    legend = {name: label for label, name in enumerate(CLASSES, start=1)}
    draw_sheet([_block(networks, distilled, result)], legend).savefig(out / task / SHEET)
    write_json(out / task / NOTES, result)


def read_recipe(task: Task, out: Path, seed: int) -> config.Recipe:
    """The packaged recipe of a task, with its data below `out`, the packaged weights and the seed."""
    values = {
        "data.root": str(out / task / f"data-seed{seed}"),
        "teacher.weights": str(HERE / f"{task}_teacher.safetensors"),
        "student.backbone_weights": str(HERE / "backbone.safetensors"),
    }
    assigned = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    return config.load(HERE / f"{task}.yaml", [*assigned, f"train.seed={seed}"])


def _carry_out(job: Callable[..., Run], recipe: config.Recipe, folder: Path, keep: bool) -> Run:
    """Train into the folder, anew or going on."""
    begun = Run(folder, recipe, "student").has_begun
    if begun and not keep:
        log.info("%s holds an earlier demo's run: it is replaced", folder)
    try:
        return job(recipe, out=folder, resume=begun and keep, overwrite=not keep)
    except OtherRunError as error:
        raise AcamkdError(f"{folder} was trained with another seed: leave out --keep, or name another --out") from error


def _teacher(recipe: config.Recipe) -> TaskModel:
    """The recipe's teacher, of a run whose class names are known."""
    assert recipe.teacher is not None
    assert recipe.data.classes is not None
    return models.build(recipe.teacher, recipe.task, len(recipe.data.classes), recipe.data.resize, teacher=True)


def _cost(model: TaskModel) -> dict[str, float]:
    batch = model.prepare([torch.rand(3, *SIZE)])
    with torch.no_grad():
        model(batch)
        milliseconds = median_milliseconds(lambda: model(batch))
    return {"parameters": count_parameters(model.net), "milliseconds": milliseconds}


def _block(networks: Mapping[str, TaskModel], distilled: Run, result: Mapping[str, Any]) -> Block:
    """Draw the networks' predictions on the first validation images, and ACAM's masks."""
    recipe = distilled.recipe
    samples = data.build(recipe.data, recipe.task, "val", seed=0, augment=False)
    images = [samples[index][0] for index in range(SHOWN)]
    truths = [samples[index][1] for index in range(SHOWN)]
    findings = [truths, *(network.predict(images) for network in networks.values())]
    masks = spatial_masks(distilled, images)
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
    """Draw a target or prediction on an enlarged image."""
    arrays = {name: x.numpy() for name, x in found.items()}
    if "mask" in arrays:
        arrays = {"mask": enlarge(arrays["mask"])}
    else:
        kept = arrays.get("scores", np.ones(len(arrays["boxes"]))) >= MIN_SCORE
        arrays = {"boxes": ENLARGEMENT * arrays["boxes"][kept], "labels": arrays["labels"][kept]}
    return draw_predictions(enlarge(_array(image)), arrays, recipe.data.classes or (), with_names=False, opacity=0.75)


def spatial_masks(run: Run, images: Sequence[Tensor]) -> Tensor:
    """Final spatial masks of a distilled run's first loss: (N, M, H, W) for N images."""
    student, teacher = run.load(), _teacher(run.recipe)
    distiller = build_distiller(student, teacher, run.recipe.losses)
    # The masks belong to the loss. Only the checkpoint holds the loss, together with the last student.
    state = torch.load(run.checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    distiller.load_state_dict({name.removeprefix("distiller."): value for name, value in state.items()})
    batch, (pair, loss) = student.prepare(images), distiller.levels[0]
    assert pair is not None
    student_map, teacher_map = (
        probe(model, [name], batch)[name] for model, name in zip((student, teacher), pair, strict=True)
    )
    return loss.masks(student_map, teacher_map)["spatial"]


def _table(results: Mapping[Task, Mapping[str, Any]]) -> Table:
    table = Table("task", "network", *(Column(title, justify="right") for title in ("metric", "parameters", "ms")))
    for task, result in results.items():
        for name, title in TITLES.items():
            cost = result["costs"][name]
            table.add_row(
                task if name == "teacher" else "", title, f"{result['metric']} {result[name]:.2f}",
                f"{cost['parameters']:,}", f"{cost['milliseconds']:.1f}", end_section=name == "distilled",
            )  # fmt: skip
    table.caption = f"metric in percent; ms: median CPU time of one forward over one {SIZE[1]} x {SIZE[0]} image"
    return table
