"""Every script of benchmarks/ that needs nothing from outside still runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize("script", ["loss_cost", "step_cost", "scaling", "memory_estimate", "alternatives"])
def test_quick_runs(script: str) -> None:
    done = subprocess.run(
        [sys.executable, f"benchmarks/{script}.py", "--quick"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "acam, exact" in done.stdout or "RetinaNet" in done.stdout
