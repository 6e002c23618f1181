"""NonFinite: handles steps whose loss or gradient is NaN or infinite."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from acamkd.data.loading import ImageLoader, Images
from acamkd.engine.module import TrainingModule
from acamkd.errors import AcamkdError

log = logging.getLogger(__name__)

NONFINITE = "nonfinite"
"""Folder within the run folder that holds the images of such steps."""
IN_A_ROW = 10
"""More consecutive steps than this are not skipped: the run stops, since single images cannot be the cause."""
HALVINGS = 32
"""In 16-mixed an infinite gradient counts as a fault after this many consecutive halvings of the loss scale.

The scale starts at 2^16 and is then 2^-16, too small to be the cause.
"""
KEPT = 10
"""The images of at most this many steps are saved."""


class NonFinite(Callback):
    """Stops the run at a step whose loss or gradient is not finite, or skips the step; its images are saved.

    A skipped step changes neither weights, optimizer nor batch-norm statistics; the schedules still count it. With
    several processes, all of them detect the fault at the same step: a process whose loss is not finite puts NaN into
    the shared gradient. In 16-mixed the gradient scaler handles an infinite gradient: it skips the step and halves the
    loss scale. Only a gradient that stays infinite after HALVINGS halvings is a fault.

    Args:
        folder: The run folder.
        skip: Skip such a step; otherwise stop the run.
    """

    def __init__(self, folder: Path, *, skip: bool) -> None:
        self.folder = folder / NONFINITE
        self.skip = skip
        self.skipped = 0
        self.in_a_row = 0
        self._halvings = 0
        self._window: list[tuple[int, Images]] = []
        self._buffers: list[tuple[Tensor, Tensor]] = []

    def state_dict(self) -> dict[str, Any]:
        """Return the counters that a resumed run continues from."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "halvings": self._halvings}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the counters from a checkpoint."""
        self.skipped, self.in_a_row = state_dict["skipped"], state_dict["in_a_row"]
        self._halvings = state_dict.get("halvings", 0)  # older checkpoints have none

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Images, batch_idx: int
    ) -> None:
        """Keep the batches of a step and, if it may be skipped, a copy of the buffers (batch-norm statistics)."""
        assert isinstance(pl_module, TrainingModule)
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._window, pl_module.faults = [], []
            if self.skip:
                self._buffers = [(buffer, buffer.clone()) for buffer in pl_module.buffers()]
        self._window.append((batch_idx, batch))

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Check the gradient, which is the same in every process by now."""
        assert isinstance(pl_module, TrainingModule)
        norms = torch._foreach_norm([p.grad for p in pl_module.parameters() if p.grad is not None])
        if pl_module.fetch(torch.stack(norms).isfinite().all()) and not pl_module.faults:
            self.in_a_row = self._halvings = 0
            return
        is_for_scaler = trainer.precision == "16-mixed" and self._halvings < HALVINGS
        if is_for_scaler and not trainer.strategy.reduce_boolean_decision(bool(pl_module.faults), all=False):
            self.in_a_row = 0
            self._halvings += 1
            return
        self.skipped += 1
        self.in_a_row += 1
        text = self._describe(trainer, pl_module)
        if not self.skip:
            raise AcamkdError(text)
        if self.in_a_row > IN_A_ROW:
            raise AcamkdError(
                f"{text}\n  it is consecutive step {self.in_a_row} with this fault, and at most {IN_A_ROW} are skipped"
            )
        log.warning("%s; the step is skipped, %d so far", text, self.skipped)
        optimizer.zero_grad()  # sets every gradient to None, so that the optimizer updates nothing
        for buffer, before in self._buffers:
            buffer.copy_(before)

    def _describe(self, trainer: L.Trainer, module: TrainingModule) -> str:
        """Describe what is not finite in this process, and name the images."""
        broken = [n for n, p in module.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        count = f"{len(broken)} parameter{'s' if len(broken) > 1 else ''}"
        text = "; ".join(module.faults) or (
            f"step {trainer.global_step}: the gradient is not finite at {count} "
            f"({', '.join(broken[:3])}{', ...' if len(broken) > 3 else ''}), though every loss term of this process "
            "is finite"
        )
        loader = trainer.train_dataloader
        assert isinstance(loader, ImageLoader)
        names = [str(file) for index, _ in self._window for file in loader.files(index)]
        process = f"-process-{trainer.global_rank}" if trainer.world_size > 1 else ""
        file = self.folder / f"step-{trainer.global_step}{process}.pt"
        where = f"images {', '.join(names)}"
        if self.skipped <= KEPT:
            file.parent.mkdir(exist_ok=True)
            kept = {"images": 0, "targets": 1, "unlabeled": 2}
            parts = {
                name: [entry for _, batch in self._window for part in batch[place : place + 1] for entry in part]
                for name, place in kept.items()
            }
            torch.save({**move_data_to_device(parts, "cpu"), "files": names, "fault": text}, file)
            where += f", kept in {file}"
        return f"{text}; {where}"
