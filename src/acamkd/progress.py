"""Who speaks: progress bars of long jobs, by the first process alone; and which parts of the package are silent."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TextIO, TypeVar

from rich.console import Console

T = TypeVar("T")

DELAY = 5.0
"""Seconds of work before a bar appears."""


def is_first_process() -> bool:
    """Whether this is the only process, or the first one that a launcher has started."""
    ranks = [os.environ[name] for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID") if name in os.environ]
    return not ranks or ranks[0] == "0"


def shows_progress(stream: TextIO) -> bool:
    """Whether a bar can be drawn: the stream is a terminal, or a notebook shows it."""
    return is_first_process() and (stream.isatty() or Console().is_jupyter)


def progress(items: Iterable[T], what: str, *, total: int | None = None, unit: str = " images") -> Iterable[T]:
    """Show how many of some items are done, how fast, and how long the rest takes, once they have taken DELAY seconds.

    Args:
        items: What to go through; it is returned as it is where no bar can be drawn.
        what: What is done, before the bar.
        total: Number of items, if they have no `len`.
        unit: What is counted, with a blank before it.
    """
    if not shows_progress(sys.stderr):
        return items
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="IProgress not found")  # it then draws with letters
        from tqdm.auto import tqdm
    return tqdm(items, what, total=total, unit=unit, leave=False, delay=DELAY, mininterval=0.5)


@contextmanager
def muted(*parts: str) -> Iterator[None]:
    """Within, some modules or packages say nothing below an error.

    Args:
        parts: Their full names, such as acamkd.models.
    """
    loggers = [logging.getLogger(part) for part in parts]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
