"""The number of CPU threads: measured in the first steps, since small networks are often fastest with one."""

from __future__ import annotations

import logging
import os
import time
from statistics import median
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

log = logging.getLogger(__name__)

ROUNDS, STEPS = 2, 4
"""Each number of threads is tried in so many windows of so many steps, whose first step only warms up."""

SMALL = 0.25
"""Seconds of a step with all threads above which more threads are taken for faster, and nothing is tried."""


class ThreadChoice(Callback):
    """Tries all threads, half of them, a quarter and so on to one in the first steps, and goes on with the fastest.

    A thread costs time as soon as it waits: for the others where layers are small, or for a processor where other
    programs are at work. Nothing is tried where OMP_NUM_THREADS is set, on other devices, and with several processes.
    A resumed run takes the number that its checkpoint has, since rounding depends on it.

    Attributes:
        threads: The number of threads; None before it is chosen.
    """

    def __init__(self) -> None:
        self.threads: int | None = None
        self._all = torch.get_num_threads()
        self._candidates: list[int] = []
        self._times: dict[int, list[float]] = {}
        self._step = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the chosen number."""
        return {"threads": self.threads}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the chosen number."""
        self.threads = state_dict["threads"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Decide what there is to try."""
        fixed = self._all == 1 or "OMP_NUM_THREADS" in os.environ or trainer.world_size > 1
        if fixed or trainer.strategy.root_device.type != "cpu":
            self.threads = self._all
        elif self.threads is None:
            self._candidates = _halvings(self._all)
            self._times = {count: [] for count in self._candidates}
        else:
            torch.set_num_threads(min(self.threads, self._all))

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the number that this step tries, and start the clock."""
        if self.threads is None:
            torch.set_num_threads(self._candidates[self._step // STEPS % len(self._candidates)])
            self._began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the step's time; after the last one, choose."""
        if self.threads is not None:
            return
        took = time.perf_counter() - self._began
        if self._step % STEPS:
            self._times[torch.get_num_threads()].append(took)
        self._step += 1
        if self._step == STEPS and took > SMALL:
            self._choose(self._all)
        elif self._step == ROUNDS * STEPS * len(self._candidates):
            self._choose(min(self._times, key=lambda count: median(self._times[count])))

    def _choose(self, count: int) -> None:
        self.threads = count
        torch.set_num_threads(count)
        if count < self._all:
            fastest, usual = (1 / median(self._times[each]) for each in (count, self._all))
            log.info("%d of %d threads from here on: %.3g instead of %.3g steps a second; OMP_NUM_THREADS fixes it",
                     count, self._all, fastest, usual)  # fmt: skip

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the rest of the program its threads back."""
        torch.set_num_threads(self._all)


def _halvings(count: int) -> list[int]:
    """The number itself, half of it, and so on to 1."""
    return [count] if count == 1 else [count, *_halvings(count // 2)]
