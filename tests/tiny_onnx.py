"""Exported networks of a few values, made by hand: PyTorch's exporter takes seconds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx


def write_onnx(
    file: Path,
    task: str,
    nodes: list[Any],
    weights: list[Any],
    outputs: dict[str, list[Any]],
    classes: Sequence[str] = ("a", "b"),
    resize: Sequence[int] | Mapping[str, int] | None = None,
    shape: Sequence[int | str] = ("n", 3, "h", "w"),
) -> Path:
    """Write a graph with the metadata of an export; `shape` is that of its pixels."""
    kinds = {"labels": onnx.TensorProto.INT64}
    values = [onnx.helper.make_tensor_value_info(name, kinds.get(name, 1), shape) for name, shape in outputs.items()]
    pixels = onnx.helper.make_tensor_value_info("pixels", onnx.TensorProto.FLOAT, shape)
    graph = onnx.helper.make_graph(nodes, "g", [pixels], values, weights)
    model = onnx.helper.make_model(graph, ir_version=10, opset_imports=[onnx.helper.make_opsetid("", 18)])
    metadata = {"acamkd_version": "0", "task": task, "classes": list(classes), "resize": resize, "mean": [0.5] * 3,
                "nms": None}  # fmt: skip
    onnx.helper.set_model_props(model, {name: json.dumps(value) for name, value in metadata.items()})
    onnx.save(model, file)
    return file


def write_segmenter(
    file: Path,
    classes: Sequence[str] = ("a", "b"),
    resize: Sequence[int] | Mapping[str, int] | None = None,
    hidden: int = 8,
    seed: int = 0,
    shape: Sequence[int | str] = ("n", 3, "h", "w"),
) -> Path:
    """Two convolutions with a ReLU between them, with random weights."""
    draw = np.random.default_rng(seed)
    sizes = {"w1": (hidden, 3, 3, 3), "b1": (hidden,), "w2": (len(classes), hidden, 1, 1)}
    weights = [
        onnx.numpy_helper.from_array(draw.normal(0, 0.5, size).astype(np.float32), name) for name, size in sizes.items()
    ]
    nodes = [
        onnx.helper.make_node("Conv", ["pixels", "w1", "b1"], ["x"], "first", pads=[1, 1, 1, 1]),
        onnx.helper.make_node("Relu", ["x"], ["y"], "relu"),
        onnx.helper.make_node("Conv", ["y", "w2"], ["logits"], "second"),
    ]
    outputs: dict[str, list[Any]] = {"logits": [shape[0], len(classes), *shape[2:]]}
    return write_onnx(file, "segmentation", nodes, weights, outputs, classes, resize, shape)
