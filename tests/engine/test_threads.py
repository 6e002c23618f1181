from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from acamkd.engine.threads import ROUNDS, STEPS, ThreadChoice
from acamkd.jobs.train import train


class Machine:
    """Stands in for torch's threads and for the clock: a step takes as long as `seconds` says for its threads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int, seconds: dict[int, float]) -> None:
        self.count, self.seconds, self.now = count, seconds, 0.0
        self.steps: list[int] = []
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.setattr(torch, "get_num_threads", lambda: self.count)
        monkeypatch.setattr(torch, "set_num_threads", self.set)
        monkeypatch.setattr("acamkd.engine.threads.time.perf_counter", lambda: self.now)

    def set(self, count: int) -> None:
        self.count = count

    def train(self, choice: ThreadChoice, steps: int) -> None:
        trainer: Any = type("Trainer", (), {"world_size": 1, "strategy": type("S", (), {"root_device": CPU})})
        choice.on_train_start(trainer, None)  # type: ignore[arg-type]
        for step in range(steps):
            choice.on_train_batch_start(trainer, None, None, step)  # type: ignore[arg-type]
            self.now += self.seconds[self.count]
            self.steps.append(self.count)
            choice.on_train_batch_end(trainer, None, None, None, step)  # type: ignore[arg-type]
        self.ended_with = self.count
        choice.teardown(trainer, None, "fit")  # type: ignore[arg-type]


CPU = torch.device("cpu")


def test_the_fastest_number_of_threads_is_kept(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    machine, choice = Machine(monkeypatch, 4, {4: 0.05, 2: 0.02, 1: 0.04}), ThreadChoice()
    machine.train(choice, 40)
    window = [4] * STEPS + [2] * STEPS + [1] * STEPS
    assert machine.steps == window * ROUNDS + [2] * (40 - ROUNDS * len(window))
    assert (choice.threads, machine.ended_with) == (2, 2)
    assert "2 of 4 threads from here on: 50 instead of 20 steps a second" in caplog.text
    assert machine.count == 4  # the rest of the program has its threads back


def test_large_networks_keep_all_threads_and_lose_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, choice = Machine(monkeypatch, 8, {8: 0.3}), ThreadChoice()
    machine.train(choice, 20)
    assert machine.steps == [8] * 20
    assert choice.threads == 8


def test_a_fixed_number_is_not_questioned(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, choice = Machine(monkeypatch, 8, {8: 0.1}), ThreadChoice()
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    machine.train(choice, 20)
    assert (machine.steps, choice.threads) == ([8] * 20, 8)


def test_a_resumed_run_takes_the_number_of_its_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, choice = Machine(monkeypatch, 4, {1: 0.1, 2: 0.01, 4: 0.01}), ThreadChoice()
    choice.load_state_dict({"threads": 1})
    machine.train(choice, 20)
    assert (machine.steps, choice.threads) == ([1] * 20, 1)


def test_a_training_measures_and_notes_its_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    tried: list[int] = []
    monkeypatch.setattr("acamkd.engine.threads.SMALL", float("inf"))  # however slow this machine is
    monkeypatch.setattr(torch, "get_num_threads", lambda: tried[-1] if tried else 2)
    monkeypatch.setattr(torch, "set_num_threads", tried.append)  # really all steps use one: quick beside other tests
    recipe = tiny.recipe(tiny.write_data(tmp_path / "data"), epochs=ROUNDS * STEPS)
    run = train(recipe, out=tmp_path / "run")
    assert tried[: 4 * STEPS] == ([2] * STEPS + [1] * STEPS) * 2
    assert tried[-1] == 2
    state = torch.load(run.checkpoint, weights_only=True)["callbacks"]["ThreadChoice"]
    assert state["threads"] in (1, 2)
    assert f"{state['threads']} thread" in run.metrics["machine"]
