from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[1] / "docs/notebook.ipynb"
SMALLER = {"train=800, val=100": "train=8, val=4", "epochs: 9": "epochs: 1"}


def test_the_notebook_runs_from_images_to_onnx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # what the notebook adds to sys.path goes afterwards
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    for long in SMALLER:
        assert sum(long in cell for cell in code) == 1
    scope: dict[str, Any] = {}
    for cell in code:
        for long, short in SMALLER.items():
            cell = cell.replace(long, short)
        exec(compile(cell, "notebook", "exec"), scope)
    assert (tmp_path / "runs/scenes/distilled/export/student.onnx").is_file()
    assert scope["figures"].relative_difference < 1e-4
    assert scope["found"]["mask"].shape == (64, 64)
