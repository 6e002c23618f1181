"""Answers to the plan's questions, from whatever trials there are; needs neither images nor weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from scipy import stats
from studies.generality import plan
from studies.generality.plan import COMBINATIONS, FOUR, IDEAS, KINDS, PRIMARY, TASKS, comparison

from acamkd.jobs.compare.statistics import RESAMPLES, on_test, scores_of
from acamkd.jobs.compare.trials import NONE

SMALLEST = 0.5
"""Smallest effect of interest, in points."""
SPARSE, DENSE = ("voc07mini", "animals7_boxes"), "bccd"

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
    """Combine tasks by a bootstrap that resamples the seeds of each task; None without any difference.

    No mixed model: with six tasks its variance between tasks would rest on six figures, and the claim is about these
    six. A resampled mean varies (n - 1) / n times as much as a mean of n seeds does, so that differences are stretched
    about their mean by sqrt(n / (n - 1)).

    Args:
        differences: Of each task, one per seed.
        weights: Of the tasks; by default all alike, with the sum 1.
    """
    if not differences:
        return None
    known = list(differences.values())
    shares = np.array(weights or [1 / len(known)] * len(known))
    mean, fewest = float(shares @ [each.mean() for each in known]), min(map(len, known))
    if fewest < 2:
        return Estimate(differences, mean, None, None, "not enough: one seed")
    stretched = [each.mean() + (each - each.mean()) * (len(each) / (len(each) - 1)) ** 0.5 for each in known]
    interval = stats.bootstrap(
        stretched, lambda *x, axis: sum(share * each.mean(axis=axis) for share, each in zip(shares, x, strict=True)),
        method="percentile", n_resamples=RESAMPLES, rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    low, high = float(interval.low), float(interval.high)
    if low > 0:
        answer = "yes" if high >= SMALLEST else f"yes, but less than {SMALLEST}"
    elif high < SMALLEST:
        answer = "no"
    else:
        spread = sum(share**2 * each.var(ddof=1) for share, each in zip(shares, known, strict=True))
        needed = int(np.ceil(spread * (1.96 / SMALLEST) ** 2))
        answer = f"not enough; about {max(needed, fewest + 1)} seeds a task"
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


def answers(results: Results) -> Iterator[tuple[str, str, Estimate | None]]:
    """The questions of the plan, what is compared, and the estimate; None where no trial has ended."""

    def against(method: str, other: str, tasks: Sequence[str] = TASKS) -> tuple[str, Estimate | None]:
        return f"`{method}` - `{other}`", results.over(tasks, method, other)

    yield "Does distillation help?", *against("acam", NONE)
    others = {task: results.best_other(task) for task in TASKS}
    named = ", ".join(f"`{other}` {task}" for task, other in others.items() if other)
    yield (
        "Does ACAM lead?", "`acam` - best other" + (f" ({named})" if named else ""),
        results.over_named(TASKS, results.against_best_other),
    )  # fmt: skip
    yield "Do masks help?", *against("acam", "acam-uniform")
    masks = results.over((*SPARSE, DENSE), "acam", "acam-uniform")
    yield (
        "Do they help more where objects are few?", f"the same, {' and '.join(SPARSE)} - {DENSE}",
        estimate(masks.differences, [0.5, 0.5, -1]) if masks and masks.tasks == 3 else None,
    )  # fmt: skip
    for kind, tasks in KINDS.items():
        yield f"Which distance? ({kind})", *against("acam", "acam-squared", tasks)
    yield "Strength or place?", *against("acam-strength-normalized", "acam-uniform")
    yield "Does the diversity term help?", *against("acam", "acam-no-diversity")
    yield "Does the student's part matter?", *against("acam", "acam-teacher", FOUR[:2])
    yield "Is the published form enough?", *against("acam", "acam-paper")
    best = {kind: results.best(tasks, results.methods(kind)) for kind, tasks in KINDS.items()}
    advised = ", ".join(f"`{method}` {kind}" for kind, method in best.items() if method)
    for other in (NONE, "acam"):
        yield (
            f"What should a practitioner use? (against {other})", f"best by validation ({advised or '-'}) - `{other}`",
            results.over_named(
                [task for task in TASKS if best[plan.kind_of(task)] not in (None, other)],
                lambda task, other=other: tuple(
                    results.name(task, each) for each in (best[plan.kind_of(task)], other)
                ),
            ),
        )  # fmt: skip
    yield (
        "... at equal time?", "best combination - best single method",
        results.over_named(TASKS, _at_equal_time) if results.searched else None,
    )  # fmt: skip
    for regime, question in (("own", "Does a teacher of one's own help?"), ("all", "And with all labels?")):
        method = results.best(FOUR, PRIMARY)
        yield (
            question, f"`{regime}`: `{method or '-'}`, best in `few` - `{NONE}`",
            results.over(FOUR, method, NONE, regime) if method else None,
        )  # fmt: skip
    yield (
        "And a student of a quarter of the cost?",
        f"`gap`: `acam` - `{NONE}`",
        results.over(["facade11"], "acam", NONE, "gap"),
    )
    idea = plan.best_idea() if results.searched else None
    tasks = [task for task in TASKS if idea in IDEAS[plan.kind_of(task)]]
    yield (
        "Can it be better?", f"`{idea or 'best idea'}` - `acam`", results.over(tasks, idea, "acam") if idea else None,
    )  # fmt: skip


def _at_equal_time(task: str) -> tuple[str, str] | None:
    kind = plan.kind_of(task)
    single = plan.at_equal_time(task)
    pair = plan.best(KINDS[kind], COMBINATIONS[kind]) if single else None
    return (plan.at_ratios(task, pair), single) if single and pair else None
