"""A compiled distillation computes what the same one computes without a compiler."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import tiny
from acamkd.config import Loss, Model
from acamkd.distillation.build import build_distiller
from acamkd.distillation.compiled import CompiledNetwork, can_compile
from acamkd.distillation.distiller import Distiller
from acamkd.distillation.taps import FeatureTap
from acamkd.models import Batch, Target, build
from acamkd.models.base import Task
from tiny_hf import OPTIONS

QUERIES = {"arch": "hf/rt_detr_v2", "options": OPTIONS["rt_detr_v2"]}

NETWORKS: dict[str, tuple[Task, dict[str, Any], int, dict[str, list[str]]]] = {
    "detector": ("detection", tiny.RETINANET, 128, {"student": ["backbone", "head"], "teacher": ["backbone", "head"]}),
    "queries": ("detection", QUERIES, 64, {}),
    "segmenter": (
        "segmentation", tiny.FPN, 64, {"student": ["encoder", "decoder"], "teacher": ["encoder", "decoder"]},
    ),
}  # fmt: skip
"""Task, network, side of the images, and what is to be compiled."""


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def _targets(task: Task, side: int) -> list[Target]:
    if task == "segmentation":
        return [{"mask": torch.arange(side)[:, None].expand(side, side) // (side // 3 + 1)}] * 2
    box = torch.tensor([[4.0, 6, side / 2, side / 3]])
    return [{"boxes": box, "labels": torch.tensor([1])}, {"boxes": box + 9, "labels": torch.tensor([3])}]


def _distiller(name: str, *losses: str) -> tuple[Distiller, Batch]:
    task, section, side, _ = NETWORKS[name]
    torch.manual_seed(0)
    student, teacher = (build(Model(**section), task, 3, (side, side)) for _ in range(2))
    pairs = ("segmentation_head.0",) if task == "segmentation" else student.comparable_layers()
    distiller = build_distiller(student, teacher, [Loss(name=loss, pairs=pairs) for loss in losses])
    images = [torch.rand(3, side, side, generator=torch.Generator().manual_seed(index)) for index in range(2)]
    return distiller.train(), student.prepare(images, _targets(task, side))


def _run(distiller: Distiller, batch: Batch, steps: int = 3) -> list[dict[str, Tensor]]:
    """Terms of some steps and the gradients that follow, by name."""
    found = []
    for step in range(steps):
        torch.manual_seed(0)  # of denoising
        terms = distiller(batch, step)
        distiller.zero_grad()
        torch.stack(list(terms.values())).sum().backward()  # type: ignore[no-untyped-call]
        gradients = {name: p.grad for name, p in distiller.named_parameters() if p.grad is not None}
        found.append({**{name: term.detach() for name, term in terms.items()}, **gradients})
    return found


def _compiled(distiller: Distiller, who: str) -> list[str]:
    """Names of a network's parts that are one graph each."""
    (network,) = (each for each in distiller._compiled if isinstance(each, CompiledNetwork) and each._who == who)
    return [network._titles[module] for module, part in network._parts.items() if part._compiled is not None]


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("name", "loss"),
    [("detector", "fitnet"), ("segmenter", "acam"), ("queries", "fitnet")]
    + [pytest.param(name, "acam", marks=pytest.mark.slow) for name in ("detector", "queries")],
)
def test_it_computes_the_same(name: str, loss: str, backend: str) -> None:
    distiller, batch = _distiller(name, loss)
    plain = copy.deepcopy(distiller)
    names = list(distiller.state_dict())
    distiller.compile_parts(backend)
    found, expected = _run(distiller, batch), _run(plain, batch)
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            torch.testing.assert_close(ours[key], value, rtol=1e-5, atol=1e-5, msg=lambda m: f"{step} {key}: {m}")
    for key, value in plain.student.state_dict().items():  # running statistics among them
        torch.testing.assert_close(distiller.student.state_dict()[key], value, rtol=1e-5, atol=1e-5)
    assert list(distiller.state_dict()) == names
    # Each part is one graph; only ACAM's look-ahead, which differentiates, parts one of its own.
    assert all("autograd.grad" in reason for reason in counters["graph_break"]) or name == "queries"
    for who, parts in NETWORKS[name][3].items():
        assert _compiled(distiller, who) == parts
    assert "backbone" in " ".join(_compiled(distiller, "student") + ["backbone"] * (name == "segmenter"))
    graphs = counters["stats"]["unique_graphs"]
    _run(distiller, batch, steps=2)
    assert counters["stats"]["unique_graphs"] == graphs
    # Evaluation, at any size, and taps within the parts are as they were.
    prediction = distiller.student.eval().predict([torch.zeros(3, 32, 96)])
    assert counters["stats"]["unique_graphs"] == graphs
    assert len(prediction) == 1
