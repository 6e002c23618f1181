from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny
from acamkd import config, models
from acamkd.engine.runs import LOCK, LOG, RECIPE, Role, Run, open_run
from acamkd.errors import AcamkdError
from acamkd.files import as_json, unfinished_name, write_json


def _run(folder: Path, role: Role = "student", **train: Any) -> Run:
    return Run(folder, tiny.recipe(Path("data"), **train), role)


def _enter(run: Run, *, resume: bool, overwrite: bool) -> bool:
    with run.entered(resume=resume, overwrite=overwrite) as goes_on:
        return goes_on


def _fill(run: Run) -> torch.nn.Module:
    """Make the folder and put weights into it."""
    _enter(run, resume=False, overwrite=False)
    torch.manual_seed(3)
    net = models.build(config.Model(**tiny.FPN), "segmentation", 6).net
    models.save_weights(net, run.weights)
    return net


def test_the_folder_holds_the_whole_recipe(tmp_path: Path) -> None:
    run = _run(tmp_path / "deep" / "run")
    assert _enter(run, resume=False, overwrite=False) is False
    assert config.load(run.folder / RECIPE) == run.recipe
    assert "weight_decay: 0.0001" in (run.folder / RECIPE).read_text()  # defaults are spelled out
    assert (run.weights.name, run.checkpoint.name) == ("student.safetensors", "last.ckpt")


def test_an_empty_folder_may_be_there(tmp_path: Path) -> None:
    _enter(_run(tmp_path), resume=False, overwrite=False)
    assert (tmp_path / RECIPE).is_file()


def test_a_run_is_never_replaced_unasked(tmp_path: Path) -> None:
    _enter(_run(tmp_path / "run"), resume=False, overwrite=False)
    (tmp_path / "run" / "history.csv").touch()
    with pytest.raises(AcamkdError, match=r"run already holds a run: --resume continues it, --overwrite replaces it"):
        _enter(_run(tmp_path / "run"), resume=False, overwrite=False)
    with pytest.raises(AcamkdError, match=r"another recipe or command \(train.epochs was \d+, is 7\)"):
        _enter(_run(tmp_path / "run", epochs=7), resume=True, overwrite=False)
    assert (tmp_path / "run" / "history.csv").exists()
    _enter(_run(tmp_path / "run", epochs=7), resume=False, overwrite=True)
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == [LOCK, LOG, RECIPE]
    assert config.load(tmp_path / "run" / RECIPE).train.epochs == 7


def test_resume_says_whether_there_is_a_checkpoint(tmp_path: Path) -> None:
    run = _run(tmp_path / "run")
    assert _enter(run, resume=True, overwrite=False) is False  # no run at all
    assert _enter(run, resume=True, overwrite=False) is False
    run.checkpoint.touch()
    assert _enter(run, resume=True, overwrite=False) is True


def test_to_go_on_and_to_replace_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(AcamkdError, match="--resume continues a run and --overwrite replaces it: give one of them"):
        _enter(_run(tmp_path / "run"), resume=True, overwrite=True)


def test_a_run_that_has_not_ended_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = _run(tmp_path / "run")
    _fill(run)
    open_run(run.folder)
    assert caplog.messages == [
        f"{run.folder}: its training has not ended; its weights are those of the best epoch so far"
    ]
    with pytest.raises(
        AcamkdError, match=rf"^{run.folder} has no last\.ckpt, which holds the weights of the last epoch"
    ):
        run.load_last()
    run.write_metrics({})
    caplog.clear()
    open_run(run.folder)
    assert not caplog.messages


def test_what_changes_no_figure_may_change_on_resuming(tmp_path: Path) -> None:
    run = _run(tmp_path / "run")
    _enter(run, resume=False, overwrite=False)
    changed = config.override(run.recipe, ["data.workers=1", "data.check=headers", "train.checkpoint_every=7"])
    assert _enter(Run(run.folder, changed, "student"), resume=True, overwrite=False) is False
    methods = config.override(changed, ["compare.methods.cwd={losses.0.name: cwd}"])
    assert _enter(Run(run.folder, methods, "student"), resume=True, overwrite=False) is False
    other = config.override(changed, ["data.root=other", "losses.0.name=pkd", "train.seed=3", "train.clip=1"])
    said = r'command \(data.root was "data", is "other", losses.0.name was "acam", is "pkd", .* and \d more\)'
    with pytest.raises(AcamkdError, match=said):
        _enter(Run(run.folder, other, "student"), resume=True, overwrite=False)


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_not_a_run_is_left_alone(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "recipe.yaml").write_text("the user's own")
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(AcamkdError, match="exists and is not a run: choose another folder with --out"):
        _enter(_run(tmp_path), resume=False, overwrite=overwrite)
    assert (tmp_path / "recipe.yaml").read_text() == "the user's own"


def test_what_is_no_part_of_a_run_is_never_removed(tmp_path: Path) -> None:
    _enter(_run(tmp_path), resume=False, overwrite=False)
    for name in ("logs", "export", "images"):
        (tmp_path / name).mkdir()
    with pytest.raises(AcamkdError, match="also holds images, which no run makes"):
        _enter(_run(tmp_path), resume=False, overwrite=True)
    assert (tmp_path / "images").is_dir()
    (tmp_path / "images").rename(tmp_path / ".export-x")  # as a killed export leaves it
    (tmp_path / "thesis.md").touch()
    with pytest.raises(AcamkdError, match=r"also holds thesis\.md, which no run makes"):
        _enter(_run(tmp_path), resume=False, overwrite=True)
    (tmp_path / "thesis.md").unlink()
    _enter(_run(tmp_path), resume=False, overwrite=True)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(AcamkdError, match=r"cannot write the run folder .*file/run: Not a directory"):
        _enter(_run(tmp_path / "file" / "run"), resume=False, overwrite=False)
    with pytest.raises(AcamkdError, match=r"cannot write the run folder .*file: File exists"):
        _enter(_run(tmp_path / "file"), resume=False, overwrite=False)


@pytest.mark.parametrize("refused", ["is_file", "iterdir"])
def test_a_folder_that_only_others_may_enter(refused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, refused, refuse)
    monkeypatch.setattr("acamkd.files.TemporaryFile", refuse)
    with pytest.raises(AcamkdError, match=rf"cannot write the run folder {tmp_path}: Permission denied; --out writes"):
        _run(tmp_path).check_free(resume=False, overwrite=False)


def test_only_one_process_is_in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("acamkd.engine.runs.PATIENCE", 0.2)
    run = _run(tmp_path / "run")
    other = f"""
import time
from filelock import FileLock
with FileLock({str(run.folder / LOCK)!r}):
    print("locked", flush=True)
    time.sleep(60)
"""
    run.folder.mkdir()
    with subprocess.Popen([sys.executable, "-c", other], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        for overwrite in (False, True):
            with pytest.raises(AcamkdError, match=r"another process is at work in .*run: wait for its end, or write"):
                _enter(run, resume=False, overwrite=overwrite)
        assert [file.name for file in run.folder.iterdir()] == [LOCK]
        process.kill()
    assert _enter(run, resume=False, overwrite=False) is False  # a lock ends with its process


def test_a_run_that_could_not_begin_may_begin_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, text: str) -> None:
        path.with_name(unfinished_name(path.name)).touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run = _run(tmp_path / "run")
    with monkeypatch.context() as patched:
        patched.setattr("acamkd.engine.runs.write_text", full)
        with pytest.raises(AcamkdError, match=r"cannot write the run folder .*run: No space left on device"):
            _enter(run, resume=False, overwrite=False)
    _enter(run, resume=False, overwrite=False)
    assert run.has_begun


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_run_opens_with_its_network(tmp_path: Path, role: Role) -> None:
    net = _fill(_run(tmp_path / "run", role))
    run = open_run(tmp_path / "run", ["train.epochs=9"])
    assert (run.role, run.recipe.train.epochs) == (role, 9)
    model = run.load()
    assert not model.training
    state = model.net.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in net.state_dict().items())


def test_a_network_of_another_recipe_is_refused(tmp_path: Path) -> None:
    _fill(_run(tmp_path / "run"))
    run = open_run(tmp_path / "run", ["student.options.decoder_pyramid_channels=64"])
    with pytest.raises(AcamkdError, match=r"of wrong shape .*\s+every tensor is needed here"):
        run.load()


def test_folders_that_hold_no_run_or_no_weights(tmp_path: Path) -> None:
    with pytest.raises(AcamkdError, match=r"nowhere: there is no such run folder"):
        open_run(tmp_path / "nowhere")
    with pytest.raises(AcamkdError, match=r"is not a run folder: it has no recipe\.yaml$"):
        open_run(tmp_path)
    _enter(_run(tmp_path / "run"), resume=False, overwrite=False)
    with pytest.raises(AcamkdError, match=r"it has no recipe\.yaml, but holds the runs run"):
        open_run(tmp_path)
    with pytest.raises(AcamkdError, match="holds no weights yet: its first epoch has not ended"):
        open_run(tmp_path / "run")


def test_weights_can_be_read_by_others(tmp_path: Path) -> None:
    run = _run(tmp_path / "run")
    _fill(run)
    mask = os.umask(0)
    os.umask(mask)
    assert run.weights.stat().st_mode & 0o777 == 0o666 & ~mask
    assert len(load_file(run.weights)) > 100


def test_json_says_null_for_what_has_no_figure(tmp_path: Path) -> None:
    content = {"mAP": 1.5, "AP": {"cat": math.nan}, "list": (math.nan, "a")}
    assert json.loads(as_json(content)) == {"mAP": 1.5, "AP": {"cat": None}, "list": [None, "a"]}
    write_json(tmp_path / "x.json", content)
    assert (tmp_path / "x.json").read_text().endswith("}\n")
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]


def test_a_teachers_run_does_not_depend_on_the_student(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", _run(tmp_path / "run").recipe, "teacher")
    _enter(run, resume=False, overwrite=False)
    changed = config.override(run.recipe, ["student.backbone=mobilenetv3_small_100"])
    assert _enter(Run(run.folder, changed, "teacher"), resume=True, overwrite=False) is False
    other = config.override(changed, ["student.backbone=mobilenetv3_small_075"])
    with pytest.raises(AcamkdError, match=r"student\.backbone was"):
        _enter(Run(run.folder, other, "student"), resume=True, overwrite=False)
