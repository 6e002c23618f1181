"""Result of a benchmark: its rows, their table, and the Pareto front of accuracy over latency."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Column, Table
from rich.text import Text

from acamkd.engine.printing import Printable
from acamkd.jobs.export.onnx_benchmark import Difference, Timing

SAME_SCORE = 0.1
"""Points within which two scores count as equal; as in the check of an export."""


@dataclass(frozen=True)
class Row:
    """One form of one network.

    Attributes:
        network: `teacher`, `baseline` or `distilled`; of a single file its stem.
        form: Name of the form, such as `PyTorch bf16` or `onnxruntime int8`.
        threads: Threads of the processor.
        score: The deciding metric on the validation images, in percent; NaN if it is undefined.
        timing: Its times and memory.
        size: MiB of the file of its weights.
        rank: One more than the number of rows that are measurably faster.
        on_front: Whether no other row is better in score or latency and as good in the other.
        against: Latency as a multiple of the reference's, the first row of the network with these threads; None for
            the reference itself.
    """

    network: str
    form: str
    threads: int
    score: float
    timing: Timing
    size: float
    rank: int
    on_front: bool
    against: Difference | None


@dataclass(frozen=True)
class Benchmark(Printable):
    """How fast, how good and how small each form of some networks is.

    Attributes:
        metric: Name of the deciding metric.
        rows: One per form.
        left_out: A line for each form that this machine cannot run.
        images: Number of images of the metric.
        timed: Number of images that the timed calls take in turn.
        machine: The processor, its load, and the versions of the runtimes.
        file: The JSON file.
    """

    metric: str
    rows: tuple[Row, ...]
    left_out: tuple[str, ...]
    images: int
    timed: int
    machine: Mapping[str, Any]
    file: Path

    def as_dict(self) -> dict[str, Any]:
        """Content of the JSON file."""
        return {
            "metric": self.metric, "images": self.images, "timed_images": self.timed, "machine": dict(self.machine),
            "rows": [_as_dict(row) for row in self.rows], "left_out": list(self.left_out),
        }  # fmt: skip

    @property
    def noise(self) -> float:
        """Largest spread of one row's medians over the rounds, 10 % to 90 %, as a share of its median."""
        return max((_spread(row.timing) for row in self.rows), default=0.0)

    def __rich__(self) -> Group:
        batches = list(dict.fromkeys(batch for row in self.rows for batch in row.timing.rates))
        speed = Table("network", _form(), self.metric, "ms", "p90", "p99", "rank", "against the first form")
        stages = Table("network", _form(), "prepare ms", "run ms", "decode ms", "start s", "first call s")
        size = Table("network", _form(), *(f"images/s at {batch}" for batch in batches), "peak MiB", "file MiB")
        several = len({row.threads for row in self.rows}) > 1
        for row in self.rows:
            timing = row.timing
            names = row.network, f"{row.form}, {_threads(row.threads)}" if several else row.form
            speed.add_row(
                *names, f"{row.score:.2f}{' *' if row.on_front else ''}",
                *map(_number, (timing.median, timing.percentile(90), timing.percentile(99))),
                str(row.rank), "" if row.against is None else str(row.against),
            )  # fmt: skip
            figures = timing.prepare, timing.run, timing.decode, timing.start, timing.first
            stages.add_row(*names, *map(_number, figures))
            size.add_row(*names, *map(_number, [*(timing.rates[each] for each in batches), timing.memory, row.size]))
        machine = self.machine
        counts = sorted({row.threads for row in self.rows})
        words = (
            f"{machine['processor']}, {machine['cores']} cores, 8-bit products: {machine['int8'] or 'none'}; "
            f"{' and '.join(map(str, counts))} thread{'s' if counts[-1:] != [1] else ''}, load {machine['load']}",
            f"ms: median of one prediction of {self.timed} images in turn, preparing and decoding counted; "
            f"medians of the rounds vary by up to {100 * self.noise:.0f} %",
            f"{self.metric}: {self.images} validation images; *: nothing measured is faster and as good, or better and "
            "as fast; rank: one more than the number of rows that are measurably faster",
            *(f"left out: {line}" for line in self.left_out),
            f"the figures: {self.file}",
        )
        return Group(speed, stages, size, *map(Text, words))


def front(scores: Sequence[float], timings: Sequence[Timing]) -> list[bool]:
    """For each form, whether none other is measurably faster and as good, or better and not measurably slower."""

    def dominates(other: int, own: int) -> bool:
        against = timings[other].against(timings[own])
        is_faster = against.is_measurable and against.ratio < 1
        is_slower = against.is_measurable and against.ratio > 1
        gain = scores[other] - scores[own]
        return (is_faster and gain >= -SAME_SCORE) or (gain > SAME_SCORE and not is_slower)

    places = range(len(scores))
    return [scores[own] == scores[own] and not any(dominates(other, own) for other in places) for own in places]


def _as_dict(row: Row) -> dict[str, Any]:
    timing = row.timing
    return {
        "network": row.network, "form": row.form, "threads": row.threads, "score": row.score,
        "milliseconds": {
            "median": timing.median, "p90": timing.percentile(90), "p99": timing.percentile(99),
            "prepare": timing.prepare, "run": timing.run, "decode": timing.decode, "calls": timing.calls,
            "medians_of_rounds": [statistics.median(each) for each in timing.rounds],
        },
        "seconds": {"start": timing.start, "first_call": timing.first},
        "images_per_second": {str(batch): rate for batch, rate in timing.rates.items()},
        "peak_mib": timing.memory, "file_mib": row.size, "rank": row.rank, "on_front": row.on_front,
        "against": None if row.against is None else {
            "ratio": row.against.ratio, "low": row.against.low, "high": row.against.high,
            "is_measurable": row.against.is_measurable,
        },
    }  # fmt: skip


def _form() -> Column:
    """The column of the forms, which is not cut where a page is narrow."""
    return Column("form", min_width=len("onnxruntime"))


def _spread(timing: Timing) -> float:
    medians = sorted(statistics.median(each) for each in timing.rounds)
    tenth = len(medians) // 10
    return (medians[-1 - tenth] - medians[tenth]) / statistics.median(medians)


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.3g}"
