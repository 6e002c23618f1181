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
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from acamkd.config import Model, ShortLong
from acamkd.errors import AcamkdError

Task: TypeAlias = Literal["detection", "segmentation"]

Target: TypeAlias = dict[str, Tensor]
"""Target of one image, in its own pixels. Detection: `boxes` (K, 4) float x1 y1 x2 y2, `labels` (K,) int64
from 1 (0 is background, torchvision's convention), `iscrowd` (K,) int64, and from data sets `area` (K,) of the outlines
in pixels, 0 if unknown.
Segmentation: `mask` (H, W) int64, VOID where unlabeled."""

Prediction: TypeAlias = dict[str, Tensor]
"""Prediction for one image, in the image's own pixels. Detection: `boxes` (K, 4), `scores` (K,), `labels`
(K,) from 1. Segmentation: `mask` (H, W) int64."""

Outputs: TypeAlias = Mapping[str, Any]
"""Raw head outputs of one network, in a form that only its own `loss` and `decode` read."""

VOID = 255
"""Mask value of pixels that are ignored in training and evaluation."""

PixelSize: TypeAlias = tuple[int, int]
"""(height, width)."""

Kernel: TypeAlias = Literal["plain", "smooth", "bilinear", "bicubic"]
"""How an exported file's reader resizes: bilinear on floats without antialiasing or with it, or Pillow on 8 bits."""


@dataclass(frozen=True)
class Batch:
    """One batch as padded input, created once by the student's `prepare` and used by both networks.

    Attributes:
        pixels: (N, 3, H, W) in [0, 1], not yet normalized; padding has the preparing network's mean color.
        sizes: (height, width) of each image within the padded input.
        original_sizes: (height, width) of each image as it was given to `prepare`.
        targets: One per image, in pixels of the padded input (masks padded with VOID); None for prediction.
    """

    pixels: Tensor
    sizes: list[PixelSize]
    original_sizes: list[PixelSize]
    targets: list[Target] | None = None

    @property
    def input_size(self) -> PixelSize:
        """(height, width) of the padded input."""
        return (self.pixels.shape[-2], self.pixels.shape[-1])

    @cached_property
    def boxes(self) -> list[Tensor] | None:
        """(K, 4) boxes of each image's single objects, without crowds; None if the targets have no boxes."""
        if self.targets is None or any("boxes" not in target for target in self.targets):
            return None
        return [
            target["boxes"][target["iscrowd"] == 0] if "iscrowd" in target else target["boxes"]
            for target in self.targets
        ]


def to_device(
    images: Iterable[Tensor], targets: Iterable[Target], device: torch.device
) -> tuple[list[Tensor], list[Target]]:
    """Move images and their targets to a device."""
    return (
        [image.to(device) for image in images],
        [{name: value.to(device) for name, value in target.items()} for target in targets],
    )


@dataclass(frozen=True)
class ExportForm:
    """How `acamkd export` writes a network as an ONNX file, and what the file's reader does with an image before.

    Attributes:
        outputs: From pixels (N, 3, H, W), RGB in [0, 1] and not normalized, to the file's outputs by name.
            Segmentation: `logits` (N, K, H, W). Detection: `boxes` (N, Q, 4), x1 y1 x2 y2 in pixels of the input,
            `scores` (N, Q) and `labels` (N, Q) from 1, best first. No suppression follows.
        resize: (height, width) of the input, its short and long side, or None for each image's own size.
        multiple: Inputs are padded with the mean color, on the right and at the bottom, to multiples of this.
        kernel: How images are resized.
        is_traced: Whether PyTorch's older exporter writes the file, which traces, rather than `torch.export`.
    """

    outputs: Callable[[Tensor], Mapping[str, Tensor]]
    resize: PixelSize | ShortLong | None
    multiple: int = 1
    kernel: Kernel = "smooth"
    is_traced: bool = False


@contextmanager
def keeping_modes(net: nn.Module) -> Iterator[None]:
    """Restore the training or eval mode of each single module after the context, since some may be frozen."""
    modes = [(module, module.training) for module in net.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def explaining_norms() -> Iterator[None]:
    """Turn the error of a normalization layer with too few values into an AcamkdError with advice."""
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


class Call(NamedTuple):
    """Arguments that a module was called with.

    Attributes:
        args: By position.
        kwargs: By name.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Answers(NamedTuple):
    """What a decoder says of Q queries in each of N images.

    Boxes are center and size, as fractions of `QueryDecoder.units`.

    Attributes:
        logits: (N, Q, K); each class for itself, to be put through a sigmoid.
        boxes: (N, Q, 4).
        corners: (N, Q, 4, B), logits of the left, top, right and bottom edge over the bins; None where a box is
            regressed directly.
        initial: (N, Q, 4), the box that the bins are shifts of; None likewise.
        shifts: (B,), by how much each bin moves an edge outward, in sides of the initial box; None likewise.
    """

    logits: Tensor
    boxes: Tensor
    corners: Tensor | None = None
    initial: Tensor | None = None
    shifts: Tensor | None = None


class QueryDecoder(ABC):
    """The decoder of a detector whose queries start from boxes: it can be asked about other boxes than its own.

    A query is a box, which says where to look, and a content vector. For a given box, the content is what the network
    itself makes of the box or, where it has other sources, that of its own query with the nearest box.
    """

    layer: str
    """Path of the decoder in the network; its call is what the methods need."""

    @property
    def has_corners(self) -> bool:
        """Whether it predicts a distribution for each edge of a box."""
        return False

    @abstractmethod
    def units(self, batch: Batch) -> Tensor:
        """What boxes are fractions of, (N, 4) pixels of the padded input: width, height, width, height."""

    @abstractmethod
    def own_boxes(self, call: Call) -> Tensor:
        """Boxes that the network's own queries start from, (N, Q, 4), without gradient."""

    @abstractmethod
    def answer(self, call: Call, boxes: Tensor) -> Answers:
        """Run the decoder and the heads once more, on the same images, in eval mode.

        Args:
            call: Of the decoder, in the network's own forward.
            boxes: (N, Q, 4) that the queries start from.
        """


class FeatureModel(nn.Module, ABC):
    """A network whose layers give feature maps. That is all that a teacher without a head has.

    Args:
        net: The framework's own module.
        mean: Mean color that the network expects, RGB in [0, 1].
        std: Standard deviation that the network expects, likewise.
    """

    license: str | None = None
    """License of the weights, where it is known."""

    multiple: int = 32
    """Height and width of the padded input are multiples of this."""

    def __init__(self, net: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.net = net
        self.mean: Tensor
        self.std: Tensor
        # As floats, even if a factory gives integers: pixels would otherwise be truncated to 0 and 1.
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(3, 1, 1), persistent=False)

    @property
    def backbone(self) -> nn.Module:
        """The part of the network that image-classification weights fit; the base class raises AcamkdError."""
        raise AcamkdError(
            f"{type(self).__name__} does not say which part of its network is the backbone: `backbone_weights` and "
            "`acamkd pretrain` need a class that defines `backbone`"
        )

    @property
    def net_name(self) -> str:
        """Class name of the framework's own network."""
        return type(self.net).__name__

    @property
    def takes_one_size(self) -> bool:
        """Whether the network runs on inputs of one size alone."""
        return False

    def comparable_layers(self) -> tuple[str, ...]:
        """Layers that feature losses are meant for, in FeatureTap's grammar; none where nothing is known of them."""
        return ()

    def normalize(self, batch: Batch) -> Tensor:
        """Pixels as this network expects them, (N, 3, H, W); teacher and student may expect different ones."""
        pixels: Tensor = (batch.pixels - self.mean) / self.std
        return pixels

    @abstractmethod
    def forward(self, batch: Batch) -> Any:
        """Run the network; feature losses read its layers."""


class TaskModel(FeatureModel):
    """A network with its task: it turns images into inputs, outputs, a loss and predictions.

    Args:
        net: The framework's own module. Only its `state_dict` is saved, so that the framework alone can load it.
        num_classes: Number of classes of the task, background and void not counted.
        mean: Mean color that the network expects, RGB in [0, 1].
        std: Standard deviation that the network expects, likewise.
    """

    task: ClassVar[Task]

    skips_parameters: ClassVar[bool] = False
    """Whether the loss of some batches leaves some parameters without a gradient; several processes then look for them
    in each step."""

    def __init__(self, net: nn.Module, num_classes: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__(net, mean, std)
        self.num_classes = num_classes

    @property
    def query_decoder(self) -> QueryDecoder | None:
        """Detection: the decoder, if its queries start from boxes."""
        return None

    @property
    def max_detections(self) -> int | None:
        """Detection: limit of boxes per image; None without a limit, and for segmentation."""
        return None

    def write_config(self, weights: Path, classes: Sequence[str]) -> None:
        """Write, beside a file of this network's weights, what its framework needs to load it; here nothing.

        Args:
            weights: The file that has just been written.
            classes: Class names in the order of their ids.
        """

    def export_form(self) -> ExportForm:
        """How `acamkd export` writes this network as an ONNX file.

        Raises:
            AcamkdError: It cannot be exported; the base class always raises this.
        """
        raise AcamkdError(f"{type(self).__name__} cannot be exported: its class does not define `export_form`")

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
        """Scalar terms of the task loss; also callable in eval mode."""

    @abstractmethod
    def decode(self, outputs: Outputs, batch: Batch) -> list[Prediction]:
        """Turn raw outputs into predictions in each image's own pixels."""

    def prepare_alike(self, images: Sequence[Tensor]) -> list[tuple[list[int], Batch]]:
        """Prepare each image as if it were alone, and stack those whose padded inputs have one size.

        In a batch with larger images, an image gets more padding. That changes predictions, through convolutions at the
        border and through normalization over the whole feature map.

        Args:
            images: (3, H, W) each, uint8, or float in [0, 1]; sizes may differ.

        Returns:
            Indices in `images`, and their batch without targets; one such pair per size.
        """
        groups: dict[PixelSize, list[tuple[int, Batch]]] = {}
        for index, image in enumerate(images):
            batch = self.prepare([image])
            groups.setdefault(batch.input_size, []).append((index, batch))
        return [([index for index, _ in group], _joined([batch for _, batch in group])) for group in groups.values()]

    @torch.no_grad()
    def predict(self, images: Sequence[Tensor]) -> list[Prediction]:
        """Predict on images; the network should be in eval mode.

        An image's prediction depends neither on the other images nor on the precision of a training: the network runs
        in the precision of its weights.
        """
        found: dict[int, Prediction] = {}
        with explaining_norms(), torch.autocast(self.mean.device.type, enabled=False):
            for indices, batch in self.prepare_alike(images):
                found.update(zip(indices, self.decode(self(batch), batch), strict=True))
        return [found[index] for index in range(len(images))]


def head_of(teacher: FeatureModel) -> TaskModel:
    """The teacher, if it has a head; raises AcamkdError otherwise."""
    if not isinstance(teacher, TaskModel):
        raise AcamkdError(
            "it needs the teacher's head, and this teacher is a backbone without one: take a method that compares "
            "features (cosine, pkd, ...), or a teacher with a head"
        )
    return teacher


def _joined(batches: Sequence[Batch]) -> Batch:
    """Join batches of one input size, without targets."""
    if len(batches) == 1:
        return batches[0]
    return Batch(
        pixels=torch.cat([batch.pixels for batch in batches]),
        sizes=[size for batch in batches for size in batch.sizes],
        original_sizes=[size for batch in batches for size in batch.original_sizes],
    )


@dataclass(frozen=True)
class Family:
    """Networks that one function builds, from a recipe's section to a TaskModel.

    Attributes:
        task: Task of the networks.
        names: Returns the values of `arch`; a name that ends with a slash stands for all names with this prefix.
        build: Takes the recipe's section, the number of classes and `data.resize`; raises AcamkdError if something
            named in the recipe does not exist.
    """

    task: Task
    names: Callable[[], Collection[str]]
    build: Callable[[Model, int, PixelSize | ShortLong | None], TaskModel]

    def holds(self, arch: str) -> bool:
        """Whether a recipe's `arch` belongs to this family."""
        return any(arch.startswith(name) if name.endswith("/") else arch == name for name in self.names())
