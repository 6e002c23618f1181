from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from acamkd.errors import AcamkdError
from acamkd.report.benchmark import read_benchmark
from acamkd.report.templates import environment


def row(network: str, form: str, score: float | None, milliseconds: float, *, on_front: bool) -> dict[str, Any]:
    return {"network": network, "form": form, "threads": 2, "score": score, "milliseconds": {"median": milliseconds},
            "on_front": on_front}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [
        row("teacher", "PyTorch", 60.0, 100.0, on_front=True),
        row("distilled", "PyTorch", 50.0, 20.0, on_front=False),
        row("distilled", "onnxruntime <int8>", 49.0, 10.0, on_front=True),
        row("distilled", "broken", None, 5.0, on_front=False),
    ]
    content = {"metric": "mIoU", "rows": rows, "machine": {"processor": "A 1"}}
    (tmp_path / "benchmark.json").write_text(json.dumps(content))
    return tmp_path


def test_the_chart_has_better_above_and_faster_on_the_left(folder: Path) -> None:
    chart = read_benchmark(folder)
    assert chart is not None
    teacher, slow, fast = chart.points
    assert fast.x < slow.x < teacher.x
    assert teacher.y < slow.y < fast.y
    assert chart.front == f"M{fast.x},{fast.y} H{teacher.x} V{teacher.y}"
    assert {"10", "20", "50", "100"} == {tick.label for tick in chart.x_ticks}
    assert chart.machine == "A 1, 2 threads"
    page = environment().get_template("benchmark.html.jinja").render(benchmark=chart, hue={"teacher": "teacher"})
    assert page.count("<circle") == 3
    assert "onnxruntime &lt;int8&gt;: 49.00 mIoU, 10 ms" in page
    assert "49.00 *" in page


def test_without_a_benchmark_there_is_no_chart(tmp_path: Path) -> None:
    assert read_benchmark(tmp_path) is None
    (tmp_path / "benchmark.json").write_text('{"rows": [{}]}')
    with pytest.raises(AcamkdError, match=r"benchmark\.json is no benchmark: acamkd benchmark .* writes it anew"):
        read_benchmark(tmp_path)
