"""Recipes that train in a second: drawn scenes of 64 pixels, the smallest backbone, a teacher with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml

from acamkd import config, models
from acamkd.data.scenes import CLASSES, write_scenes
from acamkd.jobs.compare.trials import Trial
from acamkd.models.base import Task
from tiny import ACCELERATOR

SIZE = (64, 64)

MODELS: dict[Task, dict[str, Any]] = {
    "detection": {
        "arch": "retinanet", "backbone": "test_efficientnet", "backbone_weights": None, "fpn_channels": 16,
        "options": {"anchor_sizes": [8, 16, 32, 48, 64]},
    },
    "segmentation": {
        "arch": "fpn", "backbone": "tu-test_efficientnet", "backbone_weights": None,
        "options": {"decoder_pyramid_channels": 32, "decoder_segmentation_channels": 32},
    },
}  # fmt: skip

PAIRS: dict[Task, str] = {"detection": "backbone:*", "segmentation": "segmentation_head.0"}


def write_recipe(folder: Path, task: Task, **sections: Any) -> Path:
    """Write images, a teacher's weights and `recipe.yaml` with one loss; 4 training images are 2 steps."""
    data = folder / "data"
    write_scenes(data, train=4, val=2, size=SIZE, seed=0, task=task)
    detection = task == "detection"
    splits = {
        split: {"images": f"images/{split}"}
        | ({"annotations": f"annotations/instances_{split}.json"} if detection else {"masks": f"masks/{split}"})
        for split in ("train", "val")
    }
    weights = folder / "teacher.safetensors"
    classes = len(CLASSES) if detection else 1 + len(CLASSES)
    torch.manual_seed(1)
    models.save_weights(models.build(config.Model(**MODELS[task]), task, classes, SIZE).net, weights)
    raw = {
        "task": task,
        "data": {"format": "coco" if detection else "masks", "root": str(data), "resize": list(SIZE), "workers": 0,
                 **splits, **({} if detection else {"classes": ["background", *CLASSES]})},
        "teacher": {**MODELS[task], "weights": str(weights)},
        "student": MODELS[task],
        "losses": [{"name": "fitnet", "pairs": [PAIRS[task]]}],
        "train": {"epochs": 1, "batch_size": 2, "accelerator": ACCELERATOR},
        **sections,
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return path


def fake(trial: Trial, results: Path, score: float, **more: Any) -> None:
    """Write what a comparison's trial of this score would have left."""
    results.mkdir(exist_ok=True)
    content = {
        "method": trial.method, "setting": trial.setting, "option": trial.option, "seed": trial.seed,
        "recipe": trial.key, "metric": "mIoU",
        "losses": [loss.model_dump(mode="json") for loss in trial.recipe.losses], "data": {"train": "a", "val": "b"},
        "teacher": {"sha256": "c" * 64, "mIoU": 50.0} if trial.recipe.losses else None,
        "history": [score], "final": {"mIoU": score}, "masks": {}, "wall_time": 120.0, "machine": "x86_64",
        "versions": {"acamkd": "0"}, **more,
    }  # fmt: skip
    (results / f"{trial.name}.json").write_text(json.dumps(content))
