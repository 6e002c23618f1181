from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

import tiny
from acamkd import config
from acamkd.data.dataset import ImageDataset
from acamkd.distillation.distiller import Distiller
from acamkd.engine.runs import Run
from acamkd.jobs import train
from acamkd.jobs.compare import trials
from acamkd.jobs.fit import hash_of
from acamkd.jobs.shared import SharedWork

SECOND = ["losses=[{name: cwd, pairs: [segmentation_head.0], weight: auto}]"]


def fail(*_: object, **__: object) -> None:
    raise AssertionError("this was to be shared")


def test_what_is_shared_is_not_done_again_and_changes_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = tiny.raw_recipe(tiny.write_data(tmp_path / "data"), epochs=1, batch_size=4)
    raw["data"]["augment"] = {"scale": [0.8, 1.2], "crop": [48, 48], "photometric": True}
    raw["data"]["unlabeled"] = "images/val"
    recipe, shared = config.parse(raw), SharedWork(tmp_path / "cache", 10**9)

    def run(name: str, *overrides: str, shared: SharedWork | None = None) -> Run:
        return train.distill(config.override(recipe, list(overrides)), out=tmp_path / name, shared=shared)

    alone = run("alone", *SECOND)
    run("first", shared=shared)
    monkeypatch.setattr(train, "score", fail)
    monkeypatch.setattr(Distiller, "_run_teacher", fail)
    sample = ImageDataset._sample

    def only_validation(self: ImageDataset, epoch: int, index: int) -> Any:
        return sample(self, epoch, index) if self.transform is None else fail()

    monkeypatch.setattr(ImageDataset, "_sample", only_validation)
    with pytest.raises(AssertionError, match="this was to be shared"):  # the first one had no `weight: auto`
        run("second", *SECOND, shared=shared)
    monkeypatch.undo()
    run("second", *SECOND, shared=shared)
    monkeypatch.setattr(train, "score", fail)
    monkeypatch.setattr(Distiller, "_run_teacher", fail)
    monkeypatch.setattr(ImageDataset, "_sample", only_validation)
    hashed = Mock(wraps=hash_of)
    monkeypatch.setattr(train, "hash_of", hashed)
    monkeypatch.setattr("acamkd.jobs.fit.hash_of", hashed)
    third = run("third", *SECOND, shared=shared)
    assert hashed.call_count == 2  # before the training and after it
    assert third.weights.read_bytes() == alone.weights.read_bytes()
    assert third.metrics["teacher"] == alone.metrics["teacher"]
    assert list(third.metrics["teacher"]) == list(alone.metrics["teacher"])
    assert tiny.rows(third.folder / "history.csv") == tiny.rows(alone.folder / "history.csv")


def test_a_trial_has_the_comparisons_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny.recipe(tmp_path)
    cached = config.override(recipe, ["compare.cache=20GB"])
    plain, exact, rounded = (
        trials.plan(each, ["acam"], 1, tmp_path)[1]
        for each in (recipe, cached, config.override(cached, ["compare.cache_precision=float16"]))
    )
    assert plain.key == exact.key != rounded.key
    given: list[Any] = []

    class Started(Exception):  # noqa: N818
        pass

    def job(recipe: config.Recipe, **options: Any) -> None:
        given.append((recipe.compare, options["shared"]))
        raise Started

    monkeypatch.setattr(train, "distill", job)
    for trial in (plain, exact, rounded):
        with pytest.raises(Started):
            trial.run(tmp_path)
    folder = Path("runs/tiny/cache")
    expected = [None, SharedWork(folder, 20 * 10**9), SharedWork(folder, 20 * 10**9, half=True)]
    assert given == [(config.Comparison(), each) for each in expected]


def test_feature_maps_of_another_forward_are_kept_apart(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path)
    batches: Any = SimpleNamespace(resolved=recipe)

    def identity(*folded: str, half: bool = False, **options: Any) -> str:
        colors = SimpleNamespace(mean=torch.zeros(3), std=torch.ones(3))
        distiller: Any = SimpleNamespace(teacher=colors, teacher_form=lambda _: f"{folded}", shared_maps=None)
        SharedWork(tmp_path, 10**9, half=half).share_maps(distiller, batches, "teacher", **options)
        found: str = distiller.shared_maps.shelf.identity
        return found

    assert identity() == identity()
    others = [identity(half=True), identity("layer1.bn1"), identity("layer1.bn2"), identity(calibrating=True)]
    assert len({identity(), *others}) == 5
