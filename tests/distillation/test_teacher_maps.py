from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from acamkd.config import Model
from acamkd.data.disk_cache import DiskCache, Shelf
from acamkd.distillation.distiller import Distiller
from acamkd.distillation.teacher_maps import SharedMaps
from acamkd.losses import FitNet
from acamkd.models import Batch, TaskModel, build

SECTION = Model(
    arch="fpn", backbone="tu-mobilenetv3_small_050", backbone_weights=None,
    options={"decoder_pyramid_channels": 32, "decoder_segmentation_channels": 32},
)  # fmt: skip
LAYERS = {"segmentation_head.0": 3, "encoder:2": 8}


@pytest.fixture(scope="module")
def networks() -> tuple[TaskModel, TaskModel]:
    torch.manual_seed(0)
    return build(SECTION, "segmentation", 3, (32, 32)), build(SECTION, "segmentation", 3, (32, 32))


@pytest.fixture
def batch(networks: tuple[TaskModel, TaskModel]) -> Batch:
    masks = [{"mask": torch.randint(0, 3, (32, 32))} for _ in range(2)]
    return networks[0].prepare([torch.rand(3, 32, 32) for _ in range(2)], masks)


def distiller(networks: tuple[TaskModel, TaskModel], folder: Path | None, *layers: str, **options: Any) -> Distiller:
    torch.manual_seed(1)
    losses = [FitNet(LAYERS[layer], LAYERS[layer]) for layer in layers]
    found = Distiller(*networks, [(layer, layer) for layer in layers], losses)
    if folder is not None:
        found.shared_maps = SharedMaps(Shelf(DiskCache(folder), "maps", "teacher"), **options)
    return found


def no_forward(*_: object) -> None:
    raise AssertionError("the teacher ran")


def test_a_second_training_runs_no_teacher_and_gets_the_same(
    networks: tuple[TaskModel, TaskModel], batch: Batch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = distiller(networks, None, *LAYERS).teacher_maps(batch)
    first = distiller(networks, tmp_path, *LAYERS).teacher_maps(batch)
    monkeypatch.setattr(networks[1], "forward", no_forward)
    again = distiller(networks, tmp_path, *LAYERS)
    second = again.teacher_maps(batch)
    for name, x in plain.items():
        assert torch.equal(first[name], x)
        assert torch.equal(second[name], x)
        assert second[name].stride() == x.stride()
    assert len(again.train()(batch)) == 3  # the first step of a training, too
    others = networks[0].prepare([torch.rand(3, 32, 32) for _ in range(2)])
    with pytest.raises(AssertionError, match="the teacher ran"):
        again.teacher_maps(others)


def test_a_layer_that_is_missing_is_added(
    networks: tuple[TaskModel, TaskModel], batch: Batch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = distiller(networks, None, *LAYERS).teacher_maps(batch)
    asked: list[list[str]] = []
    run = Distiller._run_teacher

    def noted(self: Distiller, batch: Batch, names: list[str], fast: Any, *, whole: bool) -> Any:
        asked.append(list(names))
        return run(self, batch, names, fast, whole=whole)

    monkeypatch.setattr(Distiller, "_run_teacher", noted)
    distiller(networks, tmp_path, "encoder:2").teacher_maps(batch)
    found = distiller(networks, tmp_path, *LAYERS).teacher_maps(batch)
    assert asked == [["encoder:2"], ["segmentation_head.0"]]
    assert all(torch.equal(found[name], x) for name, x in expected.items())


def test_float16_rounds_what_is_computed_and_what_is_read_alike(
    networks: tuple[TaskModel, TaskModel], batch: Batch, tmp_path: Path
) -> None:
    exact = distiller(networks, None, "encoder:2").teacher_maps(batch)["encoder:2"]
    maps = [distiller(networks, tmp_path, "encoder:2", half=True).teacher_maps(batch)["encoder:2"] for _ in range(2)]
    assert torch.equal(*maps)
    assert torch.equal(maps[0], exact.half().float())
    assert not torch.equal(maps[0], exact)
    (file,) = tmp_path.rglob("*.safetensors")
    assert file.stat().st_size < 2 * exact.numel() + 300
