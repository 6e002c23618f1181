from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

import tiny
from acamkd.engine.runs import open_run
from acamkd.errors import AcamkdError
from acamkd.jobs.evaluate import evaluate
from acamkd.jobs.train import train
from acamkd.models.base import Task


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_the_figures_are_those_of_the_best_epoch(tmp_path: Path, task: Task) -> None:
    root = tiny.write_data(tmp_path / "data", task)
    metrics = train(tiny.recipe(root, task, epochs=2), out=tmp_path / "run").metrics
    best = {name: math.nan if score is None else score for name, score in metrics["student"].items()}
    assert evaluate(open_run(tmp_path / "run")) == pytest.approx(best, nan_ok=True)
    assert len(best) > 5

    shutil.move(root, tmp_path / "moved")
    shutil.move(tmp_path / "run", tmp_path / "elsewhere")
    run = open_run(tmp_path / "elsewhere", [f"data.root={tmp_path / 'moved'}"])
    assert evaluate(run) == pytest.approx(best, nan_ok=True)
    with pytest.raises(AcamkdError, match=r"cannot read .*data.*: No such file or directory"):
        evaluate(open_run(tmp_path / "elsewhere"))


def test_the_test_split_is_the_recipes_own(tmp_path: Path) -> None:
    root = tiny.write_data(tmp_path / "data")
    run = train(tiny.recipe(root, epochs=1), out=tmp_path / "run")
    with pytest.raises(AcamkdError, match=r"has no `data.test`"):
        evaluate(run, split="test")
    named = ["data.test.images=images/train", "data.test.masks=masks/train"]
    on_training = evaluate(run, overrides=["data.val.images=images/train", "data.val.masks=masks/train"])
    assert evaluate(run, overrides=named, split="test") == pytest.approx(on_training, nan_ok=True)
    assert evaluate(run, overrides=named) == pytest.approx(evaluate(run), nan_ok=True)


def test_a_teacher_run_gives_the_teacher(tmp_path: Path) -> None:
    root = tiny.write_data(tmp_path / "data")
    best = train(tiny.recipe(root, epochs=1), "teacher", out=tmp_path / "run").metrics["teacher"]
    assert evaluate(open_run(tmp_path / "run")) == pytest.approx(best)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["teacher"] == pytest.approx(best)
