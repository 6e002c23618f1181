"""Segmenters of segmentation_models_pytorch, torchvision or the user behind TaskModel."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import segmentation_models_pytorch as smp
import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torchvision.transforms.v2.functional import to_dtype

from acamkd.config import Model, ShortLong
from acamkd.errors import AcamkdError, nearest, refuse_unknown
from acamkd.models.backbones import TORCHVISION, timm_cfg
from acamkd.models.base import VOID, Batch, Family, Outputs, PixelSize, Prediction, Target, TaskModel
from acamkd.models.resize import frame_size
from acamkd.models.weights import hub_errors

STRIDE = 32
"""Inputs are padded to multiples of this many pixels; the usual encoders have a largest stride of 32."""

AUXILIARY_WEIGHT = 0.4


class Segmenter(TaskModel):
    """A network that turns pixels into logits at their size, or into a dict with them under `out` (and `aux`).

    Args:
        net: (N, 3, H, W) -> (N, K, H, W), H and W multiples of 32.
        num_classes: K.
        mean: Mean color that the network expects, RGB in [0, 1].
        std: Standard deviation that the network expects, likewise.
        resize: (height, width) of the input, or its short and long side; None = each image's own size.
    """

    task = "segmentation"
    net: Any

    def __init__(
        self,
        net: nn.Module,
        num_classes: int,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
        resize: PixelSize | ShortLong | None = None,
    ) -> None:
        super().__init__(net, num_classes, mean, std)
        self.resize = resize

    @property
    def backbone(self) -> nn.Module:
        """The encoder of smp (inside a `tu-` one: timm's own model), or `net.backbone`."""
        encoder: nn.Module | None = getattr(self.net, "encoder", None) or getattr(self.net, "backbone", None)
        if encoder is None:
            raise AcamkdError(f"{type(self.net).__name__} has neither an encoder nor a backbone")
        return encoder.model if isinstance(encoder, smp.encoders.TimmUniversalEncoder) else encoder

    def prepare(self, images: Sequence[Tensor], targets: Sequence[Target] | None = None) -> Batch:
        """Resize, then pad with the mean color and VOID on the right and at the bottom."""
        originals = [(image.shape[-2], image.shape[-1]) for image in images]
        sizes = [frame_size(original, self.resize) for original in originals]
        height, width = (-(-max(side) // STRIDE) * STRIDE for side in zip(*sizes, strict=True))
        pixels = self.mean.expand(len(images), 3, height, width).clone()
        for canvas, image, (h, w) in zip(pixels, images, sizes, strict=True):
            resized = to_dtype(image, torch.float32, scale=True)[None]
            if resized.shape[-2:] != (h, w):
                resized = F.interpolate(resized, size=(h, w), mode="bilinear", antialias=True)
            canvas[:, :h, :w] = resized[0]
        masks = None
        if targets is not None:
            masks = [fit_mask(t["mask"], size, (height, width)) for t, size in zip(targets, sizes, strict=True)]
        return Batch(pixels, sizes, originals, [{"mask": mask} for mask in masks] if masks is not None else None)

    def forward(self, batch: Batch) -> Outputs:
        """Give `out`, the logits (N, K, H, W), and `aux` where the network has an auxiliary head."""
        raw = self.net(self.normalize(batch))
        outputs = {name: logits.float() for name, logits in (raw if isinstance(raw, dict) else {"out": raw}).items()}
        expected = (batch.pixels.shape[0], self.num_classes, *batch.input_size)
        if outputs["out"].shape != expected:
            raise AcamkdError(
                f"{type(self.net).__name__} gives logits {tuple(outputs['out'].shape)}, but must give {expected}: one "
                f"channel per class, at the input's size"
            )
        return outputs

    def loss(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return `cross_entropy`, the mean over the batch's pixels that are not void, and `aux_cross_entropy`."""
        if batch.targets is None:
            raise ValueError("the batch has no targets: give them to prepare")
        mask = torch.stack([target["mask"] for target in batch.targets])  # (N, H, W)
        terms = {"cross_entropy": _cross_entropy(outputs["out"], mask)}
        if "aux" in outputs:
            terms["aux_cross_entropy"] = AUXILIARY_WEIGHT * _cross_entropy(outputs["aux"], mask)
        return terms

    def decode(self, outputs: Outputs, batch: Batch) -> list[Prediction]:
        """Best class of every pixel; logits are brought to the image's size first."""
        return best_classes(outputs["out"], batch)


def build_segmenter(model: Model, num_classes: int, resize: PixelSize | ShortLong | None) -> Segmenter:
    """Build an architecture of segmentation_models_pytorch over `model.backbone`, or `torchvision/NAME` as it is.

    `model.options` are further arguments of the constructor (`decoder_channels`, `aux_loss`, ...); for a `tu-` encoder,
    those unknown to the smp architecture go to timm.

    Raises:
        AcamkdError: Something named in the recipe does not exist.
    """
    framework = _torchvision if model.arch.startswith(TORCHVISION) else _smp
    net, mean, std = framework(model, num_classes)
    return Segmenter(net, num_classes, model.mean or mean, model.std or std, resize)


FAMILY = Family("segmentation", lambda: [*smp.MODEL_ARCHITECTURES_MAPPING, TORCHVISION], build_segmenter)


def _smp(model: Model, num_classes: int) -> tuple[nn.Module, Any, Any]:
    known = smp.MODEL_ARCHITECTURES_MAPPING
    encoder, from_timm = model.backbone, model.backbone.startswith("tu-")
    names = [*smp.encoders.get_encoder_names(), *(f"tu-{name}" for name in timm.list_models())]
    if not (timm.is_model(encoder.removeprefix("tu-")) if from_timm else encoder in names):
        raise AcamkdError(f"unknown encoder {encoder}; {nearest(encoder, names)}")
    if not from_timm:
        refuse_unknown(model.arch, model.options, set(inspect.signature(known[model.arch]).parameters) - _NOT_OPTIONS)
    mean: Any = IMAGENET_DEFAULT_MEAN
    std: Any = IMAGENET_DEFAULT_STD
    if from_timm:
        cfg = timm_cfg(encoder.removeprefix("tu-"))
        mean, std = cfg.mean, cfg.std
    pretrained = model.backbone_weights == "imagenet"
    with hub_errors(encoder) if pretrained else nullcontext():
        weights = (True if from_timm else "imagenet") if pretrained else None
        try:
            net = smp.create_model(
                model.arch, encoder_name=encoder, encoder_weights=weights, classes=num_classes, **model.options
            )
        except OSError:  # download errors, some of which are also ValueErrors
            raise
        except (TypeError, ValueError, NotImplementedError) as error:
            raise AcamkdError(f"{model.arch} cannot be built over {encoder} with {model.options}: {error}") from error
        if pretrained and not from_timm:
            published = smp.encoders.get_preprocessing_params(encoder)
            mean, std = published["mean"], published["std"]
    return net, mean, std


_NOT_OPTIONS = {"encoder_name", "encoder_weights", "in_channels", "classes", "activation", "aux_params", "kwargs"}
"""Options that the recipe sets elsewhere, or that would change the form of the output."""


def _torchvision(model: Model, num_classes: int) -> tuple[nn.Module, Any, Any]:
    name = model.arch.removeprefix(TORCHVISION)
    known = torchvision.models.list_models(module=torchvision.models.segmentation)
    if name not in known:
        raise AcamkdError(f"torchvision has no segmenter {name}; {nearest(name, known)}")
    refuse_unknown(model.arch, model.options, {"aux_loss"})
    pretrained = model.backbone_weights == "imagenet"
    with hub_errors(name) if pretrained else nullcontext():
        net = torchvision.models.get_model(
            name,
            weights=None,
            weights_backbone="DEFAULT" if pretrained else None,
            num_classes=num_classes,
            **model.options,
        )
    return net, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD


def fit_mask(mask: Tensor, size: PixelSize, frame: PixelSize) -> Tensor:
    """(H, W) -> frame: nearest neighbor to `size`, VOID beyond."""
    if mask.shape != size:
        mask = F.interpolate(mask[None, None].float(), size=size, mode="nearest-exact")[0, 0].long()
    return F.pad(mask, (0, frame[1] - size[1], 0, frame[0] - size[0]), value=VOID)


def best_classes(scores: Tensor, batch: Batch) -> list[Prediction]:
    """The best class of every pixel of each image, from scores of the classes (N, K, H, W) in the batch's frame."""
    predictions = []
    for logits, (h, w), original in zip(scores, batch.sizes, batch.original_sizes, strict=True):
        logits = logits[None, :, :h, :w]
        if (h, w) != original:
            logits = F.interpolate(logits, size=original, mode="bilinear", align_corners=False)
        predictions.append({"mask": logits[0].max(dim=0).indices})  # argmax takes seven times as long on a CPU
    return predictions


def _cross_entropy(logits: Tensor, mask: Tensor) -> Tensor:
    """Mean over the pixels that are not void; zero if all are, but still part of the graph."""
    total = F.cross_entropy(logits, mask, ignore_index=VOID, reduction="sum")
    return total / (mask != VOID).sum().clamp(min=1)
