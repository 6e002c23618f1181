"""A compiled distillation computes what the same one computes without a compiler."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import tiny
from acamkd.config import Loss, Model
from acamkd.distillation.build import build_distiller
from acamkd.distillation.compiled import CompiledNetwork, can_compile
from acamkd.distillation.distiller import Distiller
from acamkd.distillation.taps import FeatureTap
from acamkd.jobs.train import distill
from acamkd.losses import FitNet
from acamkd.losses.base import DistillationContext, FeatureLoss
from acamkd.models import Batch, Target, build
from acamkd.models.base import Task
from acamkd.models.segmentation import Segmenter
from tiny_hf import OPTIONS

QUERIES = {"arch": "hf/rt_detr_v2", "options": OPTIONS["rt_detr_v2"]}

NETWORKS: dict[str, tuple[Task, dict[str, Any], int, dict[str, list[str]]]] = {
    "detector": ("detection", tiny.RETINANET, 128, {"student": ["backbone", "head"], "teacher": ["backbone", "head"]}),
    "queries": ("detection", QUERIES, 64, {}),
    "segmenter": (
        "segmentation", tiny.FPN, 128, {"student": ["encoder", "decoder"], "teacher": ["encoder", "decoder"]},
    ),
}  # fmt: skip
"""Task, network, side of the images, and what is to be compiled."""


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def _targets(task: Task, side: int, width: int = 0) -> list[Target]:
    if task == "segmentation":
        return [{"mask": torch.arange(side)[:, None].expand(side, width or side) // (side // 3 + 1)}] * 2
    box = torch.tensor([[4.0, 6, side / 2, side / 3]])
    return [{"boxes": box, "labels": torch.tensor([1])}, {"boxes": box + 9, "labels": torch.tensor([3])}]


def _distiller(name: str, loss: str) -> tuple[Distiller, Batch]:
    task, section, side, _ = NETWORKS[name]
    torch.manual_seed(0)
    student, teacher = (build(Model(**section), task, 3, (side, side)) for _ in range(2))
    pairs = ("segmentation_head.0",) if task == "segmentation" else student.comparable_layers()
    distiller = build_distiller(student, teacher, [Loss(name=loss, pairs=pairs)])
    images = [torch.rand(3, side, side, generator=torch.Generator().manual_seed(index)) for index in range(2)]
    return distiller.train(), student.prepare(images, _targets(task, side))


def _run(distiller: Distiller, batch: Batch, start: int = 0, end: int = 4) -> list[dict[str, Tensor]]:
    """Terms of some steps by name, and the whole gradient that follows."""
    found = []
    for step in range(start, end):
        torch.manual_seed(0)  # of denoising
        terms = distiller(batch, step)
        distiller.zero_grad()
        torch.stack(list(terms.values())).sum().backward()  # type: ignore[no-untyped-call]
        gradient = torch.cat([p.grad.flatten() for p in distiller.parameters() if p.grad is not None])
        found.append({**{name: term.detach() for name, term in terms.items()}, "gradient": gradient})
    return found


def _compiled(distiller: Distiller, who: str) -> list[str]:
    """Names of a network's parts that are one graph each."""
    (network,) = (each for each in distiller._compiled if isinstance(each, CompiledNetwork) and each._who == who)
    return [network._titles[module] for module, part in network._parts.items() if part._compiled is not None]


def _compare(distiller: Distiller, batch: Batch, backend: str, dtype: torch.dtype = torch.float64) -> None:
    """Compiled and not, terms, gradients and running statistics are the same, and no step compiles anew.

    In float64, so that the rounding, which batch norm over few values magnifies, hides no difference.
    """
    distiller.to(dtype)
    batch = replace(batch, pixels=batch.pixels.to(dtype))
    most = 1e-5 if dtype == torch.float64 else 1e-4
    plain = copy.deepcopy(distiller)
    names = list(distiller.state_dict())
    distiller.compile_parts(backend)
    found, expected = _run(distiller, batch), _run(plain, batch)
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert ours.keys() == theirs.keys()
        errors = {key: float((ours[key] - value).norm() / value.norm()) for key, value in theirs.items()}
        assert max(errors.values()) < most, (step, errors)
    for key, value in plain.student.state_dict().items():  # running statistics among them
        torch.testing.assert_close(distiller.student.state_dict()[key], value, rtol=most, atol=most / 10)
    assert list(distiller.state_dict()) == names
    graphs = counters["stats"]["unique_graphs"]
    _run(distiller, batch, start=4, end=6)
    assert counters["stats"]["unique_graphs"] == graphs
    distiller.student.eval().predict([torch.zeros(3, 32, 96)])  # an evaluation, at any size
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_the_libraries_compute_the_same(name: str) -> None:
    distiller, batch = _distiller(name, "acam" if name == "segmenter" else "fitnet")
    _compare(distiller, batch, "inductor")
    for who, parts in NETWORKS[name][3].items():
        assert _compiled(distiller, who) == parts
    # Each part is one graph. Only ACAM's look-ahead, which differentiates, parts one of its own.
    broken = [reason for reason in counters["graph_break"] if "_rewards_apart" not in reason]
    assert not broken or name == "queries"


@pytest.mark.parametrize("section", [tiny.RETINANET, tiny.RETINANET | {"arch": "reppoints", "fpn_channels": 64}])
def test_a_detector_that_calls_its_parts_one_by_one_is_compiled(
    section: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = build(Model(**section | {"options": {}}), "detection", 3, (128, 128)).train()
    network = CompiledNetwork(model.net, model.comparable_layers(), "teacher", "eager")
    batch = model.prepare([torch.rand(3, 128, 128) for _ in range(2)])
    with caplog.at_level(logging.INFO, "acamkd"), network.running():
        with torch.no_grad():
            model(batch)
        model(batch)  # the second forward of a teacher whose own loss trains the masks
    assert [network._titles[module] for module in network._parts] == ["backbone", "head"]
    assert "activation checkpoints" not in caplog.text


def test_a_forward_that_a_tap_ends_is_noted_as_any_other() -> None:
    net = nn.Sequential(nn.Sequential(Part(3)), Part(4))
    network, images = CompiledNetwork(net, ["0.0.inner"], "teacher", "eager"), torch.rand(1, 3, 8, 8)
    with network.running():
        with torch.no_grad(), FeatureTap(net, ["0.0.inner"]) as tap, tap.early_stop():
            net(images)
        net(images)
    assert [network._titles[module] for module in network._parts] == ["0.0.inner", "1"]


class Part(nn.Module):
    """Two convolutions, and what the compiler may stumble on."""

    def __init__(self, channels: int, *, is_hard: bool = False) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(channels, 4, 3, padding=1), nn.ReLU())
        self.is_hard = is_hard

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        if self.is_hard and float(x.detach().sum()) > 1e9:  # a decision that depends on the values
            x = x / 2
        return x


class Ahead(FeatureLoss):
    """Asks for the task's gradient, as ACAM's look-ahead does."""

    needs = frozenset({"task_gradient"})

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.project = nn.Conv2d(4, 4, 1)

    def terms(self, student: Tensor, teacher: Tensor, context: DistillationContext) -> dict[str, Tensor]:
        assert context.task_gradient is not None
        return {"value": (self.project(student) * context.task_gradient - teacher).square().mean()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_split_backward_computes_the_same(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net, teacher = (nn.Sequential(Part(3), Part(4), nn.Conv2d(4, 3, 1)) for _ in range(2))
    student = Segmenter(net, 3)
    distiller = Distiller(student, Segmenter(teacher, 3), [("0", "0")], [Ahead()]).train()
    batch = student.prepare([torch.rand(3, 32, 64) for _ in range(2)], _targets("segmentation", 32, 64))
    _compare(distiller, batch, "aot_eager", dtype)
    assert _compiled(distiller, "student") == _compiled(distiller, "teacher") == ["0", "1"]
    assert not counters["graph_break"]
    term = distiller.float().train()(batch, 6)["task/cross_entropy"]  # differentiated once, down to the map
    assert "_Differentiated" in term.grad_fn.next_functions[0][0].next_functions[0][0].name()


class Checkpointed(nn.Sequential):
    """Runs its second module again in the backward."""

    is_reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        first, second, last = self
        out: Tensor = last(checkpoint(second, first(x), use_reentrant=self.is_reentrant))
        return out


@pytest.mark.parametrize(
    ("tapped", "is_reentrant"), [("0", False), ("2", False), ("0", True)], ids=["before", "behind", "reentrant"]
)
def test_a_checkpoint_runs_again_what_its_forward_ran(
    tapped: str, is_reentrant: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpointed, "is_reentrant", is_reentrant)
    torch.manual_seed(0)
    again = nn.BatchNorm2d(4), nn.Sigmoid(), nn.Conv2d(4, 4, 3, padding=1), nn.GELU(), nn.Conv2d(4, 4, 1)
    net, teacher = (Checkpointed(Part(3), nn.Sequential(*again), nn.Conv2d(4, 3, 1)) for _ in range(2))
    student, channels = Segmenter(net, 3), 3 if tapped == "2" else 4
    distiller = Distiller(student, Segmenter(teacher, 3), [(tapped, tapped)], [FitNet(channels, channels)]).train()
    batch = student.prepare([torch.rand(3, 32, 64) for _ in range(2)], _targets("segmentation", 32, 64))
    caplog.set_level(logging.INFO, "acamkd")
    _compare(distiller, batch, "aot_eager")
    assert _compiled(distiller, "student") == ["0"]
    message = "train.compile: 6 of the student's modules run in activation checkpoints and are not compiled"
    assert caplog.messages.count(message) == 1


def test_two_forwards_may_precede_one_backward() -> None:
    torch.manual_seed(0)
    net, teacher = (nn.Sequential(nn.Sequential(Part(3), nn.BatchNorm2d(4)), nn.Conv2d(4, 3, 1)) for _ in range(2))
    student = Segmenter(net, 3)
    distiller = Distiller(student, Segmenter(teacher, 3), [("0", "0")], [FitNet(4, 4)]).train()
    plain = copy.deepcopy(distiller)
    distiller.compile_parts("aot_eager")
    images = [torch.rand(3, 32, 64) for _ in range(2)]
    labeled, unlabeled = student.prepare(images, _targets("segmentation", 32, 64)), student.prepare(images[::-1])
    for step in range(3):
        for each in (distiller, plain):
            terms = [*each(labeled, step).values(), *each(unlabeled, step, labeled=False).values()]
            each.zero_grad()
            torch.stack(terms).sum().backward()  # type: ignore[no-untyped-call]
    assert _compiled(distiller, "student") == ["0"]
    for ours, theirs in zip(distiller.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    torch.testing.assert_close(dict(distiller.named_buffers()), dict(plain.named_buffers()))


@pytest.mark.slow
def test_a_compiled_training_resumes_and_leaves_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root = tiny.write_data(tmp_path / "data")
    plain = distill(tiny.recipe(root), out=tmp_path / "plain")
    compiled = distill(tiny.recipe(root, compile=True), out=tmp_path / "compiled")
    assert "train.compile: " not in caplog.text
    resumed = tiny.resumed(monkeypatch, distill, tiny.recipe(root, compile=True), tmp_path / "resumed")
    expected = load_file(plain.weights)
    for run in (compiled, resumed):
        found = load_file(run.weights)
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-2, atol=1e-3)
    assert [row.keys() for row in tiny.rows(compiled.folder / "history.csv")] == [
        row.keys() for row in tiny.rows(plain.folder / "history.csv")
    ]


def test_a_module_that_is_no_single_graph_gives_way_to_its_parts(caplog: pytest.LogCaptureFixture) -> None:
    net = nn.Sequential(Part(3), Part(4, is_hard=True), Part(4), nn.Conv2d(4, 2, 1))
    network = CompiledNetwork(net, ["2.inner"], "student", "eager")
    images = torch.rand(2, 3, 8, 8)
    expected = net(images)
    with caplog.at_level(logging.INFO, "acamkd"):
        for _ in range(4):
            with network.running(), FeatureTap(net, ["2.inner"]) as tap:
                torch.testing.assert_close(net(images), expected)
                assert tap["2.inner"].shape == (2, 4, 8, 8)
    titles = {network._titles[module] for module, part in network._parts.items() if part._compiled is not None}
    assert titles == {"0", "1.inner", "2.inner"}
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("train.compile: the student's 1 is compiled in parts, since it is no single graph: ")
    assert not counters["graph_break"]
    assert all("forward" not in vars(module) for module in net.modules())
    # Another size compiles once more, and then serves every size.
    for side in (16, 24, 32):
        with network.running():
            net(torch.rand(2, 3, side, side))
    assert counters["stats"]["unique_graphs"] == 6


@pytest.mark.slow
def test_a_missing_compiler_is_found_out(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    assert can_compile(torch.device("cpu"))
    torch._dynamo.reset()
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    assert not can_compile(torch.device("cpu"))
    assert "train.compile: torch cannot compile for cpu here" in caplog.text
