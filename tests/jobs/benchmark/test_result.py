from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

import tiny
from acamkd.files import as_json
from acamkd.jobs.benchmark.result import Benchmark, Row, front
from acamkd.jobs.export.onnx_benchmark import Timing


def timing(milliseconds: float, *, rate: float | None = 9.0) -> Timing:
    rounds = milliseconds * (1 + 0.01 * np.random.default_rng(int(milliseconds)).standard_normal((20, 5)))
    return Timing(2.5, 0.75, tuple(map(tuple, rounds.tolist())), 1.0, 2.0, 3.0, {1: 100.0, 4: rate}, 321.0)


@pytest.mark.parametrize(("scores", "milliseconds", "expected"), [
    ([50, 50, 40], [10, 20, 5], [True, False, True]),  # as good and slower; worse and faster
    ([50, 50.05, 49.95], [10, 20, 20], [True, False, False]),  # scores that differ by less than 0.1 are equal
    ([50, 52], [10, 10.05], [False, True]),  # as fast and better
    ([math.nan, 50], [1, 10], [False, True]),
    ([math.nan], [1], [False]),
])  # fmt: skip
def test_the_front_is_of_forms_that_none_beats(
    scores: list[float], milliseconds: list[float], expected: list[bool]
) -> None:
    assert front(scores, [timing(each) for each in milliseconds]) == expected


@pytest.fixture
def benchmark(tmp_path: Path) -> Benchmark:
    slow, fast = timing(20), timing(10, rate=None)
    rows = (
        Row("distilled", "PyTorch", 2, 51.5, slow, 10.25, 2, True, None),
        Row("distilled", "onnxruntime", 2, 51.4, fast, 10.0, 1, True, fast.against(slow)),
        Row("baseline", "PyTorch", 2, math.nan, slow, 10.25, 2, False, slow.against(slow)),
    )
    machine = {"processor": "A 1", "cores": 2, "int8": None, "load": 0.5, "versions": {"torch": "2"}}
    return Benchmark("mIoU", rows, ("OpenVINO: not there",), 101, 8, machine, tmp_path / "benchmark.json")


def test_it_prints_speed_size_and_what_was_left_out(benchmark: Benchmark) -> None:
    text = str(benchmark)
    for words in ("51.50 *", "0.50 x", "no difference", "images/s at 4", "321", "10.2", "8-bit products: none",
                  "2 threads", "101 validation images", "left out: OpenVINO: not there"):  # fmt: skip
        assert words in text, words
    assert text.count("onnxruntime") == 3  # a row in each table
    assert "51.50 *" in tiny.in_notebook(benchmark)["text/html"]  # 80 characters wide


def test_the_file_holds_every_figure(benchmark: Benchmark) -> None:
    content = json.loads(as_json(benchmark.as_dict()))
    first, second, third = content["rows"]
    assert (content["metric"], content["images"], content["machine"]["cores"]) == ("mIoU", 101, 2)
    assert first["against"] is None
    assert second["against"]["ratio"] == pytest.approx(0.5, abs=0.01)
    assert second["against"]["is_measurable"]
    assert not third["against"]["is_measurable"]
    assert third["score"] is None
    assert second["images_per_second"] == {"1": 100.0, "4": None}
    assert second["milliseconds"]["median"] == pytest.approx(10, abs=0.1)
    assert len(second["milliseconds"]["medians_of_rounds"]) == 20
    assert second["seconds"] == {"start": 2.5, "first_call": 0.75}
