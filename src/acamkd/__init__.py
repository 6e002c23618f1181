"""acamkd: knowledge distillation for object detectors and semantic segmenters."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from acamkd.api import distill, load_student, train
    from acamkd.distiller import Distiller
    from acamkd.features import FeatureTap
    from acamkd.methods import METHODS, build_distiller
    from acamkd.runs import open_run

__version__ = "0.1.0"
__all__ = ["METHODS", "Distiller", "FeatureTap", "build_distiller", "distill", "load_student", "open_run", "train"]

_HOMES = {
    "Distiller": "acamkd.distiller",
    "FeatureTap": "acamkd.features",
    "METHODS": "acamkd.methods",
    "build_distiller": "acamkd.methods",
    "distill": "acamkd.api",
    "load_student": "acamkd.api",
    "open_run": "acamkd.runs",
    "train": "acamkd.api",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that neither the command line nor `acamkd.config` waits for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'acamkd' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


class _Package(ModuleType):
    """Keeps `acamkd.train` the function: importing the module of that name would put the module in its place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
