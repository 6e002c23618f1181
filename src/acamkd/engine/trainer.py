"""The Lightning trainer of one run folder: checkpoints, the best weights, history, progress."""

from __future__ import annotations

import csv
import logging
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from timm.layers.norm_act import convert_sync_batchnorm
from torch import nn

from acamkd.config import Train
from acamkd.data.loading import Images
from acamkd.engine.averaging import EMA
from acamkd.engine.checkpoint import CheckpointFiles, Checkpoints
from acamkd.engine.heartbeat import Heartbeat
from acamkd.engine.metrics import gathered, own_part
from acamkd.engine.module import TrainingModule
from acamkd.engine.nonfinite import NonFinite
from acamkd.engine.runs import EMA_COLUMN
from acamkd.engine.trackers import Tracker, trackers_of
from acamkd.errors import AcamkdError
from acamkd.files import written_whole

log = logging.getLogger(__name__)

# Lightning sets its own levels on import; its messages repeat those of this package, or advertise.
for name in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(name).setLevel(logging.WARNING)
warnings.filterwarnings("ignore", message="Experiment logs directory .* exists and is not empty")
warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch ended")
warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")


class Recorder(Callback):
    """Saves the best network, logs every step, writes history.csv and reports the progress after every epoch.

    A row of history.csv has the means of the steps' values over the images of the epoch.

    Args:
        folder: The run folder.
        weights: File name of the best network in it.
        metric: Name of the deciding metric, the higher the better.
        patience: Evaluations in a row that may stay below the best one before the training ends; None for any number.
        ema: The average of the weights that is evaluated, and so is what the best network is; None without one.
    """

    def __init__(
        self, folder: Path, weights: str, metric: str, *, patience: int | None = None, ema: EMA | None = None
    ) -> None:
        self.folder = folder
        self.weights = weights
        self.metric = metric
        self.patience = patience
        self.ema = ema
        self.best: dict[str, float] = {}
        self.best_epoch = 0
        self.history: list[dict[str, float]] = []
        self.seconds = 0.0
        self.cpu_seconds = 0.0
        """Of this process alone, without those that load images."""
        self.step = 0
        self._rates: dict[str, float] = {}
        self.sums: dict[str, list[float]] = {}
        """By name, the sum over the epoch's images so far, and their number."""
        self._steps = _rows(folder / "logs/metrics.csv")  # read now, because Lightning's logger deletes the file

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs, with the sums of every process; all processes must call this."""
        names = ("best", "best_epoch", "history", "seconds", "cpu_seconds", "step")
        return {name: getattr(self, name) for name in names} | {"sums": gathered(self.sums)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state from a checkpoint."""
        for name, value in state_dict.items():
            setattr(self, name, (own_part(value) or {}) if name == "sums" else value)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clocks, the step log and the trackers; a resumed run continues them from its checkpoint."""
        trainer.should_stop = self.has_settled  # it may have been killed right after its last epoch
        self._started = time.monotonic() - self.seconds
        self._cpu_started = time.process_time() - self.cpu_seconds
        tables = [logger for logger in trainer.loggers if isinstance(logger, CSVLogger)]
        for row in self._steps:
            if int(row["step"]) < self.step:
                for table in tables:
                    table.log_metrics({k: v for k, v in row.items() if v}, int(row["step"]))  # type: ignore[misc]
        for tracker in trackers_of(trainer.loggers):
            tracker.begin(self.step)
        for logger in trainer.loggers:
            logger.save()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reset the sums; an epoch that is resumed in its middle keeps its own."""
        self.sums = {}

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Note the step's learning rates: the schedule advances before the step is logged."""
        assert isinstance(pl_module, TrainingModule)
        groups = zip(pl_module.group_names, optimizer.param_groups, strict=True)
        self._rates = {f"lr/{name}": group["lr"] for name, group in groups}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Images, batch_idx: int
    ) -> None:
        """Log the step and add it to the epoch's means."""
        assert isinstance(pl_module, TrainingModule)
        values, images = pl_module.values, len(batch[0])
        for name, value in values.items():
            total, count = self.sums.get(name, (0.0, 0))
            self.sums[name] = [total + value * images, count + images]
        if trainer.global_step > self.step:  # not while gradients accumulate
            row = {f"{name}_step": value for name, value in values.items()}
            weights = {f"weight/{name}": weight for name, weight in pl_module.distiller.weights(self.step).items()}
            self._log(trainer, {"epoch": trainer.current_epoch, **row}, self.step, more={**self._rates, **weights})
        self.step = trainer.global_step
        self._read_clocks()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the best network and write one row; a validation that is due has run by now."""
        assert isinstance(pl_module, TrainingModule)
        self._read_clocks()
        epoch, scores, pl_module.scores = trainer.current_epoch + 1, pl_module.scores, {}
        losses = _means(gathered(self.sums))
        if scores and math.isnan(scores[self.metric]):
            log.warning("%s is undefined: %s", self.metric, pl_module.validator.why_undefined)
        if scores:
            self._log(trainer, {"epoch": trainer.current_epoch, **scores}, self.step - 1)
        self._log(trainer, {}, self.step - 1, more={f"{name}_epoch": value for name, value in losses.items()})
        best = self.best.get(self.metric, math.nan)
        if scores and (math.isnan(best) or scores[self.metric] > best):
            self.best, self.best_epoch = scores, epoch
            if trainer.is_global_zero:
                with self.ema.applied(pl_module.distiller.student.net) if self.ema else nullcontext():
                    pl_module.save_best(self.folder / self.weights)
        row = {"epoch": epoch, "step": trainer.global_step, "seconds": round(self.seconds, 1)}
        averaged = {EMA_COLUMN: self.ema.decay_now} if self.ema else {}
        self.history.append({**row, **averaged, **scores, **losses})
        if trainer.is_global_zero:
            self._write_history()
            self._say(epoch, trainer.max_epochs or epoch, losses, scores)
        if self.has_settled:
            trainer.should_stop = True
            log.info("%s has not risen above that of epoch %d in %d evaluations: the training ends (train.patience)",
                     self.metric, self.best_epoch, self.patience)  # fmt: skip

    @property
    def has_settled(self) -> bool:
        """Whether `patience` evaluations in a row, the last one among them, have not beaten the best one."""
        since = [row for row in self.history if self.metric in row and row["epoch"] > self.best_epoch]
        return self.patience is not None and len(since) >= self.patience

    def _log(
        self, trainer: L.Trainer, values: Mapping[str, float], step: int, more: Mapping[str, float] | None = None
    ) -> None:
        """Log values of a step everywhere, and `more` into the trackers alone."""
        for logger in trainer.loggers:
            row = {**values, **(more or {})} if isinstance(logger, Tracker) else dict(values)
            if row:
                logger.log_metrics(row, step)

    def _read_clocks(self) -> None:
        self.seconds = time.monotonic() - self._started
        self.cpu_seconds = time.process_time() - self._cpu_started

    def _write_history(self) -> None:
        columns = list(dict.fromkeys(name for row in self.history for name in row))
        with (
            written_whole(self.folder / "history.csv") as unfinished,
            unfinished.open("w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.history)

    def _say(self, epoch: int, epochs: int, losses: dict[str, float], scores: dict[str, float]) -> None:
        sums: dict[str, float] = {}
        for name, value in losses.items():
            _, _, term = name.partition("loss/")
            kind = term.partition("/")[0]
            if kind:
                kind = kind if kind in ("task", "teacher") else "distillation"
                sums[kind] = sums.get(kind, 0.0) + value
        left = timedelta(seconds=round(self.seconds / epoch * (epochs - epoch)))
        parts = [f"epoch {epoch}/{epochs}"]
        if "task" in sums:  # missing if every step was skipped
            parts.append(f"task loss {sums['task']:.3f}")
        if "distillation" in sums:
            parts.append(f"distillation {sums['distillation']:.3f}")
        if scores:
            parts.append(f"{self.metric} {scores[self.metric]:.2f} (best {self.best[self.metric]:.2f})")
        log.info("%s, %s left", ", ".join(parts), left)


class _Bar(TQDMProgressBar):
    """Lightning's progress bar of one epoch, counted from 1, with the loss, the last metric and the time left."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def on_train_epoch_start(self, trainer: L.Trainer, *args: Any) -> None:
        super().on_train_epoch_start(trainer, *args)
        self.train_progress_bar.set_description(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}")

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        assert isinstance(pl_module, TrainingModule)
        shown: dict[str, Any] = {"loss": pl_module.values["loss"]} if pl_module.values else {}
        recorder, metric = self._recorder, self._recorder.metric
        scores = [row[metric] for row in recorder.history if metric in row]
        if scores:
            shown[metric] = f"{scores[-1]:.2f}"
        if recorder.step:
            left = recorder.seconds / recorder.step * (trainer.estimated_stepping_batches - recorder.step)
            shown["left"] = timedelta(seconds=round(left))
        return shown


def _means(sums: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, float]:
    """Means over the images of all processes."""
    columns = {name: [each[name] for each in sums if name in each] for name in dict.fromkeys(chain(*sums))}
    return {
        name: sum(total for total, _ in column) / sum(count for _, count in column) for name, column in columns.items()
    }


def _rows(file: Path) -> list[dict[str, str]]:
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    return list(csv.DictReader(line for line in lines if line.endswith("\n")))  # a killed run may leave part of a line


class SyncBatchNorm(TorchSyncBatchNorm):
    """Batch norm over all processes, for timm's layers too, which hold the activation that follows them.

    torch's own conversion drops those activations.
    """

    def apply(self, model: nn.Module) -> nn.Module:
        """Let the layers compute their statistics over all processes."""
        converted: nn.Module = convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        return converted

    def revert(self, model: nn.Module) -> nn.Module:
        """Leave them: in eval mode they need no other process, and Lightning's way back drops the activations, too."""
        return model


def build_trainer(
    config: Train,
    recorder: Recorder,
    *,
    progress: bool,
    callbacks: Sequence[Callback] = (),
    trackers: Sequence[Tracker[Any]] = (),
    skips_parameters: bool = False,
    profiler: Profiler | None = None,
    origin: Mapping[str, str] | None = None,
) -> L.Trainer:
    """Build a Lightning trainer that writes into the recorder's run folder.

    Args:
        config: The recipe's `train`.
        recorder: Keeps the best network and the history.
        progress: Whether to draw a progress bar; otherwise a log line now and then gives the rate and the time left.
        callbacks: Further callbacks, called after the recorder and before the checkpoint is written.
        trackers: Get what the recorder logs, beside `logs/metrics.csv`.
        skips_parameters: Whether the loss may leave parameters without a gradient, which processes must know.
        profiler: Measures the steps.
        origin: Hashes of what is learned from, by name, which a resumed run must share.

    Raises:
        AcamkdError: The devices do not exist, a launcher has started another number of processes, or the processes
            would be forks of this one.
    """
    folder = recorder.folder
    all_callbacks: list[Callback] = [
        NonFinite(folder, skip=config.on_nonfinite == "skip"),
        *([recorder.ema] if recorder.ema else []),
        recorder,
        *callbacks,
        Checkpoints(folder, config.checkpoint_every, origin),
    ]
    all_callbacks.append(_Bar(recorder) if progress else Heartbeat())
    loggers: list[Logger] = list(trackers)
    if any(logger.name == "csv" for logger in config.loggers):
        loggers.insert(0, CSVLogger(folder, name=None, version="logs", flush_logs_every_n_steps=20))

    plugins: list[Any] = [CheckpointFiles()]
    if config.sync_batchnorm:
        plugins.append(SyncBatchNorm())
    if SLURMEnvironment.detect():
        # Lightning's automatic SLURM resume would use a checkpoint folder that all runs share.
        plugins.append(SLURMEnvironment(auto_requeue=False))

    def construct(strategy: str) -> L.Trainer:
        return L.Trainer(
            default_root_dir=folder,
            accelerator=config.accelerator,
            devices=config.devices,
            num_nodes=config.num_nodes,
            strategy=strategy,
            precision=config.precision,
            max_epochs=config.epochs,
            accumulate_grad_batches=config.accumulate,
            gradient_clip_val=config.clip,
            check_val_every_n_epoch=config.eval_every,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            logger=loggers,
            callbacks=all_callbacks,
            profiler=profiler,
            plugins=plugins,
            enable_progress_bar=progress,
            enable_model_summary=False,
            use_distributed_sampler=False,  # acamkd's samplers divide the images themselves
        )

    try:
        trainer = construct(config.strategy)
        if skips_parameters and trainer.world_size > 1 and config.strategy in ("auto", "ddp"):
            trainer = construct("ddp_find_unused_parameters_true")
    except (ValueError, RuntimeError, MisconfigurationException) as error:
        keys = ("accelerator", "devices", "num_nodes", "strategy", "precision")
        given = ", ".join(f"{key} {getattr(config, key)}" for key in keys)
        raise AcamkdError(f"train: this machine, or what launched it, cannot run {given}: {error}") from error
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        # Lightning also chooses this for a notebook with several devices.
        raise AcamkdError(
            f"train.strategy {config.strategy} with {trainer.world_size} devices would train in forks of this process, "
            "whose results are lost: set train.devices to 1, as notebooks need it, or run acamkd from a shell with "
            "train.strategy ddp or auto"
        )
    return trainer
