from __future__ import annotations

import io
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from acamkd import config, models
from acamkd.data.image_io import read_image as read_as_tensor
from acamkd.errors import AcamkdError
from acamkd.jobs.export.graph import DenseGraph
from acamkd.jobs.export.onnx_model import (
    OnnxModel,
    best_classes,
    detections,
    frame_size,
    read_image,
    resize,
    resize_smoothly,
)
from acamkd.models.resize import frame_size as segmentation_size
from tiny_onnx import write_segmenter

SIZES = [(7, 9), (20, 30), (13, 17), (26, 34), (40, 5)]


@pytest.mark.parametrize("size", [(4, 5), (8, 10), (2, 20)])
def test_the_best_class_of_a_pixel_is_the_first_of_the_largest(size: tuple[int, int]) -> None:
    scores = torch.randint(0, 3, (6, 4, 5)).float()  # many are equal, and all sums exact
    expected = F.interpolate(scores[None], size=size, mode="bilinear")[0].max(dim=0).indices
    assert np.array_equal(best_classes(scores.numpy(), size), expected)


@pytest.mark.parametrize("size", SIZES)
def test_resizing_is_that_of_torch(size: tuple[int, int]) -> None:
    maps = torch.rand(3, 13, 17)
    plain = F.interpolate(maps[None], size=size, mode="bilinear", align_corners=False)[0]
    smooth = F.interpolate(maps[None], size=size, mode="bilinear", align_corners=False, antialias=True)[0]
    np.testing.assert_allclose(resize(maps.numpy(), size), plain.numpy(), atol=1e-6)
    np.testing.assert_allclose(resize_smoothly(maps.numpy(), size), smooth.numpy(), atol=1e-5)


@pytest.mark.parametrize("given", [(480, 640), (333, 500), (1080, 1920)])
@pytest.mark.parametrize("resize", [None, (192, 256), config.ShortLong(short=300, long=450)])
def test_frames_are_as_large_as_in_torch(given: tuple[int, int], resize: Any) -> None:
    said = resize.model_dump() if isinstance(resize, config.ShortLong) else resize
    assert frame_size(given, said, "segmentation") == segmentation_size(given, resize)
    detector = models.build(
        config.Model(arch="retinanet", backbone="mobilenetv3_small_050", backbone_weights=None, fpn_channels=16),
        "detection", 2, resize,
    )  # fmt: skip
    assert frame_size(given, said, "detection") == detector.prepare([torch.rand(3, *given)]).sizes[0]


@pytest.mark.parametrize("arch", ["retinanet", "fcos", "reppoints"])
@torch.no_grad()
def test_detections_are_those_of_torchvision(arch: str) -> None:
    section = config.Model(arch=arch, backbone="mobilenetv3_small_050", backbone_weights=None, fpn_channels=32)
    model = models.build(section, "detection", 3, (160, 256)).eval()
    net: Any = model.net
    net.score_thresh, net.topk_candidates, net.nms_thresh, net.detections_per_img = 0.4, 60, 0.5, 40
    torch.nn.init.normal_(net.head.classification_head.cls_logits.weight, std=0.3)
    torch.nn.init.normal_(net.head.classification_head.cls_logits.bias, std=0.1)
    batch = model.prepare([torch.rand(3, 80, 256)])
    assert batch.sizes == [(160, 256)]
    (expected,) = model.decode(model(batch), batch)
    scores, boxes, levels = (output.numpy() for output in DenseGraph(model, None)(batch.pixels))  # type: ignore[arg-type]
    settings = {"score_threshold": 0.4, "candidates": 60, "iou_threshold": 0.5, "detections": 40}
    found = detections(scores[0], boxes[0], levels, (160, 256), settings)
    assert 5 < len(found["scores"]) <= 40
    np.testing.assert_allclose(found["scores"], expected["scores"].numpy(), rtol=1e-5)
    np.testing.assert_array_equal(found["labels"], expected["labels"].numpy())
    scale = np.array([1, 0.5, 1, 0.5])  # decode gives pixels of the image
    np.testing.assert_allclose(found["boxes"] * scale, expected["boxes"].numpy(), atol=1e-3)


def test_no_box_above_the_threshold_is_no_detection() -> None:
    settings = {"score_threshold": 0.5, "candidates": 10, "iou_threshold": 0.5, "detections": 10}
    found = detections(
        np.zeros((4, 3), np.float32), np.zeros((4, 4), np.float32), np.zeros(4, np.int64), (8, 8), settings
    )
    assert {name: values.shape for name, values in found.items()} == {"boxes": (0, 4), "scores": (0,), "labels": (0,)}


def test_images_are_read_as_in_training(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (6, 9, 4), dtype=np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "alpha.png")
    Image.fromarray(pixels[..., 0]).save(tmp_path / "gray.png")
    Image.fromarray(pixels[..., :3]).save(tmp_path / "turned.jpg", exif=turned)
    for file in sorted(tmp_path.iterdir()):
        np.testing.assert_array_equal(read_image(file), read_as_tensor(file).permute(1, 2, 0).numpy())
    Image.fromarray(pixels[..., 0].astype(np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(AcamkdError, match=r"deep\.png: the image cannot be read: .*save it with 8 bits per channel"):
        read_image(tmp_path / "deep.png")


def test_what_is_no_export_is_refused(tmp_path: Path) -> None:
    import onnx

    with pytest.raises(AcamkdError, match=r"none\.onnx: there is no such file"):
        OnnxModel(tmp_path / "none.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    with pytest.raises(AcamkdError, match=r"broken\.onnx: onnxruntime cannot read it"):
        OnnxModel(tmp_path / "broken.onnx")
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    other = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", [value], [other])
    content = io.BytesIO()
    onnx.save(onnx.helper.make_model(graph, ir_version=10, opset_imports=[onnx.helper.make_opsetid("", 18)]), content)
    (tmp_path / "foreign.onnx").write_bytes(content.getvalue())
    with pytest.raises(AcamkdError, match=r"foreign\.onnx was not written by acamkd export"):
        OnnxModel(tmp_path / "foreign.onnx")


def test_an_image_that_does_not_fit_a_graph_of_one_size_is_named_with_both_sizes(tmp_path: Path) -> None:
    """As a graph of one size is that was made of a recipe with {short, long}."""
    shape = (1, 3, 64, 96)
    file = write_segmenter(tmp_path / "fixed.onnx", resize={"short": 64, "long": 96}, shape=shape)
    model = OnnxModel(file)
    assert model.input_size == (64, 96)
    assert model.predict(np.zeros((60, 90, 3), np.uint8))["mask"].shape == (60, 90)
    said = (
        "the graph takes inputs of 64 x 96 pixels alone, and an image of 120 x 80 becomes one of 96 x 64: export with "
        "--set data.resize='[64, 96]', which resizes all images to this size, or take a graph of free size"
    )
    with pytest.raises(AcamkdError, match=f"^{re.escape(said)}$"):
        model.predict(np.zeros((120, 80, 3), np.uint8))
    fitting = OnnxModel(write_segmenter(tmp_path / "fitting.onnx", resize=(60, 96), shape=shape))
    assert fitting.predict(np.zeros((120, 80, 3), np.uint8))["mask"].shape == (120, 80)
    assert OnnxModel(write_segmenter(tmp_path / "free.onnx")).input_size is None


def test_a_provider_that_is_not_there_is_named(tmp_path: Path) -> None:
    file = write_segmenter(tmp_path / "student.onnx")
    with pytest.raises(AcamkdError, match=r"^onnxruntime has no CUDAExecutionProvider on this machine$"):
        OnnxModel(file, provider="CUDAExecutionProvider")


@pytest.mark.parametrize(
    ("package", "use", "message"),
    [
        ("onnxruntime", OnnxModel, "ONNX files need onnxruntime: pip install onnxruntime"),
        ("PIL", read_image, "files of images need Pillow: pip install pillow"),
    ],
)
def test_a_package_that_is_missing_is_named(
    package: str, use: Callable[[str], object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(AcamkdError, match=f"^{message}$"):
        use("a.file")


def test_it_needs_no_torch() -> None:
    script = (
        "import sys; sys.modules['torch'] = None; import acamkd.jobs.export.onnx_model, acamkd.jobs.predict.predict"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
