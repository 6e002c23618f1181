"""Curves as SVG paths, which the template draws in the page's colors."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from matplotlib.ticker import MaxNLocator

from acamkd.config import read_text

Points: TypeAlias = Sequence[tuple[float, float]]
"""(epoch, value)."""

WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 26
"""Margins of the drawing area."""


@dataclass(frozen=True)
class Line:
    """One curve: its name, its path and its last value."""

    name: str
    path: str
    last: float


@dataclass(frozen=True)
class Tick:
    """A mark on an axis: position and label."""

    position: float
    label: str


@dataclass(frozen=True)
class Chart:
    """Curves over epochs.

    Attributes:
        title: Title of the chart.
        lines: The curves.
        x_ticks: Epochs.
        y_ticks: Values.
        epochs: First and last epoch, at the left and right end of the area.
        bands: (top, height) of shaded warning ranges.
        level: Position and name of a horizontal reference line.
    """

    title: str
    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    epochs: tuple[float, float]
    bands: tuple[tuple[float, float], ...] = ()
    level: Tick | None = None


def read_history(file: Path) -> list[dict[str, float]]:
    """Rows of a history.csv, without cells that are empty or not finite.

    Raises:
        AcamkdError: The file cannot be read.
    """
    lines = read_text(file, "history").splitlines()
    rows = [{name: float(cell) for name, cell in row.items() if cell} for row in csv.DictReader(lines)]
    return [{name: value for name, value in row.items() if math.isfinite(value)} for row in rows]


def curve(history: Sequence[Mapping[str, float]], column: str) -> Points:
    """One column over the epochs in which it has a value."""
    return [(row["epoch"], row[column]) for row in history if column in row]


def draw(
    title: str,
    curves: Mapping[str, Points],
    *,
    limits: tuple[float, float] | None = None,
    bands: Sequence[tuple[float, float]] = (),
    level: tuple[str, float] | None = None,
) -> Chart:
    """Lay out curves in a chart.

    Args:
        title: Title of the chart.
        curves: Points by name; without any, only the axes are drawn.
        limits: Lowest and highest value; by default those of the curves.
        bands: Ranges of values to shade as a warning.
        level: Name and value of a horizontal line.
    """
    epochs = [epoch for points in curves.values() for epoch, _ in points] or [1.0]
    values = [value for points in curves.values() for _, value in points] + ([level[1]] if level else []) or [0.0]
    first, last = min(epochs), max(epochs)
    lowest, highest = limits or (min(values), max(values))
    margin = 0.0 if lowest < highest else abs(lowest) / 20 or 1.0  # around a single value, or the ticks are all its own
    marks = MaxNLocator(4, min_n_ticks=3).tick_values(lowest - margin, highest + margin)
    low, high = limits or (marks[0], marks[-1])

    def x(epoch: float) -> float:
        share = (epoch - first) / (last - first) if last > first else 0.5
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        return round(TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    def path(points: Points) -> str:
        places = [f"{x(epoch)},{y(value)}" for epoch, value in points]
        return "M" + " L".join(places if len(places) > 1 else places * 2)  # a round line cap draws one point as a dot

    whole = MaxNLocator(5, integer=True).tick_values(first, last)
    return Chart(
        title,
        tuple(Line(name, path(points), points[-1][1]) for name, points in curves.items() if points),
        tuple(Tick(x(epoch), f"{epoch:g}") for epoch in whole if first <= epoch <= last),
        tuple(Tick(y(value), f"{value:.4g}") for value in marks if low <= value <= high),
        (first, last),
        tuple((y(top), round(y(bottom) - y(top), 1)) for bottom, top in bands),
        Tick(y(level[1]), level[0]) if level else None,
    )


def loss_charts(history: Sequence[Mapping[str, float]]) -> list[Chart]:
    """Charts of the total loss and of every term; a term at several layers has one line for each."""
    groups: dict[str, dict[str, Points]] = {}
    columns = dict.fromkeys(["loss", *(name for row in history for name in row if name.startswith("loss/"))])
    for column in columns:
        parts = column.split("/")[1:]
        if not parts:
            title, line = "total loss", "total"
        elif len(parts) == 2:  # task/TERM
            title, line = f"{parts[0]}: {parts[1]}", parts[1]
        else:  # LAYER/METHOD/TERM
            title, line = f"{parts[1]}: {parts[2]}", parts[0]
        groups.setdefault(title.replace("_", " "), {})[line] = curve(history, column)
    return [draw(title, curves) for title, curves in groups.items()]
