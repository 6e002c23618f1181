"""Resizing of images to what a network sees: each side keeps at least one pixel, however narrow the image is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes

from acamkd.config import ShortLong
from acamkd.models.base import PixelSize, Target


def frame_size(
    size: PixelSize, resize: PixelSize | ShortLong | None, whole: Callable[[float], int] = round
) -> PixelSize:
    """(height, width) of an image after resizing.

    Args:
        size: (height, width) of the image.
        resize: The recipe's `data.resize`.
        whole: Makes whole numbers of {short, long}'s sides.
    """
    if resize is None:
        return size
    if not isinstance(resize, ShortLong):
        return resize
    scale = min(resize.short / min(size), resize.long / max(size))
    return (max(1, whole(size[0] * scale)), max(1, whole(size[1] * scale)))


class DetectionTransform(GeneralizedRCNNTransform):  # type: ignore[misc]
    """torchvision's transform, which normalizes, resizes and pads, for a recipe's `data.resize`.

    torchvision's own makes sides of 0 pixels of narrow strips, and leaves images as they are in training mode only.

    Args:
        resize: (height, width), its short and long side, or None for each image's own size.
        mean: Mean color.
        std: Standard deviation of the colors.
    """

    def __init__(self, resize: PixelSize | ShortLong | None, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__(1, 1, list(mean), list(std))  # the two sizes serve its own `resize` alone
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
