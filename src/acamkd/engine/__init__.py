"""Training and evaluation by Lightning."""

from acamkd.engine.metrics import METRICS, Scorer, score
from acamkd.engine.module import TrainingModule
from acamkd.engine.replay import REPLAY, Replay
from acamkd.engine.trainer import CHECKPOINT, Recorder, build_trainer

__all__ = [
    "CHECKPOINT",
    "METRICS",
    "REPLAY",
    "Recorder",
    "Replay",
    "Scorer",
    "TrainingModule",
    "build_trainer",
    "score",
]
