"""Score a trained network on validation or test images."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from rich.markup import escape
from rich.table import Table

from acamkd import data
from acamkd.engine.devices import device_of
from acamkd.engine.metrics import score, scorer_of
from acamkd.engine.printing import Printable
from acamkd.engine.runs import Run, as_run
from acamkd.errors import AcamkdError, check_word

log = logging.getLogger(__name__)


class Scores(dict[str, float], Printable):
    """Every metric by name, in percent; NaN if it is undefined on these images."""

    def __rich__(self) -> Table:
        table = Table("metric", "percent")
        for name, value in self.items():
            table.add_row(escape(name), f"{value:.2f}")
        return table


def evaluate(
    run: Run | Path | str,
    *,
    overrides: Sequence[str] = (),
    split: Literal["val", "test"] = "val",
    epoch: Literal["best", "last"] = "best",
) -> Scores:
    """Score a run's network on its recipe's validation or test images.

    Args:
        run: The run, or its folder.
        overrides: `key=value` assignments that change its recipe, such as `data.root=FOLDER`.
        split: `val`, or the recipe's `data.test`.
        epoch: The epoch with the best score on the validation images, or the last one, from the run's checkpoint.

    Returns:
        A dictionary of every metric in percent: `mAP` or `mIoU` first, then those of sizes and classes.

    Raises:
        AcamkdError: The run's weights or images are missing or do not fit, or the recipe has no `data.test`.
    """
    check_word("split", split, ("val", "test"))
    check_word("epoch", epoch, ("best", "last"))
    run = as_run(run, overrides)
    recipe = run.recipe
    if split not in recipe.data.splits:
        raise AcamkdError(f"the recipe {recipe.name} has no `data.test`: name images there that no training has seen")
    images = data.build(recipe.data, recipe.task, split, seed=recipe.train.seed, augment=False)
    for warning in data.check(images, recipe.data.check):
        log.warning("%s", warning)
    model = (run.load() if epoch == "best" else run.load_last()).to(device_of(recipe.train))
    batches = data.loader(images, recipe.train.batch_size, recipe.data.workers, shuffle=False, seed=0)
    with data.reading(batches):
        return Scores(score(model, batches, scorer_of(recipe, images.classes)))
