from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import tiny
from acamkd import config
from acamkd.data.image_io import read_image
from acamkd.data.loading import ImageLoader
from acamkd.distillation.build import build_distiller
from acamkd.distillation.distiller import Distiller
from acamkd.engine.averaging import Average
from acamkd.engine.module import TrainingModule
from acamkd.engine.nonfinite import HALVINGS, IN_A_ROW, KEPT, NonFinite
from acamkd.errors import AcamkdError
from acamkd.jobs.setup import Batches, build_network
from acamkd.jobs.train import distill


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_data(tmp_path_factory.mktemp("data"))


class _Poison(torch.autograd.Function):
    """Harmless on the way there, NaN on the way back."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return gradient * torch.nan


def _poison(monkeypatch: pytest.MonkeyPatch, steps: set[int], *, backwards: bool) -> None:
    """Spoil ACAM's terms, or their gradients, in some steps."""
    compare = Distiller._compare

    def poisoned(self: Distiller, *arguments: Any) -> dict[str, Tensor]:
        terms = compare(self, *arguments)
        if arguments[-1].step not in steps:
            return terms
        return {name: _Poison.apply(x) if backwards else x * torch.inf for name, x in terms.items()}

    monkeypatch.setattr(Distiller, "_compare", poisoned)


TERM = r"step 1: the loss is not finite, segmentation_head.0/acam/channel is inf, .*acam/spatial is inf, .*: lower the"
GRADIENT = (
    r"step 1: the gradient is not finite at \d+ parameters \(distiller.student.net.encoder.*, \.\.\.\), though every"
)


@pytest.mark.parametrize(("backwards", "message"), [(False, TERM), (True, GRADIENT)])
def test_the_run_stops_and_keeps_the_images(
    backwards: bool, message: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _poison(monkeypatch, {1}, backwards=backwards)
    raw, file = tiny.raw_recipe(root, epochs=1, batch_size=1, accumulate=2), tmp_path / "run/nonfinite/step-1.pt"
    raw["data"]["augment"] = {"flip": 0}
    with pytest.raises(AcamkdError, match=rf"{message}.*images \S+\.jpg, \S+\.jpg, kept in {file}$") as caught:
        distill(config.parse(raw), out=tmp_path / "run")
    kept = torch.load(file, weights_only=True)
    assert kept["fault"] in str(caught.value)
    assert len(kept["files"]) == len(kept["images"]) == len(kept["targets"]) == 2  # both batches of the step
    for name, image in zip(kept["files"], kept["images"], strict=True):
        assert torch.equal(image, read_image(root / "images/train" / name))
    assert not (tmp_path / "run/metrics.json").exists()


def test_the_parameter_is_named(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = TrainingModule.training_step

    def spoiled(self: TrainingModule, *arguments: Any) -> Tensor:
        net: Any = self.distiller.student.net
        harmless: Tensor = _Poison.apply(net.segmentation_head[0].bias).sum() * 0
        return original(self, *arguments) + harmless

    monkeypatch.setattr(TrainingModule, "training_step", spoiled)
    name = r"distiller\.student\.net\.segmentation_head\.0\.bias"
    with pytest.raises(AcamkdError, match=rf"step 0: the gradient is not finite at 1 parameter \({name}\), though"):
        distill(tiny.recipe(root, epochs=1, batch_size=2), out=tmp_path / "run")


def _ready(root: Path, monkeypatch: pytest.MonkeyPatch, world_size: int) -> tuple[TrainingModule, tuple[Any, ...]]:
    """A module as in its first step, and a batch with unlabeled images."""
    recipe = tiny.recipe(root, batch_size=2)
    assert recipe.teacher is not None
    batches = Batches(recipe)
    student, teacher = (build_network(recipe, section, batches.classes) for section in (recipe.student, recipe.teacher))
    module = TrainingModule(build_distiller(student, teacher, recipe.losses), recipe.train, batches.scorer)
    position = {"current_epoch": 0, "global_step": 0, "global_rank": 0}
    monkeypatch.setattr(module, "_trainer", SimpleNamespace(num_training_batches=1, world_size=world_size, **position))
    images, targets = next(iter(batches.train))
    return module, (images, targets, images)


@pytest.mark.parametrize("where", ["labeled", "unlabeled"])
def test_every_process_learns_of_a_broken_step(where: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others wait for each gradient, and share what is NaN in it."""
    forward = Distiller.forward

    def broken(self: Distiller, *arguments: Any, labeled: bool = True, check: bool) -> dict[str, Tensor]:
        assert not check
        terms = forward(self, *arguments, labeled=labeled, check=False)
        if labeled == (where == "labeled"):
            terms["segmentation_head.0/acam/spatial"] = terms["segmentation_head.0/acam/spatial"].detach() * torch.inf
        return terms

    module, batch = _ready(root, monkeypatch, world_size=2)
    monkeypatch.setattr(Distiller, "forward", broken)
    module.training_step(batch, 0).backward()  # type: ignore[no-untyped-call]
    gradients = [p.grad for p in module.distiller.parameters() if p.requires_grad]
    assert all(gradient is not None for gradient in gradients)
    bias = module.distiller.student.net.get_submodule("segmentation_head.0").bias
    assert isinstance(bias, Tensor)
    assert bias.grad is not None
    assert bias.grad.isnan().all()
    assert (module.values, len(module.faults)) == ({}, 1)
    assert "step 0: the loss is not finite, segmentation_head.0/acam/spatial is inf: lower" in module.faults[0]


@pytest.mark.parametrize("backwards", [False, True])
def test_a_step_that_is_left_out_leaves_no_trace(
    backwards: bool, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _poison(monkeypatch, {3}, backwards=backwards)
    caplog.set_level(logging.WARNING, "acamkd")
    recipe = tiny.recipe(root, epochs=1, batch_size=2, checkpoint_every=1, clip=1.0, on_nonfinite="skip")
    folder = tmp_path / "run"
    distill(recipe, out=folder)
    assert "the step is skipped, 1 so far" in caplog.text
    after, before = (torch.load(folder / name, weights_only=True) for name in ("last.ckpt", "previous.ckpt"))
    assert (before["global_step"], after["global_step"]) == (3, 4)
    torch.testing.assert_close(
        after["state_dict"], before["state_dict"], rtol=0, atol=0
    )  # batch norm's statistics, too
    states = [end["optimizer_states"][0]["state"] for end in (after, before)]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert after["lr_schedulers"] != before["lr_schedulers"]  # it counts as a step


def test_an_epoch_of_which_nothing_is_left_is_said(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _poison(monkeypatch, set(range(99)), backwards=False)
    caplog.set_level(logging.INFO, "acamkd")
    distill(tiny.recipe(root, epochs=1, batch_size=2, on_nonfinite="skip"), out=tmp_path / "run")
    assert "epoch 1/1, mIoU " in caplog.text


def test_too_many_in_a_row_stop_the_run(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _poison(monkeypatch, set(range(3, 99)), backwards=False)
    with pytest.raises(AcamkdError, match=r"step 13: .*\n  it is consecutive step 11 with this fault"):
        distill(tiny.recipe(root, epochs=2, batch_size=1, on_nonfinite="skip"), out=tmp_path / "run")
    assert 3 + IN_A_ROW == 13
    assert len(list((tmp_path / "run/nonfinite").iterdir())) == KEPT


def test_the_scaler_of_float16_gets_its_chance_and_no_more(tmp_path: Path) -> None:
    callback, net = NonFinite(tmp_path, skip=False), torch.nn.Linear(1, 1)
    strategy = SimpleNamespace(reduce_boolean_decision=lambda decision, all: decision)
    images = ImageLoader.__new__(ImageLoader)
    trainer: Any = SimpleNamespace(precision="16-mixed", strategy=strategy, global_step=7, train_dataloader=images,
                                   world_size=1)  # fmt: skip
    module = TrainingModule.__new__(TrainingModule)
    torch.nn.Module.__init__(module)
    module.net, module.faults, module._pending = net, [], None
    for value in (*[torch.inf] * HALVINGS, 1.0, *[torch.inf] * HALVINGS):
        net.weight.grad = torch.full_like(net.weight, value)
        callback.on_before_optimizer_step(trainer, module, torch.optim.SGD(net.parameters()))
    resumed = NonFinite(tmp_path, skip=False)
    resumed.load_state_dict(callback.state_dict())
    with pytest.raises(AcamkdError, match="step 7: the gradient is not finite"):
        resumed.on_before_optimizer_step(trainer, module, torch.optim.SGD(net.parameters()))
    with pytest.raises(AcamkdError, match=r"step 7: the gradient is not finite at 1 parameter \(net\.weight\), though"):
        callback.on_before_optimizer_step(trainer, module, torch.optim.SGD(net.parameters()))
    net.weight.grad = torch.ones_like(net.weight)
    callback.on_before_optimizer_step(trainer, module, torch.optim.SGD(net.parameters()))
    module.faults, net.weight.grad = ["step 8: the loss"], torch.full_like(net.weight, torch.nan)
    with pytest.raises(AcamkdError, match="step 8: the loss"):
        callback.on_before_optimizer_step(trainer, module, torch.optim.SGD(net.parameters()))


class _Reads(TorchDispatchMode):
    """Counts how often the values of a tensor are read in Python."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_step_reads_its_values_once(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For each reading the program waits until a GPU has done all its work."""
    module, batch = _ready(root, monkeypatch, world_size=1)
    for _ in range(2):  # the audit reads more, until all parameters have had a gradient
        module.training_step(batch, 0)
    lists, tolist = 0, Tensor.tolist

    def counted(self: Tensor) -> Any:
        nonlocal lists
        lists += 1
        return tolist(self)

    monkeypatch.setattr(Tensor, "tolist", counted)
    net = module.distiller.student.net
    average = Average(net, torch.device("cpu"), 0.9)
    with _Reads() as reads:
        module.training_step(batch, 0).backward()  # type: ignore[no-untyped-call]
        NonFinite(tmp_path, skip=False).on_before_optimizer_step(
            module.trainer, module, torch.optim.SGD(module.parameters())
        )
        assert module.values["loss"] > 0
        for _ in range(2):
            average.update_parameters(net)
    assert (reads.count, lists) == (0, 1)
