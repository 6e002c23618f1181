"""Parameters without a gradient are named once."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from acamkd import config
from acamkd.distillation.distiller import Distiller
from acamkd.engine.metrics import Scorer
from acamkd.engine.module import TrainingModule
from acamkd.engine.trainer import Recorder, build_trainer
from acamkd.engine.unreached import STEPS, Unreached
from acamkd.models.segmentation import Segmenter


def _train(net: nn.Module, steps: int, start: int = 0) -> Unreached:
    """Steps in which all but `unused` get a gradient, `late` from the third step on."""
    scorer = Scorer("segmentation", ("a", "b"))
    module: Any = TrainingModule(Distiller(Segmenter(net, 2)), config.Train(epochs=1), scorer)
    watch, trainer = Unreached(), SimpleNamespace(global_step=start)
    watch.on_train_start(trainer, module)  # type: ignore[arg-type]
    for step in range(start, start + steps):
        trainer.global_step = step
        for name, parameter in net.named_parameters():
            if parameter.requires_grad and "unused" not in name and ("late" not in name or step > 1):
                parameter.grad = torch.zeros_like(parameter)
        watch.on_before_optimizer_step(trainer)  # type: ignore[arg-type]
    trainer.global_step = start + steps
    watch.on_train_end(trainer, module)  # type: ignore[arg-type]
    return watch


@pytest.mark.parametrize(("steps", "said"), [(STEPS + 5, STEPS), (4, 4)])
def test_they_are_named_once(steps: int, said: int, caplog: pytest.LogCaptureFixture) -> None:
    net = nn.ModuleDict({name: nn.Conv2d(3, 2, 1) for name in ("used", "late", "unused", "frozen")})
    net["frozen"].requires_grad_(False)
    with caplog.at_level(logging.WARNING):
        _train(net, steps)
        assert [record.getMessage() for record in caplog.records] == [
            f"2 of the student's parameters got no gradient in the first {said} steps, and stay as they are: "
            "unused.weight, unused.bias"
        ]
        caplog.clear()
        _train(net, 3, start=STEPS)  # resumed
        _train(nn.ModuleDict({"used": nn.Conv2d(3, 2, 1)}), 3)
    assert not caplog.records


@pytest.mark.parametrize(
    ("strategy", "skips", "found"), [("auto", True, True), ("ddp", True, True), ("auto", False, False)]
)
def test_several_processes_look_for_them_where_needed(strategy: str, skips: bool, found: bool, tmp_path: Path) -> None:
    train = config.Train(epochs=1, accelerator="cpu", devices=2, strategy=strategy)
    trainer = build_trainer(train, Recorder(tmp_path, "w", "mIoU"), progress=False, skips_parameters=skips)
    assert trainer.world_size == 2
    assert trainer.strategy._ddp_kwargs.get("find_unused_parameters", False) is found  # type: ignore[attr-defined]
