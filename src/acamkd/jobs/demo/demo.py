"""The demo: a strong teacher, few labeled images and many without labels; what distillation brings to a student.

Without torch, so that the process that waits for both tasks takes little memory.
"""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Group
from rich.table import Column, Table
from rich.text import Text

from acamkd.engine.machine import cores
from acamkd.engine.printing import Printable
from acamkd.errors import AcamkdError
from acamkd.files import check_writable
from acamkd.jobs.demo.layout import NOTES, SHEET, SIZE, TITLES

if TYPE_CHECKING:
    from acamkd.models.base import Task

log = logging.getLogger(__name__)

TASKS: tuple[Task, ...] = ("detection", "segmentation")


@dataclass(frozen=True)
class Demo(Printable):
    """Results of the demo.

    Attributes:
        folder: Output folder. Its folder TASK has `metrics.json`, `pictures.png` and the run folders.
        results: By task the content of metrics.json: the name of the metric, its percentage for `teacher`,
            `baseline` and `distilled`; the networks' `costs`, the milliseconds of one forward over one image; and
            the `report` of the distilled student, below `folder/TASK`.
    """

    folder: Path
    results: dict[Task, dict[str, Any]]

    def __rich__(self) -> Group:
        folders = [self.folder / task for task in self.results]
        return Group(
            _table(self.results),
            *(Text(f"predictions and masks: {folder / SHEET}") for folder in folders),
            *(Text(f"the report: {self.folder / task / result['report']}") for task, result in self.results.items()),
            Text("with your own images: acamkd init FOLDER"),
        )


def demo(
    out: Path | str = "runs/demo", *, task: Task | Literal["both"] = "both", seed: int = 0, keep: bool = False
) -> Demo:
    """Train a student on a few labeled scenes, distill it with many unlabeled ones too, and compare; once per task.

    The teachers come with the package: networks trained on thousands of other scenes. So does the backbone that
    baseline and distilled student start with; it was pretrained on scenes of other classes.

    `out/TASK` then holds the scenes (`data-seedN`, drawn once), the run folders `baseline` and `distilled`,
    `metrics.json` and `pictures.png`.

    Args:
        out: Folder to write to.
        task: One task, or both, each in a process of its own.
        seed: Seed of the scenes and of the trainings.
        keep: Keep trainings that an earlier demo finished, and resume the one that it began; otherwise they are
            replaced.

    Returns:
        The scores and costs of teacher, baseline and distilled student, by task.

    Raises:
        AcamkdError: The folder cannot be used, or `keep` found trainings of another seed.
    """
    started, out = time.monotonic(), Path(out).expanduser()
    check_writable(out)
    if task == "both":
        with ThreadPoolExecutor(min(len(TASKS), cores())) as pool:
            list(pool.map(lambda each: _in_own_process(each, out, seed, keep), TASKS))
    else:
        from acamkd.jobs.demo.one_task import run_task

        run_task(task, out, seed, keep)
    done: Sequence[Task] = TASKS if task == "both" else (task,)
    results: dict[Task, dict[str, Any]] = {
        each: json.loads((out / each / NOTES).read_text(encoding="utf-8")) for each in done
    }
    log.info("the demo took %s", timedelta(seconds=round(time.monotonic() - started)))
    return Demo(out, results)


def _in_own_process(task: Task, out: Path, seed: int, keep: bool) -> None:
    """Run the demo of one task as a command, with one thread, and log its lines."""
    words = ["demo", "--task", task, "--out", str(out), "--seed", str(seed), *(["--keep"] if keep else [])]
    line = ""
    with subprocess.Popen(
        [sys.executable, "-m", "acamkd", *words], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, encoding="utf-8", errors="replace", env={"OMP_NUM_THREADS": "1", **os.environ},
    ) as process:  # fmt: skip
        assert process.stderr is not None
        for line in process.stderr:
            if said := re.match(r"\d\d:\d\d:\d\d (.*)", line):
                log.info("%s: %s", task, said[1])
    if process.returncode:
        raise AcamkdError(f"the demo of {task} failed: {line.strip().removeprefix('error: ')}")


def _table(results: Mapping[Task, Mapping[str, Any]]) -> Table:
    table = Table("task", "network", *(Column(title, justify="right") for title in ("metric", "parameters", "ms")))
    for task, result in results.items():
        for name, title in TITLES.items():
            cost = result["costs"][name]
            table.add_row(
                task if name == "teacher" else "", title, f"{result['metric']} {result[name]:.2f}",
                f"{cost['parameters']:,}", f"{cost['milliseconds']:.1f}", end_section=name == "distilled",
            )  # fmt: skip
    table.caption = f"metric in percent; ms: median CPU time of one forward over one {SIZE[1]} x {SIZE[0]} image"
    return table
