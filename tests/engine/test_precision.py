"""A network trains in what `train.precision` says, and is scored in 32 bits everywhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny
from acamkd.engine.module import TrainingModule
from acamkd.jobs.evaluate import evaluate
from acamkd.jobs.train import train
from acamkd.models.base import Task, TaskModel


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_bf16_scores_as_evaluate_does(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, seen = tiny.write_data(tmp_path / "data", task), []
    step, predict = TrainingModule._terms, TaskModel.predict

    def terms(self: TrainingModule, *batch: object) -> object:
        seen.append(("train", torch.is_autocast_enabled(tiny.ACCELERATOR)))
        return step(self, *batch)  # type: ignore[arg-type]

    def predicted(self: TaskModel, images: list[torch.Tensor]) -> object:
        seen.append(("score", torch.is_autocast_enabled(tiny.ACCELERATOR)))
        return predict(self, images)

    monkeypatch.setattr(TrainingModule, "_terms", terms)
    monkeypatch.setattr(TaskModel, "predict", predicted)
    run = train(tiny.recipe(root, task, epochs=1, precision="bf16-mixed"), out=tmp_path / "run")
    assert set(seen) == {("train", True), ("score", False)}
    found = {name: value for name, value in run.metrics["student"].items() if value is not None}
    scores = evaluate(run)
    assert found == {name: value for name, value in scores.items() if value == value}
    assert found
