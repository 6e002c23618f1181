"""Run folders: what one training leaves behind, and how it is opened again."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from acamkd import config, models
from acamkd.engine import CHECKPOINT
from acamkd.errors import AcamkdError
from acamkd.models.base import TaskModel

Role: TypeAlias = Literal["teacher", "student"]

RECIPE = "recipe.yaml"
METRICS = "metrics.json"
LOG = "log.txt"


@dataclass(frozen=True)
class Run:
    """One run folder.

    It holds the resolved recipe (`recipe.yaml`), `metrics.json`, `history.csv`, `log.txt`, `last.ckpt` to resume from,
    and the trained network alone at its best epoch, `student.safetensors` (or `teacher.safetensors`), which the plain
    framework loads.

    Attributes:
        folder: Where it lies.
        recipe: Everything it depended on, class names included.
        role: Which of the recipe's networks it trained.
    """

    folder: Path
    recipe: config.Recipe
    role: Role

    @property
    def weights(self) -> Path:
        """The trained network's file."""
        return self.folder / f"{self.role}.safetensors"

    @property
    def checkpoint(self) -> Path:
        """What `resume` starts from."""
        return self.folder / CHECKPOINT

    def create(self, *, resume: bool, overwrite: bool) -> bool:
        """Make the folder, or enter it again.

        Returns:
            Whether there is a checkpoint to resume from.

        Raises:
            AcamkdError: There is a run already and neither `resume` nor `overwrite` is set, the run to resume had
                another recipe, or the folder holds something else or cannot be written.
        """
        text = config.dump(self.recipe)
        try:
            # Both, because a folder with a recipe.yaml of the user's own must never be replaced.
            if (self.folder / RECIPE).is_file() and (self.folder / LOG).is_file():
                if not (resume or overwrite):
                    raise AcamkdError(
                        f"{self.folder} already holds a run: --resume continues it, --overwrite replaces it, "
                        "--out FOLDER writes elsewhere"
                    )
                if resume and (self.folder / RECIPE).read_text(encoding="utf-8") != text:
                    raise AcamkdError(
                        f"{self.folder} was made by another recipe or command (compare {RECIPE} in it): "
                        "resume with the same recipe and overrides, or write elsewhere with --out"
                    )
                if not resume:
                    shutil.rmtree(self.folder)
            elif self.folder.exists() and any(self.folder.iterdir()):
                raise AcamkdError(f"{self.folder} exists and is not a run: choose another folder with --out")
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / LOG).touch()
            write_text(self.folder / RECIPE, text)
        except OSError as error:
            raise AcamkdError(f"cannot write the run folder {self.folder}: {error.strerror or error}") from error
        return resume and self.checkpoint.exists()

    def write_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Write metrics.json."""
        write_json(self.folder / METRICS, metrics)

    def load(self) -> TaskModel:
        """Build the trained network and load its best weights, in eval mode.

        Raises:
            AcamkdError: The weights are missing or do not fit.
        """
        section = self.recipe.teacher if self.role == "teacher" else self.recipe.student
        assert section is not None
        return self._build(section.model_copy(update={"weights": str(self.weights)}))

    def load_teacher(self) -> TaskModel:
        """Build the teacher that a student was distilled from, in eval mode; raises AcamkdError if that cannot be."""
        assert self.recipe.teacher is not None
        return self._build(self.recipe.teacher)

    def _build(self, section: config.Model) -> TaskModel:
        data = self.recipe.data
        assert data.classes is not None
        return models.build(section, self.recipe.task, len(data.classes), data.resize, teacher=True).eval()


def open_run(folder: Path, overrides: Sequence[str] = ()) -> Run:
    """Open a run, with some keys of its recipe overridden; raises AcamkdError if the folder holds none."""
    if not (folder / RECIPE).is_file():
        raise AcamkdError(f"{folder} is not a run folder: it has no {RECIPE}")
    recipe = config.load(folder / RECIPE, overrides)
    roles: tuple[Role, ...] = ("student", "teacher")
    for role in roles:
        run = Run(folder, recipe, role)
        if run.weights.is_file():
            return run
    raise AcamkdError(f"{folder} holds no weights yet: its first epoch has not ended (--resume continues it)")


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is either there whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: Path, content: Mapping[Any, Any]) -> None:
    """Write JSON likewise; see `as_json`."""
    write_text(path, as_json(content) + "\n")


def as_json(content: Any) -> str:
    """Indented JSON; NaN, which JSON does not know, becomes null."""
    return json.dumps(_without_nan(content), indent=2)


def _without_nan(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {key: _without_nan(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and content != content else content
