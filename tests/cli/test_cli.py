from __future__ import annotations

import errno
import json
import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import tiny
from acamkd import cli
from acamkd.distillation.methods import METHODS, options_of
from acamkd.jobs.evaluate import Scores
from command import Command

COMMANDS = [command.name or command.callback.__name__ for command in cli.app.registered_commands if command.callback]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Segmentation data and detection data, never changed."""
    folder = tmp_path_factory.mktemp("drawn")
    tiny.write_data(folder / "segmentation")
    tiny.write_data(folder / "detection", "detection")
    return folder


def _write(folder: Path, raw: dict[str, Any]) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(raw))
    return file


def test_every_line_is_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        CliRunner().invoke(cli.app, ["methods", "acam"])
    handlers = [handler for handler in logging.getLogger().handlers if not handler.__module__.startswith("_pytest")]
    assert len(handlers) == 1
    assert not logging.getLogger("acamkd").handlers
    for name, level in (("acamkd.data", logging.INFO), ("other", logging.INFO), ("other", logging.WARNING)):
        logging.getLogger(name).log(level, "%s %d", name, level)
    lines = [line.partition(" ")[2] for line in capsys.readouterr().err.splitlines()]
    assert lines == ["acamkd.data 20", "warning: other 30"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_ends_with_examples(command: str) -> None:
    result = CliRunner().invoke(cli.app, [command, "--help"], env={"TERMINAL_WIDTH": "200"})
    assert result.exit_code == 0
    examples = result.output.partition("Examples:")[2]
    lines = [line for line in examples.splitlines() if line.strip()]
    assert len(lines) >= 2
    assert lines[0].strip().startswith(f"acamkd {command}")


def test_help_methods_and_typos_do_not_wait_for_torch() -> None:
    script = """
import sys
from acamkd.cli import main
typos = [[command, "missing.yaml"] for command in ("run", "train", "distill", "tokens", "compare", "doctor", "inspect")]
typos += [[command, "missing"] for command in ("evaluate", "export", "report")] + [["methods", "akam"]]
for words in (["--help"], ["train", "--help"], ["--version"], ["methods"], ["methods", "acam"], *typos):
    sys.argv = ["acamkd", *words]
    try:
        main()
    except SystemExit:
        pass
print(sorted({"torch", "numpy", "lightning", "torchvision", "timm"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"
    assert done.stderr.count("error: ") == 11


def test_methods_lists_every_method(acamkd: Command) -> None:
    shown = acamkd("methods")
    assert shown.code == 0
    assert all(re.search(rf"^│ {name} ", shown.out, flags=re.MULTILINE) for name in METHODS)


def test_methods_shows_every_option_of_one(acamkd: Command) -> None:
    shown = acamkd("methods", "acam").out
    assert "ACAM-KD: Adaptive and Cooperative Attention Masking" in " ".join(shown.split())
    for option in options_of("acam").model_fields:
        assert re.search(rf"^│ {option} ", shown, flags=re.MULTILINE)
    assert "preset paper: {'num_masks': 6" in shown


def test_methods_as_json(acamkd: Command) -> None:
    everything = json.loads(acamkd("methods", "--json").out)
    assert set(everything) == set(METHODS)
    assert json.loads(acamkd("methods", "acam", "--json").out) == everything["acam"]
    assert everything["acam"]["presets"]["paper"]["diversity"] == "literal"


def test_an_unknown_method(acamkd: Command) -> None:
    result = acamkd("methods", "fitnat")
    assert (result.code, result.error) == (1, "there is no method 'fitnat'; did you mean fitnet, at?\n")


def test_version(acamkd: Command) -> None:
    assert acamkd("--version").out == "acamkd 0.1.0\n"


def test_brackets_in_the_names_of_classes_are_shown(
    acamkd: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = Scores({"AP/sign [red]": 12.5, "AP/car [/old]": 3.0})
    monkeypatch.setattr("acamkd.cli.deploy.run_of", lambda _folder, _overrides: None)
    monkeypatch.setattr("acamkd.jobs.evaluate.evaluate", lambda _run, **_options: scores)
    shown = acamkd("evaluate", tmp_path)
    assert (shown.code, shown.err) == (0, "")
    assert re.search(r"│ AP/sign \[red\] +│ 12\.50", shown.out)
    assert re.search(r"│ AP/car \[/old\] +│ 3\.00", shown.out)


def test_train_distill_evaluate(acamkd: Command, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    raw = tiny.raw_recipe(drawn / "segmentation", epochs=1)
    raw["teacher"]["weights"] = None
    del raw["name"]  # the file's
    recipe = _write(tmp_path, raw)
    assert acamkd("train", recipe, "--role", "teacher").code == 0
    result = acamkd("distill", recipe, "--set", "train.seed=3", "--set", "losses.0.num_masks=2")
    assert result.code == 0
    assert result.out == ""
    lines = result.err.splitlines()
    assert all(re.match(r"\d\d:\d\d:\d\d \S", line) for line in lines), lines  # one message, one line
    assert sum("training and 4 validation" in line for line in lines) == 1  # no handler is attached twice
    assert "epoch 1/1, task loss" in result.err
    assert re.search(r" runs/recipe/distilled: best mIoU [\d.]+ at epoch 1, in student.safetensors\n", result.err)
    assert yaml.safe_load(Path("runs/recipe/distilled/recipe.yaml").read_text())["losses"][0]["num_masks"] == 2

    result = acamkd("evaluate", "runs/recipe/distilled", "--json")
    best = json.loads(Path("runs/recipe/distilled/metrics.json").read_text())["student"]
    assert json.loads(result.out) == pytest.approx(best)
    assert f"{best['mIoU']:.2f}" in acamkd("evaluate", "runs/recipe/distilled").out


def test_a_long_path_is_not_wrapped(acamkd: Command, tmp_path: Path) -> None:
    missing = tmp_path / ("long" * 40) / "recipe.yaml"
    assert acamkd("train", missing).error == f"cannot read the recipe {missing}: No such file or directory\n"


@pytest.mark.parametrize(
    ("out", "reason"), [("data/scenes.json/run", "Not a directory"), ("/proc/run", "No such file")]
)
def test_a_folder_that_cannot_be_written(
    out: str, reason: str, acamkd: Command, drawn: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(drawn / "segmentation", tmp_path / "data")
    result = acamkd("train", _write(tmp_path, tiny.raw_recipe(tmp_path / "data")), "--out", out)
    assert result.code == 1
    assert result.error.startswith(f"cannot write the run folder {out}: {reason}")


def test_a_folder_that_only_others_may_enter_is_one_message(
    acamkd: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(file: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(file))

    monkeypatch.setattr(Path, "is_file", refuse)
    result = acamkd("evaluate", tmp_path)
    said = "Permission denied; let this user read and write it, or name another place"
    assert (result.code, result.error) == (1, f"{tmp_path}/recipe.yaml: {said}\n")


def test_what_is_forbidden_and_no_file_keeps_its_traceback(acamkd: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> bool:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "is_file", refuse)
    with pytest.raises(PermissionError):
        acamkd("evaluate", "run")


@pytest.mark.parametrize("flags", [[], ["--overwrite"], ["--resume"]])
def test_a_folder_that_is_not_a_run(flags: list[str], acamkd: Command, drawn: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    recipe = _write(tmp_path, tiny.raw_recipe(drawn / "segmentation"))
    result = acamkd("train", recipe, "--out", tmp_path / "mine", *flags)
    assert result.code == 1
    assert result.error == f"{tmp_path}/mine exists and is not a run: choose another folder with --out\n"
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_a_dry_run_says_what_a_step_takes_and_leaves_nothing(
    acamkd: Command, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = _write(tmp_path, tiny.raw_recipe(drawn / "segmentation"))
    result = acamkd("distill", recipe, "--dry-run")
    assert result.code == 0
    assert all(part in result.out for part in ("teacher", "student", "losses", "GFLOPs"))
    assert re.search(r"images of 64 x 64: [\d.]+ MiB each.* the largest batch is about \d+, the recipe's 4", result.out)
    assert list(tmp_path.iterdir()) == [recipe]


def test_evaluating_what_is_no_run(acamkd: Command, tmp_path: Path) -> None:
    assert acamkd("evaluate", tmp_path).error == f"{tmp_path} is not a run folder: it has no recipe.yaml\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train"], "Missing argument 'RECIPE'"),
        (["train", "r.yaml", "--role", "tutor"], "'tutor' is not one of 'teacher', 'student'"),
        (["distil"], "No such command 'distil'"),
        (["train", "r.yaml", "--resum"], "No such option: --resum"),
    ],
)
def test_words_that_make_no_command(words: list[str], message: str, acamkd: Command) -> None:
    result = acamkd(*words)
    assert result.code == 2
    assert message in " ".join(result.err.replace("│", " ").split())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--plan", "--trial", "3"], "--plan and --trial: give one of them"),
        (["--trial", "3", "--tables", "--csv"], "--trial and --tables: give one of them"),
        (["--plan", "--csv"], "--csv gathers the finished trials of a comparison or of --tables, not of --plan"),
    ],
)
def test_what_excludes_each_other_is_refused(flags: list[str], message: str, acamkd: Command) -> None:
    result = acamkd("compare", "recipe.yaml", *flags)
    assert (result.code, result.error) == (1, f"{message}\n")
