"""How fast a network is, in each of its forms: latency, throughput and memory, by the standard library alone.

Every export contains a copy of this file. Beside an exported network it needs onnxruntime and NumPy, so that it runs
on the device itself:

    python onnx_benchmark.py student.onnx --threads 1 2
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

if __package__:
    from acamkd.jobs.export import onnx_forms, onnx_model
else:  # beside an exported network
    import onnx_forms  # type: ignore[import-not-found,no-redef]
    import onnx_model  # type: ignore[import-not-found,no-redef]

ROUNDS = 20
"""Every form is measured in so many rounds, A B C, C B A, ..., so that a drifting machine slows all alike."""

THROUGHPUT_ROUNDS = 3

LARGEST_ROUND = 100
"""Largest number of calls of one form in one round."""

CALLS_OF_P99 = 100
"""Number of calls below which the 99th percentile would be the slowest call alone, and is not given."""

FLOOR = 0.03
"""Smallest difference that counts, as a share: where its memory lies alone makes a process faster or slower."""

OUTSIDE = 0.0005
"""Probability on each side of an interval: fifteen forms are compared in a hundred pairs."""

BATCHES = (1, 2, 4, 8)

SECONDS = 5.0


@dataclass(frozen=True)
class Difference:
    """How the latency of one form relates to another's.

    Attributes:
        ratio: Median of the ratios within a round.
        low: Lower end of its 99.9 % interval.
        high: Upper end.
    """

    ratio: float
    low: float
    high: float

    @property
    def is_measurable(self) -> bool:
        """Whether the interval excludes equality, and the difference is larger than FLOOR."""
        return not self.low <= 1 <= self.high and abs(self.ratio - 1) > FLOOR

    def __str__(self) -> str:
        return f"{self.ratio:.2f} x" if self.is_measurable else "no difference measurable"


@dataclass(frozen=True)
class Timing:
    """Measurements of one form.

    Attributes:
        start: Seconds from the start of the process until the network is loaded.
        first: Seconds of the first prediction, which may compile.
        rounds: Milliseconds of each call, by round.
        prepare: Median milliseconds of resizing and padding.
        run: Median milliseconds of the network.
        decode: Median milliseconds of decoding and suppression.
        rates: Images per second by batch size, everything counted; None where the form takes single images alone, or
            fails at this size or a smaller one.
        memory: Peak MiB of a process that does nothing else, at batch size 1; None where the system does not tell.
    """

    start: float
    first: float
    rounds: tuple[tuple[float, ...], ...]
    prepare: float
    run: float
    decode: float
    rates: Mapping[int, float | None]
    memory: float | None

    @property
    def calls(self) -> int:
        """Number of timed calls."""
        return sum(len(each) for each in self.rounds)

    @property
    def median(self) -> float:
        """Median milliseconds of one prediction, everything counted."""
        return statistics.median(call for each in self.rounds for call in each)

    def percentile(self, percent: float) -> float | None:
        """Milliseconds within which so many calls ended; None above 98 with fewer than CALLS_OF_P99 calls."""
        if percent > 98 and self.calls < CALLS_OF_P99:
            return None
        return float(np.percentile([call for each in self.rounds for call in each], percent))

    def against(self, other: Timing) -> Difference:
        """This latency as a multiple of the other's: the ratios of the medians within each round."""
        ratios = [
            statistics.median(own) / statistics.median(theirs)
            for own, theirs in zip(self.rounds, other.rounds, strict=True)
        ]
        return Difference(statistics.median(ratios), *median_interval(ratios))


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """99.9 % interval of a median, from the order of the values alone; infinite for fewer than eleven."""
    ordered, count = sorted(values), len(values)
    outside, beyond = 0.0, 0
    while outside + math.comb(count, beyond) / 2**count <= OUTSIDE:
        outside += math.comb(count, beyond) / 2**count
        beyond += 1
    return (ordered[beyond - 1], ordered[count - beyond]) if beyond else (-math.inf, math.inf)


def ranks(timings: Sequence[Timing]) -> list[int]:
    """Rank of each form by latency: one more than the number of forms that are measurably faster."""

    def is_faster(other: Timing, own: Timing) -> bool:
        found = other.against(own)
        return found.is_measurable and found.ratio < 1

    return [1 + sum(is_faster(other, own) for other in timings) for own in timings]


def measure(
    workers: Sequence[onnx_forms.Worker],
    *,
    seconds: float = SECONDS,
    batches: Sequence[int] = BATCHES,
    rounds: int = ROUNDS,
    note: Callable[[str], None] = lambda _: None,
) -> tuple[dict[onnx_forms.Worker, Timing], list[str]]:
    """Measure forms in turn.

    Args:
        workers: One per form.
        seconds: Timed seconds of each form, and half of it for the batch sizes.
        batches: Batch sizes of the throughput.
        rounds: Number of turns.
        note: Gets a line before each stage.

    Returns:
        The forms' timings, and a line for each form that fails. One that fails at a batch size alone has no rate there.
    """
    begun: dict[onnx_forms.Worker, tuple[float, float]] = {}
    memory, counts, left_out = {}, {}, []
    for worker in workers:
        note(f"{worker.title}: loading")
        start = time.perf_counter()
        try:
            first = worker(onnx_forms.begin)
            whole = time.perf_counter() - start
            once = statistics.median(sum(call) for call in worker(onnx_forms.time_calls, 3))
            memory[worker] = worker(onnx_forms.peak_mib)
        except onnx_forms.FormError as error:
            left_out.append(str(error))
            continue
        begun[worker] = whole - first, first
        counts[worker] = max(1, min(LARGEST_ROUND, round(seconds / rounds / once)))
    note(f"timing {len(begun)} forms in {rounds} rounds, about {len(begun) * seconds:.0f} s")
    times: dict[onnx_forms.Worker, list[list[tuple[float, float, float]]]] = {worker: [] for worker in begun}
    for turn in range(rounds):
        for worker in list(times)[:: -1 if turn % 2 else 1]:
            try:
                times[worker].append(worker(onnx_forms.time_calls, counts[worker]))
            except onnx_forms.FormError as error:
                left_out.append(str(error))
                del times[worker]
    rates = _rates(times, batches, seconds / 2 / THROUGHPUT_ROUNDS / max(1, len(batches)), left_out, note)
    return {worker: _timing(begun[worker], times[worker], rates[worker], memory[worker]) for worker in rates}, left_out


def _rates(
    workers: Iterable[onnx_forms.Worker],
    batches: Sequence[int],
    seconds: float,
    left_out: list[str],
    note: Callable[[str], None],
) -> dict[onnx_forms.Worker, dict[int, list[float]]]:
    """Images per second in each round, by batch size; none from the size on at which a form fails."""
    rates: dict[onnx_forms.Worker, dict[int, list[float]]] = {each: {b: [] for b in batches} for each in workers}
    limits = dict.fromkeys(rates, math.inf)
    for batch in batches:
        note(f"throughput at batch size {batch}")
        for _ in range(THROUGHPUT_ROUNDS):
            for worker in [each for each in rates if batch < limits[each]]:
                try:
                    rate = worker(onnx_forms.images_per_second, batch, seconds)
                    if rate is not None:
                        rates[worker][batch].append(rate)
                except onnx_forms.FormError as error:
                    note(f"{error} (at batch size {batch})")
                    limits[worker] = batch
                    rates[worker][batch] = []
                    if why := str(error) if batch == 1 else _begin_anew(worker):
                        left_out.append(why)
                        del rates[worker]
    return rates


def _begin_anew(worker: onnx_forms.Worker) -> str | None:
    """Load a form in another process, since its own may have ended or be short of memory; says why that fails."""
    worker.end()
    try:
        worker(onnx_forms.begin)
    except onnx_forms.FormError as error:
        return str(error)
    return None


def _timing(
    begun: tuple[float, float],
    times: Sequence[Sequence[tuple[float, float, float]]],
    rates: Mapping[int, Sequence[float]],
    memory: float | None,
) -> Timing:
    stages = zip(*(call for each in times for call in each), strict=True)
    prepare, run, decode = (1e3 * statistics.median(stage) for stage in stages)
    return Timing(
        *begun,
        rounds=tuple(tuple(1e3 * sum(call) for call in each) for each in times),
        prepare=prepare,
        run=run,
        decode=decode,
        rates={batch: statistics.median(found) if found else None for batch, found in rates.items()},
        memory=memory,
    )


def main() -> None:
    """Measure exported files in onnxruntime, and print a table."""
    parser = argparse.ArgumentParser(description="Measure exported networks in onnxruntime, in turn.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.onnx")
    parser.add_argument("--images", nargs="+", type=Path, help="images to predict on, which need Pillow; else noise")
    parser.add_argument("--threads", nargs="+", type=_count, default=[os.cpu_count() or 1])
    parser.add_argument("--batches", nargs="+", type=_count, default=BATCHES, help="batch sizes of the throughput")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="timed seconds of each form")
    parser.add_argument("--json", type=Path, help="file to write")
    read = parser.parse_args()
    if read.seconds <= 0:
        parser.error(f"--seconds {read.seconds:g}: give more than 0")
    if read.json and (read.json.is_dir() or not read.json.absolute().parent.is_dir()):
        why = "it is a folder" if read.json.is_dir() else "there is no such folder to write it into"
        parser.error(f"--json {read.json}: {why}")
    try:
        images = [onnx_model.read_image(file) for file in read.images or ()] or [_noise(read.files[0])]
        with ExitStack() as stack:
            settings = itertools.product(read.files, read.threads, onnx_forms.providers())
            forms = [onnx_forms.OnnxForm(file.stem, file, count, provider) for file, count, provider in settings]
            workers = [stack.enter_context(onnx_forms.Worker(form, images)) for form in forms]
            timings, left_out = measure(workers, seconds=read.seconds, batches=read.batches, note=print)
    except onnx_model.AcamkdError as error:
        sys.exit(f"error: {error}")
    columns = "{:30} {:>7} {:>4} {:>9} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8}  {}".format
    print(columns("file", "threads", "rank", "median ms", "p90", "p99", "prepare", "run", "decode", "first s", "MiB",
                  "images per second"))  # fmt: skip
    for (worker, timing), rank in zip(timings.items(), ranks(list(timings.values())), strict=True):
        figures = (timing.median, timing.percentile(90), timing.percentile(99), timing.prepare, timing.run,
                   timing.decode, timing.first, timing.memory)  # fmt: skip
        name = worker.form.name.replace("onnxruntime", worker.form.file.name, 1)
        rates = ", ".join(f"{batch}: {'-' if rate is None else f'{rate:.1f}'}" for batch, rate in timing.rates.items())
        print(columns(name, worker.form.threads, rank,
                      *("-" if figure is None else f"{figure:.2f}" for figure in figures), rates))  # fmt: skip
    for line in left_out:
        print(f"left out: {line}")
    print("rank: one more than the number of rows that are measurably faster")
    if read.json:
        rows = [
            {"file": str(worker.form.file), "form": worker.form.name, "threads": worker.form.threads, **asdict(timing)}
            for worker, timing in timings.items()
        ]
        read.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def _count(text: str) -> int:
    """A whole number from 1 on."""
    count = int(text) if text.isdecimal() else 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number from 1 on")
    return count


def _noise(file: Path) -> onnx_model.Pixels:
    """An image of the size that a network sees, so that it need not be resized."""
    size = onnx_model.OnnxModel(file).preparation["resize"] or (480, 640)
    height, width = (size["short"], size["long"]) if isinstance(size, Mapping) else size
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


if __name__ == "__main__":
    main()
