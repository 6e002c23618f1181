"""Every method and every official combination, end to end from one recipe."""

from __future__ import annotations

import csv
import math
import sys
from pathlib import Path

import pytest

from acamkd import cli, config
from acamkd.distillation.methods import METHODS, find
from acamkd.errors import AcamkdError
from acamkd.jobs.train import distill
from acamkd.models.base import Task
from tiny_recipes import write_recipe

COMBINATIONS = Path(__file__).parents[2] / "recipes/combinations"

QUERIES = "needs detectors of transformers whose queries start from boxes"
ONLY_QUERIES = {"kddetr": QUERIES, "ld": QUERIES}
ONLY_DETECTION = {"crosskd": "both torchvision RetinaNet", "fgd": "needs boxes, and segmentation has none"}

BOXES = {f"head.regression_head.bbox_reg@{level}/fitnet/feature" for level in range(5)}

TERMS: dict[str, tuple[Task, set[str]]] = {
    "mgd_segmentation": ("segmentation", {"encoder:5/mgd/generation", "segmentation_head.0/cwd/channel"}),
    "crosskd_pkd": (
        "detection",
        {"head/crosskd/classification", "head/crosskd/boxes"}
        | {f"backbone:{level}/pkd/correlation" for level in ("0", "1", "2", "p6", "p7")},
    ),
    "freekd_retinanet": (
        "detection",
        {
            f"backbone:{level}/freekd/{term}"
            for level in ("0", "1", "2", "p6", "p7")
            for term in ("frequency", "feature")
        }
        | BOXES,
    ),
    "maskd_retinanet": (
        "detection",
        {f"backbone:{level}/maskd/masked" for level in ("0", "1", "2", "p6", "p7")} | BOXES,
    ),
}
"""What each combination adds to the loss, and for which task."""


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> dict[Task, Path]:
    tasks: tuple[Task, ...] = ("detection", "segmentation")
    return {task: write_recipe(tmp_path_factory.mktemp(task), task) for task in tasks}


@pytest.mark.parametrize("task", ["detection", "segmentation"])
@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_one_word_of_the_recipe(name: str, task: Task, recipes: dict[Task, Path], tmp_path: Path) -> None:
    recipe = config.load(recipes[task], [f"losses.0.name={name}"])
    refused = ONLY_QUERIES | (ONLY_DETECTION if task == "segmentation" else {})
    if name in refused:
        with pytest.raises(AcamkdError, match=rf"losses\.0 \({name}\): .*{refused[name]}"):
            distill(recipe, out=tmp_path / "run")
        assert not (tmp_path / "run").exists()
        return
    metrics = distill(recipe, out=tmp_path / "run").metrics
    row = last_row(tmp_path / "run")
    distillation = {key: float(value) for key, value in row.items() if f"/{find(name).__name__.lower()}/" in key}
    assert distillation
    assert all(map(math.isfinite, distillation.values()))
    assert sum(distillation.values()) > 0
    total = sum(float(value) for key, value in row.items() if key.startswith("loss/"))
    assert float(row["loss"]) == pytest.approx(total, rel=1e-4)
    assert metrics["student"].keys() == metrics["teacher"].keys()
    assert (tmp_path / "run/student.safetensors").is_file()


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_masks_that_learn_from_the_teachers_loss(task: Task, recipes: dict[Task, Path], tmp_path: Path) -> None:
    overrides = ["losses.0.name=acam", "losses.0.mask_grad=task"]
    distill(config.load(recipes[task], overrides), out=tmp_path / "run")
    row = {key.removeprefix("loss/"): float(value) for key, value in last_row(tmp_path / "run").items()}
    own = {"detection": {"classification", "bbox_regression"}, "segmentation": {"cross_entropy"}}[task]
    assert {key for key in row if key.startswith("teacher/")} == {f"teacher/{name}" for name in own}
    assert all(math.isfinite(row[f"teacher/{name}"]) for name in own)


def test_every_combination_is_tested() -> None:
    assert {file.stem for file in COMBINATIONS.glob("*.yaml")} == set(TERMS)


@pytest.mark.parametrize("name", TERMS)
def test_an_official_combination_replaces_the_losses(
    name: str, recipes: dict[Task, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, terms = TERMS[name]
    command = ["acamkd", "distill", str(recipes[task]), "--losses", str(COMBINATIONS / f"{name}.yaml")]
    monkeypatch.setattr(sys, "argv", [*command, "--out", str(tmp_path / "run"), "--set", "train.seed=3"])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    row = {key.removeprefix("loss/"): float(value) for key, value in last_row(tmp_path / "run").items()}
    assert {key for key in row if key.count("/") == 2} == terms
    assert all(math.isfinite(row[term]) and row[term] > 0 for term in terms)


def last_row(run: Path) -> dict[str, str]:
    with (run / "history.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))[-1]
