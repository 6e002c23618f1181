"""Write the answers, tables and forest.svg of README.md from trials.csv; needs neither images nor weights.

python studies/generality/tables.py
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import matplotlib.pyplot as plt
import numpy as np
import study
from scipy import stats
from study import COMBINATIONS, FOUR, IDEAS, KINDS, OTHERS, PRIMARY, RATIOS, TASKS, comparison

from acamkd.engine.runs import write_text
from acamkd.jobs.compare.statistics import RESAMPLES, holm, on_test, scores_of
from acamkd.jobs.compare.trials import NONE

REGIMES = ("few", "own", "all", "gap")
SMALLEST = 0.5
"""Smallest effect of interest, in points."""
SPARSE, DENSE = ("voc07mini", "animals7_boxes"), "bccd"
BY_IMAGE = "by_image.csv"
"""Beside the trials; by_image.py writes it."""

Found: TypeAlias = Mapping[str, Sequence[dict[str, Any]]]
"""Comparison -> its trials."""
Scores: TypeAlias = Mapping[str, Mapping[int, float]]
"""Method -> seed -> score."""


@dataclass(frozen=True)
class Estimate:
    """A mean over tasks of their mean paired differences, in points.

    Attributes:
        tasks: Number of tasks.
        pairs: Number of paired seeds.
        mean: The estimate.
        ahead: On how many tasks the difference is positive.
        low: Lower end of the 95 % interval; None where a task has a single seed.
        high: Its upper end.
        answer: What the plan calls it.
    """

    tasks: int
    pairs: int
    mean: float
    ahead: int
    low: float | None
    high: float | None
    answer: str

    @property
    def text(self) -> str:
        """Mean and interval."""
        return f"{self.mean:+.2f}" + ("" if self.low is None else f" [{self.low:+.2f}, {self.high:+.2f}]")


def estimate(differences: Sequence[np.ndarray], weights: Sequence[float] | None = None) -> Estimate | None:
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
    shares = np.array(weights or [1 / len(differences)] * len(differences))
    means = np.array([each.mean() for each in differences])
    mean, counts, ahead = float(shares @ means), [len(each) for each in differences], int((means > 0).sum())
    if min(counts) < 2:
        return Estimate(len(counts), sum(counts), mean, ahead, None, None, "not enough: one seed")
    stretched = [each.mean() + (each - each.mean()) * (len(each) / (len(each) - 1)) ** 0.5 for each in differences]
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
        spread = sum(share**2 * each.var(ddof=1) for share, each in zip(shares, differences, strict=True))
        needed = int(np.ceil(spread * (1.96 / SMALLEST) ** 2))
        answer = f"not enough; about {max(needed, min(counts) + 1)} seeds a task"
    return Estimate(len(counts), sum(counts), mean, ahead, low, high, answer)


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
            self._names[task, method] = study.at_ratios(task, method)
        return self._names[task, method]

    def singles(self, kind: str) -> tuple[str, ...]:
        """Methods of the primary table."""
        other = study.best_other(kind) if self.searched else None
        return (*PRIMARY, other) if other else PRIMARY

    def methods(self, kind: str) -> tuple[str, ...]:
        """Single methods and combinations."""
        return (*self.singles(kind), *COMBINATIONS[kind]) if self.searched_others(kind) else self.singles(kind)

    def searched_others(self, kind: str) -> bool:
        """Whether the methods of batch 7 have a ratio of their own."""
        return self.searched and study.best_other(kind) is not None

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
        known = [self.differences(task, *both, regime, validation=validation) for task, both in names]
        return estimate([each for each in known if each is not None])

    def best_other(self, task: str) -> str | None:
        """Name of the single method other than ACAM that validates best on a task, on the seeds of ACAM."""
        acam = self.name(task, "acam")
        names = [self.name(task, method) for method in self.singles(study.kind_of(task)) if "acam" not in method]
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
    parts = [
        results.differences(task, *(results.name(task, method) for method in ("acam", "acam-uniform")))
        for task in (*SPARSE, DENSE)
    ]
    whole = [each for each in parts if each is not None]
    yield (
        "Do they help more where objects are few?", f"the same, {' and '.join(SPARSE)} - {DENSE}",
        estimate(whole, [0.5, 0.5, -1]) if len(whole) == len(parts) else None,
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
                [task for task in TASKS if best[study.kind_of(task)] not in (None, other)],
                lambda task, other=other: tuple(
                    results.name(task, each) for each in (best[study.kind_of(task)], other)
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
    idea = study.best_idea() if results.searched else None
    tasks = [task for task in TASKS if idea in IDEAS[study.kind_of(task)]]
    yield (
        "Can it be better?", f"`{idea or 'best idea'}` - `acam`", results.over(tasks, idea, "acam") if idea else None,
    )  # fmt: skip


def _at_equal_time(task: str) -> tuple[str, str] | None:
    kind = study.kind_of(task)
    single = study.at_equal_time(task)
    pair = study.best(KINDS[kind], COMBINATIONS[kind]) if single else None
    return (study.at_ratios(task, pair), single) if single and pair else None


def main() -> None:
    """Replace what stands between the markers."""
    found = {name: list(trials.values()) for name, trials in study.stored().items()}
    page = study.HERE / "README.md"
    ready = study.is_searched(PRIMARY) and all(study.standing(TASKS, method) is not None for method in PRIMARY)
    results = Results(found, searched=ready)
    rows = list(answers(results))
    parts = [_answers(rows, results)]
    if any(each for _, _, each in rows):
        forest(rows, results)
        parts.append("![Differences with 95 % intervals](forest.svg)")
    parts += [_methods(Results(found, searched=False))] + ([_methods(results)] if results.searched else [])
    parts += [*(_table(results, regime) for regime in REGIMES), _ideas(results), _search(found), _by_image()]
    parts += [_state(found), _batches(found)]
    text = "\n\n".join(part for part in parts if part)
    old = page.read_text(encoding="utf-8")
    write_text(
        page,
        re.sub(r"(?<=<!-- tables -->\n).*?(?=<!-- end -->)", lambda _: f"\n{text}\n\n", old, flags=re.DOTALL),
    )


def _markdown(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], note: str = "") -> str:
    """A section with a table; nothing without rows."""
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    return f"### {title}\n\n" + (f"{note}\n\n" if note else "") + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _ratio(results: Results) -> str:
    return "each at the ratio of its search" if results.searched else "all at the ratio 2"


def _answers(rows: Sequence[tuple[str, str, Estimate | None]], results: Results) -> str:
    lines = [
        [question, what, str(each.tasks), str(each.pairs), each.text, each.answer]
        if each else [question, what, "-", "-", "-", "no trial yet"]
        for question, what, each in rows
    ]  # fmt: skip
    return _markdown(
        f"Answers, {_ratio(results)}", ("question", "difference", "tasks", "pairs", "mean, 95 %", "answer"), lines,
        "Report split, after the last epoch, in `few` where no regime is named.",
    )  # fmt: skip


def _methods(results: Results) -> str:
    """Every method against the baseline, and ACAM against it."""
    lines = []
    for method in dict.fromkeys(method for kind in KINDS for method in results.methods(kind)):
        tasks = [task for task in TASKS if method in results.methods(study.kind_of(task))]
        gain, lead = results.over(tasks, method, NONE), results.over(tasks, "acam", method)
        validation = results.over(tasks, method, NONE, validation=True)
        minutes = [
            trial["cpu_time"] / 60
            for task in tasks
            for trial in results.found.get(comparison(task, "few"), [])
            if trial["method"] == results.name(task, method) and trial["cpu_time"]
        ]
        if gain and validation:
            ahead = f"{gain.ahead} of {gain.tasks}"
            acam = lead.text if lead and method != "acam" else "-"
            cost = f"{np.median(minutes):.1f}" if minutes else "-"
            lines.append([f"`{method}`", str(gain.pairs), gain.text, ahead, f"{validation.mean:+.2f}", acam, cost])
    head = (
        "method", "pairs", "against `none`, 95 %", "ahead in", "on validation", "`acam` against it",
        "processor minutes",
    )  # fmt: skip
    return _markdown(f"Methods over tasks in `few`, {_ratio(results)}", head, lines)


def _table(results: Results, regime: str) -> str:
    """Score and paired difference of every method and task, on both splits."""
    lines = []
    for task in TASKS:
        name = comparison(task, regime)
        best = scores_of(on_test(results.found.get(name, []), best_epoch=True))
        primary = [results.name(task, method) for method in results.singles(study.kind_of(task))]
        known = {method: results.differences(task, method, NONE, regime) for method in primary}
        tested = {method: each for method, each in known.items() if each is not None and len(each) > 1}
        p = dict(zip(tested, holm([float(stats.ttest_1samp(x, 0).pvalue) for x in tested.values()]), strict=True))
        report, validation = results.report.get(name, {}), results.validation.get(name, {})
        for method, scores in sorted(report.items(), key=lambda item: -_mean(item[1])):
            against = [results.differences(task, method, NONE, regime, validation=which) for which in (False, True)]
            gain = estimate([against[0]]) if method != NONE and against[0] is not None else None
            lines.append([
                f"`{task}`", f"`{method}`", str(len(scores)), _score(scores), gain.text if gain else "-",
                f"{p[method]:.3f}" if method in p else "-", f"{_mean(best[method]):.2f}", _score(validation[method]),
                f"{against[1].mean():+.2f}" if gain and against[1] is not None else "-",
            ])  # fmt: skip
    head = (
        "task", "method", "n", "report", "against `none`", "p", "report, best epoch", "validation", "against `none`",
    )  # fmt: skip
    note = (
        "Means over n seeds, after the last epoch where nothing else is said. p is of a paired t test, with Holm's "
        "correction over the methods of the primary table."
    )
    return _markdown(f"`{regime}`", head, lines, note)


def _mean(scores: Mapping[int, float]) -> float:
    return float(np.mean(list(scores.values())))


def _score(scores: Mapping[int, float]) -> str:
    spread = f" ± {np.std(list(scores.values()), ddof=1):.2f}" if len(scores) > 1 else ""
    return f"{_mean(scores):.2f}{spread}"


def _ideas(results: Results) -> str:
    """Each idea against ACAM on the cheap tasks."""
    lines = []
    for kind, task in study.CHEAP.items():
        for idea in IDEAS[kind]:
            report, validation = (results.over([task], idea, "acam", validation=which) for which in (False, True))
            if report and validation:
                lines.append([f"`{idea}`", f"`{task}`", str(report.pairs), validation.text, report.text])
    return _markdown("Ideas against `acam`", ("idea", "task", "n", "validation, 95 %", "report, 95 %"), lines)


def _search(found: Found) -> str:
    """The mean regret of each ratio, by method, and the ratio with the best mean."""
    lines = []
    for kind, tasks in KINDS.items():
        every = []
        for method in (*PRIMARY, *OTHERS[kind]):
            whole = []
            for task in tasks:
                trials = [trial for trial in found.get(comparison(task, "search"), []) if trial["method"] == method]
                scores = {trial["setting"]: trial["history"][-1] for trial in trials}
                if set(RATIOS) <= set(scores):
                    whole.append([max(scores.values()) - scores[ratio] for ratio in RATIOS])
            every += whole
            lines += _regret(kind, f"`{method}`", whole)
        lines += _regret(kind, "all of them", every)
    head = ("kind", "method", "searches", *(f"{ratio:g}" for ratio in RATIOS), "least regret")
    return _markdown("Search: mean regret of each ratio, validation images, seed 1000", head, lines)


def _regret(kind: str, name: str, regrets: Sequence[Sequence[float]]) -> list[list[str]]:
    if not regrets:
        return []
    means = np.mean(regrets, axis=0)
    return [[kind, name, str(len(regrets)), *(f"{x:.2f}" for x in means), f"{RATIOS[int(means.argmin())]:g}"]]


def _rows(name: str) -> list[dict[str, str]]:
    """Rows of a table beside the trials; none without it."""
    file = study.HERE / name
    return list(csv.DictReader(file.open(encoding="utf-8"))) if file.is_file() else []


def _by_image() -> str:
    rows = _rows(BY_IMAGE)
    note = (
        "Differences of each image's own score, averaged over seeds, with the weights that validated best. "
        "rho is Spearman's. Thirds are those of the images with the smallest to the largest share of foreground."
    )
    head = list(rows[0]) if rows else []
    return _markdown("By the share of foreground of an image", head, [list(row.values()) for row in rows], note)


def _state(found: Found) -> str:
    """Numbers and costs of trials, and of those that failed."""
    failed = _rows(study.FAILURES.name)
    names = sorted({*found, *(row["comparison"] for row in failed)})
    lines, totals = [], np.zeros(4)
    for name in names:
        trials = found.get(name, [])
        wall, own = (np.array([trial[key] or 0.0 for trial in trials]) / 60 for key in ("wall_time", "cpu_time"))
        failures = sum(row["comparison"] == name for row in failed)
        totals += (len(trials), failures, wall.sum(), own.sum())
        medians = [f"{np.median(each):.1f}" if len(each) else "-" for each in (wall, own)]
        lines.append([f"`{name}`", str(len(trials)), str(failures), *medians])
    if lines:
        lines.append(["all", *(f"{x:.0f}" for x in totals[:2]), *(f"{x:.0f} in sum" for x in totals[2:])])
    missing = {(row["comparison"], row["trial"]) for row in failed} - {
        (name, trial) for name, trials in study.stored().items() for trial in trials
    }
    diverged = sum("not finite" in row["last line"] for row in failed)
    note = (
        f"Minutes are the median of a trial. {len(failed)} attempts failed, {diverged} of them by a loss that was not "
        f"finite. {len(missing)} of these trials have not ended since."
    )
    return _markdown("Trials", ("comparison", "trials", "failed", "wall minutes", "processor minutes"), lines, note)


def _batches(found: Found) -> str:
    """How much of the plan is done."""
    known = {name: set(trials) for name, trials in study.stored().items()}
    lines = []
    for batch, items in study.batches():
        planned = {(item.comparison, name) for item in items for name in item.names}
        done = sum(name in known.get(group, ()) for group, name in planned)
        lines.append([batch, str(len(planned)), str(done), str(len(planned) - done)])
    note = "Trials that batches share, such as those of `none`, count in each."
    if not study.is_searched(PRIMARY):
        note += " Later batches are planned once batch 2 has ended."
    return _markdown("Batches", ("batch", "trials", "done", "left out so far"), lines, note) if found else ""


def forest(rows: Sequence[tuple[str, str, Estimate | None]], results: Results) -> None:
    """Draw the answers, and each task's difference of ACAM to the baseline and to the best other method."""
    left = [(question, each) for question, _, each in rows if each]
    right: list[tuple[str, Estimate, str]] = []
    for task in TASKS:
        pairs = ((results.name(task, "acam"), NONE), "C0"), (results.against_best_other(task), "C1")
        for pair, color in pairs:
            each = results.over_named([task], lambda _, pair=pair: pair)
            if pair and each:
                right.append((f"{task}: {pair[0]} - {pair[1]} (n {each.pairs})", each, color))
    height = 1.0 + 0.3 * max(len(left), len(right))
    style = {"svg.fonttype": "none", "svg.hashsalt": "forest", "font.size": 8}
    with plt.rc_context(style):
        image, axes = plt.subplots(1, 2, figsize=(11, height), layout="constrained")
        _draw(axes[0], "over tasks", [(f"{name} ({each.pairs})", each, "black") for name, each in left])
        _draw(axes[1], "by task", right)
        image.savefig(study.HERE / "forest.svg", metadata={"Date": None})
        plt.close(image)


def _draw(axis: Any, title: str, lines: Sequence[tuple[str, Estimate, str]]) -> None:
    axis.axvspan(-SMALLEST, SMALLEST, color="0.92")
    axis.axvline(0, color="gray", linewidth=1)
    for place, (_, each, color) in enumerate(reversed(lines)):
        if each.low is not None:
            axis.plot([each.low, each.high], [place, place], color=color, linewidth=1.5)
        axis.plot(each.mean, place, "s", color=color, markersize=4)
    axis.set_yticks(range(len(lines)), [name for name, _, _ in reversed(lines)])
    axis.set_title(title)
    axis.set_xlabel(f"points, 95 % interval (gray: less than {SMALLEST})")


if __name__ == "__main__":
    main()
