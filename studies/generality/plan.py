"""The study's batches and trials, and what their scores choose: ratios, the best other method, combinations, ideas."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from statistics import mean, median
from typing import Any

from acamkd import config
from acamkd.engine.runs import default_folder
from acamkd.jobs.compare import trials_csv
from acamkd.jobs.compare.trials import NONE, TUNING_SEED, Trial, plan

HERE = Path(__file__).resolve().parent
TABLE = HERE / trials_csv.FILE
FAILURES = HERE / "failed.csv"

KINDS = {
    "segmentation": ("camvid", "facade11", "animals7_masks"),
    "detection": ("bccd", "animals7_boxes", "voc07mini"),
}
TASKS = ("camvid", "bccd", "facade11", "animals7_boxes", "animals7_masks", "voc07mini")
"""Both kinds in turn, so that a batch that stops early has something of both."""
FOUR = ("camvid", "voc07mini", "facade11", "animals7_boxes")
"""Those of the regimes `own` and `all`."""

PRIMARY = ("fitnet", "pkd", "cwd", "acam", "acam-paper")
CONTROLS = ("acam-uniform", "acam-strength-normalized", "acam-no-diversity", "acam-squared")
OTHERS = {"segmentation": ("mgd", "dist"), "detection": ("mgd", "crosskd")}
WITH, FOR = "_with_", "_for_"
"""In a method's name: the losses of both, and so many epochs."""
COMBINATIONS = {
    "segmentation": (f"acam{WITH}cwd", f"acam{WITH}dist"),
    "detection": (f"pkd{WITH}crosskd", f"acam{WITH}crosskd"),
}
IDEAS = {
    "segmentation": ("acam-late", "acam-smooth", "acam-agreeing", "acam-certain"),
    "detection": ("acam-late", "acam-smooth", "acam-agreeing", "acam-levels"),
}
CHEAP = {"segmentation": "camvid", "detection": "bccd"}
"""The tasks on which the ideas begin."""
TRIED = 3
"""Seeds, from 0, by which a combination and an idea are chosen."""
COMMON_RATIO = 2.0
RATIOS = (0.5, 2.0, 8.0)
"""Gradient-norm ratios of the search, the same for every method."""

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
        regime: `few`, `own`, `all`, `gap`, or `search`, which is `few` with the seeds and ratios of the search.
        methods: Names in the recipe's `compare.methods`; the baseline comes with them, except in a search.
        seeds: Number of seeds.
    """

    task: str
    regime: str
    methods: tuple[str, ...]
    seeds: int = 1

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
        return [f"{method}-seed{seed}" for seed in range(self.seeds) for method in (NONE, *self.methods)]

    def trials(self) -> list[Trial]:
        """The trials, those of the search or those of the tables."""
        searches = self.regime == "search"
        return [trial for trial in self.planned() if trial.tuning is searches]

    def planned(self) -> list[Trial]:
        """All trials as `acamkd compare` numbers them, a search's first."""
        return plan(self.recipe, self.methods, self.seeds, self.results)


def batches() -> Iterator[tuple[str, list[Item]]]:
    """The batches in their order, as README.md lists them; what a search decides is read from trials.csv."""
    yield "1 few, one strength", [Item(task, "few", PRIMARY, seeds) for seeds in (1, 2, 3) for task in TASKS]
    yield "2 search", [Item(task, "search", PRIMARY) for task in TASKS]
    if not is_searched(PRIMARY):
        return
    yield "3 few, searched", [Item(task, "few", chosen(task, PRIMARY), seeds) for seeds in (3, 5) for task in TASKS]
    yield "4 controls", [Item(task, "few", chosen(task, CONTROLS), 3) for task in TASKS]
    yield "5 own", [Item(task, "own", chosen(task, PRIMARY), 3) for task in FOUR]
    yield "6 all", [Item(task, "all", chosen(task, PRIMARY), 3) for task in FOUR]
    yield "7 other methods", [Item(task, "search", OTHERS[kind]) for kind, tasks in KINDS.items() for task in tasks]
    yield "7 other methods, the best", [
        Item(task, "few", chosen(task, [other]), seeds)
        for seeds in (3, 5) for task in TASKS if (other := best_other(kind_of(task)))
    ]  # fmt: skip
    yield "8 wide gap", [Item("facade11", "gap", chosen("facade11", PRIMARY), 3)]
    yield "9 the student's part", [Item(task, "few", chosen(task, ["acam-teacher"]), 5) for task in FOUR[:2]]
    yield "10 combinations", [
        Item(task, "few", tuple(at_ratios(task, method) for method in COMBINATIONS[kind_of(task)]), TRIED)
        for task in TASKS if best_other(kind_of(task))
    ]  # fmt: skip
    yield (
        "10 combinations, equal time",
        [Item(task, "few", (single,), TRIED) for task in TASKS if (single := at_equal_time(task))],
    )
    yield "11 improvements", [Item(task, "few", chosen(task, IDEAS[kind]), TRIED) for kind, task in CHEAP.items()]
    idea = best_idea()
    yield (
        "11 improvements, the best",
        [Item(task, "few", chosen(task, [idea]), TRIED) for task in TASKS if idea in IDEAS[kind_of(task)]],
    )


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


def searched(kind: str, method: str) -> dict[float, list[float]]:
    """Ratio -> scores of the search over the tasks of a kind."""
    scores: dict[float, list[float]] = {}
    for task in KINDS[kind]:
        for trial in stored().get(comparison(task, "search"), {}).values():
            if trial["method"] == method:
                scores.setdefault(trial["setting"], []).append(trial["history"][-1])
    return scores


def is_searched(methods: Sequence[str], kinds: Sequence[str] = tuple(KINDS)) -> bool:
    """Whether the search of these methods has ended on every task of some kinds."""
    return all(
        {ratio: len(x) for ratio, x in searched(kind, method).items()} == dict.fromkeys(RATIOS, len(KINDS[kind]))
        for kind in kinds
        for method in methods
    )


def chosen(task: str, methods: Sequence[str]) -> tuple[str, ...]:
    """The methods at the ratio of the search that was best on the mean of their kind of task: `pkd`, or `pkd-8`.

    Controls of ACAM, and ideas, have the ratio of ACAM.
    """
    kind = kind_of(task)
    names = []
    for method in methods:
        scores = searched(kind, method if method in PRIMARY + OTHERS[kind] else "acam")
        best = max(scores, key=lambda ratio: mean(scores[ratio]))
        names.append(method if best == COMMON_RATIO else f"{method}-{best:g}")
    return tuple(names)


def at_ratios(task: str, method: str) -> str:
    """A method, or each part of a combination, at the ratio of its search."""
    return WITH.join(chosen(task, method.split(WITH)))


def best_other(kind: str) -> str | None:
    """The method of batch 7 with the best validation score in its search; None until that has ended."""
    if not is_searched((*PRIMARY, *OTHERS[kind]), [kind]):
        return None
    return max(OTHERS[kind], key=lambda method: max(map(mean, searched(kind, method).values())))


def first_seeds(task: str, method: str) -> list[dict[str, Any]]:
    """The trials in `few` that choose between combinations, or ideas."""
    trials = stored().get(comparison(task, "few"), {})
    return [trials[name] for seed in range(TRIED) if (name := f"{method}-seed{seed}") in trials]


def standing(tasks: Sequence[str], method: str) -> float | None:
    """Mean validation score over some tasks and the first seeds in `few`; None until all have ended."""
    found = [first_seeds(task, at_ratios(task, method)) for task in tasks]
    if any(len(trials) < TRIED for trials in found):
        return None
    return mean(trial["history"][-1] for trials in found for trial in trials)


def best(tasks: Sequence[str], methods: Sequence[str]) -> str | None:
    """The method that validates best over some tasks; None until all have ended."""
    scores = {method: standing(tasks, method) for method in methods}
    known = {method: score for method, score in scores.items() if score is not None}
    return max(known, key=known.__getitem__) if len(known) == len(scores) else None


def at_equal_time(task: str) -> str | None:
    """The best single method, trained for as many epochs as take the processor time of the best combination.

    None until both are known. The number of epochs is a multiple of VALIDATIONS.
    """
    kind = kind_of(task)
    other = best_other(kind)
    if other is None:
        return None
    pair, single = (best(KINDS[kind], methods) for methods in (COMBINATIONS[kind], (*PRIMARY, other)))
    if pair is None or single is None:
        return None
    name = at_ratios(task, single)
    cost, own = (
        median(trial["cpu_time"] for trial in first_seeds(task, each)) for each in (at_ratios(task, pair), name)
    )
    usual = recipe_of(task).train.epochs
    epochs = VALIDATIONS * ceil(usual * cost / own / VALIDATIONS)
    return name if epochs <= usual else f"{name}{FOR}{epochs}"


def best_idea() -> str | None:
    """The idea that gains most over `acam` on the mean of both cheap tasks, on validation images.

    One that is for a single kind of task is `acam` itself on the other, and gains 0 there. None until all have ended,
    and if none gains.
    """
    gains: dict[str, float] = {}
    for kind, task in CHEAP.items():
        control = standing([task], "acam")
        for idea in IDEAS[kind]:
            score = standing([task], idea)
            if score is None or control is None:
                return None
            gains[idea] = gains.get(idea, 0.0) + (score - control) / len(CHEAP)
    idea = max(gains, key=gains.__getitem__)
    return idea if gains[idea] > 0 else None
