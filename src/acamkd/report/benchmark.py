"""Chart of a benchmark: accuracy over latency, with the Pareto front."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.ticker import LogLocator, MaxNLocator

from acamkd.config import read_text
from acamkd.errors import AcamkdError
from acamkd.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Tick

BENCHMARK = "benchmark.json"
"""What `acamkd benchmark` writes in a run folder."""


@dataclass(frozen=True)
class Point:
    """One form of one network: its place in the chart, its name and its figures."""

    x: float
    y: float
    network: str
    form: str
    score: float
    milliseconds: float
    on_front: bool


@dataclass(frozen=True)
class Scatter:
    """Scores over latencies, which have a logarithmic axis.

    Attributes:
        metric: Name of the metric.
        points: The forms.
        front: Path of the Pareto front, as steps; empty without a score.
        x_ticks: Milliseconds.
        y_ticks: Scores, in percent.
        machine: The processor, and what the forms ran on it with.
    """

    metric: str
    points: tuple[Point, ...]
    front: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    machine: str


def read_benchmark(folder: Path) -> Scatter | None:
    """The chart of a run's benchmark; None without one.

    Raises:
        AcamkdError: The file cannot be read.
    """
    file = folder / BENCHMARK
    if not file.is_file():
        return None
    try:
        content = json.loads(read_text(file, "benchmark"))
        return _scatter(content)
    except (ValueError, KeyError, TypeError) as error:
        raise AcamkdError(f"{file} is no benchmark: acamkd benchmark {folder} writes it anew ({error})") from error


def _scatter(content: dict[str, Any]) -> Scatter | None:
    rows = [row for row in content["rows"] if row["score"] is not None]
    if not rows:
        return None
    times = [math.log10(row["milliseconds"]["median"]) for row in rows]
    scores = [row["score"] for row in rows]
    fast, slow = min(times) - 0.1, max(times) + 0.1
    marks = MaxNLocator(4, min_n_ticks=3).tick_values(min(scores), max(scores) + 1e-9)
    low, high = marks[0], marks[-1]

    def x(time: float) -> float:
        return round(LEFT + (time - fast) / (slow - fast) * (WIDTH - LEFT - RIGHT), 1)

    def y(score: float) -> float:
        return round(TOP + (high - score) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    several = len({row["threads"] for row in rows}) > 1
    points = tuple(
        Point(
            x(time), y(row["score"]), row["network"],
            row["form"] + (f", threads: {row['threads']}" if several else ""), row["score"],
            row["milliseconds"]["median"], row["on_front"],
        )
        for time, row in zip(times, rows, strict=True)
    )  # fmt: skip
    best = sorted((point for point in points if point.on_front), key=lambda point: point.milliseconds)
    steps = [f"{point.x},{point.y}" for point in best[:1]] + [f"H{point.x} V{point.y}" for point in best[1:]]
    ticks = LogLocator(subs=(1, 2, 5)).tick_values(10**fast, 10**slow)
    counts = sorted({row["threads"] for row in rows})
    threads = f"{' or '.join(map(str, counts))} thread{'s' if counts != [1] else ''}"
    return Scatter(
        content["metric"],
        points,
        "M" + " ".join(steps) if steps else "",
        tuple(Tick(x(math.log10(tick)), f"{tick:g}") for tick in ticks if 10**fast <= tick <= 10**slow),
        tuple(Tick(y(mark), f"{mark:.4g}") for mark in marks),
        f"{content['machine']['processor']}, {threads}",
    )
