"""The comparison as one self-contained HTML file; needs neither images nor weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.ticker import MaxNLocator

from acamkd import config
from acamkd.files import write_text
from acamkd.jobs.compare.statistics import (
    Row,
    Trials,
    columns_of_masks,
    final_means,
    mask_curves,
    scores_of,
    teachers_of,
    tested,
    tuned,
)
from acamkd.jobs.compare.trials import NONE
from acamkd.mask_health import collapse
from acamkd.report.charts import Chart, Points, draw
from acamkd.report.masks import mask_charts
from acamkd.report.templates import environment

MOVEMENTS = {"mean": "mean", "std": "variation", "overlap": "diversity"}
"""Mask statistic -> name of its chart; diversity is 1 minus the overlap."""


@dataclass(frozen=True)
class Difference:
    """One method against the baseline.

    Attributes:
        row: Its row of the table.
        seeds: Difference of each seed that both have, in points.
    """

    row: Row
    seeds: dict[int, float]


def write_page(file: Path, recipe: config.Recipe, rows: Sequence[Row], trials: Trials, tuning: Trials = ()) -> None:
    """Write the page of finished trials.

    Args:
        file: To write to.
        recipe: The common recipe.
        rows: Rows of the table, best first.
        trials: The trials of these rows.
        tuning: Trials of the search for the settings.
    """
    metric = trials[0]["metric"]
    differences = _differences(rows, trials)
    low, high = axis = _axis(differences)
    page = environment().get_template("comparison.html.jinja").render(
        recipe=recipe,
        recipe_text=config.dump(recipe),
        metric=metric,
        rows=rows,
        tested=tested(trials),
        search=tuned(tuning),
        best=differences[0] if differences else None,
        differences=differences,
        axis=axis,
        ticks=[tick for tick in MaxNLocator(5).tick_values(low, high) if low <= tick <= high],
        baseline=next((row for row in rows if row.method == NONE), None),
        teachers=[teacher for teacher, _ in teachers_of(trials)],
        hues=_hues(rows),
        dashes={method: f"stroke-{k // 8}" for k, method in enumerate(_methods(rows))},
        metric_chart=_metric_chart(rows, trials),
        final=final_means(rows, trials),
        mask_charts=_mask_charts(rows, trials),
        collapses=_collapses(rows, trials),
        seeds=sorted({trial["seed"] for trial in trials}),
        trials=sorted(trials, key=lambda trial: (trial["seed"], trial["method"])),
        minutes=sum(trial["wall_time"] for trial in trials) / 60,
    )  # fmt: skip
    write_text(file, page)


def _differences(rows: Sequence[Row], trials: Trials) -> list[Difference]:
    scores = scores_of(trials)
    alone = scores.get(NONE, {})
    shared = {method: sorted(found.keys() & alone.keys()) for method, found in scores.items()}
    return [
        Difference(row, {seed: scores[row.method][seed] - alone[seed] for seed in shared[row.method]})
        for row in rows
        if row.gain
    ]


def _axis(differences: Sequence[Difference]) -> tuple[float, float]:
    """Lowest and highest difference of the axis, with 0 between them."""
    values = [0.0, *(value for each in differences for value in each.seeds.values())]
    gains = [each.row.gain for each in differences if each.row.gain]
    values += [end for gain in gains for end in (gain.low, gain.high) if end is not None]
    margin = 0.06 * (max(values) - min(values)) or 1.0
    return min(values) - margin, max(values) + margin


def _hues(rows: Sequence[Row]) -> dict[str, str]:
    """Color of each line, the same in every chart."""
    return {NONE: "baseline", "teacher": "teacher", **{method: f"c{k % 8}" for k, method in enumerate(_methods(rows))}}


def _methods(rows: Sequence[Row]) -> list[str]:
    """All but the baseline. The first eight have a color each; the next have the same in another stroke."""
    return [row.method for row in rows if row.method != NONE]


def _metric_chart(rows: Sequence[Row], trials: Trials) -> Chart:
    metric, curves = trials[0]["metric"], {}
    for row in rows:
        histories = np.array([each["history"] for each in trials if each["method"] == row.method], dtype=float)
        curves[row.method] = _points(histories.mean(axis=0).tolist())
    scores = [teacher[metric] for teacher, _ in teachers_of(trials)]  # None where its classes are others
    level = ("teacher", scores[0]) if scores and scores[0] is not None else None
    return draw(f"{metric}, mean over the seeds", curves, level=level)


def _points(curve: Sequence[float]) -> Points:
    """A mean curve, without the epochs in which a value is missing."""
    return [(epoch, mean) for epoch, mean in enumerate(curve, start=1) if mean == mean]


def _mask_charts(rows: Sequence[Row], trials: Trials) -> list[Chart]:
    curves: dict[str, dict[str, Points]] = {}
    for (method, kind), statistics in mask_curves(rows, trials).items():
        for statistic, words in MOVEMENTS.items():
            if statistic in statistics:
                curve = [1 - x if words == "diversity" else x for x in statistics[statistic]]
                curves.setdefault(f"{kind} masks: {words}", {})[method] = _points(curve)
    return mask_charts(dict(sorted(curves.items())))


def _collapses(rows: Sequence[Row], trials: Trials) -> list[tuple[str, str, int, int]]:
    """(method, kind of masks, collapsed sets, all sets) at the end; a set is the masks of one layer and seed.

    Masks that are ones by design (`mask_source: uniform`) are excluded.
    """
    found: dict[tuple[str, str], list[bool]] = {}
    for trial in trials:
        if any(loss.get("mask_source") == "uniform" for loss in trial["losses"]):
            continue
        for kind, curves in columns_of_masks(trial):
            if "mean" not in curves or "std" not in curves:
                continue
            pairs = zip(curves["mean"], curves["std"], strict=True)
            known = [(mean, spread) for mean, spread in pairs if mean is not None and spread is not None]
            if known:  # the last values before a loss stops
                found.setdefault((trial["method"], kind), []).append(bool(collapse(*known[-1])))
    return [
        (row.method, kind, sum(sets), len(sets))
        for row in rows
        for (method, kind), sets in found.items()
        if method == row.method
    ]
