"""What the scripts of this folder share: processes of their own, peak memory, interleaved times, results and plots."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure

from acamkd.jobs.compare.compare import KEPT_HEAP

RESULTS = Path(__file__).parent / "results"


def arguments(parser: argparse.ArgumentParser, *, keep_heap: bool = False) -> argparse.Namespace:
    """Read the command line; two threads, so that figures of one kind of machine can be compared.

    With `keep_heap` freed memory stays with the process: times without page faults, at the price of the peaks.
    """
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--quick", action="store_true", help="small sizes, once: does it run?")
    read = parser.parse_args()
    if "OMP_WAIT_POLICY" not in os.environ:  # waiting threads are to sleep, so that processor time is work
        environment = {"OMP_WAIT_POLICY": "passive", **(KEPT_HEAP if keep_heap else {})}
        # OpenMP and the allocator have read their own when torch was imported.
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **environment})
    torch.set_num_threads(2)
    return read


def in_own_process(call: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a call in a fork of this process, which must not have computed anything itself."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(call, arguments)


class Cost(NamedTuple):
    """What one call took; processor time does not count what other programs took of the machine meanwhile."""

    seconds: float
    cpu_seconds: float
    peak_mib: float
    """Largest resident memory beyond what there was before."""


def cost(call: Callable[[], object], device: str = "cpu") -> Cost:
    """Measure one call; Linux alone, for the peak. On a GPU the peak is of torch's own memory there, all of it."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start, cpu = time.perf_counter(), time.process_time()
        call()
        torch.cuda.synchronize()
        times = time.perf_counter() - start, time.process_time() - cpu
        return Cost(*times, torch.cuda.max_memory_allocated() / 2**20)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, start, cpu = _resident("VmRSS"), time.perf_counter(), time.process_time()
    call()
    return Cost(time.perf_counter() - start, time.process_time() - cpu, _resident("VmHWM") - before)


def _resident(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def interleaved(calls: Mapping[str, Callable[[], Cost]], rounds: int) -> Iterator[dict[str, list[Cost]]]:
    """All costs of each call after every round, A B C A B C ..., so that a drifting machine slows all alike."""
    costs: dict[str, list[Cost]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            costs[name].append(call())
            print(f"{name:32}" + "  ".join(f"{figure:10.3f}" for figure in costs[name][-1]), flush=True)
        yield costs


def medians(costs: Sequence[Cost]) -> Cost:
    """Of each figure."""
    return Cost(*(statistics.median(figures) for figures in zip(*costs, strict=True)))


def ratios(these: Sequence[Cost], those: Sequence[Cost]) -> dict[str, float]:
    """Medians over the rounds of the quotients within a round, of wall and of processor time, and of the fastest.

    What else happens on a machine only adds time: over many rounds, the quotient of the fastest is the steadier one.
    """
    pairs = list(zip(these, those, strict=True))
    return {
        "ratio": statistics.median(a.seconds / b.seconds for a, b in pairs),
        "cpu_ratio": statistics.median(a.cpu_seconds / b.cpu_seconds for a, b in pairs),
        "fastest_ratio": min(a.cpu_seconds for a in these) / min(b.cpu_seconds for b in those),
    }


def save(name: str, content: Mapping[str, Any], figure: Figure, *, quick: bool, folder: Path = RESULTS) -> None:
    """Write NAME.json and NAME.png; nothing is kept of a quick run."""
    if quick:
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({"machine": machine(), **content}, indent=1) + "\n")
    figure.savefig(folder / f"{name}.png", dpi=110, bbox_inches="tight")


def machine() -> dict[str, Any]:
    """What times depend on."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load_at_end": round(os.getloadavg()[0], 1),
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())
