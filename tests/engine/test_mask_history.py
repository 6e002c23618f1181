from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

import tiny
from acamkd.distillation.distiller import Distiller
from acamkd.engine.mask_history import REPLAY, SNAPSHOTS, MaskHistory, is_kept, look, spread
from acamkd.jobs.train import distill
from acamkd.losses import ACAM, FGD, FitNet, MasKD
from acamkd.losses.base import DistillationContext
from acamkd.losses.functional import dice_overlap
from acamkd.models.base import Batch
from acamkd.models.segmentation import Segmenter


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_data(tmp_path_factory.mktemp("data") / "scenes")


@pytest.fixture(scope="module")
def whole(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    distill(tiny.recipe(root, epochs=2), out=folder)
    return folder


def _stored(folder: Path) -> dict[str, Any]:
    with np.load(folder / REPLAY) as stored:
        return {name: stored[name] for name in stored.files}


def test_the_start_and_every_epoch_are_kept(whole: Path) -> None:
    stored, key = _stored(whole), "segmentation_head.0/acam"
    assert stored["epoch"].tolist() == [0, 1, 2]
    assert stored["images"].tolist() == [0, 1, 2, 3]
    shapes = {name: array.shape for name, array in stored.items() if name.startswith(key)}
    assert shapes == {
        f"{key}/student": (3, 4, 1, 16, 16),
        f"{key}/teacher": (3, 4, 1, 16, 16),
        f"{key}/spatial": (3, 4, 3, 16, 16),
        f"{key}/spatial/figures": (3, 3),
        f"{key}/channel": (3, 4, 3, 6),
        f"{key}/channel/figures": (3, 3),
    }
    teacher, student = stored[f"{key}/teacher"], stored[f"{key}/student"]
    assert (teacher.max(axis=(2, 3, 4)) == 255).all()
    assert (teacher == teacher[0]).all()
    assert (student[0] != student[1]).any()


def test_the_training_does_not_notice(whole: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("acamkd.jobs.fit.MaskHistory", lambda folder, images: Callback())
    distill(tiny.recipe(root, epochs=2), out=tmp_path / "run")
    assert not (tmp_path / "run" / REPLAY).exists()
    for table in ("history.csv", "logs/metrics.csv"):
        assert tiny.rows(tmp_path / "run" / table) == tiny.rows(whole / table)
    weights = "student.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (whole / weights).read_bytes()


def test_a_resumed_run_has_the_same_replay(
    whole: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        tiny.interrupt_at(patch, epoch=1, batch=0)
        with pytest.raises(KeyboardInterrupt):
            distill(tiny.recipe(root, epochs=2), out=tmp_path / "run")
    assert _stored(tmp_path / "run")["epoch"].tolist() == [0, 1]
    distill(tiny.recipe(root, epochs=2), out=tmp_path / "run", resume=True)
    resumed, expected = _stored(tmp_path / "run"), _stored(whole)
    assert resumed.keys() == expected.keys()
    for name, array in expected.items():
        assert np.array_equal(resumed[name], array), name
    assert not list((tmp_path / "run").glob(".unfinished-*"))


def _model(channels: int) -> Segmenter:
    return Segmenter(nn.Sequential(nn.Conv2d(3, channels, 1), nn.BatchNorm2d(channels), nn.Conv2d(channels, 2, 1)), 2)


def _batch(model: Segmenter) -> Batch:
    return model.prepare([torch.rand(3, 32, 32), torch.rand(3, 32, 16)])


def test_look_keeps_what_the_loss_sees_without_the_padding() -> None:
    student, teacher, loss = _model(4).eval(), _model(5), ACAM(4, 5, num_masks=3, masks="both")
    batch = _batch(student)
    distiller = Distiller(student, teacher, [("1", "1")], [loss])
    found = look(distiller, batch, distiller.teacher_maps(batch))
    student_map, teacher_map = student.net[:2](student.normalize(batch)), teacher.net[:2](teacher.normalize(batch))
    masks = loss.masks(student_map, teacher_map)
    channel, spatial = masks["channel"], masks["spatial"]
    wanted = (255 * spatial).round().byte().numpy()
    assert np.array_equal(found["1/acam/spatial"][0], wanted[0])
    assert np.array_equal(found["1/acam/spatial"][1][..., ::2], wanted[1][..., :16])  # its half, over the whole grid
    assert np.array_equal(found["1/acam/channel"], (255 * channel).round().byte().numpy())
    seen = [spatial[0].flatten(1), spatial[1, :, :, :16].flatten(1)]
    figures = [[x.mean(), x.std(dim=1, correction=0).mean(), dice_overlap(x[None])] for x in seen]
    assert found["1/acam/spatial/figures"] == pytest.approx(torch.tensor(figures).mean(dim=0).numpy(), abs=1e-6)
    strength = teacher_map[0].abs().mean(dim=0)
    assert np.array_equal(found["1/acam/teacher"][0, 0], (255 * strength / strength.max()).round().byte().numpy())


def test_a_loss_without_masks_leaves_the_maps_alone() -> None:
    student = _model(4).eval()
    distiller, batch = Distiller(student, _model(5), [("1", "1")], [FitNet(4, 5)]), _batch(student)
    found = look(distiller, batch, distiller.teacher_maps(batch))
    assert set(found) == {"1/fitnet/student", "1/fitnet/teacher"}


def test_masks_of_every_method_have_one_form() -> None:
    x = torch.rand(1, 3, 4, 4)
    context = DistillationContext(input_size=(8, 8), boxes=[torch.tensor([[0.0, 0.0, 4.0, 4.0]])])
    shapes = {
        name: {kind: tuple(mask.shape) for kind, mask in loss.masks(x, x, context).items()}
        for name, loss in {
            "acam": ACAM(3, 3, num_masks=2, masks="both"),
            "spatial": ACAM(3, 3, num_masks=2, masks="spatial"),
            "maskd": MasKD(3, 3, num_tokens=5),
            "fgd": FGD(3, 3),
            "fitnet": FitNet(3, 3),
        }.items()
    }
    assert shapes == {
        "acam": {"channel": (1, 2, 3), "spatial": (1, 2, 4, 4)},
        "spatial": {"spatial": (1, 2, 4, 4)},
        "maskd": {"spatial": (1, 5, 4, 4)},
        "fgd": {"foreground": (1, 1, 4, 4), "background": (1, 1, 4, 4)},
        "fitnet": {},
    }


def test_modes_are_restored_module_by_module(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[bool]] = []
    record = MaskHistory._record

    def watch(self: MaskHistory, trainer: Any, module: Any, epoch: int) -> None:
        network = module.distiller.student
        network.net.encoder.eval()  # frozen statistics inside a student in training
        before = [each.training for each in network.modules()]
        record(self, trainer, module, epoch)
        seen.append(before)
        assert [each.training for each in network.modules()] == before

    monkeypatch.setattr(MaskHistory, "_record", watch)
    distill(tiny.recipe(root, epochs=1), out=tmp_path / "run")
    assert len(seen) == 2
    assert any(seen[0])
    assert not all(seen[0])


@pytest.mark.parametrize("epochs", [1, 2, 31, 32, 33, 100, 1000])
def test_a_long_run_keeps_few_snapshots_and_always_the_last(epochs: int) -> None:
    kept = [epoch for epoch in range(1, epochs + 1) if is_kept(epoch, epochs)]
    assert kept[-1] == epochs
    assert min(epochs, SNAPSHOTS // 2) <= len(kept) <= SNAPSHOTS + 1


def test_images_are_spread_evenly() -> None:
    assert spread(10, 4) == [0, 2, 5, 7]
    assert spread(2, 4) == [0, 1]
