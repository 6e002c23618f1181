"""Teachers without a head: timm's backbones by their `features_only` interface, convolutional ones and ViTs."""

from __future__ import annotations

from collections import OrderedDict
from contextlib import nullcontext
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from acamkd.config import Model
from acamkd.errors import AcamkdError, nearest
from acamkd.models.backbones import TimmMaps, timm_options
from acamkd.models.base import Batch, FeatureModel, PixelSize
from acamkd.models.weights import hub_errors


class Levels(TimmMaps):
    """The feature maps of a timm backbone, from fine to coarse; arguments as TimmMaps."""

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """(N, 3, H, W) -> the maps, each (N, C, h, w)."""
        return self.maps(pixels)


class TimmFeatures(FeatureModel):
    """A timm backbone alone. Its layers are `levels:0`, `levels:1`, ..., from fine to coarse.

    Args:
        levels: Its feature maps.
        name: timm's name of it.
        resize: The padded input is brought to this (height, width), or multiplied by this factor.
        multiple: Both sides then become the nearest multiple of this, timm's coarsest stride.
        mean: Mean color.
        std: Standard deviation.
    """

    def __init__(
        self, levels: Levels, name: str, resize: PixelSize | float | None, multiple: int, mean: Any, std: Any
    ) -> None:
        super().__init__(nn.Sequential(OrderedDict(levels=levels)), mean, std)
        self.levels = len(levels.picks)
        self.name = name
        self.resize = resize
        self.multiple = multiple

    @property
    def backbone(self) -> nn.Module:
        """The network of timm itself, whose names a file of its weights has."""
        return without_getter(self.net.get_submodule("levels.body"))

    @property
    def net_name(self) -> str:
        """Class name of the network of timm itself."""
        return type(self.backbone).__name__

    def comparable_layers(self) -> tuple[str, ...]:
        """Every level."""
        return tuple(f"levels:{index}" for index in range(self.levels))

    def input_size(self, size: PixelSize) -> PixelSize:
        """(height, width) that the network sees of a padded input of this size."""
        resize = 1.0 if self.resize is None else self.resize
        height, width = resize if isinstance(resize, tuple) else (side * resize for side in size)
        return (self._fitting(height), self._fitting(width))

    def _fitting(self, side: float) -> int:
        return max(1, round(side / self.multiple)) * self.multiple

    def normalize(self, batch: Batch) -> Tensor:
        """Pixels at the network's own input size, (N, 3, h, w): the whole padded input, so that locations agree."""
        pixels, size = super().normalize(batch), self.input_size(batch.input_size)
        if size == batch.input_size:
            return pixels
        return F.interpolate(pixels, size=size, mode="bilinear", antialias=True)

    def forward(self, batch: Batch) -> list[Tensor]:
        """Every level, (N, C, h, w) each."""
        pixels = self.normalize(batch)
        try:
            maps: list[Tensor] = self.net(pixels)
        except AssertionError as error:  # timm's way to refuse a size
            cfg: Any = timm.get_pretrained_cfg(self.name)
            height, width = pixels.shape[-2:]
            raise AcamkdError(
                f"timm/{self.name} does not take images of {height} x {width} ({error}): set teacher.resize to "
                f"{list(cfg.input_size[1:])}"
            ) from error
        return maps


def license_of(name: str) -> str | None:
    """License of timm's pretrained weights of this name."""
    cfg: Any = timm.get_pretrained_cfg(name)
    return cfg.license if cfg is not None else None


def without_getter(features: nn.Module) -> nn.Module:
    """The network of timm within one that timm made for its feature maps, as weight files name it."""
    net: nn.Module = features.model if isinstance(features, FeatureGetterNet) else features
    return net


class NormalizedGetter(FeatureGetterNet):
    """A ViT's features behind its last norm, as foundation models are meant to be read."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__(model, norm=True, **options)


def build_features(model: Model) -> TimmFeatures:
    """Build the backbone that a recipe's `arch: timm/NAME` names, without weights from a file.

    Of a ViT, whose blocks have one stride, the last block's map behind the last norm is the only level; of others the
    last map of each stride. `model.options` go to timm's constructor. With `out_indices` among them, they name the
    levels, as timm gives them.

    Raises:
        AcamkdError: timm has no such network, it gives no feature maps, or its weights cannot be downloaded.
    """
    name = model.arch.removeprefix("timm/")
    if not timm.is_model(name):
        raise AcamkdError(f"timm has no backbone {name}; {nearest(name, timm.list_models())}")
    options = {**timm_options(name), **model.options}
    with torch.device("meta"):
        blank = _created(model, name, options)
    if len(set(blank.feature_info.reduction())) == 1 and isinstance(blank, FeatureGetterNet):
        options = {"feature_cls": NormalizedGetter, "out_indices": [-1], **options}
    pretrained = model.backbone_weights == "imagenet"
    with hub_errors(name) if pretrained else nullcontext():
        body = _created(model, name, options, pretrained=pretrained)
    reductions = body.feature_info.reduction()
    chosen = "out_indices" in model.options
    picks = list(range(len(reductions)) if chosen else {stride: k for k, stride in enumerate(reductions)}.values())
    cfg: Any = timm.get_pretrained_cfg(name)
    mean, std = model.mean or cfg.mean, model.std or cfg.std
    built = TimmFeatures(Levels(body, picks), name, model.resize, max(reductions), mean, std)
    if model.backbone_weights is not None:
        built.license = license_of(name)
    return built


def _created(model: Model, name: str, options: dict[str, Any], *, pretrained: bool = False) -> Any:
    """The network of timm, for any size of images where its constructor has that option."""
    settings: dict[str, Any] = {"pretrained": pretrained, "features_only": True, **options}
    try:
        try:
            return timm.create_model(name, **{"dynamic_img_size": True, **settings})
        except TypeError as error:
            if "dynamic_img_size" not in str(error):
                raise
        return timm.create_model(name, **settings)
    except (TypeError, ValueError, AssertionError, AttributeError, RuntimeError) as error:
        if pretrained:  # a download, whose errors are explained elsewhere
            raise
        given = f" with {model.options}" if model.options else ""
        raise AcamkdError(f"timm's {name} cannot give feature maps{given}: {error}") from error
