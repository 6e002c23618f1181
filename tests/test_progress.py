from __future__ import annotations

import io
import sys

import pytest

from acamkd import progress as module
from acamkd.progress import progress, shows_progress


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_without_a_terminal_nothing_is_drawn_and_nothing_changes(capsys: pytest.CaptureFixture[str]) -> None:
    items = iter([1, 2])
    assert progress(items, "counting") is items
    assert capsys.readouterr().err == ""


def test_a_terminal_shows_rate_and_time_left_of_long_work_only(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert list(progress(range(3), "counting")) == [0, 1, 2]
    assert "counting" not in terminal.getvalue()
    now = 100.0
    monkeypatch.setattr(module, "DELAY", 0.1)
    monkeypatch.setattr("tqdm.std.time", lambda: now)
    for _ in progress(iter(range(4)), "counting", total=4, unit=" parts"):
        now += 0.5
    written = terminal.getvalue()
    assert "counting:  75%" in written
    assert "3/4 [00:01<00:00" in written
    assert " parts/s]" in written


@pytest.mark.parametrize(("rank", "shown"), [("0", True), ("1", False)])
def test_only_the_first_process_draws(monkeypatch: pytest.MonkeyPatch, rank: str, shown: bool) -> None:
    monkeypatch.setenv("RANK", rank)
    assert shows_progress(_Terminal()) is shown
    assert not shows_progress(io.StringIO())
