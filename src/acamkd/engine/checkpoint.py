"""Robust checkpoints: written completely or not at all, the previous one kept, read without running code."""

from __future__ import annotations

import io
import logging
import signal
import threading
from collections.abc import Mapping
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
"""Name for a last checkpoint that cannot be read."""


def find_checkpoint(folder: Path) -> Path | None:
    """Find the newest readable checkpoint of a run folder; a warning is logged if it is not the last one.

    Raises:
        AcamkdError: No checkpoint in the folder can be read, or one holds more than tensors and plain values.
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
            log.warning("%s; resuming from the previous checkpoint, %s", damage, file)
            with suppress(FileNotFoundError):  # another process has moved it already
                # Moved aside: the next save would otherwise keep it as PREVIOUS, instead of the readable one.
                (folder / CHECKPOINT).replace(folder / DAMAGED)
        return file
    if damaged:
        raise AcamkdError(f"{damaged[0]}, or start again with --overwrite") from damaged[0]
    return None


class CheckpointFiles(TorchCheckpointIO):
    """Reads and writes checkpoints for Lightning."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a temporary file and move it to `path`; the previous file at `path` becomes PREVIOUS."""
        path = Path(path)
        content = io.BytesIO()  # with a file, torch.save would report a full disk as an unrelated RuntimeError
        torch.save(checkpoint, content)
        with written_whole(path, previous=path.with_name(PREVIOUS)) as unfinished:
            unfinished.write_bytes(content.getbuffer())

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a file of tensors and plain values; raises AcamkdError if it holds objects that could run code."""
        content: dict[str, Any] = read_file(Path(path))
        return content


class Checkpoints(Checkpoint):
    """Writes last.ckpt after each epoch, after every `every` steps within an epoch, and on SIGTERM.

    Args:
        folder: The run folder.
        every: Optimization steps between two checkpoints within an epoch; None writes them only after epochs.
        origin: Hashes of what the training learns from, by name. A resumed run must learn from the same.
    """

    def __init__(self, folder: Path, every: int | None = None, origin: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self.every = every
        self.origin = dict(origin or {})
        self.terminated = False
        self.position = (0, 0)
        """Epoch, and number of its completed batches; the order of the images depends on nothing else."""
        self.processes = 1
        """Number of processes; positions, steps and schedules are counted per process."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Note the number of processes before the checkpoint is read."""
        self.processes = trainer.world_size

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs."""
        return {"position": self.position, "processes": self.processes, "origin": self.origin}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state from a checkpoint.

        Raises:
            OtherRunError: Another number of processes wrote it, or it learned from other images or another teacher.
        """
        kept = state_dict.get("origin", {})  # older checkpoints have none
        if changed := [name for name, content in kept.items() if content != self.origin.get(name)]:
            raise OtherRunError(
                f"{self.folder} was begun with other contents of: {', '.join(changed)}",
                "put back what it was begun with, or start again with --overwrite",
            )
        before = state_dict.get("processes", self.processes)
        if before != self.processes:
            raise OtherRunError(
                f"{self.folder} was trained by {before} process{'es' if before > 1 else ''}, and now there "
                f"{'are' if self.processes > 1 else 'is'} {self.processes}, which changes batches and steps",
                f"resume with {before} (train.devices times train.num_nodes), or start again with --overwrite",
            )
        self.position = state_dict["position"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start at the checkpoint's position, and handle SIGTERM instead of Lightning, which restores the handler."""
        if isinstance(trainer.train_dataloader, ImageLoader):  # Lightning would read the epoch from its start
            trainer.train_dataloader.begin(*self.position)
        if threading.current_thread() is threading.main_thread():  # only the main thread may set signal handlers
            signal.signal(signal.SIGTERM, self._note)

    def _note(self, *_: object) -> None:
        self.terminated = True

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save after a step; after the last step of an epoch, `on_train_epoch_end` saves."""
        if trainer.is_last_batch or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        # If one process is asked to end, all of them end.
        end = trainer.strategy.reduce_boolean_decision(self.terminated, all=False)
        if end or (self.every and trainer.global_step % self.every == 0):
            self._save(trainer, (trainer.current_epoch, batch_idx + 1))
        if end:
            raise SystemExit(TERMINATED)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save a checkpoint; the recorder has saved the best network and the history by now."""
        self._save(trainer, (trainer.current_epoch + 1, 0))
        if trainer.strategy.reduce_boolean_decision(self.terminated, all=False):
            raise SystemExit(TERMINATED)

    def _save(self, trainer: L.Trainer, position: tuple[int, int]) -> None:
        self.position = position
        for logger in trainer.loggers:
            logger.save()  # the step log must reach as far as the checkpoint
        trainer.save_checkpoint(self.folder / CHECKPOINT)
