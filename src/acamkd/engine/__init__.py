"""Training and evaluation by Lightning."""

from acamkd.engine.metrics import METRICS, Scorer, score
from acamkd.engine.module import TrainingModule
from acamkd.engine.trainer import CHECKPOINT, Recorder, build_trainer

__all__ = ["CHECKPOINT", "METRICS", "Recorder", "Scorer", "TrainingModule", "build_trainer", "score"]
