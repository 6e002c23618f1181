"""Processes of a test's own that end as Python's do: with its exit hooks, which wait for child processes."""

from __future__ import annotations

import atexit
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

PATIENCE = 120.0
"""Seconds after which a process is taken to hang."""


def begin(job: Callable[[], object]) -> int:
    """Do a job in a fork of this process, since a new interpreter would spend its time on imports; returns its id."""
    child = os.fork()
    if child:
        return child
    code: Any = 1
    try:
        # torch renews its pool of threads at the first use after a fork, which two threads at once must not do.
        torch.set_num_threads(torch.get_num_threads())
        job()
        code = 0
    except SystemExit as end:
        code = end.code
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except BaseException:
        traceback.print_exc()
    try:
        atexit._run_exitfuncs()
    finally:
        os._exit(code)


def exit_code(child: int, patience: float = PATIENCE) -> int:
    """Wait for a process that `begin` began; one that hangs is killed, and AssertionError says so."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError(f"the process did not end within {patience:g} seconds")


def run(job: Callable[[], object], patience: float = PATIENCE) -> int:
    """Both: the exit code of a process that does a job."""
    return exit_code(begin(job), patience)


def torchrun(rank: int, port: int) -> dict[str, Any]:
    """What torchrun tells each of two processes."""
    return {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2,
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}  # fmt: skip


Launcher = Callable[[int, int], dict[str, Any]]


def together(run: Callable[[int], object], launcher: Launcher = torchrun) -> list[int]:
    """Exit codes of two processes that do this with their rank, in the environment that a launcher gives them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def job(rank: int) -> None:
        os.environ.update({name: str(value) for name, value in launcher(rank, port).items()})
        run(rank)

    return [exit_code(child) for child in [begin(partial(job, rank)) for rank in (0, 1)]]
