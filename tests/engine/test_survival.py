"""Runs that are killed, terminated or whose files are damaged, in processes of their own where it takes one."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

import leaving
import tiny
from acamkd import config
from acamkd.data import dataset
from acamkd.data.image_io import read_image
from acamkd.data.loading import Images
from acamkd.engine import checkpoint, runs
from acamkd.engine.module import TrainingModule
from acamkd.errors import AcamkdError
from acamkd.files import written_whole
from acamkd.jobs.train import distill, train


def _raw(root: Path, workers: int = 0, **train: Any) -> dict[str, Any]:
    """ACAM on networks with batch norm, images that are changed at random; 8 steps an epoch."""
    raw = tiny.raw_recipe(root, epochs=2, batch_size=1, **train)
    raw["data"] |= {"workers": workers, "augment": {"scale": [0.8, 1.2], "crop": [64, 64], "photometric": True}}
    return raw


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What comes out where nothing happens."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    distill(config.parse(_raw(root)), out=folder)
    return folder


def _signalled(raw: dict[str, Any], folder: Path, hook: str, at: tuple[int, int], number: int) -> int:
    """Exit code of a distillation, in a process of its own, that gets a signal within a given (epoch, batch)."""
    original = getattr(TrainingModule, hook)

    def signalled(self: TrainingModule, batch: Images, batch_idx: int) -> Any:
        if (self.current_epoch, batch_idx) == at:
            os.killpg(0, number)  # as schedulers do: the loading processes get it, too
        return original(self, batch, batch_idx)

    def job() -> None:
        os.setpgid(0, 0)
        setattr(TrainingModule, hook, signalled)
        distill(config.parse(raw), out=folder)

    return leaving.run(job)


def _same(one: Path, other: Path) -> None:
    """Bit for bit: figures, logs, best network, and everything that trains."""
    assert tiny.rows(one / "history.csv") == tiny.rows(other / "history.csv")
    assert tiny.rows(one / "logs/metrics.csv") == tiny.rows(other / "logs/metrics.csv")
    assert (one / "student.safetensors").read_bytes() == (other / "student.safetensors").read_bytes()
    ends = [torch.load(folder / "last.ckpt", weights_only=True) for folder in (one, other)]
    assert any("losses.0.selection" in name for name in ends[0]["state_dict"])
    assert any("running_var" in name for name in ends[0]["state_dict"])
    for part in ("state_dict", "optimizer_states"):
        torch.testing.assert_close(ends[0][part], ends[1][part], rtol=0, atol=0)
    assert ends[0]["lr_schedulers"] == ends[1]["lr_schedulers"]


@pytest.mark.parametrize(
    ("hook", "at", "every", "workers", "step"),
    [
        # goes on from the end of the first epoch
        pytest.param("training_step", (1, 5), None, 0, 8, marks=pytest.mark.slow),
        # from the middle of the first
        pytest.param("training_step", (0, 5), 2, 2, 4, marks=pytest.mark.slow),
        ("training_step", (1, 6), 5, 2, 10),  # from the middle of the second
        ("validation_step", (1, 2), 4, 0, 12),  # the last step of an epoch is behind it, its end is not
    ],
)
def test_a_killed_run_goes_on_to_the_same_end(
    hook: str, at: tuple[int, int], every: int | None, workers: int, step: int,
    whole: Path, root: Path, tmp_path: Path,
) -> None:  # fmt: skip
    raw, folder = _raw(root, workers, checkpoint_every=every), tmp_path / "run"
    assert _signalled(raw, folder, hook, at, signal.SIGKILL) == -signal.SIGKILL
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == step
    assert not (folder / "metrics.json").exists()
    distill(config.parse(raw), out=folder, resume=True)
    _same(whole, folder)


@pytest.mark.parametrize(
    ("hook", "at", "step"),
    [
        ("training_step", (0, 3), 4),  # that step is the last one
        ("validation_step", (0, 1), 8),  # the epoch ends first
    ],
)
def test_a_terminated_run_saves_itself_and_goes_on_to_the_same_end(
    hook: str, at: tuple[int, int], step: int, whole: Path, root: Path, tmp_path: Path
) -> None:
    raw, folder = _raw(root, workers=2), tmp_path / "run"
    assert _signalled(raw, folder, hook, at, signal.SIGTERM) == runs.TERMINATED == 143
    assert (folder / "log.txt").read_text().endswith(f"WARNING {folder}: terminated; --resume goes on at step {step}\n")
    distill(config.parse(raw), out=folder, resume=True)
    _same(whole, folder)


def _stopped(raw: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The run up to a step at which the user interrupts it."""
    original = TrainingModule.training_step

    def stop(self: TrainingModule, batch: Images, batch_idx: int) -> Tensor:
        if self.global_step == step:
            raise KeyboardInterrupt
        return original(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingModule, "training_step", stop)
        with pytest.raises(KeyboardInterrupt):
            distill(config.parse(raw), out=folder)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    whole: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    raw, folder = _raw(root, checkpoint_every=3), tmp_path / "run"
    _stopped(raw, folder, monkeypatch, step=7)
    last, previous = folder / runs.CHECKPOINT, folder / runs.PREVIOUS
    assert [torch.load(file, weights_only=True)["global_step"] for file in (last, previous)] == [6, 3]
    last.write_bytes(last.read_bytes()[:-1000])
    distill(config.parse(raw), out=folder, resume=True)
    assert f"{last}: the file is damaged" in caplog.text
    assert f"resuming from the previous checkpoint, {previous}" in caplog.text
    assert all(torch.load(file, weights_only=True)["global_step"] >= 3 for file in (last, previous))
    _same(whole, folder)


def test_a_checkpoint_lost_between_two_names_is_no_loss(tmp_path: Path) -> None:
    assert checkpoint.find_checkpoint(tmp_path) is None
    torch.save({}, tmp_path / runs.PREVIOUS)
    assert checkpoint.find_checkpoint(tmp_path) == tmp_path / runs.PREVIOUS
    (tmp_path / runs.PREVIOUS).write_bytes(b"PK")
    with pytest.raises(AcamkdError, match=r"previous.ckpt: the file is damaged.* start again with --overwrite"):
        checkpoint.find_checkpoint(tmp_path)


def test_average_sizes_groups_and_patience_go_on_to_the_same_end(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = tiny.raw_recipe(
        root, epochs=3, batch_size=4, checkpoint_every=1, ema=0.9, multiscale=[0.5, 1.5], patience=1,
        optimizer={"lr": 1e-3, "backbone_lr": 1e-4, "norm_decay": False},
    )  # fmt: skip

    def score(self: TrainingModule) -> None:
        self.scores = {"mIoU": 30.0 - 10 * self.current_epoch}

    monkeypatch.setattr(TrainingModule, "on_validation_epoch_end", score)
    folders = tmp_path / "whole", tmp_path / "run"
    distill(config.parse(raw), out=folders[0])
    _stopped(raw, folders[1], monkeypatch, step=3)  # in the middle of the second epoch
    distill(config.parse(raw), out=folders[1], resume=True)
    _same(*folders)
    ends = [torch.load(folder / "last.ckpt", weights_only=True) for folder in folders]
    torch.testing.assert_close(ends[0]["current_model_state"], ends[1]["current_model_state"], rtol=0, atol=0)
    assert [row["mIoU"] for row in tiny.rows(folders[1] / "history.csv")] == ["30.0", "20.0"]
    run = runs.open_run(folders[1])
    assert run.metrics["epochs"] == 2
    last, best = (model.net.state_dict() for model in (run.load_last(), run.load()))
    assert all(torch.equal(x, ends[0]["state_dict"][f"{runs.NET}{name}"]) for name, x in last.items())
    assert any(not torch.equal(x, last[name]) for name, x in best.items())


class Trap:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str, int]]:
        return os.mkdir, (str(self.mark), 0o777)


def test_a_checkpoint_runs_no_code(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw, folder = _raw(root), tmp_path / "run"
    _stopped(raw, folder, monkeypatch, step=9)
    torch.save({"state_dict": {}, "callbacks": Trap(tmp_path / "mark")}, folder / runs.CHECKPOINT)
    with pytest.raises(AcamkdError, match=r"last.ckpt: the file would call posix.mkdir"):
        distill(config.parse(raw), out=folder, resume=True)
    weights = {"weights": str(folder / runs.CHECKPOINT.replace("ckpt", "pt"))}
    (folder / runs.CHECKPOINT).rename(weights["weights"])
    with pytest.raises(AcamkdError, match=r"last.pt: the file would call posix.mkdir"):
        distill(config.parse(raw | {"teacher": raw["teacher"] | weights}), out=tmp_path / "other")
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, pytest.param(errno.EROFS, marks=pytest.mark.slow)])
def test_where_nothing_can_be_written_the_last_checkpoint_stays(
    number: int, whole: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, folder, written = _raw(root, checkpoint_every=3), tmp_path / "run", 0

    @contextmanager
    def full(path: Path, **options: Any) -> Iterator[Path]:
        nonlocal written
        with written_whole(path, **options) as unfinished:
            yield unfinished
            written += 1
            if written == 3:
                raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr("acamkd.engine.checkpoint.written_whole", full)
        with pytest.raises(
            AcamkdError, match=rf"run: the training stopped: .*{os.strerror(number)}.* --resume continues"
        ):
            distill(config.parse(raw), out=folder)
    assert not list(folder.rglob(".unfinished-*"))
    assert torch.load(folder / runs.CHECKPOINT, weights_only=True)["global_step"] == 6
    distill(config.parse(raw), out=folder, resume=True)
    _same(whole, folder)


@pytest.mark.parametrize("name", ["step", "polynomial"])
def test_a_run_goes_on_while_the_rate_rises(
    name: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = {"name": name, "warmup_steps": 2, **({"milestones": [1]} if name == "step" else {})}
    optimizer = {"name": "sgd" if name == "step" else "adamw"}
    raw = _raw(root, schedule=schedule, optimizer=optimizer, checkpoint_every=1)
    distill(config.parse(raw), out=tmp_path / "whole")
    _stopped(raw, tmp_path / "run", monkeypatch, step=1)  # while the rate rises
    distill(config.parse(raw), out=tmp_path / "run", resume=True)
    _same(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_death_of_a_loading_process_names_its_image(
    split: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = sorted((root / f"images/{split}").iterdir())[2]
    original = read_image

    def deadly(image: Path) -> Tensor:
        if image == file and get_worker_info():
            os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does where memory runs out
        return original(image)

    monkeypatch.setattr(dataset, "read_image", deadly)
    with pytest.raises(AcamkdError, match=rf"loads images .*; the last that it read was {file}\. If memory ran out"):
        train(config.parse(_raw(root, workers=1)), out=tmp_path / "run")


def test_images_that_vanish_end_the_run_with_one_message(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tiny.write_data(tmp_path / "data")

    def remove(self: TrainingModule) -> None:
        for file in (data / "images/train").iterdir():
            file.unlink()

    monkeypatch.setattr(TrainingModule, "on_train_epoch_end", remove)
    with pytest.raises(
        AcamkdError, match=r"run: the training stopped: .*images/train.*there is no such image.* --resume continues"
    ):
        train(config.parse(_raw(data, workers=1)), out=tmp_path / "run")
