"""The rounding of INT8 within a training."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import tiny
from acamkd import config
from acamkd.engine import quantization
from acamkd.engine.quantization import WEIGHT_LIMIT, FakeQuantization
from acamkd.errors import AcamkdError
from acamkd.jobs.export.onnx_model import OnnxModel
from acamkd.jobs.export.quantize import _Quantizer
from acamkd.jobs.train import distill, train
from acamkd.models.segmentation import Segmenter
from tiny_onnx import write_segmenter

needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")


class Twice(nn.Module):
    """A first layer that runs twice, a batch norm, a smooth activation, and a layer whose ReLU merges with it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 3, padding=1)
        self.second = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.Hardswish()
        self.third = nn.Conv2d(4, 4, 1)
        self.relu = nn.ReLU()
        self.last = nn.ConvTranspose2d(4, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(10 * self.first(x))
        x = self.act(self.norm(self.second(x)))
        return self.last(self.relu(self.third(x)))  # type: ignore[no-any-return]


def model() -> Segmenter:
    return Segmenter(Twice(), 2, (0.5,) * 3, (0.2,) * 3, None)


def run(model: Segmenter, seed: int = 0) -> Tensor:
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    return model(model.prepare(list(images)))["out"]  # type: ignore[no-any-return]


@needs_torchao
def test_weights_and_maps_have_as_many_values_as_int8_and_names_stay() -> None:
    student = model()
    names, net = list(student.state_dict()), student.net
    rounded = FakeQuantization(student)
    seen: dict[str, Any] = {}
    for name in ("second", "last"):
        layer = net.get_submodule(name)
        layer.register_forward_pre_hook(lambda x, i, n=name: seen.update({n: (x.weight, i[0])}))
    run(student.train()).sum().backward()
    assert list(student.state_dict()) == names
    assert not any("weight" in vars(module) for module in net.modules())
    for name, axis in (("second", 0), ("last", 1)):
        weight, inputs = seen[name]
        original = dict(net.named_parameters())[f"{name}.weight"]
        assert original.grad is not None
        assert original.grad.abs().max() > 0
        step = original.detach().abs().transpose(0, axis).flatten(1).amax(1) / WEIGHT_LIMIT
        levels = weight.detach().transpose(0, axis).flatten(1) / step[:, None]
        assert torch.allclose(levels, levels.round(), atol=1e-3)
        assert levels.abs().max() == pytest.approx(WEIGHT_LIMIT)
        assert 0 < (weight - original).abs().max() <= 0.51 * step.max()
        assert len(inputs.unique()) <= 256
    assert set(rounded.maps) == {
        "first:input", "first:output", "second:input", "act:input", "third:input",
        "last:input", "last:output",
    }  # fmt: skip


@needs_torchao
def test_each_call_has_a_range_which_only_training_moves() -> None:
    student = model()
    rounded = FakeQuantization(student)
    assert torch.isfinite(run(student.eval())).all()
    assert not rounded._observed  # maps without a range pass as they are
    run(student.train())
    tops = [ranges.activation_post_process.max_val.item() for ranges in rounded.maps["first:input"]]  # type: ignore[union-attr]
    assert len(tops) == 2
    assert tops[0] == pytest.approx(2.5, abs=0.1)  # the images, normalized
    before = {name: x.clone() for name, x in rounded.maps.state_dict().items() if "enabled" not in name}
    run(student.eval(), seed=1)
    after = rounded.maps.state_dict()
    assert all(torch.equal(x, after[name]) for name, x in before.items())
    run(student.train(), seed=1)
    assert any(not torch.equal(x, rounded.maps.state_dict()[name]) for name, x in before.items())


@needs_torchao
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_it_rounds_in_32_bits_under_autocast(precision: torch.dtype) -> None:
    student = model()
    FakeQuantization(student)
    kinds: list[torch.dtype] = []
    student.net.get_submodule("second").register_forward_pre_hook(
        lambda x, i: kinds.extend((x.weight.dtype, i[0].dtype))
    )
    with torch.autocast("cpu", precision):
        run(student.train()).float().sum().backward()
    assert kinds == [torch.float32, precision]


@needs_torchao
def test_it_is_what_onnxruntime_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same network as PyTorch with the simulation, and as the file that `export --int8` writes."""
    monkeypatch.setattr("acamkd.jobs.export.quantize.int8_instructions", lambda: ())
    file = write_segmenter(tmp_path / "student.onnx", classes=("a", "b", "c"), resize=(32, 32))
    weights = {x.name: torch.tensor(onnx.numpy_helper.to_array(x)) for x in onnx.load(file).graph.initializer}
    first, second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 1)
    state = {"0.weight": weights["w1"], "0.bias": weights["b1"], "2.weight": weights["w2"], "2.bias": torch.zeros(3)}
    net = nn.Sequential(first, nn.ReLU(), second)
    net.load_state_dict(state)
    student = Segmenter(net, 3, (0.0,) * 3, (1.0,) * 3, None)
    images = list(np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8))
    batch = student.prepare([torch.from_numpy(image).permute(2, 0, 1) for image in images])
    with torch.no_grad():
        exact = student.eval()(batch)["out"]
        FakeQuantization(student)
        student.train()(batch)
        simulated = student.eval()(batch)["out"]
    _Quantizer(file, tmp_path, images).write(tmp_path / "int8.onnx", ("MinMax", "all"), ())
    runtime = OnnxModel(tmp_path / "int8.onnx", threads=1)
    logits = torch.cat([torch.from_numpy(runtime.run(x[None].numpy())["logits"]) for x in batch.pixels])
    loss = (logits - exact).abs().mean()
    assert loss > 0.01
    assert (simulated - exact).abs().mean() == pytest.approx(float(loss), rel=0.1)
    assert (simulated - logits).abs().mean() < 0.2 * loss


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_data(tmp_path_factory.mktemp("data"))


@needs_torchao
def test_a_resumed_run_ends_the_same_and_leaves_a_plain_student(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("acamkd.jobs.train.write_report", lambda run: None)
    recipe = tiny.recipe(root, quantize="int8", checkpoint_every=1)
    whole = distill(recipe, out=tmp_path / "whole")
    with monkeypatch.context() as patch:
        tiny.interrupt_at(patch, epoch=1, batch=1)
        with pytest.raises(KeyboardInterrupt):
            distill(recipe, out=tmp_path / "again")
    again = distill(recipe, out=tmp_path / "again", resume=True)
    ends = [torch.load(each.checkpoint, weights_only=True) for each in (whole, again)]
    assert sum(name.startswith("quantization.maps") for name in ends[0]["state_dict"]) > 100
    torch.testing.assert_close(ends[0]["state_dict"], ends[1]["state_dict"], rtol=0, atol=0)
    assert tiny.rows(whole.folder / "history.csv") == tiny.rows(again.folder / "history.csv")
    assert whole.weights.read_bytes() == again.weights.read_bytes()
    assert not any("weight" in vars(module) for module in whole.load().net.modules())  # which loads every tensor
    assert not any("quantization" in name for name in whole.load_last().state_dict())


def test_without_torchao_nothing_begins(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    recipe = tiny.recipe(root, quantize="int8")
    for job in (train, distill):
        with pytest.raises(AcamkdError, match=r"train\.quantize needs torchao: pip install '\.\[int8\]'"):
            job(recipe, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_teacher_is_never_rounded(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("acamkd.jobs.train.write_report", lambda run: None)
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    made = train(tiny.recipe(root, quantize="int8", epochs=1), "teacher", out=tmp_path / "run")
    assert config.load(made.folder / "recipe.yaml").train.quantize is None
