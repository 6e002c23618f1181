"""Relate what a method brings on each image of the report split to the image's share of foreground.

    python -m studies.generality.by_image RUNS voc07mini acam pkd    # or none, fitnet-8, ...

It pairs the finished trials of both methods in `few` by seed, and adds a row to by_image.csv, which tables.py shows.
A trial's run folder is RUNS/runs/generality-TASK/compare/METHOD-seedN-KEY. It keeps the weights of the epoch that
validated best, so that these scores are not those of the last epoch.
"""

from __future__ import annotations

import argparse
import csv
import os
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from studies.generality.plan import BY_IMAGE, TASKS, Item

from acamkd import data
from acamkd.engine.metrics import METRICS, score, scorer_of
from acamkd.engine.runs import Run, open_run
from acamkd.models.base import VOID, PixelSize, Target

HEAD = ("task", "method", "against", "seeds", "images", "rho", "p", "first third", "second third", "last third")


def share_of_foreground(target: Target, size: PixelSize, background: int | None) -> float:
    """Share of an image in boxes, or in known classes other than the background.

    Args:
        target: Of the image, in its own pixels.
        size: (height, width).
        background: The background's id in a mask.
    """
    if "mask" in target:
        known = target["mask"] != VOID
        return float((known & (target["mask"] != background)).sum() / known.sum().clamp_min(1))
    covered = torch.zeros(size)
    for left, top, right, bottom in target["boxes"].round().long().tolist():
        covered[top:bottom, left:right] = 1
    return float(covered.mean())


def per_image(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Each image's score of its own, in percent, and its share of foreground; both (images,)."""
    recipe = run.recipe
    assert recipe.data.test is not None  # every recipe of the study has its report split there
    images = data.build(
        recipe.data.model_copy(update={"val": recipe.data.test}), recipe.task, "val", seed=0, augment=False
    )
    if recipe.task == "segmentation" and "background" not in images.classes:
        raise SystemExit(f"{recipe.name} has no class `background`, so that all of each image is foreground")
    background = images.classes.index("background") if recipe.task == "segmentation" else None
    model, scorer = run.load(), scorer_of(recipe, images.classes)
    scores, shares = [], []
    for batch in data.loader(images, 1, 0, shuffle=False, seed=0):
        scores.append(score(model, [batch], scorer)[METRICS[recipe.task]])
        (image,), (target,) = batch
        shares.append(share_of_foreground(target, (image.shape[-2], image.shape[-1]), background))
    return np.array(scores), np.array(shares)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("method")
    parser.add_argument("other")
    arguments = parser.parse_args()
    item = Item(arguments.task, "few", (arguments.method, arguments.other))
    os.chdir(arguments.runs)
    ended = {
        (trial.method, trial.seed): trial.folder
        for trial in item.trials()
        if Run(trial.folder, trial.recipe, "student").has_ended
    }
    seeds = [seed for seed in item.seeds if all((name, seed) in ended for name in (arguments.method, arguments.other))]
    if not seeds:
        raise SystemExit(f"no seed of {arguments.method} and {arguments.other} has ended in {Path('runs').resolve()}")
    differences = []
    for seed in seeds:
        (ones, shares), (others, _) = (
            per_image(open_run(ended[name, seed])) for name in (arguments.method, arguments.other)
        )
        differences.append(ones - others)
    difference = np.mean(differences, axis=0)
    known = ~np.isnan(difference)
    found = stats.spearmanr(shares[known], difference[known])
    thirds = np.array_split(difference[known][np.argsort(shares[known])], 3)
    row = [
        arguments.task, arguments.method, arguments.other, " ".join(map(str, seeds)), int(known.sum()),
        f"{found.statistic:+.2f}", f"{found.pvalue:.3f}", *(f"{third.mean():+.2f}" for third in thirds),
    ]  # fmt: skip
    add(BY_IMAGE, [str(cell) for cell in row])


def add(file: Path, row: list[str]) -> None:
    """Add a row to the table, in the place of an earlier one of the same task, methods and seeds."""
    rows = list(csv.reader(file.open(encoding="utf-8")))[1:] if file.is_file() else []
    rows = sorted([*(each for each in rows if each[:4] != row[:4]), row])
    with file.open("w", newline="", encoding="utf-8") as lines:
        csv.writer(lines, lineterminator="\n").writerows([HEAD, *rows])
    print(dict(zip(HEAD, row, strict=True)))


if __name__ == "__main__":
    main()
