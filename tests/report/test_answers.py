"""The words of a page's first screen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import tiny
from acamkd import config
from acamkd.engine.cost import Cost
from acamkd.engine.evidence import ImageInterval
from acamkd.engine.runs import Run
from acamkd.report.answers import BASELINE, DISTILLED, TEACHER, Answer, Network, answers_of
from acamkd.report.units import digits, duration, percent, with_prefix

SMALL, LARGE = Cost(500_000, 0.5, 4.0, 2.0), Cost(6_000_000, 9.0, 50.0, 24.0)


def _answers(
    tmp_path: Path, before: float | None, after: float, interval: ImageInterval | None, teacher: float = 60.0
) -> dict[str, Answer]:
    content: dict[str, Any] = tiny.raw_recipe(tmp_path)
    content["losses"] = [{"name": "pkd", "pairs": ["segmentation_head.0"], "weight": 1}]
    run = Run(Path("runs/my cells/distilled"), config.parse(content), "student")
    networks = {
        TEACHER: Network(TEACHER, "fpn", {"mIoU": teacher}, None, LARGE, None),
        DISTILLED: Network(DISTILLED, "fpn", {"mIoU": after}, None, SMALL, 5400),
    }
    if before is not None:
        networks[BASELINE] = Network(BASELINE, "fpn", {"mIoU": before}, None, SMALL, 300)
    return {answer.question: answer for answer in answers_of(run, DISTILLED, networks, interval, 80)}


def test_the_first_screen_answers_four_questions(tmp_path: Path) -> None:
    found = _answers(tmp_path, 40.0, 45.0, ImageInterval(2.0, 8.0, 80))
    assert list(found) == ["Is the student better?", "Is it luck?", "What did it cost?", "What next?"]
    assert found["Is the student better?"].text == (
        "Yes, on these 80 images: 45.00 % mIoU against the baseline's 40.00 %, +5.00 points. "
        "That is 25 % of the way to the teacher."
    )
    assert found["Is it luck?"].verdict == "too few seeds"
    assert found["Is it luck?"].text.startswith("Not of these images (95 % interval from the 80 images alone: +2.00 to")
    assert found["What did it cost?"].text == (
        "Training took 90 minutes on the clock, the baseline's 5.0 minutes. Inference costs what the baseline's does: "
        "4 ms, 250 images per second on 1 CPU thread, 2 MB. The teacher takes 12.5 times as long and has 12 times the "
        "parameters."
    )
    assert found["What next?"].commands == (
        "acamkd compare RECIPE --methods pkd --seeds 3",
        "acamkd export 'runs/my cells/distilled'",
    )


def test_a_teacher_of_the_same_size_costs_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "LARGE", SMALL)
    assert _answers(tmp_path, None, 45.0, None)["What did it cost?"].text.endswith("The teacher's costs the same.")


@pytest.mark.parametrize(
    ("after", "teacher", "word", "end"),
    [
        (38.0, 60.0, "No, on these", "\N{MINUS SIGN}2.00 points."),
        (40.0, 60.0, "Not to the hundredth, on these", "+0.00 points."),
        (41.0, 39.0, "Yes, on these", "The teacher, 39.00 %, is not ahead of the baseline."),
        (41.0, 40.01, "Yes, on these", "+1.00 points."),
    ],
)
def test_what_is_no_success_is_said(tmp_path: Path, after: float, teacher: float, word: str, end: str) -> None:
    found = _answers(tmp_path, 40.0, after, ImageInterval(-3.0, 3.0, 80), teacher)
    assert found["Is the student better?"].text.startswith(word)
    assert found["Is the student better?"].text.endswith(end)
    assert found["Is it luck?"].verdict == "no evidence"
    assert found["Is it luck?"].text.startswith("It may be: other images of this kind could turn the sign")
    assert found["What next?"].commands[0].startswith("acamkd doctor" if after < 40 else "acamkd compare")


def test_without_a_baseline_nothing_is_claimed(tmp_path: Path) -> None:
    found = _answers(tmp_path, None, 45.0, None)
    assert found["Is the student better?"].text.startswith("Unknown: no baseline was scored on these images.")
    assert not any(answer.verdict for answer in found.values())
    assert "acamkd train 'runs/my cells/distilled/recipe.yaml' --out 'runs/my cells/baseline'" in (
        found["What next?"].commands
    )


def test_a_baseline_that_does_not_fit_stays_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("baseline", "baseline-2"):
        Path("runs/my cells", name).mkdir(parents=True)
    assert _answers(tmp_path, None, 45.0, None)["What next?"].commands == (
        "acamkd train 'runs/my cells/distilled/recipe.yaml' --out 'runs/my cells/baseline-3'",
        "acamkd report 'runs/my cells/distilled' --baseline 'runs/my cells/baseline-3'",
    )


def test_figures_have_units_and_few_digits() -> None:
    assert [duration(seconds) for seconds in (45, 119, 150, 7000, 7200, 90000)] == [
        "45 seconds", "119 seconds", "2.5 minutes", "117 minutes", "2.0 hours", "25 hours",
    ]  # fmt: skip
    assert [digits(value) for value in (0.01234, 3.14159, 99.5, 1234.5)] == ["0.0123", "3.14", "99.5", "1,234"]
    assert [percent(value) for value in (None, 46.318)] == ["\N{EN DASH}", "46.32 %"]
    assert [with_prefix(value) for value in (12, 1234, 5.6e6)] == ["12", "1.23 k", "5.6 M"]
