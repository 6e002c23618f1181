from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from acamkd.errors import AcamkdError
from acamkd.jobs.export import export as exporting
from acamkd.jobs.export import onnx_model, openvino_model
from acamkd.jobs.export.onnx_model import OnnxModel
from acamkd.jobs.export.openvino_model import OpenVinoModel, write_openvino
from acamkd.jobs.predict.predict import predict
from tiny_onnx import write_segmenter

pytest.importorskip("openvino")


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    onnx, own = write_segmenter(tmp_path / "student.onnx", classes=("a", "b", "c")), tmp_path / "student.xml"
    write_openvino(onnx, own)
    return onnx, own


def test_its_own_file_computes_what_the_onnx_file_does(files: tuple[Path, Path]) -> None:
    expected, found = OnnxModel(files[0]), OpenVinoModel(files[1], threads=1, precision="f32")
    assert found.metadata == expected.metadata
    pixels = np.random.default_rng(0).random((2, 3, 32, 64), np.float32)
    ours, theirs = expected.run(pixels)["logits"], found.run(pixels)["logits"]
    np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-4)


def test_it_knows_the_size_of_a_graph(files: tuple[Path, Path], tmp_path: Path) -> None:
    assert OpenVinoModel(files[1]).input_size is None
    fixed = OpenVinoModel(write_segmenter(tmp_path / "fixed.onnx", shape=(1, 3, 64, 96)))
    assert fixed.input_size == (64, 96)
    with pytest.raises(AcamkdError, match="takes inputs of 64 x 96 pixels alone, and an image of 32 x 32 becomes"):
        fixed.predict(np.zeros((32, 32, 3), np.uint8))


def test_predict_takes_it(files: tuple[Path, Path], tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    masks = [
        np.array(Image.open(predict(file, tmp_path / "a.png", out=tmp_path / file.suffix).folder / "masks/a.png"))
        for file in files
    ]
    assert len(np.unique(masks[0])) > 1
    assert (masks[0] == masks[1]).mean() > 0.99


def test_the_copy_in_an_export_needs_no_acamkd(files: tuple[Path, Path], tmp_path: Path) -> None:
    for module in (onnx_model, openvino_model):
        shutil.copy(str(module.__file__), tmp_path)
    script = (
        "import sys; sys.modules['acamkd'] = sys.modules['torch'] = sys.modules['onnxruntime'] = None\n"
        "import numpy as np; from openvino_model import OpenVinoModel\n"
        "print(OpenVinoModel('student.xml').predict(np.zeros((32, 32, 3), np.uint8))['mask'].shape)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout == "(32, 32)\n", done.stderr


def test_what_is_no_network_is_said(tmp_path: Path) -> None:
    (tmp_path / "student.onnx").write_bytes(b"nothing")
    with pytest.raises(AcamkdError, match=r"student\.onnx: OpenVINO cannot read it"):
        write_openvino(tmp_path / "student.onnx", tmp_path / "student.xml")
    (tmp_path / "taken").touch()
    write_segmenter(tmp_path / "student.onnx")
    with pytest.raises(AcamkdError, match=rf"student\.onnx: OpenVINO cannot write {tmp_path}/taken/a\.xml: "):
        write_openvino(tmp_path / "student.onnx", tmp_path / "taken/a.xml")


def test_a_file_that_computes_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph of other weights stands for a conversion that goes wrong, a lower score for an INT8 file's loss."""
    write_segmenter(tmp_path / "student.onnx", seed=1)
    shutil.copy(write_segmenter(tmp_path / "other.onnx", seed=2), tmp_path / "student.int8.onnx")
    right = OnnxModel(tmp_path / "other.onnx")

    class Graph:
        output_names = ("logits",)
        has_queries = False
        model = SimpleNamespace(prepare=lambda images: SimpleNamespace(pixels=images[0][None] / 255))

        def __call__(self, pixels: Any) -> Any:
            return (torch.from_numpy(right.run(pixels.float().numpy())["logits"]),)

        def in_double(self) -> Any:
            return self

    images: Any = [(torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8), {})]
    run: Any = SimpleNamespace(recipe=SimpleNamespace(task="segmentation"))
    pytorch = exporting.Measured("student", "PyTorch", {"mIoU": 50.0}, None)
    monkeypatch.setattr(exporting, "_score_file", lambda *_: {"mIoU": 48.5})
    graph: Any = Graph()
    with pytest.raises(AcamkdError, match="its outputs by OpenVINO differ from PyTorch's by"):
        exporting._write_openvino(run, graph, tmp_path / "student.onnx", images, pytorch, 1.0)
    with pytest.raises(AcamkdError, match=r"mIoU 48\.50 by OpenVINO, 50\.00 by PyTorch"):
        exporting._write_openvino(run, graph, tmp_path / "other.onnx", images, pytorch, 1.0)
    with pytest.raises(AcamkdError, match=r"INT8 loses more in OpenVINO .* mIoU 50\.00 before, 48\.50 after"):
        exporting._write_openvino(run, graph, tmp_path / "student.int8.onnx", images, pytorch, 1.0)
