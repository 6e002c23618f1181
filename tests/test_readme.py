"""The README opens with the two commands, is short, and its loop runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torchvision.models import resnet18, resnet50

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
(LOOP,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


def test_the_first_block_is_the_two_commands() -> None:
    first = re.findall(r"```sh\n(.*?)```", TEXT, flags=re.DOTALL)[0]
    assert TEXT.index(first) < 50
    commands = [line.partition("#")[0].strip() for line in first.splitlines()]
    assert commands == ["pip install . && acamkd demo", "pip install '.[test]' && pytest"]


def test_it_reads_in_a_minute() -> None:
    prose = re.sub(r"```.*?```|\]\(.*?\)|[|*`\[]", " ", TEXT, flags=re.DOTALL)
    assert len(prose.split()) < 500


def test_the_loop_trains_the_student_and_the_selection_units() -> None:
    assert len([line for line in LOOP.splitlines() if line]) < 15
    student, teacher = resnet18(num_classes=3), resnet50(num_classes=3)
    before = [parameter.clone() for parameter in student.parameters()]
    scope: dict[str, Any] = {
        "student": student,
        "teacher": teacher,
        "loader": [(torch.rand(2, 3, 64, 64), torch.tensor([0, 2]))] * 2,
        "criterion": torch.nn.CrossEntropyLoss(),
    }
    exec(LOOP, scope)
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
