"""Drawings of images with one color per class: overlays, masks, sheets. Needs no torch."""

from __future__ import annotations

import base64
import colorsys
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Patch
from PIL import Image, ImageDraw

from acamkd.report.lettering import drawable, font_for

Pixels: TypeAlias = npt.NDArray[np.uint8]
"""(H, W, 3), RGB."""

Arrays: TypeAlias = Mapping[str, npt.NDArray[Any]]
"""`boxes` (K, 4), `labels` (K,) and optionally `scores` (K,); or `mask` (H, W). In pixels of the image."""

BACKGROUND = ("background", "bg")
"""Names of a class that stays transparent, in any case, and with or without underscores around them."""

ENLARGEMENT = 4
"""Enlargement of small images on a sheet, so that lines are thin relative to small objects."""

MIN_SCORE = 0.3
"""Boxes with a lower score are not drawn on a sheet."""

MASKS_PER_ROW = 3

EMBEDDED_SIDE = 320
"""Longest side of an image within a page, in pixels."""
EMBEDDED_QUALITY = 50
"""Quality of its WebP. Even noise then takes less than 56 kB, so 200 images in base64 take less than 15 MB."""


def color(label: int) -> tuple[int, int, int]:
    """RGB of a class; hues of neighboring labels differ by the golden ratio and thus clearly."""
    red, green, blue = colorsys.hls_to_rgb((0.58 + label * 0.618034) % 1, 0.56, 0.78)
    return round(255 * red), round(255 * green), round(255 * blue)


def hex_color(label: int) -> str:
    """Color of a class as `#rrggbb`."""
    return "#{:02x}{:02x}{:02x}".format(*color(label))


def is_background(name: str) -> bool:
    """Whether a class is what lies behind all objects, by its name."""
    return name.strip("_ ").casefold() in BACKGROUND


def draw_predictions(
    image: Pixels, found: Arrays, classes: Sequence[str], *, with_names: bool = True, opacity: float = 0.5
) -> Pixels:
    """Draw boxes with names and scores, or a mask's classes, over an image.

    Args:
        image: (H, W, 3) uint8.
        found: Predictions or ground truth of this image; labels of boxes count from 1, of masks from 0.
        classes: Class names, in the order of the labels.
        with_names: Label boxes with their class names, and with scores if there are any.
        opacity: Opacity of a mask's colors.
    """
    if "mask" in found:
        return _draw_mask(image, found["mask"], classes, opacity)
    drawing = Image.fromarray(image)
    canvas = ImageDraw.Draw(drawing)
    height, width = _letter_height(image), max(2, round(min(drawing.size) / 240))
    scores = found.get("scores")
    for index in reversed(range(len(found["boxes"]))):  # best last, so that it is on top
        x1, y1, x2, y2 = found["boxes"][index].tolist()
        label = int(found["labels"][index])
        canvas.rectangle((x1, y1, x2, y2), outline=color(label), width=width)
        if with_names:
            name = drawable(classes[label - 1])
            font, text = font_for(name, height), name + ("" if scores is None else f" {scores[index]:.2f}")
            _, _, right, low = canvas.textbbox((0, 0), text, font=font)
            corner = max(0, min(x1, drawing.width - right)), max(0, min(y1, drawing.height - low))  # all of it is seen
            canvas.rectangle(canvas.textbbox(corner, text, font=font), fill=color(label))
            canvas.text(corner, text, fill="black", font=font)
    return np.asarray(drawing)


def _letter_height(image: Pixels) -> float:
    """Height of letters that can be read where the whole image is seen, in pixels."""
    return max(9.0, float(min(image.shape[:2])) / 40)


def with_legend(image: Pixels, legend: Mapping[str, int]) -> Pixels:
    """The image above a white strip of the same width with the classes' colors and names.

    Args:
        image: (H, W, 3) uint8.
        legend: Class name -> label, which determines the color; without any the image is returned as it is.
    """
    if not legend:
        return image
    size, width = _letter_height(image), image.shape[1]
    names = [(drawable(name), label) for name, label in legend.items()]
    placed, x, y = [], 0.6 * size, 0.5 * size
    for name, label in names:
        needed = 1.4 * size + font_for(name, size).getlength(name)
        if x > size and x + needed > width:
            x, y = 0.6 * size, y + 1.5 * size
        placed.append((name, label, x, y))
        x += needed + size
    strip = Image.new("RGB", (width, round(y + 1.8 * size)), "white")
    canvas = ImageDraw.Draw(strip)
    for name, label, x, y in placed:
        canvas.rectangle((x, y, x + size, y + size), fill=color(label))
        canvas.text((x + 1.4 * size, y + size / 2), name, fill="black", font=font_for(name, size), anchor="lm")
    return np.concatenate([image, np.asarray(strip)])


def _draw_mask(image: Pixels, mask: npt.NDArray[Any], classes: Sequence[str], opacity: float) -> Pixels:
    palette = np.array([color(label) for label in range(256)], dtype=np.float32)
    shown = np.array([not is_background(name) for name in classes] + [False] * (256 - len(classes)))
    labels = mask.astype(np.uint8)
    alpha = opacity * shown[labels][..., None]
    blended = (1 - alpha) * image + alpha * palette[labels]
    return blended.round().astype(np.uint8)


def enlarge(image: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Enlarge an image (H, W, 3) or a mask (H, W) by ENLARGEMENT."""
    return image.repeat(ENLARGEMENT, 0).repeat(ENLARGEMENT, 1)


def draw_spatial_masks(image: Pixels, masks: npt.NDArray[np.float32]) -> Pixels:
    """Draw the spatial masks of a loss over a gray image, dark for low and bright for high values.

    Args:
        image: (H, W, 3) uint8.
        masks: (M, h, w); each is scaled to its own range.

    Returns:
        (H', W', 3) uint8, MASKS_PER_ROW masks in a row, enlarged.
    """
    low, high = masks.min(axis=(1, 2), keepdims=True), masks.max(axis=(1, 2), keepdims=True)
    stretched = (masks - low) / np.maximum(high - low, 1e-6)
    large = enlarge(image)
    gray = large.mean(axis=2, keepdims=True) / 255
    tiles = []
    for mask in stretched:
        smooth = Image.fromarray(mask).resize((large.shape[1], large.shape[0]), Image.Resampling.BILINEAR)
        heat = matplotlib.colormaps["magma"](np.asarray(smooth).clip(0, 1))[..., :3]
        tiles.append((255 * (0.75 * heat + 0.25 * gray)).round().astype(np.uint8))
    return _grid(tiles, MASKS_PER_ROW, margin=3 * ENLARGEMENT)


def _grid(tiles: Sequence[Pixels], columns: int, margin: int) -> Pixels:
    """Tiles of one size, on white."""
    height, width = tiles[0].shape[:2]
    rows, columns = -(-len(tiles) // columns), min(columns, len(tiles))
    sheet = np.full((rows * (height + margin) + margin, columns * (width + margin) + margin, 3), 255, np.uint8)
    for index, tile in enumerate(tiles):
        top = margin + index // columns * (height + margin)
        left = margin + index % columns * (width + margin)
        sheet[top : top + height, left : left + width] = tile
    return sheet


@dataclass(frozen=True)
class Block:
    """One part of a sheet.

    Attributes:
        title: Title above the block.
        columns: Heading of each column.
        rows: One image, (H, W, 3) uint8, per column; the images of a column share one size.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Pixels]]


def draw_sheet(blocks: Sequence[Block], legend: Mapping[str, int]) -> Figure:
    """Draw blocks of images below each other, above a legend of the classes' colors.

    Args:
        blocks: Blocks from top to bottom.
        legend: Class name -> label, which determines the color.
    """
    heights = [_height(block) for block in blocks]
    figure = Figure(figsize=(12, sum(heights) + 0.5), dpi=100)
    parts = figure.subfigures(len(blocks) + 1, 1, height_ratios=[*heights, 0.5], squeeze=False)[:, 0]
    for part, block in zip(parts[:-1], blocks, strict=True):
        _draw_block(part, block)
    handles = [Patch(color=hex_color(label), label=drawable(name, own_font=True)) for name, label in legend.items()]
    parts[-1].legend(handles=handles, loc="center", ncols=len(handles), frameon=False, fontsize=13, handlelength=1)
    return figure


def _widths(block: Block) -> list[float]:
    """Width of each column's images in units of their height."""
    return [image.shape[1] / image.shape[0] for image in block.rows[0]]


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
            axis.imshow(image, interpolation="antialiased")
            axis.set_axis_off()
    for axis, heading in zip(axes[0], block.columns, strict=True):
        axis.set_title(heading, fontsize=12)


def embed(image: Pixels) -> str:
    """An image as a data URI of limited size, for a page."""
    shrunk = Image.fromarray(image)
    shrunk.thumbnail((EMBEDDED_SIDE, EMBEDDED_SIDE))
    return _data_uri(shrunk, "webp", quality=EMBEDDED_QUALITY)


def embed_mask(mask: npt.NDArray[Any], classes: Sequence[str]) -> str:
    """A mask (H, W) of class ids as a translucent data URI; background and void are transparent."""
    height, width = mask.shape
    scale = min(1, EMBEDDED_SIDE / max(height, width))
    drawing = Image.fromarray(mask.astype(np.uint8), mode="P")
    drawing = drawing.resize((max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.NEAREST)
    drawing.putpalette([channel for label in range(256) for channel in color(label)])
    alphas = bytes(0 if is_background(name) else 165 for name in classes)
    return _data_uri(drawing, "png", transparency=alphas + bytes(256 - len(classes)))


def _data_uri(image: Image.Image, form: str, **options: object) -> str:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return f"data:image/{form};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
