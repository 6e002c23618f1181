"""Detectors and segmenters behind one contract, TaskModel."""

from acamkd.models.base import Batch, Target, Task, TaskModel
from acamkd.models.build import build, call_factory
from acamkd.models.weights import LoadReport, inherit, load_weights, save_weights

__all__ = [
    "Batch",
    "LoadReport",
    "Target",
    "Task",
    "TaskModel",
    "build",
    "call_factory",
    "inherit",
    "load_weights",
    "save_weights",
]
