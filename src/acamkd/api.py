"""The commands as functions, for scripts and notebooks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from acamkd import config
from acamkd.models.base import TaskModel
from acamkd.runs import Role, open_run
from acamkd.train import default_folder
from acamkd.train import distill as distill_job
from acamkd.train import train as train_job


@dataclass(frozen=True, repr=False)
class Result:
    """What one training left behind.

    Attributes:
        folder: The run folder, which `load_student` and `open_run` open.
        metrics: What its metrics.json holds.
    """

    folder: Path
    metrics: dict[str, Any]

    def __repr__(self) -> str:
        metrics, name = self.metrics, self.metrics["metric"]
        scores = [f"{role} {metrics[role][name]:.2f}" for role in ("student", "teacher") if role in metrics]
        return (
            f"{self.folder}: {name} {', '.join(scores)} (best epoch: {metrics['best_epoch']}), "
            f"{metrics['parameters']:,} parameters, {timedelta(seconds=round(metrics['seconds']))}"
        )


def distill(
    recipe: config.Recipe | Path | str,
    overrides: Sequence[str] = (),
    *,
    out: Path | str | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> Result:
    """Train a recipe's student with its losses against its teacher, as `acamkd distill` does.

    Args:
        recipe: A recipe, or its YAML file.
        overrides: Assignments such as `train.epochs=20`, for a file.
        out: Run folder; `runs/NAME/distilled` where not given.
        resume: Continue the run that the folder holds.
        overwrite: Replace it.

    Raises:
        AcamkdError: Something that was given cannot be used; nothing is written then.
    """
    recipe = _load(recipe, overrides)
    folder = Path(out) if out else default_folder(recipe, "distilled")
    return Result(folder, distill_job(recipe, out=folder, resume=resume, overwrite=overwrite))


def train(
    recipe: config.Recipe | Path | str,
    overrides: Sequence[str] = (),
    *,
    role: Role = "student",
    out: Path | str | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> Result:
    """Train one network of a recipe without distillation, as `acamkd train` does.

    Args and raises: as `distill`; the run folder is `runs/NAME/alone` or `runs/NAME/teacher` where not given.
    """
    recipe = _load(recipe, overrides)
    folder = Path(out) if out else default_folder(recipe, "teacher" if role == "teacher" else "alone")
    return Result(folder, train_job(recipe, role, out=folder, resume=resume, overwrite=overwrite))


def load_student(run: Path | str) -> TaskModel:
    """Build the network that a run trained, with its best weights and in eval mode.

    `net` of what is returned is the framework's own module; `predict` takes pictures, (3, H, W) uint8 or in [0, 1].

    Raises:
        AcamkdError: The folder holds no run, or its weights do not fit.
    """
    opened = open_run(Path(run))
    model = opened.load()
    classes = opened.recipe.data.classes or ()
    described = f"{run}: {model.task}, {len(classes)} classes ({', '.join(classes)})"
    # PyTorch prints this above the tree of modules; unlike a lambda, it can be pickled.
    model.extra_repr = partial(str, described)  # type: ignore[method-assign]
    return model


def _load(recipe: config.Recipe | Path | str, overrides: Sequence[str]) -> config.Recipe:
    return recipe if isinstance(recipe, config.Recipe) else config.load(Path(recipe), overrides)
