"""No way out of a job leaves processes behind that load images, or waits for them for ever."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import _utils, get_worker_info

import leaving
import tiny
from acamkd import config, data
from acamkd.data import dataset
from acamkd.data.image_io import read_image
from acamkd.data.loading import ImageLoader, Images
from acamkd.distillation.distiller import Distiller
from acamkd.engine.metrics import Scorer
from acamkd.engine.module import TrainingModule
from acamkd.engine.runs import TERMINATED
from acamkd.errors import AcamkdError
from acamkd.jobs.evaluate import evaluate
from acamkd.jobs.tokens import learn_tokens
from acamkd.jobs.train import distill, train


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_data(tmp_path_factory.mktemp("data"))


def _recipe(root: Path, **sections: Any) -> config.Recipe:
    raw = tiny.raw_recipe(root, epochs=2, batch_size=2)
    raw["data"]["workers"] = 2
    return config.parse(raw | sections)


def _loader(root: Path) -> ImageLoader:
    recipe = _recipe(root)
    images = data.build(recipe.data, recipe.task, "val", seed=0, augment=False)
    return data.loader(images, 2, 2, shuffle=False, seed=0)


def _interrupt() -> None:
    raise KeyboardInterrupt


def _run_out_of_memory() -> None:
    raise torch.OutOfMemoryError("out of memory")


@pytest.mark.parametrize(
    ("end", "code"),
    [
        (_run_out_of_memory, 1),
        (_interrupt, 130),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), TERMINATED),
    ],
    ids=["fails", "Ctrl-C", "SIGTERM"],
)
def test_a_run_that_stops_in_its_first_epoch_ends(
    end: Callable[[], None], code: int, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = TrainingModule.training_step

    def step(self: TrainingModule, batch: Images, batch_idx: int) -> Tensor:
        if batch_idx == 1:
            end()
        return original(self, batch, batch_idx)

    monkeypatch.setattr(TrainingModule, "training_step", step)
    assert leaving.run(lambda: distill(_recipe(root), out=tmp_path / "run")) == code


def test_a_script_that_ends_with_an_open_loader_ends(root: Path) -> None:
    def script() -> None:
        loader = _loader(root)
        script.__dict__["kept"] = iter(loader)  # as a global of the script's
        next(script.__dict__["kept"])

    assert leaving.run(script) == 0


def _train(recipe: config.Recipe, folder: Path) -> object:
    return train(recipe, out=folder)


def _distill(recipe: config.Recipe, folder: Path) -> object:
    return distill(recipe, out=folder)


def _calibrate(recipe: config.Recipe, folder: Path) -> object:
    return distill(recipe, out=folder, overrides=["losses.0.weight=auto"])


def _tokens(recipe: config.Recipe, folder: Path) -> object:
    tokens = ["losses.0.name=maskd", "losses.0.num_tokens=2"]
    return learn_tokens(config.override(recipe, tokens), out=folder / "tokens.safetensors", iterations=2)


@pytest.mark.parametrize(
    ("job", "place", "name"),
    [
        (_train, TrainingModule, "training_step"),
        (_train, TrainingModule, "on_validation_epoch_end"),
        (_distill, Scorer, "update"),  # of the teacher
        (_calibrate, Distiller, "forward"),
        (_tokens, Scorer, "update"),
    ],
)
def test_no_loading_process_outlives_a_job_that_fails(
    job: Callable[[config.Recipe, Path], object], place: type, name: str,
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    seen: list[int] = []

    def fail(*_: object, **__: object) -> None:
        seen.append(len(multiprocessing.active_children()))
        raise ZeroDivisionError

    monkeypatch.setattr(place, name, fail)
    with pytest.raises(ZeroDivisionError):
        job(_recipe(root), tmp_path / "run")
    assert seen[0] >= 2
    assert multiprocessing.active_children() == []


def test_no_loading_process_outlives_a_job(root: Path, tmp_path: Path) -> None:
    run = train(_recipe(root), out=tmp_path / "run")
    assert multiprocessing.active_children() == []
    evaluate(run)
    assert multiprocessing.active_children() == []


def test_a_process_amid_an_endless_image_is_killed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = multiprocessing.Event()

    def endless(file: Path) -> Tensor:
        if get_worker_info():
            begun.set()
            time.sleep(1000)
        return read_image(file)

    monkeypatch.setattr(dataset, "read_image", endless)
    monkeypatch.setattr(_utils, "MP_STATUS_CHECK_INTERVAL", 0.1)
    loader = _loader(root)
    loader._iterator = loader._get_iterator()
    assert begun.wait(60)
    loader.close()
    assert multiprocessing.active_children() == []


def test_a_closed_loader_begins_anew(root: Path) -> None:
    loader = _loader(root)
    first = [image for images, _ in loader for image in images]
    loader.close()
    assert multiprocessing.active_children() == []
    with data.reading(loader):
        again = [image for images, _ in loader for image in images]
    assert len(again) == 4
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_the_death_of_a_process_that_loads_for_an_evaluation_names_its_image(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(_recipe(root), out=tmp_path / "run")

    def deadly(file: Path) -> Tensor:
        if get_worker_info():
            os.kill(os.getpid(), signal.SIGKILL)
        return read_image(file)

    monkeypatch.setattr(dataset, "read_image", deadly)
    with pytest.raises(AcamkdError, match=r"loads images .*; the last that it read was .*images/val.*\.jpg"):
        evaluate(run)
