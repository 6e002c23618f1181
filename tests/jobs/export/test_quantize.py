from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from acamkd.errors import AcamkdError
from acamkd.jobs.export.onnx_model import OnnxModel
from acamkd.jobs.export.quantize import CALIBRATIONS, GROUPS, _groups, _Quantizer, quantize
from tiny_onnx import write_segmenter

IMAGES = list(np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), np.uint8))


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    return write_segmenter(tmp_path / "student.onnx", classes=("a", "b", "c"), resize=(32, 32))


def agreement(reference: Path) -> Callable[[Path], float]:
    """Percent of pixels with the class that the reference gives."""
    model = OnnxModel(reference, threads=1)
    expected = [model.predict(image)["mask"] for image in IMAGES]

    def score(file: Path) -> float:
        found = OnnxModel(file, threads=1)
        same = [found.predict(image)["mask"] == mask for image, mask in zip(IMAGES, expected, strict=True)]
        return 100 * float(np.mean(same))

    return score


def kinds(file: Path) -> dict[str, set[int]]:
    """Types of the weights that each convolution reads, through its DequantizeLinear if there is one."""
    graph = onnx.load(file).graph
    types = {value.name: value.data_type for value in graph.initializer}
    sources = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    return {
        node.name: {types[sources.get(node.input[1], node.input[1])]} for node in graph.node if node.op_type == "Conv"
    }


def test_weights_have_eight_bits_and_predictions_stay(exported: Path, tmp_path: Path) -> None:
    out = tmp_path / "student.int8.onnx"
    found = quantize(exported, out, IMAGES, agreement(exported), before=100.0, max_drop=5.0)
    kinds_of_nodes = ("computing", "all")
    assert set(found.tried) == {f"{method} of {kind} operators" for method in CALIBRATIONS for kind in kinds_of_nodes}
    assert found.after == max(found.tried.values()) == found.tried[found.method]
    assert 95 <= found.after < 100  # eight bits differ somewhere
    assert found.float_nodes == ()
    assert kinds(out) == {"first": {onnx.TensorProto.INT8}, "second": {onnx.TensorProto.INT8}}
    assert OnnxModel(out).metadata == OnnxModel(exported).metadata
    scales = [value for value in onnx.load(out).graph.initializer if value.name == "w1_scale"]
    assert [list(value.dims) for value in scales] == [[8]]  # one per output channel
    assert f"100.00 before, {found.after:.2f} after; {found.method} (MinMax of " in str(found)
    assert "none of 3 nodes left in float" in str(found)


def test_images_of_several_sizes_are_calibrated_on(tmp_path: Path) -> None:
    """Each range is of all images: the first two have no value above 0.5, the color of the padding."""
    file = write_segmenter(tmp_path / "student.onnx", classes=("a", "b", "c"))
    sizes = [(32, 32), (40, 70), (64, 32), (32, 96)]
    images = [np.full((*size, 3), level, np.uint8) for level, size in zip((9, 99, 199, 255), sizes, strict=True)]
    found = quantize(file, tmp_path / "student.int8.onnx", images, agreement(file), before=100.0, max_drop=5.0)
    assert {name.split()[0] for name in found.tried} == set(CALIBRATIONS)
    assert found.after >= 95
    quantizer = _Quantizer(file, tmp_path, images)
    assert {each["pixels"].shape[2:] for each in quantizer._inputs} == {(32, 32), (64, 96), (64, 32), (32, 96)}
    for method in CALIBRATIONS:
        assert 0.6 < quantizer._calibrate(method).data["pixels"].range_value[1] < 1.01


def test_what_costs_most_stays_in_float(exported: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Only the first convolution costs anything here."""

    def score(file: Path) -> float:
        return 100.0 if onnx.TensorProto.INT8 not in kinds(file)["first"] else 90.0

    caplog.set_level(logging.INFO, logger="acamkd")
    out = tmp_path / "student.int8.onnx"
    found = quantize(exported, out, IMAGES, score, before=100.0, max_drop=1.0)
    assert found.float_nodes == ("first",)
    assert found.after == 100
    assert kinds(out) == {"first": {onnx.TensorProto.FLOAT}, "second": {onnx.TensorProto.INT8}}
    assert "part 1 of 3 in float: +10.00" in caplog.text
    assert "part 2 of 3 in float: +0.00" in caplog.text


def test_a_file_that_loses_too_much_is_not_written(exported: Path, tmp_path: Path) -> None:
    def score(_: Path) -> float:
        return 47.5

    out = tmp_path / "student.int8.onnx"
    with pytest.raises(AcamkdError, match=r"loses 2\.50 points, 50\.00 before and 47\.50 after, with 1 of 3 nodes"):
        quantize(exported, out, IMAGES, score, before=50.0, max_drop=1.0)
    assert not out.exists()
    with pytest.raises(AcamkdError, match="INT8 loses nan points"):
        quantize(exported, out, IMAGES, lambda _: float("nan"), before=50.0, max_drop=1.0)


def test_a_file_that_onnxruntime_cannot_read_is_said(tmp_path: Path) -> None:
    broken = tmp_path / "student.onnx"
    broken.write_bytes(b"nothing")
    with pytest.raises(AcamkdError, match=r"onnxruntime cannot prepare student\.onnx for INT8"):
        quantize(broken, tmp_path / "out.onnx", IMAGES, lambda _: 0.0, before=0.0, max_drop=1.0)


def test_what_onnxruntime_cannot_quantize_is_said(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(AcamkdError, match=r"^onnxruntime cannot quantize the network: "):
        quantize(exported, tmp_path / "out.onnx", [], lambda _: 0.0, before=0.0, max_drop=1.0)
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize("count", [1, 3, GROUPS, 100])
def test_parts_hold_every_node_once(count: int) -> None:
    nodes = [str(index) for index in range(count)]
    parts = list(_groups(nodes))
    assert [node for part in parts for node in part] == nodes
    assert len(parts) == min(count, GROUPS)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
