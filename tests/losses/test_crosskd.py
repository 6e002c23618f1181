"""CrossKD against hand-computed values, and where its gradient goes."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from acamkd.config import Model
from acamkd.distillation.distiller import Distiller
from acamkd.distillation.taps import FeatureTap
from acamkd.losses.base import DistillationContext
from acamkd.losses.crosskd import BOXES, CLASSES, CrossKD, _assign, align_scale, classification_distance, iou_loss
from acamkd.models import build
from acamkd.models.base import Batch, Target, TaskModel

LAYER = {"retinanet": 3, "fcos": 2}


def detector(arch: str, seed: int, num_classes: int = 3) -> TaskModel:
    """A tiny detector whose heads say something: torchvision starts them with nearly constant outputs."""
    torch.manual_seed(seed)
    model = build(
        Model(arch=arch, backbone="mobilenetv3_small_050", backbone_weights=None, fpn_channels=64),
        "detection",
        num_classes,
        (64, 64),
    )
    net: Any = model.net
    for name, parameter in net.head.named_parameters():
        if name.endswith("weight") and parameter.ndim == 4:
            torch.nn.init.kaiming_normal_(parameter)
    net.head.regression_head.bbox_reg.weight.data.mul_(0.1)
    torch.nn.init.constant_(net.head.regression_head.bbox_reg.bias, 1.0 if arch == "fcos" else 0.0)
    return model.eval()


def batch_of(model: TaskModel, crowd: int = 0) -> Batch:
    images = [torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    target: Target = {
        "boxes": torch.tensor([[0.0, 0.0, 32.0, 32.0]]),
        "labels": torch.tensor([1]),
        "iscrowd": torch.tensor([crowd]),
    }
    empty = {name: value[:0] for name, value in target.items()}
    return model.prepare(images, [target, empty])


def taps(model: TaskModel, names: list[str], batch: Batch) -> dict[str, Tensor]:
    with FeatureTap(model.net, names) as tap:
        model(batch)
        return tap.features()


def crosskd(student: TaskModel, teacher: TaskModel, batch: Batch, loss: CrossKD) -> dict[str, Tensor]:
    of_student, of_teacher = loss.layers(student, teacher)
    maps = taps(student, of_student, batch), taps(teacher, of_teacher, batch)
    return loss(student, teacher, *maps, batch, DistillationContext())  # type: ignore[no-any-return]


def test_targets_need_not_say_what_is_a_crowd() -> None:
    student, teacher = detector("retinanet", 0), detector("retinanet", 1)
    batch = batch_of(student)
    assert batch.targets is not None
    targets = [{name: x for name, x in target.items() if name != "iscrowd"} for target in batch.targets]
    without = dataclasses.replace(batch, targets=targets)
    torch.testing.assert_close(*(crosskd(student, teacher, each, CrossKD()) for each in (batch, without)))


def test_align_scale_gives_the_teachers_statistics() -> None:
    student = torch.tensor([0.0, 2.0]).view(1, 1, 1, 2)
    teacher = torch.tensor([[5.0, 9.0]]).view(1, 1, 1, 2)
    torch.testing.assert_close(align_scale(student, teacher), teacher)
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(align_scale(x, x), x)


@pytest.mark.parametrize("shape", [(1, 2, 1, 1), (2, 2, 3, 3)])
def test_align_scale_of_constant_maps_is_finite(shape: tuple[int, ...]) -> None:
    student = torch.ones(shape, requires_grad=True)
    aligned = align_scale(student, torch.full(shape, 7.0))
    aligned.sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(aligned, torch.full(shape, 7.0))
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_classification_distance_by_hand() -> None:
    loss = classification_distance(torch.tensor([0.0, 2.0]), torch.tensor([40.0, 2.0]))
    torch.testing.assert_close(loss, torch.tensor([0.5 * math.log(2), 0.0]))


def test_iou_loss_by_hand() -> None:
    boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0]], requires_grad=True)
    targets = torch.tensor([[1.0, 0.0, 3.0, 2.0], [0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    loss = iou_loss(boxes, targets)
    torch.testing.assert_close(loss, torch.tensor([math.log(3), 0.0, -math.log(1e-6)]))
    loss.sum().backward()  # type: ignore[no-untyped-call]
    assert boxes.grad is not None
    assert boxes.grad.isfinite().all()


@pytest.mark.parametrize("arch", ["retinanet", "fcos"])
def test_equal_networks_agree_and_others_do_not(arch: str) -> None:
    teacher = detector(arch, seed=0)
    batch = batch_of(teacher)
    loss = CrossKD(**CrossKD.PRESETS[arch])
    same = crosskd(copy.deepcopy(teacher), teacher, batch, loss)
    other = crosskd(detector(arch, seed=1), teacher, batch, loss)
    assert set(same) == {"classification", "boxes"}
    for name in same:
        assert same[name].item() == pytest.approx(0, abs=2e-3 * other[name].item())
        assert other[name].item() > 0.01


def _box_distance_by_hand(net: Any, anchor: Tensor, ours: Tensor, theirs: Tensor) -> float:
    """1 - GIoU, or -log IoU for FCOS, of the boxes that two codes at an anchor stand for."""
    x1, y1, x2, y2 = anchor.tolist()
    width, height = x2 - x1, y2 - y1
    boxes = []
    for code in (ours.tolist(), theirs.tolist()):
        if "FCOS" in type(net).__name__:  # distances to the four sides, in sides of the anchor, none negative
            left, top, right, bottom = (max(0.0, side) for side in code)
            x, y = (x1 + x2) / 2, (y1 + y2) / 2
            boxes.append((x - left * width, y - top * height, x + right * width, y + bottom * height))
        else:  # the center's step in sides of the anchor, and the logarithms of the sides' ratios, none above 1000 / 16
            x, y = code[0] * width + (x1 + x2) / 2, code[1] * height + (y1 + y2) / 2
            sides = zip(code[2:], (width, height), strict=True)
            half = [math.exp(min(c, math.log(1000 / 16))) * side / 2 for c, side in sides]
            boxes.append((x - half[0], y - half[1], x + half[0], y + half[1]))
    a, b = boxes
    overlap: float = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = sum((box[2] - box[0]) * (box[3] - box[1]) for box in boxes) - overlap
    if "FCOS" in type(net).__name__:
        return float(-math.log(max(overlap / union if union else 0.0, 1e-6)))
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return float(1 - (overlap / union - (hull - union) / hull))


@pytest.mark.parametrize("with_objects", [True, False])
@pytest.mark.parametrize("arch", ["retinanet", "fcos"])
def test_the_terms_are_sums_over_anchors_by_hand(arch: str, with_objects: bool) -> None:
    student, teacher = detector(arch, seed=1), detector(arch, seed=0)
    batch = batch_of(student, crowd=int(not with_objects))  # crowds are no objects
    loss, net = CrossKD(layer=LAYER[arch]), teacher.net
    of_student, of_teacher = loss.layers(student, teacher)
    maps = taps(student, of_student, batch), taps(teacher, of_teacher, batch)
    (s, t, _), (s_code, t_code, of_levels) = (loss._predictions(net, branch, *maps) for branch in (CLASSES, BOXES))
    anchors = net.anchor_generator(ImageList(batch.pixels, batch.sizes), of_levels)  # type: ignore[operator]
    assert batch.boxes is not None
    assigned = _assign(net, anchors, of_levels, batch.boxes)
    classification, boxes, positives = 0.0, 0.0, 0
    for n, r in assigned.ne(-2).nonzero().tolist():  # -2: between the thresholds, not asked
        positives += int(assigned[n, r] >= 0)
        ours, theirs = s[n, r].sigmoid().tolist(), t[n, r].sigmoid().tolist()
        classification += sum(
            abs(p - q) * -(q * math.log(p) + (1 - q) * math.log(1 - p)) for p, q in zip(ours, theirs, strict=True)
        )
        boxes += max(theirs) * _box_distance_by_hand(net, anchors[n][r], s_code[n, r], t_code[n, r])
    assert (positives > 0) == with_objects
    terms = crosskd(student, teacher, batch, loss)
    assert terms["classification"].item() == pytest.approx(classification / max(1, positives), rel=1e-3)
    assert terms["boxes"].item() == pytest.approx(boxes / max(1, positives), rel=1e-3)


@pytest.mark.parametrize("arch", ["retinanet", "fcos"])
def test_gradient_reaches_backbone_and_first_layers_only(arch: str) -> None:
    student, teacher = detector(arch, seed=1), detector(arch, seed=0)
    teacher.requires_grad_(False)
    loss = CrossKD(layer=LAYER[arch])
    torch.stack(list(crosskd(student, teacher, batch_of(student), loss).values())).sum().backward()  # type: ignore[no-untyped-call]
    per_layer = {"retinanet": 1, "fcos": 3}[arch]  # FCOS has convolution, normalization, activation in a row
    kept = [f"conv.{index}." for index in range(per_layer * LAYER[arch])]
    for name, parameter in student.net.head.named_parameters():  # type: ignore[union-attr]
        expected = any(f"head.{layer}" in name for layer in kept)
        assert (parameter.grad is not None) == expected, name
    assert all(p.grad is not None and p.grad.count_nonzero() for p in student.backbone.conv_stem.parameters())  # type: ignore[union-attr]
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_students_scale_and_shift_do_not_matter() -> None:
    student, teacher = detector("retinanet", seed=1), detector("retinanet", seed=0)
    batch, loss = batch_of(student), CrossKD(layer=2)
    of_student, of_teacher = loss.layers(student, teacher)
    student_maps, teacher_maps = taps(student, of_student, batch), taps(teacher, of_teacher, batch)
    terms = loss(student, teacher, student_maps, teacher_maps, batch, DistillationContext())
    larger = {name: 3 * x + 1 for name, x in student_maps.items()}
    moved = loss(student, teacher, larger, teacher_maps, batch, DistillationContext())
    for name, term in terms.items():
        assert moved[name].item() == pytest.approx(term.item(), rel=1e-4)


def test_weights_multiply_their_terms() -> None:
    student, teacher = detector("retinanet", seed=1), detector("retinanet", seed=0)
    batch = batch_of(student)
    plain = crosskd(student, teacher, batch, CrossKD())
    weighted = crosskd(student, teacher, batch, CrossKD(weight=2, classification_weight=0.4, box_weight=0.75))
    assert weighted["classification"].item() == pytest.approx(0.8 * plain["classification"].item())
    assert weighted["boxes"].item() == pytest.approx(1.5 * plain["boxes"].item())


def assignment(model: TaskModel, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    maps = [torch.zeros(2, 4 * 9 if "Retina" in type(model.net).__name__ else 4, n, n) for n in (8, 4, 2, 1, 1)]
    net: Any = model.net
    anchors = net.anchor_generator(ImageList(batch.pixels, batch.sizes), maps)
    assert batch.boxes is not None
    return _assign(net, anchors, maps, batch.boxes), anchors


def test_retinanet_assigns_as_its_matcher() -> None:
    model = detector("retinanet", seed=0)
    batch = batch_of(model)
    assigned, anchors = assignment(model, batch)
    net: Any = model.net
    assert batch.targets is not None
    matched = net.proposal_matcher(box_iou(batch.targets[0]["boxes"], anchors[0]))
    assert torch.equal(assigned[0], matched)
    assert (matched >= 0).any()
    assert (matched == -2).any()
    assert (assigned[1] == -1).all()


def test_fcos_assigns_the_positions_around_the_centre() -> None:
    model = detector("fcos", seed=0)
    assigned, _ = assignment(model, batch_of(model))
    # The box's center is (16, 16); stride 8 and radius 1.5 leave the positions 8, 16, 24 in both directions.
    first_level = (assigned[0, :64] >= 0).view(8, 8)
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[1:4, 1:4] = True
    assert torch.equal(first_level, expected)
    assert (assigned[0, 64:] == -1).all()
    assert (assigned[1] == -1).all()


def test_crowds_are_no_objects() -> None:
    model = detector("fcos", seed=0)
    assert (assignment(model, batch_of(model, crowd=1))[0] == -1).all()


def test_unusable_pairs_are_refused() -> None:
    retinanet, fcos = detector("retinanet", seed=0), detector("fcos", seed=0)
    with pytest.raises(ValueError, match="both torchvision FCOS, not FCOS and RetinaNet"):
        CrossKD().layers(fcos, retinanet)
    with pytest.raises(
        ValueError, match=r"classification_head\.cls_logits\.bias is \(45,\) in the student and \(36,\)"
    ):
        CrossKD().layers(detector("retinanet", seed=0, num_classes=4), retinanet)
    with pytest.raises(ValueError, match="layer must be 1 to 4 for this head, not 5"):
        CrossKD(layer=5).layers(retinanet, retinanet)


def test_inside_a_distiller() -> None:
    student, teacher = detector("fcos", seed=1), detector("fcos", seed=0)
    distiller = Distiller(student, teacher, [None], [CrossKD(**CrossKD.PRESETS["fcos"])])
    first, second = (distiller(batch_of(student)) for _ in range(2))
    assert {"head/crosskd/classification", "head/crosskd/boxes"} < set(first)
    assert all(torch.equal(first[name], second[name]) for name in first)
