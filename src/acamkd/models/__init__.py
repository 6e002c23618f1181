"""Detectors and segmenters behind one contract, TaskModel."""

from acamkd.models.base import Batch, FeatureModel, Target, Task, TaskModel
from acamkd.models.build import build, build_teacher, call_factory
from acamkd.models.weights import LoadReport, inherit, load_weights, save_weights

__all__ = [
    "Batch",
    "FeatureModel",
    "LoadReport",
    "Target",
    "Task",
    "TaskModel",
    "build",
    "build_teacher",
    "call_factory",
    "inherit",
    "load_weights",
    "save_weights",
]
