"""Checkpoints that survive: written whole or not at all, the one before kept, read without running any code."""

from __future__ import annotations

import io
import logging
import signal
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from acamkd.data.loading import ImageLoader
from acamkd.engine.runs import CHECKPOINT, PREVIOUS, TERMINATED, OtherRunError
from acamkd.errors import AcamkdError
from acamkd.files import written_whole
from acamkd.models.weight_files import DamagedFileError, read_file

log = logging.getLogger(__name__)

DAMAGED = "damaged.ckpt"
"""A last checkpoint that could not be read."""


def find_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a run folder that can be read; the log says so where it is not the last one.

    Raises:
        AcamkdError: None of those that are there can be read, or one holds more than data.
    """
    damaged: list[DamagedFileError] = []
    for file in (folder / CHECKPOINT, folder / PREVIOUS):
        if not file.is_file():
            continue
        try:
            read_file(file)
        except DamagedFileError as error:
            damaged.append(error)
            continue
        for damage in damaged:
            log.warning("%s; going on from the one before, %s", damage, file)
            with suppress(FileNotFoundError):  # another process was first
                # Aside, or the next save would keep it in the place of the one that can be read.
                (folder / CHECKPOINT).replace(folder / DAMAGED)
        return file
    if damaged:
        raise AcamkdError(f"{damaged[0]}, or start again with --overwrite") from damaged[0]
    return None


class CheckpointFiles(TorchCheckpointIO):
    """Reads and writes checkpoints for Lightning."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a file beside `path` and move it there; what `path` held before becomes PREVIOUS."""
        path = Path(path)
        content = io.BytesIO()  # torch.save would turn a full disk into a RuntimeError about positions
        torch.save(checkpoint, content)
        with written_whole(path, previous=path.with_name(PREVIOUS)) as unfinished:
            unfinished.write_bytes(content.getbuffer())

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a file of tensors and plain values; AcamkdError if it holds anything else, which could run code."""
        content: dict[str, Any] = read_file(Path(path))
        return content


class Checkpoints(Checkpoint):
    """Writes last.ckpt at the end of each epoch, every so many steps within one, and when SIGTERM asks the run to end.

    Args:
        folder: The run folder.
        every: Optimization steps between two checkpoints within an epoch; None writes none there.
    """

    def __init__(self, folder: Path, every: int | None = None) -> None:
        self.folder = folder
        self.every = every
        self.terminated = False
        self.position = (0, 0)
        """Epoch, and how many of its batches are done; it is all that the order of the images needs to go on."""
        self.processes = 1
        """How many train together: positions, steps and schedules are counted for each of them."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Count the processes, before the checkpoint is read."""
        self.processes = trainer.world_size

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on."""
        return {"position": self.position, "processes": self.processes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint; raises OtherRunError if another number of processes wrote it."""
        before = state_dict.get("processes", self.processes)
        if before != self.processes:
            raise OtherRunError(
                f"{self.folder} was trained by {before} process{'es' if before > 1 else ''}, and now there "
                f"{'are' if self.processes > 1 else 'is'} {self.processes}, so that batches and steps are others: "
                f"resume with {before} (train.devices times train.num_nodes), or start again with --overwrite"
            )
        self.position = state_dict["position"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin where the checkpoint was written. Listen to SIGTERM in the place of Lightning, which restores it."""
        if isinstance(trainer.train_dataloader, ImageLoader):  # Lightning itself would read the epoch from its start
            trainer.train_dataloader.begin(*self.position)
        if threading.current_thread() is threading.main_thread():  # no other one may
            signal.signal(signal.SIGTERM, self._note)

    def _note(self, *_: object) -> None:
        self.terminated = True

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save between two steps; behind the last one of an epoch, which has its end still to come, that end saves."""
        if trainer.is_last_batch or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        # Whichever process was asked to end, all of them do.
        end = trainer.strategy.reduce_boolean_decision(self.terminated, all=False)
        if end or (self.every and trainer.global_step % self.every == 0):
            self._save(trainer, (trainer.current_epoch, batch_idx + 1))
        if end:
            raise SystemExit(TERMINATED)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save; the recorder has kept the best network and the history by now."""
        self._save(trainer, (trainer.current_epoch + 1, 0))
        if trainer.strategy.reduce_boolean_decision(self.terminated, all=False):
            raise SystemExit(TERMINATED)

    def _save(self, trainer: L.Trainer, position: tuple[int, int]) -> None:
        self.position = position
        for logger in trainer.loggers:
            logger.save()  # the log of the steps must not be behind the checkpoint
        trainer.save_checkpoint(self.folder / CHECKPOINT)
