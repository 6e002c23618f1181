"""TensorBoard, Weights & Biases and MLflow, by Lightning's loggers; none of them can stop a training."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar
from uuid import uuid4

import numpy as np
import numpy.typing as npt
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from acamkd import config
from acamkd.errors import AcamkdError, without_password

log = logging.getLogger(__name__)

L = TypeVar("L", bound=Logger)

Pixels: TypeAlias = npt.NDArray[np.uint8]
"""(H, W, 3), RGB."""

PATIENCE = 20
"""Seconds to wait for an answer of a server."""
UPLOAD = 300
"""Seconds to wait at the end for what W&B has yet to upload; all of it stays on the disk."""
HOLD = 10.0
"""MLflow gets the values of so many seconds with one request, since the training waits for each."""
LARGEST = 1000
"""MLflow takes no more values with one request."""


def check_installed(recipe: config.Recipe) -> None:
    """Raise AcamkdError if a tracker of the recipe is not installed, or a password would get into the run's files."""
    for logger in (logger for logger in recipe.train.loggers if logger.name in TRACKERS):
        if logger.tracking_uri is not None and without_password(logger.tracking_uri) != logger.tracking_uri:
            raise AcamkdError(
                "train.loggers: the tracking_uri holds a user or password, which would get into every run folder and "
                "report: leave it out, and set MLFLOW_TRACKING_URI"
            )
        found = find_spec(logger.name)
        # A folder of that name, such as W&B makes, counts as a package without a file.
        if found is None or found.origin is None:
            raise AcamkdError(
                f"train.loggers: {logger.name} is not installed: pip install 'acamkd[{logger.name}]', or leave it out"
            )


def tracked_name(name: str) -> str:
    """The name of a value in every tracker: what MLflow does not take becomes an underscore."""
    return re.sub(r"[^/\w.\- ]", "_", name)


class Tracker(Logger, Generic[L]):
    """One of Lightning's loggers, behind which whatever it raises becomes one warning, and the end of its logging.

    Only the first process logs. Nothing is logged before `begin`.

    Args:
        settings: The recipe's entry in `train.loggers`.
        recipe: The resolved recipe, which is logged too.
        folder: The run folder.
    """

    def __init__(self, settings: config.Logger, recipe: config.Recipe, folder: Path) -> None:
        super().__init__()
        self.settings = settings
        self.recipe = recipe
        self.folder = folder
        self._live: L | None = None

    @property
    def name(self) -> str:
        """Name of the tracker."""
        return self.settings.name

    @property
    def version(self) -> None:
        """Nothing: the tracker has its own names of runs."""

    @property
    def save_dir(self) -> str:
        """The run folder."""
        return str(self.folder)

    @rank_zero_only
    def begin(self, step: int) -> None:
        """Open the tracker's run.

        Args:
            step: Steps that are done; above 0 the run of this folder goes on, if there is one.
        """
        try:
            (self.folder / "logs").mkdir(parents=True, exist_ok=True)
            self._live, is_new = self._open(step)
            if is_new:
                self._log_recipe(self._live)
        except Exception as error:
            self._give_up(error)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log values of a step."""
        values = {tracked_name(name): value for name, value in metrics.items()}
        self._attempt(lambda live: self._log_values(live, values, step or 0))

    def log_image(self, name: str, pixels: Pixels, step: int) -> None:
        """Log an image of a step."""
        self._attempt(lambda live: self._log_pixels(live, tracked_name(name), pixels, step))

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Do nothing: the recipe is logged instead."""

    def save(self) -> None:
        """Hand over what has been held back."""
        self._attempt(self._flush)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the run; another `begin` would continue it."""

        def close(live: L) -> None:
            self._flush(live)
            self._close(live, status)

        self._attempt(close)
        self._live = None

    def _attempt(self, what: Callable[[L], None]) -> None:
        if self._live is None:
            return
        try:
            what(self._live)
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        live, self._live = self._live, None
        log.warning("%s does not work and gets nothing more, the training goes on: %s", self.name, _reason(error))
        if live is not None:
            with suppress(Exception):  # so that the next training does not go on with this run
                self._close(live, "failed")

    @abstractmethod
    def _open(self, step: int) -> tuple[L, bool]:
        """Lightning's logger with its run begun, and whether the run is new."""

    @abstractmethod
    def _log_recipe(self, live: L) -> None:
        """Log the resolved recipe."""

    @abstractmethod
    def _log_pixels(self, live: L, name: str, pixels: Pixels, step: int) -> None:
        """Log an image."""

    def _log_values(self, live: L, values: Mapping[str, float], step: int) -> None:
        live.log_metrics(dict(values), step)

    def _flush(self, live: L) -> None:
        live.save()

    def _close(self, live: L, status: str) -> None:
        live.finalize(status)

    def _id(self) -> Path:
        """File with the run's name at the tracker, by which a resumed training continues it."""
        return self.folder / "logs" / f"{self.name}-run.txt"


class TensorBoard(Tracker[TensorBoardLogger]):
    """Event files in `logs/tensorboard` of the run folder."""

    def _open(self, step: int) -> tuple[TensorBoardLogger, bool]:
        is_new = not (step and (self.folder / "logs" / self.name).is_dir())
        # Earlier events from this step on are marked as replaced.
        live = TensorBoardLogger(
            self.folder / "logs", name="", version=self.name, default_hp_metric=False, purge_step=step, flush_secs=20
        )
        _ = live.experiment
        return live, is_new

    def _log_recipe(self, live: TensorBoardLogger) -> None:
        live.log_hyperparams(self.recipe.model_dump(mode="json"))
        live.experiment.add_text("recipe", f"```yaml\n{config.dump(self.recipe)}```", 0)

    def _log_pixels(self, live: TensorBoardLogger, name: str, pixels: Pixels, step: int) -> None:
        live.experiment.add_image(name, pixels, step, dataformats="HWC")


class WeightsAndBiases(Tracker[WandbLogger]):
    """Weights & Biases; offline where its server cannot be reached or no API key is known."""

    def _open(self, step: int) -> tuple[WandbLogger, bool]:
        file = self._id()
        is_new = not (step and file.is_file())
        if is_new:
            file.write_text(uuid4().hex[:8], encoding="utf-8")
        run_id = file.read_text(encoding="utf-8")
        mode = self.settings.mode or os.environ.get("WANDB_MODE", "online")
        if mode != "online":
            return self._begun(run_id, mode), is_new
        try:
            import wandb

            if not wandb.login(prompt=False):
                raise AcamkdError("no API key is known (`wandb login` stores one)")
            return self._begun(run_id, mode), is_new
        except Exception as error:
            log.warning(
                "wandb logs offline: %s; `wandb sync %s/offline-run-*` uploads the run",
                _reason(error), self.folder / "logs" / self.name,
            )  # fmt: skip
            return self._begun(run_id, "offline"), is_new

    def _begun(self, run_id: str, mode: str) -> WandbLogger:
        import wandb

        settings = wandb.Settings(console="off", init_timeout=PATIENCE, finish_timeout=UPLOAD)
        live = WandbLogger(
            name=self.folder.name,
            save_dir=self.folder / "logs",
            id=run_id,
            project=self.settings.project or os.environ.get("WANDB_PROJECT", self.recipe.name),
            entity=self.settings.entity,
            mode=mode,
            resume="allow" if mode == "online" else None,
            settings=settings,
        )
        _ = live.experiment
        return live

    def _log_recipe(self, live: WandbLogger) -> None:
        live.log_hyperparams(self.recipe.model_dump(mode="json"))

    def _log_pixels(self, live: WandbLogger, name: str, pixels: Pixels, step: int) -> None:
        live.log_image(name, [pixels], step)

    def _close(self, live: WandbLogger, status: str) -> None:
        live.experiment.finish(exit_code=int(status == "failed"))  # a further training gets a run of its own


class MLflow(Tracker[MLFlowLogger]):
    """MLflow: a server, or a database of its own."""

    def __init__(self, settings: config.Logger, recipe: config.Recipe, folder: Path) -> None:
        super().__init__(settings, recipe, folder)
        self._held: list[tuple[str, float, int, int]] = []
        """Name, value, milliseconds since 1970, step."""
        self._handed_over = 0.0

    def _open(self, step: int) -> tuple[MLFlowLogger, bool]:
        # By default MLflow tries an unreachable server for four minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(PATIENCE))
        import mlflow

        uri = self.settings.tracking_uri or mlflow.get_tracking_uri()
        experiment = self.settings.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME", self.recipe.name)
        file, before = self._id(), None
        digest = hashlib.sha256(uri.encode()).hexdigest()[:16]  # the address may hold a password
        if step and file.is_file():
            before, where = file.read_text(encoding="utf-8").splitlines()
            before = before if where in (uri, digest) else None  # earlier versions wrote the address itself
        live = MLFlowLogger(experiment, run_name=self.folder.name, tracking_uri=uri, run_id=before)
        file.write_text(f"{live.run_id}\n{digest}\n", encoding="utf-8")
        if before:
            live.experiment.update_run(before, status="RUNNING")
        return live, not before

    def _log_recipe(self, live: MLFlowLogger) -> None:
        live.log_hyperparams(dict(_flat(self.recipe.model_dump(mode="json"))))
        assert live.run_id is not None
        live.experiment.log_text(live.run_id, config.dump(self.recipe), "recipe.yaml")

    def _log_pixels(self, live: MLFlowLogger, name: str, pixels: Pixels, step: int) -> None:
        assert live.run_id is not None
        live.experiment.log_image(live.run_id, pixels, key=name, step=step)

    def _log_values(self, live: MLFlowLogger, values: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        self._held += [(name, value, now, step) for name, value in values.items()]
        if time.monotonic() - self._handed_over > HOLD:
            self._flush(live)

    def _flush(self, live: MLFlowLogger) -> None:
        from mlflow.entities import Metric

        held, self._held, self._handed_over = self._held, [], time.monotonic()
        for start in range(0, len(held), LARGEST):
            metrics = [Metric(*each) for each in held[start : start + LARGEST]]
            assert live.run_id is not None
            live.experiment.log_batch(live.run_id, metrics)


def _reason(error: Exception) -> str:
    """The first line of what an error says, without passwords."""
    return without_password((str(error).strip() or type(error).__name__).splitlines()[0])


def _flat(content: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Values of nested sections and lists of sections, by `section/key` and `list/0/key`."""
    if isinstance(content, list) and any(isinstance(entry, dict) for entry in content):
        content = {str(number): entry for number, entry in enumerate(content)}
    if not isinstance(content, dict) or not content:
        yield tracked_name(key), content
        return
    for name, value in content.items():
        yield from _flat(value, f"{key}/{name}" if key else name)


TRACKERS: Mapping[str, type[Tracker[Any]]] = {
    "tensorboard": TensorBoard, "wandb": WeightsAndBiases, "mlflow": MLflow,
}  # fmt: skip


def trackers_of(loggers: Iterable[Logger]) -> list[Tracker[Any]]:
    """The trackers among a trainer's loggers."""
    return [logger for logger in loggers if isinstance(logger, Tracker)]


def build_trackers(recipe: config.Recipe, folder: Path) -> list[Tracker[Any]]:
    """The trackers of a run, none of them begun.

    Args:
        recipe: The resolved recipe.
        folder: The run folder.
    """
    loggers = recipe.train.loggers
    return [TRACKERS[logger.name](logger, recipe, folder) for logger in loggers if logger.name in TRACKERS]
