"""acamkd: knowledge distillation for object detectors and semantic segmenters."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from acamkd.distillation.build import build_distiller
    from acamkd.distillation.distiller import Distiller
    from acamkd.distillation.methods import METHODS
    from acamkd.distillation.taps import FeatureTap
    from acamkd.engine.runs import load_student, open_run
    from acamkd.jobs.train import distill, train

__version__ = "0.1.0"
__all__ = ["METHODS", "Distiller", "FeatureTap", "build_distiller", "distill", "load_student", "open_run", "train"]

_HOMES = {
    "Distiller": "acamkd.distillation.distiller",
    "FeatureTap": "acamkd.distillation.taps",
    "METHODS": "acamkd.distillation.build",
    "build_distiller": "acamkd.distillation.build",
    "distill": "acamkd.jobs.train",
    "load_student": "acamkd.engine.runs",
    "open_run": "acamkd.engine.runs",
    "train": "acamkd.jobs.train",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that neither the command line nor `acamkd.config` waits for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'acamkd' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
