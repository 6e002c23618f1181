from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

import tiny
from acamkd.engine import heartbeat
from acamkd.jobs.train import train


def test_without_a_bar_the_first_epoch_says_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(heartbeat, "FIRST", 0.0)
    recipe = tiny.recipe(tiny.write_data(tmp_path / "data"), epochs=1)
    run = train(recipe, out=tmp_path / "run")
    (line,) = re.findall(r"epoch 1/1, batch .* left", caplog.text)  # the next one is due in a minute
    assert re.fullmatch(r"epoch 1/1, batch 1 of 2, [\d.e+-]+ steps a second, 0:00:\d\d left", line)
    assert line in (run.folder / "log.txt").read_text()
    monkeypatch.setattr(heartbeat, "FIRST", 1000.0)
    caplog.clear()
    train(recipe, out=tmp_path / "run", overwrite=True)
    assert "steps a second" not in caplog.text
