"""Statistics of trials: means over seeds, paired differences, and a verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from scipy import stats

from acamkd.engine.evidence import SEEDS_NEEDED, Verdict, verdict_over_seeds
from acamkd.jobs.compare.trials import NONE, setting_means
from acamkd.mask_health import mask_statistic

Trials: TypeAlias = Sequence[Mapping[str, Any]]
"""Contents of finished trials."""


@dataclass(frozen=True)
class Paired:
    """Paired differences between two methods, on the seeds that both have.

    Attributes:
        other: Method that is subtracted.
        mean: Mean difference, in points.
        low: Lower end of Student's 95 % interval; None with fewer than three seeds, of which it would say nothing.
        high: Its upper end.
        p: Two-sided p of the paired t test, before the correction for the number of methods; None with one seed.
        n: Number of seeds.
    """

    other: str
    mean: float
    low: float | None
    high: float | None
    p: float | None
    n: int


@dataclass(frozen=True)
class Row:
    """One row of the table, for one method.

    Attributes:
        method: Name of the method.
        setting: Value of the tuned key.
        n: Number of seeds.
        mean: Mean over the seeds of the metric at the last epoch.
        std: Standard deviation over the seeds (n - 1); None with one seed.
        gain: Difference to the baseline; None for the baseline itself, and without a common seed.
        p_corrected: Holm's correction of `gain.p` over the methods of the table.
        over_best_other: Difference to the best method that is no variant of it and shares a seed. Methods with enough
            seeds have precedence.
        verdict: `gain` or `harm` if the corrected p is below 0.05 and the interval is on that side of 0.
        minutes: Median wall time.
    """

    method: str
    setting: float | None
    n: int
    mean: float
    std: float | None
    gain: Paired | None
    p_corrected: float | None
    over_best_other: Paired | None
    verdict: Verdict | None
    minutes: float

    @property
    def p_text(self) -> str:
        """The corrected p as written in tables; empty if there is none."""
        if self.p_corrected is None:
            return ""
        return f"{self.p_corrected:.3f}" if self.p_corrected >= 0.001 else "<0.001"


def paired(scores: Mapping[int, float], others: Mapping[int, float], other: str) -> Paired:
    """Compare two methods seed by seed; both map a seed to a score."""
    differences = np.array([scores[seed] - others[seed] for seed in sorted(scores.keys() & others.keys())])
    n, mean = len(differences), float(differences.mean()) if len(differences) else float("nan")
    if n < 2:
        return Paired(other, mean, None, None, None, n)
    if not differences.std():  # all differences are equal: the test would divide by 0
        low, high, p = mean, mean, float(mean == 0)
    else:
        test = stats.ttest_1samp(differences, 0)
        (low, high), p = map(float, test.confidence_interval()), float(test.pvalue)
    return Paired(other, mean, low, high, p, n) if n >= SEEDS_NEEDED else Paired(other, mean, None, None, p, n)


def holm(values: Sequence[float]) -> list[float]:
    """Holm's step-down correction of p values for their number."""
    corrected, largest = [0.0] * len(values), 0.0
    for rank, index in enumerate(np.argsort(values)):
        largest = max(largest, min(1.0, (len(values) - rank) * values[index]))
        corrected[index] = largest
    return corrected


@dataclass(frozen=True)
class Tuning:
    """Results of the search for the methods' settings.

    Attributes:
        option: Name of the tuned option.
        settings: Its values, ascending.
        seeds: Seeds of the search; no row uses them.
        means: Method -> setting -> mean of the metric at the last epoch over these seeds.
    """

    option: str
    settings: list[float]
    seeds: list[int]
    means: dict[str, dict[float, float]]

    def best(self, method: str) -> float:
        """The setting of the highest mean."""
        means = self.means[method]
        return max(means, key=means.__getitem__)


def scores_of(trials: Trials) -> dict[str, dict[int, float]]:
    """Method -> seed -> metric at the last epoch."""
    scores: dict[str, dict[int, float]] = {}
    for trial in trials:
        scores.setdefault(trial["method"], {})[trial["seed"]] = trial["history"][-1]
    return scores


def teachers_of(trials: Trials) -> list[tuple[Mapping[str, Any], list[str]]]:
    """Every teacher with the methods that learn from it, those with a score first: one without a head has none."""
    found: dict[str, Mapping[str, Any]] = {}
    methods: dict[str, dict[str, None]] = {}
    for trial in trials:
        if teacher := trial["teacher"]:
            found[teacher["sha256"]] = teacher
            methods.setdefault(teacher["sha256"], {})[trial["method"]] = None
    metric = trials[0]["metric"]
    return [(found[key], list(methods[key])) for key in sorted(found, key=lambda key: found[key][metric] is None)]


def summarize(trials: Trials) -> list[Row]:
    """The table of finished trials, the best method first."""
    scores = scores_of(trials)
    first = {method: next(trial for trial in trials if trial["method"] == method) for method in scores}
    families = {method: _family(method, trial["losses"]) for method, trial in first.items()}
    means = {method: float(np.mean(list(values.values()))) for method, values in scores.items()}
    alone = scores.get(NONE, {})
    gains = {
        method: paired(values, alone, NONE)
        for method, values in scores.items()
        if method != NONE and values.keys() & alone.keys()
    }
    tested = [method for method, gain in gains.items() if gain.p is not None]
    corrected = dict(zip(tested, holm([gains[method].p or 0.0 for method in tested]), strict=True))
    rows = []
    for method, values in scores.items():
        others = [
            other for other in scores
            if families[other] and not families[other] & families[method] and values.keys() & scores[other].keys()
        ]  # fmt: skip
        candidates = [other for other in others if len(scores[other]) >= SEEDS_NEEDED] or others
        best_other = max(candidates, key=means.__getitem__, default=None) if families[method] else None
        gain = gains.get(method)
        rows.append(
            Row(
                method=method,
                setting=first[method]["setting"],
                n=len(values),
                mean=means[method],
                std=float(np.std(list(values.values()), ddof=1)) if len(values) > 1 else None,
                gain=gain,
                p_corrected=corrected.get(method),
                over_best_other=paired(values, scores[best_other], best_other) if best_other else None,
                verdict=verdict_over_seeds(gain.n, corrected.get(method), gain.low, gain.high) if gain else None,
                minutes=float(np.median([trial["wall_time"] for trial in trials if trial["method"] == method])) / 60,
            )
        )
    return sorted(rows, key=lambda row: -row.mean)


def on_test(trials: Trials, *, best_epoch: bool = False) -> list[dict[str, Any]]:
    """The trials that were scored on test images, with this score in the place of their curve.

    Args:
        trials: Finished trials.
        best_epoch: Take the epoch with the best score on the validation images, not the last one.
    """
    return [
        {**trial, "history": [trial["test_of_best_epoch"] if best_epoch else trial["test"][trial["metric"]]]}
        for trial in trials
        if trial.get("test")
    ]


def tested(trials: Trials) -> list[tuple[Row, Row]]:
    """Rows of the test images, best first: of the last epoch, and of the epoch that validated best."""
    best = {row.method: row for row in summarize(on_test(trials, best_epoch=True))}
    return [(row, best[row.method]) for row in summarize(on_test(trials))]


def _family(method: str, losses: Sequence[Mapping[str, Any]]) -> set[str]:
    """Key that is equal for variants of one method, by class or by a name such as `acam-shuffled`."""
    return {method.partition("-")[0], *(loss["name"] for loss in losses)} if losses else set()


def tuned(trials: Trials) -> Tuning | None:
    """Results of the tuning trials; None if there are none."""
    if not trials:
        return None
    return Tuning(
        option=trials[0]["option"],
        settings=sorted({trial["setting"] for trial in trials}),
        seeds=sorted({trial["seed"] for trial in trials}),
        means={
            method: setting_means(trial for trial in trials if trial["method"] == method)
            for method in dict.fromkeys(trial["method"] for trial in trials)
        },
    )


def final_means(rows: Sequence[Row], trials: Trials) -> dict[str, list[float | None]]:
    """Every other metric of the last epoch -> its means over the seeds, one per method in the rows' order."""
    means: dict[str, list[float | None]] = {}
    for name in (name for name in trials[0]["final"] if name != trials[0]["metric"]):
        means[name] = []
        for row in rows:
            values = [trial["final"].get(name) for trial in trials if trial["method"] == row.method]
            known = [value for value in values if value is not None and value == value]
            means[name].append(float(np.mean(known)) if known else None)
    return means


def columns_of_masks(trial: Mapping[str, Any]) -> list[tuple[str, dict[str, Sequence[float | None]]]]:
    """Kind of masks and statistic -> curve, for every set of masks (one kind, layer and loss) of a trial."""
    sets: dict[tuple[str, str], dict[str, Sequence[float | None]]] = {}
    for column, curve in trial["masks"].items():
        place, _, name = column.rpartition("/")
        if of_masks := mask_statistic(name):
            kind, statistic = of_masks
            sets.setdefault((place, kind), {})[statistic] = curve
    return [(kind, curves) for (_, kind), curves in sets.items()]


def mask_curves(rows: Sequence[Row], trials: Trials) -> dict[tuple[str, str], dict[str, list[float]]]:
    """(method, kind of masks) -> statistic -> mean curve over seeds and layers, until a loss stops."""
    found: dict[tuple[str, str], dict[str, list[Sequence[float | None]]]] = {}
    for row in rows:
        for trial in (trial for trial in trials if trial["method"] == row.method):
            for kind, curves in columns_of_masks(trial):
                for statistic, curve in curves.items():
                    found.setdefault((row.method, kind), {}).setdefault(statistic, []).append(curve)
    return {
        masks: {name: _mean_curve(curves) for name, curves in statistics.items()} for masks, statistics in found.items()
    }


def _mean_curve(curves: Sequence[Sequence[float | None]]) -> list[float]:
    means: list[float] = np.mean(np.array(curves, dtype=float), axis=0).tolist()
    return means[: max((epoch for epoch, mean in enumerate(means, start=1) if mean == mean), default=0)]
