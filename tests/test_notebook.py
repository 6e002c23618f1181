from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[1] / "docs"
SMALLER = {
    "train=800, val=60": "train=8, val=4", "train=32, val=60": "train=4, val=4", "train.epochs=10": "train.epochs=1",
    "train.eval_every=10": "train.eval_every=1", "epochs: 100": "epochs: 2", "eval_every: 50": "eval_every: 2",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_a_notebook_runs_from_images_to_onnx(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # what the notebook adds to sys.path goes afterwards
    monkeypatch.delitem(sys.modules, "onnx_model", raising=False)  # onnxruntime has a module of this name
    cells = json.loads((DOCS / f"notebook-{task}.ipynb").read_text(encoding="utf-8"))["cells"]
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
    assert scope["found"].keys() == ({"mask"} if task == "segmentation" else {"boxes", "scores", "labels"})
