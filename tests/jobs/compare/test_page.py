from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from acamkd import config
from acamkd.jobs.compare.compare import tabulate
from acamkd.jobs.compare.page import write_page
from acamkd.jobs.compare.statistics import summarize
from acamkd.jobs.compare.trials import plan
from browser import Browser
from tiny_recipes import fake, write_recipe

SCORES = {"none": (40.0, 41.0, 42.0), "cwd": (42.0, 43.2, 44.1), "acam": (39.0, 41.5, 42.1)}


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """Of three methods with three seeds; ACAM's spatial masks have collapsed in two of them."""
    recipe, results = config.load(write_recipe(tmp_path, "segmentation")), tmp_path / "results"
    for trial in plan(recipe, list(SCORES), 3, results):
        score = SCORES[trial.method][trial.seed]
        means = {"head/acam/spatial_mask": [0.5, 0.02 if trial.seed else 0.4], "head/acam/spatial_mask_std": [0.2, 0.1]}
        fake(
            trial, results, score, history=[score / 2, score], final={"mIoU": score, "IoU/disc": score + 20},
            masks=means if trial.method == "acam" else {}, test={"mIoU": score - 10}, test_of_best_epoch=score - 9,
        )  # fmt: skip
    tabulate(recipe, list(SCORES), 3, results)
    return results / "comparison.html"


def test_the_page_says_what_the_table_says(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    rows = {row["method"]: row for row in json.loads(page.with_suffix(".json").read_text())["rows"]}
    assert rows["cwd"]["verdict"] == "gain"
    assert f'<b class="good">+{rows["cwd"]["gain"]["mean"]:.2f}</b>' in text
    for row in rows.values():
        assert f'{row["mean"]:.2f} <span class="soft">± {row["std"]:.2f}</span>' in text
    section = text.partition("<h2>Test images</h2>")[2].partition("</table>")[0]
    assert [cells in section for cells in ("<td>33.10 ", "<td>34.10 ", "+1.85 to +2.35")] == [True] * 3
    assert "by seed +2.00, +2.20, +2.10" in text
    assert "acam, spatial masks: 2 of 3 sets collapsed at the end." in text
    assert "recipe: 3 methods compared" in text
    assert "c" * 64 in text


def test_no_two_of_many_methods_look_alike(tmp_path: Path) -> None:
    recipe, results = config.load(write_recipe(tmp_path, "segmentation")), tmp_path / "results"
    methods = [f"m{number}" for number in range(18)]
    recipe = config.override(recipe, [f"compare.methods={json.dumps({name: {} for name in methods})}"])
    for trial in plan(recipe, methods, 1, results):
        fake(trial, results, 40.0, history=[20.0, 40.0])
    tabulate(recipe, methods, 1, results)
    text = (results / "comparison.html").read_text(encoding="utf-8")
    chart = text.partition('class="charts broad"')[2].partition("</figure>")[0]
    curves = re.findall(r'class="curve (\S*)" d="[^"]+" stroke="var\((\S+)\)"><title>', chart)
    swatches = re.findall(r'<i class="(\S*)" style="color: var\((\S+)\)"></i>', chart)
    dots = re.findall(r'<i class="dot (\S*)" style="color: var\((\S+)\)"></i>', text)
    assert len(curves) == len(set(curves)) == 19
    assert swatches == curves
    assert set(dots) == set(curves)


def test_a_browser_opens_it_and_fetches_nothing(page: Path, browser: Browser) -> None:
    browser.requests()
    for width, scheme in ((1100, "light"), (1100, "dark"), (390, "light")):
        browser.open(page, width=width, scheme=scheme)
        assert browser.console() == []
        assert browser.run("return document.documentElement.scrollWidth") == width
        ratio, text = browser.faintest()
        assert ratio >= 4.5, (scheme, text)
        browser.shoot(f"comparison-{scheme}-{width}")
    assert browser.requests() == [page.as_uri()] * 3


def test_a_teacher_of_other_classes_has_no_score(tmp_path: Path) -> None:
    recipe, results = config.load(write_recipe(tmp_path, "segmentation")), tmp_path / "results"
    for trial in plan(recipe, ["none", "acam"], 2, results):
        fake(trial, results, 40.0, teacher=None if trial.method == "none" else {"sha256": "d" * 64, "mIoU": None})
    tabulate(recipe, ["none", "acam"], 2, results)
    assert "Teacher: without a score (SHA-256 dddddddddddd)" in (results / "comparison.md").read_text()
    page = (results / "comparison.html").read_text(encoding="utf-8")
    assert '<h3>teacher</h3><div class="score number">\N{EN DASH} ' in page


def test_a_method_with_a_teacher_of_its_own(tmp_path: Path) -> None:
    recipe, results = config.load(write_recipe(tmp_path, "segmentation")), tmp_path / "results"
    methods = ["none", "cosine", "acam"]
    compared = config.Comparison(methods={"cosine": {"teacher.backbone": "resnet18"}, "acam": {}})
    known = recipe.model_copy(update={"compare": compared})
    teachers = {"none": None, "cosine": {"sha256": "e" * 64, "mIoU": None}, "acam": {"sha256": "d" * 64, "mIoU": 51.5}}
    for trial in plan(known, methods, 2, results):
        fake(trial, results, 40.0, teacher=teachers[trial.method])
    tabulate(known, methods, 2, results)
    tables = (results / "comparison.md").read_text()
    assert "Teacher of `acam`: 51.50 (SHA-256 dddddddddddd)" in tables
    assert "Teacher of `cosine`: without a score (SHA-256 eeeeeeeeeeee)" in tables
    page = (results / "comparison.html").read_text(encoding="utf-8")
    assert '<h3>teacher</h3><div class="score number">51.50 ' in page
    assert "e" * 64 in page


@pytest.mark.parametrize("source", ["uniform", "cooperative"])
def test_masks_that_are_ones_by_design_have_not_collapsed(source: str, tmp_path: Path) -> None:
    overrides = ["losses.0.name=acam", f"losses.0.mask_source={source}"]
    recipe, results = config.load(write_recipe(tmp_path, "segmentation"), overrides), tmp_path / "results"
    masks = {"head/acam/spatial_mask": [1.0], "head/acam/spatial_mask_std": [0.0]}
    for trial in plan(recipe, ["acam"], 1, results):
        fake(trial, results, 40.0, masks=masks if trial.method == "acam" else {})
    tabulate(recipe, ["acam"], 1, results)
    page = (results / "comparison.html").read_text(encoding="utf-8")
    assert ("Masks have collapsed" in page) == (source == "cooperative")


def test_masks_of_a_loss_that_stopped_are_judged_by_their_last_epoch(tmp_path: Path) -> None:
    recipe, results = config.load(write_recipe(tmp_path, "segmentation")), tmp_path / "results"
    masks = {"head/acam/spatial_mask": [0.5, 0.05, None], "head/acam/spatial_mask_std": [0.2, 0.1, None]}
    for trial in plan(recipe, ["acam"], 1, results):
        fake(trial, results, 40.0, history=[40.0] * 3, masks=masks if trial.method == "acam" else {})
    tabulate(recipe, ["acam"], 1, results)
    page = (results / "comparison.html").read_text(encoding="utf-8")
    assert "collapsed" in page
    assert "nan" not in page
    assert "| `acam` | spatial | 0.5, 0.05, 0.05 | 0.2, 0.1, 0.1 |" in (results / "comparison.md").read_text()


@pytest.mark.parametrize("methods", [["none"], ["acam"], ["none", "acam"]])
def test_a_page_of_what_is_there(methods: list[str], tmp_path: Path) -> None:
    recipe = config.load(write_recipe(tmp_path, "segmentation"))
    results = tmp_path / "results"
    trials: list[dict[str, Any]] = []
    for trial in plan(recipe, ["acam"], 1, results):
        fake(trial, results, 40.0)
        found = trial.read(results)
        assert found is not None
        trials += [found] if trial.method in methods else []
    write_page(tmp_path / "page.html", recipe, summarize(trials), trials)
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert ("too few seeds" in text) == (len(methods) == 2)
    assert ("Against the baseline" in text) == (len(methods) == 2)
