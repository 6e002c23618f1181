from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest

from acamkd import config
from acamkd.errors import AcamkdError
from acamkd.jobs.compare import trials_csv
from acamkd.jobs.compare.compare import tabulate
from acamkd.jobs.compare.trials import plan
from tiny_recipes import fake, write_recipe

MASKS: dict[str, list[float | None]] = {
    "head/acam/channel_mask": [0.5, 0.4, None, 0.3, None],  # of a loss that stopped after epoch 4
    "head/acam/channel_mask_std": [0.1, None, 0.2, 0.12345678901234567, None],
    "head/acam/spatial_mask": [math.nan, 0.25, -0.0, 1e-05, 1.0],
}


@pytest.fixture
def recipe(tmp_path: Path) -> config.Recipe:
    return config.load(write_recipe(tmp_path, "segmentation", compare={"tune": {"values": [0.5, 2]}}), [
        "losses.0.name=acam", "losses.0.weight=auto",
    ])  # fmt: skip


def trial(**changes: Any) -> dict[str, Any]:
    """What a trial leaves behind, with values that tables and CSV files like least."""
    return {
        "method": "acam", "setting": 0.5, "option": "gradient_ratio", "seed": 3, "recipe": "0123456789ab",
        "losses": [{"name": "studies.masks.variants:Shuffled", "pairs": ["backbone:*", ["a", "b"]], "weight": 1e-05}],
        "data": {"train": "0123", "val": "1e5", "unlabeled": "null"}, "inherited": "9" * 64,
        "teacher": {"sha256": "1" * 64, "mIoU": None}, "metric": "mIoU",
        "history": [None, 41.5, None, math.nan, 1 / 3],
        "final": {"mIoU": 1 / 3, 'IoU/sky, "clear"': 0.0, "IoU/pole\nor post": None, "IoU/a/b=c; d": math.nan},
        "masks": {}, "wall_time": 314.3, "versions": {"torch": "2.10"}, "processes": 1, "cpu_time": 99.5,
        "test": {"mIoU": 1 / 7, "IoU/a, b": None}, "test_of_best_epoch": 0.25,
        "machine": "x86_64, AVX2, 1 thread", **changes,
    }  # fmt: skip


def same(found: Any, expected: Any) -> bool:
    """Equal to the last digit, NaN being NaN."""
    return repr(found) == repr(expected)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    awkward = {
        "acam-seed3": trial(masks=MASKS),
        "none-seed0": trial(
            method="none", setting=None, option=None, inherited=None, teacher=None, losses=[], processes=None,
            data={"train": "a", "val": "b"}, history=[7, 8], final={"mIoU": 8}, machine="", test=None,
            test_of_best_epoch=None,
        ),
    }  # fmt: skip
    file = tmp_path / "trials.csv"
    trials_csv.write(file, {tmp_path.name: awkward})
    found = trials_csv.comparisons(file)[tmp_path.name]
    assert list(found) == ["acam-seed3", "none-seed0"]
    acam, none = found.values()
    for key in ("setting", "option", "seed", "losses", "data", "teacher", "metric", "history", "final", "wall_time",
                "versions", "processes", "machine", "inherited", "recipe", "test",
                "test_of_best_epoch", "cpu_time"):  # fmt: skip
        assert same(acam[key], awkward["acam-seed3"][key]), key
    assert (none["setting"], none["option"], none["teacher"], none["inherited"]) == (None, None, None, None)
    assert (none["test"], none["test_of_best_epoch"]) == ({}, None)
    assert (none["losses"], none["masks"], none["history"], none["final"]) == ([], {}, [7, 8], {"mIoU": 8})
    with file.open(newline="") as lines:
        assert [row["trial"] for row in csv.DictReader(lines)] == ["acam-seed3", "none-seed0"]
    trials_csv.write(tmp_path / "again.csv", {tmp_path.name: found})
    assert (tmp_path / "again.csv").read_text() == file.read_text()
    (tmp_path / "older.csv").write_text(file.read_text().replace("data/unlabeled", "data/unlabelled"))
    assert repr(trials_csv.comparisons(tmp_path / "older.csv")[tmp_path.name]) == repr(found)


def test_of_masks_three_epochs_are_kept(tmp_path: Path) -> None:
    trials_csv.write(
        tmp_path / "trials.csv", {"a": {"acam-seed0": trial(masks={**MASKS, "head/acam/x_mask": [None] * 5})}}
    )
    masks = trials_csv.comparisons(tmp_path / "trials.csv")["a"]["acam-seed0"]["masks"]
    assert same(masks, {
        "head/acam/channel_mask": [0.5, None, None, 0.3, None],  # the middle of four epochs is the third
        "head/acam/channel_mask_std": [0.1, None, 0.2, 0.12345678901234567, None],
        "head/acam/spatial_mask": [math.nan, None, -0.0, None, 1.0],
        "head/acam/x_mask": [None] * 5,
    })  # fmt: skip


def test_only_the_losses_own_keys_are_kept(tmp_path: Path, recipe: config.Recipe) -> None:
    loss = recipe.losses[0].model_dump(mode="json")
    trials_csv.write(tmp_path / "trials.csv", {"a": {"acam-seed0": trial(losses=[loss])}})
    [kept] = trials_csv.comparisons(tmp_path / "trials.csv")["a"]["acam-seed0"]["losses"]
    assert kept == {"name": "acam", "pairs": ["segmentation_head.0"], "weight": "auto"}
    assert config.Loss(**kept) == recipe.losses[0]


def finish(recipe: config.Recipe, results: Path, offset: float = 0.0) -> None:
    for each in plan(recipe, ["acam"], 3, results):
        score = 40.0 + 2 * (each.method == "acam") + 1.3 * (each.seed % 7) + (each.setting == 2) + offset
        history = [score / 2, None, None, score / 3, score]
        named = {f"head/acam/spatial_mask{name}": [0.1 * each.seed, 0.5, 0.4, 0.7 / 3, 0.2] for name in ("", "_std")}
        fake(
            each, results, score, history=history, final={"mIoU": score, "IoU/a, b": score / 7, "IoU/c": None},
            masks=named if each.method == "acam" else {},
        )  # fmt: skip
    assert [each.setting for each in plan(recipe, ["acam"], 3, results)][-1] == 2


def test_tables_need_the_csv_alone(recipe: config.Recipe, tmp_path: Path) -> None:
    results = tmp_path / "results"
    finish(recipe, results)
    finish(recipe, results)  # now that the tuning has decided, with the setting
    rows = tabulate(recipe, ["acam"], 3, results).rows
    before = {name: (results / f"comparison.{name}").read_text() for name in ("md", "json")}
    assert "## Tuning" in before["md"]
    assert "| `acam` | spatial |" in before["md"]
    assert trials_csv.export(results) == results / "trials.csv"
    for file in results.glob("*-seed*.json"):
        file.unlink()
    assert tabulate(recipe, ["acam"], 3, results).rows == rows
    assert before == {name: (results / f"comparison.{name}").read_text() for name in before}
    # A trial that is run anew counts before its row, and goes into the table again.
    last = plan(recipe, ["acam"], 3, results)[-1]
    fake(last, results, 60.0)
    found = last.read(results)
    assert found is not None
    assert found["history"] == [60.0]
    trials_csv.export(results)
    (results / f"{last.name}.json").unlink()
    assert last.read(results) is not None
    assert same(last.read(results), {**trials_csv.stored(results)[last.name]})
    assert len((results / "trials.csv").read_text().splitlines()) == 1 + len(plan(recipe, ["acam"], 3, results))
    assert config.override(recipe, ["train.epochs=9"]) != recipe
    assert plan(config.override(recipe, ["train.epochs=9"]), ["acam"], 3, results)[-1].read(results) is None  # stale


def test_a_folder_of_the_first_version_opens(recipe: config.Recipe, tmp_path: Path) -> None:
    """It knew neither of the option nor of processes and inherited weights."""
    results = tmp_path / "results"
    finish(recipe, results)
    finish(recipe, results)
    for file in results.glob("*-seed*.json"):
        content = json.loads(file.read_text())
        if content["seed"] < 1000:
            del content["option"]
            file.write_text(json.dumps(content))
    rows = tabulate(recipe, ["acam"], 3, results).rows
    trials_csv.export(results)
    for file in results.glob("*-seed*.json"):
        file.unlink()
    assert tabulate(recipe, ["acam"], 3, results).rows == rows


def test_a_table_can_hold_several_comparisons(recipe: config.Recipe, tmp_path: Path) -> None:
    study = tmp_path / "study"
    study.mkdir()
    for name, offset in (("first", 0.0), ("second", 5.0)):
        for _ in range(2):
            finish(recipe, tmp_path / name, offset)
    found = {
        name: {file.stem: json.loads(file.read_text()) for file in (tmp_path / name).glob("*-seed*.json")}
        for name in ("first", "second")
    }
    trials_csv.write(study / "trials.csv", found)
    means = {name: tabulate(recipe, ["acam"], 3, study / name).rows[0].mean for name in found}
    assert means["second"] == pytest.approx(means["first"] + 5)
    assert (study / "second/comparison.md").is_file()
    with pytest.raises(AcamkdError, match=r"holds no trial .* holds: .*study/first, .*study/second"):
        tabulate(recipe, ["acam"], 3, study)
    # What is added to one of them goes into the common table and leaves the other.
    last = plan(recipe, ["acam"], 3, study / "second")[-1]
    fake(last, study / "second", 70.0)
    assert trials_csv.export(study / "second") == study / "trials.csv"
    assert trials_csv.stored(study / "second")[last.name]["history"] == [70.0]
    assert trials_csv.stored(study / "first").keys() == found["first"].keys()
    assert trials_csv.stored(tmp_path / "third") == {}


@pytest.mark.parametrize(("text", "message"), [
    ("a,b\n1,2\n", "is no table of trials: it lacks the columns epochs, history, .*`acamkd compare --csv` writes one"),
    ("trial,method,seed,recipe,metric,epochs,history\nx-seed0,x,0,k,mIoU,two,1:3\n", r"row 2 \(x-seed0\) cannot be"),
    ("trial,method,seed,recipe,metric,epochs,history\n<<<<<<< HEAD\n", r"row 2 \(<<<<<<< HEAD\) cannot be"),
    ("trial,method,seed,recipe,metric,epochs,history\nx-seed0,x,0,k,mIoU,2\n", r"row 2 \(x-seed0\) cannot be"),
    ("trial,method,seed,recipe,metric,epochs,history\nx-seed0,x,0,k,mIoU,1,1:3,4\n", r"row 2 \(x-seed0\) cannot be"),
    ("trial,method,seed,recipe,metric,epochs,history\nx-seed0,x,0,k,mIoU,2,3:3\n", r"row 2 \(x-seed0\) cannot be"),
])  # fmt: skip
def test_a_bad_table_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "trials.csv").write_text(text)
    with pytest.raises(AcamkdError, match=message):
        trials_csv.stored(tmp_path)


def test_nothing_to_gather_is_said(tmp_path: Path) -> None:
    with pytest.raises(AcamkdError, match="holds no finished trial: run `acamkd compare` first"):
        trials_csv.export(tmp_path)
