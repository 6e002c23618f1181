"""Parameters of the student that no gradient reaches, said once."""

from __future__ import annotations

import logging
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch import nn

from acamkd.engine.module import TrainingModule

log = logging.getLogger(__name__)

STEPS = 20
"""Number of steps without a gradient after which a parameter is named."""


class Unreached(Callback):
    """Names the trainable parameters of the student that got no gradient in the first STEPS steps of a training."""

    def __init__(self) -> None:
        self.waiting: dict[str, nn.Parameter] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Wait for every parameter, unless the training goes on after these steps."""
        assert isinstance(pl_module, TrainingModule)
        if trainer.global_step < STEPS:
            student = pl_module.distiller.student.net
            self.waiting = {name: each for name, each in student.named_parameters() if each.requires_grad}

    def on_before_optimizer_step(self, trainer: L.Trainer, *_: Any) -> None:
        """Drop those that have a gradient."""
        self.waiting = {name: each for name, each in self.waiting.items() if each.grad is None}
        if trainer.global_step == STEPS - 1:
            self._say(STEPS)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Name them after a shorter training, too."""
        self._say(trainer.global_step)

    def _say(self, steps: int) -> None:
        if self.waiting:
            names, more = list(self.waiting)[:3], ", ..." if len(self.waiting) > 3 else ""
            log.warning(
                "%d of the student's parameters got no gradient in the first %d steps, and stay as they are: %s%s",
                len(self.waiting), steps, ", ".join(names), more,
            )  # fmt: skip
        self.waiting = {}
