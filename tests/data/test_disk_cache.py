from __future__ import annotations

import errno
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from acamkd import config, data
from acamkd.data.disk_cache import ABANDONED, RESERVE, TRIES, DiskCache, MemoryCache, Shelf
from acamkd.data.image_io import read_image
from acamkd.data.scenes import write_scenes


def filled(size: int = 8) -> dict[str, Tensor]:
    channels_last = torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last)
    mask = torch.randint(0, 256, (size, size))
    return {"b": channels_last, "mask": mask, "a|b": torch.rand(3, 2).T, "half": torch.rand(2).half(),
            "ids": torch.tensor([-1, 300]), "none": torch.empty(0, dtype=torch.int64)}  # fmt: skip


@pytest.mark.parametrize("kind", ["disk", "memory"])
def test_tensors_come_back_as_they_were(kind: str, tmp_path: Path) -> None:
    cache: Any = DiskCache(tmp_path) if kind == "disk" else MemoryCache()
    given = filled()
    assert cache.get("key") is None
    cache.put("key", given)
    found = cache.get("key")
    assert list(found) == list(given)
    for name, tensor in given.items():
        assert torch.equal(found[name], tensor)
        assert (found[name].dtype, found[name].stride()) == (tensor.dtype, tensor.stride())
        assert found[name].data_ptr() % 16 == 0
    found["mask"].zero_()
    assert torch.equal(cache.get("key")["mask"], given["mask"])


def test_masks_take_a_byte_per_pixel(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path)
    cache.put("key", {"mask": torch.full((100, 100), 255)})
    (file,) = tmp_path.rglob("*.safetensors")
    assert file.stat().st_size < 10_200


def test_half_a_file_is_none(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path)
    cache.put("key", filled())
    (file,) = tmp_path.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-7])
    assert cache.get("key") is None
    cache.put("key", filled())
    assert cache.get("key") is not None


def test_it_ends_at_its_limit_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = {"x": torch.zeros(1000)}
    left = tmp_path / "00" / ".left"
    left.parent.mkdir()
    left.write_bytes(bytes(15_000))
    os.utime(left, (0, time.time() - ABANDONED - 9))  # of a killed process
    cache = DiskCache(tmp_path, limit=20_000)
    for key in range(9):
        cache.put(str(key), content)
    assert not left.exists()
    files = list(tmp_path.rglob("*.safetensors"))
    assert 2 <= len(files) < 9
    assert sum(file.stat().st_size for file in files) <= 20_000
    assert cache.is_full
    assert caplog.text.count("keeps nothing more (its limit of 2e-05 GB is reached, or its disk has") == 1
    assert cache.get("0") is not None
    DiskCache(tmp_path, limit=20_000).put("9", content)
    assert caplog.text.count("keeps nothing more") == 2


@pytest.mark.parametrize("how", ["full", "small", "read-only"])
def test_a_full_disk_ends_it_and_not_the_training(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if how == "full":
        monkeypatch.setattr(Path, "write_bytes", fail)
    elif how == "small":
        monkeypatch.setattr("acamkd.data.disk_cache.RESERVE", RESERVE)  # tests/conftest.py has another
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=RESERVE))
    else:
        monkeypatch.setattr(Path, "mkdir", fail)
    cache = DiskCache(tmp_path)
    cache.put("key", {"x": torch.zeros(9)})
    cache.put("key", {"x": torch.zeros(9)})
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == []
    assert caplog.text.count("keeps nothing more") == 1


def test_what_is_there_is_not_computed(tmp_path: Path) -> None:
    asked: list[list[str]] = []

    def compute(keys: list[str]) -> dict[str, dict[str, Tensor]]:
        asked.append(keys)
        time.sleep(0.02)
        return {key: {"x": torch.tensor(ord(key))} for key in keys}

    def shelf(identity: str) -> Shelf:
        return Shelf(DiskCache(tmp_path), "letters", identity)

    for names in ("ab", "bc", "abc"):
        found = shelf("one").fetch(list(names), compute)
        assert {key: int(entry["x"]) for key, entry in found.items()} == {name: ord(name) for name in names}
    assert asked == [["a", "b"], ["c"]]
    shelf("other").fetch(["a"], compute)
    assert asked[2:] == [["a"]]


@pytest.mark.parametrize(("seconds", "pays"), [(10.0, True), (7.0, False)])
def test_it_is_left_where_it_does_not_pay(
    seconds: float, pays: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "acamkd")
    calls, now, get = 0, 0.0, DiskCache.get

    def reading(self: DiskCache, key: str) -> dict[str, Tensor] | None:
        nonlocal now
        now += 4.0
        return get(self, key)

    def compute(keys: list[str]) -> dict[str, dict[str, Tensor]]:
        nonlocal calls, now
        calls += 1
        now += seconds
        return {key: {"x": torch.zeros(1)} for key in keys}

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    monkeypatch.setattr(DiskCache, "get", reading)
    shelf = Shelf(DiskCache(tmp_path), "zeros", "")
    for key in range(TRIES):
        assert shelf.pays
        shelf.fetch([str(key)], compute)
    assert shelf.pays is pays
    shelf.fetch(["0"], compute)
    assert calls == TRIES + (not pays)
    assert ("it pays" if pays else "it would not pay and is left") in caplog.text


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_decoded_images_are_the_same_and_read_once(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_scenes(tmp_path / "data", train=2, val=1, size=(32, 32), seed=0, task="segmentation")
    options = config.Data(
        root=tmp_path / "data", classes=("background", *"abcde"), augment=config.Augmentation(crop=(24, 24))
    )
    images, plain = (data.build(options, "segmentation", "train", seed=0, augment=True) for _ in range(2))
    images.cache = Shelf(MemoryCache() if kind == "memory" else DiskCache(tmp_path / "cache"), "decoded", "")
    expected = [plain[key] for key in range(6)]
    read: list[Path] = []

    def reading(file: Path) -> Tensor:
        read.append(file)
        return read_image(file)

    monkeypatch.setattr("acamkd.data.dataset.read_image", reading)
    for key, (image, target) in enumerate(expected):
        found = images[key]
        assert torch.equal(found[0], image)
        assert torch.equal(found[1]["mask"], target["mask"])
    assert read == images.files
    os.utime(images.files[0], (0, 0))  # another file, as far as anybody can tell
    images[0]
    assert len(read) == 3
