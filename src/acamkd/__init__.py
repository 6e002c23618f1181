"""acamkd: knowledge distillation for object detectors and semantic segmenters.

What the command line does, Python does by the same word: `acamkd.distill("recipe.yaml")`. Only `methods`, `report` and
`tokens` are words of the command line alone. Every function takes a recipe (its file or the object) or a run (its
folder or the object), and returns an object that prints itself.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from acamkd.distillation.build import build_distiller as build_distiller
    from acamkd.distillation.distiller import Distiller as Distiller
    from acamkd.distillation.methods import METHODS as METHODS
    from acamkd.distillation.taps import FeatureTap as FeatureTap
    from acamkd.engine.runs import load_student as load_student
    from acamkd.engine.runs import open_run as open_run
    from acamkd.errors import AcamkdError as AcamkdError
    from acamkd.jobs.benchmark.benchmark import benchmark as benchmark
    from acamkd.jobs.compare.compare import compare as compare
    from acamkd.jobs.demo.demo import demo as demo
    from acamkd.jobs.doctor import doctor as doctor
    from acamkd.jobs.evaluate import evaluate as evaluate
    from acamkd.jobs.export.export import export as export
    from acamkd.jobs.init.init import init as init
    from acamkd.jobs.inspect_layers import inspect as inspect
    from acamkd.jobs.predict.predict import predict as predict
    from acamkd.jobs.pretrain import pretrain as pretrain
    from acamkd.jobs.run_all import run as run
    from acamkd.jobs.train import distill as distill
    from acamkd.jobs.train import train as train
    from acamkd.losses import *  # noqa: F403
    from acamkd.models.base import FeatureModel as FeatureModel
    from acamkd.models.base import TaskModel as TaskModel
    from acamkd.models.detection import Detector as Detector
    from acamkd.models.detection import wrap_detector as wrap_detector
    from acamkd.models.segmentation import Segmenter as Segmenter

__version__ = "0.1.0"

_HOMES = {
    "AcamkdError": "acamkd.errors",
    "METHODS": "acamkd.distillation.methods",
    "Detector": "acamkd.models.detection",
    "Distiller": "acamkd.distillation.distiller",
    "FeatureModel": "acamkd.models.base",
    "FeatureTap": "acamkd.distillation.taps",
    "Segmenter": "acamkd.models.segmentation",
    "TaskModel": "acamkd.models.base",
    "benchmark": "acamkd.jobs.benchmark.benchmark",
    "build_distiller": "acamkd.distillation.build",
    "compare": "acamkd.jobs.compare.compare",
    "demo": "acamkd.jobs.demo.demo",
    "distill": "acamkd.jobs.train",
    "doctor": "acamkd.jobs.doctor",
    "evaluate": "acamkd.jobs.evaluate",
    "export": "acamkd.jobs.export.export",
    "init": "acamkd.jobs.init.init",
    "inspect": "acamkd.jobs.inspect_layers",
    "load_student": "acamkd.engine.runs",
    "open_run": "acamkd.engine.runs",
    "predict": "acamkd.jobs.predict.predict",
    "pretrain": "acamkd.jobs.pretrain",
    "run": "acamkd.jobs.run_all",
    "train": "acamkd.jobs.train",
    "wrap_detector": "acamkd.models.detection",
}
"""Where each name lives; the losses are names of `acamkd.losses`."""

_PACKAGES = ("config", "data", "losses", "models")
"""Packages with names for a script."""


def __getattr__(name: str) -> Any:
    """Import on first use, so that neither the command line nor `acamkd.config` waits for torch."""
    if name in _PACKAGES:
        return importlib.import_module(f"acamkd.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name[:1].isupper() and name in _losses():  # other names may be modules that an import looks for
        return _losses()[name]
    raise AttributeError(f"module 'acamkd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*_HOMES, *_losses()])


def _losses() -> dict[str, Any]:
    """Every class that `acamkd.losses` lists."""
    found = vars(importlib.import_module("acamkd.losses"))
    return {name: loss for name, loss in found.items() if isinstance(loss, type)}
