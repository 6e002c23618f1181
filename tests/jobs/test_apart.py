from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

import pytest

from acamkd.engine.runs import TERMINATED
from acamkd.errors import AcamkdError
from acamkd.jobs import apart


@pytest.fixture
def _a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of acamkd: it ends with the code that it is given, or waits."""
    program = tmp_path / "program"
    program.write_text(
        f"#!{sys.executable}\nimport sys, time\nword = sys.argv[-1]\n"
        "time.sleep(60) if word == 'wait' else sys.exit(int(word))\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))


@pytest.mark.usefixtures("_a_program")
def test_a_command_that_fails_is_named_and_one_that_is_terminated_ends_this_process() -> None:
    apart.carry_out(["0"])
    with pytest.raises(AcamkdError, match=r"`acamkd train 3` failed \(exit code 3\); its reason stands above"):
        apart.carry_out(["train", "3"])
    with pytest.raises(SystemExit) as ended:
        apart.carry_out([str(TERMINATED)])
    assert ended.value.code == TERMINATED


@pytest.mark.usefixtures("_a_program")
def test_sigterm_ends_the_command_too() -> None:
    before = signal.getsignal(signal.SIGTERM)
    threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGTERM]).start()
    with pytest.raises(SystemExit) as ended:
        apart.carry_out(["wait"])
    assert ended.value.code == TERMINATED
    assert signal.getsignal(signal.SIGTERM) is before
