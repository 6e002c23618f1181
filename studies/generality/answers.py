"""Answers to the plan's questions, from whatever trials there are; needs neither images nor weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from scipy import stats
from studies.generality import plan
from studies.generality.plan import (
    ALIKE,
    CHEAP,
    COMBINATIONS,
    FOUR,
    KINDS,
    PRIMARY,
    TASKS,
    UNMASKED,
    comparison,
)  # fmt: skip

from acamkd.jobs.compare.statistics import on_test, scores_of
from acamkd.jobs.compare.trials import NONE

SMALLEST = 0.5
"""Smallest effect of interest, in points."""
SPARSE, DENSE = ("voc07mini", "animals7_boxes"), "bccd"
ANIMALS = ("animals7_masks", "animals7_boxes")

Found: TypeAlias = Mapping[str, Sequence[dict[str, Any]]]
"""Comparison -> its trials."""
Scores: TypeAlias = Mapping[str, Mapping[int, float]]
"""Method -> seed -> score."""


@dataclass(frozen=True)
class Estimate:
    """A mean over tasks of their mean paired differences, in points.

    Attributes:
        differences: Of each task, one per seed.
        mean: The estimate.
        low: Lower end of the 95 % interval; None where a task has a single seed.
        high: Its upper end.
        answer: What the plan calls it.
    """

    differences: Mapping[str, np.ndarray]
    mean: float
    low: float | None
    high: float | None
    answer: str

    @property
    def tasks(self) -> int:
        """Number of tasks."""
        return len(self.differences)

    @property
    def pairs(self) -> int:
        """Number of paired seeds."""
        return sum(len(each) for each in self.differences.values())

    @property
    def ahead(self) -> int:
        """On how many tasks the mean difference is positive."""
        return sum(each.mean() > 0 for each in self.differences.values())

    @property
    def text(self) -> str:
        """Mean and interval."""
        return f"{self.mean:+.2f}" + ("" if self.low is None else f" [{self.low:+.2f}, {self.high:+.2f}]")


def estimate(differences: Mapping[str, np.ndarray], weights: Sequence[float] | None = None) -> Estimate | None:
    """Combine tasks, each with a mean and a variance of its own; None without any difference.

    The interval is Welch's: Student's t with the degrees of freedom of Satterthwaite. There is no mixed model: with six
    tasks its variance between tasks would rest on six figures, and the claim is about these six.

    Args:
        differences: Of each task, one per seed.
        weights: Of the tasks; by default all alike, with the sum 1.
    """
    if not differences:
        return None
    known = list(differences.values())
    shares = np.array(weights or [1 / len(known)] * len(known))
    mean, counts = float(shares @ [each.mean() for each in known]), np.array([len(each) for each in known])
    if counts.min() < 2:
        return Estimate(differences, mean, None, None, "not enough: a task has one seed")
    spreads = shares**2 * [each.var(ddof=1) for each in known]
    parts = spreads / counts
    freedom = parts.sum() ** 2 / (parts**2 / (counts - 1)).sum() if parts.any() else 1.0
    half = float(stats.t.ppf(0.975, freedom) * parts.sum() ** 0.5)
    low, high = mean - half, mean + half
    if low > 0:
        answer = "yes" if high >= SMALLEST else f"yes, but less than {SMALLEST}"
    elif high < SMALLEST:
        answer = "no" if high >= 0 else "no, the opposite"
    else:
        needed = int(np.ceil(spreads.sum() * (1.96 / SMALLEST) ** 2))
        answer = f"not enough; about {max(needed, counts.min() + 1)} seeds a task"
    return Estimate(differences, mean, low, high, answer)


class Results:
    """The trials' scores, with methods at one ratio or at that of their search.

    Args:
        found: The trials.
        searched: Whether each method has the ratio of its search, or all have the common one.
    """

    def __init__(self, found: Found, *, searched: bool) -> None:
        self.found, self.searched = found, searched
        self._names: dict[tuple[str, str], str] = {}
        self.report: dict[str, Scores] = {name: scores_of(on_test(trials)) for name, trials in found.items()}
        self.validation: dict[str, Scores] = {name: scores_of(trials) for name, trials in found.items()}
        for name, trials in found.items():
            _check_teachers(name, trials)

    def name(self, task: str, method: str) -> str:
        """A method's name in the trials of a task."""
        if not self.searched or method == NONE:
            return method
        if (task, method) not in self._names:
            self._names[task, method] = plan.at_ratios(task, method)
        return self._names[task, method]

    def singles(self, kind: str) -> tuple[str, ...]:
        """Methods of the primary table."""
        other = plan.best_other(kind) if self.searched else None
        return (*PRIMARY, other) if other else PRIMARY

    def methods(self, kind: str) -> tuple[str, ...]:
        """Single methods and combinations."""
        return (*self.singles(kind), *COMBINATIONS[kind]) if self.searched_others(kind) else self.singles(kind)

    def searched_others(self, kind: str) -> bool:
        """Whether the methods of batch 7 have a ratio of their own."""
        return self.searched and plan.best_other(kind) is not None

    def differences(
        self, task: str, method: str, other: str, regime: str = "few", *, validation: bool = False
    ) -> np.ndarray | None:
        """Paired differences by seed, of methods by their names in the trials; None without a common seed."""
        scores = (self.validation if validation else self.report).get(comparison(task, regime), {})
        ones, others = scores.get(method, {}), scores.get(other, {})
        shared = sorted(ones.keys() & others.keys())
        return np.array([ones[seed] - others[seed] for seed in shared]) if shared else None

    def over(
        self, tasks: Sequence[str], method: str, other: str, regime: str = "few", *, validation: bool = False
    ) -> Estimate | None:
        """Of a method against another, each at its ratio."""
        return self.over_named(
            tasks, lambda task: (self.name(task, method), self.name(task, other)), regime, validation=validation
        )

    def over_named(
        self,
        tasks: Sequence[str],
        pair: Callable[[str], tuple[str, str] | None],
        regime: str = "few",
        *,
        validation: bool = False,
    ) -> Estimate | None:
        """Of the two names that each task has; tasks without them are left out."""
        names = [(task, found) for task in tasks if (found := pair(task))]
        known = {task: self.differences(task, *both, regime, validation=validation) for task, both in names}
        return estimate({task: each for task, each in known.items() if each is not None})

    def over_kinds(self, tasks: Sequence[str], methods: Mapping[str, str | None], other: str) -> Estimate | None:
        """Of the method that each kind of task has against another one; kinds without a method are left out."""

        def pair(task: str) -> tuple[str, str] | None:
            method = methods[plan.kind_of(task)]
            return (self.name(task, method), self.name(task, other)) if method else None

        return self.over_named(tasks, pair)

    def best_other(self, task: str) -> str | None:
        """Name of the single method other than ACAM that validates best on a task, on the seeds of ACAM."""
        acam = self.name(task, "acam")
        names = [self.name(task, method) for method in self.singles(plan.kind_of(task)) if "acam" not in method]
        gains = {name: self.differences(task, name, acam, validation=True) for name in names}
        known = {name: each.mean() for name, each in gains.items() if each is not None}
        return max(known, key=known.__getitem__) if known else None

    def against_best_other(self, task: str) -> tuple[str, str] | None:
        """ACAM and the best other method."""
        other = self.best_other(task)
        return (self.name(task, "acam"), other) if other else None

    def best(self, tasks: Sequence[str], methods: Sequence[str]) -> str | None:
        """The method that gains most over the baseline on the validation images of some tasks, in `few`.

        One that lacks a task that another has is left out.
        """
        found = {method: self.over(tasks, method, NONE, validation=True) for method in methods}
        known = {method: each for method, each in found.items() if each}
        most = max((each.tasks for each in known.values()), default=0)
        whole = {method: each.mean for method, each in known.items() if each.tasks == most}
        return max(whole, key=whole.__getitem__) if whole else None


def _check_teachers(name: str, trials: Sequence[dict[str, Any]]) -> None:
    """Raise ValueError if trials of one seed, which are compared with each other, have different teachers."""
    teachers: dict[int, set[str]] = {}
    for trial in trials:
        if trial["teacher"]:
            teachers.setdefault(trial["seed"], set()).add(trial["teacher"]["sha256"])
        if trial["inherited"]:
            teachers.setdefault(trial["seed"], set()).add(trial["inherited"])
    if mixed := [seed for seed, known in teachers.items() if len(known) > 1]:
        raise ValueError(f"{name}: trials of the seeds {mixed} have different teachers, so that no difference is fair")


@dataclass(frozen=True)
class Answer:
    """What the trials say to a question of the plan.

    Attributes:
        question: The question.
        compared: The difference that answers it.
        planned: On how many tasks.
        estimate: The estimate; None where no trial has ended.
    """

    question: str
    compared: str
    planned: int
    estimate: Estimate | None

    @property
    def text(self) -> str:
        """The answer, with the number of tasks if there are fewer than planned."""
        if self.estimate is None:
            return "no trial yet"
        few = f" (so far {self.estimate.tasks} of {self.planned} tasks)" if self.estimate.tasks < self.planned else ""
        return self.estimate.answer + few


def answers(results: Results) -> Iterator[Answer]:
    """The questions of the plan, each with its primary comparison.

    Those about parts of ACAM compare at the common ratio; all others have each method at the ratio of `results`.
    """
    common = Results(results.found, searched=False)

    def against(question: str, method: str, other: str, tasks: Sequence[str] = TASKS, at: Results = results) -> Answer:
        return Answer(question, f"`{method}` - `{other}`", len(tasks), at.over(tasks, method, other))

    yield against("Does distillation help?", "acam", NONE)
    others = {task: results.best_other(task) for task in TASKS}
    named = ", ".join(f"`{other}` {task}" for task, other in others.items() if other)
    yield Answer(
        "Does ACAM lead?", "`acam` - best other" + (f" ({named})" if named else ""), len(TASKS),
        results.over_named(TASKS, results.against_best_other),
    )  # fmt: skip
    masks = against("Do masks help?", "acam", UNMASKED, at=common)
    yield masks
    by_task = masks.estimate.differences if masks.estimate else {}
    sparse = {task: by_task[task] for task in (*SPARSE, DENSE) if task in by_task}
    yield Answer(
        "Do they help more where objects are few?", f"the same, mean of {' and '.join(SPARSE)} - {DENSE}", 3,
        estimate(sparse, [0.5, 0.5, -1]) if len(sparse) == 3 else None,
    )  # fmt: skip
    animals = {task: by_task[task] for task in ANIMALS if task in by_task}
    yield Answer(
        "Do they help more with 28 % foreground than with 50 % of the same images?",
        f"the same, {' - '.join(ANIMALS)}", 2, estimate(animals, [1, -1]) if len(animals) == 2 else None,
    )  # fmt: skip
    for kind, tasks in KINDS.items():
        question = f"Is the standardized distance better than the squared one? ({kind})"
        yield against(question, "acam", "acam-squared", tasks, at=common)
    yield against("Do the masks' places help, at equal strength?", "acam-strength-normalized", UNMASKED, at=common)
    yield against("Does the diversity term help?", "acam", "acam-no-diversity", at=common)
    helped = plan.where_masks_help()
    yield Answer(
        "Does the student's part in the masks' input help?", "`acam` - `acam-teacher`", 2,
        common.over(helped, "acam", "acam-teacher"),
    )  # fmt: skip
    yield against("Is the default better than the published form?", "acam", "acam-paper")
    best = {kind: results.best(tasks, results.methods(kind)) for kind, tasks in KINDS.items()}
    advised = ", ".join(f"`{method}` {kind}" for kind, method in best.items() if method)
    for other in (NONE, "acam"):
        yield Answer(
            f"What should a practitioner use? (against {other})", f"best by validation ({advised or '-'}) - `{other}`",
            len(TASKS), results.over_kinds(TASKS, best, other),
        )  # fmt: skip
    yield Answer(
        "... at equal time?", "best combination - best single method", len(TASKS),
        results.over_named(TASKS, _at_equal_time) if results.searched else None,
    )  # fmt: skip
    for regime, question in (("own", "Does a teacher of one's own help?"), ("all", "And with all labels?")):
        method = results.best(FOUR, PRIMARY)
        yield Answer(
            question, f"`{regime}`: `{method or '-'}`, best in `few` - `{NONE}`", len(FOUR),
            results.over(FOUR, method, NONE, regime) if method else None,
        )  # fmt: skip
    yield Answer(
        "And a student of a quarter of the cost?", f"`gap`: `acam` - `{NONE}`", 1,
        results.over(["facade11"], "acam", NONE, "gap"),
    )  # fmt: skip
    for kind, tasks in KINDS.items():
        idea, unseen = plan.best_idea(kind), [task for task in tasks if task != CHEAP[kind]]
        yield Answer(
            f"Can it be better? ({kind})", f"`{idea or 'best idea'}` - `acam`, on tasks that did not choose it",
            len(unseen), common.over(unseen, idea, "acam") if idea else None,
        )  # fmt: skip
        for other in ALIKE.get(idea or "", ()):
            question = "Do masks help" if other.startswith(UNMASKED) else f"Does it lead {other}"
            yield against(f"{question} beside that? ({kind})", idea, other, tasks, at=common)


def _at_equal_time(task: str) -> tuple[str, str] | None:
    kind = plan.kind_of(task)
    single = plan.at_equal_time(task)
    pair = plan.best(kind, COMBINATIONS[kind]) if single else None
    return (plan.at_ratios(task, pair), single) if single and pair else None
