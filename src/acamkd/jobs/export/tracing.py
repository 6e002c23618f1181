"""What keeps PyTorch's exporter from working for ever on a graph for any size of frame."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from timm.layers import padding
from torch import nn

from acamkd.errors import AcamkdError
from acamkd.models.segmentation import STRIDE

TIME_LIMIT = 900.0
"""Seconds that an export may take."""

ODD_FRAME = (7 * STRIDE, 9 * STRIDE)
"""What divides these sides on every level divides those of every frame."""


class _TimeUpError(BaseException):
    """Not an Exception: the exporter catches those, and goes on in another way."""


@contextmanager
def time_limit(what: str, advice: str) -> Iterator[None]:
    """Raise AcamkdError after TIME_LIMIT; only the main thread can be interrupted, others go on.

    Args:
        what: Who is at work, for the message.
        advice: What to do then.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def end(*_: object) -> NoReturn:
        raise _TimeUpError

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, TIME_LIMIT)
    try:
        yield
    except _TimeUpError:
        raise AcamkdError(f"{what} has not ended after {TIME_LIMIT / 60:g} minutes: {advice}") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def constant_same_padding(graph: nn.Module) -> Iterator[None]:
    """Within, timm's `same` padding is a number wherever it is one for every frame.

    It depends on the size that a layer sees, and the exporter would carry that formula through every layer behind it.
    Frames are multiples of 32 pixels: a layer whose stride divides what it sees pads by kernel - stride in all.

    Args:
        graph: Takes pixels (N, 3, H, W).
    """
    original = padding.get_same_padding
    divisible: list[bool] = []

    def observed(x: int, kernel_size: int, stride: int, dilation: int) -> Any:
        divisible.append(x % stride == 0)
        return original(x, kernel_size, stride, dilation)

    def constant(x: Any, kernel_size: int, stride: int, dilation: int) -> int:
        return max((kernel_size - 1) * dilation + 1 - stride, 0)

    try:
        padding.get_same_padding = observed
        with torch.no_grad():
            graph(torch.rand(1, 3, *ODD_FRAME))
        padding.get_same_padding = constant if all(divisible) else original
        yield
    finally:
        padding.get_same_padding = original
