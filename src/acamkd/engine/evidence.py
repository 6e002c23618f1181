"""Verdicts on the difference of two networks, over several seeds or of one run; needs no torch."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from acamkd import config

Verdict: TypeAlias = Literal["gain", "no evidence", "harm", "too few seeds"]

LEVEL = 0.05
SEEDS_NEEDED = 3
"""With fewer seeds there is neither gain nor harm."""


def verdict_over_seeds(seeds: int, p: float | None, low: float | None, high: float | None) -> Verdict:
    """Verdict on a mean difference.

    Args:
        seeds: Number of seeds.
        p: Two-sided p, corrected for the number of methods; None with one seed.
        low: Lower end of its 95 % interval over the seeds, in points; None with too few of them.
        high: Its upper end.
    """
    if seeds < SEEDS_NEEDED or p is None or low is None or high is None:
        return "too few seeds"
    if p < LEVEL and low > 0:
        return "gain"
    if p < LEVEL and high < 0:
        return "harm"
    return "no evidence"


@dataclass(frozen=True)
class ImageInterval:
    """95 % interval of the difference of two runs, from resampling the images that both are scored on.

    It holds what the choice of images leaves open. What another seed would change is unknown from one run.

    Attributes:
        low: Lower end, in points.
        high: Upper end.
        images: Number of images.
    """

    low: float
    high: float
    images: int

    @property
    def verdict(self) -> Verdict:
        """`no evidence` if the images alone leave the sign open; otherwise `too few seeds`, which one run always is."""
        return "no evidence" if self.low <= 0 <= self.high else "too few seeds"

    def __str__(self) -> str:
        return f"95 % interval from the {self.images} images alone: {signed(self.low)} to {signed(self.high)}"


def compare_command(recipe: config.Recipe, file: Path | str = "RECIPE", overrides: Sequence[str] = ()) -> str:
    """The command that compares the recipe's method with the baseline over as many seeds as a verdict needs.

    Args:
        recipe: As its author wrote it, or as a run has it.
        file: The author's file. A run's recipe has weights that were measured for one seed.
        overrides: `key=value` assignments that were given with it.
    """
    name = recipe.losses[0].name
    if recipe.compare.methods:
        methods = []
    elif ":" in name:  # a class: only compare.methods can give it a name
        methods = ["--set", f"compare.methods={{{name.rpartition(':')[2].lower()}: {{}}}}"]
    else:
        methods = ["--methods", name]
    given = [word for override in overrides for word in ("--set", override)]
    return shlex.join(["acamkd", "compare", str(file), *methods, "--seeds", str(SEEDS_NEEDED), *given])


def signed(points: float) -> str:
    """A difference with its sign, to the hundredth."""
    return f"{points:+.2f}".replace("-", "\N{MINUS SIGN}")
