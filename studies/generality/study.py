"""Run the study's trials batch by batch, and go on where it stopped.

    python -m studies.generality.study run RUNS     # RUNS holds data/, weights/ and the run folders
    python -m studies.generality.study plan         # the batches, and what is done

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
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from studies.generality import plan
from studies.generality.plan import TASKS, Item, all_labels, batches, is_searched, recipe_of

from acamkd import config
from acamkd.engine.runs import TERMINATED, Run, default_folder, read_json, write_text
from acamkd.jobs.compare import trials_csv
from acamkd.jobs.compare.compare import run_trials
from acamkd.jobs.compare.trials import Trial

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
            due = [trial for trial in item.trials() if trial.read(item.results) is None]
            if not due:
                continue
            log.info("batch %s: %s, %d trials to do", name, item.comparison, len(due))
            if train_teacher(item):
                _run(item, jobs, end)


def _run(item: Item, jobs: int, end: float | None) -> None:
    item.results.mkdir(exist_ok=True)
    file, recipe, trials = item.results / "comparison.yaml", item.recipe, item.trials()
    write_text(file, config.dump(recipe))
    numbers = {trial.name: number for number, trial in enumerate(item.planned())}

    def command(number: int) -> list[str]:
        return [
            sys.executable, "-m", "acamkd", "compare", str(file), "--methods", ",".join(item.methods), "--seeds",
            str(item.seeds), "--results", str(item.results), "--trial", str(numbers[trials[number].name]),
        ]  # fmt: skip

    due = [number for number, trial in enumerate(trials) if trial.read(item.results) is None]
    try:
        failed = run_trials(trials, due, item.results, command, end=end, jobs=jobs)
    finally:
        gather(item)
    for trial in failed:
        _note_failure(item, trial)


def gather(item: Item) -> None:
    """Add an item's finished trials to trials.csv."""
    files = item.results.glob("*-seed*.json")
    fresh = {file.stem: read_json(file) for file in files}
    if fresh:
        known = plan.stored()
        trials_csv.write(plan.TABLE, {**known, item.comparison: {**known.get(item.comparison, {}), **fresh}})


def _note_failure(item: Item, trial: Trial) -> None:
    """A row of failed.csv; the trial is tried again by the next run."""
    lines = (item.results / "logs" / f"{trial.name}.txt").read_text(encoding="utf-8").strip().splitlines()
    is_new = not plan.FAILURES.is_file()
    with plan.FAILURES.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if is_new:
            writer.writerow(["comparison", "trial", "recipe", "time", "last line"])
        now = datetime.now(timezone.utc).isoformat(timespec="minutes")
        writer.writerow([item.comparison, trial.name, trial.key, now, lines[-1] if lines else ""])


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
    return not code


def show_plan() -> None:
    """Print the batches with the numbers of their trials, and how many are done."""
    total = done = 0
    for name, items in batches():
        trials = {(item.comparison, trial.name): (item, trial) for item in items for trial in item.trials()}
        finished = sum(trial.read(item.results) is not None for item, trial in trials.values())
        total, done = total + len(trials), done + finished
        print(f"{name}: {finished} of {len(trials)} trials")
    print(f"{done} of {total}" + ("" if is_searched(plan.PRIMARY) else "; later batches begin once batch 2 has ended"))


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
    arguments = parser.parse_args()
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))  # so that no teacher's training outlives this one
    if arguments.job == "run":
        seconds = None if arguments.minutes is None else 60 * arguments.minutes
        run(arguments.runs.resolve(), arguments.jobs, arguments.tasks, seconds)
    else:
        show_plan()


if __name__ == "__main__":
    main()
