from __future__ import annotations

import json
import logging
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tiny
from acamkd import config
from acamkd.engine.evidence import ImageInterval, signed
from acamkd.engine.runs import Run
from acamkd.errors import AcamkdError
from acamkd.jobs import run_all
from acamkd.jobs.doctor import Finding
from acamkd.jobs.run_all import RunAll, run
from acamkd.jobs.train import distill, train


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> config.Recipe:
    """A teacher without weights, one epoch, and a test split; runs go to the test's own folder."""
    monkeypatch.chdir(tmp_path)
    raw = tiny.raw_recipe(tiny.write_data(tmp_path / "data"), epochs=1)
    raw["teacher"]["weights"] = None
    raw["losses"] = [{"name": "pkd", "pairs": ["segmentation_head.0"], "weight": 1}]
    raw["data"]["test"] = raw["data"]["val"]
    return config.parse(raw)


@pytest.mark.usefixtures("reports")
def test_everything_is_trained_once_and_resumed_where_it_stopped(
    recipe: config.Recipe, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(AcamkdError, match="the doctor found that distilling would be worthless"):
        run(recipe)  # a teacher of one epoch
    runs = Path("runs/tiny")
    assert sorted(folder.name for folder in runs.iterdir() if folder.is_dir()) == ["teacher"]
    trained = (runs / "teacher/teacher.safetensors").stat().st_mtime_ns
    with monkeypatch.context() as patch:
        tiny.interrupt_at(patch, 0, 1)
        with pytest.raises(KeyboardInterrupt):
            run(recipe, anyway=True)
    names = recipe.data.root / "images/train"
    with monkeypatch.context() as patch:
        patch.setattr(run_all, "distill", lambda *_given, **_more: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(recipe, anyway=True)
    added = shutil.copy(next(names.iterdir()), names / "added.png")
    mask = shutil.copy(next((recipe.data.root / "masks/train").iterdir()), recipe.data.root / "masks/train/added.png")
    with pytest.raises(
        AcamkdError, match=r"the train images, .* have changed since runs.tiny.teacher was trained: --set"
    ):
        run(recipe, anyway=True)
    Path(added).unlink()
    Path(mask).unlink()
    result = run(recipe, anyway=True)
    assert result.more_seeds == "acamkd compare RECIPE --methods pkd --seeds 3"
    assert (runs / "teacher/teacher.safetensors").stat().st_mtime_ns == trained
    assert result.scores["baseline"] == Run(runs / "baseline", recipe, "student").metrics["student"]["mIoU"]
    assert result.scores["distilled"] == Run(runs / "distilled", recipe, "student").metrics["student"]["mIoU"]
    assert result.test == pytest.approx(result.scores)  # the same images
    assert result.gain == pytest.approx(result.scores["distilled"] - result.scores["baseline"])
    assert result.report.is_file()
    assert " ".join(str(result).split()).endswith(result.verdict)
    assert result.verdict.startswith(f"gain {signed(result.gain)} mIoU on the test images, one seed")

    def never(*_given: Any, **_more: Any) -> Any:
        raise AssertionError("it has ended")

    assert result.interval is not None
    assert result.interval.images == 4
    assert result.interval.low <= result.gain <= result.interval.high
    for name in ("train", "distill", "examine", "examine_data", "evaluate", "write_report", "collect"):
        monkeypatch.setattr(run_all, name, never)
    caplog.set_level(logging.INFO)
    assert run(recipe, anyway=True) == result
    assert caplog.text.count("it has ended, and is not repeated") == 3
    assert set(json.loads((runs / "run.json").read_text())["ended"]) == {"teacher", "baseline", "distilled"}
    monkeypatch.undo()
    monkeypatch.chdir(recipe.data.root.parent)
    with pytest.raises(AcamkdError, match=r"train.seed was 0, is 1.*--set name=OTHER"):
        run(recipe, overrides=["train.seed=1"], anyway=True)

    weights = runs / "baseline/student.safetensors"
    shutil.copy(runs / "distilled/student.safetensors", weights)  # as another training may
    changed = run(recipe, anyway=True)
    assert changed.test["baseline"] == result.test["distilled"] == changed.test["distilled"]
    assert changed.interval == ImageInterval(0, 0, 4)
    monkeypatch.setattr(run_all, "evaluate", lambda *_given, **_more: {"mIoU": math.nan})
    weights.touch()
    for _ in range(2):
        with pytest.raises(AcamkdError, match=r"mIoU of baseline has no basis: check data\.test"):
            run(recipe, anyway=True)


@pytest.mark.usefixtures("reports")
def test_on_several_devices_each_training_is_a_command_of_its_own(
    recipe: config.Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    several = config.override(recipe, ["train.devices=2"])
    given: list[list[str]] = []

    def carry_out(words: list[str]) -> None:
        given.append(words)
        written = config.load(Path(words[1]))
        assert written.train.devices == 2
        alone = config.override(written, ["train.devices=1"])
        assert "--resume" not in words
        done = distill(alone) if words[0] == "distill" else train(alone, "teacher" if "--role" in words else "student")
        (done.folder / "recipe.yaml").write_text(config.dump(config.override(done.recipe, ["train.devices=2"])))

    monkeypatch.setattr(run_all, "carry_out", carry_out)
    result = run(several, anyway=True)
    file = str(Path("runs/tiny/run.yaml"))
    assert given == [["train", file, "--role", "teacher"], ["train", file], ["distill", file]]
    assert result.report.is_file()
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(AcamkdError, match="starts the processes of its trainings itself: start it once"):
        run(several, anyway=True)


def test_what_cannot_be_distilled_is_said_before_anything_is_trained(
    recipe: config.Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(AcamkdError, match="needs a `teacher` section and `losses`"):
        run(recipe, overrides=["losses=[]"])
    for mask in (recipe.data.root / "masks/val").iterdir():
        mask.write_bytes(b"no mask")
    with pytest.raises(AcamkdError, match="the val images cannot be used"):
        run(recipe)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("interval", "words"),
    [
        (ImageInterval(-0.5, 3.0, 80), "no evidence; it may be the choice of images (95 % interval from the 80"),
        (ImageInterval(0.5, 3.0, 80), "too few seeds; it is not the choice of images (95 % interval from the 80"),
        (None, "too few seeds; more seeds are needed"),
    ],
)
def test_the_last_line_says_whether_to_believe_it(
    recipe: config.Recipe, interval: ImageInterval | None, words: str
) -> None:
    scores = {"baseline": 50.0, "distilled": 51.5}
    distilled = Run(Path("runs/tiny/distilled"), recipe, "student")
    result = RunAll(distilled, "mIoU", scores, {}, Path("report.html"), interval, "acamkd compare RECIPE --seeds 3")
    assert result.verdict.startswith(f"gain +1.50 mIoU on the validation images, one seed: {words}")
    assert result.verdict.endswith("more seeds are needed: acamkd compare RECIPE --seeds 3")
    for teacher, is_behind in ((50.0, True), (50.1, False)):
        behind = replace(result, scores={**scores, "teacher": teacher})
        assert behind.verdict.endswith("needed first: 50.00 is not ahead of the baseline's 50.00") is is_behind


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": {"arch": "fpnn"}}, "did you mean fpn"),
        ({"losses": [{"name": "pdk", "pairs": ["segmentation_head.0"]}]}, "did you mean pkd"),
        ({"losses": [{"name": "pkd", "pairs": ["head"]}]}, "no layer"),
        ({"student": {**tiny.FPN, "backbone_weights": "gone.safetensors"}}, "there is no file of weights gone.safe"),
    ],
)
def test_typos_are_told_before_the_teacher_is_trained(
    recipe: config.Recipe, changes: dict[str, Any], message: str
) -> None:
    raw = recipe.model_dump(mode="json") | changes
    with pytest.raises(AcamkdError, match=message):
        run(config.parse(raw))
    assert not Path("runs").exists()


def test_a_wrong_test_split_is_told_before_anything_is_trained(recipe: config.Recipe) -> None:
    with pytest.raises(AcamkdError, match=r"the test images cannot be used, problems: 1, such as cannot read .*tset"):
        run(recipe, overrides=["data.test.images=images/tset"])
    assert not Path("runs").exists()


def test_a_teacher_behind_the_baseline_is_not_distilled_from(
    recipe: config.Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_all, "score_of_run", lambda *_: 12.57)
    baseline = Run(Path("runs/tiny/baseline"), recipe, "student")
    monkeypatch.setattr(run_all, "teacher_section", lambda recipe: recipe.teacher)
    monkeypatch.setattr(run_all, "describe_lead", lambda _recipe, teacher, folder: f"{teacher} behind {folder}")
    with pytest.raises(AcamkdError, match=r"12\.57 behind runs/tiny/baseline: train the teacher longer"):
        run_all._check_lead(recipe, baseline)


def test_the_doctors_warnings_do_not_stop_it(recipe: config.Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    findings = [Finding("colors", "warn", "two", "look"), Finding("tap", "pass", "good")]
    monkeypatch.setattr(run_all, "examine", lambda _recipe: findings)
    run_all._examine(recipe, anyway=False)
    findings.append(Finding("tap", "fail", "constant"))
    run_all._examine(recipe, anyway=True)
    with pytest.raises(AcamkdError, match="tap: constant"):
        run_all._examine(recipe, anyway=False)
