"""KD-DETR: both decoders answer the same queries, and the student's answers learn from the teacher's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from acamkd.losses.functional import safe_divide
from acamkd.losses.queries import QueryLoss, Source, to_corners

if TYPE_CHECKING:
    from acamkd.models.base import Answers

L1_WEIGHT, GIOU_WEIGHT = 5.0, 2.0
"""Of the two distances of boxes, as in DETR's own loss."""


def class_divergence(logits: Tensor, teacher: Tensor) -> Tensor:
    """KL(sigmoid(t) || sigmoid(s)), summed over classes that are independent of each other: (N, Q, K) -> (N, Q)."""
    target = teacher.sigmoid()
    cross, own = (F.binary_cross_entropy_with_logits(x, target, reduction="none") for x in (logits, teacher))
    return (cross - own).sum(dim=-1)


def box_distance(boxes: Tensor, teacher: Tensor) -> Tensor:
    """5 |b_s - b_t|_1 + 2 (1 - GIoU) of boxes given by center and size: (N, Q, 4) -> (N, Q)."""
    giou = generalized_iou(to_corners(boxes), to_corners(teacher))
    return L1_WEIGHT * (boxes - teacher).abs().sum(dim=-1) + GIOU_WEIGHT * (1 - giou)


def generalized_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """IoU - (hull - union) / hull of paired boxes, (..., 4) x1 y1 x2 y2 -> (...)."""
    starts, ends = torch.stack([boxes[..., :2], others[..., :2]]), torch.stack([boxes[..., 2:], others[..., 2:]])
    overlap = (ends.amin(dim=0) - starts.amax(dim=0)).clamp_min(0).prod(dim=-1)
    hull = (ends.amax(dim=0) - starts.amin(dim=0)).prod(dim=-1)
    union = (ends - starts).prod(dim=-1).sum(dim=0) - overlap
    return safe_divide(overlap, union) - safe_divide(hull - union, hull)


class KDDETR(QueryLoss):
    """Both decoders are asked the same queries, and the student's classes and boxes learn from the teacher's.

    Paper: Wang et al., KD-DETR: Knowledge Distillation for Detection Transformer with Consistent Distillation Points
    Sampling, CVPR 2024.
    https://arxiv.org/abs/2211.08071
    Official code: https://github.com/wennyuhey/KD-DETR

    The predictions of two query detectors are sets without a common order. So sets of shared queries are put to both
    decoders, beside each network's own. To query i the teacher answers with class logits t_i and a box b_t,i, the
    student with s_i and b_s,i. With w_i the teacher's confidence as a share of all N Q queries of a set:

        w_i             max_c sigmoid(t_ic) / sum_j max_c sigmoid(t_jc)
        classification  sum_i w_i sum_c KL(sigmoid(t_ic) || sigmoid(s_ic))
        boxes           sum_i w_i (5 |b_s,i - b_t,i|_1 + 2 (1 - GIoU(b_s,i, b_t,i)))

    This needs queries that start from boxes, as those of RT-DETR, RT-DETRv2, D-FINE, DEIMv2, RF-DETR, LW-DETR, DAB-DETR
    and two-stage Deformable DETR do. Queries of DETR, Conditional DETR, YOLOS and one-stage Deformable DETR are learned
    vectors. No box can be put in their place.

    Terms of all sets are added. The sets that `queries` may name:

        specific  the boxes that the teacher's own queries start from
        general   `count` random boxes
        targets   the objects' boxes, filled up with random ones where an image has fewer than another

    The third set is that of CLoCKDistill (Lan and Tian, WACV 2026, https://arxiv.org/abs/2502.10683), for the logits.
    The gradient reaches the student's heads, decoder, encoder and backbone. Nothing is learned beside the student.

    Deviations: a shared query is a shared box. Its content vector is that of each network's own query with the nearest
    box. Contents are mostly features of a network's own encoder, and of its own width. DAB-DETR's contents are zero,
    and Deformable DETR's follow from the box. The papers share the whole query; CLoCKDistill's also has the object's
    class. A set's terms are divided by the sum of w rather than by a number of queries, and the factors 5 and 2 are
    DETR's. Only the last decoder layer answers, in eval mode. CLoCKDistill's distillation of the encoder's memory is
    not part of this. This follows the papers; no official code was run.

    Code:
        - KL(sigmoid(t) || sigmoid(s)): class_divergence
        - 5 |b_s - b_t|_1 + 2 (1 - GIoU): box_distance
        - general, targets: QueryLoss.forward
        - classification, boxes: KDDETR.compare

    Example:
        >>> section = Model(arch="hf/rf_detr", options={"num_queries": 100, "group_detr": 1})
        >>> student, teacher = (build(section, "detection", 2) for _ in range(2))
        >>> distiller = Distiller(student, teacher, pairs=[None], losses=[KDDETR()])

    Args:
        weight: Factor of the whole loss.
        classification_weight: Factor of the classification term.
        box_weight: Factor of the box term.
        queries: Sets of shared queries: `specific`, `general`, `targets`.
        count: Number of random boxes in the set `general`.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "kd_detr": {"queries": ("specific", "general")},
        "target_aware": {"queries": ("targets",)},
    }

    TERMS = ("classification", "boxes")

    def __init__(
        self,
        *,
        weight: float = 1.0,
        classification_weight: float = 1.0,
        box_weight: float = 1.0,
        queries: tuple[Source, ...] = ("specific", "general"),
        count: int = 100,
    ) -> None:
        super().__init__(weight=weight, queries=queries, count=count)
        self.classification_weight = classification_weight
        self.box_weight = box_weight

    def compare(self, student: Answers, teacher: Answers, share: Tensor) -> dict[str, Tensor]:
        """Return `classification` and `boxes`: see the class."""
        classification = (share * class_divergence(student.logits, teacher.logits)).sum()
        boxes = (share * box_distance(student.boxes, teacher.boxes)).sum()
        return {
            "classification": self.weight * self.classification_weight * classification,
            "boxes": self.weight * self.box_weight * boxes,
        }
