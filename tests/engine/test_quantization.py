"""The rounding of INT8 within a training."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

import tiny
from acamkd import config
from acamkd.distillation.distiller import Distiller
from acamkd.engine import quantization
from acamkd.engine.metrics import Scorer
from acamkd.engine.module import TrainingModule
from acamkd.engine.quantization import WEIGHT_LIMIT, FakeQuantization
from acamkd.engine.trainer import Recorder, build_trainer
from acamkd.errors import AcamkdError
from acamkd.jobs.export.onnx_model import OnnxModel
from acamkd.jobs.export.quantize import _Quantizer
from acamkd.jobs.train import distill, train
from acamkd.models.base import Task
from acamkd.models.segmentation import Segmenter
from acamkd.report.run import write_report
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
    run(student.train()).sum().backward()  # type: ignore[no-untyped-call]
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
    ranges: Any = rounded.maps["first:input"]
    tops = [float(each.activation_post_process.max_val) for each in ranges]
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
        run(student.train()).float().sum().backward()  # type: ignore[no-untyped-call]
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
    assert float((simulated - exact).abs().mean()) == pytest.approx(float(loss), rel=0.05)
    # Not equal: here the hidden map's range is that of rounded weights, and values near a half go the other way.
    assert (simulated - logits).abs().mean() < 0.6 * loss


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_data(tmp_path_factory.mktemp("data"))


def fit(folder: Path, epochs: int, checkpoint: Path | None = None, **train: Any) -> TrainingModule:
    """Train the small network from its start, or on from a checkpoint; 3 steps an epoch."""
    section = config.Train(epochs=epochs, accelerator="cpu", schedule=config.Schedule(name="constant"), **train)
    trainer = build_trainer(section, Recorder(folder, "student.safetensors", "mIoU"), progress=False)
    torch.manual_seed(0)
    module = TrainingModule(Distiller(model()), section, Scorer("segmentation", ("a", "b")))
    generator = torch.Generator().manual_seed(0)
    batches = [
        (
            list(torch.rand(2, 3, 16, 16, generator=generator)),
            [{"mask": mask} for mask in torch.randint(0, 2, (2, 16, 16), generator=generator)],
        )
        for _ in range(3)
    ]
    loader: Any = DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch)  # type: ignore[arg-type]
    trainer.fit(module, loader, loader, ckpt_path=checkpoint)
    return module


@needs_torchao
def test_ranges_go_on_where_they_were(tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole", 2, quantize="int8")
    fit(tmp_path / "again", 1, quantize="int8")
    again = fit(tmp_path / "again", 2, tmp_path / "again/last.ckpt", quantize="int8")
    ends = [module.state_dict() for module in (whole, again)]
    assert any(name.startswith("quantization.maps.first:input.1") for name in ends[0])
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=0)
    weights = [load_file(tmp_path / name / "student.safetensors") for name in ("whole", "again")]
    assert set(weights[0]) == set(model().net.state_dict())
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=0)


def test_off_it_is_not_there(tmp_path: Path) -> None:
    module = fit(tmp_path / "run", 1)
    assert module.quantization is None
    assert not any("quantization" in name for name in module.state_dict())
    assert not any(x._forward_hooks or x._forward_pre_hooks for x in module.distiller.student.modules())


@needs_torchao
@pytest.mark.slow
@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_a_run_is_scored_as_int8_and_leaves_a_plain_student(task: Task, tmp_path: Path) -> None:
    root = tiny.write_data(tmp_path / "data", task)
    recipe = tiny.recipe(root, task, quantize="int8")
    run = train(recipe, out=tmp_path / "run") if task == "detection" else distill(recipe, out=tmp_path / "run")
    student = run.load()  # which needs every tensor, and no other
    assert not any(x._forward_hooks or x._forward_pre_hooks for x in student.modules())
    assert "quantization" not in " ".join(run.load_last().state_dict())
    assert "with the rounding of INT8 simulated" in write_report(run).read_text()
    if task == "segmentation":
        estimate = distill(recipe, dry_run=True)
        plain = distill(tiny.recipe(root, task), dry_run=True)
        assert estimate.image > plain.image  # the rounded maps are kept for the backward


def test_without_torchao_nothing_begins(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    recipe = tiny.recipe(root, quantize="int8")
    jobs: tuple[Any, ...] = (train, distill)
    for job in jobs:
        with pytest.raises(AcamkdError, match=r"train\.quantize needs torchao: pip install 'acamkd\[int8\]'"):
            job(recipe, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@needs_torchao
def test_an_older_torchao_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization.pt2e", None)
    with pytest.raises(AcamkdError, match=r"^train\.quantize needs torchao 0\.18 or newer: "):
        quantization.FakeQuantization(model())


@needs_torchao
def test_a_training_of_int8_is_not_compiled(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fit(tmp_path, 1, quantize="int8", compile=True)
    assert "train.compile: the training is not compiled, since train.quantize acts by hooks" in caplog.messages


def test_a_teacher_is_never_rounded(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    made = train(tiny.recipe(root, quantize="int8", epochs=1), "teacher", out=tmp_path / "run")
    assert config.load(made.folder / "recipe.yaml").train.quantize is None
