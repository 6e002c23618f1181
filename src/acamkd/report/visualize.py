"""Pictures of what networks find and of where a loss looks, and the sheet that sets them side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Patch
from torch import Tensor
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, make_grid

from acamkd.models.base import VOID, Prediction

SCALE = 4
"""Pixels per pixel of the picture, so that lines are thin beside small objects."""

MIN_SCORE = 0.3
"""Boxes of a lower score are not drawn."""

COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#cc79a7", "#d55e00", "#0072b2")
"""Of class 1, 2, ...; told apart in every kind of colour vision (Okabe and Ito). They repeat where they run out."""

MASKS_PER_ROW = 3


@dataclass(frozen=True)
class Block:
    """One part of a sheet.

    Attributes:
        title: What stands above it.
        columns: Heading of each column.
        rows: One picture, (3, H, W) uint8, per column; a column's pictures share one size.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Tensor]]


def draw_findings(image: Tensor, findings: Prediction) -> Tensor:
    """Draw boxes or a mask, predicted or true, over a picture in the colours of their classes.

    Args:
        image: (3, H, W) uint8.
        findings: Of this picture, in its own pixels; boxes with `scores` are drawn from MIN_SCORE on.

    Returns:
        (3, SCALE H, SCALE W) uint8.
    """
    canvas = _enlarged(image)
    if "mask" in findings:
        mask = findings["mask"].repeat_interleave(SCALE, 0).repeat_interleave(SCALE, 1)
        for label in set(mask.flatten().tolist()) - {0, VOID}:
            canvas = draw_segmentation_masks(canvas, mask == label, alpha=0.75, colors=_rgb(label))
        return canvas
    # The strongest comes last, so that it lies on top.
    for index in reversed(range(len(findings["boxes"]))):
        if "scores" not in findings or findings["scores"][index] >= MIN_SCORE:
            box, label = SCALE * findings["boxes"][index], int(findings["labels"][index])
            canvas = draw_bounding_boxes(canvas, box[None], colors=_rgb(label), width=SCALE)
    return canvas


def draw_masks(image: Tensor, masks: Tensor) -> Tensor:
    """Lay the spatial masks of a loss over a picture in grey, dark where they are low and bright where they are high.

    Args:
        image: (3, H, W) uint8.
        masks: (M, h, w); each is stretched to its own range.

    Returns:
        (3, H', W') uint8, MASKS_PER_ROW masks in a row.
    """
    low, high = masks.amin(dim=(1, 2), keepdim=True), masks.amax(dim=(1, 2), keepdim=True)
    stretched = (masks - low) / (high - low).clamp_min(1e-6)
    size = [SCALE * side for side in image.shape[-2:]]
    smooth = F.interpolate(stretched[None], size=size, mode="bilinear", align_corners=False)[0].clamp(0, 1)
    heat = torch.from_numpy(matplotlib.colormaps["magma"](smooth.numpy())[..., :3]).float().permute(0, 3, 1, 2)
    grey = _enlarged(image).float().mean(dim=0) / 255
    tiles = 0.75 * heat + 0.25 * grey
    sheet: Tensor = make_grid(tiles, nrow=MASKS_PER_ROW, padding=3 * SCALE, pad_value=1.0)
    return (255 * sheet).round().to(torch.uint8)


def draw_sheet(blocks: Sequence[Block], classes: Sequence[str]) -> Figure:
    """Set blocks of pictures below each other, over a legend of the classes' colours."""
    heights = [_height(block) for block in blocks]
    figure = Figure(figsize=(12, sum(heights) + 0.5), dpi=100)
    parts = figure.subfigures(len(blocks) + 1, 1, height_ratios=[*heights, 0.5], squeeze=False)[:, 0]
    for part, block in zip(parts[:-1], blocks, strict=True):
        _draw_block(part, block)
    handles = [Patch(color=_colour(label), label=name) for label, name in enumerate(classes, start=1)]
    parts[-1].legend(handles=handles, loc="center", ncols=len(handles), frameon=False, fontsize=13, handlelength=1)
    return figure


def _widths(block: Block) -> list[float]:
    """Width of each column's pictures in units of their height."""
    return [image.shape[2] / image.shape[1] for image in block.rows[0]]


def _height(block: Block) -> float:
    """Height of a block in inches: its rows at a width of 12 inches, and 0.7 for the headings."""
    return 12 * len(block.rows) / sum(_widths(block)) + 0.7


def _draw_block(part: SubFigure, block: Block) -> None:
    height, widths = _height(block), _widths(block)
    part.suptitle(block.title, x=0.01, ha="left", va="top", y=1 - 0.06 / height, fontsize=15, fontweight="bold")
    axes = part.subplots(
        len(block.rows), len(widths), squeeze=False,
        gridspec_kw={"width_ratios": widths, "wspace": 0.03, "hspace": 0.03, "left": 0.01, "right": 0.99,
                     "bottom": 0.0, "top": 1 - 0.66 / height},
    )  # fmt: skip
    for row, images in zip(axes, block.rows, strict=True):
        for axis, image in zip(row, images, strict=True):
            axis.imshow(image.permute(1, 2, 0).numpy(), interpolation="antialiased")
            axis.set_axis_off()
    for axis, heading in zip(axes[0], block.columns, strict=True):
        axis.set_title(heading, fontsize=12)


def _enlarged(image: Tensor) -> Tensor:
    return image.repeat_interleave(SCALE, 1).repeat_interleave(SCALE, 2)


def _colour(label: int) -> str:
    return COLOURS[(label - 1) % len(COLOURS)]


def _rgb(label: int) -> tuple[int, ...]:
    return tuple(round(255 * share) for share in to_rgb(_colour(label)))
