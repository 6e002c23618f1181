"""Cost of one prediction of a network: parameters, operations, time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
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
        megabytes: 1e6 bytes of parameters and buffers, as a file of its weights holds them.
    """

    parameters: int
    gflops: float
    milliseconds: float
    megabytes: float


def cost(model: TaskModel, image: Tensor) -> Cost:
    """Measure a network in eval mode on the CPU, on one image (3, H, W)."""
    [found] = costs([model], image)
    return found


def costs(models: Sequence[TaskModel], image: Tensor) -> list[Cost]:
    """Measure networks as `cost` does, but in turns, so that another program slows all of them alike.

    Networks with the same numbers of parameters and operations are one architecture. It is measured once.
    """
    sizes = []
    for model in models:
        with flop_counter() as counter:  # also warms up
            model.predict([image])
        sizes.append((sum(parameter.numel() for parameter in model.net.parameters()), counter.get_total_flops()))
    kinds = dict(zip(sizes, models, strict=True))
    times = dict(zip(kinds, interleaved_milliseconds([partial(kind.predict, [image]) for kind in kinds.values()]),
                     strict=True))  # fmt: skip
    return [
        Cost(size[0], size[1] / 1e9, times[size], sum(x.nbytes for x in model.net.state_dict().values()) / 1e6)
        for model, size in zip(models, sizes, strict=True)
    ]


def flop_counter() -> FlopCounterMode:
    """Count the floating-point operations within the context, 2 per multiply-add, backward passes included."""
    return FlopCounterMode(
        display=False,
        custom_mapping={
            torch.ops.aten.convolution_backward: _convolution_backward,
            torch.ops.torchvision.deform_conv2d: _deformable_convolution,
            torch.ops.torchvision._deform_conv2d_backward: _deformable_convolution_backward,
        },
    )


def _convolution_backward(gradient: list[int], x: list[int], weight: list[int], *settings: Any, **_out: object) -> int:
    """Each gradient costs as much as the forward pass; torch 2.14 counts the weight gradient once per group."""
    _, _, _, _, transposed, _, _, (of_x, of_weight, _) = settings
    flops: int = (of_x + of_weight) * conv_flop_count(x, weight, gradient, transposed=transposed)
    return flops


def _deformable_convolution(x: list[int], weight: list[int], offset: list[int], *_: Any, **_out: object) -> int:
    """As a plain convolution; finding the sampled values is no multiplication of matrices."""
    flops: int = conv_flop_count(x, weight, [x[0], weight[0], *offset[2:]])
    return flops


def _deformable_convolution_backward(
    gradient: list[int], x: list[int], weight: list[int], *_: Any, **_out: object
) -> int:
    """The gradients of values and of weights."""
    return 2 * _deformable_convolution(x, weight, gradient)


def median_milliseconds(call: Callable[[], object]) -> float:
    """Median time of a call that is already warmed up."""
    [found] = interleaved_milliseconds([call])
    return found


def interleaved_milliseconds(calls: Sequence[Callable[[], object]]) -> list[float]:
    """Median time of each call, all of them in turns; they are already warmed up."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(RUNS):
        for call, own in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            own.append(time.perf_counter() - start)
        if sum(map(sum, times)) >= PATIENCE * len(calls):
            break
    return [1e3 * statistics.median(own) for own in times]


def threads() -> int:
    """Number of CPU threads used in the measurement."""
    return torch.get_num_threads()
