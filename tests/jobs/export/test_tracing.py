from __future__ import annotations

import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.layers import padding
from timm.layers.conv2d_same import Conv2dSame

from acamkd import config, models
from acamkd.errors import AcamkdError
from acamkd.jobs.export import tracing
from acamkd.jobs.export.graph import Graph, build_graph, write_graph
from acamkd.jobs.export.onnx_model import OnnxModel
from acamkd.jobs.export.tracing import constant_same_padding, time_limit
from acamkd.models.base import ExportForm
from acamkd.models.segmentation import Segmenter
from tiny_recipes import write_recipe


def _graph(arch: str, backbone: str, task: Any) -> Graph:
    section = config.Model(arch=arch, backbone=backbone, backbone_weights=None, fpn_channels=64)
    return build_graph(models.build(section, task, 3).eval(), None, with_nms=False)


@pytest.mark.parametrize(
    ("arch", "backbone", "task"),
    [("fcos", "tf_efficientnet_lite0", "detection"), ("unet", "tu-tf_mobilenetv3_small_075", "segmentation")],
)
@torch.no_grad()
def test_same_padding_is_a_number_and_the_outputs_stay(arch: str, backbone: str, task: Any) -> None:
    graph, original = _graph(arch, backbone, task), padding.get_same_padding
    frames = [torch.rand(1, 3, *size) for size in ((32, 96), (96, 64), (160, 224))]
    expected = [graph(pixels) for pixels in frames]
    with constant_same_padding(graph):
        assert padding.get_same_padding is not original
        # No number at all: what depends on it would fail.
        assert padding.get_same_padding(None, 3, 2, 1) == 1  # type: ignore[arg-type]
        found = [graph(pixels) for pixels in frames]
    assert padding.get_same_padding is original
    for ours, theirs in zip(expected, found, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one, other)


def test_same_padding_that_depends_on_the_frame_stays_a_formula() -> None:
    class Coarse(torch.nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            for _ in range(6):  # a stride of 64
                pixels = torch.nn.functional.max_pool2d(padding.pad_same(pixels, [3, 3], [2, 2]), 3, 2)
            return pixels

    original = padding.get_same_padding
    with constant_same_padding(Coarse()):
        assert padding.get_same_padding is original


class _Strided(Segmenter):
    """Layers of timm's `same` padding with a stride of 4 in total, exported in a form of its own."""

    def __init__(self, multiple: int = 1) -> None:
        net = torch.nn.Sequential(*(Conv2dSame(3, 3, 3, stride=2, bias=False) for _ in range(2)))
        super().__init__(net, 3)
        self.filled = multiple

    def export_form(self) -> ExportForm:
        """For images of any size."""
        return ExportForm(lambda pixels: {"logits": self.net(pixels)}, resize=None, multiple=self.filled)


@pytest.mark.parametrize(("multiple", "is_constant"), [(1, False), (2, False), (4, True), (6, False), (96, True)])
def test_same_padding_is_a_number_where_the_strides_divide_all_inputs(multiple: int, is_constant: bool) -> None:
    graph = build_graph(_Strided(multiple), None, with_nms=False)
    original = padding.get_same_padding
    with constant_same_padding(graph, graph.multiple):
        assert (padding.get_same_padding is not original) == is_constant


def test_a_file_for_any_size_pads_as_the_network_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = _Strided().eval()
    recipe = config.load(write_recipe(tmp_path, "segmentation"))
    write_graph(build_graph(model, None, with_nms=False), tmp_path / "x.onnx", recipe)
    exported = OnnxModel(tmp_path / "x.onnx")
    for size in ((64, 96), (65, 97), (66, 99)):
        pixels = torch.rand(1, 3, *size)
        with torch.no_grad():
            expected = model.net(pixels).numpy()
        np.testing.assert_allclose(exported.run(pixels.numpy())["logits"], expected, atol=1e-5)


def test_an_export_without_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "TIME_LIMIT", 0.2)
    started = time.monotonic()

    def work() -> None:
        while time.monotonic() < started + 20:
            with suppress(Exception):  # as the exporter does
                time.sleep(0.01)

    said = r"PyTorch's export of FCOS has not ended after .* minutes: fix the size"
    with pytest.raises(AcamkdError, match=said), time_limit("PyTorch's export of FCOS", "fix the size"):
        work()
    with time_limit("an export in time", ""):
        pass
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)  # nothing comes later
