"""What is known of each model type of transformers; the only table of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from acamkd.models.base import Task

PREFIX = "hf/"
"""Of a recipe's `arch`."""

STRIDE = 32
"""Padded inputs are multiples of this; the coarsest feature map of the usual networks is 32 times smaller."""

Output: TypeAlias = Literal["boxes", "map", "queries"]
"""What a network says: a box per query, logits per pixel, or a class and a mask per query."""

Decoder: TypeAlias = Literal["hybrid", "groups", "anchors", "two_stage"]
"""Form of a decoder whose queries start from boxes: RT-DETR's, LW-DETR's with groups of queries, DAB-DETR's with
anchors, or that of a two-stage Deformable DETR."""

Options: TypeAlias = Mapping[str, Any]
"""A model's configuration as a dict."""


@dataclass(frozen=True)
class Kind:
    """One model type.

    Attributes:
        output: What it says.
        layers: Feature maps that can be compared, in FeatureTap's grammar. `{last}` stands for the index of the last
            layer, `{patch}` for the side of a patch in pixels.
        backbone: Where its backbone lies.
        processor: Class that prepares its images, where no preprocessor_config.json says so.
        has_none_class: Whether the last class logit of a query stands for no object: softmax rather than sigmoid.
        is_masked: Whether it takes a `pixel_mask`. Its boxes are then fractions of the image without padding.
        is_fixed: Whether it takes images of one size alone, its configuration's `image_size`.
        decoder: How it can be asked about given boxes, where its configuration lets it; None where it cannot.
        rounds: Whether its image processor resizes whole numbers with antialiasing, and rounds; else floats without.
        multiple: The number that the sides of the padded input must be a multiple of.
        is_traced: Whether PyTorch's older exporter writes it as ONNX. `torch.export` fails on hybrid encoders, and is
            slower; tracing fails on antialiased resizing, on free pooling and on masks at a free batch size.
    """

    output: Output
    layers: tuple[str, ...]
    backbone: str
    processor: str
    has_none_class: bool = False
    is_masked: bool = False
    is_fixed: bool = False
    decoder: Decoder | None = None
    rounds: bool = True
    multiple: Callable[[Options], int] = lambda _: STRIDE
    is_traced: bool = False

    @property
    def task(self) -> Task:
        """What it is for."""
        return "detection" if self.output == "boxes" else "segmentation"

    @property
    def auto_class(self) -> str:
        """The class of transformers that builds it."""
        heads = {"boxes": "ObjectDetection", "map": "SemanticSegmentation", "queries": "UniversalSegmentation"}
        return f"AutoModelFor{heads[self.output]}"

    def layers_of(self, options: Options) -> tuple[str, ...]:
        """The layers, with the configuration's numbers filled in."""
        numbers = {"last": options.get("num_hidden_layers", 0) - 1, "patch": _side(options.get("patch_size", 1))}
        return tuple(layer.format(**numbers) for layer in self.layers)


def _side(size: Any) -> int:
    return int(size if isinstance(size, int) else size[0])


def _patches(options: Options) -> int:
    return math.lcm(STRIDE, _side(options["patch_size"]))


def _windows(side: Callable[[int], int]) -> Callable[[Options], int]:
    """Multiples of a backbone's windows; `side` makes their number along one side of the number in its settings."""

    def multiple(options: Options) -> int:
        backbone = options["backbone_config"]
        return math.lcm(STRIDE, _side(backbone["patch_size"]) * side(backbone["num_windows"]))

    return multiple


_PYRAMID = ("model.encoder.fpn_blocks.1", "model.encoder.pan_blocks.0", "model.encoder.pan_blocks.1")

_HYBRID = Kind("boxes", _PYRAMID, "model.backbone", "RTDetrImageProcessor", decoder="hybrid", is_traced=True)

_EOMT = Kind(
    "queries", ("upscale_block@0",), "layers", "EomtImageProcessor",
    is_fixed=True, multiple=_patches, is_traced=True,
)  # fmt: skip

KINDS: Mapping[str, Kind] = {
    "rt_detr": _HYBRID,
    "rt_detr_v2": _HYBRID,
    "d_fine": _HYBRID,
    "deimv2": Kind("boxes", _PYRAMID, "model.conv_encoder", "RTDetrImageProcessor", decoder="hybrid", is_traced=True),
    "rf_detr": Kind(
        "boxes", ("model.backbone.projector",), "model.backbone.backbone", "RfDetrImageProcessor",
        is_masked=True, decoder="groups", rounds=False, multiple=_windows(lambda number: number),
    ),
    "lw_detr": Kind(
        "boxes", ("model.backbone.projector:*",), "model.backbone.backbone", "DeformableDetrImageProcessor",
        is_masked=True, decoder="groups", multiple=_windows(math.isqrt),
    ),
    "deformable_detr": Kind(
        "boxes", tuple(f"model.input_proj.{level}" for level in range(4)), "model.backbone",
        "DeformableDetrImageProcessor", is_masked=True, decoder="two_stage",
    ),
    "detr": Kind(
        "boxes", ("model.input_projection",), "model.backbone", "DetrImageProcessor",
        has_none_class=True, is_masked=True,
    ),
    "conditional_detr": Kind(
        "boxes", ("model.input_projection",), "model.backbone", "ConditionalDetrImageProcessor", is_masked=True
    ),
    "dab-detr": Kind(
        "boxes", ("model.input_projection",), "model.backbone", "ConditionalDetrImageProcessor",
        is_masked=True, decoder="anchors",
    ),
    "yolos": Kind(
        "boxes", ("vit.encoder.layer.{last}#{patch}+1",), "vit", "YolosImageProcessor",
        has_none_class=True, multiple=_patches, is_traced=True,
    ),
    "segformer": Kind(
        "map", (*(f"segformer.stages.{stage}" for stage in range(4)), "decode_head"), "segformer",
        "SegformerImageProcessor", is_traced=True,
    ),
    "upernet": Kind(
        "map", (*(f"decode_head.fpn_convs.{level}" for level in (2, 1, 0)), "decode_head"), "backbone",
        "SegformerImageProcessor",
    ),
    "dpt": Kind(
        "map", ("neck:*", "head.head.4"), "dpt", "DPTImageProcessor", multiple=_patches, is_traced=True
    ),
    "beit": Kind("map", ("fpn:*", "decode_head"), "beit", "BeitImageProcessor", multiple=_patches),
    "mobilevit": Kind(
        "map", ("segmentation_head.aspp", "segmentation_head"), "mobilevit", "MobileViTImageProcessor", is_traced=True
    ),
    "mask2former": Kind(
        "queries", ("model.pixel_level_module.decoder:mask_features",), "model.pixel_level_module.encoder",
        "Mask2FormerImageProcessor", is_masked=True, is_traced=True,
    ),
    "eomt": _EOMT,
    "eomt_dinov3": _EOMT,
}  # fmt: skip
"""By transformers' name of the model type."""
