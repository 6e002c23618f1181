"""Backbones with a feature pyramid, for detectors."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, TypeAlias

import timm
import torch
import torchvision
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, FeaturePyramidNetwork
from torchvision.ops.misc import FrozenBatchNorm2d

from acamkd.config import Model
from acamkd.errors import AcamkdError, nearest
from acamkd.models.weights import hub_errors

log = logging.getLogger(__name__)

TORCHVISION = "torchvision/"
"""Prefix of names that mean torchvision's own modules."""


Top: TypeAlias = Callable[[int], ExtraFPNBlock]
"""Builds the module that adds levels above a pyramid, from the channels of the backbone's last stage."""

Norm: TypeAlias = Callable[[int], nn.Module]
"""Builds the normalization behind each convolution of a pyramid, from its channels."""


class TimmMaps(nn.Module):
    """A timm backbone of which some feature maps are used.

    Args:
        body: Made by `timm.create_model(..., features_only=True)`.
        picks: Indices of the maps among what it gives.
    """

    def __init__(self, body: Any, picks: list[int]) -> None:
        super().__init__()
        self.body = body
        self.picks = picks
        self.channels_last = getattr(body, "output_fmt", "NCHW") == "NHWC"

    def maps(self, pixels: Tensor) -> list[Tensor]:
        """(N, 3, H, W) -> the maps, each (N, C, h, w)."""
        maps = self.body(pixels)
        picked = [maps[pick] for pick in self.picks]
        return [x.permute(0, 3, 1, 2) for x in picked] if self.channels_last else picked


class TimmWithFPN(TimmMaps):
    """A timm backbone under a feature pyramid, laid out as torchvision's BackboneWithFPN: `body`, `fpn`.

    Args:
        body: Made by `timm.create_model(..., features_only=True)`.
        strides: Strides of the maps that feed the pyramid, such as (8, 16, 32).
        channels: Number of channels of the pyramid.
        top: Builds the module that adds coarser levels, from the channels of the last stage.
        norm: Builds the normalization behind each of the pyramid's convolutions; None = there is none.
    """

    def __init__(self, body: Any, strides: Sequence[int], channels: int, top: Top, norm: Norm | None = None) -> None:
        reductions = body.feature_info.reduction()
        super().__init__(body, [reductions.index(stride) for stride in strides])
        widths = [body.feature_info.channels()[pick] for pick in self.picks]
        self.fpn = FeaturePyramidNetwork(widths, channels, top(widths[-1]), norm)
        self.out_channels = channels

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W) -> levels "0", "1", ... from fine to coarse, then the top's, each (N, channels, h, w)."""
        try:
            maps = self.maps(pixels)
        except AssertionError as error:  # timm's way to refuse a size
            height, width = pixels.shape[-2:]
            raise AcamkdError(
                f"the backbone does not take images of {height} x {width} ({error}): set data.resize to a size that it "
                "takes, or take another backbone"
            ) from error
        levels: dict[str, Tensor] = self.fpn({str(level): x for level, x in enumerate(maps)})
        return levels


def build_backbone(
    model: Model, strides: Sequence[int], top: Top, norm: Norm | None = None
) -> tuple[nn.Module, Any, Any]:
    """Build the backbone and the pyramid that a recipe names.

    A timm name gives TimmWithFPN, whose batch norm trains. `torchvision/NAME` gives torchvision's ResNets as its own
    detectors build them: with pretrained weights of any kind, batch norm, the stem and the first stage are frozen;
    without, everything trains. Torchvision's other convolutional networks (MobileNets, EfficientNets, ConvNeXts, ...)
    train throughout.

    Args:
        model: The recipe's section.
        strides: Strides of the maps that feed the pyramid.
        top: What adds coarser levels.
        norm: What normalizes the pyramid.

    Returns:
        The backbone, and the mean and standard deviation of its pretraining's normalization.

    Raises:
        AcamkdError: The name is unknown, the backbone lacks these strides, or the weights cannot be downloaded.
    """
    if model.backbone.startswith(TORCHVISION):
        return _torchvision(model, strides, top, norm), IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    name = model.backbone
    if not timm.is_model(name):
        raise AcamkdError(f"timm has no backbone {name}; {nearest(name, timm.list_models())}")
    cfg = timm_cfg(name)
    pretrained = model.backbone_weights == "imagenet"
    with hub_errors(name) if pretrained else nullcontext():
        try:
            body: Any = timm.create_model(name, pretrained=pretrained, features_only=True, **timm_options(name))
        except AttributeError as error:  # raised by timm for models without feature extraction
            raise AcamkdError(f"timm's {name} cannot give feature maps; take another backbone") from error
    reductions = body.feature_info.reduction()
    if not set(strides) <= set(reductions):
        raise AcamkdError(
            f"timm's {name} gives maps of strides {reductions}, but {model.arch} needs {list(strides)}; "
            f"take another backbone"
        )
    return TimmWithFPN(body, strides, model.fpn_channels, top, norm), cfg.mean, cfg.std


def timm_cfg(name: str) -> Any:
    """What timm knows of a backbone's weights, such as their normalization.

    Args:
        name: A model of timm's, which may name its weights by a tag: resnet50.a1_in1k.

    Raises:
        AcamkdError: There are no such weights.
    """
    try:
        return timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise AcamkdError(f"timm's {name}: {error}; {nearest(name, timm.list_pretrained())}") from error


def timm_options(name: str) -> dict[str, Any]:
    """Further options of timm's constructor: Swin transformers accept other image sizes only with one."""
    return {"strict_img_size": False} if name.startswith("swin") else {}


def _torchvision(model: Model, strides: Sequence[int], top: Top, norm: Norm | None) -> nn.Module:
    name = model.backbone.removeprefix(TORCHVISION)
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise AcamkdError(f"torchvision has no backbone {name}; {nearest(name, known)}")
    pretrained = model.backbone_weights == "imagenet"
    is_resnet = name in torchvision.models.list_models(module=torchvision.models, include=["resne*", "wide_resnet*"])
    frozen = is_resnet and (model.weights is not None or model.backbone_weights is not None)
    with hub_errors(name) if pretrained else nullcontext():
        options = {"norm_layer": FrozenBatchNorm2d} if frozen else {}
        network = torchvision.models.get_model(name, weights="DEFAULT" if pretrained else None, **options)
    if frozen:
        log.info("%s: batch norm, stem and first stage are frozen, as torchvision does", model.backbone)
        for part in (network.conv1, network.bn1, network.layer1):
            part.requires_grad_(False)
    body = network if is_resnet else getattr(network, "features", nn.Identity())
    stages = _resnet_stages(network) if is_resnet else _last_of_each_stride(body)
    if not set(strides) <= set(stages):
        raise AcamkdError(
            f"torchvision's {name} gives maps of strides {sorted(stages)}, but {model.arch} needs {list(strides)}; "
            f"take another backbone"
        )
    outputs = {stages[stride][0]: str(level) for level, stride in enumerate(strides)}
    widths = [stages[stride][1] for stride in strides]
    return BackboneWithFPN(body, outputs, widths, model.fpn_channels, top(widths[-1]), norm)  # type: ignore[no-any-return]


def _resnet_stages(network: Any) -> dict[int, tuple[str, int]]:
    """Stride -> name and width of a ResNet's stages."""
    return {2 ** (stage + 1): (f"layer{stage}", network.inplanes // 8 * 2 ** (stage - 1)) for stage in (1, 2, 3, 4)}


@torch.no_grad()
def _last_of_each_stride(features: nn.Module) -> dict[int, tuple[str, int]]:
    """Stride -> name and width of the last child that puts out such a map, from one run over a blank image."""
    x, stages = torch.zeros(1, 3, 64, 64), {}
    for name, child in features.eval().named_children():
        x = child(x)
        if x.shape[-1] <= 64:  # transformers return channels last
            stages[64 // x.shape[-1]] = (name, x.shape[1])
    features.train()
    return stages
