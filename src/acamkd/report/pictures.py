"""Pictures, boxes and label maps of the page, small enough that hundreds fit into one file."""

from __future__ import annotations

import base64
import colorsys
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from torch import Tensor
from torchvision.ops import box_iou

from acamkd.models.base import Prediction, Target

SIDE = 320
"""Longest side of an embedded picture, in pixels."""
QUALITY = 50
"""Of its WebP; even noise stays below 56 kB then, so that 200 pictures in base64 stay below 15 MB."""
HIT = 0.5
"""Least overlap (IoU) of a box with the object that it is counted for."""


@dataclass(frozen=True)
class Box:
    """One drawn box, in the picture's own pixels."""

    x: float
    y: float
    width: float
    height: float
    colour: str
    label: str
    right: bool


@dataclass(frozen=True)
class Panel:
    """What is drawn over a picture: boxes, or a label map as a data URI."""

    title: str
    words: str
    boxes: tuple[Box, ...] = ()
    label_map: str = ""


def embed(picture: Tensor) -> str:
    """A picture (3, H, W) uint8 as a data URI of modest size."""
    image = Image.fromarray(picture.permute(1, 2, 0).numpy())
    image.thumbnail((SIDE, SIDE))
    return _data_uri(image, "webp", quality=QUALITY)


def colour(label: int) -> str:
    """The colour of a class; neighbouring labels differ most."""
    return "#{:02x}{:02x}{:02x}".format(*_rgb(label))


def draw_labels(mask: Tensor, classes: Sequence[str]) -> str:
    """A label map (H, W) as a translucent picture; background and void are clear."""
    height, width = mask.shape
    scale = min(1, SIDE / max(height, width))
    image = Image.fromarray(mask.to("cpu").numpy().astype(np.uint8), mode="P")
    image = image.resize((max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.NEAREST)
    image.putpalette([channel for label in range(256) for channel in _rgb(label)])
    alphas = bytes(0 if name == "background" else 165 for name in classes)
    return _data_uri(image, "png", transparency=alphas + bytes(256 - len(classes)))


def truth_panel(target: Target, classes: Sequence[str]) -> Panel:
    """What is known of a picture."""
    if "mask" in target:
        return Panel("truth", "the true label map", label_map=draw_labels(target["mask"], classes))
    single = target["iscrowd"] == 0
    boxes = _boxes(target["boxes"][single], target["labels"][single], [True] * int(single.sum()), classes)
    return Panel("truth", f"{len(boxes)} objects", boxes)


def prediction_panel(title: str, prediction: Prediction, target: Target, classes: Sequence[str]) -> Panel:
    """What a network says of a picture: its label map, or as many of its best boxes as there are objects."""
    if "mask" in prediction:
        return Panel(title, f"the label map of the {title}", label_map=draw_labels(prediction["mask"], classes))
    single = target["iscrowd"] == 0
    objects, labels = target["boxes"][single], target["labels"][single]
    best = prediction["scores"].argsort(descending=True)[: max(1, len(objects))]
    boxes, found = prediction["boxes"][best], prediction["labels"][best]
    overlaps = box_iou(boxes, objects) * (found[:, None] == labels)  # (boxes, objects)
    right = []
    for row in overlaps:  # best first; an object is found once
        hit = len(objects) > 0 and bool(row.max() >= HIT)
        if hit:
            overlaps[:, row.argmax()] = 0
        right.append(hit)
    words = f"{sum(right)} of {len(objects)} objects found by its {len(boxes)} best boxes"
    return Panel(title, words, _boxes(boxes, found, right, classes))


def _boxes(boxes: Tensor, labels: Tensor, right: Sequence[bool], classes: Sequence[str]) -> tuple[Box, ...]:
    return tuple(
        Box(x1, y1, x2 - x1, y2 - y1, colour(label), classes[label - 1], hit)
        for (x1, y1, x2, y2), label, hit in zip(boxes.round(decimals=1).tolist(), labels.tolist(), right, strict=True)
    )


def _rgb(label: int) -> tuple[int, int, int]:
    red, green, blue = colorsys.hls_to_rgb((0.58 + label * 0.618034) % 1, 0.56, 0.78)
    return round(255 * red), round(255 * green), round(255 * blue)


def _data_uri(image: Image.Image, form: str, **options: object) -> str:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return f"data:image/{form};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
