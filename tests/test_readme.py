"""Every Python block of the README runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.models import resnet18, resnet50

from acamkd import config, models

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_loop_trains_the_student_and_the_selection_units() -> None:
    assert len([line for line in BLOCKS[0].splitlines() if line]) < 15
    student, teacher = resnet18(num_classes=3), resnet50(num_classes=3)
    before = [parameter.clone() for parameter in student.parameters()]
    scope: dict[str, Any] = {
        "student": student,
        "teacher": teacher,
        "loader": [(torch.rand(2, 3, 64, 64), torch.tensor([0, 2]))] * 2,
        "criterion": torch.nn.CrossEntropyLoss(),
    }
    exec(BLOCKS[0], scope)
    assert all((old != new).any() for old, new in zip(before, student.parameters(), strict=True))
    assert all(parameter.grad is not None for parameter in scope["acam"].parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert torch.isfinite(scope["loss"])


def test_a_loop_of_ones_own_needs_no_lightning() -> None:
    script = (
        "import sys, acamkd.losses; from acamkd import Distiller, FeatureTap, build_distiller; "
        "print({'torch', 'lightning'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "{'torch'}\n"


def test_the_saved_student_needs_nothing_of_acamkd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = config.load(ROOT / "recipes" / "camvid.yaml")
    section = recipe.student.model_copy(update={"backbone_weights": None})
    trained = models.build(section, recipe.task, 11)
    folder = tmp_path / "runs" / "camvid" / "distilled"
    folder.mkdir(parents=True)
    models.save_weights(trained.net, folder / "student.safetensors")
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    exec(BLOCKS[1], scope)
    assert "acamkd" not in BLOCKS[1]
    loaded = scope["student"].state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in trained.net.state_dict().items())
