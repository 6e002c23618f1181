"""Score a trained network on validation pictures."""

from __future__ import annotations

import logging

import torch

from acamkd import data
from acamkd.engine.metrics import Scorer, score
from acamkd.engine.runs import Run

log = logging.getLogger(__name__)


def evaluate(run: Run) -> dict[str, float]:
    """Score a run's best network on its recipe's validation pictures.

    Returns:
        Every metric by name, in percent.

    Raises:
        AcamkdError: The run's weights or pictures are missing or do not fit.
    """
    recipe = run.recipe
    pictures = data.build(recipe.data, recipe.task, "val", seed=recipe.train.seed, augment=False)
    for warning in data.check(pictures, recipe.data.check):
        log.warning("%s", warning)
    model = run.load().to("cuda" if torch.cuda.is_available() else "cpu")
    batches = data.loader(pictures, recipe.train.batch_size, recipe.data.workers, shuffle=False, seed=0)
    return score(model, batches, Scorer(recipe.task, pictures.classes))
