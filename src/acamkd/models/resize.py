"""Resizing of images to a network's input size; each side keeps at least one pixel, even of narrow images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes

from acamkd.config import ShortLong
from acamkd.models.base import Batch, PixelSize, Target


def frame_size(
    size: PixelSize, resize: PixelSize | ShortLong | None, whole: Callable[[float], int] = round
) -> PixelSize:
    """(height, width) of an image after resizing.

    Args:
        size: (height, width) of the image.
        resize: The recipe's `data.resize`.
        whole: Rounds the sides of {short, long} to whole numbers.
    """
    if resize is None:
        return size
    if not isinstance(resize, ShortLong):
        return resize
    scale = min(resize.short / min(size), resize.long / max(size))
    return (max(1, whole(size[0] * scale)), max(1, whole(size[1] * scale)))


def rescale(batch: Batch, factor: float, multiple: int) -> Batch:
    """Resample a prepared batch with its targets.

    Args:
        batch: What a network's `prepare` gave.
        factor: Of the sides of the padded input, which are then rounded.
        multiple: The number that the new sides must be a multiple of.
    """
    before = batch.input_size
    height, width = (max(multiple, round(side * factor / multiple) * multiple) for side in before)
    if (height, width) == before:
        return batch
    pixels = F.interpolate(batch.pixels, size=(height, width), mode="bilinear", antialias=True)
    y, x = height / before[0], width / before[1]
    targets = batch.targets and [_rescaled(target, (height, width), (y, x)) for target in batch.targets]
    sizes = [(max(1, round(h * y)), max(1, round(w * x))) for h, w in batch.sizes]
    return Batch(pixels, sizes, batch.original_sizes, targets)


def _rescaled(target: Target, size: PixelSize, factors: tuple[float, float]) -> Target:
    moved = dict(target)
    if "boxes" in target:
        moved["boxes"] = target["boxes"] * target["boxes"].new_tensor([factors[1], factors[0]] * 2)
    if "mask" in target:
        mask = target["mask"][None, None].to(torch.float32)
        moved["mask"] = F.interpolate(mask, size=size, mode="nearest-exact")[0, 0].to(target["mask"].dtype)
    return moved


class DetectionTransform(GeneralizedRCNNTransform):  # type: ignore[misc]
    """torchvision's transform, which normalizes, resizes and pads, for a recipe's `data.resize`.

    torchvision's own shrinks narrow strips to sides of 0 pixels, and can keep the image size only in training mode.

    Args:
        resize: (height, width), its short and long side, or None for each image's own size.
        mean: Mean color.
        std: Standard deviation of the normalization.
    """

    def __init__(self, resize: PixelSize | ShortLong | None, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__(1, 1, list(mean), list(std))  # only its own `resize` uses the two sizes
        self.frame = resize

    def resize(self, image: Tensor, target: Target | None = None) -> tuple[Tensor, Target | None]:
        """Resize an image (3, H, W) and its boxes."""
        before = (image.shape[-2], image.shape[-1])
        after = frame_size(before, self.frame, math.floor)
        if self.frame is not None:
            image = F.interpolate(image[None], size=after, mode="bilinear", align_corners=False)[0]
            if target is not None:
                target["boxes"] = resize_boxes(target["boxes"], before, after)
        return image, target
