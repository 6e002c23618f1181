"""Run the study's trials batch by batch, and go on where it stopped.

    python -m studies.generality.study run RUNS     # RUNS holds data/, weights/ and the run folders
    python -m studies.generality.study plan         # the batches, and what is done
    python -m studies.generality.study teachers RUNS    # score the teachers on the report splits
    python -m studies.generality.study costs RUNS       # time a step of every method
    python -m studies.generality.study levels RUNS      # how hard each level of a pyramid pulls

tables.py writes the tables.

`run` may be stopped at any time. Every finished trial is at once a row of trials.csv, so that it survives the runs.
"""

from __future__ import annotations

import argparse
import csv
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Literal

from filelock import FileLock
from studies.generality import plan
from studies.generality.plan import TASKS, Item, all_labels, batches, is_searched, recipe_of

from acamkd import config, models
from acamkd.distillation.auto_weight import gradient_norms, prepared, probe_distiller, total_norms, with_objects
from acamkd.distillation.schedule import WeightSchedule
from acamkd.engine.metrics import METRICS
from acamkd.engine.runs import TERMINATED, Run, default_folder, read_json
from acamkd.files import write_text
from acamkd.jobs.compare import trials_csv
from acamkd.jobs.compare.compare import RESOLVED, run_trials, trial_command
from acamkd.jobs.estimate import estimate
from acamkd.jobs.evaluate import evaluate
from acamkd.jobs.setup import Batches, build_network, build_teacher, teacher_section
from acamkd.models.base import head_of

REPETITIONS = 3
"""Of a measurement, of which the median counts."""
BATCHES = 8
"""Likewise of a gradient."""

SPLITS: tuple[Literal["val"], Literal["test"]] = ("val", "test")

log = logging.getLogger("acamkd.study")


def run(runs: Path, jobs: int, tasks: Sequence[str], seconds: float | None) -> None:
    """Train the missing teachers and run the missing trials of some tasks, batch by batch."""
    os.chdir(runs)
    root = plan.HERE.parents[1]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    end = None if seconds is None else time.monotonic() + seconds
    for name, items in batches():
        for item in (item for item in items if item.task in tasks):
            if end is not None and time.monotonic() > end:
                return
            gather(item)  # what a process that was killed has left
            if not (due := _due(item)):
                continue
            log.info("batch %s: %s, %d trials to do", name, item.comparison, len(due))
            if train_teacher(item):
                _run(item, jobs, end)
    log.info("nothing is left of %s, until others have ended or a cost was measured", ", ".join(tasks))


def _due(item: Item) -> list[int]:
    """Indices of the trials that have neither ended nor been given up."""
    lost = plan.given_up()
    return [
        index
        for index, trial in enumerate(item.trials())
        if trial.read(item.results) is None and (item.comparison, trial.name) not in lost
    ]


def _run(item: Item, jobs: int, end: float | None) -> None:
    item.results.mkdir(exist_ok=True)
    trials = item.trials()
    write_text(item.results / RESOLVED, config.dump(item.recipe))
    numbers = {trial.name: number for number, trial in enumerate(item.planned())}

    def command(number: int) -> list[str]:
        return trial_command(item.methods, item.numbered, item.results, numbers[trials[number].name])

    try:
        failed = run_trials(trials, _due(item), item.results, command, end=end, jobs=jobs)
    finally:
        gather(item)
    for trial in failed:
        lines = (item.results / "logs" / f"{trial.name}.txt").read_text(encoding="utf-8").strip().splitlines()
        why = [line for line in lines if "not finite" in line] or lines or [""]
        _note_failure(item, trial.name, trial.key, why[-1])


def gather(item: Item) -> None:
    """Add an item's finished trials to trials.csv; several processes may do so at once."""
    fresh = {file.stem: read_json(file) for file in item.results.glob("*-seed*.json")}
    with FileLock(f"{plan.TABLE}.lock"):
        known = plan.stored()
        there = known.get(item.comparison, {})
        if any(name not in there or there[name]["recipe"] != trial["recipe"] for name, trial in fresh.items()):
            trials_csv.write(plan.TABLE, {**known, item.comparison: {**there, **fresh}})


def _note_failure(item: Item, name: str, key: str, why: str) -> None:
    """A row of failed.csv."""
    now = datetime.now(timezone.utc).isoformat(timespec="minutes")
    _add_row(plan.FAILURES, {"comparison": item.comparison, "trial": name, "recipe": key, "time": now, "why": why})


def _add_row(file: Path, row: Mapping[str, object]) -> None:
    is_new = not file.is_file()
    with file.open("a", newline="", encoding="utf-8") as lines:
        writer = csv.DictWriter(lines, list(row), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def train_teacher(item: Item) -> bool:
    """Train an item's teacher, unless it is there; returns whether it is now."""
    own = item.regime == "own"
    recipe = item.recipe if own else recipe_of(item.task)
    teacher = Run(default_folder(recipe, "teacher"), recipe, "teacher")
    if teacher.has_ended:
        return True
    changes = [f"name={recipe.name}"]
    if not own:
        changes += [all_labels(item.task), "train.batch_size=8", "train.optimizer.lr=1e-3",
                    f"train.epochs={plan.TEACHER_EPOCHS.get(item.task, 24)}", "train.eval_every=4"]  # fmt: skip
    log.info("the teacher of %s is trained", item.comparison)
    arguments = [argument for change in changes for argument in ("--set", change)]
    more = ["--resume"] if teacher.has_begun else []
    command = [sys.executable, "-m", "acamkd", "train", str(plan.HERE / f"{item.task}.yaml"), "--role", "teacher"]
    code = subprocess.run([*command, *arguments, *more], check=False).returncode
    if code:
        log.error("the teacher of %s failed (exit code %d); its trials are left out", item.comparison, code)
        _note_failure(item, plan.TEACHER, "", f"exit code {code}")
    return not code


def score_teachers(runs: Path) -> None:
    """Score every teacher of the second training that has ended on its report split: teachers.csv."""
    os.chdir(runs)
    seeds = f"{plan.SECOND[0]}-{plan.SECOND[-1]}"
    found: list[dict[str, object]] = [row for row in plan.rows_of(plan.TEACHERS) if row["seeds"] != seeds]
    for regime, tasks in (("few", TASKS), ("own", plan.FOUR)):
        for task in tasks:
            recipe = config.load(plan.HERE / f"{task}.yaml", plan.overrides(task, regime))
            teacher = Run(default_folder(recipe, "teacher"), recipe, "teacher")
            if teacher.has_ended:
                metric = METRICS[recipe.task]
                scores = (evaluate(teacher.folder, split=split)[metric] for split in ("val", "test"))
                validation, report = (f"{score:.2f}" for score in scores)
                row = {"task": task, "regime": regime, "seeds": seeds, "validation": validation, "report": report}
                found.append(row)
    plan.TEACHERS.unlink(missing_ok=True)
    for row in found:
        _add_row(plan.TEACHERS, row)


def measure_costs(runs: Path) -> None:
    """Time a training step of every method and combination, alone on the machine and without a cache: costs.csv."""
    os.chdir(runs)
    plan.COSTS.unlink(missing_ok=True)
    for task in TASKS:
        kind = plan.kind_of(task)
        for method in (*plan.PRIMARY, *plan.OTHERS[kind], *plan.COMBINATIONS[kind]):
            _, trial = Item(task, "few", (method,), plan.SECOND[:1]).trials()
            seconds = median(estimate(trial.recipe).seconds for _ in range(REPETITIONS))
            _add_row(plan.COSTS, {"task": task, "method": method, "seconds": f"{seconds:.3f}"})


def measure_levels(runs: Path) -> None:
    """Measure how hard each level of a detector's pyramid pulls at the student's start, at weight 1: levels.csv."""
    os.chdir(runs)
    plan.PULLS.unlink(missing_ok=True)
    for task in plan.KINDS["detection"]:
        recipe = recipe_of(task)
        if not Run(default_folder(recipe, "teacher"), recipe, "teacher").has_ended:
            continue
        batches = Batches(recipe)
        teacher = head_of(build_teacher(recipe, teacher_section(recipe), batches.classes))
        student = build_network(recipe, recipe.student, batches.classes)
        models.inherit(student, teacher, recipe.student.inherit)
        for method in plan.PRIMARY:
            _, trial = Item(task, "few", (method,), plan.SECOND[:1]).trials()
            with probe_distiller(student, teacher, trial.recipe.losses) as distiller:
                images = list(prepared(student, islice(with_objects(batches.train), BATCHES)))
                for index, (pair, loss) in enumerate(distiller.levels):
                    assert pair is not None
                    off = [WeightSchedule(stop_epoch=0)] * len(distiller.levels)
                    distiller.schedules = [*off[:index], WeightSchedule(), *off[index + 1 :]]
                    norms = [total_norms(gradient_norms(distiller, batch))[0] for batch in images]
                    norm = f"{median(norms) / loss.factors['weight']:.3g}"
                    _add_row(plan.PULLS, {"task": task, "method": method, "level": pair[0], "norm": norm})


def show_plan() -> None:
    """Print the batches with the numbers of their trials, and how many are done."""
    total = done = 0
    for name, items in batches():
        trials = {(item.comparison, trial.name): (item, trial) for item in items for trial in item.trials()}
        finished = sum(trial.read(item.results) is not None for item, trial in trials.values())
        total, done = total + len(trials), done + finished
        print(f"{name}: {finished} of {len(trials)} trials")
    searched = all(is_searched(plan.PRIMARY, kind) for kind in plan.KINDS)
    print(f"{done} of {total}" + ("" if searched else "; later batches begin once batch 5 has ended"))


JOBS = {"teachers": score_teachers, "costs": measure_costs, "levels": measure_levels}


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs = parser.add_subparsers(dest="job", required=True)
    runs = jobs.add_parser("run")
    runs.add_argument("runs", type=Path)
    runs.add_argument("--jobs", type=int, default=2)
    runs.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    runs.add_argument("--minutes", type=float, help="begin no trial that would end later")
    jobs.add_parser("plan")
    for name, job in JOBS.items():
        jobs.add_parser(name, help=job.__doc__).add_argument("runs", type=Path)
    arguments = parser.parse_args()
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))  # so that no teacher's training outlives this one
    if arguments.job == "run":
        seconds = None if arguments.minutes is None else 60 * arguments.minutes
        run(arguments.runs.resolve(), arguments.jobs, arguments.tasks, seconds)
    elif arguments.job == "plan":
        show_plan()
    else:
        JOBS[arguments.job](arguments.runs)


if __name__ == "__main__":
    main()
