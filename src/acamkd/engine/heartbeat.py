"""Where no progress bar is drawn: lines that say that a training is at work, and how long it will take."""

from __future__ import annotations

import logging
import time
from datetime import timedelta
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

log = logging.getLogger(__name__)

FIRST, EVERY = 10.0, 60.0
"""Seconds until the first line, and between two of them."""


class Heartbeat(Callback):
    """Says every minute within an epoch which step it is at, how fast it is, and how long the training will take.

    The rate is that of the steps since the fit began, evaluations included.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._began = time.monotonic()
        self._next = self._began + FIRST
        self._first_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Say it, where it is time and a step was done."""
        now, done = time.monotonic(), trainer.global_step - self._first_step
        if now < self._next or done < 1:
            return
        self._next = now + EVERY
        rate = done / (now - self._began)
        left = timedelta(seconds=round((trainer.estimated_stepping_batches - trainer.global_step) / rate))
        log.info(
            "epoch %d/%s, batch %d of %s, %.2g steps a second, %s left",
            trainer.current_epoch + 1, trainer.max_epochs, batch_idx + 1, trainer.num_training_batches, rate, left,
        )  # fmt: skip
