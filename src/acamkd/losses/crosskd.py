"""CrossKD: the student's head features pass through the rest of the teacher's head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import generalized_box_iou_loss

from acamkd.losses.base import DistillationContext, HeadLoss
from acamkd.losses.functional import full_precision, safe_divide

if TYPE_CHECKING:
    from acamkd.models.base import Batch, TaskModel

CLASSES, BOXES = "head.classification_head", "head.regression_head"
PREDICTORS = {CLASSES: "cls_logits", BOXES: "bbox_reg"}


def align_scale(student: Tensor, teacher: Tensor) -> Tensor:
    """Give each of the student's channels the teacher's mean and standard deviation over the batch and locations.

    Args:
        student: (N, C, H, W).
        teacher: (N, C, H, W).
    """
    (mean_s, std_s), (mean_t, std_t) = (
        (x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), correction=min(1, x[:, 0].numel() - 1), keepdim=True))
        for x in (student, teacher)
    )
    return (student - mean_s) / (std_s + 1e-6) * std_t + mean_t


def classification_distance(logits: Tensor, teacher: Tensor) -> Tensor:
    """Binary cross entropy between two tensors of logits times the distance of their sigmoids, element by element."""
    target = teacher.sigmoid()
    return (logits.sigmoid() - target).abs() * F.binary_cross_entropy_with_logits(logits, target, reduction="none")


def iou_loss(boxes: Tensor, targets: Tensor) -> Tensor:
    """-log IoU of paired boxes, (R, 4) and (R, 4) x1 y1 x2 y2 -> (R,); an IoU below 1e-6 counts as that."""
    corners = torch.minimum(boxes[:, 2:], targets[:, 2:]) - torch.maximum(boxes[:, :2], targets[:, :2])
    overlap = corners.clamp_min(0).prod(dim=1)
    area, target_area = ((x[:, 2:] - x[:, :2]).prod(dim=1) for x in (boxes, targets))
    return -safe_divide(overlap, area + target_area - overlap).clamp_min(1e-6).log()


class CrossKD(HeadLoss):
    """The student's head features, sent through the rest of the teacher's frozen head, predict what the teacher does.

    Paper: Wang et al., CrossKD: Cross-Head Knowledge Distillation for Object Detection, CVPR 2024.
    https://arxiv.org/abs/2306.11369
    Official code: https://github.com/jbwang1997/CrossKD

    In both branches, classification and boxes, and at each pyramid level, x is the output of the student's convolution
    `layer` (counted from 1) before its activation. x gets the teacher's mean and standard deviation of the same
    layer, per channel over the batch and the locations. Activated, it runs through the teacher's later layers:

        classification  sum_{rows,classes} w BCE(s, sigmoid(t)) |sigmoid(s) - sigmoid(t)| / positives
        boxes           sum_rows w max_class sigmoid(t) D(box_s, box_t) / positives

    s and box_s are logits and decoded boxes of these reused predictions, t and box_t the teacher's own. A row is an
    anchor. w is 0 for anchors that the detector's assignment ignores, 1 otherwise. positives are the anchors that stand
    for an object, at least 1. D is 1 - GIoU (RetinaNet) or -log IoU (FCOS).

    The gradient flows through the teacher's frozen layers, never into them, to the student's backbone and first `layer`
    convolutions of each branch. Nothing is learned. The presets are the published settings; defaults are those of
    RetinaNet.

    Deviations: the official code is under a non-commercial license. This follows the paper, for torchvision's RetinaNet
    and FCOS. Their anchors and assignments differ in detail from those of the published runs, and their heads have no
    scale per level. Anchors and assignments are the teacher's. The paper's IoU loss of FCOS is taken to be the original
    FCOS's, with the logarithm. Positives are counted over the batch of one process. A single location in a batch of one
    has no unbiased standard deviation and takes 0 for it.

    Code:
        - x with the teacher's mean and standard deviation: align_scale
        - BCE(s, sigmoid(t)) |sigmoid(s) - sigmoid(t)|: classification_distance
        - D = -log IoU (FCOS): iou_loss
        - D, boxes decoded from the same anchors: _box_distance
        - w and positives, the detector's own assignment: _assign
        - classification, boxes: CrossKD.forward

    Example:
        >>> section = Model(arch="retinanet", backbone="mobilenetv3_small_050", backbone_weights=None)
        >>> student, teacher = (build(section, "detection", 2, (64, 64)) for _ in range(2))
        >>> distiller = Distiller(student, teacher, pairs=[None], losses=[CrossKD()])

    Args:
        weight: Factor of the whole loss.
        classification_weight: Factor of the classification term.
        box_weight: Factor of the box term.
        layer: How many of the student's convolutions a branch keeps before the teacher takes over.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "retinanet": {"layer": 3, "classification_weight": 1.0, "box_weight": 1.0},
        "fcos": {"layer": 2, "classification_weight": 0.4, "box_weight": 0.75},
    }

    TERMS = ("classification", "boxes")

    REQUIREMENTS = ("RetinaNet or FCOS on both sides",)

    def __init__(
        self, *, weight: float = 1.0, classification_weight: float = 1.0, box_weight: float = 1.0, layer: int = 3
    ) -> None:
        super().__init__()
        self.weight = weight
        self.classification_weight = classification_weight
        self.box_weight = box_weight
        self.layer = layer

    def layers(self, student: TaskModel, teacher: TaskModel) -> tuple[list[str], list[str]]:
        """Name the head features of both networks and the teacher's predictions, once per pyramid level.

        Raises:
            ValueError: The detectors are not both RetinaNet or both FCOS, their heads differ, or `layer` is too high.
        """
        _check(student.net, teacher.net)
        levels = _levels(teacher.net)
        features = [f"{self._split(teacher.net, branch)[0]}@{level}" for branch in PREDICTORS for level in levels]
        predictions = [f"{branch}.{predictor}@{level}" for branch, predictor in PREDICTORS.items() for level in levels]
        return features, features + predictions

    def forward(
        self,
        student: TaskModel,
        teacher: TaskModel,
        student_taps: Mapping[str, Tensor],
        teacher_taps: Mapping[str, Tensor],
        batch: Batch,
        context: DistillationContext,
    ) -> dict[str, Tensor]:
        """Return `classification` and `boxes`: see the class.

        Raises:
            ValueError: The batch has no boxes.
        """
        if batch.boxes is None:
            raise ValueError("CrossKD needs boxes: the number of anchors that stand for an object scales its loss")
        net: Any = teacher.net
        with full_precision(batch.pixels):
            logits, target_logits, _ = self._predictions(net, CLASSES, student_taps, teacher_taps)  # (N, R, K)
            codes, target_codes, maps = self._predictions(net, BOXES, student_taps, teacher_taps)  # (N, R, 4)
            anchors = net.anchor_generator(ImageList(batch.pixels, batch.sizes), maps)  # (R, 4) per image
            assigned = _assign(net, anchors, maps, batch.boxes)  # (N, R)
            counted = assigned != Matcher.BETWEEN_THRESHOLDS
            positives = (assigned >= 0).sum().clamp_min(1)
            certainty = target_logits.sigmoid().amax(dim=2)
            distance = _box_distance(net, codes.flatten(0, 1), target_codes.flatten(0, 1), torch.cat(anchors))
            classification = classification_distance(logits, target_logits).sum(dim=2)[counted].sum() / positives
            boxes = (certainty.flatten() * distance)[counted.flatten()].sum() / positives
        return {
            "classification": self.weight * self.classification_weight * classification,
            "boxes": self.weight * self.box_weight * boxes,
        }

    def _predictions(
        self, net: Any, branch: str, student_taps: Mapping[str, Tensor], teacher_taps: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The teacher's branch: reused and own predictions, one row per anchor, and its own per level."""
        name, rest = self._split(net, branch)
        reused, own = [], []
        for level in _levels(net):
            x, like = student_taps[f"{name}@{level}"].float(), teacher_taps[f"{name}@{level}"].detach().float()
            reused.append(rest(align_scale(x, like)))
            own.append(teacher_taps[f"{branch}.{PREDICTORS[branch]}@{level}"].detach().float())
        width = net.head.classification_head.num_classes if branch == CLASSES else 4
        return _rows(reused, width), _rows(own, width), own

    def _split(self, net: nn.Module, branch: str) -> tuple[str, nn.Sequential]:
        """Cut a branch before its `layer`-th activation: name of the last module before the cut, and all behind it."""
        head = net.get_submodule(branch)
        modules = head.get_submodule("conv").named_modules()
        tower = [(name, module) for name, module in modules if not list(module.children())]
        activations = [index for index, (_, module) in enumerate(tower) if isinstance(module, nn.ReLU)]
        if not 1 <= self.layer <= len(activations):
            raise ValueError(f"CrossKD: layer must be 1 to {len(activations)} for this head, not {self.layer}")
        cut = activations[self.layer - 1]
        rest = nn.Sequential(*(module for _, module in tower[cut:]), head.get_submodule(PREDICTORS[branch]))
        return f"{branch}.conv.{tower[cut - 1][0]}", rest


def _levels(net: Any) -> range:
    """Indices of the pyramid levels, at each of which the head runs once."""
    return range(len(net.anchor_generator.sizes))


def _rows(maps: Sequence[Tensor], width: int) -> Tensor:
    """Predictions of all levels in the anchors' order: (N, A * width, H_l, W_l) -> (N, sum_l H_l W_l A, width)."""
    return torch.cat([x.view(len(x), -1, width, *x.shape[-2:]).permute(0, 3, 4, 1, 2).flatten(1, 3) for x in maps], 1)


def _assign(net: Any, anchors: Sequence[Tensor], maps: Sequence[Tensor], boxes: Sequence[Tensor]) -> Tensor:
    """Index of the object that each anchor stands for, (N, R), as the detector itself assigns it; negative: none."""
    # torchvision assigns inside `compute_loss`, which hands the result to its head as the last argument. A stand-in
    # for the detector whose head returns that argument makes it the result.
    detector = SimpleNamespace(**vars(net), head=SimpleNamespace(compute_loss=lambda *arguments: arguments[-1]))
    per_level = [[x[0, 0].numel() for x in maps]] if isinstance(net, FCOS) else []  # one anchor per location
    return torch.stack(type(net).compute_loss(detector, [{"boxes": each} for each in boxes], {}, anchors, *per_level))


def _box_distance(net: Any, codes: Tensor, target_codes: Tensor, anchors: Tensor) -> Tensor:
    """Distance of two predictions of boxes for the same anchors, each (R, 4) -> (R,)."""
    if isinstance(net, FCOS):  # its head's last activation is part of no module
        return iou_loss(*(net.box_coder.decode(x.relu(), anchors) for x in (codes, target_codes)))
    distance: Tensor = generalized_box_iou_loss(
        *(net.box_coder.decode_single(x, anchors) for x in (codes, target_codes))
    )
    return distance


def _check(student: Any, teacher: Any) -> None:
    """Refuse detectors whose heads cannot be exchanged."""
    if not any(isinstance(student, kind) and isinstance(teacher, kind) for kind in (RetinaNet, FCOS)):
        raise ValueError(
            "CrossKD needs a student and a teacher that are both torchvision RetinaNet or both torchvision FCOS, "
            f"not {type(student).__name__} and {type(teacher).__name__}"
        )
    given, needed = (
        {name: tuple(x.shape) for name, x in net.head.state_dict().items()} | {"pyramid levels": len(_levels(net))}
        for net in (student, teacher)
    )
    differing = [name for name in sorted(given | needed) if given.get(name) != needed.get(name)]
    if differing:
        name = differing[0]
        raise ValueError(
            f"CrossKD needs equal heads, but {name} is {given.get(name)} in the student and {needed.get(name)} in the "
            "teacher: give both the same classes, anchors, width and depth of the head"
        )
