"""Compare distillation methods: same recipe, same seeds, one process per training, and an honest verdict."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from statistics import median

from acamkd import config
from acamkd.engine.runs import TERMINATED, default_folder
from acamkd.errors import AcamkdError
from acamkd.files import check_writable
from acamkd.jobs.compare import tables
from acamkd.jobs.compare.statistics import Row, summarize
from acamkd.jobs.compare.trials import Cell, plan

__all__ = ["Cell", "Row", "compare", "expected_seconds", "plan", "run_cell", "tabulate"]

log = logging.getLogger(__name__)


def compare(
    recipe: config.Recipe,
    methods: Sequence[str],
    seeds: int,
    results: Path,
    command: Callable[[int], Sequence[str]],
    *,
    seconds: float | None = None,
    jobs: int = 1,
) -> list[Row]:
    """Run every cell that is missing and write the tables.

    Args:
        recipe: What is compared on.
        methods: Names in the recipe's `compare.methods`, or of `acamkd methods`; the baseline is always there.
        seeds: Trainings per method, with the seeds 0, 1, ...
        results: Folder of the cells' JSON files and of the tables.
        command: The command line that runs one cell of the plan, by its number.
        seconds: Cells that are not expected to end within this time are not begun.
        jobs: Cells that run at the same time.

    Raises:
        AcamkdError: A method is unknown, cells failed, or they do not share their images, teacher and number of
            processes.
    """
    end = None if seconds is None else time.monotonic() + seconds
    failed: list[Cell] = []
    for tuning in (True, False):  # what a method is tuned to is known only once its tuning cells have ended
        check_writable(results, advice="--results DIR writes elsewhere")
        cells = plan(recipe, methods, seeds, results)
        untuned = set() if tuning else {cell.method for cell in failed}
        due = [
            number for number, cell in enumerate(cells)
            if cell.tuning is tuning and cell.method not in untuned and cell.read(results) is None
        ]  # fmt: skip
        if any(cells[number].recipe.losses or cells[number].recipe.student.inherit for number in due):
            _train_teacher(recipe)
        failed += run_cells(cells, due, results, command, end=end, jobs=jobs)
    try:
        return tabulate(recipe, methods, seeds, results)
    finally:
        if failed:
            logs = ", ".join(str(_log_file(results, cell)) for cell in failed)
            raise AcamkdError(f"{len(failed)} cells failed; what they said: {logs}")


def run_cell(cells: Sequence[Cell], number: int, results: Path) -> None:
    """Run one cell of a plan in this process, unless it is there.

    Raises:
        AcamkdError: There is no such cell, the teacher is missing, or the cells that tune its method are.
    """
    if not 0 <= number < len(cells):
        raise AcamkdError(f"there is no cell {number}: the plan has {len(cells)}, counted from 0")
    cell = cells[number]
    if cell.read(results) is not None:
        log.info("%s is there already", cell.name)
        return
    untuned = [
        other.name for other in cells if other.tuning and other.method == cell.method and not other.read(results)
    ]
    if untuned and not cell.tuning:
        raise AcamkdError(f"{cell.name} needs the tuning of its method, of which are missing: {', '.join(untuned)}")
    cell.run(results)


def run_cells(
    cells: Sequence[Cell],
    due: Sequence[int],
    results: Path,
    command: Callable[[int], Sequence[str]],
    *,
    end: float | None,
    jobs: int,
) -> list[Cell]:
    """Run some cells of a plan, each as a process of its own.

    Args:
        cells: The plan.
        due: Which of them.
        results: Folder of the cells' JSON files.
        command: The command line that runs one cell, by its number.
        end: Time of `time.monotonic` that no cell is expected to pass.
        jobs: Cells that run at the same time.

    Returns:
        The cells that failed.
    """
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    failed: list[Cell] = []
    stale = [name for name in (cells[number].name for number in due) if (results / f"{name}.json").is_file()]
    if stale:
        log.warning("the recipe of %d cells has changed, they are run anew: %s", len(stale), ", ".join(stale))

    def run(number: int) -> None:
        cell = cells[number]
        expected = expected_seconds(cell, cells, results) or 0.0
        if end is not None and time.monotonic() + expected > end:
            log.info("%s is left out: about %s would pass the time", cell.name, timedelta(seconds=round(expected)))
            return
        log.info("%s begins", cell.name)
        file = _log_file(results, cell)
        file.parent.mkdir(parents=True, exist_ok=True)
        with (
            file.open("w", encoding="utf-8") as output,
            subprocess.Popen(
                command(number), stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                env={"OMP_NUM_THREADS": threads, **os.environ},
            ) as process,
        ):  # fmt: skip
            running.add(process)
            code = process.wait()
            running.remove(process)
        found = cell.read(results)
        if code or found is None:
            failed.append(cell)
            log.error("%s failed (exit code %d): %s", cell.name, code, file)
            return
        left = sum(other.read(results) is None for other in cells)
        log.info(
            "%s: %s %.2f in %s, %d cells left", cell.name, found["metric"], found["history"][-1],
            timedelta(seconds=round(found["wall_time"])), left,
        )  # fmt: skip

    running: set[subprocess.Popen[bytes]] = set()
    with ThreadPoolExecutor(jobs) as pool, _ending_on_sigterm():
        try:
            list(pool.map(run, due))
        except BaseException:  # or they would go on without whoever began them
            for process in tuple(running):
                process.terminate()
            raise
    return failed


@contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """Within, SIGTERM ends the main thread as Ctrl-C does, rather than at once."""
    if threading.current_thread() is not threading.main_thread():  # no other one gets signals
        yield
        return

    def end(*_: object) -> None:
        raise SystemExit(TERMINATED)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def expected_seconds(cell: Cell, cells: Sequence[Cell], results: Path) -> float | None:
    """Median wall time of the finished cells of the same method, or of all; None where there is none."""
    found = [(other.method, done["wall_time"]) for other in cells if (done := other.read(results))]
    times = [seconds for method, seconds in found if method == cell.method] or [seconds for _, seconds in found]
    return median(times) if times else None


def tabulate(recipe: config.Recipe, methods: Sequence[str], seeds: int, results: Path) -> list[Row]:
    """Write the tables of the cells that are there; needs neither images nor weights.

    Raises:
        AcamkdError: There is none, or they do not share their images, teacher and number of processes.
    """
    # With the setting, which a cell that was run before the tuning does not know of.
    done = [
        (cell, {**content, "setting": cell.setting, "option": cell.option})
        for cell in plan(recipe, methods, seeds, results)
        if (content := cell.read(results))
    ]
    found, tuning = ([content for cell, content in done if cell.tuning is kind] for kind in (False, True))
    if not found:
        raise AcamkdError(f"{results} holds no cell of this comparison yet")
    shared = {
        f"{split} images": [content["data"].get(split) for _, content in done]
        for split in ("train", "val", "unlabelled")  # the baseline sees nothing unlabeled
    } | {
        "teacher": [
            content["teacher"]["sha256"] if content["teacher"] else content.get("inherited") for _, content in done
        ],
        "number of processes": [content.get("processes") for _, content in done],  # which batch sizes are each one's
    }
    for what, values in shared.items():
        usual, *others = [value for value, _ in Counter(value for value in values if value).most_common()] or [None]
        if others:
            odd = [cell.name for (cell, _), value in zip(done, values, strict=True) if value not in (usual, None)]
            raise AcamkdError(f"the cells in {results} do not share their {what}: remove {', '.join(odd)}")
    rows = summarize(found)
    tables.write(results, recipe, rows, found, tuning)
    return rows


def _train_teacher(recipe: config.Recipe) -> None:
    from acamkd.jobs.setup import teacher_section
    from acamkd.jobs.train import train

    try:
        teacher_section(recipe)
    except AcamkdError as error:
        if _devices(recipe.train) > 1:  # each would begin this comparison again
            raise AcamkdError(f"{error}; with several devices a comparison cannot train it") from error
        log.info("the teacher is trained first")
        train(recipe, "teacher", resume=default_folder(recipe, "teacher").exists())


def _devices(settings: config.Train) -> int:
    if settings.devices != "auto":
        return settings.devices
    import torch  # as late as the training

    return 1 if settings.accelerator == "cpu" else torch.cuda.device_count()


def _log_file(results: Path, cell: Cell) -> Path:
    return results / "logs" / f"{cell.name}.txt"
