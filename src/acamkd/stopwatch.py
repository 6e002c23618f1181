"""Where the time of a training goes: parts that the code names, measured only while somebody asks. Imports no torch."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import contextmanager


class Stopwatch:
    """Seconds of named parts, each without the parts within it, so that their sum is the time that has passed.

    Args:
        whole: Parts that keep the time of what is within them.

    Attributes:
        seconds: By part.
        beside: Seconds of parts that other processes have worked on meanwhile.
        counts: What has been counted.
    """

    def __init__(self, whole: Collection[str] = ()) -> None:
        self.whole = frozenset(whole)
        self._open: list[str] = []
        self.reset()

    def reset(self) -> None:
        """Start again from zero; parts that are open stay open."""
        self.seconds: dict[str, float] = defaultdict(float)
        self.beside: dict[str, float] = defaultdict(float)
        self.counts: dict[str, int] = defaultdict(int)
        self._last = time.perf_counter()

    def begin(self, part: str) -> None:
        """Begin a part; the one around it is interrupted."""
        self._note()
        around = self._open[-1] if self._open else None
        self._open.append(around if around is not None and around in self.whole else part)

    def end(self) -> None:
        """End the part that began last."""
        self._note()
        self._open.pop()

    @property
    def current(self) -> str | None:
        """The part that is being measured."""
        return self._open[-1] if self._open else None

    def _note(self) -> None:
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._last
        self._last = now


_running: list[Stopwatch] = []


@contextmanager
def running(watch: Stopwatch) -> Iterator[Stopwatch]:
    """Let `timed` and `counted` use a stopwatch within the context."""
    _running.append(watch)
    try:
        yield watch
    finally:
        _running.remove(watch)


def current() -> Stopwatch | None:
    """The stopwatch that is running."""
    return _running[-1] if _running else None


def begin_process() -> None:
    """In a new process: put a new stopwatch in the place of one that it has inherited."""
    _running[:] = [Stopwatch() for _ in _running[-1:]]


@contextmanager
def timed(part: str) -> Iterator[None]:
    """Measure a part of the work, if a stopwatch is running."""
    watch = current()
    if watch is None:
        yield
        return
    watch.begin(part)
    try:
        yield
    finally:
        watch.end()


def counted(what: str, number: int) -> None:
    """Count something, if a stopwatch is running."""
    if watch := current():
        watch.counts[what] += number
