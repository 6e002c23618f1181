"""Networks of transformers, and a TaskModel of one's own, as ONNX files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

from acamkd import config
from acamkd.errors import AcamkdError
from acamkd.jobs.export.graph import FormGraph, build_graph, write_graph
from acamkd.jobs.export.onnx_model import ExportedModel, OnnxModel
from acamkd.jobs.export.openvino_model import OpenVinoModel, write_openvino
from acamkd.jobs.export.parity import _query_difference, compare_outputs
from acamkd.jobs.export.quantize import quantize
from acamkd.models import TaskModel, build
from acamkd.models.base import Batch, ExportForm
from acamkd.models.hf_kinds import KINDS
from acamkd.models.segmentation import Segmenter
from tiny_hf import OPTIONS

pytest.importorskip("transformers")

CLASSES = ("cat", "dog", "cow")
QUICK = {"eomt"}
"""The others are slow tests, pytest -m slow tests/jobs/export/test_hf_export.py; the guide exports a detector."""


def make(name: str, size: Any = (128, 128)) -> TaskModel:
    torch.manual_seed(0)
    section = config.Model(arch=f"hf/{name}", options=OPTIONS[name])
    model = build(section, KINDS[name].task, len(CLASSES), size).eval()
    with torch.no_grad():  # else all queries are alike, and rounding decides which are chosen
        for parameter in model.net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def images(*sizes: tuple[int, int]) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=random) for size in sizes]


def recipe_of(task: str, resize: Any) -> Any:
    data = config.Data(root=Path(), classes=CLASSES, resize=resize)
    return type("Recipe", (), {"task": task, "data": data})


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in KINDS])
@torch.no_grad()
def test_the_file_finds_what_pytorch_finds(name: str, tmp_path: Path) -> None:
    # Padding where the network allows it: its mask is a part of the graph.
    size = (128, 128) if KINDS[name].is_fixed else (128, 112)
    model = make(name, size)
    graph = build_graph(model, size, with_nms=False)
    write_graph(graph, tmp_path / "student.onnx", recipe_of(model.task, size))
    exported = OnnxModel(tmp_path / "student.onnx")
    given = images((100, 150), size)
    largest, _ = compare_outputs(graph, exported, [(image, {}) for image in given])  # type: ignore[arg-type]
    assert largest < 1e-4
    assert exported.takes_batches
    outputs = exported.run(model.prepare(given * 2).pixels[:3].numpy())
    assert {len(values) for values in outputs.values()} == {3}
    for image in given:
        (ours,) = model.predict([image])
        theirs = exported.predict(image.permute(1, 2, 0).numpy())
        if model.task == "segmentation":
            assert (theirs["mask"] == ours["mask"].numpy()).mean() > 0.99
            continue
        np.testing.assert_allclose(theirs["scores"], ours["scores"].numpy(), atol=1e-2)
        assert box_iou(torch.from_numpy(theirs["boxes"]), ours["boxes"]).max(dim=1)[0].median() > 0.95


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rt_detr_v2", "d_fine", "segformer", "upernet", "dpt", "mask2former"])
@torch.no_grad()
def test_it_is_quantized_and_runs_in_openvino(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("acamkd.jobs.export.quantize.CALIBRATIONS", ("MinMax",))
    model = make(name, (128, 112))
    graph = build_graph(model, (128, 112), with_nms=False, openvino=True)
    file, small = tmp_path / "student.onnx", tmp_path / "student.int8.onnx"
    write_graph(graph, file, recipe_of(model.task, (128, 112)))
    given = images((100, 150), (128, 112))
    arrays = [image.permute(1, 2, 0).numpy() for image in given]

    def agreement(found: ExportedModel) -> float:
        """Percent of the pixels with the float file's class; of a detector 100 where it finds boxes at all."""
        pairs = [(OnnxModel(file).predict(array), found.predict(array)) for array in arrays]
        if model.task == "detection":
            return 100.0 * all(len(theirs["boxes"]) and np.isfinite(theirs["boxes"]).all() for _, theirs in pairs)
        return 100 * float(np.mean([np.mean(ours["mask"] == theirs["mask"]) for ours, theirs in pairs]))

    found = quantize(file, small, arrays, lambda trial: agreement(OnnxModel(trial)), before=100.0, max_drop=2.0)
    assert found.float_nodes == ()
    last = ("convolving", "weighted") if model.task == "detection" else ("computing", "all")
    assert set(found.tried) == {f"MinMax of {kind} operators" for kind in last}
    made_by = {name: node.op_type for node in onnx.load(small).graph.node for name in node.output}
    assert "DequantizeLinear" in made_by.values()
    assert model.task == "segmentation" or made_by["boxes"] != "DequantizeLinear"
    pytest.importorskip("openvino")
    for one in (file, small):
        write_openvino(one, one.with_suffix(".xml"))
    in_openvino = OpenVinoModel(tmp_path / "student.xml", precision="f32")
    compare_outputs(graph, in_openvino, [(image, {}) for image in given], "OpenVINO")  # type: ignore[arg-type]
    assert agreement(OpenVinoModel(tmp_path / "student.int8.xml", precision="f32")) >= 98


class Reader(ExportedModel):
    def run(self, pixels: Any) -> Any:
        return {}


@pytest.mark.parametrize(
    ("name", "kernel"),
    [("rt_detr", "bilinear"), ("beit", "bicubic"), ("rf_detr", "plain"), ("mask2former", "bilinear")],
)
def test_images_are_prepared_as_in_pytorch(name: str, kernel: str) -> None:
    model = make(name, (96, 128))
    graph = FormGraph(model, model.export_form())
    assert graph.settings()["preparation"]["kernel"] == kernel
    metadata = {
        "task": model.task,
        "classes": CLASSES,
        "mean": model.mean.flatten().tolist(),
        "resize": None,
        "nms": None,
    }
    reader = Reader({**metadata, **graph.settings()})
    for image in images((61, 90), (200, 300), (96, 128)):
        frame, size = reader.prepare(image.permute(1, 2, 0).numpy())
        batch = model.prepare([image])
        assert [size] == batch.sizes
        # Both round to one of 255 values, torch and Pillow at times to neighbors.
        np.testing.assert_allclose(frame, batch.pixels.numpy(), atol=1.01 / 255)
        assert np.abs(frame - batch.pixels.numpy()).mean() < 0.1 / 255


def test_what_cannot_be_exported_is_said_before_the_work() -> None:
    with pytest.raises(AcamkdError, match=r"DetrForObjectDetection is exported for one input size: --set data.resize"):
        build_graph(make("detr", None), None, with_nms=False)
    with pytest.raises(AcamkdError, match="DetrForObjectDetection has no non-maximum suppression of ours"):
        build_graph(make("detr"), (128, 128), with_nms=True)
    for abstract in (Segmenter.decode, Segmenter.prepare):
        assert abstract.__name__ in TaskModel.__abstractmethods__
    own = Own(nn.Conv2d(3, 3, 1), 3, (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(AcamkdError, match="Own cannot be exported: its class does not define `export_form`"):
        build_graph(own, None, with_nms=False)


class Own(TaskModel):
    """One's own, without an export."""

    task = "segmentation"
    prepare = Segmenter.prepare
    resize = (32, 64)

    def forward(self, batch: Batch) -> Any:
        return {"out": self.net(self.normalize(batch))}

    def loss(self, outputs: Any, batch: Batch) -> Any:
        raise NotImplementedError

    decode = Segmenter.decode


class OwnWithExport(Own):
    def export_form(self) -> ExportForm:
        size = self.resize
        return ExportForm(lambda pixels: self(Batch(pixels, [size], [size])), size, multiple=32, is_traced=True)


def test_queries_are_compared_as_sets() -> None:
    draw = np.random.default_rng(0)
    boxes, scores = 100 * draw.random((1, 40, 4)), draw.random((1, 40))
    labels = np.arange(40)[None] % 3

    def found(order: Sequence[int] | Any, **changed: Any) -> dict[str, Any]:
        given = {"boxes": boxes, "scores": scores, "labels": labels, **changed}
        return {name: values[:, order] for name, values in given.items()}

    ours, order = found(range(40)), draw.permutation(40)
    assert _query_difference(ours, found(order), (100, 100)) == 0
    few, many = scores.copy(), scores.copy()
    few[0, :2] += 0.5
    many[0, :20] += 0.5
    assert _query_difference(ours, found(order, scores=few), (100, 100)) == 0  # one in twenty may be another
    assert _query_difference(ours, found(order, scores=many), (100, 100)) > 0.05
    assert _query_difference(ours, found(order, labels=(labels + 1) % 3), (100, 100)) > 0.01
    assert _query_difference(ours, found(order, boxes=boxes + 2), (100, 100)) > 0.01
