from __future__ import annotations

import argparse
import logging
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from acamkd.errors import AcamkdError
from acamkd.models import load_weights

State = dict[str, Tensor]


trace: Any = torch.jit.trace


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1))


def below(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


FORMS: dict[str, Callable[[State], Any]] = {
    "model_state_dict": lambda state: {"epoch": 3, "model_state_dict": state, "optimizer": {"state": {0: {"m": 1}}}},
    "net": lambda state: {"net": state},
    "nested": lambda state: {"checkpoint": {"model": below("module.", state)}},
    "ema alone": lambda state: {"ema": state},
    "NumPy scalars": lambda state: {
        "state_dict": state,
        "best": np.float64(3),
        "loss": np.float32(2),
        "n": np.int64(1),
    },
    "NumPy arrays": lambda state: {name: tensor.numpy() for name, tensor in state.items()},
    "compiled": lambda state: below("_orig_mod.", state),
    "partly compiled": lambda state: {
        n if n[0] == "0" else n.replace(".", "._orig_mod.", 1): t for n, t in state.items()
    },
    "sharded": lambda state: below("_fsdp_wrapped_module.module.", state),
    "colors of MMDetection": lambda state: {
        "state_dict": state
        | {"data_preprocessor.mean": torch.ones(3, 1, 1), "data_preprocessor.std": torch.ones(3, 1, 1)}
    },
    "colors of detectron2": lambda state: {
        "model": below("net.", state) | {"pixel_mean": torch.ones(3, 1, 1), "pixel_std": torch.ones(3, 1, 1)}
    },
    "beside a loss's parameters": lambda state: {"state_dict": below("model.", state) | {"loss.weight": torch.ones(7)}},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_wrapper_is_taken_off(form: str, tmp_path: Path) -> None:
    source, target, file = small(), small(), tmp_path / "x.pth"
    torch.save(FORMS[form](source.state_dict()), file)
    report = load_weights(target, str(file), strict=True, what="teacher")
    assert (len(report.matched), report.unexpected) == (8, ())
    for name, tensor in source.state_dict().items():
        assert torch.equal(tensor, target.state_dict()[name])


@pytest.mark.parametrize(
    ("write", "taken", "other"),
    [
        (lambda plain, ema: {"state_dict": plain, "state_dict_ema": ema}, "state_dict_ema", "state_dict"),
        (lambda plain, ema: {"model": plain, "model_ema": {"module": ema}}, "model_ema.module", "model"),
        (
            lambda plain, ema: {"state_dict": below("model.", plain) | below("ema_model.", ema)},
            "state_dict.ema_model",
            "state_dict.model",
        ),
    ],
)
def test_an_average_beside_the_weights_is_taken_and_named(
    write: Callable[[State, State], Any], taken: str, other: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain, average, target = small(), small(), small()
    torch.save(write(plain.state_dict(), average.state_dict()), tmp_path / "x.pth")
    load_weights(target, str(tmp_path / "x.pth"), strict=True, what="teacher")
    assert torch.equal(target.state_dict()["0.weight"], average.state_dict()["0.weight"])
    assert f"{taken} is taken, not {other};" in caplog.text


def test_statistics_of_colors_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "acamkd")
    torch.save(small().state_dict() | {"pixel_mean": torch.tensor([103.5, 116.3, 123.7])}, tmp_path / "x.pth")
    load_weights(small(), str(tmp_path / "x.pth"), strict=True, what="teacher")
    assert "pixel_mean is [103.5, 116.3, 123.7]" in caplog.text


def test_a_file_without_weights_names_its_keys(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "optimizer": {"state": {0: torch.ones(2)}}}, tmp_path / "x.pth")
    with pytest.raises(AcamkdError, match="no state dict in it; its keys are epoch, optimizer; save one by"):
        load_weights(small(), str(tmp_path / "x.pth"), strict=True, what="teacher")


FOREIGN: dict[str, Callable[[nn.Module, Path], object]] = {
    "whole module": lambda net, file: torch.save(net, file),
    "module below a key": lambda net, file: torch.save({"epoch": 1, "model": net}, file),
    "modules and their average": lambda net, file: torch.save({"model": small(), "ema": net, "updates": 3}, file),
    "arguments": lambda net, file: torch.save({"weights": net.state_dict(), "args": argparse.Namespace(lr=1)}, file),
    "arguments, older format": lambda net, file: torch.save(
        {"weights": net.state_dict(), "args": argparse.Namespace(lr=1)}, file, _use_new_zipfile_serialization=False
    ),
    "module, older format": lambda net, file: torch.save(net, file, _use_new_zipfile_serialization=False),
    "TorchScript": lambda net, file: torch.jit.save(trace(net, torch.rand(2, 3, 8, 8)), file),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_the_advice_for_a_foreign_file_works(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source, target, file = small().eval(), small(), tmp_path / "x.pt"
    FOREIGN[kind](source, file)
    for _ in range(1 + ("older" in kind)):  # a file in the older format takes a step more
        with pytest.raises(AcamkdError) as error:
            load_weights(target, str(file), strict=True, what="teacher")
        advice = re.findall(r"(?:with torch\.\S+\(\[[^]]*\]\): )?torch\.save\(torch.*?, 'NEW\.pth'\)", str(error.value))
        exec(advice[0], {"torch": torch, "argparse": argparse})
        file = Path("NEW.pth")
    load_weights(target, "NEW.pth", strict=True, what="teacher")
    assert torch.equal(target.state_dict()["0.weight"], source.state_dict()["0.weight"])


def test_the_outline_of_a_file_runs_nothing(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"state_dict": small().state_dict(), "x": Bomb()}, tmp_path / "x.pth")
    with pytest.raises(AcamkdError, match=r"Python objects|would call"):
        load_weights(small(), str(tmp_path / "x.pth"), strict=True, what="teacher")
    assert not (tmp_path / "ran").exists()
    with (tmp_path / "y.pth").open("wb") as file:  # a pickle that ends like an archive: torch reads its beginning
        pickle.dump({"x": Bomb()}, file)
        file.write((tmp_path / "x.pth").read_bytes())
    with pytest.raises(AcamkdError, match=r"Python objects|would call|damaged"):
        load_weights(small(), str(tmp_path / "y.pth"), strict=True, what="teacher")
    assert not (tmp_path / "ran").exists()
