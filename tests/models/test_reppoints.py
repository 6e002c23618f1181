from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou

from acamkd.config import Model, parse
from acamkd.distillation.distiller import Distiller
from acamkd.engine.cost import flop_counter
from acamkd.errors import AcamkdError
from acamkd.jobs.export.graph import build_graph, write_graph
from acamkd.jobs.export.onnx_model import OnnxModel
from acamkd.losses import ACAM
from acamkd.losses.crosskd import CrossKD
from acamkd.models import Target, build, inherit, save_weights
from acamkd.models.base import Batch
from acamkd.models.reppoints import (
    NONE,
    UNDECIDED,
    RegressionHead,
    RepPointsDetector,
    assign_boxes,
    assign_locations,
)

SIZE = (64, 96)


def detector(**settings: Any) -> RepPointsDetector:
    section = {"backbone": "mobilenetv3_small_050", "backbone_weights": None, "fpn_channels": 64, **settings}
    model = build(Model(arch="reppoints", **section), "detection", 3, SIZE)
    assert isinstance(model, RepPointsDetector)
    return model


def targets() -> list[Target]:
    """Two images: one with objects and a crowd, one without anything."""
    boxes = torch.tensor([[5.0, 5.0, 40.0, 40.0], [20.0, 10.0, 90.0, 60.0], [0.0, 0.0, 96.0, 64.0]])
    crowd = torch.tensor([0, 0, 1])
    nothing = torch.zeros(0, dtype=torch.int64)
    return [
        {"boxes": boxes, "labels": torch.tensor([1, 3, 2]), "iscrowd": crowd},
        {"boxes": torch.zeros(0, 4), "labels": nothing, "iscrowd": nothing},
    ]


@pytest.fixture(scope="module")
def model() -> RepPointsDetector:
    torch.manual_seed(0)
    return detector().eval()


@pytest.fixture(scope="module")
def batch(model: RepPointsDetector) -> Batch:
    images = torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    return model.prepare(list(images), targets())


def places() -> list[tuple[float, float, float]]:
    """x, y and stride of every location, level by level and row by row."""
    return [
        (float(column * stride), float(row * stride), float(stride))
        for stride in (8, 16, 32, 64, 128)
        for row in range(math.ceil(SIZE[0] / stride))
        for column in range(math.ceil(SIZE[1] / stride))
    ]


def random_boxes(count: int) -> Tensor:
    corners = torch.rand(count, 2) * 60
    return torch.cat([corners, corners + 2 + torch.rand(count, 2) ** 2 * 60], dim=1)


def nearest_locations(boxes: Tensor) -> list[int]:
    """Objects one by one, as the paper and MMDetection describe the first stage."""
    found, distance = [NONE] * len(places()), [math.inf] * len(places())
    for index, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        width, height = x2 - x1, y2 - y1
        level = min(7, max(3, int((math.log2(width / 4) + math.log2(height / 4)) / 2)))
        gaps = [
            math.hypot((x - (x1 + x2) / 2) / width, (y - (y1 + y2) / 2) / height) if stride == 2**level else math.inf
            for x, y, stride in places()
        ]
        nearest = gaps.index(min(gaps))
        if gaps[nearest] < distance[nearest]:
            found[nearest], distance[nearest] = index, gaps[nearest]
    return found


def largest_overlaps(candidates: Tensor, boxes: Tensor) -> list[int]:
    overlaps = box_iou(candidates, boxes).tolist()
    found = []
    for row in overlaps:
        best = max(row)
        found.append(row.index(best) if best >= 0.5 else NONE if best < 0.4 else UNDECIDED)
    for index in range(len(boxes)):
        best = max(row[index] for row in overlaps)
        found = [index if row[index] == best > 0 else old for row, old in zip(overlaps, found, strict=True)]
    return found


@pytest.mark.parametrize("seed", range(4))
def test_assigners_against_loops(seed: int) -> None:
    torch.manual_seed(seed)
    boxes = random_boxes(6)
    expected = nearest_locations(boxes)
    assert assign_locations(torch.tensor(places()), boxes).tolist() == expected
    assert 2 <= sum(each != NONE for each in expected) <= 6
    candidates = torch.cat([random_boxes(40), boxes.repeat(20, 1) + 6 * torch.randn(120, 4)])
    candidates = torch.cat([candidates[:, :2], candidates[:, :2].maximum(candidates[:, 2:])], dim=1)
    assigned = assign_boxes(candidates, boxes)
    assert assigned.tolist() == largest_overlaps(candidates, boxes)
    assert {NONE, UNDECIDED, *range(6)} >= set(assigned.tolist()) > {NONE, UNDECIDED}


def test_a_location_takes_the_nearer_of_two_objects() -> None:
    boxes = torch.tensor([[13.0, 13.0, 45.0, 45.0], [14.0, 14.0, 50.0, 50.0], [15.0, 15.0, 47.0, 47.0]])
    locations = torch.tensor(places())
    [taken] = (assign_locations(locations, boxes) >= 0).nonzero().flatten().tolist()
    assert locations[taken].tolist() == [32.0, 32.0, 8.0]
    assert assign_locations(locations, boxes)[taken] == 1  # its center is the location


def test_nothing_is_assigned_without_objects_or_overlap() -> None:
    assert set(assign_locations(torch.tensor(places()), torch.zeros(0, 4)).tolist()) == {NONE}
    assert set(assign_boxes(random_boxes(5), torch.zeros(0, 4)).tolist()) == {NONE}
    assert set(assign_boxes(random_boxes(5), torch.tensor([[200.0, 200.0, 210.0, 210.0]])).tolist()) == {NONE}


def test_a_box_is_the_mean_and_a_learned_multiple_of_the_deviation() -> None:
    head = RegressionHead(32)
    head.moment_transfer.data = torch.tensor([2.0, 3.0]).log()
    points = torch.arange(9.0)  # mean 4, sample deviation sqrt(7.5)
    pairs = torch.stack([1 + points, 10 * points], dim=1).view(1, 18, 1, 1)  # y, x
    [[box]] = head.boxes(pairs)
    deviation = 7.5**0.5
    expected = [40 - 20 * deviation, 5 - 3 * deviation, 40 + 20 * deviation, 5 + 3 * deviation]
    torch.testing.assert_close(box, torch.tensor(expected))
    box[2:].sum().backward()
    assert head.moment_transfer.grad is not None
    torch.testing.assert_close(head.moment_transfer.grad, 0.01 * torch.tensor([20.0, 3.0]) * deviation)


def test_features_are_read_at_the_first_points(model: RepPointsDetector) -> None:
    """With every point two right of and one below the plain convolution's, the map is shifted by as much."""
    head = model.net.head
    x = torch.randn(1, 64, 8, 10)
    offsets = torch.tensor([1.0, 2.0]).repeat(9).view(1, 18, 1, 1).expand(1, 18, 8, 10)
    deformed = head.regression_head.refine_conv(x, offsets)
    plain = torch.nn.functional.conv2d(x, head.regression_head.refine_conv.weight, padding=1)
    torch.testing.assert_close(deformed[..., 1:-2, 1:-3], plain[..., 2:-1, 3:-1])
    first, _, offsets = head.regression_head(x)
    grid = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)]
    torch.testing.assert_close(first - offsets, torch.tensor(grid).float().view(1, 18, 1, 1).expand_as(first))
    bias = head.regression_head.init_points.bias
    [whole], [part] = (torch.autograd.grad(each.sum(), bias, retain_graph=True) for each in (first, offsets))
    torch.testing.assert_close(part, 0.1 * whole)


def boxes_of(outputs: Any, name: str, image: int) -> list[list[float]]:
    return [
        [x + stride * a, y + stride * b, x + stride * c, y + stride * d]
        for (x, y, stride), (a, b, c, d) in zip(places(), outputs[name][image].tolist(), strict=True)
    ]


def smooth(predicted: list[float], wanted: list[float], stride: float) -> float:
    gaps = [abs(a - b) / (4 * stride) for a, b in zip(predicted, wanted, strict=True)]
    return sum(gap**2 / 0.22 if gap < 0.11 else gap - 0.055 for gap in gaps)


def test_the_loss_against_loops(model: RepPointsDetector, batch: Batch) -> None:
    outputs = dict(model(batch))
    outputs["init_boxes"] = outputs["init_boxes"] + torch.tensor([-3.0, -3.0, 3.0, 3.0])  # some overlap the objects
    sums, counts = {"classification": 0.0, "points_init": 0.0, "points_refine": 0.0}, {"init": 0, "refine": 0}
    for image, target in enumerate(targets()):
        objects = target["boxes"][target["iscrowd"] == 0]
        first, refined = (boxes_of(outputs, name, image) for name in ("init_boxes", "bbox_regression"))
        nearest, overlapping = [NONE] * len(first), [NONE] * len(first)
        if len(objects):
            nearest, overlapping = nearest_locations(objects), largest_overlaps(torch.tensor(first), objects)
        for row, (_, _, stride) in enumerate(places()):
            if nearest[row] >= 0:
                sums["points_init"] += smooth(first[row], objects[nearest[row]].tolist(), stride) / 2
            if overlapping[row] >= 0:
                sums["points_refine"] += smooth(refined[row], objects[overlapping[row]].tolist(), stride)
            for column, score in enumerate(outputs["cls_logits"][image, row].sigmoid().tolist()):
                if overlapping[row] >= 0 and column == target["labels"][overlapping[row]]:
                    sums["classification"] -= 0.25 * (1 - score) ** 2 * math.log(score)
                elif overlapping[row] != UNDECIDED:
                    sums["classification"] -= 0.75 * score**2 * math.log(1 - score)
        counts["init"] += max(1, sum(each >= 0 for each in nearest))
        counts["refine"] += max(1, sum(each >= 0 for each in overlapping))
    assert counts["refine"] > 4
    found = {name: value.item() for name, value in model.loss(outputs, batch).items()}
    assert found == pytest.approx({
        "classification": sums["classification"] / counts["refine"],
        "points_init": sums["points_init"] / counts["init"],
        "points_refine": sums["points_refine"] / counts["refine"],
    }, rel=1e-4)  # fmt: skip


def test_what_a_batch_adds_to_an_image_does_not_train(model: RepPointsDetector) -> None:
    images = [torch.rand(3, 64, 96), torch.rand(3, 30, 40)]
    model.net.transform.frame, frame = None, model.net.transform.frame
    batch = model.prepare(images, [{**each, "boxes": each["boxes"][:0]} for each in targets()[1:] * 2])
    model.net.transform.frame = frame
    outputs = dict(model(batch))
    before = model.loss(outputs, batch)["classification"]
    outputs["cls_logits"] = outputs["cls_logits"].clone()
    outputs["cls_logits"][1, 3] = 5.0  # at x 24, within 40 padded to 64
    assert model.loss(outputs, batch)["classification"] > before + 1
    outputs["cls_logits"][1, 3] = outputs["cls_logits"][1, 2]
    outputs["cls_logits"][1, 9] = 5.0  # at x 72
    torch.testing.assert_close(model.loss(outputs, batch)["classification"], before, rtol=1e-3, atol=0)


def test_detections_against_loops(model: RepPointsDetector, batch: Batch) -> None:
    outputs = dict(model(batch))
    outputs["cls_logits"] = torch.randn(outputs["cls_logits"].shape) - 1.5
    outputs["cls_logits"][..., 0] = -20
    outputs["bbox_regression"] = 3 * torch.tensor([-1.0, -1.0, 1.0, 1.0]) + torch.randn(outputs["init_boxes"].shape)
    model.net.topk_candidates, candidates = 30, model.net.topk_candidates
    found = model.decode(outputs, batch)
    model.net.topk_candidates = candidates
    for image in range(2):
        clipped = torch.tensor(boxes_of(outputs, "bbox_regression", image)).clamp_min(0)
        clipped = clipped.minimum(torch.tensor([96.0, 64.0, 96.0, 64.0]))
        scores, rows = outputs["cls_logits"][image].sigmoid(), places()
        kept: list[tuple[float, int, Tensor]] = []
        best = [
            each
            for stride in (8, 16, 32, 64, 128)
            for each in sorted(
                ((float(score), label, clipped[row]) for row in range(len(rows)) if rows[row][2] == stride
                 for label, score in enumerate(scores[row]) if score > 0.05), key=lambda each: -each[0],
            )[:30]
        ]  # fmt: skip
        for score, label, box in sorted(best, key=lambda each: -each[0]):
            if all(label != other or box_iou(box[None], taken[None]) <= 0.5 for _, other, taken in kept):
                kept.append((score, label, box))
        kept = kept[:100]
        assert 20 < len(kept) < len(best)
        torch.testing.assert_close(found[image]["scores"], torch.tensor([score for score, _, _ in kept]))
        assert found[image]["labels"].tolist() == [label for _, label, _ in kept]
        torch.testing.assert_close(found[image]["boxes"], torch.stack([box for _, _, box in kept]))


def test_outputs_and_places(model: RepPointsDetector, batch: Batch) -> None:
    outputs = model(batch)
    assert list(outputs["features"]) == ["0", "1", "2", "p6", "p7"]
    assert [tuple(x.shape) for x in outputs["features"].values()] == [
        (2, 64, 8, 12), (2, 64, 4, 6), (2, 64, 2, 3), (2, 64, 1, 2), (2, 64, 1, 1),
    ]  # fmt: skip
    assert outputs["anchors"][0].tolist() == [list(place) for place in places()]
    assert outputs["cls_logits"].shape == (2, 129, 4)
    assert (outputs["cls_logits"].sigmoid() < 0.02).all()
    assert model.comparable_layers() == ("backbone:*",)
    assert model.max_detections == 100
    torch.testing.assert_close(model.net(model.normalize(batch))["cls_logits"], outputs["cls_logits"])


def test_points_and_losses_stay_in_float32_under_autocast(model: RepPointsDetector, batch: Batch) -> None:
    expected = model.loss(model(batch), batch)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(batch)
        terms = model.loss(outputs, batch)
    assert {outputs[name].dtype for name in ("init_boxes", "bbox_regression", "cls_logits")} == {torch.float32}
    for name, value in terms.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected[name], rtol=0.05, atol=0.01)


def test_the_loss_falls_and_the_network_is_saved_whole(tmp_path: Path, batch: Batch) -> None:
    torch.manual_seed(0)
    student = detector().train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    first = []
    for _ in range(3):
        terms = student.loss(student(batch), batch)
        optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()  # type: ignore[no-untyped-call]
        assert all(parameter.grad is not None for parameter in student.parameters())
        optimizer.step()
        first.append(terms["points_init"].item())  # the second stage's objects change with the first boxes
    assert first[-1] < 0.8 * first[0]
    save_weights(student.net, tmp_path / "student.safetensors")
    loaded = detector(weights=str(tmp_path / "student.safetensors"))
    assert all(torch.equal(x, loaded.net.state_dict()[name]) for name, x in student.net.state_dict().items())


def test_a_step_of_acam(model: RepPointsDetector, batch: Batch) -> None:
    torch.manual_seed(3)
    student = detector()
    inherit(student, model, ["head", "backbone.fpn.layer_blocks"])
    assert torch.equal(
        student.net.head.regression_head.init_points.weight, model.net.head.regression_head.init_points.weight
    )
    distiller = Distiller(
        student, copy.deepcopy(model), [("backbone:p6", "backbone:p6")], [ACAM(64, 64, mask_grad="joint")]
    )
    result = distiller(batch)
    torch.stack(list(result.values())).sum().backward()  # type: ignore[no-untyped-call]
    assert {name.split("/")[-1] for name in result} > {"classification", "points_init", "points_refine", "spatial"}
    assert student.net.backbone.fpn.extra_blocks.p6[0].weight.grad.abs().sum() > 0


def test_operations_of_deformable_convolutions() -> None:
    """They count as plain ones: 9 C C multiplications per location and twice as many in the backward."""
    head = RegressionHead(32)
    x, offsets = torch.randn(2, 32, 4, 5), torch.zeros(2, 18, 4, 5, requires_grad=True)
    with flop_counter() as counter:
        y = head.refine_conv(x, offsets)
    assert counter.get_total_flops() == 2 * 9 * 32 * 32 * 2 * 4 * 5
    with flop_counter() as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 9 * 32 * 32 * 2 * 4 * 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fpn_channels": 48}, "reppoints has heads with group norm of 32 groups; give a multiple of 32"),
        ({"options": {"convention": "mmdetection"}}, "reppoints has no option convention"),
        ({"options": {"score_tresh": 0.1}}, "reppoints has no option score_tresh; did you mean score_thresh"),
        ({"backbone": "vit_tiny_patch16_224"}, r"strides \[16, 16, 16\], but reppoints needs \[8, 16, 32\]"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(AcamkdError, match=message):
        detector(**settings)


@pytest.mark.parametrize(("option", "why"), [("with_nms", "exporter cannot write"), ("openvino", "cannot read")])
def test_an_export_with_suppression_or_to_openvino_is_refused(model: RepPointsDetector, option: str, why: str) -> None:
    with pytest.raises(AcamkdError, match=f"deformable convolutions, which .*{why}.*; leave the option out"):
        build_graph(model, SIZE, with_nms=option == "with_nms", openvino=option == "openvino")


@pytest.mark.slow
@torch.no_grad()
def test_the_onnx_file_finds_what_pytorch_finds(model: RepPointsDetector, tmp_path: Path) -> None:
    """For batches and inputs of any size; onnxruntime computes the deformable convolutions."""
    graph = build_graph(model, None, with_nms=False)
    section = {"arch": "reppoints"}
    raw = {"name": "x", "task": "detection", "data": {"root": ".", "classes": ["a", "b", "c"]}, "student": section}
    write_graph(graph, tmp_path / "x.onnx", parse({**raw, "train": {"epochs": 1, "batch_size": 1}}))
    exported = OnnxModel(tmp_path / "x.onnx", threads=1)
    for height, width in ((64, 96), (160, 64)):
        pixels = torch.rand(2, 3, height, width)
        found = exported.run(pixels.numpy())
        for name, expected in zip(graph.output_names, graph(pixels), strict=True):
            torch.testing.assert_close(torch.from_numpy(found[name]), expected, rtol=1e-3, atol=1e-3)


def test_crosskd_refuses_it(model: RepPointsDetector) -> None:
    with pytest.raises(ValueError, match="both torchvision FCOS, not RepPoints and RepPoints"):
        CrossKD().layers(model, model)
