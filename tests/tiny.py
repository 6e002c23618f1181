"""Data, a teacher and recipes that train in a second: drawn scenes, the smallest networks, no download."""

from __future__ import annotations

import copy
import csv
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from acamkd import config, models
from acamkd.data.scenes import CLASSES, write_scenes
from acamkd.engine.module import TrainingModule
from acamkd.engine.runs import Run
from acamkd.models.base import Task

ACCELERATOR = os.environ.get("ACAMKD_TEST_ACCELERATOR", "cpu")
"""Where the recipes train: `cuda` when benchmarks/gpu.py runs their tests on a GPU."""

FPN: dict[str, Any] = {
    "arch": "fpn",
    "backbone": "tu-test_efficientnet",
    "backbone_weights": None,
    "options": {"decoder_pyramid_channels": 32, "decoder_segmentation_channels": 32},
}
RETINANET: dict[str, Any] = {
    "arch": "retinanet",
    "backbone": "test_efficientnet",
    "backbone_weights": None,
    "fpn_channels": 16,
    "options": {"anchor_sizes": [8, 16, 32, 64, 96], "detections_per_img": 20},
}
VIT: dict[str, Any] = {
    "arch": "timm/vit_small_patch16_dinov3",
    "backbone_weights": None,
    "options": {"depth": 3, "embed_dim": 16, "num_heads": 2},
}
"""A teacher without a head."""
COSINE = {"name": "cosine", "pairs": [["encoder:4", "levels:0"]]}
ACAM = {"name": "acam", "pairs": ["segmentation_head.0"], "num_masks": 3, "masks": "both"}


def write_data(root: Path, task: Task = "segmentation") -> Path:
    """8 training and 4 validation images and, for segmentation, `teacher.safetensors` with random weights."""
    side = 64 if task == "segmentation" else 128
    write_scenes(root, train=8, val=4, size=(side, side), seed=0, task=task)
    if task == "segmentation":
        torch.manual_seed(1)
        net = models.build(config.Model(**FPN), task, 1 + len(CLASSES)).net
        models.save_weights(net, root / "teacher.safetensors")
    return root


def raw_recipe(root: Path, task: Task = "segmentation", **train: Any) -> dict[str, Any]:
    """A recipe as it would be read from YAML; `train` overrides that section."""
    splits: dict[str, Any] = {split: {"images": f"images/{split}"} for split in ("train", "val")}
    if task == "segmentation":
        for split in splits:
            splits[split]["masks"] = f"masks/{split}"
        splits |= {"format": "masks", "classes": ["background", *CLASSES]}
        networks: dict[str, Any] = {"teacher": {**FPN, "weights": str(root / "teacher.safetensors")}, "student": FPN}
    else:
        for split in splits:
            splits[split]["annotations"] = f"annotations/instances_{split}.json"
        splits["format"] = "coco"
        networks = {"student": RETINANET}
    content = {
        "name": "tiny",
        "task": task,
        "data": {**splits, "root": str(root), "workers": 0},
        **networks,
        "losses": [ACAM] if task == "segmentation" else [],
        "train": {"epochs": 2, "batch_size": 4, "accelerator": ACCELERATOR, **train},
    }
    return copy.deepcopy(content)  # tests change it


def recipe(root: Path, task: Task = "segmentation", **train: Any) -> config.Recipe:
    """The same, validated."""
    return config.parse(raw_recipe(root, task, **train))


def rows(file: Path) -> list[dict[str, str]]:
    """Rows of a CSV, without the time that they took."""
    with file.open(newline="") as lines:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(lines)]


def interrupt_at(monkeypatch: pytest.MonkeyPatch, epoch: int, batch: int) -> None:
    """Let a training be interrupted, as by Ctrl-C, where it comes to this batch."""
    step = TrainingModule.training_step

    def stop(self: TrainingModule, batch_: Any, batch_idx: int) -> Tensor:
        if (self.current_epoch, batch_idx) == (epoch, batch):
            raise KeyboardInterrupt
        return step(self, batch_, batch_idx)

    monkeypatch.setattr(TrainingModule, "training_step", stop)


def resumed(monkeypatch: pytest.MonkeyPatch, job: Callable[..., Run], recipe: config.Recipe, folder: Path) -> Run:
    """A run that was interrupted at the second batch of its second epoch, and resumed."""
    with monkeypatch.context() as patch:
        interrupt_at(patch, epoch=1, batch=1)
        with pytest.raises(KeyboardInterrupt):
            job(recipe, out=folder)
    return job(recipe, out=folder, resume=True)


def assert_same(one: Path, other: Path) -> None:
    """Two run folders have the same figures and weights, to the bit."""
    for table in ("history.csv", "logs/metrics.csv"):
        assert rows(one / table) == rows(other / table)
    weights, others = ({file.name: file.read_bytes() for file in run.glob("*.safetensors")} for run in (one, other))
    assert weights == others != {}


def in_notebook(result: Any) -> dict[str, str]:
    """What a notebook shows of a result, by MIME type."""
    bundle: dict[str, str] = result._repr_mimebundle_([], [])
    return bundle
