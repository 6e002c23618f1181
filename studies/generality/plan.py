"""The study's batches and trials, and what their scores choose: ratios, the best other method, combinations, ideas."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, inf
from pathlib import Path
from statistics import mean
from typing import Any

from acamkd import config
from acamkd.engine.runs import default_folder
from acamkd.jobs.compare import trials_csv
from acamkd.jobs.compare.trials import NONE, TUNING_SEED, Trial, plan

HERE = Path(__file__).resolve().parent
TABLE = HERE / trials_csv.FILE
FAILURES = HERE / "failed.csv"
COSTS = HERE / "costs.csv"
TEACHERS = HERE / "teachers.csv"
BY_IMAGE = HERE / "by_image.csv"
PULLS = HERE / "levels.csv"

KINDS = {
    "segmentation": ("camvid", "facade11", "animals7_masks"),
    "detection": ("bccd", "animals7_boxes", "voc07mini"),
}
TASKS = ("camvid", "bccd", "facade11", "animals7_boxes", "animals7_masks", "voc07mini")
"""Both kinds in turn, so that a batch that stops early has something of both."""
FOUR = ("camvid", "voc07mini", "facade11", "animals7_boxes")
"""Those of the regimes `own` and `all`."""

FIRST, SECOND = range(3), range(3, 8)
"""Seeds that learn from the first and from the second training of each teacher (README.md, deviation 13)."""
TRIED = SECOND[:3]
"""Seeds of combinations and ideas, and of the regimes other than `few`."""
LAST_OF_FIVE = SECOND[:2]
"""Those with which a method at the common ratio has five seeds."""

PRIMARY = ("fitnet", "pkd", "cwd", "acam", "acam-paper")
UNMASKED = "pkd"
"""ACAM's distance without masks, but for a factor that `weight: auto` takes out."""
CONTROLS = ("acam-strength-normalized", "acam-no-diversity", "acam-squared")
CONTROLS_OF_FIRST = (
    ("camvid", CONTROLS, FIRST),
    ("bccd", CONTROLS, FIRST),
    ("facade11", CONTROLS, FIRST[:2]),
    ("animals7_boxes", ("acam-squared",), FIRST),
    ("voc07mini", ("acam-squared",), FIRST),
    ("voc07mini", ("acam-strength-normalized",), FIRST[:1]),
)
"""Task, methods and seeds that had ended when the first teachers were lost."""
CONTROLS_OF_SECOND = {
    "animals7_masks": (CONTROLS, 3),
    "animals7_boxes": (CONTROLS[:2], 3),
    "facade11": (CONTROLS, 1),
    "voc07mini": (CONTROLS[:2], 3),
}
"""Of the other controls: task -> methods and number of seeds."""
OTHERS = {"segmentation": ("mgd", "dist"), "detection": ("mgd", "crosskd")}
WITH, FOR = "_with_", "_for_"
"""In a method's name: the losses of both, and so many epochs."""
COMBINATIONS = {
    "segmentation": (f"acam{WITH}cwd", f"acam{WITH}dist"),
    "detection": (f"pkd{WITH}crosskd", f"acam{WITH}crosskd"),
}
IDEAS = {
    "segmentation": ("acam-late", "acam-smooth", "acam-agreeing", "acam-certain"),
    "detection": ("acam-levels",),
}
"""By the kind of task on whose cheap task they are tried."""
ALIKE = {"acam-levels": ("pkd-levels", "fitnet-levels", "cwd-levels")}
"""Of an idea that is not about masks: other methods with it, the one without masks first."""
LEVELS = "-levels"
"""Ending of a method's name: every level of a detector's pyramid pulls about equally."""
OF_LEVELS = (*PRIMARY[:-1], "mgd")
"""Methods that compare levels, and have that form; the published ACAM-KD stays as it is."""
FURTHER = ("acam-locations", "pkd-locations")
"""What goes further than `acam-levels`, on its cheap task."""
REPEATED = (("camvid", "acam", 4), ("voc07mini", "pkd", 5))
"""Task, method and seed of the trials to be repeated; somebody else chose them, before they had run."""
CHEAP = {"segmentation": "camvid", "detection": "animals7_boxes"}
"""The tasks of the ideas and of the search."""
BRIEF = (UNMASKED, "acam")
"""Methods of the regimes other than `few`: without masks and with them."""
COMMON_RATIO = 2.0
"""Gradient-norm ratio of the batches before the search."""
NOISE = 1.0
"""Standard deviation of a validation score over seeds: 1.03 points, of the first 197 trials."""
RATIOS = (0.5, 2.0, 4.0, 8.0)
"""Those of the search, the same for every method."""
TEACHER = "teacher"
"""In failed.csv, in the place of a trial's name."""
ATTEMPTS = 2
"""Failures after which a trial is given up. Seeds repeat to the bit, so that another attempt would end alike."""

VALIDATIONS = 4
"""Of a training."""

TEACHER_EPOCHS = {"voc07mini": 16}
ALL_EPOCHS = {"camvid": 16, "facade11": 16, "animals7_boxes": 12, "voc07mini": 6}
"""About three times the steps of `few`."""


def comparison(task: str, regime: str) -> str:
    """Name of the trials of a task under a regime, unlike those of other studies."""
    return f"generality_{task}_{regime}"


@dataclass(frozen=True)
class Item:
    """Trials of one comparison.

    Attributes:
        task: Name of the recipe.
        regime: `few`, `own`, `all`, `gap`, or `search`, which is `few` with the seeds and ratios of the search, or
            `again`, which is `few` in folders of its own and without a cache.
        methods: Names in the recipe's `compare.methods`; the baseline comes with them, except in `search` and `again`.
        seeds: Of the trainings; a search has its own.
    """

    task: str
    regime: str
    methods: tuple[str, ...]
    seeds: Sequence[int] = SECOND

    @property
    def comparison(self) -> str:
        """Name in trials.csv."""
        return comparison(self.task, self.regime)

    @property
    def results(self) -> Path:
        """Folder of the trials' JSON files."""
        return HERE / self.comparison

    @property
    def recipe(self) -> config.Recipe:
        """The recipe under the regime, with the methods as `changes` has them."""
        recipe = config.load(HERE / f"{self.task}.yaml", overrides(self.task, self.regime))
        methods = recipe.compare.methods | {method: changes(recipe, method) for method in self.methods}
        return recipe.model_copy(update={"compare": recipe.compare.model_copy(update={"methods": methods})})

    @property
    def names(self) -> list[str]:
        """Names of the trials, for which no recipe is read."""
        if self.regime == "search":
            return [f"{method}-{ratio:g}-seed{TUNING_SEED}" for method in self.methods for ratio in RATIOS]
        methods = self.methods if self.regime == "again" else (NONE, *self.methods)
        return [f"{method}-seed{seed}" for seed in self.seeds for method in methods]

    def trials(self) -> list[Trial]:
        """The trials, those of the search or those of the tables."""
        names = set(self.names)
        return [trial for trial in self.planned() if trial.name in names]

    def planned(self) -> list[Trial]:
        """All trials as `acamkd compare` numbers them, a search's first."""
        return plan(self.recipe, self.methods, self.numbered, self.results)

    @property
    def numbered(self) -> int:
        """Number of seeds, from 0, of `planned`."""
        return max(self.seeds) + 1


def batches() -> Iterator[tuple[str, list[Item]]]:
    """The batches in their order, as README.md lists them; what earlier ones decide is read from trials.csv."""
    yield "1 few, one ratio", [Item(task, "few", PRIMARY, [seed]) for seed in FIRST for task in TASKS]
    yield "2 controls", [Item(task, "few", methods, seeds) for task, methods, seeds in CONTROLS_OF_FIRST]
    yield (
        "2 controls, second teachers",
        [
            Item(task, "few", (UNMASKED, "acam", *methods), [seed])
            for place, seed in enumerate(SECOND)
            for task, (methods, count) in CONTROLS_OF_SECOND.items()
            if place < count
        ],
    )
    yield "3 the student's part", [Item(task, "few", ("acam", "acam-teacher"), SECOND) for task in where_masks_help()]
    yield "4 improvements", [Item(task, "few", ("acam", *IDEAS[kind]), TRIED) for kind, task in CHEAP.items()]
    yield "4 improvements, further", [Item(CHEAP["detection"], "few", ("acam", *FURTHER), TRIED)]
    yield (
        "4 improvements, the best",
        [
            Item(task, "few", (UNMASKED, "acam", idea, *ALIKE.get(idea, ())), TRIED)
            for kind, tasks in KINDS.items()
            if (idea := best_idea(kind))
            for task in tasks
        ],
    )
    yield "5 search", [Item(task, "search", forms(task, PRIMARY)) for task in CHEAP.values()]
    ready = [task for task in TASKS if is_searched(PRIMARY, kind_of(task))]
    yield "6 few, searched", [Item(task, "few", chosen(task, PRIMARY), LAST_OF_FIVE) for task in ready]
    fresh = {task: [name for name in chosen(task, PRIMARY) if name not in PRIMARY] for task in ready}
    yield (
        "6 few, searched, not in batch 1",
        [Item(task, "few", (*chosen(task, ["acam"]), *names), SECOND) for task, names in fresh.items() if names],
    )
    yield "7 own", [Item(task, "own", chosen(task, BRIEF), TRIED) for task in ready if task in FOUR]
    yield "8 all", [Item(task, "all", chosen(task, BRIEF), TRIED) for task in ready if task in FOUR]
    yield (
        "9 other methods",
        [Item(task, "search", forms(task, OTHERS[kind])) for kind, task in CHEAP.items() if task in ready],
    )
    others = {task: other for task in ready if (other := best_other(kind_of(task)))}
    yield "9 other methods, the best", [Item(task, "few", chosen(task, [x]), TRIED) for task, x in others.items()]
    yield "10 wide gap", [Item("facade11", "gap", chosen("facade11", BRIEF), TRIED)] if "facade11" in ready else []
    yield (
        "11 combinations",
        [
            Item(task, "few", tuple(at_ratios(task, each) for each in COMBINATIONS[kind_of(task)]), TRIED)
            for task in others
        ],
    )
    yield (
        "11 combinations, equal time",
        [Item(task, "few", (single,), TRIED) for task in others if (single := at_equal_time(task))],
    )
    yield "12 repetitions", [Item(task, "again", (method,), [seed]) for task, method, seed in REPEATED]


def kind_of(task: str) -> str:
    """`segmentation` or `detection`."""
    return next(kind for kind, tasks in KINDS.items() if task in tasks)


def changes(recipe: config.Recipe, method: str) -> Mapping[str, Any]:
    """What a method changes in a task's recipe: one of its `compare.methods`, or made of these.

    `pkd-8` is `pkd` at the ratio 8, `acam-8_with_cwd` has the losses of both, and `pkd_for_60` takes 60 epochs.
    """
    known = recipe.compare.methods
    if method in known:
        return known[method]
    name, at, number = method.rpartition(FOR)
    if at:
        return {**changes(recipe, name), **epochs(int(number))}
    if WITH in method:
        parts = [
            config.override(recipe, [f"{key}={json.dumps(value)}" for key, value in changes(recipe, part).items()])
            for part in method.split(WITH)
        ]
        return {"losses": [loss.model_dump(mode="json", exclude_defaults=True) for x in parts for loss in x.losses]}
    name, _, ratio = method.rpartition("-")
    return {**known[name], "losses.0.gradient_ratio": float(ratio)}


def overrides(task: str, regime: str) -> list[str]:
    """What a regime changes in a task's recipe."""
    if regime == "few":
        return []
    if regime == "search":
        return [f"compare.tune={{option: gradient_ratio, values: {list(RATIOS)}}}"]
    named = f"name=generality-{task}-{regime}"
    with_teacher = f"teacher.weights={default_folder(recipe_of(task), 'teacher') / 'teacher.safetensors'}"
    if regime == "again":
        return [named, with_teacher, "compare.cache=null"]
    if regime == "own":  # a teacher of its own, from the same few labels
        return [named]
    if regime == "all":
        longer = [f"{key}={value}" for key, value in epochs(ALL_EPOCHS[task]).items()]
        return [named, with_teacher, "data.unlabeled=null", all_labels(task), *longer]
    assert regime == "gap"
    return [
        named, with_teacher, "student.backbone=tu-mobilenetv3_small_050", "student.backbone_weights=null",
        "student.options={decoder_pyramid_channels: 32, decoder_segmentation_channels: 16}",
    ]  # fmt: skip


def all_labels(task: str) -> str:
    """Override with which every training image has its labels."""
    kind = "masks: masks/train" if task in KINDS["segmentation"] else "annotations: annotations/instances_train.json"
    return f"data.train={{images: images/train, {kind}}}"


def epochs(number: int) -> dict[str, int]:
    """What a training of so many epochs changes in a recipe."""
    return {"train.epochs": number, "train.eval_every": number // VALIDATIONS}


def recipe_of(task: str) -> config.Recipe:
    """The recipe of a task, for the regime `few`."""
    return config.load(HERE / f"{task}.yaml")


def stored() -> dict[str, dict[str, Any]]:
    """Comparison -> trial -> content, of trials.csv."""
    return dict(trials_csv.comparisons(TABLE)) if TABLE.is_file() else {}


def rows_of(file: Path) -> list[dict[str, str]]:
    """Rows of a table; none without it."""
    return list(csv.DictReader(file.open(encoding="utf-8"))) if file.is_file() else []


def given_up() -> set[tuple[str, str]]:
    """Comparison and name of the trials that failed too often, of failed.csv."""
    failures = Counter((row["comparison"], row["trial"]) for row in rows_of(FAILURES))
    return {trial for trial, count in failures.items() if count >= ATTEMPTS}


def forms(task: str, methods: Sequence[str]) -> tuple[str, ...]:
    """The methods as the batches from the search on have them: on detectors with all levels alike."""
    is_detection = kind_of(task) == "detection"
    return tuple(method + LEVELS if is_detection and method in OF_LEVELS else method for method in methods)


def searched(kind: str, method: str) -> dict[float, float]:
    """Ratio -> validation score of the search on the cheap task of a kind. A trial that was given up has 0."""
    name, lost = comparison(CHEAP[kind], "search"), given_up()
    (method,) = forms(CHEAP[kind], [method])
    scores = {ratio: 0.0 for ratio in RATIOS if (name, f"{method}-{ratio:g}-seed{TUNING_SEED}") in lost}
    trials = stored().get(name, {}).values()
    return scores | {trial["setting"]: trial["history"][-1] for trial in trials if trial["method"] == method}


def is_searched(methods: Sequence[str], kind: str) -> bool:
    """Whether the search of these methods has ended for a kind of task."""
    return all(set(RATIOS) <= searched(kind, method).keys() for method in methods)


def chosen(task: str, methods: Sequence[str]) -> tuple[str, ...]:
    """The methods in their forms and at their ratios, as the trials name them: `pkd`, or `pkd-levels-8`.

    A method keeps the common ratio unless another one is better by more than `NOISE` in the search of its kind of task.
    """
    names = []
    for method, form in zip(methods, forms(task, methods), strict=True):
        scores = searched(kind_of(task), method)
        best = max(scores, key=scores.__getitem__)
        names.append(form if scores[best] - scores[COMMON_RATIO] <= NOISE else f"{form}-{best:g}")
    return tuple(names)


def at_ratios(task: str, method: str) -> str:
    """A method, or each part of a combination, at the ratio of its search."""
    return WITH.join(chosen(task, method.split(WITH)))


def best_other(kind: str) -> str | None:
    """The method of batch 9 with the best validation score in its search; None until that has ended."""
    if not is_searched((*PRIMARY, *OTHERS[kind]), kind):
        return None
    return max(OTHERS[kind], key=lambda method: max(searched(kind, method).values()))


def standing(task: str, name: str, seeds: Sequence[int] = TRIED) -> float | None:
    """Mean validation score of a method, named as in the trials, over some seeds in `few`.

    None until all have ended; minus infinity where one was given up, so that nothing chooses the method.
    """
    group = comparison(task, "few")
    trials, names = stored().get(group, {}), [f"{name}-seed{seed}" for seed in seeds]
    if not given_up().isdisjoint((group, each) for each in names):
        return -inf
    if any(each not in trials for each in names):
        return None
    return float(mean(trials[each]["history"][-1] for each in names))


def where_masks_help() -> list[str]:
    """The two tasks on which masks gain most on validation images; none until batch 1 has ended."""
    gains = {}
    for task in TASKS:
        ours, without = standing(task, "acam", FIRST), standing(task, UNMASKED, FIRST)
        if ours is None or without is None:
            return []
        gains[task] = ours - without
    return sorted(gains, key=gains.__getitem__, reverse=True)[:2]


def best(kind: str, methods: Sequence[str]) -> str | None:
    """The method that validates best over the tasks of a kind, each at its ratio; None until all have ended."""
    scores = {}
    for method in methods:
        standings = (standing(task, at_ratios(task, method), LAST_OF_FIVE) for task in KINDS[kind])
        known = [score for score in standings if score is not None]
        if len(known) < len(KINDS[kind]):
            return None
        scores[method] = mean(known)
    return max(scores, key=scores.__getitem__)


def at_equal_time(task: str) -> str | None:
    """The best single method, trained for as many epochs as take the time of the best combination.

    None until both are known, and what they cost. The number of epochs is a multiple of VALIDATIONS.
    """
    kind = kind_of(task)
    other = best_other(kind)
    if other is None:
        return None
    pair, single = best(kind, COMBINATIONS[kind]), best(kind, (*PRIMARY, other))
    seconds = costs()
    if pair is None or single is None or not {(task, pair), (task, single)} <= seconds.keys():
        return None
    name = at_ratios(task, single)
    usual = recipe_of(task).train.epochs
    number = VALIDATIONS * ceil(usual * seconds[task, pair] / seconds[task, single] / VALIDATIONS)
    return name if number <= usual else f"{name}{FOR}{number}"


def costs() -> dict[tuple[str, str], float]:
    """(task, method) -> seconds of a training step, of costs.csv."""
    return {(row["task"], row["method"]): float(row["seconds"]) for row in rows_of(COSTS)}


def best_idea(kind: str) -> str | None:
    """The idea that gains most over `acam` on the cheap task of a kind, on validation images.

    None until all have ended, and if none gains.
    """
    control = standing(CHEAP[kind], "acam")
    scores = {idea: score for idea in IDEAS[kind] if (score := standing(CHEAP[kind], idea)) is not None}
    if control is None or len(scores) < len(IDEAS[kind]):
        return None
    idea = max(scores, key=scores.__getitem__)
    return idea if scores[idea] > control else None
