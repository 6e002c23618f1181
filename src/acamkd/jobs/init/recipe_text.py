"""The text of a recipe, a comment behind every choice."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from acamkd.config.yaml_text import Dumper
from acamkd.data.statistics import Statistics
from acamkd.jobs.estimate import Estimate
from acamkd.jobs.init.choices import LEARNING_RATES, Machine
from acamkd.jobs.init.layout import Layout
from acamkd.jobs.init.names import Classes
from acamkd.jobs.init.teacher import Teacher
from acamkd.jobs.inspect_layers import RATIOS
from acamkd.models.base import Task


@dataclass(frozen=True)
class Reasons:
    """What the comments are made of."""

    layout: Layout
    named: Classes
    counted: dict[str, Statistics]
    size: str
    augment: str
    machine: Machine
    teacher: Teacher | None
    measured: Estimate | None
    num_classes: int


def file_name(name: str) -> str:
    """A name as a recipe's `name` may be: other letters become `_`."""
    fitting = re.sub(r"[^\w.-]", "_", name)
    return fitting if fitting.strip(".") else "recipe"


def quoted(path: Path) -> str:
    """A path as a shell takes it."""
    return shlex.quote(str(path))


def recipe_text(
    file: Path, task: Task, source: dict[str, Any], networks: dict[str, dict[str, Any]], losses: list[dict[str, Any]],
    train: dict[str, Any], why: Reasons,
) -> str:  # fmt: skip
    """The recipe, a comment behind every choice."""
    layout, counted, machine = why.layout, why.counted, why.machine
    name = file_name(file.stem)
    drawn = "" if "share" not in source["val"] else ", drawn from train by a seed; no file is moved"
    comments = {
        "format": layout.reason,
        "train": f"{counted['train'].images} images",
        "val": f"{counted['val'].images} images, which everything is judged by{drawn}",
        "test": "seen by no training and no choice: acamkd run scores on it at the end",
        **why.named.reasons,
        "unlabeled": "only the distillation sees these: our clearest gains had such images",
        "resize": why.size,
        "augment": why.augment,
    }
    lines = [
        f"# acamkd run {quoted(file)} trains teacher, baseline and distilled student, and compares them.",
        *([] if name == file.stem else [_line(0, "name", name, "of the run's folder; the file's own cannot be one")]),
        f"task: {task}",
        "data:",
        *(_line(2, key, value, comments.get(key, "")) for key, value in source.items()),
    ]
    if "unlabeled" not in source:
        lines.append("  # unlabeled: FOLDER  # images without labels; without them such networks gained nothing")
    of_teacher = why.teacher.text if why.teacher else f"no checkpoint: it is trained first; {machine.networks_reason}"
    lines += [
        _line(0, "teacher", networks["teacher"], of_teacher),
        _line(0, "student", networks["student"],
              "same heads and pyramid as the teacher's, and starting from them" if "inherit" in networks["student"]
              else machine.networks_reason),
    ]  # fmt: skip
    (loss,) = losses
    of_loss = {
        "name": "the method; acamkd methods lists the others",
        "pairs": "every level of the feature pyramid" if task == "detection" else "the logits before they are enlarged",
        "num_masks": "one for each class, as in the paper",
        "weight": "measured on the first batches",
        "gradient_ratio": "distillation's gradient over the task's: "
        + (
            "docs/research/results.md gained with it"
            if "unlabeled" in source
            else f"{RATIOS[task]} with unlabeled images, less without, where that harmed"
        ),
        "level_decay": "each coarser level counts half, or the coarsest would pull hardest: docs/research/results.md",
        "diversity_weight": "as there",
    }
    lines.append("losses:")
    for number, (key, value) in enumerate(loss.items()):
        lines.append(_line(4, key, value, of_loss.get(key, "")).replace("    ", "  - " if number == 0 else "    ", 1))
    steps = train["epochs"] * max(1, counted["train"].images // train["batch_size"])
    measured = why.measured
    seconds = measured.seconds * train["batch_size"] / measured.batch_size if measured else 0.0
    time_taken = f"; on this machine about {seconds:.2g} s each, {steps * seconds / 3600:.1f} h to distill"
    of_train = {
        "epochs": f"about {steps:,} steps{time_taken if measured else ''}",
        "eval_every": "eight evaluations; the best weights are kept",
        "batch_size": f"{machine.name}; about {measured.largest_batch} would fit into memory" if measured
        else machine.name,
    }  # fmt: skip
    lines.append("train:")
    lines += [_line(2, key, value, of_train.get(key, "")) for key, value in train.items()]
    lines += [
        _line(
            2,
            "optimizer",
            {"name": "adamw", "lr": LEARNING_RATES[task], "weight_decay": 1e-4},
            "as in docs/research/results.md",
        ),
        _line(2, "schedule", {"name": "one_cycle"}, "warms up, and ends near 0"),
    ]
    if task == "detection":
        lines.append(_line(2, "clip", 35, "detectors' first gradients can be huge"))
    methods: dict[str, Any] = {loss["name"]: {}}
    lines += ["compare:", _line(2, "methods", methods, "acamkd compare RECIPE --seeds 3: is a gain more than luck?")]
    return "\n".join(lines) + "\n"


def _line(indent: int, key: str, value: Any, comment: str) -> str:
    return f"{' ' * indent}{key}: {_flow(value)}" + (f"  # {comment}" if comment else "")


def _flow(value: Any) -> str:
    """YAML on one line."""
    text = yaml.dump(
        value, Dumper=Dumper, default_flow_style=True, width=10**6, allow_unicode=True, sort_keys=False
    )  # fmt: skip
    return text.removesuffix("...\n").strip()
