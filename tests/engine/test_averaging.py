"""What several processes report is what the first one saves: statistics of batch norm, and averaged weights."""

from __future__ import annotations

from pathlib import Path

import pytest

import leaving
import tiny
from acamkd.engine.runs import open_run
from acamkd.jobs.evaluate import evaluate
from acamkd.jobs.train import train


@pytest.mark.parametrize("ema", [None, 0.9])
def test_what_two_processes_report_is_what_they_saved(ema: float | None, tmp_path: Path) -> None:
    recipe = tiny.recipe(tiny.write_data(tmp_path / "data"), epochs=1, batch_size=2, devices=2, ema=ema)
    assert leaving.together(lambda _: train(recipe, out=tmp_path / "run")) == [0, 0]
    run = open_run(tmp_path / "run", ["train.devices=1"])
    reported = {name: value for name, value in run.metrics["student"].items() if value is not None}
    found = evaluate(run)
    assert {name: found[name] for name in reported} == reported
