"""Augmentation of a training image together with its boxes or mask."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2

from acamkd.config import Augmentation
from acamkd.data.dataset import Sample, Transform, seed_of
from acamkd.models.base import VOID, Target, Task

PADDING = (124, 116, 104)
"""ImageNet's mean color, RGB, which pads small images before a crop."""


def augmentation(options: Augmentation, task: Task) -> Transform:
    """Chain the augmentations that a recipe asks for: scale, crop, flip, photometric.

    Boxes are clamped to the crop and dropped if less than a pixel remains; a crop without objects is legal.
    Images smaller than the crop are padded at a random offset, masks with VOID.

    Args:
        options: The recipe's `data.augment`.
        task: Whether targets hold boxes or a mask.
    """
    steps: list[nn.Module] = []
    if options.scale is not None:
        steps.append(RandomScale(options.scale))
    if options.crop is not None:
        fill = {tv_tensors.Image: PADDING, tv_tensors.Mask: VOID}
        steps.append(v2.RandomCrop(options.crop, pad_if_needed=True, fill=fill))
    if task == "detection" and steps:
        steps.append(v2.SanitizeBoundingBoxes(min_size=1, labels_getter=_per_box))
    steps.append(v2.RandomHorizontalFlip(options.flip))
    if options.photometric:
        # The ranges of SSD. RandomPhotometricDistort has the same ranges, but also swaps channels.
        steps.append(v2.ColorJitter(brightness=0.125, contrast=0.5, saturation=0.5, hue=0.05))
    chain: Transform = v2.Compose(steps)
    return chain


class RandomScale(nn.Module):
    """Resize by a random factor, the same on both sides.

    Args:
        factors: Range of the factor, drawn uniformly.
    """

    def __init__(self, factors: tuple[float, float]) -> None:
        super().__init__()
        self.factors = factors

    def forward(self, image: Tensor, target: Target) -> Sample:
        """(3, H, W) and its target to (3, factor H, factor W) and its target."""
        factor = torch.empty(()).uniform_(*self.factors).item()
        size = [max(1, round(side * factor)) for side in image.shape[-2:]]
        resized: Sample = v2.Resize(size, antialias=True)(image, target)
        return resized


def batch_scale(factors: tuple[float, float], seed: int, epoch: int, batch: int) -> float:
    """Draw the factor of a batch's input size; it depends on these alone, so that all processes draw the same one.

    Args:
        factors: The recipe's `train.multiscale`.
        seed: The recipe's `train.seed`.
        epoch: From 0.
        batch: Index of the batch in the epoch, from 0.
    """
    generator = torch.Generator().manual_seed(seed_of("multiscale", seed, epoch, batch))
    return torch.empty(()).uniform_(*factors, generator=generator).item()


def _per_box(sample: Sample) -> tuple[Tensor, ...]:
    """Entries of the target that are dropped together with their box."""
    return tuple(value for name, value in sample[1].items() if name != "boxes")
