"""Score a trained network on validation images."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from acamkd import data
from acamkd.engine.devices import device_of
from acamkd.engine.metrics import score, scorer_of
from acamkd.engine.printing import Printable
from acamkd.engine.runs import Run, as_run

log = logging.getLogger(__name__)


class Scores(dict[str, float], Printable):
    """Every metric by name, in percent; NaN where the images have nothing to score."""

    def __rich__(self) -> Table:
        table = Table("metric", "percent")
        for name, value in self.items():
            table.add_row(escape(name), f"{value:.2f}")
        return table


def evaluate(run: Run | Path | str, *, overrides: Sequence[str] = ()) -> Scores:
    """Score a run's best network on its recipe's validation images.

    Args:
        run: The run, or its folder.
        overrides: `key=value` assignments that change its recipe, such as `data.root=FOLDER`.

    Raises:
        AcamkdError: The run's weights or images are missing or do not fit.
    """
    run = as_run(run, overrides)
    recipe = run.recipe
    images = data.build(recipe.data, recipe.task, "val", seed=recipe.train.seed, augment=False)
    for warning in data.check(images, recipe.data.check):
        log.warning("%s", warning)
    model = run.load().to(device_of(recipe.train))
    batches = data.loader(images, recipe.train.batch_size, recipe.data.workers, shuffle=False, seed=0)
    with data.reading(batches):
        return Scores(score(model, batches, scorer_of(recipe, images.classes)))
