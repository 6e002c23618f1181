"""What detectors and segmenters of transformers have in common: images, normalization, configuration files."""

from __future__ import annotations

import logging
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision.transforms.v2.functional as tv
from timm.models import FeatureInfo
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode

from acamkd.config import ShortLong
from acamkd.errors import AcamkdError
from acamkd.files import written_whole
from acamkd.models.base import Batch, ExportForm, Kernel, Outputs, PixelSize, Target, TaskModel
from acamkd.models.hf_kinds import Kind
from acamkd.models.resize import frame_size
from acamkd.models.timm_features import without_getter

log = logging.getLogger(__name__)

UNLIMITED = 2**31 - 1
"""Long side of a rule that names the short side alone."""


@dataclass(frozen=True)
class Preprocessing:
    """How a network wants its images, as its preprocessor_config.json says.

    Attributes:
        mean: Mean color, RGB in [0, 1].
        std: Standard deviation of the colors, likewise.
        resize: (height, width), its short and long side, or None for each image's own size.
        interpolation: Of the resizing.
        is_bgr: Whether the network takes blue first.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: PixelSize | ShortLong | None
    interpolation: InterpolationMode
    is_bgr: bool


def read_processor(settings: Mapping[str, Any], resize: PixelSize | ShortLong | None) -> Preprocessing:
    """What an image processor's settings say; `resize`, where given, wins over their size.

    Raises:
        AcamkdError: They have a rule of size that a recipe cannot express.
    """
    # Their factor may be another than 1/255, or none: it goes into mean and deviation, which are for [0, 1] here.
    factor = 255 * settings["rescale_factor"] if settings["do_rescale"] else 255.0
    normalizes = bool(settings.get("do_normalize"))
    mean = settings["image_mean"] if normalizes else (0.0,) * 3
    std = settings["image_std"] if normalizes else (1.0,) * 3
    return Preprocessing(
        tuple(value / factor for value in mean),
        tuple(value / factor for value in std),
        resize or (_rule(settings["size"]) if settings["do_resize"] else None),
        InterpolationMode.BICUBIC if settings.get("resample") == 3 else InterpolationMode.BILINEAR,
        bool(settings.get("do_flip_channel_order")),
    )


def _rule(size: Mapping[str, int | None]) -> PixelSize | ShortLong:
    given = {name: value for name, value in size.items() if value is not None}
    if given.keys() == {"height", "width"}:
        return (given["height"], given["width"])
    if "shortest_edge" in given and given.keys() <= {"shortest_edge", "longest_edge"}:
        return ShortLong(short=given["shortest_edge"], long=given.get("longest_edge", UNLIMITED))
    raise AcamkdError(
        f"preprocessor_config.json: the size {given} is no rule that is known here: give data.resize, "
        "[height, width] or {short, long}"
    )


class HFModel(TaskModel):
    """A network of transformers.

    Args:
        net: Its model with a head.
        kind: What is known of its type.
        num_classes: Classes of the task.
        processor: Its image processor, of which a trained network's file of settings is made.
        preprocessing: How it wants its images.
    """

    net: Any
    skips_parameters = True

    def __init__(
        self, net: nn.Module, kind: Kind, num_classes: int, processor: Any, preprocessing: Preprocessing
    ) -> None:
        super().__init__(net, num_classes, preprocessing.mean, preprocessing.std)
        self.kind = kind
        self.processor = processor
        self.preprocessing = preprocessing
        self._compared = False
        """Whether it was said how transformers prepares images otherwise."""
        settings: dict[str, Any] = self.net.config.to_dict()
        self.multiple = kind.multiple(settings)
        modules = dict(self.net.named_modules())
        # A configuration may leave some of them out: an encoder without a pyramid, fewer levels.
        self.comparable = tuple(name for name in kind.layers_of(settings) if re.split("[:#@]", name)[0] in modules)

    @property
    def takes_one_size(self) -> bool:
        """Whether its position embeddings are of one size."""
        return self.kind.is_fixed

    @property
    def backbone(self) -> nn.Module:
        """The part before the encoder or the head; where timm made it, timm's model, as weight files name it."""
        part: nn.Module = self.net.get_submodule(self.kind.backbone)
        made_by_timm = (x for x in part.modules() if isinstance(vars(x).get("feature_info"), FeatureInfo))
        return without_getter(next(made_by_timm, part))

    def comparable_layers(self) -> tuple[str, ...]:
        """The layers of the model type's table."""
        return self.comparable

    def normalize(self, batch: Batch) -> Tensor:
        """Pixels as this network expects them, (N, 3, H, W).

        Raises:
            AcamkdError: The batch has a size that the network does not take.
        """
        height, width = batch.input_size
        name, side = type(self.net).__name__, self.multiple
        if height % side or width % side:
            raise AcamkdError(
                f"{name} needs images whose sides are multiples of {side}, and got {height} x {width}: set data.resize"
            )
        if self.kind.is_fixed and batch.input_size != self.preprocessing.resize:
            raise AcamkdError(
                f"{name} takes images of {self.preprocessing.resize} alone, and got {height} x {width}: set "
                "data.resize, or take networks of one size"
            )
        pixels = super().normalize(batch)
        return pixels.flip(1) if self.preprocessing.is_bgr else pixels

    def prepare(self, images: Sequence[Tensor], targets: Sequence[Target] | None = None) -> Batch:
        """Resize as the network's image processor does, then pad on the right and at the bottom."""
        originals = [(image.shape[-2], image.shape[-1]) for image in images]
        sizes = [frame_size(original, self.preprocessing.resize) for original in originals]
        height, width = (-(-max(side) // self.multiple) * self.multiple for side in zip(*sizes, strict=True))
        pixels = self.mean.expand(len(images), 3, height, width).clone()
        for canvas, image, (h, w) in zip(pixels, images, sizes, strict=True):
            given = image if self.kind.rounds else tv.to_dtype(image, torch.float32, scale=True)
            resized = tv.resize(given, [h, w], self.preprocessing.interpolation, antialias=self.kind.rounds)
            canvas[:, :h, :w] = tv.to_dtype(resized, torch.float32, scale=True).clamp(0, 1)
        batch = Batch(pixels, sizes, originals)
        return batch if targets is None else self.with_targets(batch, targets)

    def with_targets(self, batch: Batch, targets: Sequence[Target]) -> Batch:
        """The batch with the images' targets in its frame."""
        raise NotImplementedError

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """The network's arguments but its labels."""
        inputs = {"pixel_values": self.normalize(batch)}
        if self.kind.is_masked:
            (height, width), pixels = batch.input_size, batch.pixels
            ends = torch.tensor(batch.sizes, device=pixels.device)[:, :, None, None]  # (N, 2, 1, 1)
            down, across = (torch.arange(side, device=pixels.device) for side in (height, width))
            inside = (down[:, None] < ends[:, 0]) & (across < ends[:, 1])
            inputs["pixel_mask"] = inside.long().expand(len(pixels), -1, -1)
        return inputs

    def export_form(self) -> ExportForm:
        """One input size, and any batch size.

        Raises:
            AcamkdError: Neither the recipe nor the network's own rule names one size.
        """
        size, kernel = self.preprocessing.resize, self._kernel
        if not isinstance(size, tuple):
            raise AcamkdError(
                f"{type(self.net).__name__} is exported for one input size: --set data.resize='[HEIGHT, WIDTH]'"
            )

        def outputs(pixels: Tensor) -> Mapping[str, Tensor]:
            return self.exported(Batch(pixels, [size], [size]))

        return ExportForm(outputs, size, self.multiple, kernel, self.kind.is_traced)

    @property
    def _kernel(self) -> Kernel:
        bicubic = self.preprocessing.interpolation is InterpolationMode.BICUBIC
        if self.kind.rounds:
            return "bicubic" if bicubic else "bilinear"
        if bicubic:
            raise AcamkdError(
                f"{type(self.net).__name__} resizes by bicubic interpolation, which exported files do not"
            )
        return "plain"

    @abstractmethod
    def exported(self, batch: Batch) -> Mapping[str, Tensor]:
        """What an exported file gives; the batch's images have one size, which it names once."""

    @property
    @abstractmethod
    def unknown_class(self) -> str:
        """What is wrong with targets of classes that the network does not know."""

    def loss(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the network's own weighted sum of its terms, named after the task.

        Raises:
            AcamkdError: The targets have classes that the network does not know.
        """
        if batch.targets is None:
            raise ValueError("the batch has no targets: give them to prepare")
        if "loss" not in outputs:
            raise AcamkdError(self.unknown_class)
        return {self.task: outputs["loss"]}

    def write_config(self, weights: Path, classes: Sequence[str]) -> None:
        """Write config.json and preprocessor_config.json beside the weights, so that transformers loads the folder."""
        config, processor, resize = self.net.config, self.processor, self.preprocessing.resize
        config.id2label = dict(enumerate(classes))
        config.label2id = {name: index for index, name in enumerate(classes)}
        config.architectures = [type(self.net).__name__]
        config.transformers_weights = weights.name
        settings = {
            "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "do_center_crop": False,
            "image_mean": self.mean.flatten().tolist(), "image_std": self.std.flatten().tolist(),
            "do_resize": resize is not None, "do_reduce_labels": False,
            **({} if resize is None else {"size": self._written_size(resize)}),
        }  # fmt: skip
        described = {name: value for name, value in processor.to_dict().items() if name not in settings}
        if "keep_aspect_ratio" in described:  # a size of ours is exact
            described |= {"keep_aspect_ratio": False, "ensure_multiple_of": 1}
        processor = type(processor)(**described, **settings)
        if not self._compared and (difference := self._prepared_otherwise(processor)):
            log.warning(
                "%s: transformers prepares images otherwise than they were in training (%s); there, give its network "
                "images that acamkd has prepared", weights.parent, difference,
            )  # fmt: skip
        self._compared = True
        for name, text in (
            ("config.json", config.to_json_string()), ("preprocessor_config.json", processor.to_json_string())
        ):  # fmt: skip
            with written_whole(weights.parent / name) as unfinished:
                unfinished.write_text(text, encoding="utf-8")

    @torch.no_grad()
    def _prepared_otherwise(self, processor: Any) -> str:
        """How an image processor's pixels differ from ours for an image that is no square; empty where they do not."""
        ramp = torch.linspace(0, 255, 100 * 130).reshape(1, 100, 130).expand(3, -1, -1).to(torch.uint8)
        own = self.normalize(self.prepare([ramp.to(self.mean.device)])).cpu()
        try:
            theirs: Tensor = processor(images=ramp, return_tensors="pt")["pixel_values"]
        except Exception as error:  # whatever a rule of size that it does not have ends in
            return f"{type(error).__name__}: {error}"
        if theirs.shape != own.shape:
            there, here = (" x ".join(map(str, x.shape[2:])) for x in (theirs, own))
            return f"100 x 130 pixels become {there}, here {here}"
        farthest = float((theirs - own).abs().max())
        return "" if farthest < 0.1 else f"its pixels differ by up to {farthest:.2g}"

    def _written_size(self, resize: PixelSize | ShortLong) -> dict[str, int]:
        """A rule of size as an image processor's settings write it."""
        if isinstance(resize, ShortLong):
            limit = {} if resize.long == UNLIMITED else {"longest_edge": resize.long}
            return {"shortest_edge": resize.short, **limit}
        if self.kind.is_fixed:  # these processors write one size in another way
            return {"shortest_edge": resize[0], "longest_edge": resize[1]}
        return {"height": resize[0], "width": resize[1]}
