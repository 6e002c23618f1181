"""Jobs in a process of their own.

A training on several devices starts its command once more for each further device. A command that trains more than once
would be started again as a whole, so that its trainings run apart.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from acamkd import config
from acamkd.engine.runs import TERMINATED
from acamkd.errors import AcamkdError


def device_count(settings: config.Train) -> int:
    """Number of devices that a training takes on this machine."""
    if settings.devices != "auto":
        return settings.devices
    import torch  # imported only when a training needs it

    return 1 if settings.accelerator == "cpu" else torch.cuda.device_count()


def carry_out(words: Sequence[str]) -> None:
    """Run `acamkd WORDS` and wait for it; what it says is seen.

    Raises:
        AcamkdError: It failed.
        SystemExit: It, or this process, was told to end (SIGTERM).
    """
    with ending_on_sigterm(), subprocess.Popen([sys.executable, "-m", "acamkd", *words]) as process:
        try:
            code = process.wait()
        except BaseException:  # otherwise it would outlive this process
            process.terminate()
            raise
    if code in (TERMINATED, -signal.SIGTERM):
        raise SystemExit(TERMINATED)
    if code:
        raise AcamkdError(f"`acamkd {' '.join(words)}` failed (exit code {code}); its reason stands above")


@contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """Let SIGTERM end the main thread like Ctrl-C within the context, rather than at once."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread gets signals
        yield
        return

    def end(*_: object) -> None:
        raise SystemExit(TERMINATED)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
