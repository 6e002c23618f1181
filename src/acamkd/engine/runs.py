"""Run folders: the files of one training, and how to open them again."""

from __future__ import annotations

import json
import logging
import shutil
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from filelock import FileLock, Timeout
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from acamkd import config
from acamkd.engine.printing import Printable
from acamkd.errors import AcamkdError
from acamkd.files import check_writable, unfinished_name, write_json, write_text

if TYPE_CHECKING:
    from acamkd.models.base import FeatureModel, TaskModel

log = logging.getLogger(__name__)

Role: TypeAlias = Literal["teacher", "student", "backbone"]
"""What a run trained: a network of the recipe, or the backbone of its student on images alone."""

RECIPE = "recipe.yaml"
METRICS = "metrics.json"
LOG = "log.txt"
CHECKPOINT = "last.ckpt"
PREVIOUS = "previous.ckpt"
LOCK = ".lock"

NET = "distiller.student.net."
"""Where a checkpoint's `state_dict` has the trained network; with `train.ema` it is the average."""

EMA_COLUMN = "ema"
"""Column of history.csv with the decay at the end of the epoch; it is there if the scores are those of the average."""

TERMINATED = 128 + signal.SIGTERM
"""Exit code of a run that saved a checkpoint after SIGTERM; shells report the same code for a process that it ended."""

_BEGINNING = {LOCK, LOG, unfinished_name(RECIPE)}
"""Files that a run may leave behind if it fails before its start."""

_FOLDERS = ("logs", "nonfinite", "export", "predictions")
_SUFFIXES = (".yaml", ".txt", ".json", ".csv", ".safetensors", ".ckpt", ".html", ".npz")
"""What there is in a run folder, beside hidden files."""

PATIENCE = 10.0
"""Seconds to wait for a locked run folder: the image loaders of a killed training hold the lock for a few more."""


WITHOUT_EFFECT: dict[str, Any] = {
    "data": {"workers", "check", "test", "cache"}, "train": {"checkpoint_every", "loggers"}, "compare": True,
}  # fmt: skip
"""Keys of a recipe that do not affect what a training comes to, as pydantic's `exclude` takes them."""


class OtherRunError(AcamkdError):
    """The run to resume had another recipe.

    Args:
        what: What differs.
        advice: What to do, where each run has its own command.
    """

    def __init__(self, what: str, advice: str) -> None:
        super().__init__(f"{what}: {advice}")
        self.what = what


@dataclass(frozen=True, repr=False)
class Run(Printable):
    """One run folder. It prints as a line, in a notebook as a table.

    The folder holds the resolved recipe (`recipe.yaml`), `metrics.json`, `history.csv`, `log.txt`, and the checkpoints
    `last.ckpt` and `previous.ckpt`, from which a run resumes. `student.safetensors` (or `teacher.safetensors`) holds
    the weights of the best epoch, which the framework loads without acamkd.

    Attributes:
        folder: Path of the run folder.
        recipe: The resolved recipe, class names included.
        role: Which of the recipe's networks was trained.
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
        """The checkpoint that `resume` starts from."""
        return self.folder / CHECKPOINT

    @property
    def has_begun(self) -> bool:
        """Whether the folder holds a run. Both files are needed, since a lone recipe.yaml may be the user's own."""
        return (self.folder / RECIPE).is_file() and (self.folder / LOG).is_file()

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is anything to resume from."""
        return any((self.folder / name).exists() for name in (CHECKPOINT, PREVIOUS))

    @property
    def has_ended(self) -> bool:
        """Whether all its epochs are done."""
        return (self.folder / METRICS).is_file()

    @property
    def metrics(self) -> dict[str, Any]:
        """The content of metrics.json; an undefined score is None.

        Raises:
            AcamkdError: The run has not ended.
        """
        if not self.has_ended:
            raise AcamkdError(f"{self.folder} has no {METRICS}: its training has not ended (--resume continues it)")
        return read_json(self.folder / METRICS)

    def __repr__(self) -> str:
        if not self.has_ended:
            return f"{self.folder}: {self.role} of {self.recipe.name}, not ended"
        metrics = self.metrics
        name = metrics["metric"]
        scores = ", ".join(
            f"{role} {_percent(metrics[role][name])}" for role in ("backbone", "student", "teacher") if role in metrics
        )
        return (
            f"{self.folder}: {name} {scores}, best epoch {metrics['best_epoch']}, "
            f"{metrics['parameters']:,} parameters, {timedelta(seconds=round(metrics['seconds']))}"
        )

    __str__ = __repr__

    def __rich__(self) -> RenderableType:
        if not self.has_ended:
            return Text(repr(self))
        metrics = self.metrics
        rows = {role: metrics[role] for role in ("teacher", "student", "backbone") if role in metrics}
        names = [name for name in rows[self.role] if "/" not in name]  # without the classes
        table = Table("", *names)
        for role, scores in rows.items():
            table.add_row(role, *(_percent(scores.get(name)) for name in names))
        return Group(Text(repr(self)), table)

    @contextmanager
    def entered(self, *, resume: bool, overwrite: bool) -> Iterator[bool]:
        """Create the folder or reopen it, and lock it against other processes within the context.

        Yields:
            Whether there is a checkpoint to resume from.

        Raises:
            OtherRunError: The run to resume had another recipe.
            AcamkdError: The folder holds a run and neither `resume` nor `overwrite` is set, another process uses it, it
                holds other files, or it cannot be written.
        """
        lock = FileLock(self.folder / LOCK, timeout=PATIENCE)
        try:
            self.check_free(resume=resume, overwrite=overwrite)
            self.folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout as error:
            raise AcamkdError(
                f"another process is at work in {self.folder}: wait for its end, or write elsewhere with --out"
            ) from error
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            try:
                self.check_free(resume=resume, overwrite=overwrite)  # again: it may have waited for another process
                if self.has_begun and resume:
                    self._check_same()
                if self.has_begun and not resume:
                    _empty(self.folder)
                (self.folder / LOG).touch()
                write_text(self.folder / RECIPE, config.dump(self.recipe))
            except OSError as error:
                raise self._unwritable(error) from error
            yield resume and self.has_checkpoint
        finally:
            lock.release()

    def check_free(self, *, resume: bool, overwrite: bool) -> None:
        """Raise AcamkdError if the folder cannot be written, or holds files that must not be changed."""
        if resume and overwrite:
            raise AcamkdError("--resume continues a run and --overwrite replaces it: give one of them")
        check_writable(self.folder, "the run folder")
        if self.has_begun:
            if not (resume or overwrite):
                raise AcamkdError(
                    f"{self.folder} already holds a run: --resume continues it, --overwrite replaces it, "
                    "--out FOLDER writes elsewhere"
                )
            foreign = [each.name for each in self.folder.iterdir() if not _is_of_run(each)] if overwrite else []
            if foreign:
                raise AcamkdError(
                    f"{self.folder} also holds {foreign[0]}, which no run makes and --overwrite would remove: choose "
                    "another folder with --out"
                )
        elif self.folder.is_dir():
            names = {file.name for file in self.folder.iterdir()}
            if names and not (LOCK in names and names <= _BEGINNING):
                raise AcamkdError(f"{self.folder} exists and is not a run: choose another folder with --out")

    def _check_same(self) -> None:
        """Raise OtherRunError if the folder's recipe differs in a key that affects the outcome."""
        changes = list(_changes(self._content(config.load(self.folder / RECIPE)), self._content(self.recipe)))
        if changes:
            raise OtherRunError(
                f"{self.folder} was made by another recipe or command ({shortened(changes)})",
                "resume with the same recipe and overrides, or write elsewhere with --out",
            )

    def _content(self, recipe: config.Recipe) -> dict[str, Any]:
        """The keys that affect the outcome, as JSON: neither the order of keys nor tuple or list matters."""
        without = {**WITHOUT_EFFECT, "student": True} if self.role == "teacher" else WITHOUT_EFFECT
        return recipe.model_dump(mode="json", exclude=without)

    def unlike(self, baseline: Run) -> list[str]:
        """How a baseline was trained otherwise than this run's student, beside what a distillation adds."""
        added: dict[str, Any] = {"name": True, "teacher": True, "losses": True}
        without = {**WITHOUT_EFFECT, **added, "data": {*WITHOUT_EFFECT["data"], "unlabeled", "root"}}
        before, now = (
            config.load(run.folder / RECIPE).model_dump(mode="json", exclude=without) for run in (baseline, self)
        )
        trained_on = [run.metrics["data"]["train"] for run in (baseline, self)]
        return [*(["other training images"] if len(set(trained_on)) > 1 else []), *_changes(before, now)]

    def _unwritable(self, error: OSError) -> AcamkdError:
        return AcamkdError(f"cannot write the run folder {self.folder}: {error.strerror or error}")

    def write_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Write metrics.json."""
        write_json(self.folder / METRICS, metrics)

    def load(self) -> TaskModel:
        """Build the trained network and load its best weights, in eval mode.

        Raises:
            AcamkdError: The weights are missing or do not fit, or the run trained a backbone alone.
        """
        if self.role == "backbone":
            raise AcamkdError(
                f"{self.folder} holds a pretrained backbone, which predicts nothing: train a network from it, with "
                f"student.backbone_weights={self.weights}"
            )
        section = self.recipe.teacher if self.role == "teacher" else self.recipe.student
        assert section is not None
        return self._build(section.model_copy(update={"weights": str(self.weights)}))

    def load_last(self) -> TaskModel:
        """Build the trained network with the weights that were scored last, from the checkpoint, in eval mode.

        Raises:
            AcamkdError: There is no checkpoint, or it cannot be read.
        """
        from acamkd.models.weight_files import read_file

        if not self.checkpoint.is_file():
            raise AcamkdError(f"{self.folder} has no {CHECKPOINT}, which holds the weights of the last epoch")
        model, state = self.load(), read_file(self.checkpoint)["state_dict"]
        model.net.load_state_dict({key.removeprefix(NET): x for key, x in state.items() if key.startswith(NET)})
        return model

    def load_teacher(self) -> FeatureModel:
        """Build the teacher of a distilled student, in eval mode; raises AcamkdError if its weights do not load."""
        from acamkd import models

        recipe = self.recipe
        assert recipe.teacher is not None
        assert recipe.data.classes is not None
        return models.build_teacher(recipe.teacher, recipe.task, len(recipe.data.classes), recipe.data.resize).eval()

    def _build(self, section: config.Model) -> TaskModel:
        from acamkd import models  # with torch, which a comparison's tables do without

        data = self.recipe.data
        assert data.classes is not None
        return models.build(section, self.recipe.task, len(data.classes), data.resize, teacher=True).eval()


def shortened(changes: Sequence[str], separator: str = ", ") -> str:
    """The first three of a list, and how many more there are."""
    more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
    return f"{separator.join(changes[:3])}{more}"


def default_folder(recipe: config.Recipe, job: str) -> Path:
    """Default folder of a recipe's `teacher`, `baseline`, `distilled` or `pretrained` run."""
    return Path("runs") / recipe.name / job


def open_run(folder: Path | str, overrides: Sequence[str] = ()) -> Run:
    """Open a run and override keys of its recipe; raises AcamkdError if the folder holds no run."""
    folder = Path(folder).expanduser()
    if not (folder / RECIPE).is_file():
        runs = sorted(file.parent.name for file in folder.glob(f"*/{RECIPE}")) if folder.is_dir() else []
        why = f"it has no {RECIPE}, but holds the runs {', '.join(runs)}" if runs else f"it has no {RECIPE}"
        raise AcamkdError(
            f"{folder} is not a run folder: {why}" if folder.is_dir() else f"{folder}: there is no such run folder"
        )
    recipe = config.load(folder / RECIPE, overrides)
    roles: tuple[Role, ...] = ("student", "teacher", "backbone")
    for role in roles:
        run = Run(folder, recipe, role)
        if run.weights.is_file():
            if not run.has_ended:
                log.warning("%s: its training has not ended; its weights are those of the best epoch so far", folder)
            return run
    raise AcamkdError(f"{folder} holds no weights yet: its first epoch has not ended (--resume continues it)")


def as_run(run: Run | Path | str, overrides: Sequence[str] = ()) -> Run:
    """Return a run, given itself or by its folder, with keys of its recipe overridden."""
    if not isinstance(run, Run):
        return open_run(Path(run), overrides)
    return replace(run, recipe=config.override(run.recipe, overrides)) if overrides else run


def load_student(run: Run | Path | str) -> TaskModel:
    """Build the network that a run trained, with its best weights and in eval mode.

    Its `predict` takes images, (3, H, W) uint8 or float in [0, 1]. Its `net` is the framework's own module.

    Raises:
        AcamkdError: The folder holds no run, or its weights do not fit.
    """
    return as_run(run).load()


def read_json(path: Path) -> dict[str, Any]:
    """Read the metrics.json of a run or the JSON of a trial; the spelling of its keys is today's."""
    return dict(config.respelled(json.loads(path.read_text(encoding="utf-8"))))


def _is_of_run(entry: Path) -> bool:
    """Whether something in a run folder may be of a run."""
    return entry.name[0] == "." or (entry.name in _FOLDERS if entry.is_dir() else entry.suffix in _SUFFIXES)


def _empty(folder: Path) -> None:
    """Remove everything in a run folder except its lock."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != LOCK:
            entry.unlink()


_MISSING = "not given"


def _changes(before: Any, now: Any, key: str = "") -> Iterator[str]:
    """Differences of two contents: keys in the form of `--set`, with both values."""
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        before, now = dict(enumerate(before)), dict(enumerate(now))
    if isinstance(before, dict) and isinstance(now, dict):
        for name in {**before, **now}:
            was, is_now = (content.get(name, _MISSING) for content in (before, now))
            yield from _changes(was, is_now, f"{key}.{name}" if key else str(name))
    elif before != now:
        yield f"{key} was {_short(before)}, is {_short(now)}"


def _short(value: Any) -> str:
    text = value if value is _MISSING else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:28]} ... {text[-28:]}"


def _percent(score: float | None) -> str:
    return "-" if score is None else f"{score:.2f}"
