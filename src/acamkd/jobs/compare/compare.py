"""Compare distillation methods: same recipe, same seeds, one process per training, and a statistical verdict."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from acamkd import config
from acamkd.engine.printing import Printable
from acamkd.engine.runs import TERMINATED, default_folder
from acamkd.errors import AcamkdError
from acamkd.files import check_writable, write_text
from acamkd.jobs.apart import carry_out, device_count, ending_on_sigterm
from acamkd.jobs.compare import tables, trials_csv
from acamkd.jobs.compare.statistics import Row, summarize
from acamkd.jobs.compare.trials import NONE, Trial, methods_of, plan
from acamkd.progress import progress

__all__ = [
    "ComparisonResult", "Row", "Trial", "compare", "expected_seconds", "methods_of", "plan", "run_trial", "tabulate",
]  # fmt: skip

RESOLVED = "comparison.yaml"
"""The recipe with its overrides, for the trials' processes; a user's recipe is unlikely to have this name."""

KEPT_HEAP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_ARENA_MAX": "1"}
"""Lets glibc keep a step's memory for the next: giving it back and asking again takes a tenth of a small step."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ComparisonResult(Printable):
    """Result of a comparison.

    Attributes:
        folder: Folder of the results: the trials, and the tables comparison.{html,md,json,png}.
        metric: Name of the rows' metric, in percent.
        rows: Rows of the table, the best method first.
    """

    folder: Path
    metric: str
    rows: list[Row]

    def __rich__(self) -> Group:
        table = Table("method", "n", "mean", "std", f"against {NONE}", "95 %", "p", "verdict")
        for row in self.rows:
            gain = row.gain
            table.add_row(
                escape(row.method), str(row.n), f"{row.mean:.2f}", f"{row.std:.2f}" if row.std is not None else "",
                f"{gain.mean:+.2f}" if gain else "",
                f"{gain.low:+.2f} to {gain.high:+.2f}" if gain and gain.low is not None else "",
                row.p_text, row.verdict or "",
            )  # fmt: skip
        return Group(table, Text(f"{self.folder}: comparison.html, comparison.md, comparison.json, comparison.png"))


def compare(
    recipe: config.Recipe | Path | str,
    methods: Sequence[str] | None = None,
    *,
    seeds: int = 5,
    results: Path | str | None = None,
    seconds: float | None = None,
    jobs: int = 1,
    overrides: Sequence[str] = (),
) -> ComparisonResult:
    """Run every missing trial in a separate process, and write the tables.

    Args:
        recipe: The recipe, or its file.
        methods: Names in the recipe's `compare.methods`, or of `acamkd methods`; by default all of `compare.methods`.
            The baseline is always included.
        seeds: Trainings per method, with the seeds 0, 1, ...
        results: Folder of the trials' JSON files and of the tables, instead of runs/NAME/compare. The recipe with its
            overrides is written there as comparison.yaml.
        seconds: Trials that are not expected to end within this time are not started.
        jobs: Trials that run at the same time.
        overrides: `key=value` assignments for the recipe, as `--set` takes them.

    Returns:
        A row for each method, with its paired differences to the baseline.

    Raises:
        AcamkdError: A method is unknown or none is given, trials failed, or they differ in images, teacher or number of
            processes.
    """
    recipe = config.as_recipe(recipe, overrides)
    methods = methods_of(recipe, methods)
    results = Path(results).expanduser() if results else default_folder(recipe, "compare")
    trials = plan(recipe, methods, seeds, results)  # raises errors before anything is written
    _check_results(results)
    write_text(results / RESOLVED, config.dump(recipe))
    command = partial(trial_command, methods, seeds, results)
    if any(trial.read(results) is None for trial in trials):
        _check_data(recipe)
    end = None if seconds is None else time.monotonic() + seconds
    failed: list[Trial] = []
    for tuning in (True, False):  # a method's setting is known only after its tuning trials
        trials = plan(recipe, methods, seeds, results)
        untuned = set() if tuning else {trial.method for trial in trials if trial.tuning and not trial.read(results)}
        due = [
            number for number, trial in enumerate(trials)
            if trial.tuning is tuning and trial.method not in untuned and trial.read(results) is None
        ]  # fmt: skip
        if any(trials[number].recipe.losses or trials[number].recipe.student.inherit for number in due):
            _train_teacher(recipe, results / RESOLVED)
        failed += run_trials(trials, due, results, command, end=end, jobs=jobs)
    try:
        return tabulate(recipe, methods, seeds, results)
    finally:
        if failed:
            logs = ", ".join(str(_log_file(results, trial)) for trial in failed)
            raise AcamkdError(f"{len(failed)} trials failed; their logs: {logs}")


def _check_results(results: Path) -> None:
    check_writable(results, advice="--results DIR writes elsewhere")


def trial_command(methods: Sequence[str], seeds: int, results: Path, number: int) -> list[str]:
    """The command line that runs one trial of a plan, of the recipe that `results` holds as comparison.yaml."""
    return [
        sys.executable, "-m", "acamkd", "compare", str(results / RESOLVED), "--methods", ",".join(methods),
        "--seeds", str(seeds), "--results", str(results), "--trial", str(number),
    ]  # fmt: skip


def run_trial(trials: Sequence[Trial], number: int, results: Path) -> None:
    """Run one trial of a plan in this process, unless it is finished.

    Raises:
        AcamkdError: There is no such trial, or its teacher or the tuning trials of its method are missing.
    """
    if not 0 <= number < len(trials):
        raise AcamkdError(f"there is no trial {number}: the plan has {len(trials)}, counted from 0")
    trial = trials[number]
    if trial.read(results) is not None:
        log.info("%s is finished already", trial.name)
        return
    untuned = [
        other.name for other in trials if other.tuning and other.method == trial.method and not other.read(results)
    ]
    if untuned and not trial.tuning:
        raise AcamkdError(f"{trial.name} needs the tuning trials of its method; missing: {', '.join(untuned)}")
    _check_results(results)
    trial.run(results)


def run_trials(
    trials: Sequence[Trial],
    due: Sequence[int],
    results: Path,
    command: Callable[[int], Sequence[str]],
    *,
    end: float | None,
    jobs: int,
) -> list[Trial]:
    """Run some trials of a plan, each in a separate process.

    Args:
        trials: The plan.
        due: Trials to run.
        results: Folder of the trials' JSON files.
        command: The command line that runs one trial, by its number.
        end: Time of `time.monotonic` by which every trial must be expected to end.
        jobs: Trials that run at the same time.

    Returns:
        The trials that failed. One that was stopped from outside is not among them: the next run goes on with it.
    """
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    failed: list[Trial] = []
    stale = [name for name in (trials[number].name for number in due) if (results / f"{name}.json").is_file()]
    if stale:
        log.warning("the recipe of %d trials has changed, they are run anew: %s", len(stale), ", ".join(stale))

    def run(number: int) -> None:
        trial = trials[number]
        if stopping.is_set():
            return
        expected = expected_seconds(trial, trials, results) or 0.0
        if end is not None and time.monotonic() + expected > end:
            log.info("%s is left out: about %s would pass the time", trial.name, timedelta(seconds=round(expected)))
            return
        log.info("%s begins", trial.name)
        file = _log_file(results, trial)
        file.parent.mkdir(parents=True, exist_ok=True)
        with (
            file.open("w", encoding="utf-8") as output,
            subprocess.Popen(
                command(number), stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                env={"OMP_NUM_THREADS": threads, **KEPT_HEAP, **os.environ},
            ) as process,
        ):  # fmt: skip
            running.add(process)
            code = process.wait()
            running.remove(process)
        found = trial.read(results)
        if stopping.is_set() or code in (TERMINATED, -signal.SIGTERM):
            log.warning("%s was stopped; the next run goes on with it", trial.name)
            return
        if code or found is None:
            failed.append(trial)
            log.error("%s failed (exit code %d): %s", trial.name, code, file)
            return
        times = [done["wall_time"] for other in trials if (done := other.read(results))]
        left = len(trials) - len(times)
        needed = timedelta(seconds=round(left * mean(times) / jobs))
        log.info(
            "%s: %s %.2f in %s, %d trials left%s", trial.name, found["metric"], found["history"][-1],
            timedelta(seconds=round(found["wall_time"])), left, f", about {needed}" if left else "",
        )  # fmt: skip

    running: set[subprocess.Popen[bytes]] = set()
    stopping = threading.Event()
    with ThreadPoolExecutor(jobs) as pool, ending_on_sigterm():
        try:
            list(progress(pool.map(run, due), "trials", total=len(due), unit=" trials"))
        except BaseException:  # otherwise they would outlive this process
            stopping.set()
            for process in tuple(running):
                process.terminate()
            raise
    return failed


def expected_seconds(trial: Trial, trials: Sequence[Trial], results: Path) -> float | None:
    """Median wall time of the finished trials of the same method, or else of all; None without any."""
    found = [(other.method, done["wall_time"]) for other in trials if (done := other.read(results))]
    times = [seconds for method, seconds in found if method == trial.method] or [seconds for _, seconds in found]
    return median(times) if times else None


def tabulate(recipe: config.Recipe, methods: Sequence[str], seeds: int, results: Path) -> ComparisonResult:
    """Write the tables of the finished trials; needs neither images nor weights.

    Raises:
        AcamkdError: There is none, or they differ in images, number of processes or teacher. A method whose overrides
            name another teacher may have it.
    """
    # With the setting, which is missing in trials that were run before the tuning.
    done = [
        (trial, {**content, "setting": trial.setting, "option": trial.option})
        for trial in plan(recipe, methods, seeds, results)
        if (content := trial.read(results))
    ]
    found, tuning = ([content for trial, content in done if trial.tuning is kind] for kind in (False, True))
    if not found:
        raise AcamkdError(f"{results} holds no trial of this comparison yet{_elsewhere(results)}")
    _check_results(results)
    shared = {
        f"{split} images": [content["data"].get(split) for _, content in done]
        for split in ("train", "val", "unlabeled")  # the baseline has no unlabeled ones
    } | {
        "teacher": [
            _teacher_of(content) if trial.recipe.teacher == recipe.teacher else None for trial, content in done
        ],
        "number of processes": [content.get("processes") for _, content in done],  # the batch size is per process
    }
    for what, values in shared.items():
        usual, *others = [value for value, _ in Counter(value for value in values if value).most_common()] or [None]
        if others:
            odd = [trial.name for (trial, _), value in zip(done, values, strict=True) if value not in (usual, None)]
            raise AcamkdError(f"the trials in {results} do not share their {what}: remove {', '.join(odd)}")
    rows = summarize(found)
    tables.write(results, recipe, rows, found, tuning)
    return ComparisonResult(results, found[0]["metric"], rows)


def _teacher_of(trial: Mapping[str, Any]) -> str | None:
    """Hash of the teacher that taught a student, or gave it its first weights."""
    found: str | None = trial["teacher"]["sha256"] if trial["teacher"] else trial.get("inherited")
    return found


def _elsewhere(results: Path) -> str:
    """Hint at comparisons in a folder's table that may be meant."""
    table = results / trials_csv.FILE
    if not table.is_file():
        return ""
    return f"; {table} holds: {', '.join(str(results / name) for name in trials_csv.comparisons(table))}"


def _check_data(recipe: config.Recipe) -> None:
    """Raise AcamkdError for unusable data or missing trackers before the first training starts."""
    from acamkd.engine.trackers import check_installed  # with torch: see Trial.run
    from acamkd.jobs.setup import Batches

    check_installed(recipe)
    Batches(recipe, with_unlabeled=recipe.data.unlabeled is not None, with_test=True).check()


def _train_teacher(recipe: config.Recipe, file: Path) -> None:
    """Train the teacher, if it has no weights; `file` holds the recipe."""
    from acamkd.jobs.setup import teacher_section
    from acamkd.jobs.train import train

    try:
        teacher_section(recipe)
    except AcamkdError:
        log.info("the teacher is trained first")
        resume = default_folder(recipe, "teacher").exists()
        if device_count(recipe.train) > 1:
            carry_out(["train", str(file), "--role", "teacher", *(["--resume"] if resume else [])])
        else:
            train(recipe, "teacher", resume=resume)


def _log_file(results: Path, trial: Trial) -> Path:
    return results / "logs" / f"{trial.name}.txt"
