"""Differences of MMDetection's and detectron2's detectors from torchvision's.

The differences are not visible in the weights, but change the predictions of a converted network. A recipe's model
chooses by `options: {convention: ...}`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

Convention: TypeAlias = Literal["torchvision", "mmdetection", "detectron2"]

RATIOS = (0.5, 1.0, 2.0)
OCTAVE = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))
"""Sizes of RetinaNet's anchors on one level, as multiples of the smallest."""

ROI_STRIDES = (4, 8, 16, 32)


class ExactAnchors(AnchorGenerator):  # type: ignore[misc]
    """Anchors with unrounded sides, on the levels' exact strides.

    torchvision rounds sides, and computes strides from the padded image and the grid. On the coarsest level of an image
    800 pixels high, that gives 114 instead of 128 pixels.

    Args:
        sizes: Anchor sizes of each level.
        strides: Stride of each level.
    """

    def __init__(self, sizes: Sequence[Sequence[float]], strides: Sequence[int]) -> None:
        super().__init__(tuple(tuple(level) for level in sizes), (RATIOS,) * len(sizes))
        self.strides = strides

    def generate_anchors(self, scales: Any, aspect_ratios: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Give (ratios * sizes, 4) around the origin; a ratio is height / width."""
        sizes, roots = torch.tensor(scales), torch.tensor(aspect_ratios).sqrt()[:, None]
        half = torch.stack([sizes / roots, sizes * roots], dim=-1).flatten(0, 1) / 2
        return torch.cat([-half, half], dim=1)

    def grid_anchors(self, grid_sizes: Any, strides: Any) -> list[Tensor]:
        """Give (h * w * anchors, 4) per level."""
        device = self.cell_anchors[0].device
        exact = [[torch.tensor(stride, device=device)] * 2 for stride in self.strides]
        anchors: list[Tensor] = super().grid_anchors(grid_sizes, exact)
        return anchors


class P6P7FromC5(LastLevelP6P7):  # type: ignore[misc]
    """RetinaNet's two coarsest levels from the backbone's last stage.

    Args:
        in_channels: Number of channels of that stage.
        out_channels: Number of channels of the pyramid.
        relu: Whether a ReLU is applied to P6 before P7.
    """

    def __init__(self, in_channels: int, out_channels: int, *, relu: bool) -> None:
        super().__init__(in_channels, out_channels)
        self.relu = relu

    def forward(self, p: list[Tensor], c: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        """Append both levels and their names."""
        p6 = self.p6(c[-1])
        p7 = self.p7(F.relu(p6) if self.relu else p6)
        return [*p, p6, p7], [*names, "p6", "p7"]


class AlignedRoIAlign(MultiScaleRoIAlign):  # type: ignore[misc]
    """RoIAlign without torchvision's half-pixel shift, and with as many samples as a bin has pixels."""

    def __init__(self) -> None:
        super().__init__(["0", "1", "2", "3"], output_size=7, sampling_ratio=0)

    def forward(self, x: Mapping[str, Tensor], boxes: list[Tensor], image_shapes: Any) -> Tensor:
        """Levels by name, and boxes (P, 4) per image in the input frame -> (sum of P, C, 7, 7)."""
        rois = torch.cat([F.pad(each, (1, 0), value=index) for index, each in enumerate(boxes)])
        side = ((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])).sqrt()
        levels = (side / 56 + 1e-6).log2().floor().clamp(0, 3)
        pooled = rois.new_zeros(rois.shape[0], x["0"].shape[1], *self.output_size)
        for level, stride in enumerate(ROI_STRIDES):
            own = levels == level
            pooled[own] = roi_align(x[str(level)], rois[own], self.output_size, 1 / stride, aligned=True)
        return pooled


def stride_in_1x1(body: nn.Module) -> None:
    """Move the stride of a ResNet's bottlenecks from the 3x3 to the first 1x1 convolution, as in Caffe."""
    blocks: Iterable[Any] = body.modules()
    for block in blocks:
        if hasattr(block, "conv3") and block.conv2.stride == (2, 2):
            block.conv1.stride, block.conv2.stride = (2, 2), (1, 1)
