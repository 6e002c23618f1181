"""Score a trained network on validation images."""

from __future__ import annotations

import logging

import torch

from acamkd import data
from acamkd.engine.metrics import Scorer, score
from acamkd.engine.runs import Run

log = logging.getLogger(__name__)


def evaluate(run: Run) -> dict[str, float]:
    """Score a run's best network on its recipe's validation images.

    Returns:
        Every metric by name, in percent.

    Raises:
        AcamkdError: The run's weights or images are missing or do not fit.
    """
    recipe = run.recipe
    images = data.build(recipe.data, recipe.task, "val", seed=recipe.train.seed, augment=False)
    for warning in data.check(images, recipe.data.check):
        log.warning("%s", warning)
    model = run.load().to("cuda" if torch.cuda.is_available() else "cpu")
    batches = data.loader(images, recipe.train.batch_size, recipe.data.workers, shuffle=False, seed=0)
    return score(model, batches, Scorer(recipe.task, images.classes))
