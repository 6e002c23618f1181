"""Makes the weights that stand beside this file: `python -m acamkd.jobs.demo.make_weights FOLDER`.

A teacher per task learns from thousands of scenes. The student's backbone is pretrained on scenes of other classes, as
one would take a backbone that ImageNet's images have trained. Each file of weights, in half precision, has a JSON file
with its scores, settings, machine and versions beside it.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

from torch import Tensor

from acamkd import config, data
from acamkd.data.scenes import KINDS, OTHER_KINDS, write_scenes
from acamkd.engine.metrics import METRICS, score, scorer_of
from acamkd.engine.runs import Run
from acamkd.files import write_json
from acamkd.jobs.demo.layout import SIZE
from acamkd.jobs.demo.one_task import read_recipe
from acamkd.jobs.train import train
from acamkd.models.base import Task, head_of
from acamkd.models.weights import save_tensors

SCENES, VAL, SEED = 6000, 200, 1
"""Scenes to learn from, scenes to score on, and the seed of both, which no demo has."""

SETTINGS = (
    "train.epochs=12", "train.batch_size=16", "train.eval_every=2", "data.augment={}", "data.unlabeled=null",
    "teacher.weights=null",
)  # fmt: skip

PRETRAINING = (
    *SETTINGS, "student.backbone_weights=null", f"data.classes=[background, {', '.join(OTHER_KINDS)}]",
)  # fmt: skip


def make_teacher(task: Task, folder: Path) -> None:
    """Train the teacher of one task, and write `TASK_teacher.safetensors` and its JSON file into the folder."""
    run = _train(task, folder / task, "teacher", SETTINGS)
    file = folder / f"{task}_teacher.safetensors"
    _save(run.load().net.state_dict(), file)
    # Scored as it was written, rounding included.
    rounded = replace(run, recipe=config.override(run.recipe, [f"teacher.weights={json.dumps(str(file))}"]))
    images = data.build(run.recipe.data, task, "val", seed=0, augment=False)
    batches = data.loader(images, 16, 0, shuffle=False, seed=0)
    _note(run, file, score(head_of(rounded.load_teacher()), batches, scorer_of(run.recipe, images.classes)), SETTINGS)


def make_backbone(folder: Path) -> None:
    """Train the student's segmenter on other classes, and write its backbone as `backbone.safetensors`."""
    run = _train("segmentation", folder / "pretraining", "student", PRETRAINING)
    file = folder / "backbone.safetensors"
    encoder = run.load().net.get_submodule("encoder.model")  # timm's network in the segmenter
    _save(encoder.state_dict(), file)
    _note(run, file, run.metrics["student"], PRETRAINING)


def _train(task: Task, folder: Path, role: Literal["teacher", "student"], settings: tuple[str, ...]) -> Run:
    recipe = config.override(read_recipe(task, folder, seed=0), settings)
    kinds = KINDS if role == "teacher" else OTHER_KINDS
    write_scenes(recipe.data.root, train=SCENES, val=VAL, size=SIZE, seed=SEED, task=task, kinds=kinds)
    return train(recipe, role, out=folder / "run", resume=True)


def _save(state: Mapping[str, Tensor], file: Path) -> None:
    save_tensors({name: x.half() if x.is_floating_point() else x for name, x in state.items()}, file)


def _note(run: Run, file: Path, scores: Mapping[str, float], settings: tuple[str, ...]) -> None:
    kept = {name: run.metrics[name] for name in ("parameters", "seconds", "machine", "versions")}
    write_json(file.with_suffix(".json"), {"scores": scores, "settings": settings, **kept})


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    make_backbone(Path(sys.argv[1]))
    for each in METRICS:
        make_teacher(each, Path(sys.argv[1]))
