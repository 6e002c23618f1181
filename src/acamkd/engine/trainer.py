"""The Lightning trainer of one run folder: checkpoints, the best weights, history, progress."""

from __future__ import annotations

import csv
import logging
import math
import os
import time
import warnings
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger

from acamkd.config import Train
from acamkd.engine.module import TrainingModule
from acamkd.models.weights import save_weights

log = logging.getLogger(__name__)

CHECKPOINT = "last.ckpt"

# Lightning sets its own levels on import; what it would say there is said here, or is advertising.
for name in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(name).setLevel(logging.WARNING)
warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
warnings.filterwarnings("ignore", message="Experiment logs directory .* exists and is not empty")
warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")


class Recorder(Callback):
    """Keeps the best network, writes history.csv and says after every epoch where the training stands.

    Args:
        folder: The run folder.
        weights: File name of the best network in it.
        metric: Name of the deciding metric, the higher the better.
    """

    def __init__(self, folder: Path, weights: str, metric: str) -> None:
        self.folder = folder
        self.weights = weights
        self.metric = metric
        self.best: dict[str, float] = {}
        self.best_epoch = 0
        self.history: list[dict[str, float]] = []
        self.seconds = 0.0
        self._steps = _rows(folder / "logs/metrics.csv")  # now, because Lightning's logger deletes the file

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on."""
        return {"best": self.best, "best_epoch": self.best_epoch, "history": self.history, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        for name, value in state_dict.items():
            setattr(self, name, value)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock and the log of the steps where a resumed run's last finished epoch left them."""
        self._started = time.monotonic() - self.seconds
        for row in self._steps:
            if int(row["epoch"]) < len(self.history):
                trainer.loggers[0].log_metrics({k: v for k, v in row.items() if v}, int(row["step"]))  # type: ignore[misc]

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget the last epoch's figures; a loss that has stopped would keep them otherwise."""
        trainer.callback_metrics.clear()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the best network and write one row; validation has run by now, if it was due."""
        assert isinstance(pl_module, TrainingModule)
        self.seconds = time.monotonic() - self._started
        epoch, scores, pl_module.scores = trainer.current_epoch + 1, pl_module.scores, {}
        losses = {
            name.removesuffix("_epoch"): float(value)
            for name, value in trainer.callback_metrics.items()
            if name.endswith("_epoch")
        }
        if scores and not scores[self.metric] <= self.best.get(self.metric, -math.inf):
            self.best, self.best_epoch = scores, epoch
            if trainer.is_global_zero:
                save_weights(pl_module.distiller.student.net, self.folder / self.weights)
        row = {"epoch": epoch, "step": trainer.global_step, "seconds": round(self.seconds, 1)}
        self.history.append({**row, **scores, **losses})
        if trainer.is_global_zero:
            self._write_history()
            self._say(epoch, trainer.max_epochs or epoch, losses, scores)

    def _write_history(self) -> None:
        columns = list(dict.fromkeys(name for row in self.history for name in row))
        temporary = self.folder / "history.csv.tmp"
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.history)
        os.replace(temporary, self.folder / "history.csv")

    def _say(self, epoch: int, epochs: int, losses: dict[str, float], scores: dict[str, float]) -> None:
        sums: dict[str, float] = {}
        for name, value in losses.items():
            _, _, term = name.partition("loss/")
            kind = term.partition("/")[0]
            if kind:
                kind = kind if kind in ("task", "teacher") else "distillation"
                sums[kind] = sums.get(kind, 0.0) + value
        left = timedelta(seconds=round(self.seconds / epoch * (epochs - epoch)))
        parts = [f"epoch {epoch}/{epochs}", f"task loss {sums['task']:.3f}"]
        if "distillation" in sums:
            parts.append(f"distillation {sums['distillation']:.3f}")
        if scores:
            parts.append(f"{self.metric} {scores[self.metric]:.2f} (best {self.best[self.metric]:.2f})")
        log.info("%s, %s left", ", ".join(parts), left)


class _Bar(TQDMProgressBar):
    """Lightning's bar, with epochs counted from 1 as everywhere else, and the loss alone beside it."""

    def on_train_epoch_start(self, trainer: L.Trainer, *args: Any) -> None:
        super().on_train_epoch_start(trainer, *args)
        self.train_progress_bar.set_description(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}")

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        return (
            {"loss": trainer.progress_bar_metrics["loss_step"]} if "loss_step" in trainer.progress_bar_metrics else {}
        )


def _rows(file: Path) -> list[dict[str, str]]:
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def build_trainer(
    config: Train, recorder: Recorder, *, progress: bool, callbacks: Sequence[Callback] = ()
) -> L.Trainer:
    """A Lightning trainer that writes into the recorder's run folder.

    Args:
        config: The recipe's `train`.
        recorder: Keeps the best network and the history.
        progress: Whether to draw a bar.
        callbacks: More of them, called after the recorder and before the checkpoint is written.
    """
    folder = recorder.folder
    all_callbacks: list[Callback] = [
        recorder,
        *callbacks,
        ModelCheckpoint(
            folder, Path(CHECKPOINT).stem, save_top_k=1, every_n_epochs=1, save_on_train_epoch_end=True,
            enable_version_counter=False,
        ),
    ]  # fmt: skip
    if progress:
        all_callbacks.append(_Bar())
    return L.Trainer(
        accelerator=config.accelerator,
        devices=config.devices,
        precision=config.precision,
        max_epochs=config.epochs,
        accumulate_grad_batches=config.accumulate,
        gradient_clip_val=config.clip,
        check_val_every_n_epoch=config.eval_every,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        logger=CSVLogger(folder, name=None, version="logs", flush_logs_every_n_steps=20),
        callbacks=all_callbacks,
        enable_progress_bar=progress,
        enable_model_summary=False,
        use_distributed_sampler=False,  # the seeded sampler takes its own share
    )
