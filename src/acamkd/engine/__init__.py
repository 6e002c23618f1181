"""Training and evaluation by Lightning."""

from acamkd.engine.checkpoint import find_checkpoint
from acamkd.engine.metrics import METRICS, Scorer, score
from acamkd.engine.module import TrainingModule
from acamkd.engine.replay import REPLAY, Replay
from acamkd.engine.trainer import Recorder, build_trainer
from acamkd.runs import TERMINATED

__all__ = [
    "METRICS",
    "REPLAY",
    "TERMINATED",
    "Recorder",
    "Replay",
    "Scorer",
    "TrainingModule",
    "build_trainer",
    "find_checkpoint",
    "score",
]
