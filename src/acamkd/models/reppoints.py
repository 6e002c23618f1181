"""RepPoints behind TaskModel: an object is a set of nine points, over any backbone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import Conv2dNormActivation, DeformConv2d, box_iou, sigmoid_focal_loss
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from acamkd.config import Model, ShortLong
from acamkd.models.backbones import build_backbone
from acamkd.models.base import Batch, Family, Outputs, PixelSize
from acamkd.models.detection import DenseDetector, check_group_norm, check_options, single_objects
from acamkd.models.resize import DetectionTransform

POINTS = 9
STRIDES = (8, 16, 32, 64, 128)
"""Strides of the pyramid's levels."""

SCALE = 4
"""Objects of SCALE times a level's stride belong to that level; losses of boxes are relative to this size."""

POINT_GRADIENT = 0.1
"""Share of the gradient that the first points get through the deformable convolutions."""

MOMENT_GRADIENT = 0.01
"""Share of its gradient that the learned factor between deviation and half side gets."""

POSITIVE, NEGATIVE = 0.5, 0.4
"""IoU of a first box with an object: from POSITIVE on it stands for the object, below NEGATIVE for background."""

NONE, UNDECIDED = -1, -2
"""Assigned where a location stands for background, and where it does not train."""

BETA = 0.11
"""Where the smooth L1 distance of boxes turns from quadratic to linear."""

INIT_WEIGHT = 0.5
"""Factor of the first boxes' loss."""

PADDED_TO = 32
"""An image is padded to a multiple of so many pixels; what a batch adds does not train."""

group_norm = partial(nn.GroupNorm, 32)


class NormalizedP6P7(ExtraFPNBlock):  # type: ignore[misc]
    """The two coarsest levels, from the backbone's last stage, each a convolution with group norm.

    Args:
        in_channels: Number of channels of that stage.
        out_channels: Number of channels of the pyramid.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.p6, self.p7 = (
            Conv2dNormActivation(width, out_channels, 3, stride=2, norm_layer=group_norm, activation_layer=None)
            for width in (in_channels, out_channels)
        )

    def forward(self, p: list[Tensor], c: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        """Append both levels and their names."""
        p6 = self.p6(c[-1])
        return [*p, p6, self.p7(p6)], [*names, "p6", "p7"]


class ClassificationHead(nn.Module):
    """Class logits from features at the first points.

    Args:
        width: Number of channels.
        num_classes: Number of classes, with background.
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.conv = _tower(width)
        self.deform_conv = DeformConv2d(width, width, 3, padding=1, bias=False)
        self.cls_logits = nn.Conv2d(width, num_classes, 1)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """(N, C, H, W) and offsets (N, 18, H, W) -> (N, K + 1, H, W)."""
        logits: Tensor = self.cls_logits(F.relu(self.deform_conv(_precise(self.conv(x)), offsets)))
        return logits


class RegressionHead(nn.Module):
    """Two sets of points for each location; the second moves the first by features at its points.

    Points are y1, x1, ..., y9, x9, relative to their location and in strides.

    Args:
        width: Number of channels.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = _tower(width)
        self.init_conv = nn.Conv2d(width, width, 3, padding=1)
        self.init_points = nn.Conv2d(width, 2 * POINTS, 1)
        self.refine_conv = DeformConv2d(width, width, 3, padding=1, bias=False)
        self.refine_points = nn.Conv2d(width, 2 * POINTS, 1)
        self.moment_transfer = nn.Parameter(torch.zeros(2))
        """Logarithm of half a side over the points' deviation: of the width, of the height."""
        grid = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0])] * 2)
        self.grid: Tensor
        self.register_buffer("grid", grid.view(1, 2 * POINTS, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, C, H, W) -> first and refined points, and the deformable convolutions' offsets, (N, 18, H, W) each."""
        x = _precise(self.conv(x))  # half precision has no deformable convolution on a processor
        first = _precise(self.init_points(F.relu(self.init_conv(x))))
        offsets = POINT_GRADIENT * first + (1 - POINT_GRADIENT) * first.detach() - self.grid
        refined = _precise(self.refine_points(F.relu(self.refine_conv(x, offsets))))
        return first, first.detach() + refined, offsets

    def boxes(self, points: Tensor) -> Tensor:
        """Boxes (N, H W, 4) around points (N, 18, H, W): their mean, and their deviation times a learned factor."""
        y, x = points[:, 0::2], points[:, 1::2]
        factor = (MOMENT_GRADIENT * self.moment_transfer + (1 - MOMENT_GRADIENT) * self.moment_transfer.detach()).exp()
        centers = torch.stack([x.mean(1), y.mean(1)], dim=-1)
        half = torch.stack([x.std(1), y.std(1)], dim=-1) * factor
        return torch.cat([centers - half, centers + half], dim=-1).flatten(1, 2)


class RepPointsHead(nn.Module):
    """The head, which runs once over each level of the pyramid.

    Args:
        width: Number of channels.
        num_classes: Number of classes, with background.
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.classification_head = ClassificationHead(width, num_classes)
        self.regression_head = RegressionHead(width)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, DeformConv2d)):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        bias = self.classification_head.cls_logits.bias
        assert bias is not None
        nn.init.constant_(bias, -math.log(99))  # a score of 0.01

    def forward(self, maps: Sequence[Tensor]) -> dict[str, Tensor]:
        """Maps (N, C, h, w) -> `cls_logits` (N, A, K + 1), `init_boxes` and `bbox_regression` (N, A, 4)."""
        levels = []
        for x in maps:
            first, refined, offsets = self.regression_head(x)
            logits = self.classification_head(x, offsets).flatten(2).transpose(1, 2)
            levels.append((logits, self.regression_head.boxes(first), self.regression_head.boxes(refined)))
        names = ("cls_logits", "init_boxes", "bbox_regression")
        return {name: torch.cat(parts, dim=1) for name, parts in zip(names, zip(*levels, strict=True), strict=True)}


class Locations(nn.Module):
    """Stands where other detectors have an anchor generator: x, y and stride of each location, (A, 3) per image."""

    def forward(self, images: ImageList, maps: Sequence[Tensor]) -> list[Tensor]:
        """Multiples of the levels' strides, in pixels of the padded input."""
        levels = []
        for level, stride in zip(maps, STRIDES, strict=True):
            rows, columns = (torch.arange(side, device=level.device) for side in level.shape[-2:])
            y, x = torch.meshgrid(rows, columns, indexing="ij")
            levels.append(torch.stack([x, y, torch.ones_like(x)], dim=-1).flatten(0, 1).to(level.dtype) * stride)
        return [torch.cat(levels)] * len(images.image_sizes)

    def num_anchors_per_location(self) -> list[int]:
        """One, on every level."""
        return [1] * len(STRIDES)


class BoxCoder:
    """Boxes relative to a location and in strides, as boxes in pixels."""

    def decode_single(self, boxes: Tensor, locations: Tensor) -> Tensor:
        """Boxes (..., A, 4) and locations (A, 3) -> (..., A, 4) x1 y1 x2 y2."""
        return boxes * locations[:, 2:] + locations[:, :2].repeat(1, 2)


class RepPoints(nn.Module):
    """RepPoints with moment-based boxes and group norm in pyramid and heads, as MMDetection configures it.

    Paper: Yang et al., RepPoints: Point Set Representation for Object Detection, ICCV 2019.
    https://arxiv.org/abs/1904.11490
    Configuration: MMDetection's reppoints-moment_r50_fpn-gn_head-gn. Its trained weights give the same boxes here.

    Args:
        backbone: Gives maps of STRIDES by name; `out_channels` is their number of channels.
        transform: Resizes, normalizes and pads.
        num_classes: Number of classes, with background, whose output is trained to nothing.
        score_thresh: A detection's lowest score.
        nms_thresh: IoU above which the worse of two detections of one class is dropped.
        detections_per_img: Largest number of detections.
        topk_candidates: Largest number of detections of a level before non-maximum suppression.
    """

    def __init__(
        self,
        backbone: nn.Module,
        transform: nn.Module,
        num_classes: int,
        *,
        score_thresh: float = 0.05,
        nms_thresh: float = 0.5,
        detections_per_img: int = 100,
        topk_candidates: int = 1000,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.transform = transform
        self.head = RepPointsHead(backbone.out_channels, num_classes)  # type: ignore[arg-type]
        self.anchor_generator = Locations()
        self.box_coder = BoxCoder()
        self.score_thresh = score_thresh
        self.nms_thresh = nms_thresh
        self.detections_per_img = detections_per_img
        self.topk_candidates = topk_candidates

    postprocess_detections = RetinaNet.postprocess_detections
    """The same in both: threshold, best of each level, clipping, suppression within a class."""

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Normalized pixels (N, 3, H, W) -> the head's outputs."""
        outputs: dict[str, Tensor] = self.head(list(self.backbone(pixels).values()))
        return outputs


class RepPointsDetector(DenseDetector):
    """RepPoints; raw outputs hold `init_boxes` too, and locations (A, 3) as `anchors`.

    Deviations from MMDetection: an object that no first box overlaps gets no location in the second stage; there, every
    location without overlap would stand for it. A row for background, which is never found, precedes the classes.
    """

    def loss(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return `classification` (focal), `points_init` and `points_refine` (smooth L1 of boxes)."""
        locations = outputs["anchors"][0]
        decode = self.net.box_coder.decode_single
        first, refined = (decode(outputs[name], locations) for name in ("init_boxes", "bbox_regression"))
        sums: dict[str, list[Tensor]] = {"classification": [], "points_init": [], "points_refine": []}
        counts: dict[str, int] = {"init": 0, "refine": 0}
        per_image = (outputs["cls_logits"], first, refined, single_objects(batch), batch.sizes)
        for logits, first_boxes, refined_boxes, target, (height, width) in zip(*per_image, strict=True):
            end = locations.new_tensor([math.ceil(side / PADDED_TO) * PADDED_TO for side in (width, height)])
            own = (locations[:, :2] < end).all(dim=1)
            boxes, places = target["boxes"].float(), locations[own]
            nearest = assign_locations(places, boxes)
            overlapping = assign_boxes(first_boxes[own].detach(), boxes)
            sums["classification"].append(_focal(logits[own], overlapping, target["labels"]))
            sums["points_init"].append(_distance(first_boxes[own], nearest, boxes, places))
            sums["points_refine"].append(_distance(refined_boxes[own], overlapping, boxes, places))
            for stage, assigned in (("init", nearest), ("refine", overlapping)):
                counts[stage] += max(1, int((assigned >= 0).sum()))
        classification, init, refine = (torch.stack(terms).sum() for terms in sums.values())
        return {
            "classification": classification / counts["refine"],
            "points_init": INIT_WEIGHT * init / counts["init"],
            "points_refine": refine / counts["refine"],
        }


def assign_locations(locations: Tensor, boxes: Tensor) -> Tensor:
    """Object that each location's first points stand for.

    An object takes the location of its level that is nearest to its center, in units of its width and height. A
    location that is nearest to several takes the object that it is nearer to.

    Args:
        locations: (A, 3) x, y and stride in pixels.
        boxes: (K, 4) x1 y1 x2 y2.

    Returns:
        (A,) index of the object, or NONE.
    """
    if len(boxes) == 0:
        return torch.full_like(locations[:, 0], NONE, dtype=torch.int64)
    centers, sides = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]).clamp_min(1e-6)
    levels = locations[:, 2].log2().round()
    wanted = (sides / SCALE).log2().mean(dim=1).trunc().clamp(levels.min(), levels.max())
    distances = ((locations[:, None, :2] - centers) / sides).norm(dim=2)  # (A, K)
    distances = distances.where(levels[:, None] == wanted, torch.inf)
    nearest = distances.argmin(dim=0, keepdim=True)
    kept = torch.full_like(distances, torch.inf).scatter(0, nearest, distances.gather(0, nearest))
    least, chosen = kept.min(dim=1)
    return chosen.where(least.isfinite(), NONE)


def assign_boxes(candidates: Tensor, boxes: Tensor) -> Tensor:
    """Object that each first box's refined points and class stand for.

    The object of largest IoU, if that is POSITIVE or more. Each object's best boxes stand for it in any case.

    Args:
        candidates: (A, 4) x1 y1 x2 y2.
        boxes: (K, 4) x1 y1 x2 y2.

    Returns:
        (A,) index of the object, NONE or, between the thresholds, UNDECIDED.
    """
    if len(boxes) == 0:
        return torch.full_like(candidates[:, 0], NONE, dtype=torch.int64)
    overlaps = box_iou(boxes, candidates)  # (K, A)
    largest, chosen = overlaps.max(dim=0)
    chosen = chosen.where(largest >= POSITIVE, UNDECIDED).where(largest >= NEGATIVE, NONE)
    best = overlaps.amax(dim=1, keepdim=True)
    indices = torch.arange(len(boxes), device=boxes.device)[:, None]
    ensured = indices.where((overlaps == best) & (best > 0), NONE).amax(dim=0)
    return ensured.where(ensured >= 0, chosen)


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _tower(width: int) -> nn.Sequential:
    return nn.Sequential(*(Conv2dNormActivation(width, width, norm_layer=group_norm) for _ in range(3)))


def _focal(logits: Tensor, assigned: Tensor, labels: Tensor) -> Tensor:
    """Sum of the focal loss over one image's logits (A, K + 1)."""
    classes = torch.zeros_like(logits)
    positive = assigned >= 0
    classes[positive, labels[assigned[positive]]] = 1
    counted = assigned != UNDECIDED
    loss: Tensor = sigmoid_focal_loss(logits[counted], classes[counted], reduction="sum")
    return loss


def _distance(predicted: Tensor, assigned: Tensor, boxes: Tensor, locations: Tensor) -> Tensor:
    """Sum of one image's smooth L1 distances between boxes and the objects that they stand for."""
    positive = assigned >= 0
    unit = SCALE * locations[positive, 2:]
    target = boxes[assigned[positive]]
    return F.smooth_l1_loss(predicted[positive] / unit, target / unit, beta=BETA, reduction="sum")


def build_reppoints(model: Model, num_classes: int, resize: PixelSize | ShortLong | None) -> RepPointsDetector:
    """Build RepPoints over a backbone with a pyramid of `model.fpn_channels`, a multiple of 32.

    `model.options` are the numbers of RepPoints' constructor.

    Raises:
        AcamkdError: Something named in the recipe does not exist or does not fit.
    """
    check_options(model, RepPoints)
    check_group_norm(model)
    width = model.fpn_channels
    backbone, mean, std = build_backbone(model, STRIDES[:3], lambda c5: NormalizedP6P7(c5, width), group_norm)
    transform = DetectionTransform(resize, model.mean or mean, model.std or std)
    return RepPointsDetector(RepPoints(backbone, transform, num_classes + 1, **model.options), num_classes)


FAMILY = Family("detection", lambda: ("reppoints",), build_reppoints)
