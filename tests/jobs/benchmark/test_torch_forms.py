from __future__ import annotations

import pickle
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from acamkd import config, models
from acamkd.jobs.benchmark.torch_forms import Bfloat16Form, CompiledForm, TorchForm
from acamkd.models.base import Task, TaskModel
from tiny_recipes import MODELS

IMAGES = list(np.random.default_rng(0).integers(0, 256, (2, 50, 60, 3), np.uint8))


def build(task: Task) -> TaskModel:
    torch.manual_seed(0)
    options = {"options": {**MODELS[task]["options"], "score_thresh": 0.0}} if task == "detection" else {}
    return models.build(config.Model(**{**MODELS[task], **options}), task, 3, (64, 64)).eval()


def form(kind: type[TorchForm], task: Task) -> TorchForm:
    """As it comes out of the pickle."""
    found: TorchForm = pickle.loads(pickle.dumps(kind("student", Path("s.safetensors"), 1, partial(build, task))))
    found.load()
    return found


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_it_predicts_what_the_network_predicts(task: Task) -> None:
    pytorch = form(TorchForm, task)
    assert pytorch.name == "PyTorch"
    expected = build(task).predict([torch.from_numpy(image).permute(2, 0, 1) for image in IMAGES])
    for found, wanted in zip(pytorch.predict(IMAGES), expected, strict=True):
        assert found.keys() == wanted.keys()
        for name, values in wanted.items():
            np.testing.assert_allclose(found[name], values.numpy(), rtol=1e-4, atol=1e-4)


def test_bfloat16_rounds_the_network_alone() -> None:
    half, full = form(Bfloat16Form, "segmentation"), form(TorchForm, "segmentation")
    inputs = half.prepare(IMAGES)
    assert inputs.pixels.dtype == torch.float32
    ours, theirs = (each.run(inputs)["out"] for each in (half, full))
    assert ours.dtype == torch.float32  # as the metrics need it
    difference = (ours - theirs).abs().max() / theirs.abs().max()
    assert 1e-4 < difference < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_a_compiled_network_predicts_the_same(task: Task) -> None:
    compiled, plain = form(CompiledForm, task), form(TorchForm, task)
    inputs: Any = compiled.prepare(IMAGES)
    ours, theirs = compiled.run(inputs), plain.run(inputs)
    for name in {"out", "cls_logits", "bbox_regression"} & theirs.keys():
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4)
