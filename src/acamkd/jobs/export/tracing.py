"""Measures around PyTorch's exporter: no hanging on a graph for any input size, no needless fifth dimension."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from segmentation_models_pytorch.decoders.fpn.decoder import MergeBlock
from timm.layers import padding
from torch import Tensor, nn

from acamkd.errors import AcamkdError
from acamkd.models.segmentation import STRIDE

TIME_LIMIT = 900.0
"""Time limit of an export, in seconds."""


class _TimeUpError(BaseException):
    """Not an Exception, since the exporter catches those and continues in another way."""


@contextmanager
def time_limit(what: str, advice: str) -> Iterator[None]:
    """Raise AcamkdError after TIME_LIMIT; only in the main thread, since others cannot be interrupted.

    Args:
        what: Description of the work, for the message.
        advice: Advice for the message.
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
def constant_same_padding(graph: nn.Module, multiple: int = STRIDE) -> Iterator[None]:
    """Make timm's `same` padding a constant within the context, where it is the same for every input size.

    Otherwise it depends on the layer's input size, and the exporter would carry that formula through all later layers.
    A layer whose stride divides its input size pads by kernel - stride in total.

    Args:
        graph: Takes pixels (N, 3, H, W).
        multiple: The number that H and W are multiples of.
    """
    # No larger number divides both sides, so that strides that divide them at every level do so for every input.
    count = (7 * STRIDE) // multiple | 1
    frame = (count * multiple, (count + 2) * multiple)
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
            graph(torch.rand(1, 3, *frame))
        padding.get_same_padding = constant if all(divisible) else original
        yield
    finally:
        padding.get_same_padding = original


@contextmanager
def maps_added_in_turn() -> Iterator[None]:
    """Let the FPN of segmentation_models_pytorch add its feature maps one by one within the context.

    It stacks them in a fifth dimension, which runtimes of small devices (NCNN) do not have.
    """
    original = MergeBlock.forward

    def forward(self: MergeBlock, maps: list[Tensor]) -> Tensor:
        merged: Tensor = sum(maps[1:], maps[0]) if self.policy == "add" else original(self, maps)
        return merged

    try:
        MergeBlock.forward = forward
        yield
    finally:
        MergeBlock.forward = original
