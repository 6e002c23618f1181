from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch

import leaving
import tiny
from acamkd import data
from acamkd.data.loading import ImageLoader


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_data(tmp_path_factory.mktemp("data"), "detection")


def _loader(root: Path, workers: int, batches: int) -> ImageLoader:
    recipe = tiny.recipe(root, "detection")
    images = data.build(recipe.data, recipe.task, "train", seed=0, augment=True)
    return data.loader(images, 8, workers, shuffle=True, seed=0, batches=batches)


def test_a_batch_keeps_one_file_open_however_many_tensors_it_holds(root: Path) -> None:
    def job() -> None:
        count = len(os.listdir("/dev/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (count + 40, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        kept = list(_loader(root, workers=2, batches=8))  # 8 batches of 8 images with 4 tensors each as target
        assert len(kept) == 8
        assert len(os.listdir("/dev/fd")) < count + 30

    assert leaving.run(job) == 0


def test_what_another_process_loads_is_what_this_one_loads(root: Path) -> None:
    found: list[list[Any]] = []
    for workers in (0, 2):
        loader = _loader(root, workers, batches=2)
        with data.reading(loader):
            found.append(list(loader))
    for here, there in zip(*found, strict=True):
        torch.testing.assert_close(here, there, rtol=0, atol=0)
        assert [type(part) for part in here] == [type(part) for part in there] == [list, list]
