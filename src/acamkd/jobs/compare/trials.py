"""Trials: trainings of one method with one seed each, each saved as a small JSON file."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from acamkd import config
from acamkd.engine.runs import (
    CHECKPOINT,
    EMA_COLUMN,
    PREVIOUS,
    RECIPE,
    OtherRunError,
    Run,
    default_folder,
    read_json,
)
from acamkd.errors import AcamkdError, nearest
from acamkd.files import write_json
from acamkd.jobs.compare import trials_csv
from acamkd.mask_health import mask_statistic
from acamkd.progress import is_first_process

log = logging.getLogger(__name__)

NONE = "none"
"""The baseline."""

TUNING_SEED = 1000
"""First seed of the tuning trials; the table does not use these seeds."""

DIGITS = 4


@dataclass(frozen=True)
class Trial:
    """One training of a comparison.

    Attributes:
        method: Name of the method in the table.
        setting: Value of the tuned option; None without tuning.
        option: Name of the tuned option.
        tuning: Whether the trial serves the choice of the setting, not the table.
        recipe: The recipe that it runs, seed included. Of `compare` it keeps the cache alone, which changes no result.
    """

    method: str
    setting: float | None
    option: str | None
    tuning: bool
    recipe: config.Recipe

    @property
    def seed(self) -> int:
        """Seed of the training."""
        return self.recipe.train.seed

    @property
    def name(self) -> str:
        """Name of its file, without the suffix."""
        setting = f"-{self.setting:g}" if self.tuning else ""
        return f"{self.method}{setting}-seed{self.seed}"

    @property
    def key(self) -> str:
        """Hash of everything that affects the outcome except the seed, the images, the teacher and the machine.

        For weights and tokens, the file names enter the hash.
        """
        # Without defaults, so that a key added by a later version does not invalidate every trial.
        content = self.recipe.model_dump(mode="json", exclude_defaults=True)
        if "unlabeled" in content["data"]:  # the first trials had this spelling, and their hashes hold
            content["data"]["unlabelled"] = content["data"].pop("unlabeled")
        for section, names in {
            "data": ("root", "workers", "check", "classes", "test", "cache"),
            "train": ("seed", "accelerator", "devices", "checkpoint_every", "loggers"),
            "teacher": ("weights",),
        }.items():
            for name in names:
                content.get(section, {}).pop(name, None)
        for entry in (content.get("teacher", {}), content.get("student", {}), *content.get("losses", [])):
            for name in ("weights", "backbone_weights", "tokens"):
                if file := entry.get(name):
                    entry[name] = Path(file).name
        for entry in content.get("losses", []):
            if self.option in entry:  # the number of the search, in whatever form the recipe has it
                entry[self.option] = self.setting
        if self.recipe.compare.cache is None or self.recipe.compare.cache_precision == "exact":
            content.pop("compare", None)
        else:
            content["compare"] = {"cache_precision": self.recipe.compare.cache_precision}
        del content["name"]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def folder(self) -> Path:
        """Its run folder, beside the recipe's other runs; it keeps the weights of the epoch that validated best."""
        return default_folder(self.recipe, "compare") / f"{self.name}-{self.key}"

    def read(self, results: Path) -> dict[str, Any] | None:
        """Content of the finished trial, from its JSON or a table; None unless it was run with this recipe."""
        file = results / f"{self.name}.json"
        own = read_json(file) if file.is_file() else None
        both: tuple[dict[str, Any] | None, ...] = own, trials_csv.stored(results).get(self.name)
        return next((found for found in both if found and found["recipe"] == self.key), None)

    def run(self, results: Path) -> None:
        """Train or resume, and write the trial's JSON; the run folder stays."""
        run = self._trained()
        if not is_first_process():  # the other processes have no metrics
            return
        content = self._content(run)
        has_score = not math.isnan(content["history"][-1])
        if has_score:
            write_json(results / f"{self.name}.json", content)
        for file in (CHECKPOINT, PREVIOUS):
            (run.folder / file).unlink(missing_ok=True)  # the largest files, no longer needed
        if not has_score:
            raise AcamkdError(
                f"{self.name}: {content['metric']} is undefined, since in the validation images every pixel is void, "
                "or every box a crowd: check data.val and data.ignore_index"
            )

    def _trained(self) -> Run:
        """The trial's run, trained to its end."""
        from acamkd.jobs.shared import SharedWork
        from acamkd.jobs.train import distill, train

        asked, recipe = self.recipe.compare, self.recipe.model_copy(update={"compare": config.Comparison()})
        shared = None if asked.cache is None else SharedWork(
            default_folder(recipe, "cache"), asked.cache, half=asked.cache_precision == "float16"
        )  # fmt: skip
        job = partial(distill if recipe.losses else train, recipe, out=self.folder, report=False, shared=shared)
        # Without a checkpoint nothing of an earlier run is reused, such as calibrated loss weights.
        resume = Run(self.folder, recipe, "student").has_checkpoint
        try:
            return job(resume=resume, overwrite=not resume)
        except OtherRunError:  # the hash ignores the device and the paths of images and teacher
            log.warning("%s: its images, teacher or device have moved since it stopped: it starts anew", self.name)
            return job(overwrite=True)

    def _content(self, run: Run) -> dict[str, Any]:
        """What the trial's JSON holds of a run that has ended."""
        from acamkd.engine.metrics import METRICS
        from acamkd.jobs.evaluate import evaluate

        metrics, name = run.metrics, METRICS[self.recipe.task]
        columns = _columns(run.folder / "history.csv")
        masks = _of_masks(columns)
        test, of_best = None, None
        if self.recipe.data.test is not None and not self.tuning:  # a search never sees these images
            test = evaluate(run, split="test", epoch="last")
            is_best = metrics["best_epoch"] == metrics["epochs"]
            of_best = (test if is_best else evaluate(run, split="test"))[name]
        return {
            "method": self.method,
            "setting": self.setting,
            "option": self.option,
            "seed": self.seed,
            "recipe": self.key,
            "losses": [loss.model_dump(mode="json") for loss in config.load(run.folder / RECIPE).losses],
            "data": metrics["data"],
            "teacher": {"sha256": metrics["teacher_sha256"], **metrics["teacher"]} if "teacher" in metrics else None,
            "inherited": metrics.get("inherited_sha256"),
            "metric": name,
            "history": columns[name],
            "final": {
                key: values[-1] for key, values in columns.items()
                if key not in ("epoch", "step", "seconds", EMA_COLUMN, *masks) and not key.startswith("loss")
            },
            "test": test,
            "test_of_best_epoch": of_best,
            "masks": {key: columns[key] for key in masks},
            "wall_time": metrics["seconds"],
            "cpu_time": metrics["cpu_seconds"],
            "versions": metrics["versions"],
            "processes": metrics["processes"],
            "machine": metrics["machine"],
        }  # fmt: skip


def plan(recipe: config.Recipe, methods: Sequence[str], seeds: int, results: Path) -> list[Trial]:
    """Every trial of a comparison, in the order in which to run them.

    The tuning trials come first. Then each seed follows with all methods, the baseline included.

    Raises:
        AcamkdError: A method is unknown, its overrides do not fit, or trainings may end early.
    """
    methods = [NONE, *(method for method in dict.fromkeys(methods) if method != NONE)]
    tuning = {method: _tuning_trials(recipe, method) for method in methods}
    trials = [trial for group in tuning.values() for trial in group]
    for seed in range(seeds):
        for method in methods:
            setting = best_setting(tuning[method], results)
            trials.append(_trial(recipe, method, seed, setting, tuning=False))
    if any(trial.recipe.train.patience is not None for trial in trials):
        raise AcamkdError(
            "train.patience: a comparison gives every method the same epochs: leave it out (--set train.patience=null)"
        )
    return trials


def methods_of(recipe: config.Recipe, methods: Sequence[str] | None = None) -> list[str]:
    """Methods to compare: the given ones, or all of the recipe's `compare.methods`.

    Raises:
        AcamkdError: No method is given and the recipe has none.
    """
    names = list(methods or recipe.compare.methods)
    if not names:
        raise AcamkdError(f"the recipe {recipe.name} has no compare.methods: name what to compare by --methods")
    return names


def best_setting(trials: Sequence[Trial], results: Path) -> float | None:
    """The setting with the best mean at the last epoch; the first setting if no trial is finished."""
    means = setting_means([found for trial in trials if (found := trial.read(results))])
    return max(means, key=means.__getitem__) if means else next((trial.setting for trial in trials), None)


def setting_means(found: Iterable[Mapping[str, Any]]) -> dict[float, float]:
    """Setting -> mean over the seeds of the metric at the last epoch, of one method's finished tuning trials."""
    scores: dict[float, list[float]] = {}
    for trial in found:
        scores.setdefault(trial["setting"], []).append(trial["history"][-1])
    return {setting: mean(values) for setting, values in scores.items()}


def _tuning_trials(recipe: config.Recipe, method: str) -> list[Trial]:
    search, losses = recipe.compare.tune, _variant(recipe, method).losses
    if search is None or not losses:
        return []
    if search.option == "gradient_ratio" and not any(loss.is_auto for loss in losses):
        raise AcamkdError(
            f"compare.tune searches gradient_ratio, which acts only on losses with `weight: auto`, and {method} has "
            "none: give it `weight: auto`, or tune another option"
        )
    seeds = range(TUNING_SEED, TUNING_SEED + search.seeds)
    return [_trial(recipe, method, seed, value, tuning=True) for value in search.values for seed in seeds]


def _trial(recipe: config.Recipe, method: str, seed: int, setting: float | None, *, tuning: bool) -> Trial:
    search = recipe.compare.tune
    option = None if setting is None or search is None else search.option
    overrides = [f"train.seed={seed}"]
    if option is not None and setting is not None:
        value = int(setting) if setting.is_integer() else setting  # options such as num_masks accept no 3.0
        overrides += [f"losses.{index}.{option}={value}" for index in range(len(_variant(recipe, method).losses))]
    varied = _variant(recipe, method, overrides)
    kept = config.Comparison(cache=recipe.compare.cache, cache_precision=recipe.compare.cache_precision)
    return Trial(method, setting, option, tuning, varied.model_copy(update={"compare": kept}))


def _variant(recipe: config.Recipe, method: str, overrides: Sequence[str] = ()) -> config.Recipe:
    """The recipe of one method."""
    named: Mapping[str, Mapping[str, Any]] = {NONE: {"losses": []}, **recipe.compare.methods}
    if method in named:
        changes = dict(named[method])
    else:
        from acamkd.distillation.methods import METHODS  # imports torch, which tables of named methods do not need

        if method not in METHODS or not recipe.losses:
            raise AcamkdError(f"there is no method {method!r} to compare; {nearest(method, [*named, *METHODS])}")
        changes = {"losses.0.name": method}
    given = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    return config.override(recipe, [*given, *overrides])


def _of_masks(columns: Iterable[str]) -> list[str]:
    """Columns of mask statistics in a history: LAYER/METHOD/NAME where the loss itself has a column too.

    The loss's column is required since a class may be named with_mask.
    """
    places = {column.removeprefix("loss/").rpartition("/")[0] for column in columns if column.startswith("loss/")}
    apart = {column: column.rpartition("/") for column in columns}
    return [column for column, (place, _, name) in apart.items() if place in places and mask_statistic(name)]


def _columns(file: Path) -> dict[str, list[float | None]]:
    """Columns of a history.csv, rounded."""
    with file.open(newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    return {name: [round(float(row[name]), DIGITS) if row[name] else None for row in rows] for name in rows[0]}
