"""`train.accelerator: cpu` keeps every job from a GPU that is there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import tiny
from acamkd import config
from acamkd.engine.devices import device_of
from acamkd.jobs.doctor import doctor
from acamkd.jobs.evaluate import evaluate
from acamkd.jobs.predict.predict import predict
from acamkd.jobs.tokens import learn_tokens
from acamkd.jobs.train import distill


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(root: Path) -> Path:
    distill(tiny.recipe(root, epochs=1), out=root / "run", overrides=["losses.0.weight=auto"])
    return root / "run"


@pytest.fixture
def _gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that is there and cannot be worked on: whatever goes to it fails."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.optim.Optimizer, "_accelerator_graph_capture_health_check", lambda _: None)


@pytest.mark.usefixtures("_gpu")
@pytest.mark.parametrize(
    ("accelerator", "rank", "device"),
    [("auto", None, "cuda:0"), ("gpu", None, "cuda:0"), ("cuda", "3", "cuda:1"), ("cpu", None, "cpu")],
)
def test_the_recipe_chooses_the_device(
    accelerator: str, rank: str | None, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if rank:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert device_of(config.Train(epochs=1, accelerator=accelerator)) == torch.device(device)


@pytest.mark.parametrize("accelerator", ["auto", "gpu", "mps"])
def test_a_mac_computes_where_lightning_does(accelerator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert device_of(config.Train(epochs=1, accelerator=accelerator)) == torch.device("mps")


def test_a_run_of_a_gpu_is_opened_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for accelerator in ("auto", "gpu", "cuda", "mps", "cpu"):
        assert device_of(config.Train(epochs=1, accelerator=accelerator)) == torch.device("cpu")


@pytest.mark.usefixtures("_gpu")
@pytest.mark.parametrize(
    "job",
    [
        lambda root, run, out: distill(tiny.recipe(root, epochs=1), out=out, overrides=["losses.0.weight=auto"]),
        lambda root, run, out: learn_tokens(
            config.override(tiny.recipe(root), ["losses.0.name=maskd", "losses.0.num_tokens=2"]),
            out=out / "tokens.safetensors", iterations=1,
        ),
        lambda root, run, out: evaluate(run),
        lambda root, run, out: predict(run, root / "images/val", out=out),
    ],
    ids=["distill", "tokens", "evaluate", "predict"],
)  # fmt: skip
def test_no_job_touches_a_gpu_that_the_recipe_does_not_choose(
    job: Callable[[Path, Path, Path], object], root: Path, run: Path, tmp_path: Path
) -> None:
    job(root, run, tmp_path / "out")


@pytest.mark.usefixtures("_gpu")
def test_the_doctor_touches_no_gpu_that_the_recipe_does_not_choose(root: Path) -> None:
    checks = [finding.check for finding in doctor(tiny.recipe(root)).findings]
    assert {"teacher's score", "gradient"} <= set(checks)  # the last one: nothing before it has failed
