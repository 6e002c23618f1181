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
from safetensors.torch import load_file

from acamkd import config
from acamkd.engine.runs import open_run
from acamkd.errors import AcamkdError
from acamkd.jobs.demo import demo, make_weights, one_task
from acamkd.models.base import Task

NETWORKS = {"teacher", "baseline", "distilled"}
METRICS = {"detection": "mAP", "segmentation": "mIoU"}


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """One epoch on a handful of images."""
    packaged = one_task.read_recipe

    def one_epoch(task: Task, out: Path, seed: int) -> config.Recipe:
        recipe = packaged(task, out, seed)
        train = recipe.train.model_copy(update={"epochs": 1, "eval_every": 1})
        return recipe.model_copy(update={"train": train})

    for name, value in {"LABELED": 8, "UNLABELED": 8, "VAL": 4, "SHOWN": 1}.items():
        monkeypatch.setattr(one_task, name, value)
    monkeypatch.setattr(one_task, "read_recipe", one_epoch)


@pytest.mark.usefixtures("_small", "reports")
@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_a_task_leaves_figures_images_and_runs(task: Task, tmp_path: Path) -> None:
    shown = demo.demo(tmp_path, task=task)
    folder = tmp_path / task
    result = json.loads((folder / "metrics.json").read_text())
    assert shown.results == {task: result}
    assert result["metric"] == METRICS[task]
    assert result["teacher"] > 40  # it comes trained
    assert all(0 <= result[name] <= 100 for name in NETWORKS)
    assert set(result["costs"]) == NETWORKS
    assert result["costs"]["teacher"]["parameters"] > result["costs"]["baseline"]["parameters"]
    assert "unlabeled" in (folder / "distilled/recipe.yaml").read_text()
    with Image.open(folder / "pictures.png") as sheet:
        assert sheet.width == 1200
    for word in (task, METRICS[task], "baseline", "distilled student", "acamkd init FOLDER"):
        assert word in str(shown)
    report = folder / "distilled/report.html"
    assert report.is_file()
    assert str(report) in str(shown).replace("\n", "")


PROGRAM = """
import json, pathlib, sys, time
words = dict(zip(sys.argv[4::2], sys.argv[5::2]))
print("12:00:00 epoch 1/2, mAP 3.0", file=sys.stderr)
if words["--seed"] == "9":
    print("error: no space left", file=sys.stderr)
    sys.exit(1)
folder = pathlib.Path(words["--out"], words["--task"])
folder.mkdir(parents=True)
costs = {name: {"parameters": 10, "milliseconds": 2.5} for name in ("teacher", "baseline", "distilled")}
scores = {"metric": "mAP", "teacher": 60.0, "baseline": 20.0, "distilled": 40.0, "costs": costs, "report": "page.html"}
(folder / "metrics.json").write_text(json.dumps(scores))
"""


def test_both_tasks_run_beside_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="acamkd")
    (tmp_path / "program.py").write_text(PROGRAM)
    popen = subprocess.Popen

    def start(command: list[str], **options: Any) -> Any:
        assert command[:4] == [sys.executable, "-m", "acamkd", "demo"]
        assert options["env"]["OMP_NUM_THREADS"]
        return popen([sys.executable, str(tmp_path / "program.py"), *command[1:]], **options)

    monkeypatch.setattr(subprocess, "Popen", start)
    results = demo.demo(tmp_path / "out", seed=4).results
    assert {task: result["distilled"] for task, result in results.items()} == {"detection": 40, "segmentation": 40}
    assert {"detection: epoch 1/2, mAP 3.0", "segmentation: epoch 1/2, mAP 3.0"} <= set(caplog.messages)
    with pytest.raises(AcamkdError, match="the demo of detection failed: no space left"):
        demo.demo(tmp_path / "out", seed=9)


@pytest.mark.usefixtures("_small")
def test_second_demo_replaces_the_runs_or_keeps_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = demo.demo(tmp_path, task="segmentation").results["segmentation"]
    image = tmp_path / "segmentation/data-seed0/images/val/00001.jpg"
    drawn = image.stat().st_mtime_ns
    baseline = tmp_path / "segmentation/baseline"
    with caplog.at_level(logging.INFO, logger="acamkd"):
        second = demo.demo(tmp_path, task="segmentation").results["segmentation"]
        assert image.stat().st_mtime_ns == drawn
        assert f"{baseline} holds an earlier demo's run: it is replaced" in caplog.messages
        assert [second[name] for name in NETWORKS] == [first[name] for name in NETWORKS]  # the same seed
        caplog.clear()
        trained = (baseline / "student.safetensors").stat().st_mtime_ns
        kept = demo.demo(tmp_path, task="segmentation", keep=True).results["segmentation"]
        assert [kept[name] for name in NETWORKS] == [first[name] for name in NETWORKS]
        assert (baseline / "student.safetensors").stat().st_mtime_ns == trained
        assert "epoch 1/1" not in caplog.text
    with pytest.raises(AcamkdError, match=r"made by another recipe or command .*train\.seed.*without --keep the demo"):
        demo.demo(tmp_path, task="segmentation", seed=3, keep=True)
    assert (tmp_path / "segmentation/data-seed3").is_dir()


@pytest.mark.usefixtures("_small")
def test_masks_come_from_the_trained_loss(tmp_path: Path) -> None:
    demo.demo(tmp_path, task="segmentation")
    run = open_run(tmp_path / "segmentation" / "distilled")
    images = [torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8) for _ in range(2)]
    masks = one_task.spatial_masks(run, images)
    assert masks.shape == (2, 6, 16, 16)
    assert masks.min() > 0
    assert masks.max() < 1
    content = torch.load(run.checkpoint, weights_only=True)
    content["state_dict"]["distiller.losses.0.selection.spatial"].zero_()
    torch.save(content, run.checkpoint)
    assert torch.equal(one_task.spatial_masks(run, images), torch.full_like(masks, 0.5))


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_packaged_recipes_download_nothing(task: Task, tmp_path: Path) -> None:
    recipe = one_task.read_recipe(task, tmp_path, seed=2)
    assert recipe.task == task
    assert recipe.data.root == tmp_path / task / "data-seed2"
    assert recipe.train.seed == 2
    assert [loss.name for loss in recipe.losses] == ["acam"]
    assert recipe.teacher is not None
    assert recipe.teacher.backbone_weights is None
    assert recipe.student.backbone_weights == str(one_task.HERE / "backbone.safetensors")


@pytest.mark.parametrize(
    ("name", "metric", "least"),
    [("detection_teacher", "AP50", 60), ("segmentation_teacher", "mIoU", 70), ("backbone", "mIoU", 60)],
)
def test_packaged_weights_are_small_and_say_where_they_come_from(name: str, metric: str, least: float) -> None:
    file = one_task.HERE / f"{name}.safetensors"
    assert file.stat().st_size < 3e6
    made = json.loads(file.with_suffix(".json").read_text())
    assert made["scores"][metric] > least
    settings = make_weights.PRETRAINING if name == "backbone" else make_weights.SETTINGS
    assert tuple(made["settings"]) == settings
    assert {"machine", "seconds", "versions"} <= set(made)


def test_the_program_that_makes_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SCENES": 16, "VAL": 4}.items():
        monkeypatch.setattr(make_weights, name, value)
    for name in ("SETTINGS", "PRETRAINING"):
        monkeypatch.setattr(make_weights, name, (*getattr(make_weights, name), "train.epochs=1", "train.eval_every=1"))
    make_weights.make_backbone(tmp_path)
    make_weights.make_teacher("segmentation", tmp_path)
    for name in ("backbone", "segmentation_teacher"):
        ours, made = (load_file(folder / f"{name}.safetensors") for folder in (one_task.HERE, tmp_path))
        assert {key: (x.shape, x.dtype) for key, x in made.items()} == {
            key: (x.shape, x.dtype) for key, x in ours.items()
        }
        scores = json.loads((tmp_path / f"{name}.json").read_text())["scores"]
        assert 0 < scores["mIoU"] < 40


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    data = tmp_path / "detection" / "data-seed0"
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
    for task in METRICS:
        entry = json.loads((tmp_path / task / "metrics.json").read_text())
        assert entry["teacher"] > entry["distilled"] > entry["baseline"] + 3, task
    assert seconds < 8 * 60
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 < 2 * 2**30
