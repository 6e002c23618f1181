from __future__ import annotations

import json
import logging
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from acamkd import config
from acamkd.engine.runs import open_run
from acamkd.errors import AcamkdError
from acamkd.jobs import demo
from acamkd.models.base import Task

NETWORKS = {"teacher", "student", "distilled"}
METRICS = {"detection": "mAP", "segmentation": "mIoU"}


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """One epoch on a handful of small images."""
    packaged = demo.read_recipe

    def one_epoch(task: Task, out: Path) -> config.Recipe:
        recipe = packaged(task, out)
        train = recipe.train.model_copy(update={"epochs": 1, "eval_every": 1})
        return recipe.model_copy(update={"train": train})

    for name, value in {"TRAIN_IMAGES": 8, "VAL_IMAGES": 4, "SIZE": (64, 64), "SHOWN": 1}.items():
        monkeypatch.setattr(demo, name, value)
    monkeypatch.setattr(demo, "read_recipe", one_epoch)


@pytest.mark.usefixtures("_small")
def test_both_tasks_leave_figures_images_and_runs(tmp_path: Path) -> None:
    shown = demo.demo(tmp_path)
    results = shown.results
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written == results
    assert set(written) == set(METRICS)
    for task, metric in METRICS.items():
        entry = written[task]
        assert set(entry) == {"metric"} | NETWORKS
        assert entry["metric"] == metric
        assert all(0 <= entry[name] <= 100 for name in NETWORKS)
    with Image.open(tmp_path / "pictures.png") as sheet:
        assert sheet.width == 1200
    table = str(shown)
    for word in ("detection", "segmentation", "mAP", "mIoU", "baseline", "distilled student"):
        assert word in table


@pytest.mark.usefixtures("_small")
def test_second_demo_replaces_the_runs_and_keeps_the_data(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = demo.demo(tmp_path, task="segmentation").results
    image = tmp_path / "segmentation" / "data" / "images" / "val" / "00001.jpg"
    drawn = image.stat().st_mtime_ns
    with caplog.at_level(logging.INFO, logger="acamkd"):
        second = demo.demo(tmp_path, task="segmentation").results
    assert image.stat().st_mtime_ns == drawn
    assert [record.message for record in caplog.records].count(
        f"{tmp_path / 'segmentation' / 'baseline'} holds an earlier demo's run: it is replaced"
    ) == 1
    assert "segmentation, training 3 of 3" in caplog.text
    for network in NETWORKS:  # the same seed: the same networks
        assert second["segmentation"][network] == first["segmentation"][network]


@pytest.mark.usefixtures("_small")
def test_masks_come_from_the_trained_loss(tmp_path: Path) -> None:
    demo.demo(tmp_path, task="segmentation")
    run = open_run(tmp_path / "segmentation" / "distilled")
    images = [torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8) for _ in range(2)]
    masks = demo.spatial_masks(run, images)
    assert masks.shape == (2, 6, 16, 16)
    assert masks.min() > 0
    assert masks.max() < 1
    content = torch.load(run.checkpoint, weights_only=True)
    content["state_dict"]["distiller.losses.0.selection.spatial"].zero_()
    torch.save(content, run.checkpoint)
    assert torch.equal(demo.spatial_masks(run, images), torch.full_like(masks, 0.5))


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_packaged_recipes_share_everything_but_the_networks(task: Task, tmp_path: Path) -> None:
    recipe = demo.read_recipe(task, tmp_path)
    assert recipe.task == task
    assert recipe.data.root == tmp_path / task / "data"
    assert [loss.name for loss in recipe.losses] == ["acam"]
    for model in (recipe.teacher, recipe.student):
        assert model is not None
        assert model.backbone_weights is None  # nothing is downloaded


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    data = tmp_path / "detection" / "data"
    data.mkdir(parents=True)
    (data / "mine.txt").write_text("precious")
    with pytest.raises(AcamkdError, match="holds something else"):
        demo.demo(tmp_path, task="detection")
    assert (data / "mine.txt").read_text() == "precious"


@pytest.mark.slow
def test_whole_demo_stays_within_its_time_and_memory(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    started = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "acamkd.cli", "demo", "--out", str(tmp_path)], check=True, env=environment, timeout=1800
    )
    seconds = time.monotonic() - started
    results: dict[str, Any] = json.loads((tmp_path / "metrics.json").read_text())
    for task, entry in results.items():
        assert entry["teacher"] > entry["student"] + 3, task
    assert seconds < 8 * 60
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 < 4 * 2**30
