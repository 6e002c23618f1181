"""The faster copy of a teacher gives its feature maps, up to rounding."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

import tiny
from acamkd.config import Model
from acamkd.distillation.distiller import Distiller
from acamkd.distillation.fast_teacher import FastTeacher, fold_batch_norms, relative_differences
from acamkd.distillation.taps import probe, probe_batch
from acamkd.losses import FitNet
from acamkd.models import build
from acamkd.models.base import FeatureModel
from acamkd.models.segmentation import Segmenter


class Standardized(nn.Conv2d):
    """Not a plain convolution: its weights are not what it multiplies with."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self._conv_forward(x, self.weight - self.weight.mean(), self.bias)
        return out


class Net(nn.Module):
    """Batch norms that can be folded, and that cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.frozen = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=2), FrozenBatchNorm2d(4))
        self.act = nn.Sequential(nn.Conv2d(4, 4, 1), BatchNormAct2d(4))
        self.read_twice, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.shared, self.norms = nn.Conv2d(4, 4, 1), nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)])
        self.twice = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))  # runs twice, always with its norm
        self.other = nn.Sequential(Standardized(4, 4, 1), nn.BatchNorm2d(4))
        self.later = nn.Sequential(nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.frozen(self.plain(x)))
        y = self.read_twice(x)
        x = y.relu() + self.norm(y)
        x = self.norms[0](self.shared(x)) + self.norms[1](self.shared(x / 2))
        out: Tensor = self.later(self.other(self.twice(self.twice(x))))
        return out


FOLDABLE = {"plain.1", "frozen.1", "act.1", "twice.1", "later.1"}


def _teacher() -> Segmenter:
    torch.manual_seed(0)
    teacher = Segmenter(Net(), 2)
    for module in teacher.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name.startswith("running"):
                buffer.uniform_(0.5, 2)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.uniform_(module.bias, 2, 4)  # few values below 0, so that no map is dead
    return teacher.eval().requires_grad_(False)


def _left(model: FeatureModel) -> set[str]:
    modules = model.net.named_modules()
    return {name for name, x in modules if "running_var" in dict(x.named_buffers(recurse=False))}


@pytest.mark.parametrize(
    ("tapped", "kept"),
    [
        ([], set()),
        (["plain.0"], {"plain.1"}),  # its output is no longer before the norm
        (["plain.1", "frozen"], set()),  # theirs stays
        (["twice.0@1"], {"twice.1"}),
    ],
)
def test_what_is_alone_before_a_norm_is_folded(tapped: list[str], kept: set[str]) -> None:
    teacher = _teacher()
    state = {name: x.clone() for name, x in teacher.state_dict().items()}
    names = [*tapped, "act", "later"]
    fast = FastTeacher(teacher, names, "32", probe_batch(teacher))
    assert _left(teacher) - _left(fast.model) == FOLDABLE - kept
    assert fast.folded == sorted(FOLDABLE - kept)
    batch = teacher.prepare([torch.rand(3, 32, 64)])
    ours, theirs = (probe(model, names, batch) for model in (fast.model, teacher))
    assert all(x.std() > 0.01 for x in theirs.values())
    assert max(relative_differences(theirs, ours).values()) < 1e-5
    assert all(torch.equal(x, state[name]) for name, x in teacher.state_dict().items())


@pytest.mark.parametrize("factor", [1.1, torch.nan])
def test_what_would_change_more_than_rounding_is_not_folded(
    factor: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def spoil(model: Any, *_: Any) -> int:
        model.net.act[0].weight.data *= factor
        return 1

    monkeypatch.setattr("acamkd.distillation.fast_teacher.fold_batch_norms", spoil)
    teacher = _teacher()
    fast = FastTeacher(teacher, ["plain", "act"], "32", probe_batch(teacher))
    assert "batch norms are not folded: that would change act by" in caplog.text
    assert fast.folded == []
    batch = teacher.prepare([torch.rand(3, 32, 32)])
    assert torch.equal(probe(fast.model, ["plain"], batch)["plain"], probe(teacher, ["plain"], batch)["plain"])


@pytest.mark.parametrize("section", [tiny.FPN, tiny.RETINANET], ids=["segmenter", "detector"])
def test_every_norm_of_a_library_network_is_folded(section: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = build(Model(**section), "detection" if section is tiny.RETINANET else "segmentation", 3, (64, 64)).eval()
    assert len(fold_batch_norms(model, probe_batch(model))) > 10
    assert not {name for name in _left(model) if "segmentation_head" not in name}


@pytest.mark.parametrize(("precision", "error"), [("32", 1e-5), ("bf16", 3e-2), ("16", 3e-3)])
def test_maps_come_in_float32_and_differ_by_rounding(precision: Any, error: float) -> None:
    teacher = _teacher()
    plain, fast = (
        Distiller(Segmenter(Net(), 2), teacher, [("act", "act")], [FitNet(4, 4)], precision=each)
        for each in (None, precision)
    )
    batch = teacher.prepare([torch.rand(3, 64, 96) for _ in range(2)])
    theirs = plain.teacher_maps(batch)
    with torch.autocast("cpu", torch.bfloat16):  # the training's, which is not the teacher's
        ours = fast.teacher_maps(batch)
    assert ours["act"].is_contiguous(memory_format=torch.channels_last)
    assert ours["act"].dtype == torch.float32
    (found,) = relative_differences(theirs, ours).values()
    assert 0 < found < error
    assert fast._fast is not None
    assert fast._fast.model is not teacher
    assert not any("_fast" in name or "teacher" in name for name in fast.state_dict())
    fast.to(torch.float64)
    assert {x.dtype for x in fast._fast.model.net.parameters()} == {torch.float64}  # it follows
    assert {x.dtype for x in teacher.parameters()} == {torch.float64}  # so does the teacher, which is the Distiller's


@pytest.mark.parametrize(("has_amx", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_auto_takes_what_the_hardware_is_fast_with(
    has_amx: bool, dtype: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: has_amx)
    with caplog.at_level(logging.INFO):
        fast = FastTeacher(_teacher(), ["later"], "auto", probe_batch(_teacher()))
        for _ in range(2):
            with fast.on(torch.device("cpu")):
                assert torch.is_autocast_enabled("cpu") == has_amx
    assert caplog.text.count(f"the teacher's forward: {dtype}") == 1
    assert {str(x.dtype) for name, x in fast.model.net.named_parameters() if "shared" in name} == {f"torch.{dtype}"}
    distiller = Distiller(Segmenter(Net(), 2), _teacher(), [("act", "act")], [FitNet(4, 4)], precision="auto")
    assert distiller.teacher_form(torch.device("cpu")) == f"torch.{dtype} {sorted(FOLDABLE)}"
