"""Which device a job works on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from acamkd.config import Train


def device_of(settings: Train) -> torch.device:
    """The device of this process by `train.accelerator`: a GPU where one is there and may be used, else the CPU.

    Of several processes that a launcher has started, each has a GPU of its own. A run that was trained on a GPU can be
    opened where there is none.
    """
    if settings.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
        return torch.device("cuda", local % torch.cuda.device_count())
    if settings.accelerator in ("gpu", "mps") and torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


@contextmanager
def moved_to(device: torch.device, *models: nn.Module) -> Iterator[None]:
    """Within, networks are on a device; afterwards they are on the CPU, where they were built."""
    for model in models:
        model.to(device)
    try:
        yield
    finally:
        for model in models:
            model.to("cpu")
