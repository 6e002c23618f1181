"""Write the tables of README.md from trials.csv; needs neither images nor weights.

python studies/generality/tables.py
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats
from study import FAILURES, HERE, KINDS, PRIMARY, RATIOS, TASKS, chosen, is_searched, stored

from acamkd.engine.runs import write_text
from acamkd.jobs.compare.statistics import RESAMPLES, on_test, scores_of, summarize
from acamkd.jobs.compare.trials import NONE

README = HERE / "README.md"
REGIMES = ("few", "own", "all", "gap")
SMALLEST = 0.5
"""Smallest effect of interest, in points."""

PAIRS = (
    ("acam", NONE), ("fitnet", NONE), ("pkd", NONE), ("cwd", NONE), ("acam-paper", NONE), ("acam", "fitnet"),
    ("acam", "pkd"), ("acam", "cwd"), ("acam", "acam-paper"), ("acam", "acam-uniform"), ("acam", "acam-squared"),
    ("acam-strength-normalized", "acam-uniform"), ("acam", "acam-no-diversity"), ("acam", "acam-teacher"),
)  # fmt: skip

Found = Mapping[str, Sequence[dict[str, Any]]]
"""Comparison -> its trials."""


def main() -> None:
    """Replace what stands between the markers."""
    found = {name: list(trials.values()) for name, trials in stored().items()}
    parts = [_state(found), *(_table(found, regime) for regime in REGIMES), _combined(found, searched=False)]
    if is_searched(PRIMARY):
        parts.append(_combined(found, searched=True))
    parts.append(_search(found))
    text = "\n\n".join(part for part in parts if part)
    page = README.read_text(encoding="utf-8")
    page = re.sub(r"(?<=<!-- tables -->\n).*?(?=<!-- end -->)", lambda _: f"\n{text}\n\n", page, flags=re.DOTALL)
    write_text(README, page)


def _state(found: Found) -> str:
    failed = list(csv.DictReader(FAILURES.open(encoding="utf-8"))) if FAILURES.is_file() else []
    lines = ["| comparison | trials | failed | wall minutes | processor minutes |", "|---|---|---|---|---|"]
    totals = np.zeros(4)
    for name, trials in found.items():
        wall, own = ([trial[key] or 0.0 for trial in trials] for key in ("wall_time", "cpu_time"))
        failures = sum(row["comparison"] == name for row in failed)
        totals += (len(trials), failures, sum(wall) / 60, sum(own) / 60)
        medians = f"{np.median(wall) / 60:.1f} | {np.median(own) / 60:.1f}"
        lines.append(f"| `{name}` | {len(trials)} | {failures} | {medians} |")
    lines.append(f"| all | {totals[0]:.0f} | {totals[1]:.0f} | {totals[2]:.0f} in sum | {totals[3]:.0f} in sum |")
    return "### Trials\n\nMinutes are the median of a trial.\n\n" + "\n".join(lines)


def _table(found: Found, regime: str) -> str:
    """Score and paired difference of every method and task, on both splits."""
    lines = []
    for task in TASKS:
        trials = found.get(f"{task}_{regime}", [])
        of_test = {row.method: row for row in summarize(on_test(trials))}
        of_best = {row.method: row for row in summarize(on_test(trials, best_epoch=True))}
        for row in summarize(trials):
            last, best = of_test[row.method], of_best[row.method]
            cells = (
                f"`{task}`", f"`{row.method}`", str(row.n), _score(last), _gain(last), last.p_text or "-",
                f"{best.mean:.2f}", _score(row), _gain(row),
            )  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    if not lines:
        return ""
    head = (
        "| task | method | n | report | against `none` | p | report, best epoch | validation | against `none` |\n"
        "|---|---|---|---|---|---|---|---|---|\n"
    )
    return (
        f"### `{regime}`\n\nMeans over n seeds, after the last epoch where nothing else is said.\n\n"
        + head
        + ("\n".join(lines))
    )


def _score(row: Any) -> str:
    return f"{row.mean:.2f}" + (f" ± {row.std:.2f}" if row.std is not None else "")


def _gain(row: Any) -> str:
    if row.gain is None:
        return "-"
    interval = f" [{row.gain.low:+.2f}, {row.gain.high:+.2f}]" if row.gain.low is not None else ""
    return f"{row.gain.mean:+.2f}{interval}"


def _combined(found: Found, *, searched: bool) -> str:
    """One estimate over tasks per pair of methods, in `few` on the report split.

    Args:
        found: The trials.
        searched: Whether each method has the ratio of its search, or all have the common one.
    """
    lines = []
    for method, other in PAIRS:
        differences = []
        for task in TASKS:
            scores = scores_of(on_test(found.get(f"{task}_few", [])))
            ones, others = (scores.get(_at_ratio(task, name, searched), {}) for name in (method, other))
            if shared := ones.keys() & others.keys():
                differences.append(np.array([ones[seed] - others[seed] for seed in sorted(shared)]))
        if not differences:
            continue
        mean = float(np.mean([each.mean() for each in differences]))
        ahead = sum(each.mean() > 0 for each in differences)
        cells = [f"`{method}` - `{other}`", str(len(differences)), str(sum(map(len, differences))), f"{mean:+.2f}"]
        cells += [f"{ahead} of {len(differences)}", *_answer(differences)]
        lines.append(f"| {' | '.join(cells)} |")
    if not lines:
        return ""
    title = "each at the ratio of its search" if searched else "all at the ratio 2"
    head = "| difference | tasks | pairs | mean | ahead in | 95 % | answer |\n|---|---|---|---|---|---|---|\n"
    return f"### Over tasks, `few`, report split, last epoch, {title}\n\n" + head + "\n".join(lines)


def _at_ratio(task: str, method: str, searched: bool) -> str:
    return chosen(task, [method])[0] if searched and method != NONE else method


def _answer(differences: Sequence[np.ndarray]) -> tuple[str, str]:
    """Interval of the mean over tasks, seeds resampled within each, and what the plan calls it."""
    if min(map(len, differences)) < 2:
        return "-", "not enough: one seed"
    found = stats.bootstrap(
        tuple(differences), lambda *x, axis: np.mean([each.mean(axis=axis) for each in x], axis=0),
        method="percentile", n_resamples=RESAMPLES, rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    interval = f"[{found.low:+.2f}, {found.high:+.2f}]"
    if found.low > 0:
        return interval, "yes" if found.high >= SMALLEST else f"yes, but less than {SMALLEST}"
    if found.high < SMALLEST:
        return interval, "no"
    spread = np.mean([each.var(ddof=1) for each in differences]) / len(differences)
    needed = int(np.ceil(spread * (1.96 / SMALLEST) ** 2))
    return interval, f"not enough; about {max(needed, min(map(len, differences)) + 1)} seeds a task"


def _search(found: Found) -> str:
    """Validation scores by ratio, and the mean regret of each ratio."""
    lines = []
    for kind, tasks in KINDS.items():
        scores: dict[str, dict[str, dict[float, float]]] = {}
        for task in tasks:
            for trial in found.get(f"{task}_search", []):
                scores.setdefault(trial["method"], {}).setdefault(task, {})[trial["setting"]] = trial["history"][-1]
        for method, by_task in scores.items():
            whole = [values for values in by_task.values() if set(RATIOS) <= set(values)]
            regrets = [[max(values.values()) - values[ratio] for values in whole] for ratio in RATIOS]
            if whole:
                lines.append(
                    f"| {kind} | `{method}` | {len(whole)} | {' | '.join(f'{np.mean(x):.2f}' for x in regrets)} |"
                )
    if not lines:
        return ""
    ratios = " | ".join(f"{ratio:g}" for ratio in RATIOS)
    head = f"| kind | method | tasks | {ratios} |\n|---|---|---|{'---|' * len(RATIOS)}\n"
    return "### Search: mean regret of each ratio, validation images, seed 1000\n\n" + head + "\n".join(lines)


if __name__ == "__main__":
    main()
