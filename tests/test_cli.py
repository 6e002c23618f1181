from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

import tiny
from acamkd import cli
from acamkd.methods import METHODS, options_of
from acamkd.models.base import Task

COMMANDS = [command.name or command.callback.__name__ for command in cli.app.registered_commands if command.callback]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Segmentation data and detection data, never changed."""
    folder = tmp_path_factory.mktemp("drawn")
    tiny.write_data(folder / "segmentation")
    tiny.write_data(folder / "detection", "detection")
    return folder


class Result:
    """What a command left behind."""

    def __init__(self, code: Any, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def error(self) -> str:
        """The message after `error:`; nothing may follow it."""
        assert "Traceback" not in self.err
        assert self.err.count("error: ") == 1, self.err
        return self.err.partition("error: ")[2]


Command = Callable[..., Result]


@pytest.fixture
def acamkd(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run `acamkd WORDS` as the installed command does, in this process."""

    def run(*words: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["acamkd", *map(str, words)])
        capsys.readouterr()
        code: Any = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
        return Result(code, *capsys.readouterr())

    return run


def _write(folder: Path, raw: dict[str, Any]) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(raw))
    return file


@pytest.mark.parametrize("command", COMMANDS)
def test_help_ends_with_examples(command: str) -> None:
    result = CliRunner().invoke(cli.app, [command, "--help"], env={"TERMINAL_WIDTH": "200"})
    assert result.exit_code == 0
    examples = result.output.partition("Examples:")[2]
    lines = [line for line in examples.splitlines() if line.strip()]
    assert len(lines) >= 2
    assert lines[0].strip().startswith(f"acamkd {command}")


def test_help_does_not_wait_for_torch() -> None:
    script = """
import sys
from acamkd.cli import main
for words in (["--help"], ["train", "--help"], ["--version"]):
    sys.argv = ["acamkd", *words]
    try:
        main()
    except SystemExit:
        pass
print(sorted({"torch", "numpy", "lightning", "torchvision", "timm"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"


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


def test_train_distill_evaluate(acamkd: Command, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    raw = tiny.raw_recipe(drawn / "segmentation", epochs=1)
    raw["teacher"]["weights"] = None
    del raw["name"]  # the file's
    recipe = _write(tmp_path, raw)
    assert acamkd("train", recipe, "--model", "teacher").code == 0
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


# What users get wrong: (task, damage, command, parts of the message that must all be there).
Damage = Callable[[dict[str, Any], Path], None]


def _set(key: str, value: Any) -> Damage:
    def damage(raw: dict[str, Any], root: Path) -> None:
        node: Any = raw
        *parents, last = key.split(".")
        for name in parents:
            node = node[int(name) if isinstance(node, list) else name]
        node[last] = value

    return damage


def _mask(pixels: tuple[int, int], value: int) -> Damage:
    def damage(raw: dict[str, Any], root: Path) -> None:
        Image.new("L", pixels, value).save(root / "masks/train/00002.png")

    return damage


def _broken_picture(raw: dict[str, Any], root: Path) -> None:
    file = root / "images/val/00003.jpg"
    file.write_bytes(file.read_bytes()[:200])


def _no_pictures(raw: dict[str, Any], root: Path) -> None:
    for folder in ("images/train", "masks/train"):
        shutil.rmtree(root / folder)
        (root / folder).mkdir()


def _flat_box(raw: dict[str, Any], root: Path) -> None:
    file = root / "annotations/instances_train.json"
    content = json.loads(file.read_text())
    content["annotations"][4]["bbox"][2] = 0
    file.write_text(json.dumps(content))


def _other_teacher(raw: dict[str, Any], root: Path) -> None:
    net = torch.nn.Conv2d(3, 6, 1)
    torch.save(net.state_dict(), root / "teacher.pth")
    raw["teacher"]["weights"] = str(root / "teacher.pth")


def _resnet_teacher(raw: dict[str, Any], root: Path) -> None:
    raw["teacher"]["backbone"] = "resnet18"


def _no_teacher(raw: dict[str, Any], root: Path) -> None:
    del raw["teacher"]


def _no_mask_folder(raw: dict[str, Any], root: Path) -> None:
    shutil.rmtree(root / "masks/val")


def _lost_picture(raw: dict[str, Any], root: Path) -> None:
    (root / "images/train/00001.jpg").unlink()


BAD: dict[str, tuple[Task, Damage, list[str], list[str]]] = {
    "wrong key": (
        "segmentation", _set("train.epoch", 3), ["train"],
        ["recipe.yaml does not fit:\n  train.epoch: unknown key; did you mean epochs?"],
    ),
    "two wrong keys at once": (
        "segmentation", _set("data.augment", {"flop": 1, "flip": 2}), ["train"],
        ["data.augment.flop: unknown key; did you mean flip", "data.augment.flip: Input should be less than or equal"],
    ),
    "wrong layer": (
        "segmentation", _set("losses.0.pairs", ["segmentation_heat.0"]), ["distill"],
        ["losses.0 (acam): student: there is no layer 'segmentation_heat.0' to tap", "mean segmentation_head.0"],
    ),
    "no pairs": (
        "segmentation", _set("losses.0.pairs", []), ["distill"],
        ["losses.0 (acam): `pairs` is missing", "such as [backbone:*] or [segmentation_head.0]"],
    ),
    "unknown method": (
        "segmentation", _set("losses.0.name", "akam"), ["distill"],
        ["losses.0 (akam): there is no method 'akam'; did you mean acam"],
    ),
    "unknown option": (
        "segmentation", _set("losses.0.masknum", 3), ["distill"],
        ["losses.0 (acam): acam has no option 'masknum'; did you mean", "num_masks"],
    ),
    "option of a wrong type": (
        "segmentation", _set("losses.0.num_masks", "many"), ["distill"],
        ["losses.0 (acam): acam.num_masks: Input should be a valid integer (given: 'many')"],
    ),
    "missing folder": (
        "segmentation", _no_mask_folder, ["train"], ["cannot read the folder", "masks/val: No such file or directory"],
    ),
    "missing picture": (
        "segmentation", _lost_picture, ["train"],
        ["1 problem:", "masks/train/00001.png: the mask has no picture in", "images/train"],
    ),
    "mask of a wrong size": (
        "segmentation", _mask((32, 64), 0), ["train"],
        ["1 problem:", "masks/train/00002.png: the mask has 32 x 64 pixels, but 00002.jpg has 64 x 64 pixels"],
    ),
    "class id out of range": (
        "segmentation", _mask((64, 64), 17), ["train"],
        ["masks/train/00002.png: the mask holds 17, but the values for the 6 classes and for void are 0 to 5 and 255"],
    ),
    "corrupt picture": (
        "segmentation", _broken_picture, ["train"], ["1 problem:", "images/val/00003.jpg: the picture cannot be read"],
    ),
    "empty data set": (
        "segmentation", _no_pictures, ["train"], ["images/train: the folder holds no pictures (.jpg, .jpeg, .png"],
    ),
    "box without area": (
        "detection", _flat_box, ["train"],
        ["instances_train.json: annotation 5 of image ", "the box [", " has no area"],
    ),
    "missing annotations": (
        "detection", _set("data.val.annotations", "annotations/val.json"), ["train"],
        ["cannot read the annotations", "annotations/val.json: No such file or directory"],
    ),
    "file of another network": (
        "segmentation", _other_teacher, ["distill"],
        ["teacher.pth: 0 of 237 tensors matched", "2 left over (weight, bias)", "every tensor is needed here"],
    ),
    "weights of another backbone": (
        "segmentation", _resnet_teacher, ["distill"],
        ["fpn on resnet18 from", "teacher.safetensors", "missing (encoder.conv1.weight", "check arch, backbone"],
    ),
    "missing teacher file": (
        "segmentation", _set("teacher.weights", "gone.safetensors"), ["distill"],
        ["weights gone.safetensors: there is no such file"],
    ),
    "teacher without weights": (
        "segmentation", _set("teacher.weights", None), ["distill"],
        ["the teacher has no weights: set teacher.weights, or train it first (acamkd train RECIPE --model teacher"],
    ),
    "no teacher to train": (
        "segmentation", _no_teacher, ["train", "--model", "teacher"], ["the recipe tiny has no `teacher` section"],
    ),
    "no teacher to distil from": (
        "segmentation", _no_teacher, ["distill"], ["the recipe tiny needs a `teacher` section and `losses` to distil"],
    ),
    "unknown backbone": (
        "segmentation", _set("student.backbone", "resnet19"), ["train"],
        ["unknown encoder resnet19; did you mean", "resnet18"],
    ),
    "accelerator that is not there": (
        "segmentation", _set("train.accelerator", "quantum"), ["train"],
        ["train: this machine, or what launched it, cannot run accelerator quantum, ", "Available names are"],
    ),
    "losses that are no text": (
        "segmentation", _set("name", "tiny"), ["distill", "--losses", "data/teacher.safetensors"],
        ["cannot read the losses data/teacher.safetensors: 'utf-8' codec can't decode"],
    ),
    "bad override": (
        "segmentation", _set("name", "tiny"), ["train", "--set", "losses.3.weight=2"],
        ["--set losses.3.weight: there is no entry 3, the list has 1 (counted from 0)"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_message_and_leaves_nothing(
    case: str, acamkd: Command, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, damage, command, parts = BAD[case]
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "data"
    shutil.copytree(drawn / task, root)
    raw = tiny.raw_recipe(root, task)
    damage(raw, root)
    recipe = _write(tmp_path, raw)
    there = sorted(tmp_path.rglob("*"))
    result = acamkd(*command, recipe)
    assert result.code == 1
    for part in parts:
        assert part in result.error
    assert sorted(tmp_path.rglob("*")) == there


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


@pytest.mark.parametrize("flags", [[], ["--overwrite"], ["--resume"]])
def test_a_folder_that_is_not_a_run(flags: list[str], acamkd: Command, drawn: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    recipe = _write(tmp_path, tiny.raw_recipe(drawn / "segmentation"))
    result = acamkd("train", recipe, "--out", tmp_path / "mine", *flags)
    assert result.code == 1
    assert result.error == f"{tmp_path}/mine exists and is not a run: choose another folder with --out\n"
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_evaluating_what_is_no_run(acamkd: Command, tmp_path: Path) -> None:
    assert acamkd("evaluate", tmp_path).error == f"{tmp_path} is not a run folder: it has no recipe.yaml\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train"], "Missing argument 'RECIPE'"),
        (["train", "r.yaml", "--model", "tutor"], "'tutor' is not one of 'teacher', 'student'"),
        (["distil"], "No such command 'distil'"),
        (["train", "r.yaml", "--resum"], "No such option: --resum"),
    ],
)
def test_words_that_make_no_command(words: list[str], message: str, acamkd: Command) -> None:
    result = acamkd(*words)
    assert result.code == 2
    assert message in " ".join(result.err.replace("│", " ").split())
