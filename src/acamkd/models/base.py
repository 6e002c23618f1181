"""TaskModel: a detector or segmenter of any framework, behind four calls."""

from __future__ import annotations

import re
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn

from acamkd.config import Model, ShortLong
from acamkd.errors import AcamkdError

Task: TypeAlias = Literal["detection", "segmentation"]

Target: TypeAlias = dict[str, Tensor]
"""What is known of one image, in its own pixels. Detection: `boxes` (K, 4) float x1 y1 x2 y2, `labels` (K,) int64
from 1 (0 is background, torchvision's convention), `iscrowd` (K,) int64, and from data sets `area` (K,) of the outlines
in pixels, 0 where it is unknown. Segmentation: `mask` (H, W) int64, VOID where nothing is known."""

Prediction: TypeAlias = dict[str, Tensor]
"""What a network says of one image, in the image's own pixels. Detection: `boxes` (K, 4), `scores` (K,), `labels`
(K,) from 1. Segmentation: `mask` (H, W) int64."""

Outputs: TypeAlias = Mapping[str, Any]
"""Raw head outputs of one network; only the network's own `loss` and `decode` look inside."""

VOID = 255
"""Mask value of pixels that neither train nor count."""

PixelSize: TypeAlias = tuple[int, int]
"""(height, width)."""


@dataclass(frozen=True)
class Batch:
    """One batch in the networks' common input frame; made once by the student's `prepare` and seen by both networks.

    Attributes:
        pixels: (N, 3, H, W) in [0, 1], not yet normalized; padding has the preparing network's mean color.
        sizes: (height, width) of each image inside the frame, without padding.
        original_sizes: (height, width) of each image as it was given to `prepare`.
        targets: One per image, in the input frame (masks padded with VOID); None at prediction.
    """

    pixels: Tensor
    sizes: list[PixelSize]
    original_sizes: list[PixelSize]
    targets: list[Target] | None = None

    @property
    def input_size(self) -> PixelSize:
        """(height, width) of the common frame."""
        return (self.pixels.shape[-2], self.pixels.shape[-1])

    @cached_property
    def boxes(self) -> list[Tensor] | None:
        """(K, 4) of each image's single objects; a box around a crowd is none. None where the targets have none."""
        if self.targets is None or any("boxes" not in target for target in self.targets):
            return None
        return [
            target["boxes"][target["iscrowd"] == 0] if "iscrowd" in target else target["boxes"]
            for target in self.targets
        ]


def to_device(
    images: Iterable[Tensor], targets: Iterable[Target], device: torch.device
) -> tuple[list[Tensor], list[Target]]:
    """Images and their targets on a device."""
    return (
        [image.to(device) for image in images],
        [{name: value.to(device) for name, value in target.items()} for target in targets],
    )


@contextmanager
def keeping_modes(net: nn.Module) -> Iterator[None]:
    """Afterwards each module is in training or eval mode as before; single layers may be frozen, so one by one."""
    modes = [(module, module.training) for module in net.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def explaining_norms() -> Iterator[None]:
    """Say what is to be done where a normalization layer has no two values to take statistics of."""
    try:
        yield
    except ValueError as error:
        if not re.search(r"more than 1 (value per channel|spatial element)", str(error)):
            raise
        called = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
        if called & {"group_norm", "instance_norm"}:
            kind = "a group norm" if "group_norm" in called else "an instance norm"
            raise AcamkdError(
                f"{kind} needs more than one value to normalize: give larger images (data.resize), or the layer more "
                f"channels per group ({error})"
            ) from error
        raise AcamkdError(
            "a batch norm needs more than one value of each channel: raise train.batch_size, or give larger images "
            f"({error})"
        ) from error


class TaskModel(nn.Module, ABC):
    """A network together with its task: what turns images into pixels, outputs, a loss and predictions.

    Args:
        net: The framework's own module. Only its `state_dict` is saved, so that the framework alone can load it.
        num_classes: Number of classes of the task, background and void not counted.
        mean: Mean color that the network expects, RGB in [0, 1].
        std: Standard deviation of the colors, likewise.
    """

    task: ClassVar[Task]

    def __init__(self, net: nn.Module, num_classes: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.net = net
        self.num_classes = num_classes
        self.mean: Tensor
        self.std: Tensor
        # Of floats also where a factory gives whole numbers: pixels would be cut off to 0 and 1 otherwise.
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(3, 1, 1), persistent=False)

    @property
    def backbone(self) -> nn.Module:
        """The part that image-classification weights belong to."""
        raise NotImplementedError(f"{type(self).__name__} does not say which part of its network is the backbone")

    @property
    def max_detections(self) -> int | None:
        """Detection: an image gets so many boxes at most; None where there is no limit, or no boxes."""
        return None

    def comparable_layers(self) -> tuple[str, ...]:
        """Layers that feature losses are meant for, in FeatureTap's grammar; none where nothing is known of them."""
        return ()

    def write_config(self, weights: Path, classes: Sequence[str]) -> None:
        """Write, beside a file of this network's weights, what its framework needs to load it; here nothing.

        Args:
            weights: The file that has just been written.
            classes: Class names in the order of their ids.
        """

    def normalize(self, batch: Batch) -> Tensor:
        """Pixels as this network expects them, (N, 3, H, W); teacher and student may expect different ones."""
        pixels: Tensor = (batch.pixels - self.mean) / self.std
        return pixels

    @abstractmethod
    def prepare(self, images: Sequence[Tensor], targets: Sequence[Target] | None = None) -> Batch:
        """Resize, pad and stack images and their targets.

        Args:
            images: (3, H, W) each, uint8, or float in [0, 1]; sizes may differ.
            targets: One per image, or None.
        """

    @abstractmethod
    def forward(self, batch: Batch) -> Outputs:
        """Run the network to its raw outputs."""

    @abstractmethod
    def loss(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Task terms, scalars; also callable while the network is in eval mode."""

    @abstractmethod
    def decode(self, outputs: Outputs, batch: Batch) -> list[Prediction]:
        """Turn raw outputs into predictions in each image's own pixels."""

    def prepare_alike(self, images: Sequence[Tensor]) -> list[tuple[list[int], Batch]]:
        """Prepare each image as if it were alone, and stack those whose padded inputs have one size.

        In one batch with larger images an image gets more padding, which changes what a network finds: by what its
        convolutions see at the border, and by normalization over the whole map.

        Args:
            images: (3, H, W) each, uint8, or float in [0, 1]; sizes may differ.

        Returns:
            Places in `images`, and their batch without targets; one such pair per size.
        """
        groups: dict[PixelSize, list[tuple[int, Batch]]] = {}
        for index, image in enumerate(images):
            batch = self.prepare([image])
            groups.setdefault(batch.input_size, []).append((index, batch))
        return [([index for index, _ in group], _joined([batch for _, batch in group])) for group in groups.values()]

    @torch.no_grad()
    def predict(self, images: Sequence[Tensor]) -> list[Prediction]:
        """Images in, predictions out; the network should be in eval mode.

        An image's prediction does not depend on the images beside it, nor on a training's precision: the network
        runs in that of its weights.
        """
        found: dict[int, Prediction] = {}
        with explaining_norms(), torch.autocast(self.mean.device.type, enabled=False):
            for indices, batch in self.prepare_alike(images):
                found.update(zip(indices, self.decode(self(batch), batch), strict=True))
        return [found[index] for index in range(len(images))]


def _joined(batches: Sequence[Batch]) -> Batch:
    """Batches of one input size as one, without targets."""
    if len(batches) == 1:
        return batches[0]
    return Batch(
        pixels=torch.cat([batch.pixels for batch in batches]),
        sizes=[size for batch in batches for size in batch.sizes],
        original_sizes=[size for batch in batches for size in batch.original_sizes],
    )


@dataclass(frozen=True)
class Family:
    """Networks that are built in one way, from a recipe's section to a TaskModel.

    Attributes:
        task: What they are for.
        names: What `arch` may be, as a call; a name that ends with a slash stands for all that begin so.
        build: Takes the recipe's section, the number of classes and `data.resize`; raises AcamkdError where something
            that the recipe names does not exist.
    """

    task: Task
    names: Callable[[], Collection[str]]
    build: Callable[[Model, int, PixelSize | ShortLong | None], TaskModel]

    def holds(self, arch: str) -> bool:
        """Whether a recipe's `arch` is one of these."""
        return any(arch.startswith(name) if name.endswith("/") else arch == name for name in self.names())
