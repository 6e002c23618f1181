from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import tiny
from acamkd import cli, config
from acamkd.distillation.methods import options
from acamkd.errors import AcamkdError
from acamkd.jobs.compare import compare
from acamkd.jobs.compare.compare import run_trial, run_trials, tabulate
from acamkd.jobs.compare.trials import Trial, plan
from acamkd.jobs.setup import Batches
from command import Command
from tiny_recipes import fake, write_recipe

METHODS = {"acam": {"losses.0.name": "acam", "losses.0.num_masks": 2}, "longer": {"losses": [], "train.epochs": 2}}


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_recipe(tmp_path, "segmentation", compare={"methods": METHODS})


def names(trials: list[Trial]) -> list[str]:
    return [trial.name for trial in trials]


def test_a_plan_goes_seed_by_seed_with_the_student_alone(recipe: Path, tmp_path: Path) -> None:
    trials = plan(config.load(recipe), ["acam", "cwd", "acam", "longer"], 2, tmp_path)
    assert names(trials) == [
        "none-seed0", "acam-seed0", "cwd-seed0", "longer-seed0",
        "none-seed1", "acam-seed1", "cwd-seed1", "longer-seed1",
    ]  # fmt: skip
    none, acam, cwd, longer = (trial.recipe for trial in trials[:4])
    assert none.losses == ()
    assert acam.losses[0].options == {"num_masks": 2}
    assert (cwd.losses[0].name, cwd.losses[0].options, cwd.losses[0].pairs) == ("cwd", {}, ("segmentation_head.0",))
    assert longer.losses == ()
    assert longer.train.epochs == 2
    with pytest.raises(AcamkdError, match=r"there is no method 'akam' to compare; .*acam"):
        plan(config.load(recipe), ["akam"], 1, tmp_path)
    with pytest.raises(AcamkdError, match=r"train\.epoch: unknown key"):
        plan(config.load(recipe, ["compare.methods={x: {train.epoch: 3}}"]), ["x"], 1, tmp_path)


def test_a_trial_knows_what_its_outcome_depends_on(recipe: Path, tmp_path: Path) -> None:
    def key(*overrides: str) -> str:
        return plan(config.load(recipe, overrides), ["acam"], 1, tmp_path)[1].key

    same = ["data.root=/elsewhere", "data.workers=3", "train.seed=5", "teacher.weights=other.safetensors", "name=x",
            "compare.methods.other={losses: []}", "student.backbone_weights=null", "train.devices=2",
            "train.loggers=[csv, tensorboard]"]  # fmt: skip
    assert {key(), *map(key, same)} == {key()}
    more = "compare.methods.acam={losses.0.name: acam, losses.0.num_masks: 3}"
    for change in ("train.epochs=3", more, "student.options={}", "data.resize=[32, 32]"):
        assert key(change) != key(), change
    fixed = "compare.methods.acam={{losses.0.name: acam, losses.0.mask_source: fixed, losses.0.tokens: {}}}"
    for override in ("student.backbone_weights={}", "student.weights={}", fixed):
        files = [key(override.format(f"{name}.safetensors")) for name in ("a/lite0", "b/lite0", "b/lite1")]
        assert files[0] == files[1] != files[2]
        assert key() not in files
    assert key("data.unlabelled=more") == key("data.unlabeled=more") != key()
    study = config.load(Path(__file__).parents[3] / "studies/camvid_few/recipe.yaml")
    assert plan(study, ["acam"], 1, tmp_path)[-1].key == "bbaa80f6eb81"  # as before the key had today's spelling


def test_tuning_comes_first_and_decides(recipe: Path, tmp_path: Path) -> None:
    tuned = config.load(recipe, ["compare.tune={option: weight, values: [0.5, 2], seeds: 2}"])
    results = tmp_path / "results"
    trials = plan(tuned, ["acam"], 1, results)
    assert names(trials) == [
        "acam-0.5-seed1000", "acam-0.5-seed1001", "acam-2-seed1000", "acam-2-seed1001", "none-seed0", "acam-seed0",
    ]  # fmt: skip
    with pytest.raises(AcamkdError, match=r"acam-seed0 needs the tuning .* missing: acam-0\.5-seed1000, acam-0"):
        run_trial(trials, 5, results)
    (tmp_path / "file").touch()
    with pytest.raises(AcamkdError, match=r"cannot write .*file/results: .*; --results DIR writes elsewhere"):
        run_trial(trials, 0, tmp_path / "file/results")  # before it trains
    for trial, score in zip(trials[:4], (40.0, 44.0, 41.0, 44.0), strict=True):
        fake(trial, results, score)
    final = plan(tuned, ["acam"], 1, results)[5]
    assert (final.setting, final.recipe.losses[0].options["weight"]) == (2.0, 2.0)
    assert trials[2].recipe.losses[0].options["weight"] == 2.0


def test_whole_numbers_tune_options_of_both_kinds(recipe: Path, tmp_path: Path) -> None:
    def tuned(option: str) -> Trial:
        loaded = config.load(recipe, [f"compare.tune={{option: {option}, values: [3, 6]}}"])
        return plan(loaded, ["acam"], 1, tmp_path)[0]

    (loss,) = tuned("num_masks").recipe.losses
    assert options(loss.name, loss.preset, loss.options) == {"num_masks": 3}
    (loss,) = tuned("weight").recipe.losses
    assert options(loss.name, loss.preset, loss.options) == {"num_masks": 2, "weight": 3.0}
    written = {"losses.0.name": "acam", "losses.0.num_masks": 2, "losses.0.weight": 3.0}
    by_hand = plan(config.load(recipe, [f"compare.methods.acam={json.dumps(written)}"]), ["acam"], 1, tmp_path)[1]
    assert tuned("weight").key == by_hand.key


def test_the_tables_tell_what_the_tuning_found(recipe: Path, tmp_path: Path) -> None:
    tuned = config.load(recipe, ["compare.tune={option: weight, values: [0.5, 2, 8], seeds: 2}"])
    results = tmp_path / "results"
    scores = {"acam-0.5": 43.0, "acam-2": 41.5, "cwd-0.5": 40.0, "cwd-2": 41.25}
    for trial in plan(tuned, ["acam", "cwd"], 1, results):
        name = trial.name.rpartition("-")[0]
        if trial.tuning and name in scores:
            fake(trial, results, scores[name] + trial.seed - 1000)
    for trial in plan(tuned, ["acam", "cwd"], 1, results):
        if not trial.tuning:
            fake(trial, results, 40.0, setting=None)  # as if it had been run before the tuning
    tabulate(tuned, ["acam", "cwd"], 1, results)
    text = (results / "comparison.md").read_text()
    assert "mIoU by `weight`, on seeds that the table above does not use: 1000, 1001." in text
    assert "| method | 0.5 | 2 |\n|---|---|---|\n| `acam` | **43.50** | 42.00 |\n| `cwd` | 40.50 | **41.75** |" in text
    assert "| `acam` | 0.5 | 1 | 40.00 |" in text
    tuning = json.loads((results / "comparison.json").read_text())["tuning"]
    assert tuning == {
        "option": "weight", "settings": [0.5, 2.0], "seeds": [1000, 1001],
        "means": {"acam": {"0.5": 43.5, "2.0": 42.0}, "cwd": {"0.5": 40.5, "2.0": 41.75}},
    }  # fmt: skip
    page = (results / "comparison.html").read_text(encoding="utf-8")
    assert '<tr><th scope="row">cwd</th><td>40.50</td><td><b>41.75</b></td></tr>' in page
    assert "mean over seeds 1000, 1001" in page


def test_a_search_that_would_change_nothing_is_refused(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(AcamkdError, match=r"gradient_ratio, which acts only on .*`weight: auto`, and acam has none"):
        plan(config.load(recipe, ["compare.tune={}"]), ["acam"], 1, tmp_path)
    assert len(plan(config.load(recipe, ["compare.tune={}", "losses.0.weight=auto"]), ["fitnet"], 1, tmp_path)) == 5


@pytest.mark.parametrize("name", ["acam/few", "fitnet,cwd", ""])
def test_a_methods_name_is_one_that_files_can_have(recipe: Path, name: str) -> None:
    with pytest.raises(AcamkdError, match=r"compare\.methods.*cannot name files"):
        config.load(recipe, [f"compare.methods={json.dumps({name: {}})}"])


def test_a_stopped_trial_whose_images_have_moved_begins_anew(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    results = tmp_path / "results"
    trial, moved = (
        plan(config.load(recipe, ["train.epochs=2", *more]), ["acam"], 1, results)[1]
        for more in ((), (f"data.root={tmp_path / 'moved'}",))
    )
    with monkeypatch.context() as patched:
        tiny.interrupt_at(patched, epoch=1, batch=0)
        with pytest.raises(KeyboardInterrupt):
            trial.run(results)
    shutil.move(trial.recipe.data.root, tmp_path / "moved")
    assert moved.key == trial.key
    moved.run(results)
    assert "acam-seed0: its images, teacher or device have moved since it stopped: it starts anew" in caplog.messages
    assert len(json.loads((results / "acam-seed0.json").read_text())["history"]) == 2


def test_a_wrong_test_split_is_told_before_the_first_trial(recipe: Path, tmp_path: Path) -> None:
    named = ["data.test.images=images/tset", "data.test.masks=masks/val"]
    with pytest.raises(AcamkdError, match=r"cannot read the folder .*tset"):
        compare.compare(recipe, ["acam"], seeds=1, results=tmp_path / "results", overrides=named)
    assert [file.name for file in (tmp_path / "results").iterdir()] == ["comparison.yaml"]


def test_a_trial_without_a_score_fails_and_can_be_run_again(recipe: Path, tmp_path: Path) -> None:
    results = tmp_path / "results"
    trial = plan(config.load(recipe, ["data.check=headers"]), ["acam"], 1, results)[0]  # which sees no pixels
    masks = {file: file.read_bytes() for file in (trial.recipe.data.root / "masks/val").iterdir()}
    for file in masks:
        Image.fromarray(np.full_like(np.array(Image.open(file)), 255)).save(file)
    with pytest.raises(AcamkdError, match=r"none-seed0: mIoU is undefined, .* check data\.val and data\.ignore_index"):
        trial.run(results)
    assert trial.read(results) is None
    for file, content in masks.items():
        file.write_bytes(content)
    trial.run(results)
    assert json.loads((results / "none-seed0.json").read_text())["history"][-1] > 0


def test_a_comparison_that_is_terminated_ends_its_trials(
    recipe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    begun = tmp_path / "begun"
    script = f"import pathlib, time; pathlib.Path({str(begun)!r}).touch(); time.sleep(60)"
    started: list[int] = []

    def command(number: int) -> list[str]:
        started.append(number)
        threading.Thread(target=end, daemon=True).start()
        return [sys.executable, "-c", script]

    def end() -> None:
        while not begun.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    trials = plan(config.load(recipe), ["acam"], 1, tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        run_trials(trials, [0, 1], tmp_path / "results", command, end=None, jobs=1)
    assert ended.value.code == 143
    assert started == [0]  # whose process has ended too, as leaving the pool waits for it
    assert signal.getsignal(signal.SIGTERM) == before
    assert caplog.messages == ["none-seed0 was stopped; the next run goes on with it"]


@pytest.mark.parametrize("end", ["import sys; sys.exit(143)", "import os; os.kill(os.getpid(), 15)"])
def test_a_trial_that_somebody_terminates_has_not_failed(recipe: Path, tmp_path: Path, end: str) -> None:
    trials = plan(config.load(recipe), ["acam"], 1, tmp_path)
    assert run_trials(trials, [0], tmp_path, lambda _: [sys.executable, "-c", end], end=None, jobs=1) == []
    assert run_trials(trials, [0], tmp_path, lambda _: ["false"], end=None, jobs=1) == trials[:1]


def test_trials_of_an_earlier_recipe_are_told_to_be_run_anew(
    recipe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trials, results = plan(config.load(recipe), ["acam"], 1, tmp_path), tmp_path / "results"
    fake(trials[1], results, 40.0, recipe="of another recipe")
    run_trials(trials, [0, 1], results, lambda _: ["true"], end=None, jobs=1)
    assert "the recipe of 1 trials has changed, they are run anew: acam-seed0" in caplog.messages


def test_a_class_may_be_called_like_a_mask(recipe: Path, tmp_path: Path) -> None:
    names = ["with_mask", "without_mask", "c", "d", "e", "f"]
    results = tmp_path / "results"
    loaded = config.load(recipe, [f"data.classes={json.dumps(names)}"])
    trials = plan(loaded, ["acam"], 1, results)
    for number in range(2):
        run_trial(trials, number, results)
    content = json.loads((results / "acam-seed0.json").read_text())
    assert {f"IoU/{name}" for name in names} <= set(content["final"])
    assert all(name.startswith("segmentation_head.0/acam/") for name in content["masks"])
    assert len(content["masks"]) == 6  # of the only kind in use
    tabulate(loaded, ["acam"], 1, results)
    assert "| IoU/with_mask |" in (results / "comparison.md").read_text()


@pytest.mark.parametrize(("train", "devices", "apart"), [
    ({"devices": 2, "accelerator": "cpu"}, 0, True),
    ({"accelerator": "cpu"}, 2, False),
    ({"accelerator": "auto"}, 2, True),
    ({"accelerator": "auto", "devices": 1}, 2, False),
])  # fmt: skip
def test_a_teacher_on_several_devices_is_trained_by_a_command_of_its_own(
    train: dict[str, Any], devices: int, apart: bool, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[list[str]] = []

    def stop(words: Any, *_: Any, **__: Any) -> None:
        given.append(words)
        raise KeyboardInterrupt

    monkeypatch.setattr("torch.cuda.device_count", lambda: devices)
    monkeypatch.setattr(compare, "carry_out", stop)
    monkeypatch.setattr("acamkd.jobs.train.train", lambda *_, **__: stop("train"))
    loaded = config.load(recipe, ["teacher.weights=null", *(f"train.{name}={value}" for name, value in train.items())])
    results = tmp_path / "results"
    with pytest.raises(KeyboardInterrupt):
        compare.compare(loaded, ["acam"], seeds=1, results=results)
    assert given == [["train", str(results / "comparison.yaml"), "--role", "teacher"] if apart else "train"]


def test_a_trial_is_scored_on_test_images_too_but_not_in_a_search(recipe: Path, tmp_path: Path) -> None:
    results = tmp_path / "results"
    loaded = config.load(recipe, ["train.epochs=2"])
    tested = loaded.model_copy(update={"data": loaded.data.model_copy(update={"test": loaded.data.val})})
    trials = plan(tested, ["acam"], 1, results)
    assert [trial.key for trial in trials] == [trial.key for trial in plan(loaded, ["acam"], 1, results)]
    run_trial(trials, 0, results)
    content = json.loads((results / "none-seed0.json").read_text())
    assert content["test"] == pytest.approx(content["final"], abs=1e-3)
    assert content["test_of_best_epoch"] == pytest.approx(max(content["history"]), abs=1e-3)
    assert content["cpu_time"] > 0
    tabulate(tested, ["acam"], 1, results)
    assert "## Test images" in (results / "comparison.md").read_text()

    search = {"compare": config.Comparison(tune=config.Search(option="weight", values=(1.0, 2.0)))}
    tuning = plan(tested.model_copy(update=search), ["acam"], 1, results)
    run_trial(tuning, 0, results)
    assert json.loads((results / f"{tuning[0].name}.json").read_text())["test"] is None


@pytest.mark.usefixtures("reports")
def test_a_trial_is_one_small_file_and_is_not_run_again(
    recipe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, acamkd: Command
) -> None:
    caplog.set_level("INFO", logger="acamkd")
    results = tmp_path / "results"
    trials = plan(config.load(recipe), ["acam"], 1, results)
    run_trial(trials, 1, results)
    file = results / "acam-seed0.json"
    content = json.loads(file.read_text())
    assert file.stat().st_size < 10_000
    assert (content["seed"], content["recipe"], len(content["history"])) == (0, trials[1].key, 1)
    assert content["final"]["mIoU"] == content["history"][-1]
    assert content["losses"][0]["num_masks"] == 2
    assert any(name.endswith("spatial_mask_std") for name in content["masks"])
    assert len(content["teacher"]["sha256"]) == 64
    assert content["wall_time"] > 0
    folder = tmp_path / f"runs/recipe/compare/acam-seed0-{trials[1].key}"
    assert (folder / "student.safetensors").is_file()
    assert not (folder / "last.ckpt").exists()
    assert not (folder / "report.html").exists()
    assert acamkd("report", str(folder)).code == 0
    assert (folder / "report.html").stat().st_size > 10_000

    before = file.stat().st_mtime_ns
    run_trial(trials, 1, results)
    assert file.stat().st_mtime_ns == before
    assert "acam-seed0 is finished already" in caplog.messages
    assert plan(config.load(recipe, ["train.epochs=2"]), ["acam"], 1, results)[1].read(results) is None  # stale
    with pytest.raises(AcamkdError, match="there is no trial 2: the plan has 2, counted from 0"):
        run_trial(trials, 2, results)


def test_a_trial_that_is_run_anew_measures_its_weight_anew(recipe: Path, tmp_path: Path) -> None:
    results = tmp_path / "results"
    trial = plan(config.load(recipe, ["losses.0.weight=auto"]), ["fitnet"], 1, results)[1]
    file, kept = results / "fitnet-seed0.json", tmp_path / f"runs/recipe/compare/fitnet-seed0-{trial.key}/recipe.yaml"
    trial.run(results)
    weight = json.loads(file.read_text())["losses"][0]["weight"]
    text = kept.read_text()
    assert f"weight: {weight}\n" in text
    kept.write_text(text.replace(f"weight: {weight}\n", "weight: 123.0\n"))  # as of another teacher
    trial.run(results)
    assert json.loads(file.read_text())["losses"][0]["weight"] == weight


def test_nothing_to_compare_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["acamkd", "compare", str(write_recipe(tmp_path, "segmentation"))])
    with pytest.raises(SystemExit):
        cli.main()
    assert "has no compare.methods: name what to compare by --methods" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("inherit", [[], ["decoder", "segmentation_head"]])
def test_none_and_its_competing_method_start_from_the_same_student(
    inherit: list[str], recipe: Path, tmp_path: Path
) -> None:
    raw = config.load(recipe, ["losses.0.weight=1e-12", "compare.methods.idle={}", f"student.inherit={inherit}"])
    results = tmp_path / "results"
    trials = plan(raw, ["idle"], 1, results)
    for number in range(2):
        run_trial(trials, number, results)
    none, idle = (trial.read(results) for trial in trials)
    assert none is not None
    assert idle is not None
    assert none["final"] == idle["final"]
    assert none["data"] == idle["data"]
    assert none["inherited"] == (idle["teacher"]["sha256"] if inherit else None)


def test_the_command_runs_what_is_missing_each_in_its_own_process(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results"
    loaded = config.load(recipe)
    trials = plan(loaded, ["acam", "fitnet"], 3, results)
    batches = Batches(loaded)
    batches.check()
    for trial in trials[1:]:
        score = 40.0 + trial.seed if trial.method == "none" else 42.0 + 1.2 * trial.seed
        fake(trial, results, score, data=batches.fingerprint)

    def run(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["acamkd", "compare", str(recipe), "--results", str(results), *words])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, error = capsys.readouterr()
        assert end.value.code == 0, error
        return out + error

    common = ("--methods", "acam,fitnet", "--seeds", "3")
    assert "0.0 hours to do" in run(*common, "--plan")
    assert "none-seed0 is left out: about 0:02:00 would pass the time" in run(*common, "--time", "90s")
    assert not (results / "none-seed0.json").exists()
    done = run(*common)  # none-seed0
    assert "none-seed0 begins" in done
    assert "none-seed0: mIoU" in done
    assert json.loads((results / "none-seed0.json").read_text())["recipe"] == trials[0].key
    assert {path.name for path in results.glob("comparison.*")} == {
        "comparison.html", "comparison.md", "comparison.json", "comparison.png", "comparison.yaml",
    }  # fmt: skip
    rows = json.loads((results / "comparison.json").read_text())["rows"]
    assert {row["method"]: row["n"] for row in rows} == {"none": 3, "acam": 3, "fitnet": 3}


@pytest.mark.slow
def test_python_compares_without_a_callback(recipe: Path, tmp_path: Path) -> None:
    results = tmp_path / "results"
    overrides = [f"data.classes={json.dumps(['a', 'b, or c', 'd', 'e', 'f', 'g'])}", "train.optimizer.lr=1e-3"]
    found = compare.compare(recipe, ["acam"], seeds=1, results=results, overrides=overrides)
    assert (found.folder, found.metric, [row.n for row in found.rows]) == (results, "mIoU", [1, 1])
    assert {row.method for row in found.rows} == {"none", "acam"}
    first = config.load(recipe, overrides)
    assert config.load(results / "comparison.yaml") == first
    trial = plan(first, ["acam"], 1, results)[1]
    content = trial.read(results)
    assert content is not None
    assert "IoU/b, or c" in content["final"]
    again = compare.compare(first, ["acam"], seeds=1, results=results)  # nothing is left to do
    assert again == found
    assert recipe.read_text() != (results / "comparison.yaml").read_text()
    with pytest.raises(AcamkdError, match=r"has no compare\.methods: name what to compare"):
        compare.compare(recipe, overrides=["compare={}"])
    with pytest.raises(AcamkdError, match=r"there is no method 'akam'"):
        compare.compare(recipe, ["akam"], results=tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_the_flags_name_a_trial_and_write_the_table(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results"
    for trial in plan(config.load(recipe), ["acam"], 1, results):
        fake(trial, results, 40.0)

    def run(*words: str) -> str:
        common = ["--results", str(results), "--methods", "acam", "--seeds", "1"]
        monkeypatch.setattr(sys, "argv", ["acamkd", "compare", str(recipe), *common, *words])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, error = capsys.readouterr()
        assert end.value.code == 0, error
        return out + error

    assert "acam-seed0 is finished already" in run("--trial", "1")
    assert not (results / "trials.csv").exists()
    assert "trials.csv: the finished trials" in run("--tables", "--csv")
    for file in results.glob("*-seed0.json"):
        file.unlink()
    before = (results / "comparison.md").read_text()
    assert "0.0 hours to do" in run("--plan")
    run("--tables")
    assert (results / "comparison.md").read_text() == before


def test_tables_do_not_wait_for_torch(recipe: Path, tmp_path: Path) -> None:
    for trial in plan(config.load(recipe), ["acam"], 3, tmp_path):
        fake(trial, tmp_path, 40.0 + trial.seed)
    words = ["compare", str(recipe), "--methods", "acam", "--seeds", "3", "--tables", "--results", str(tmp_path)]
    script = f"""
import sys
from acamkd.cli import main
sys.argv = ["acamkd", *{words}]
try:
    main()
finally:
    print(sorted({{"torch", "lightning", "torchvision", "timm"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"
    assert (tmp_path / "comparison.html").is_file()


def failing(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Every trial's process says `no memory` and ends."""
    python = folder / "python"
    python.write_text("#!/bin/sh\necho no memory\nexit 3\n")
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))


def test_a_failed_trial_is_said_and_the_others_go_on(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tmp_path / "results"
    loaded = config.load(recipe)
    trials = plan(loaded, ["acam"], 2, results)
    for trial in trials[:3]:
        fake(trial, results, 40.0)
    failing(monkeypatch, tmp_path)
    with pytest.raises(AcamkdError, match=r"1 trials failed; their logs: .*acam-seed1\.txt"):
        compare.compare(loaded, ["acam"], seeds=2, results=results)
    assert (results / "logs/acam-seed1.txt").read_text() == "no memory\n"
    assert (results / "comparison.md").is_file()


def test_a_finished_trial_says_how_long_the_others_take(
    recipe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="acamkd")
    trials = plan(config.load(recipe), ["acam"], 2, tmp_path)
    fake(trials[0], tmp_path, 40.0)
    run_trials(trials, [0], tmp_path, lambda number: ["printenv", "MALLOC_MMAP_MAX_"], end=None, jobs=2)
    assert (tmp_path / "logs/none-seed0.txt").read_text() == "0\n"  # glibc keeps the memory of a step
    assert caplog.messages[-1] == "none-seed0: mIoU 40.00 in 0:02:00, 3 trials left, about 0:03:00"


def test_where_all_trials_fail_that_is_what_is_said(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, tmp_path)
    with pytest.raises(AcamkdError, match=r"2 trials failed; their logs: .*none-seed0\.txt, .*acam-seed0\.txt"):
        compare.compare(recipe, ["acam"], seeds=1, results=tmp_path / "results")


def test_trials_of_other_images_or_teachers_are_refused(recipe: Path, tmp_path: Path) -> None:
    results = tmp_path / "results"
    loaded = config.load(recipe)
    with pytest.raises(AcamkdError, match="holds no trial of this comparison yet"):
        tabulate(loaded, ["acam"], 3, results)
    trials = plan(loaded, ["acam"], 3, results)
    for trial in trials:
        fake(trial, results, 40.0)
    tabulate(loaded, ["acam"], 3, results)
    fake(trials[3], results, 40.0, teacher={"sha256": "d" * 64, "mIoU": 51.0})
    with pytest.raises(AcamkdError, match="do not share their teacher: remove acam-seed1"):
        tabulate(loaded, ["acam"], 3, results)
    own = loaded.model_copy(update={"compare": config.Comparison(methods={"acam": {"teacher.backbone": "resnet18"}})})
    for seed, trial in enumerate(plan(own, ["acam"], 3, results)):
        other = {} if trial.method == "none" else {"teacher": {"sha256": "d" * 64, "mIoU": None}}
        fake(trial, results, 40.0 + seed, **other)
    assert tabulate(own, ["acam"], 3, results).rows  # a method may name a teacher of its own, also one without a score
    for trial in trials:
        fake(trial, results, 40.0)
    fake(trials[2], results, 40.0, inherited="d" * 64)
    fake(trials[3], results, 40.0)
    with pytest.raises(AcamkdError, match="do not share their teacher: remove none-seed1"):
        tabulate(loaded, ["acam"], 3, results)
    fake(trials[2], results, 40.0)
    for trial in trials:
        fake(trial, results, 40.0, processes=4 if trial is trials[3] else 1)
    with pytest.raises(AcamkdError, match="do not share their number of processes: remove acam-seed1"):
        tabulate(loaded, ["acam"], 3, results)
    for trial in trials:
        key = "unlabeled" if trial.seed else "unlabelled"  # the older spelling
        unlabeled = {} if trial.method == "none" else {key: "c"}
        fake(trial, results, 40.0, data={"train": "a", "val": "b"} | unlabeled)
    tabulate(loaded, ["acam"], 3, results)
    fake(trials[3], results, 40.0, data={"train": "a", "val": "b", "unlabelled": "d"})
    with pytest.raises(AcamkdError, match="do not share their unlabeled images: remove acam-seed1"):
        tabulate(loaded, ["acam"], 3, results)
    fake(trials[3], results, 40.0)
    fake(trials[4], results, 40.0, data={"train": "x", "val": "b"})
    with pytest.raises(AcamkdError, match="do not share their train images: remove none-seed2"):
        tabulate(loaded, ["acam"], 3, results)


def test_a_bad_time_is_refused(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["acamkd", "compare", str(recipe), "--time", "sixh"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "--time sixh: write a number and h, m or s, such as 6h" in " ".join(capsys.readouterr().err.split())


def test_a_method_whose_tuning_failed_is_not_run(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = tmp_path / "results"
    loaded = config.override(config.load(recipe), [
        "compare.tune={values: [0.5, 1]}", "compare.methods.acam={losses.0.weight: auto}",
    ])  # fmt: skip
    fake(plan(loaded, ["acam"], 2, results)[0], results, 40.0)
    failing(monkeypatch, tmp_path)
    with pytest.raises(AcamkdError, match="3 trials failed"):
        compare.compare(loaded, ["acam"], seeds=2, results=results)
    begun = {file.stem for file in (results / "logs").iterdir()}
    assert begun == {"acam-1-seed1000", "none-seed0", "none-seed1"}
