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


def build(task: Task, **more: Any) -> TaskModel:
    torch.manual_seed(0)
    options = {"options": {**MODELS[task]["options"], "score_thresh": 0.0}} if task == "detection" else {}
    return models.build(config.Model(**{**MODELS[task], **options, **more}), task, 3, (64, 64)).eval()


def form(kind: type[TorchForm], task: Task, **more: Any) -> TorchForm:
    """As it comes out of the pickle."""
    made = kind("student", Path("s.safetensors"), 1, partial(build, task, **more))
    found: TorchForm = pickle.loads(pickle.dumps(made))
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


def test_a_second_stage_runs_within_decode_in_float32() -> None:
    """As the guide says of Faster R-CNN."""
    half = form(Bfloat16Form, "detection", arch="faster_rcnn", options={"anchor_sizes": [8, 16, 32, 48, 64]})
    heads: Any = half.model.net.roi_heads
    types: list[torch.dtype] = []
    heads.box_head.register_forward_hook(lambda *call: types.append(call[-1].dtype))
    inputs = half.prepare(IMAGES[:1])
    outputs = half.run(inputs)
    assert types == []
    half.decode(outputs, inputs)
    assert types == [torch.float32]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_a_compiled_network_predicts_the_same(task: Task) -> None:
    compiled, plain = form(CompiledForm, task), form(TorchForm, task)
    inputs: Any = compiled.prepare(IMAGES)
    ours, theirs = compiled.run(inputs), plain.run(inputs)
    for name in {"out", "cls_logits", "bbox_regression"} & theirs.keys():
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4)
