from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from acamkd.jobs.export import onnx_benchmark, onnx_forms, onnx_model
from acamkd.jobs.export.onnx_benchmark import FLOOR, Timing, measure, median_interval, ranks
from acamkd.jobs.export.onnx_forms import Form, Worker, predict_one
from acamkd.jobs.export.onnx_model import Pixels, Prediction
from tiny_onnx import write_segmenter

IMAGE = np.zeros((32, 32, 3), np.uint8)


class Failing(Form):
    """Predicts nothing, and fails at a size of the batch or from a call on, or ends its process."""

    runtime = "failing"

    def __init__(self, batch: float = math.inf, calls: float = math.inf, *, ends: bool = False) -> None:
        super().__init__("student", Path("none"), 1)
        self.batch, self.calls, self.ends = batch, calls, ends

    def load(self) -> None:
        """Nothing to load."""

    def prepare(self, images: Sequence[Pixels]) -> int:
        """The size of the batch."""
        return len(images)

    def run(self, inputs: int) -> None:
        """Fail, if it is time."""
        self.calls -= 1
        if inputs >= self.batch or self.calls < 0:
            if self.ends:
                os._exit(3)
            raise RuntimeError("out of memory")

    def decode(self, outputs: None, inputs: int) -> list[Prediction]:
        """No box."""
        return [{}] * inputs


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


@pytest.mark.parametrize(("ends", "said"), [(False, "out of memory"), (True, "its process ended (-)")])
def test_a_form_that_fails_at_a_batch_size_keeps_its_other_figures(ends: bool, said: str) -> None:
    notes: list[str] = []
    with Worker(Failing(), [IMAGE]) as good, Worker(Failing(4, ends=ends), [IMAGE]) as other:
        found, left_out = measure([good, other], seconds=0.01, batches=(1, 8, 4, 2), rounds=2, note=notes.append)
        assert other(predict_one, IMAGE) == {}  # for its metric
    assert left_out == []
    assert all(found[good].rates.values())
    assert {batch: rate is not None for batch, rate in found[other].rates.items()} == {1: 1, 8: 0, 4: 0, 2: 1}
    assert f"student, failing: {said} (at batch size 8)" in notes


@pytest.mark.parametrize(("calls", "where"), [(3, "loading"), (6, "rounds"), (9, "batch size 1")])
def test_a_form_that_fails_later_is_left_out_alone(calls: int, where: str) -> None:
    """One call when it is loaded, four to learn how long it takes, two in each round, and then the batches."""
    with Worker(Failing(), [IMAGE]) as good, Worker(Failing(calls=calls), [IMAGE]) as other:
        found, left_out = measure([other, good], seconds=0.0, batches=(1, 2), rounds=2)
    assert list(found) == [good], where
    assert (len(found[good].rounds), set(found[good].rates)) == (2, {1, 2})
    assert left_out == ["student, failing: out of memory"]


def test_a_form_that_cannot_be_loaded_again_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with Worker(Failing(2, ends=True), [IMAGE]) as worker:
        end = worker.end

        def ends_for_good() -> None:
            end()
            worker.form = Failing(1)

        monkeypatch.setattr(worker, "end", ends_for_good)
        assert measure([worker], seconds=0.0, batches=(1, 2), rounds=2) == ({}, ["student, failing: out of memory"])


def test_the_program_runs_beside_a_file_with_onnxruntime_and_numpy_alone(tmp_path: Path) -> None:
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    for package in ("acamkd", "torch", "PIL"):
        (blocked / f"{package}.py").write_text("raise ImportError")
    for module in (onnx_benchmark, onnx_forms, onnx_model):
        shutil.copy(str(module.__file__), tmp_path)
    write_segmenter(tmp_path / "student.onnx", resize=(64, 96))
    write_segmenter(tmp_path / "fixed.onnx", resize=(64, 96), shape=(1, 3, 64, 96))
    words = ["student.onnx", "missing.onnx", "fixed.onnx", "--threads", "1", "--batches", "1", "2", "--seconds", "0.2",
             "--json", "out.json"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "onnx_benchmark.py", *words], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(blocked)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    row, fixed = json.loads((tmp_path / "out.json").read_text())
    assert fixed["rates"]["1"] > 0
    assert fixed["rates"]["2"] is None
    assert re.search(r"^fixed.onnx .* 1: [\d.]+, 2: -$", done.stdout, re.MULTILINE)
    assert (row["file"], row["form"], row["threads"]) == ("student.onnx", "onnxruntime", 1)
    assert set(row["rates"]) == {"1", "2"}
    assert len(row["rounds"]) == onnx_benchmark.ROUNDS
    assert min(row["prepare"], row["run"], row["decode"]) > 0
    assert "left out: missing, onnxruntime: missing.onnx: there is no such file" in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--json", "no/such.json"], "--json no/such.json: there is no such folder to write it into"),
        (["--json", "."], "--json .: it is a folder"),
        (["--batches", "1", "0"], "argument --batches: 0 is no whole number from 1 on"),
        (["--threads", "two"], "argument --threads: two is no whole number from 1 on"),
        (["--seconds", "0"], "--seconds 0: give more than 0"),
    ],
)
def test_the_program_refuses_before_it_measures(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["onnx_benchmark.py", "student.onnx", *words])
    monkeypatch.setattr(onnx_benchmark, "measure", None)
    with pytest.raises(SystemExit) as ended:
        onnx_benchmark.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith(f"error: {said}\n")


def test_the_program_says_that_onnxruntime_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (40, 30)).save(tmp_path / "image.png")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr(sys, "argv", ["onnx_benchmark.py", "student.onnx", "--images", str(tmp_path / "image.png")])
    with pytest.raises(SystemExit, match=r"^error: ONNX files need onnxruntime: pip install onnxruntime$"):
        onnx_benchmark.main()
