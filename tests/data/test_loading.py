from __future__ import annotations

import multiprocessing
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data._utils.pin_memory import pin_memory

import leaving
import tiny
from acamkd import data
from acamkd.data import loading
from acamkd.data.loading import ImageLoader, _packed
from acamkd.errors import AcamkdError


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


@pytest.mark.parametrize(("method", "message"), [
    ("spawn", r"before it read any\. Such a process first imports the script .* `if __name__ == \"__main__\":`"),
    ("fork", r"the last that it read was none\. If memory ran out"),
])  # fmt: skip
def test_a_script_without_a_main_guard_is_told_of_it(
    method: str, message: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "_be_ended", lambda _: os._exit(1))  # as the import of such a script ends
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda *_: method)
    loader = _loader(root, workers=1, batches=1)
    with pytest.raises(AcamkdError, match=message), data.reading(loader):
        next(iter(loader))


def test_a_batch_is_pinned_as_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU copies pinned memory beside the program; here the pinning itself is left out."""
    pinned: list[Tensor] = []

    def pin(self: Tensor) -> Tensor:
        pinned.append(self)
        return self.clone()

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    samples = [(torch.rand(3, 4, 5), {"labels": torch.tensor([k])}) for k in range(3)]
    block: Any = pin_memory(_packed(samples))  # type: ignore[no-untyped-call]
    images, targets = block.unpacked()
    assert len(pinned) == 1
    assert all(torch.equal(image, given) for image, (given, _) in zip(images, samples, strict=True))
    assert [target["labels"].item() for target in targets] == [0, 1, 2]
