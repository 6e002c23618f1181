"""Exported networks of a few values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from tiny_onnx import write_onnx


@pytest.fixture
def red(tmp_path: Path) -> Path:
    """A segmenter: class 1 where there is more red than blue."""
    weights = onnx.numpy_helper.from_array(np.array([[0, 0, 0], [1, 0, -1]], np.float32)[..., None, None], "w")
    node = onnx.helper.make_node("Conv", ["pixels", "w"], ["logits"])
    return write_onnx(tmp_path / "red.onnx", "segmentation", [node], [weights], {"logits": ["n", 2, "h", "w"]})


@pytest.fixture
def box(tmp_path: Path) -> Path:
    """A detector that finds the same two boxes in every image, one of them with a score of 0.2."""
    found = {
        "boxes": np.array([[1, 2, 11, 22], [0, 0, 4, 4]], np.float32), "scores": np.array([0.9, 0.2], np.float32),
        "labels": np.array([2, 1]),
    }  # fmt: skip
    nodes = [
        onnx.helper.make_node("Constant", [], [name], value=onnx.numpy_helper.from_array(value))
        for name, value in found.items()
    ]
    shapes = {name: list(value.shape) for name, value in found.items()}
    return write_onnx(tmp_path / "box.onnx", "detection", nodes, [], shapes)
