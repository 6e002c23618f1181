"""NonFinite: what happens where a loss term or a gradient becomes NaN or infinite."""

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
"""Folder of the batches in a run folder."""
IN_A_ROW = 10
"""More steps than this, one behind the other, are not left out: then it is not the images."""
HALVINGS = 32
"""After more of them in a row, from 2^16 on, it is not the scaler's factor that makes a gradient infinite."""
KEPT = 10
"""At most this many batches are kept."""


class NonFinite(Callback):
    """Stops at a step whose loss or gradient is not finite, or leaves it out; the images are kept for a replay.

    A step that is left out changes neither weights, optimizer nor batch norm's statistics; it counts as a step for the
    schedules. Where several processes train, all of them see it at the same step: a process whose loss is not finite
    lets NaN into the gradient that they share. In 16-mixed an infinite gradient alone is left to its scaler, which
    leaves such steps out as a matter of course and halves its factor, unless that does not help.

    Args:
        folder: The run folder.
        skip: Leave such a step out; otherwise stop.
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
        """What a resumed run needs to go on."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.skipped, self.in_a_row = state_dict["skipped"], state_dict["in_a_row"]

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Images, batch_idx: int
    ) -> None:
        """Remember the batches of a step and, where it may be left out, batch norm's statistics before it."""
        assert isinstance(pl_module, TrainingModule)
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._window, pl_module.faults = [], []
            if self.skip:
                self._buffers = [(buffer, buffer.clone()) for buffer in pl_module.buffers()]
        self._window.append((batch_idx, batch))

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Look at the gradient, which is the same in every process by now."""
        assert isinstance(pl_module, TrainingModule)
        norms = [p.grad.norm() for p in pl_module.parameters() if p.grad is not None]
        if torch.stack(norms).isfinite().all():
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
            raise AcamkdError(f"{text}\n  it is the {self.in_a_row}th step in a row that would have to be left out")
        log.warning("%s; the step is left out, %d so far", text, self.skipped)
        optimizer.zero_grad()  # to None: the optimizer's step passes over every parameter
        for buffer, before in self._buffers:
            buffer.copy_(before)

    def _describe(self, trainer: L.Trainer, module: TrainingModule) -> str:
        """What is wrong in this process, with which images."""
        broken = [n for n, p in module.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        count = f"{len(broken)} parameter{'s' if len(broken) > 1 else ''}"
        text = "; ".join(module.faults) or (
            f"step {trainer.global_step}: the gradient is not finite at {count} "
            f"({', '.join(broken[:3])}{', ...' if len(broken) > 3 else ''}), though every loss term of this process is"
        )
        loader = trainer.train_dataloader
        assert isinstance(loader, ImageLoader)
        names = [file.name for index, _ in self._window for file in loader.files(index)]
        process = f"-process-{trainer.global_rank}" if trainer.world_size > 1 else ""
        file = self.folder / f"step-{trainer.global_step}{process}.pt"
        where = f"images {', '.join(names)}"
        if self.skipped <= KEPT:
            file.parent.mkdir(exist_ok=True)
            kept = {"images": 0, "targets": 1, "unlabelled": 2}
            parts = {
                name: [entry for _, batch in self._window for part in batch[place : place + 1] for entry in part]
                for name, place in kept.items()
            }
            torch.save({**move_data_to_device(parts, "cpu"), "files": names, "fault": text}, file)
            where += f", kept in {file}"
        return f"{text}; {where}"
