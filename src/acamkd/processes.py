"""Figures that all processes of a training are to agree on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, distributed


def is_distributed() -> bool:
    """Whether this process is one of a group that trains together."""
    return distributed.is_available() and distributed.is_initialized()


def mean_over_processes(figures: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scalars by name, averaged over the processes that train together; all of them are to ask, with the same names."""
    if not (figures and is_distributed()):
        return dict(figures)
    values = torch.stack([figure.detach().float() for figure in figures.values()])
    distributed.all_reduce(values)
    return dict(zip(figures, (values / distributed.get_world_size()).unbind(), strict=True))
