from __future__ import annotations

import shlex
from pathlib import Path

import tiny
from acamkd import config
from acamkd.engine.evidence import compare_command
from acamkd.jobs.compare.trials import methods_of, plan


def test_the_command_for_more_seeds_trains_the_recipe_as_it_is(tmp_path: Path) -> None:
    recipe = tiny.recipe(tiny.write_data(tmp_path / "data"), epochs=1)
    name = recipe.losses[0].name
    assert compare_command(recipe) == f"acamkd compare RECIPE --methods {name} --seeds 3"
    assert compare_command(recipe, "my cells.yaml", ["train.epochs=9", "data.root=a b"]) == (
        f"acamkd compare 'my cells.yaml' --methods {name} --seeds 3 --set train.epochs=9 --set 'data.root=a b'"
    )
    several = config.override(recipe, ["compare.methods={one: {}, two: {}}"])
    assert compare_command(several) == "acamkd compare RECIPE --seeds 3"

    own = config.override(recipe, ["losses.0.name=mine.losses:Mine"])
    words = shlex.split(compare_command(own))
    assert words[2:5] == ["RECIPE", "--set", "compare.methods={mine: {}}"]
    loaded = config.override(own, [words[4]])
    none, mine = plan(loaded, methods_of(loaded), 1, tmp_path)
    assert (none.recipe.losses, mine.recipe.losses[0].name) == ((), "mine.losses:Mine")
