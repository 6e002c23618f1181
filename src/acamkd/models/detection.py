"""torchvision's detectors behind TaskModel: RetinaNet, FCOS and Faster R-CNN over any backbone."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.models.detection.rpn import concat_box_prediction_layers
from torchvision.models.detection.transform import resize_boxes
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7
from torchvision.transforms.v2.functional import to_dtype

from acamkd.config import Model, ShortLong
from acamkd.errors import AcamkdError, refuse_unknown
from acamkd.models.backbones import build_backbone
from acamkd.models.base import Batch, Family, Outputs, PixelSize, Prediction, Target, TaskModel
from acamkd.models.conventions import (
    OCTAVE,
    RATIOS,
    AlignedRoIAlign,
    Convention,
    ExactAnchors,
    P6P7FromC5,
    stride_in_1x1,
)
from acamkd.models.resize import DetectionTransform


class Detector(TaskModel):
    """A torchvision detector; losses and detections are those of `net(images, targets)` and `net(images)`.

    Raw outputs hold `features` (the pyramid's levels by name), the heads' outputs in float32, and `anchors` (one tensor
    per image). Crowd boxes stay in the targets but are not used in training. Detections labeled 0 (background), which
    torchvision's dense detectors may give, are dropped.

    Args:
        net: The torchvision module; its transform holds the input size, mean and standard deviation.
        num_classes: Number of classes without background; the net has one output more.
    """

    task = "detection"
    net: Any

    def __init__(self, net: nn.Module, num_classes: int) -> None:
        transform: Any = net.transform
        super().__init__(net, num_classes, transform.image_mean, transform.image_std)
        if self.net_classes != num_classes + 1:
            raise AcamkdError(
                f"{type(net).__name__} has {self.net_classes} classes with background, but the task has {num_classes} "
                f"without: build it with num_classes={num_classes + 1}"
            )

    @property
    @abstractmethod
    def net_classes(self) -> int:
        """Number of the net's classes, with background."""

    @property
    def backbone(self) -> nn.Module:
        """The backbone, without its pyramid if it has one."""
        body: nn.Module = getattr(self.net.backbone, "body", self.net.backbone)
        return body

    def comparable_layers(self) -> tuple[str, ...]:
        """Every level of the pyramid."""
        return ("backbone:*",)

    def prepare(self, images: Sequence[Tensor], targets: Sequence[Target] | None = None) -> Batch:
        """Resize, pad and stack by the net's own transform, and revert its normalization of the pixels."""
        floats = [to_dtype(image, torch.float32, scale=True) for image in images]
        frame, moved = self.net.transform(floats, targets)
        return Batch(
            pixels=frame.tensors * self.std + self.mean,
            sizes=frame.image_sizes,
            original_sizes=[(image.shape[-2], image.shape[-1]) for image in images],
            targets=moved,
        )

    def decode(self, outputs: Outputs, batch: Batch) -> list[Prediction]:
        """Thresholded detections after non-maximum suppression, best first."""
        detections = self._detect(outputs, batch)
        for detection, size, original in zip(detections, batch.sizes, batch.original_sizes, strict=True):
            detection["boxes"] = resize_boxes(detection["boxes"], size, original)
        return detections

    @abstractmethod
    def _detect(self, outputs: Outputs, batch: Batch) -> list[Prediction]:
        """Detections in pixels of the padded input."""

    def _features(self, batch: Batch) -> dict[str, Tensor]:
        """Maps by level, from fine to coarse; a backbone of one level gives its map alone."""
        features = self.net.backbone(self.normalize(batch))
        return {"0": features} if isinstance(features, Tensor) else features

    def _anchors(self, generator: AnchorGenerator, features: Mapping[str, Tensor], batch: Batch) -> list[Tensor]:
        # The generator uses the feature maps' type, and half precision under autocast cannot resolve large coordinates.
        maps = [batch.pixels.new_empty(()).expand(level.shape) for level in features.values()]
        anchors: list[Tensor] = generator(ImageList(batch.pixels, batch.sizes), maps)
        return anchors


class DenseDetector(Detector):
    """A detector whose shared head runs once over each level of the pyramid."""

    def __init__(self, net: nn.Module, num_classes: int) -> None:
        super().__init__(net, num_classes)
        norms = [layer for layer in self.net.head.modules() if isinstance(layer, nn.GroupNorm)]
        self.single_channels = any(norm.num_groups == norm.num_channels for norm in norms)
        """Whether the heads normalize each channel alone, which fails on a feature map of one location."""

    @property
    def net_classes(self) -> int:
        """Number of the net's classes, with background."""
        return int(self.net.head.classification_head.num_classes)

    def forward(self, batch: Batch) -> Outputs:
        """Give `cls_logits` (N, A, K + 1), `bbox_regression` (N, A, 4) and, for FCOS, `bbox_ctrness` (N, A, 1)."""
        features = self._features(batch)
        if self.single_channels and not torch.compiler.is_compiling():
            self._check_maps(features, batch)
        head = {name: output.float() for name, output in self.net.head(list(features.values())).items()}
        return {"features": features, "anchors": self._anchors(self.net.anchor_generator, features, batch), **head}

    def _check_maps(self, features: Mapping[str, Tensor], batch: Batch) -> None:
        """Raise AcamkdError for inputs on which a single image cannot be predicted, at every batch size."""
        if any(level.shape[-2:].numel() == 1 for level in features.values()):
            height, width = batch.input_size
            channels = next(iter(features.values())).shape[1]
            raise AcamkdError(
                f"{type(self.net).__name__}: the heads' group norm has as many groups as channels ({channels}), and "
                f"the coarsest map of an input of {height} x {width} has one value, which cannot be normalized: give "
                f"fpn_channels {2 * channels} or more, or larger images (data.resize above 128)"
            )

    def _detect(self, outputs: Outputs, batch: Batch) -> list[Prediction]:
        counts = self.anchors_per_level(outputs)
        anchors = [list(torch.split(image, counts)) for image in outputs["anchors"]]
        head = {name: list(torch.split(output, counts, dim=1)) for name, output in _head(outputs).items()}
        detections = self.net.postprocess_detections(head, anchors, batch.sizes)
        # The background output is never a box's label, but may pass the threshold in an untrained network.
        return [{name: x[found["labels"] > 0] for name, x in found.items()} for found in detections]

    @property
    def max_detections(self) -> int:
        """An image gets so many boxes at most."""
        return int(self.net.detections_per_img)

    def anchors_per_level(self, outputs: Outputs) -> list[int]:
        """Number of anchors of each level, from fine to coarse."""
        per_place = self.net.anchor_generator.num_anchors_per_location()
        return [x.shape[-2] * x.shape[-1] * n for x, n in zip(outputs["features"].values(), per_place, strict=True)]


class RetinaNetDetector(DenseDetector):
    """torchvision's RetinaNet."""

    def loss(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return `classification` (focal) and `bbox_regression` (L1)."""
        terms: dict[str, Tensor] = self.net.compute_loss(single_objects(batch), _head(outputs), outputs["anchors"])
        return terms


class FCOSDetector(DenseDetector):
    """torchvision's FCOS."""

    def loss(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return `classification` (focal), `bbox_regression` (GIoU) and `bbox_ctrness`."""
        terms: dict[str, Tensor] = self.net.compute_loss(
            single_objects(batch), _head(outputs), outputs["anchors"], self.anchors_per_level(outputs)
        )
        return terms


class FasterRCNNDetector(Detector):
    """torchvision's Faster R-CNN.

    `forward` ends with the proposals. The box head runs within `loss` (on sampled proposals) and within `decode` (on
    all of them), because its input depends on the targets.
    """

    @property
    def net_classes(self) -> int:
        """Number of the net's classes, with background."""
        return int(self.net.roi_heads.box_predictor.cls_score.out_features)

    def forward(self, batch: Batch) -> Outputs:
        """Give `objectness` (N * A, 1), `rpn_deltas` (N * A, 4) and `proposals`, (P, 4) per image."""
        rpn = self.net.rpn
        features = self._features(batch)
        per_level, deltas = rpn.head(list(features.values()))
        counts = [level[0].numel() for level in per_level]
        objectness, deltas = (x.float() for x in concat_box_prediction_layers(per_level, deltas))
        anchors = self._anchors(rpn.anchor_generator, features, batch)
        boxes = rpn.box_coder.decode(deltas.detach(), anchors).view(len(anchors), -1, 4)
        proposals, _ = rpn.filter_proposals(boxes, objectness, batch.sizes, counts)
        return {
            "features": features,
            "anchors": anchors,
            "objectness": objectness,
            "rpn_deltas": deltas,
            "proposals": proposals,
        }

    @property
    def max_detections(self) -> int:
        """An image gets so many boxes at most."""
        return int(self.net.roi_heads.detections_per_img)

    def loss(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return `loss_classifier`, `loss_box_reg`, `loss_objectness` and `loss_rpn_box_reg`."""
        rpn, targets = self.net.rpn, single_objects(batch)
        labels, matched = rpn.assign_targets_to_anchors(outputs["anchors"], targets)
        wanted = rpn.box_coder.encode(matched, outputs["anchors"])
        objectness, rpn_box = rpn.compute_loss(outputs["objectness"], outputs["rpn_deltas"], labels, wanted)
        # A copy of the list, since the sampler replaces the proposals in it.
        sampled, _, classes, wanted = self.net.roi_heads.select_training_samples(list(outputs["proposals"]), targets)
        classifier, box = fastrcnn_loss(*self._classify(outputs, sampled, batch), classes, wanted)
        return {
            "loss_classifier": classifier,
            "loss_box_reg": box,
            "loss_objectness": objectness,
            "loss_rpn_box_reg": rpn_box,
        }

    def _detect(self, outputs: Outputs, batch: Batch) -> list[Prediction]:
        proposals = outputs["proposals"]
        found = self.net.roi_heads.postprocess_detections(
            *self._classify(outputs, proposals, batch), proposals, batch.sizes
        )
        return [{"boxes": b, "scores": s, "labels": k} for b, s, k in zip(*found, strict=True)]

    def _classify(self, outputs: Outputs, proposals: list[Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        """Class logits (P, K + 1) and box deltas (P, 4 (K + 1)) of all images' proposals."""
        heads = self.net.roi_heads
        features = {name: level.float() for name, level in outputs["features"].items()}
        logits, deltas = heads.box_predictor(heads.box_head(heads.box_roi_pool(features, proposals, batch.sizes)))
        return logits.float(), deltas.float()


WRAPPERS: Mapping[type[Any], type[Detector]] = {
    RetinaNet: RetinaNetDetector,
    FCOS: FCOSDetector,
    FasterRCNN: FasterRCNNDetector,
}
"""torchvision's class -> ours."""

ARCHITECTURES: Mapping[str, type[nn.Module]] = {"retinanet": RetinaNet, "fcos": FCOS, "faster_rcnn": FasterRCNN}


def build_detector(model: Model, num_classes: int, resize: PixelSize | ShortLong | None) -> Detector:
    """Build one of torchvision's detectors over a backbone with a pyramid of `model.fpn_channels`.

    `model.options` are numbers of torchvision's constructor (`score_thresh`, `box_detections_per_img`, ...). RetinaNet
    and Faster R-CNN also have `anchor_sizes`, the smallest anchor of each of the five levels in pixels. Their
    `convention` is `torchvision`, `mmdetection` or `detectron2`, whose detectors the network then reproduces exactly.

    Raises:
        AcamkdError: Something named in the recipe does not exist.
    """
    kind = ARCHITECTURES[model.arch]
    if kind is FCOS:
        check_group_norm(model)
    options, convention = _constructor_options(model, kind)
    width = model.fpn_channels
    if kind is FasterRCNN:
        backbone, mean, std = build_backbone(model, (4, 8, 16, 32), lambda _: LastLevelMaxPool())
    elif convention == "torchvision":
        top = LastLevelP6P7(width, width)  # built before the backbone, so that a seed keeps giving the same weights
        backbone, mean, std = build_backbone(model, (8, 16, 32), lambda _: top)
    else:
        relu = convention == "detectron2"
        backbone, mean, std = build_backbone(model, (8, 16, 32), lambda c5: P6P7FromC5(c5, width, relu=relu))
    if convention == "detectron2":
        stride_in_1x1(backbone)
    net = kind(backbone, num_classes=num_classes + 1, **options)
    return wrap_detector(net, num_classes, resize, model.mean or mean, model.std or std)


FAMILY = Family("detection", lambda: ARCHITECTURES, build_detector)


def wrap_detector(
    net: Any,
    num_classes: int,
    resize: PixelSize | ShortLong | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Detector:
    """Put a torchvision detector behind TaskModel.

    Its transform is replaced, so that the net alone resizes and normalizes as in training.

    Args:
        net: A RetinaNet, FCOS or FasterRCNN of torchvision's, or a RepPoints of ours.
        num_classes: Without background.
        resize: (height, width) of the frame, or its short and long side; None = each image's own size.
        mean: Mean color; None = the net's own.
        std: Standard deviation; None = the net's own.

    Raises:
        AcamkdError: It is another network, or has another number of classes.

    Example:
        >>> net = torchvision.models.detection.fcos_resnet50_fpn(weights=None, weights_backbone=None, num_classes=4)
        >>> wrap_detector(net, 3).num_classes
        3
    """
    wrapper = next((wrapper for framework, wrapper in WRAPPERS.items() if isinstance(net, framework)), None)
    if wrapper is None:
        raise AcamkdError(f"{type(net).__name__} is none of {', '.join(each.__name__ for each in WRAPPERS)}")
    net.transform = DetectionTransform(resize, mean or net.transform.image_mean, std or net.transform.image_std)
    return wrapper(net, num_classes)


def check_options(model: Model, kind: type[nn.Module], *further: str) -> None:
    """Refuse options that are no numbers of the constructor; torchvision itself would ignore a misspelled one.

    Args:
        model: The recipe's section.
        kind: The class that is built.
        further: Names of options that are allowed too.
    """
    allowed = {
        name
        for name, parameter in inspect.signature(kind).parameters.items()
        if isinstance(parameter.default, (int, float)) and name not in ("min_size", "max_size")
    } | set(further)
    refuse_unknown(model.arch, model.options, allowed)
    for name, value in model.options.items():
        if name not in further and not isinstance(value, (int, float)):
            raise AcamkdError(f"{model.arch}: options.{name} must be a number, not {value!r}")


def check_group_norm(model: Model) -> None:
    """Refuse a width that the group norm of 32 groups, which the heads have, cannot divide."""
    if model.fpn_channels % 32:
        raise AcamkdError(
            f"fpn_channels {model.fpn_channels}: {model.arch} has heads with group norm of 32 groups; give a multiple "
            "of 32"
        )


def _constructor_options(model: Model, kind: type[nn.Module]) -> tuple[dict[str, Any], Convention]:
    """Turn the recipe's options into constructor arguments."""
    anchors = {RetinaNet: "anchor_generator", FasterRCNN: "rpn_anchor_generator"}.get(kind)
    check_options(model, kind, *(("anchor_sizes", "convention") if anchors else ()))
    options = dict(model.options)
    convention = options.pop("convention", "torchvision")
    if convention not in get_args(Convention):
        raise AcamkdError(f"convention must be one of {', '.join(get_args(Convention))}, not {convention}")
    if not anchors or (convention == "torchvision" and "anchor_sizes" not in options):
        return options, convention
    sizes = options.pop("anchor_sizes", (32, 64, 128, 256, 512))
    if not isinstance(sizes, Sequence) or [isinstance(size, (int, float)) for size in sizes] != [True] * 5:
        raise AcamkdError(f"anchor_sizes must be five numbers, one per level of the pyramid, not {sizes}")
    levels = [[size * factor for factor in (OCTAVE if kind is RetinaNet else (1.0,))] for size in sizes]
    if convention == "torchvision":
        whole = tuple(tuple(int(size) for size in level) for level in levels)
        options[anchors] = AnchorGenerator(whole, (RATIOS,) * 5)
    else:
        finest = 8 if kind is RetinaNet else 4
        options[anchors] = ExactAnchors(levels, [finest * 2**level for level in range(5)])
        if kind is FasterRCNN:
            options["box_roi_pool"] = AlignedRoIAlign()
    return options, convention


def _head(outputs: Outputs) -> dict[str, Tensor]:
    return {name: outputs[name] for name in ("cls_logits", "bbox_regression", "bbox_ctrness") if name in outputs}


def single_objects(batch: Batch) -> list[Target]:
    """The targets without crowds, which do not train."""
    if batch.targets is None:
        raise ValueError("the batch has no targets: give them to prepare")
    kept = []
    for target in batch.targets:
        single = target.get("iscrowd", torch.zeros_like(target["labels"])) == 0
        kept.append({"boxes": target["boxes"][single], "labels": target["labels"][single]})
    return kept
