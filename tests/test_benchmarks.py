"""Every script of benchmarks/ that needs nothing from outside still runs."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize("script", ["loss_cost", "step_cost", "scaling", "memory_estimate", "alternatives"])
def test_quick_runs(script: str) -> None:
    done = subprocess.run(
        [sys.executable, f"benchmarks/{script}.py", "--quick"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert any(name in done.stdout for name in ("acam, exact", "acam, paper, exact", "RetinaNet"))


def test_ratios_are_of_medians_within_a_round_and_of_the_fastest() -> None:
    measuring = runpy.run_path(str(ROOT / "benchmarks/measuring.py"))
    these, those = (
        [measuring["Cost"](2 * x, x, 0.0) for x in seconds] for seconds in ((3.0, 2.0, 9.0), (2.0, 4.0, 3.0))
    )
    assert measuring["ratios"](these, those) == {"ratio": 1.5, "cpu_ratio": 1.5, "fastest_ratio": 1.0}


def test_halving_keeps_few_labels(tmp_path: Path) -> None:
    source, half = tmp_path / "source", tmp_path / "half"
    for folder in ("images/train", "masks/train", "annotations"):
        (source / folder).mkdir(parents=True)
    for k in range(5):
        Image.new("RGB", (8, 6)).save(source / f"images/train/{k}.jpg")
        Image.new("L", (8, 6)).save(source / f"masks/train/{k}.png")
    images = [{"id": 10 + k, "file_name": f"{k}.jpg", "width": 8, "height": 6} for k in range(5)]
    boxes = [{"id": k, "image_id": 10 + k, "category_id": 1, "bbox": [2, 0, 4, 6], "area": 24} for k in range(5)]
    content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "cell"}]}
    (source / "annotations/instances_train.json").write_text(json.dumps(content))

    command = [sys.executable, str(ROOT / "benchmarks/halve.py"), str(source), str(half), "--few", "2"]
    subprocess.run(command, capture_output=True, check=True)

    def names(folder: str) -> list[str]:
        return sorted(file.stem for file in (half / folder).iterdir())

    assert names("images/few") == names("masks/few") == ["0", "2", "4"]
    assert names("images/rest") == ["1", "3"]
    assert Image.open(half / "images/rest/1.jpg").size == (4, 3)
    few = json.loads((half / "annotations/instances_few.json").read_text())
    assert [image["file_name"] for image in few["images"]] == ["0.jpg", "2.jpg", "4.jpg"]
    assert [entry["bbox"] for entry in few["annotations"]] == [[1, 0, 2, 3]] * 3
