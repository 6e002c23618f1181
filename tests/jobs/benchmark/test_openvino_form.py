from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from acamkd.errors import AcamkdError
from acamkd.jobs.benchmark.openvino_form import OpenVinoForm
from acamkd.jobs.export.onnx_model import OnnxModel
from acamkd.jobs.export.openvino_model import OpenVinoModel
from tiny_onnx import write_segmenter

pytest.importorskip("openvino")


def test_it_computes_what_onnxruntime_computes(tmp_path: Path) -> None:
    form = OpenVinoForm("student", write_segmenter(tmp_path / "student.int8.onnx", classes=("a", "b", "c")), 1)
    assert form.name == "OpenVINO int8"
    form.load()
    expected = OnnxModel(form.file)
    assert (form.model.task, form.model.classes) == ("segmentation", ("a", "b", "c"))
    assert form.model.metadata == expected.metadata
    pixels = np.random.default_rng(0).random((2, 3, 32, 64), np.float32)
    found = form.model.run(pixels)
    assert found.keys() == {"logits"}
    logits = expected.run(pixels)["logits"]
    np.testing.assert_allclose(found["logits"], logits, atol=0.1)  # some processors compute in bfloat16
    exact = OpenVinoModel(form.file, precision="f32").run(pixels)["logits"]
    np.testing.assert_allclose(exact, logits, rtol=1e-4, atol=1e-4)


def test_a_file_that_is_no_network_is_said(tmp_path: Path) -> None:
    file = tmp_path / "student.onnx"
    file.write_bytes(b"nothing")
    with pytest.raises(AcamkdError, match=r"student\.onnx: OpenVINO cannot read it"):
        OpenVinoForm("student", file, 1).load()
