"""Output of a comparison: Markdown, JSON, a figure and an HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from acamkd import config
from acamkd.files import write_json, write_text
from acamkd.jobs.compare.page import write_page
from acamkd.jobs.compare.statistics import Paired, Row, Trials, final_means, mask_curves, teachers_of, tested, tuned
from acamkd.jobs.compare.trials import NONE
from acamkd.mask_health import MASK_STATISTICS

DASH = "-"


def write(results: Path, recipe: config.Recipe, rows: Sequence[Row], trials: Trials, tuning: Trials) -> None:
    """Write comparison.md, .json, .png and .html; `tuning` holds the trials of the search for the settings."""
    metric = trials[0]["metric"]
    write_text(results / "comparison.md", f"# Comparison on {recipe.name}\n\n{markdown(rows, trials, tuning)}")
    search = tuned(tuning)
    content = {
        "metric": metric,
        "rows": [asdict(row) for row in rows],
        "test": [asdict(row) for row, _ in tested(trials)],
        "tuning": search and asdict(search),
    }
    write_json(results / "comparison.json", content)
    figure(results / "comparison.png", rows, trials, metric)
    write_page(results / "comparison.html", recipe, rows, trials, tuning)


def markdown(rows: Sequence[Row], trials: Trials, tuning: Trials = ()) -> str:
    """Tables, with the explanations that they need."""
    metric = trials[0]["metric"]
    lines = [
        f"{metric} in percent on the validation images after the last epoch, mean and standard deviation over n seeds. "
        "A seed gives every method the same initial student, images and augmentation, so differences are paired. "
        "They are given as mean and 95 % interval. Interval and p are of the paired t test; p has Holm's correction "
        "for the number of methods.",
        "",
        _teachers(trials),
        "",
        f"| method | setting | n | {metric} | against `{NONE}` | p | verdict | against the best competing method "
        "| minutes |",
        "|---|---|---|---|---|---|---|---|---|",
        *(_line(row) for row in rows),
        "",
        *_test(trials),
        *_tuning(tuning),
        *_classes(rows, trials),
        *_masks(rows, trials),
    ]
    return "\n".join(lines) + "\n"


def _teachers(trials: Trials) -> str:
    """Every teacher's score, with the methods that learn from it where there are several."""
    found = teachers_of(trials)
    lines = []
    for teacher, methods in found:
        of = f" of {', '.join(f'`{method}`' for method in methods)}" if len(found) > 1 else ""
        score = teacher[trials[0]["metric"]]
        told = "without a score" if score is None else f"{score:.2f}"
        lines.append(f"Teacher{of}: {told} (SHA-256 {teacher['sha256'][:12]})")
    return "; ".join(lines)


def _line(row: Row) -> str:
    setting = f"{row.setting:g}" if row.setting is not None else DASH
    best_other = f"{_difference(row.over_best_other)} ({row.over_best_other.other})" if row.over_best_other else DASH
    cells = (
        f"`{row.method}`", setting, str(row.n), _score(row),
        _difference(row.gain) if row.gain else DASH, row.p_text or DASH, row.verdict or DASH, best_other,
        f"{row.minutes:.1f}",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _difference(paired: Paired) -> str:
    interval = f" [{paired.low:+.2f}, {paired.high:+.2f}]" if paired.low is not None else ""
    return f"{paired.mean:+.2f}{interval}"


def _test(trials: Trials) -> list[str]:
    """Table of the scores on the test images, of the last epoch and of the one that validated best."""
    rows = tested(trials)
    if not rows:
        return []
    metric = trials[0]["metric"]
    lines = [
        "## Test images", "",
        "No setting and no epoch was chosen on them, except that the best epoch is that of the validation images.", "",
        f"| method | n | {metric} | against `{NONE}` | p | verdict | of the best epoch | against `{NONE}` |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row, other in rows:
        cells = (
            f"`{row.method}`", str(row.n), _score(row), _difference(row.gain) if row.gain else DASH,
            row.p_text or DASH, row.verdict or DASH, _score(other), _difference(other.gain) if other.gain else DASH,
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _score(row: Row) -> str:
    return f"{row.mean:.2f}" + (f" ± {row.std:.2f}" if row.std is not None else "")


def _tuning(trials: Trials) -> list[str]:
    """Table of the search for each method's setting, the best in bold."""
    search = tuned(trials)
    if search is None:
        return []
    seeds = ", ".join(map(str, search.seeds))
    lines = [
        "## Tuning", "",
        f"{trials[0]['metric']} by `{search.option}`, on seeds that the table above does not use: {seeds}.", "",
        f"| method | {' | '.join(f'{setting:g}' for setting in search.settings)} |",
        "|---" * (len(search.settings) + 1) + "|",
    ]  # fmt: skip
    for method, means in search.means.items():
        values = {setting: f"{mean:.2f}" for setting, mean in means.items()}
        values[search.best(method)] = f"**{values[search.best(method)]}**"
        lines.append(f"| `{method}` | {' | '.join(values.get(setting, DASH) for setting in search.settings)} |")
    return [*lines, ""]


def _classes(rows: Sequence[Row], trials: Trials) -> list[str]:
    lines = ["## By class and size", "", f"| | {' | '.join(f'`{row.method}`' for row in rows)} |"]
    lines.append("|---" * (len(rows) + 1) + "|")
    for name, means in final_means(rows, trials).items():
        lines.append(f"| {name} | {' | '.join(DASH if mean is None else f'{mean:.1f}' for mean in means)} |")
    return lines


def _masks(rows: Sequence[Row], trials: Trials) -> list[str]:
    """Mask statistics in the first, middle and last epoch."""
    found = mask_curves(rows, trials)
    if not found:
        return []
    known = [
        statistic for statistic in MASK_STATISTICS.values() if any(statistic in curves for curves in found.values())
    ]
    lines = [
        f"| `{method}` | {kind} | {' | '.join(_snapshots(curves.get(statistic)) for statistic in known)} |"
        for (method, kind), curves in found.items()
    ]
    columns = [statistic.replace("_", " ") for statistic in known]
    head = ["", "## Masks: first, middle and last epoch", "", f"| method | masks | {' | '.join(columns)} |"]
    return [*head, "|---" * (len(columns) + 2) + "|", *lines]


def _snapshots(means: Sequence[float] | None) -> str:
    if means is None:
        return DASH
    return ", ".join(f"{means[epoch]:.3g}" for epoch in (0, len(means) // 2, -1))


def figure(file: Path, rows: Sequence[Row], trials: Trials, metric: str) -> None:
    """Differences with their intervals, and the metric over the epochs."""
    height = 1.2 + 0.34 * len(rows)
    image, (left, right) = plt.subplots(1, 2, figsize=(11, max(3.2, height)), layout="constrained")
    compared = [row for row in rows if row.gain is not None]
    methods = [row.method for row in rows if row.method != NONE]
    palette = plt.get_cmap("tab10" if len(methods) <= 10 else "tab20")
    colors = {NONE: "black"} | {method: palette(index % palette.N) for index, method in enumerate(methods)}
    for place, row in enumerate(reversed(compared)):
        assert row.gain is not None
        if row.gain.low is not None and row.gain.high is not None:
            left.plot([row.gain.low, row.gain.high], [place, place], color=colors[row.method], linewidth=2)
        left.plot(row.gain.mean, place, "o", color=colors[row.method])
    left.axvline(0, color="gray", linewidth=1)
    left.set_yticks(range(len(compared)), [f"{row.method} (n {row.n})" for row in reversed(compared)])
    left.set_xlabel(f"{metric} against {NONE}, points (95 % interval)")
    for row in rows:
        curves = np.array([trial["history"] for trial in trials if trial["method"] == row.method], dtype=float)
        epochs = np.arange(1, curves.shape[1] + 1)
        scored = ~np.isnan(curves).any(axis=0)
        right.plot(
            epochs[scored], curves.mean(axis=0)[scored], color=colors[row.method], label=row.method,
            linewidth=2.5 if row.method == NONE else 1.2,
        )  # fmt: skip
    right.set_xlabel("epoch")
    right.set_ylabel(f"{metric}, mean over the seeds")
    right.legend(fontsize="small", ncols=2)
    image.savefig(file, dpi=130)
    plt.close(image)
