"""Conversion of MMDetection's and detectron2's detectors to torchvision's names and row order."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

import torch
from timm.data import IMAGENET_DEFAULT_STD
from torch import Tensor

from acamkd.models.conventions import RATIOS, Convention

BACKGROUND_LOGIT = -20.0
"""Bias of a dense detector's background output, which both frameworks lack; its score is below every threshold."""

_Rule: TypeAlias = tuple[str, str | Callable[[re.Match[str]], str]]

_MMDETECTION: Sequence[_Rule] = (
    (r"backbone\.", "backbone.body."),
    (r"neck\.lateral_convs\.(\d)\.conv\.", r"backbone.fpn.inner_blocks.\1.0."),
    (r"neck\.fpn_convs\.(\d)\.conv\.", r"backbone.fpn.layer_blocks.\1.0."),
    (r"bbox_head\.cls_convs\.(\d)\.conv\.", r"head.classification_head.conv.\1.0."),
    (r"bbox_head\.reg_convs\.(\d)\.conv\.", r"head.regression_head.conv.\1.0."),
    (r"bbox_head\.retina_cls\.", "head.classification_head.cls_logits."),
    (r"bbox_head\.retina_reg\.", "head.regression_head.bbox_reg."),
    (r"neck\.lateral_convs\.(\d)\.gn\.", r"backbone.fpn.inner_blocks.\1.1."),
    (r"neck\.fpn_convs\.(\d)\.gn\.", r"backbone.fpn.layer_blocks.\1.1."),
    (r"bbox_head\.cls_convs\.(\d)\.gn\.", r"head.classification_head.conv.\1.1."),
    (r"bbox_head\.reg_convs\.(\d)\.gn\.", r"head.regression_head.conv.\1.1."),
    (r"bbox_head\.reppoints_cls_conv\.", "head.classification_head.deform_conv."),
    (r"bbox_head\.reppoints_cls_out\.", "head.classification_head.cls_logits."),
    (r"bbox_head\.reppoints_pts_(init|refine)_conv\.", r"head.regression_head.\1_conv."),
    (r"bbox_head\.reppoints_pts_(init|refine)_out\.", r"head.regression_head.\1_points."),
    (r"bbox_head\.moment_transfer$", "head.regression_head.moment_transfer"),
    (r"rpn_head\.rpn_conv\.", "rpn.head.conv.0.0."),
    (r"rpn_head\.rpn_cls\.", "rpn.head.cls_logits."),
    (r"rpn_head\.rpn_reg\.", "rpn.head.bbox_pred."),
    (r"roi_head\.bbox_head\.shared_fcs\.0\.", "roi_heads.box_head.fc6."),
    (r"roi_head\.bbox_head\.shared_fcs\.1\.", "roi_heads.box_head.fc7."),
    (r"roi_head\.bbox_head\.fc_cls\.", "roi_heads.box_predictor.cls_score."),
    (r"roi_head\.bbox_head\.fc_reg\.", "roi_heads.box_predictor.bbox_pred."),
)  # fmt: skip


def _stage(match: re.Match[str]) -> str:
    return f"backbone.body.layer{int(match[1]) - 1}.{match[2]}."


def _shortcut(match: re.Match[str]) -> str:
    return f"{_stage(match)}downsample.{1 if match[3] else 0}."


_DETECTRON2: Sequence[_Rule] = (
    (r"backbone\.bottom_up\.stem\.conv1\.norm\.", "backbone.body.bn1."),
    (r"backbone\.bottom_up\.stem\.conv1\.", "backbone.body.conv1."),
    (r"backbone\.bottom_up\.res(\d)\.(\d+)\.shortcut\.(norm\.)?", _shortcut),
    (r"backbone\.bottom_up\.res(\d)\.(\d+)\.conv(\d)\.norm\.", lambda m: f"{_stage(m)}bn{m[3]}."),
    (r"backbone\.bottom_up\.res(\d)\.(\d+)\.", _stage),
    (r"backbone\.fpn_lateral(\d)\.", r"backbone.fpn.inner_blocks.\1.0."),
    (r"backbone\.fpn_output(\d)\.", r"backbone.fpn.layer_blocks.\1.0."),
    (r"backbone\.top_block\.", "backbone.fpn.extra_blocks."),
    (r"head\.cls_subnet\.(\d)\.", lambda m: f"head.classification_head.conv.{int(m[1]) // 2}.0."),
    (r"head\.bbox_subnet\.(\d)\.", lambda m: f"head.regression_head.conv.{int(m[1]) // 2}.0."),
    (r"head\.cls_score\.", "head.classification_head.cls_logits."),
    (r"head\.bbox_pred\.", "head.regression_head.bbox_reg."),
    (r"proposal_generator\.rpn_head\.conv\.", "rpn.head.conv.0.0."),
    (r"proposal_generator\.rpn_head\.objectness_logits\.", "rpn.head.cls_logits."),
    (r"proposal_generator\.rpn_head\.anchor_deltas\.", "rpn.head.bbox_pred."),
    (r"roi_heads\.box_head\.fc1\.", "roi_heads.box_head.fc6."),
    (r"roi_heads\.box_head\.fc2\.", "roi_heads.box_head.fc7."),
)  # fmt: skip

_RULES: Mapping[Convention, Sequence[_Rule]] = {"mmdetection": _MMDETECTION, "detectron2": _DETECTRON2}


def convention_of(names: Iterable[str]) -> Convention:
    """Framework of a detector whose tensors have these names."""
    for name in names:
        if name.startswith("neck.lateral_convs."):
            return "mmdetection"
        if name.startswith("backbone.fpn_lateral"):
            return "detectron2"
    return "torchvision"


def to_torchvision(state: Mapping[str, Tensor], convention: Convention) -> dict[str, Tensor]:
    """Rename and reorder a detector's tensors as in torchvision.

    Args:
        state: Tensors by their names in the framework `convention`; unknown names are kept.
        convention: Result of `convention_of`.
    """
    renamed = {_rename(name, _RULES[convention]): tensor for name, tensor in state.items()}
    renamed = _number_levels(renamed)
    boxes = renamed.get("head.regression_head.bbox_reg.bias")
    anchors = len(boxes) // 4 if boxes is not None else 1
    converted = {}
    for name, tensor in renamed.items():
        layer, _, kind = name.rpartition(".")
        if layer == "head.classification_head.cls_logits":
            tensor = _with_background(_ratios_first(tensor, anchors, convention), anchors, kind)
        elif layer == "head.regression_head.bbox_reg":
            tensor = _ratios_first(tensor, anchors, convention)
        elif layer == "roi_heads.box_predictor.cls_score":
            tensor = tensor.roll(1, dims=0)  # background comes last there, and first here
        elif layer == "roi_heads.box_predictor.bbox_pred":
            tensor = torch.cat([tensor.new_zeros(4, *tensor.shape[1:]), tensor])  # and has no box there
        elif name == "backbone.body.conv1.weight" and convention == "detectron2":
            # From blue, green, red in [0, 255] minus the mean to normalized red, green, blue.
            tensor = tensor.flip(1) * (255 * tensor.new_tensor(IMAGENET_DEFAULT_STD))[:, None, None]
        converted[name] = tensor
    return converted


def _rename(name: str, rules: Sequence[_Rule]) -> str:
    for pattern, replacement in rules:
        renamed, found = re.subn(f"^{pattern}", replacement, name)
        if found:
            return renamed
    return name


def _number_levels(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Count the pyramid's levels from 0, and call those above the backbone's `extra_blocks`."""
    level = re.compile(r"backbone\.fpn\.(inner|layer)_blocks\.(\d)\.([01])\.(.*)")
    matches = {name: level.match(name) for name in state}
    lateral = [int(match[2]) for match in matches.values() if match and match[1] == "inner"]
    normalized = any(match and match[3] == "1" for match in matches.values())
    numbered = {}
    for name, match in matches.items():
        new = name
        if match:
            above = int(match[2]) - max(lateral)
            part = f"{match[3]}.{match[4]}"
            new = f"backbone.fpn.{match[1]}_blocks.{int(match[2]) - min(lateral)}.{part}"
            if above > 0:  # a single convolution where nothing normalizes
                new = f"backbone.fpn.extra_blocks.p{5 + above}.{part if normalized else match[4]}"
        numbered[new] = state[name]
    return numbered


def _ratios_first(rows: Tensor, anchors: int, convention: Convention) -> Tensor:
    """(anchors * K, ...) rows from detectron2's (sizes, ratios, K) to everybody else's (ratios, sizes, K)."""
    if convention != "detectron2":
        return rows
    ratios = len(RATIOS)
    return rows.reshape(anchors // ratios, ratios, -1, *rows.shape[1:]).transpose(0, 1).flatten(0, 2)


def _with_background(rows: Tensor, anchors: int, kind: str) -> Tensor:
    """(anchors * K, ...) rows to (anchors * (K + 1), ...), background first."""
    per_anchor = rows.reshape(anchors, -1, *rows.shape[1:])
    value = BACKGROUND_LOGIT if kind == "bias" else 0.0
    return torch.cat([torch.full_like(per_anchor[:, :1], value), per_anchor], dim=1).flatten(0, 1)
