"""The README opens with the two commands, is short, and its loop runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torchvision.models import resnet18, resnet50

from acamkd import ACAM, FeatureTap

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
(LOOP,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


def test_the_first_block_is_the_two_commands() -> None:
    first = re.findall(r"```sh\n(.*?)```", TEXT, flags=re.DOTALL)[0]
    assert TEXT.index(first) < 50
    commands = [line.partition("#")[0].strip() for line in first.splitlines()]
    assert commands == ["pip install . && acamkd demo", "pip install '.[test]' && pytest"]


def test_it_reads_in_a_minute() -> None:
    prose = re.sub(r"```.*?```|<!--.*?-->|\]\(.*?\)|[|*`\[]", " ", TEXT, flags=re.DOTALL)
    assert len(prose.split()) < 450
    paragraphs = re.split(
        r"\n\n|\n(?=[|#])", re.sub(r"```.*?```|\]\(.*?\)|^\|.*?$", " ", TEXT, flags=re.DOTALL | re.MULTILINE)
    )
    sentences = [sentence for each in paragraphs for sentence in re.split(r"(?<=[.:])\s", each)]
    assert max(len(sentence.split()) for sentence in sentences) <= 25


def test_five_lines_train_the_student_and_the_selection_units() -> None:
    assert len(LOOP.splitlines()) == 5
    student, teacher = resnet18(num_classes=3), resnet50(num_classes=3).eval()
    scope: dict[str, Any] = {
        "torch": torch, "ACAM": ACAM, "FeatureTap": FeatureTap, "student": student, "teacher": teacher,
        "images": torch.rand(2, 3, 64, 64), "labels": torch.tensor([0, 2]), "criterion": torch.nn.CrossEntropyLoss(),
    }  # fmt: skip
    exec(LOOP, scope)
    scope["loss"].backward()
    assert torch.isfinite(scope["loss"])
    trained = [*student.parameters(), *scope["acam"].parameters()]
    assert all(parameter.grad is not None for parameter in trained)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_loop_of_ones_own_needs_no_lightning() -> None:
    script = (
        "import sys, acamkd.losses; from acamkd import Distiller, FeatureTap, build_distiller; "
        "print({'torch', 'lightning'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "{'torch'}\n"
