"""acamkd: knowledge distillation for object detectors and semantic segmenters."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from acamkd.distiller import Distiller
    from acamkd.features import FeatureTap
    from acamkd.jobs import distill, train
    from acamkd.methods import METHODS, build_distiller
    from acamkd.runs import load_student, open_run

__version__ = "0.1.0"
__all__ = ["METHODS", "Distiller", "FeatureTap", "build_distiller", "distill", "load_student", "open_run", "train"]

_HOMES = {
    "Distiller": "acamkd.distiller",
    "FeatureTap": "acamkd.features",
    "METHODS": "acamkd.methods",
    "build_distiller": "acamkd.methods",
    "distill": "acamkd.jobs",
    "load_student": "acamkd.runs",
    "open_run": "acamkd.runs",
    "train": "acamkd.jobs",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that neither the command line nor `acamkd.config` waits for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'acamkd' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
