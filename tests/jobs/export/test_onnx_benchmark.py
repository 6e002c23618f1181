from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from acamkd.jobs.export import onnx_benchmark, onnx_forms, onnx_model
from acamkd.jobs.export.onnx_benchmark import FLOOR, Timing, median_interval, ranks
from tiny_onnx import write_segmenter


def timing(milliseconds: float, *, noise: float = 0.0, rounds: int = 20, calls: int = 3, seed: int = 0) -> Timing:
    """Rounds of about so many milliseconds."""
    draw = np.random.default_rng(seed)
    times = milliseconds * (1 + noise * draw.standard_normal((rounds, calls)))
    return Timing(1.0, 1.0, tuple(map(tuple, times.tolist())), 1.0, 1.0, 1.0, {1: 1.0}, None)


@pytest.mark.parametrize("count", [11, 20, 31])
def test_the_interval_of_a_median_holds_it_999_times_in_1000(count: int) -> None:
    values = list(range(count))
    low, high = median_interval(values)
    assert low == values[0] + values[-1] - high  # symmetric
    below = int(low)  # so many values lie outside on either side
    inside = sum(math.comb(count, k) for k in range(below + 1, count - below)) / 2**count
    assert inside >= 0.999
    narrower = sum(math.comb(count, k) for k in range(below + 2, count - below - 1)) / 2**count
    assert narrower < 0.999


def test_few_rounds_measure_no_difference() -> None:
    assert median_interval([1.0] * 10) == (-math.inf, math.inf)
    assert not timing(20, rounds=10).against(timing(10, rounds=10)).is_measurable


def test_a_difference_is_measurable_where_it_is_larger_than_the_noise() -> None:
    base = timing(10, noise=0.02, seed=1)
    slower = timing(15, noise=0.02, seed=2).against(base)
    assert slower.is_measurable
    assert slower.ratio == pytest.approx(1.5, abs=0.03)
    assert str(slower).endswith(" x")
    loud = timing(10.5, noise=0.5, calls=1, seed=3).against(timing(10, noise=0.5, calls=1, seed=4))
    assert str(loud) == "no difference measurable"
    steady = timing(10 * (1 + FLOOR / 2)).against(timing(10))  # steady, and smaller than between two processes
    assert steady.low == pytest.approx(1 + FLOOR / 2)
    assert not steady.is_measurable


def test_a_drift_of_the_machine_slows_both_alike() -> None:
    drift = np.linspace(1, 4, 20)[:, None]
    rounds = [tuple(map(tuple, (scale * drift).tolist())) for scale in (10.0, 12.0)]
    one, other = (Timing(1.0, 1.0, each, 1.0, 1.0, 1.0, {}, None) for each in rounds)
    assert other.against(one).ratio == pytest.approx(1.2)
    assert other.against(one).is_measurable


def test_forms_that_do_not_differ_share_a_rank() -> None:
    timings = [timing(20, noise=0.01, seed=1), timing(10, noise=0.3, seed=2), timing(10.1, noise=0.3, seed=3)]
    assert ranks(timings) == [3, 1, 1]
    assert ranks([]) == []


def test_a_rank_counts_what_is_measurably_faster() -> None:
    """The second differs from neither of its neighbors, which differ from each other."""
    timings = [timing(10), timing(10.25), timing(10.5)]
    assert not timings[1].against(timings[0]).is_measurable
    assert not timings[2].against(timings[1]).is_measurable
    assert timings[2].against(timings[0]).is_measurable
    assert ranks(timings) == [1, 1, 2]


def test_the_slowest_of_a_hundred_needs_a_hundred_calls() -> None:
    few, many = timing(10, calls=4), timing(10, noise=0.1, calls=5)
    assert (few.calls, many.calls) == (80, 100)
    assert few.percentile(99) is None
    assert few.percentile(90) == 10
    ninety, top = many.percentile(90), many.percentile(99)
    assert ninety is not None
    assert top is not None
    assert many.median < ninety < top


def test_the_program_runs_beside_a_file_with_onnxruntime_and_numpy_alone(tmp_path: Path) -> None:
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    for package in ("acamkd", "torch", "PIL"):
        (blocked / f"{package}.py").write_text("raise ImportError")
    for module in (onnx_benchmark, onnx_forms, onnx_model):
        shutil.copy(str(module.__file__), tmp_path)
    write_segmenter(tmp_path / "student.onnx", resize=(64, 96))
    words = ["student.onnx", "missing.onnx", "--threads", "1", "--batches", "1", "2", "--seconds", "0.2", "--json",
             "out.json"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "onnx_benchmark.py", *words], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(blocked)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    [row] = json.loads((tmp_path / "out.json").read_text())
    assert (row["file"], row["form"], row["threads"]) == ("student.onnx", "onnxruntime", 1)
    assert set(row["rates"]) == {"1", "2"}
    assert len(row["rounds"]) == onnx_benchmark.ROUNDS
    assert min(row["prepare"], row["run"], row["decode"]) > 0
    assert "left out: missing, onnxruntime: missing.onnx: there is no such file" in done.stdout
