"""Choice of the device that a job runs on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from acamkd.config import Train


def device_of(settings: Train) -> torch.device:
    """The device of this process: a GPU if `train.accelerator` allows it and one is available, else the CPU.

    Each of several processes that a launcher has started gets its own GPU. A run that was trained on a GPU can be
    opened on a machine without one.
    """
    if settings.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
        return torch.device("cuda", local % torch.cuda.device_count())
    if settings.accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


@contextmanager
def moved_to(device: torch.device, *models: nn.Module) -> Iterator[None]:
    """Move networks to a device within the context, and back to the CPU after it."""
    for model in models:
        model.to(device)
    try:
        yield
    finally:
        for model in models:
            model.to("cpu")
