from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

import tiny
from acamkd import data, stopwatch
from acamkd.engine.step_profile import PROFILE, WARM_UP, Idleness, StepProfile, StepProfiler
from acamkd.errors import AcamkdError
from acamkd.jobs.train import distill
from acamkd.stopwatch import Stopwatch, running, timed


def test_the_parts_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("acamkd.stopwatch.time.perf_counter", lambda: now)
    with running(Stopwatch(whole=["closed"])) as watch, timed("outer"):
        now += 2
        with timed("inner"):
            now += 1
            with timed("outer"):
                now += 4
        with timed("closed"), timed("inner"):
            now += 8
    assert dict(watch.seconds) == {"outer": 6, "inner": 1, "closed": 8}
    with timed("later"):
        pass
    assert "later" not in watch.seconds
    assert stopwatch.current() is None


def test_a_training_says_where_its_time_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tiny.write_data(tmp_path / "data")
    run = distill(tiny.recipe(root, epochs=2, batch_size=2, eval_every=2), out=tmp_path / "run", profile=True)
    found = StepProfile.read(run.folder)
    assert (found.steps, found.images) == (8 - WARM_UP, 2 * (8 - WARM_UP))
    assert set(found.seconds) == {
        "waiting for data", "decoding", "augmentation", "collation", "transfer", "student", "teacher", "losses",
        "backward", "optimizer", "callbacks", "evaluation", "everything else",
    }  # fmt: skip
    assert 0 < sum(found.seconds.values()) < run.metrics["seconds"] + 0.1
    assert "4 steps, 8 images" in str(found)
    (run.folder / PROFILE).unlink()
    with pytest.raises(AcamkdError, match=rf"had no more than {WARM_UP} steps"):
        StepProfile.read(run.folder)


def test_processes_that_load_images_tell_their_times(tmp_path: Path) -> None:
    recipe = tiny.recipe(tiny.write_data(tmp_path))
    images = data.build(recipe.data, recipe.task, "train", seed=0, augment=True)
    loader = data.loader(images, 4, 1, shuffle=True, seed=0)
    with running(Stopwatch()) as watch, data.reading(loader):
        assert len(list(loader)) == 2
    assert set(watch.beside) == {"decoding", "augmentation", "collation"}
    assert watch.seconds == {}


def test_idleness_is_the_share_of_the_looks() -> None:
    answers = [True, True, False, True] * 3
    looks = Idleness(lambda: answers.pop() if answers else False)
    assert looks.share is None
    looks.start()
    while answers:
        time.sleep(0.001)
    looks.stop()
    assert looks.share is not None
    assert 0.5 < looks.share <= 0.75


def test_nothing_looks_at_the_gpu_after_a_training_has_failed(tmp_path: Path) -> None:
    profiler = StepProfiler(tmp_path, torch.device("cpu"))
    looks = profiler._gpu = Idleness(lambda: False)
    with pytest.raises(OSError), profiler.measuring():  # noqa: PT011, PT012
        for _ in range(WARM_UP):
            profiler.start("run_training_batch")
            profiler.stop("run_training_batch")
        assert looks._thread.is_alive()
        raise OSError
    assert not looks._thread.is_alive()
    assert stopwatch.current() is None
