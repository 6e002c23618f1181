from __future__ import annotations

import signal
import time
from contextlib import suppress
from typing import Any

import pytest
import torch
from timm.layers import padding

from acamkd import config, models
from acamkd.errors import AcamkdError
from acamkd.jobs.export import tracing
from acamkd.jobs.export.graph import Graph, build_graph
from acamkd.jobs.export.tracing import constant_same_padding, time_limit


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
