"""The demo of one task: the scenes, both trainings, and the sheet of what the networks find."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from acamkd import config, data
from acamkd.data.scenes import CLASSES, write_scenes
from acamkd.distillation.build import build_distiller
from acamkd.distillation.taps import probe
from acamkd.engine.cost import median_milliseconds
from acamkd.engine.metrics import METRICS
from acamkd.engine.runs import OtherRunError, Run
from acamkd.errors import AcamkdError
from acamkd.files import write_json
from acamkd.jobs.demo.layout import NOTES, SHEET, SIZE, TITLES
from acamkd.jobs.fit import count_parameters
from acamkd.jobs.train import distill, train
from acamkd.models.base import Prediction, Task, TaskModel, head_of
from acamkd.report.run import REPORT
from acamkd.report.visualize import (
    ENLARGEMENT,
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

FIRST_SEED = 2
"""Seed of the scenes of demo 0, and so on; the teachers learned from those of seed 1."""

SHOWN, MIN_SCORE = 3, 0.5
"""Validation images on the sheet, the first ones, and the score from which boxes are drawn there."""


def run_task(task: Task, out: Path, seed: int, keep: bool) -> None:
    """Draw, train twice, and write `metrics.json` and `pictures.png` into `out/TASK`; arguments as `demo` has them."""
    recipe, metric = read_recipe(task, out, seed), METRICS[task]
    write_scenes(
        recipe.data.root, train=LABELED, val=VAL, unlabeled=UNLABELED, size=SIZE, seed=FIRST_SEED + seed, task=task
    )
    log.info("training 1 of 2: the baseline, on %d labeled images", LABELED)
    baseline = _carry_out(train, recipe, out / task / "baseline", keep)
    log.info("training 2 of 2: the same student, distilled on these and %d unlabeled images", UNLABELED)
    distilled = _carry_out(distill, recipe, out / task / "distilled", keep)
    networks = {
        "teacher": head_of(distilled.load_teacher()),
        "baseline": baseline.load(),
        "distilled": distilled.load(),
    }
    result = {
        "metric": metric,
        "teacher": distilled.metrics["teacher"][metric],
        "baseline": baseline.metrics["student"][metric],
        "distilled": distilled.metrics["student"][metric],
        "costs": {name: _cost(network) for name, network in networks.items()},
        "report": (distilled.folder / REPORT).relative_to(out / task).as_posix(),
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
        raise AcamkdError(f"{error.what}: without --keep the demo replaces it") from error


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
    student, teacher = run.load(), run.load_teacher()
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
