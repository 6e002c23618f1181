"""Cost of one prediction of a network: parameters, operations, time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from acamkd.models.base import TaskModel

RUNS = 10
PATIENCE = 3.0
"""Seconds of measured time after which no further run starts."""


@dataclass(frozen=True)
class Cost:
    """Cost of one network.

    Attributes:
        parameters: Number of parameters.
        gflops: 1e9 floating-point operations of one prediction, 2 per multiply-add. As in torch's counter, only
            convolutions, matrix products and attention count.
        milliseconds: Median time of one prediction on the CPU, resizing and decoding included.
    """

    parameters: int
    gflops: float
    milliseconds: float


def cost(model: TaskModel, image: Tensor) -> Cost:
    """Measure a network in eval mode on the CPU, on one image (3, H, W)."""
    with flop_counter() as counter:  # also warms up
        model.predict([image])
    return Cost(
        parameters=sum(parameter.numel() for parameter in model.net.parameters()),
        gflops=counter.get_total_flops() / 1e9,
        milliseconds=median_milliseconds(lambda: model.predict([image])),
    )


def flop_counter() -> FlopCounterMode:
    """Count the floating-point operations within the context, 2 per multiply-add, backward passes included."""
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: _convolution_backward})


def _convolution_backward(gradient: list[int], x: list[int], weight: list[int], *settings: Any, **_out: object) -> int:
    """Each gradient costs as much as the forward pass; torch 2.14 counts the weight gradient once per group."""
    _, _, _, _, transposed, _, _, (of_x, of_weight, _) = settings
    flops: int = (of_x + of_weight) * conv_flop_count(x, weight, gradient, transposed=transposed)
    return flops


def median_milliseconds(call: Callable[[], object]) -> float:
    """Median time of a call that is already warmed up."""
    times: list[float] = []
    while not times or (len(times) < RUNS and sum(times) < PATIENCE):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def threads() -> int:
    """Number of CPU threads used in the measurement."""
    return torch.get_num_threads()
