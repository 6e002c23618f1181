"""Detectors in MMDetection's and detectron2's layout against references written from their documented conventions."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import deform_conv2d, roi_align

from acamkd.config import Model
from acamkd.errors import AcamkdError
from acamkd.models import build
from acamkd.models.base import Batch
from acamkd.models.conventions import AlignedRoIAlign
from acamkd.models.convert import to_torchvision
from acamkd.models.detection import Detector

State = dict[str, Tensor]
CLASSES, WIDTH = 5, 8
GROUPED = 64
"""Width of RepPoints, which a group norm of 32 groups must divide."""
STAGES = {2: (3, 64), 3: (4, 128), 4: (6, 256), 5: (3, 512)}  # of ResNet-50: blocks, width
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of ImageNet, RGB in [0, 255]
CONVENTIONS = ("mmdetection", "detectron2")
ARCHITECTURES = ("retinanet", "faster_rcnn")


class Writer:
    """Random tensors by name, scaled so that nothing dies or explodes on the way through fifty layers."""

    def __init__(self) -> None:
        self.state: State = {}
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def conv(self, name: str, out: int, into: int, side: int = 1, *, bias: bool = True, gain: float = 1) -> None:
        self.state[f"{name}.weight"] = self.normal(out, into, side, side) * gain * (2 / (into * side * side)) ** 0.5
        if bias:
            self.state[f"{name}.bias"] = self.normal(out) / 10

    def linear(self, name: str, out: int, into: int, *, gain: float = 1) -> None:
        self.state[f"{name}.weight"] = self.normal(out, into) * gain * (2 / into) ** 0.5
        self.state[f"{name}.bias"] = self.normal(out) / 10

    def group_norm(self, name: str) -> None:
        self.state[f"{name}.weight"] = 1 + self.normal(GROUPED) / 10
        self.state[f"{name}.bias"] = self.normal(GROUPED) / 10

    def norm(self, name: str, width: int, scale: float = 1.0) -> None:
        self.state[f"{name}.weight"] = scale * (1 + self.normal(width) / 10)
        self.state[f"{name}.bias"] = self.normal(width) / 10
        self.state[f"{name}.running_mean"] = self.normal(width) / 10
        self.state[f"{name}.running_var"] = 1 + self.normal(width).abs() / 10


def resnet(write: Writer, convention: str) -> None:
    ours = convention == "mmdetection"
    write.conv("backbone.conv1" if ours else "backbone.bottom_up.stem.conv1", 64, 3, 7, bias=False)
    write.norm("backbone.bn1" if ours else "backbone.bottom_up.stem.conv1.norm", 64)
    into = 64
    for stage, (blocks, width) in STAGES.items():
        for number in range(blocks):
            block = f"backbone.layer{stage - 1}.{number}" if ours else f"backbone.bottom_up.res{stage}.{number}"
            for index, (out, come, side) in enumerate(
                [(width, into, 1), (width, width, 3), (4 * width, width, 1)], start=1
            ):
                write.conv(f"{block}.conv{index}", out, come, side, bias=False)
                write.norm(f"{block}.bn{index}" if ours else f"{block}.conv{index}.norm", out, 0.3 if index == 3 else 1)
            if number == 0:
                shortcut = f"{block}.downsample.0" if ours else f"{block}.shortcut"
                write.conv(shortcut, 4 * width, into, bias=False)
                write.norm(f"{block}.downsample.1" if ours else f"{shortcut}.norm", 4 * width)
            into = 4 * width


def foreign(arch: str, convention: str) -> State:
    """The state dict of a detector over ResNet-50, by the framework's own names."""
    write, ours = Writer(), convention == "mmdetection"
    resnet(write, convention)
    first = 3 if arch == "retinanet" else 2
    for index, stage in enumerate(range(first, 6)):
        into = 4 * STAGES[stage][1]
        write.conv(f"neck.lateral_convs.{index}.conv" if ours else f"backbone.fpn_lateral{stage}", WIDTH, into)
        write.conv(f"neck.fpn_convs.{index}.conv" if ours else f"backbone.fpn_output{stage}", WIDTH, WIDTH, 3)
    if arch == "retinanet":
        for index, (level, into) in enumerate([("p6", 2048), ("p7", WIDTH)], start=3):
            write.conv(f"neck.fpn_convs.{index}.conv" if ours else f"backbone.top_block.{level}", WIDTH, into, 3)
        for index in range(4):
            write.conv(f"bbox_head.cls_convs.{index}.conv" if ours else f"head.cls_subnet.{2 * index}", WIDTH, WIDTH, 3)
            write.conv(
                f"bbox_head.reg_convs.{index}.conv" if ours else f"head.bbox_subnet.{2 * index}", WIDTH, WIDTH, 3
            )
        write.conv("bbox_head.retina_cls" if ours else "head.cls_score", 9 * CLASSES, WIDTH, 3)
        write.conv("bbox_head.retina_reg" if ours else "head.bbox_pred", 9 * 4, WIDTH, 3, gain=0.1)
        return write.state
    rpn = "rpn_head.rpn_" if ours else "proposal_generator.rpn_head."
    write.conv(f"{rpn}conv", WIDTH, WIDTH, 3)
    write.conv(f"{rpn}cls" if ours else f"{rpn}objectness_logits", 3, WIDTH)
    write.conv(f"{rpn}reg" if ours else f"{rpn}anchor_deltas", 12, WIDTH, gain=0.1)
    box = "roi_head.bbox_head." if ours else "roi_heads."
    write.linear(f"{box}shared_fcs.0" if ours else f"{box}box_head.fc1", 1024, WIDTH * 49)
    write.linear(f"{box}shared_fcs.1" if ours else f"{box}box_head.fc2", 1024, 1024)
    write.linear(f"{box}fc_cls" if ours else f"{box}box_predictor.cls_score", CLASSES + 1, 1024)
    write.linear(f"{box}fc_reg" if ours else f"{box}box_predictor.bbox_pred", 4 * CLASSES, 1024, gain=0.1)
    return write.state


def foreign_reppoints() -> State:
    """The state dict of MMDetection's reppoints-moment_r50_fpn-gn_head-gn."""
    write, width = Writer(), GROUPED
    resnet(write, "mmdetection")
    for index, into in enumerate([512, 1024, 2048]):
        write.conv(f"neck.lateral_convs.{index}.conv", width, into, bias=False)
        write.group_norm(f"neck.lateral_convs.{index}.gn")
    for index, into in enumerate([width, width, width, 2048, width]):
        write.conv(f"neck.fpn_convs.{index}.conv", width, into, 3, bias=False)
        write.group_norm(f"neck.fpn_convs.{index}.gn")
    for branch in ("cls", "reg"):
        for index in range(3):
            write.conv(f"bbox_head.{branch}_convs.{index}.conv", width, width, 3, bias=False)
            write.group_norm(f"bbox_head.{branch}_convs.{index}.gn")
    write.conv("bbox_head.reppoints_cls_conv", width, width, 3, bias=False)
    write.conv("bbox_head.reppoints_cls_out", CLASSES, width)
    write.conv("bbox_head.reppoints_pts_init_conv", width, width, 3)
    write.conv("bbox_head.reppoints_pts_init_out", 18, width)
    write.conv("bbox_head.reppoints_pts_refine_conv", width, width, 3, bias=False)
    write.conv("bbox_head.reppoints_pts_refine_out", 18, width)
    write.state["bbox_head.moment_transfer"] = write.normal(2) / 10
    return write.state


def model(arch: str, convention: str, **settings: Any) -> Detector:
    section = {"backbone": "torchvision/resnet50", "backbone_weights": None, "fpn_channels": WIDTH, **settings}
    if arch == "reppoints":
        section["fpn_channels"] = GROUPED
    else:
        section["options"] = {"convention": convention, **section.get("options", {})}
    built = build(Model(arch=arch, **section), "detection", CLASSES, None, teacher="weights" in section)
    assert isinstance(built, Detector)
    return built.eval()


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[State, Detector]]:
    known: dict[tuple[str, str], tuple[State, Detector]] = {}

    def make(arch: str, convention: str) -> tuple[State, Detector]:
        if (arch, convention) not in known:
            state = foreign_reppoints() if arch == "reppoints" else foreign(arch, convention)
            file = tmp_path_factory.mktemp("weights") / "model.pth"
            torch.save({"state_dict" if convention == "mmdetection" else "model": state}, file)
            known[arch, convention] = state, model(arch, convention, weights=str(file))
        return known[arch, convention]

    return make


class Reference:
    """A forward of the foreign tensors by the foreign names, as the framework's documentation describes it."""

    def __init__(self, state: State, convention: str) -> None:
        self.state = state
        self.ours = convention == "mmdetection"

    def conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = self.state[f"{name}.weight"]
        return F.conv2d(x, weight, self.state.get(f"{name}.bias"), stride, padding=weight.shape[-1] // 2)

    def grouped(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        """A convolution, with its group norm where it has one."""
        x, norm = self.conv(name, x, stride), f"{name.removesuffix('.conv')}.gn"
        if f"{norm}.weight" not in self.state:
            return x
        return F.group_norm(x, 32, self.state[f"{norm}.weight"], self.state[f"{norm}.bias"])

    def norm(self, name: str, x: Tensor) -> Tensor:
        mean, var, weight, bias = (
            self.state[f"{name}.{which}"] for which in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, var, weight, bias, eps=1e-5)

    def stages(self, pixels: Tensor) -> list[Tensor]:
        """`pixels` are RGB in [0, 1]; MMDetection normalizes them, detectron2 (MSRA's ResNets) takes BGR - mean."""
        mean, std = (torch.tensor(each)[:, None, None] for each in (MEAN, STD))
        x = (255 * pixels - mean) / std if self.ours else (255 * pixels - mean).flip(1)
        stem = "backbone.conv1" if self.ours else "backbone.bottom_up.stem.conv1"
        x = F.relu(self.norm("backbone.bn1" if self.ours else f"{stem}.norm", self.conv(stem, x, 2)))
        x, found = F.max_pool2d(x, 3, 2, 1), []
        for stage, (blocks, _) in STAGES.items():
            for number in range(blocks):
                block = (
                    f"backbone.layer{stage - 1}.{number}" if self.ours else f"backbone.bottom_up.res{stage}.{number}"
                )
                stride, y = 2 if stage > 2 and number == 0 else 1, x
                strides = (1, stride, 1) if self.ours else (stride, 1, 1)  # MSRA's ResNets stride in the 1x1
                for index in (1, 2, 3):
                    name = f"{block}.conv{index}"
                    y = self.norm(
                        f"{block}.bn{index}" if self.ours else f"{name}.norm", self.conv(name, y, strides[index - 1])
                    )
                    y = F.relu(y) if index < 3 else y
                if number == 0:
                    shortcut = f"{block}.downsample.0" if self.ours else f"{block}.shortcut"
                    x = self.norm(
                        f"{block}.downsample.1" if self.ours else f"{shortcut}.norm", self.conv(shortcut, x, stride)
                    )
                x = F.relu(x + y)
            found.append(x)
        return found

    def pyramid(self, pixels: Tensor, first: int) -> list[Tensor]:
        stages = self.stages(pixels)[first - 2 :]
        names = [(f"neck.lateral_convs.{i}.conv", f"neck.fpn_convs.{i}.conv") if self.ours
                 else (f"backbone.fpn_lateral{first + i}", f"backbone.fpn_output{first + i}")
                 for i in range(len(stages))]  # fmt: skip
        inner = [self.grouped(lateral, x) for (lateral, _), x in zip(names, stages, strict=True)]
        for level in range(len(inner) - 2, -1, -1):
            inner[level] = inner[level] + F.interpolate(inner[level + 1], scale_factor=2, mode="nearest")
        levels = [self.grouped(output, x) for (_, output), x in zip(names, inner, strict=True)]
        if first == 2:
            return [*levels, F.max_pool2d(levels[-1], 1, 2)]
        p6 = self.grouped("neck.fpn_convs.3.conv" if self.ours else "backbone.top_block.p6", stages[-1], 2)
        # detectron2's LastLevelP6P7 has a ReLU between the two; MMDetection's FPN has none by default.
        p7 = (
            self.grouped("neck.fpn_convs.4.conv", p6, 2)
            if self.ours
            else self.conv("backbone.top_block.p7", F.relu(p6), 2)
        )
        return [*levels, p6, p7]

    def anchors(self, level: Tensor, stride: int, sizes: list[float]) -> Tensor:
        """(h, w, A, 4); MMDetection counts sizes within ratios, detectron2 ratios within sizes."""
        ratios = (0.5, 1.0, 2.0)
        order = [(s, r) for r in ratios for s in sizes] if self.ours else [(s, r) for s in sizes for r in ratios]
        cell = torch.tensor([[-s / r**0.5, -s * r**0.5, s / r**0.5, s * r**0.5] for s, r in order]) / 2
        ys, xs = (torch.arange(side) * stride for side in level.shape[-2:])
        centers = torch.stack(torch.meshgrid(ys, xs, indexing="ij")[::-1], dim=-1)  # no offset by half a pixel
        return centers.repeat(1, 1, 2)[:, :, None] + cell


def decode(anchors: Tensor, deltas: Tensor, std: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)) -> Tensor:
    """Boxes of (..., 4) deltas x, y, width, height on (..., 4) anchors."""
    dx, dy, dw, dh = (deltas * torch.tensor(std)).unbind(-1)
    w, h = anchors[..., 2] - anchors[..., 0], anchors[..., 3] - anchors[..., 1]
    x, y = anchors[..., 0] + w / 2 + dx * w, anchors[..., 1] + h / 2 + dy * h
    w, h = w * dw.clamp(max=log(1000 / 16)).exp(), h * dh.clamp(max=log(1000 / 16)).exp()
    return torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], dim=-1)


def image() -> Tensor:
    return torch.rand(3, 128, 160, generator=torch.Generator().manual_seed(3))


def sizes_of(arch: str, level: int) -> list[float]:
    size = 32.0 * 2**level
    return [size, size * 2 ** (1 / 3), size * 2 ** (2 / 3)] if arch == "retinanet" else [size]


@pytest.mark.parametrize(("arch", "convention"), [*product(ARCHITECTURES, CONVENTIONS), ("reppoints", "mmdetection")])
def test_every_tensor_is_filled_and_none_is_left_over(
    arch: str, convention: str, converted: Callable[[str, str], tuple[State, Detector]]
) -> None:
    state, detector = converted(arch, convention)
    ours = {n: t for n, t in detector.net.state_dict().items() if not n.endswith("num_batches_tracked")}
    theirs = to_torchvision(state, convention)  # type: ignore[arg-type]
    assert {name: tensor.shape for name, tensor in ours.items()} == {name: t.shape for name, t in theirs.items()}
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("convention", CONVENTIONS)
@torch.no_grad()
def test_retinanet_says_what_the_framework_says(
    convention: str, converted: Callable[[str, str], tuple[State, Detector]]
) -> None:
    state, detector = converted("retinanet", convention)
    reference, ours = Reference(state, convention), convention == "mmdetection"
    batch = detector.prepare([image()])
    outputs = detector(batch)
    boxes, scores = [], []
    for level, x in enumerate(reference.pyramid(batch.pixels, first=3)):
        torch.testing.assert_close(list(outputs["features"].values())[level], x, rtol=1e-3, atol=1e-3)
        branches = []
        for branch in ("cls", "reg") if ours else ("cls", "bbox"):
            y = x
            for index in range(4):
                name = f"bbox_head.{branch}_convs.{index}.conv" if ours else f"head.{branch}_subnet.{2 * index}"
                y = F.relu(reference.conv(name, y))
            branches.append(y)
        logits = reference.conv("bbox_head.retina_cls" if ours else "head.cls_score", branches[0])
        deltas = reference.conv("bbox_head.retina_reg" if ours else "head.bbox_pred", branches[1])
        anchors = reference.anchors(x, 8 * 2**level, sizes_of("retinanet", level))
        # torchvision's anchors come in an order of their own within a place.
        cell = detector.net.anchor_generator.cell_anchors[level]
        order = (anchors[0, 0] - cell[:, None]).abs().sum(dim=2).argmin(dim=1)
        assert sorted(order.tolist()) == list(range(9))
        assert (order.tolist() == list(range(9))) == ours
        found = decode(anchors.flatten(0, 2), deltas[0].permute(1, 2, 0).reshape(-1, 4))
        boxes.append(found.reshape(-1, 9, 4)[:, order].flatten(0, 1))
        scores.append(logits[0].permute(1, 2, 0).reshape(-1, 9, CLASSES)[:, order].flatten(0, 1))
    found = decode(outputs["anchors"][0], outputs["bbox_regression"][0])
    torch.testing.assert_close(found, torch.cat(boxes), rtol=1e-3, atol=1e-2)
    logits = outputs["cls_logits"][0]
    torch.testing.assert_close(logits[:, 1:], torch.cat(scores), rtol=1e-3, atol=1e-2)
    assert (logits[:, 0] == -20).all()


@torch.no_grad()
def test_reppoints_says_what_mmdetection_says(converted: Callable[[str, str], tuple[State, Detector]]) -> None:
    state, detector = converted("reppoints", "mmdetection")
    reference = Reference(state, "mmdetection")
    batch = detector.prepare([image()])
    outputs = detector(batch)
    grid = torch.tensor([(y, x) for y in (-1.0, 0.0, 1.0) for x in (-1.0, 0.0, 1.0)]).view(1, 18, 1, 1)
    found: dict[str, list[Tensor]] = {"init_boxes": [], "bbox_regression": [], "cls_logits": []}
    centers = []
    for level, x in enumerate(reference.pyramid(batch.pixels, first=3)):
        branches = []
        for branch in ("cls", "reg"):
            y = x
            for index in range(3):
                y = F.relu(reference.grouped(f"bbox_head.{branch}_convs.{index}.conv", y))
            branches.append(y)
        stem = "bbox_head.reppoints_"
        first = reference.conv(f"{stem}pts_init_out", F.relu(reference.conv(f"{stem}pts_init_conv", branches[1])))
        classes, moves = (
            F.relu(deform_conv2d(y, first - grid, state[f"{stem}{name}_conv.weight"], padding=1))
            for y, name in zip(branches, ("cls", "pts_refine"), strict=True)
        )
        found["cls_logits"].append(reference.conv(f"{stem}cls_out", classes)[0].flatten(1).T)
        for name, points in (
            ("init_boxes", first), ("bbox_regression", first + reference.conv(f"{stem}pts_refine_out", moves)),
        ):  # fmt: skip
            ys, xs = points[0, 0::2].flatten(1), points[0, 1::2].flatten(1)  # y comes first
            width, height = state["bbox_head.moment_transfer"].exp()  # the width's factor comes first
            sides = [xs.std(0) * width, ys.std(0) * height]
            corners = [xs.mean(0) - sides[0], ys.mean(0) - sides[1], xs.mean(0) + sides[0], ys.mean(0) + sides[1]]
            found[name].append(torch.stack(corners, dim=1))
        ys, xs = (torch.arange(side) * 8.0 * 2**level for side in x.shape[-2:])
        places = torch.stack(torch.meshgrid(ys, xs, indexing="ij")[::-1], dim=-1).flatten(0, 1)
        centers.append(F.pad(places, (0, 1), value=8 * 2**level))
    torch.testing.assert_close(outputs["anchors"][0], torch.cat(centers))
    torch.testing.assert_close(outputs["cls_logits"][0, :, 1:], torch.cat(found["cls_logits"]), rtol=1e-3, atol=1e-2)
    assert (outputs["cls_logits"][0, :, 0] == -20).all()
    for name in ("init_boxes", "bbox_regression"):
        torch.testing.assert_close(outputs[name][0], torch.cat(found[name]), rtol=1e-3, atol=1e-2)


def test_the_sizes_of_reppoints_are_mmdetections() -> None:
    """Counted by hand over its layers: pyramid, towers, two deformable convolutions, and the points' layers."""
    with torch.device("meta"):
        section = Model(arch="reppoints", backbone="torchvision/resnet50", backbone_weights=None)
        net = build(section, "detection", 80).net
    wide, background = 9 * 256 * 256, 256 + 1
    pyramid = 256 * (512 + 1024 + 2048) + 4 * wide + 9 * 2048 * 256 + 8 * 512
    head = 8 * wide + 6 * 512 + (wide + 256) + 2 * (256 + 1) * 18 + (256 + 1) * 80 + 2
    own = {part: sum(p.numel() for p in net.get_submodule(part).parameters()) for part in ("backbone.fpn", "head")}
    assert own == {"backbone.fpn": pyramid, "head": head + background}


def test_regions_of_a_traced_network_may_be_any_number() -> None:
    maps = {str(level): torch.randn(1, 4, 32 // 2**level, 32 // 2**level) for level in range(4)}

    class Regions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool = AlignedRoIAlign()

        def forward(self, boxes: Tensor) -> Tensor:
            return self.pool(maps, [boxes], None)  # type: ignore[no-any-return]

    corners = torch.rand(10, 2) * 60
    boxes = torch.cat([corners, corners + 5 + 60 * torch.rand(10, 2)], dim=1)
    # As the exporter does, with the proposals of one image.
    traced = torch.jit.trace(Regions(), boxes)  # type: ignore[no-untyped-call]
    for count in (10, 3, 1):
        torch.testing.assert_close(traced(boxes[:count]), Regions()(boxes[:count]))


@pytest.mark.parametrize("convention", CONVENTIONS)
@torch.no_grad()
def test_faster_rcnn_says_what_the_framework_says(
    convention: str, converted: Callable[[str, str], tuple[State, Detector]]
) -> None:
    state, detector = converted("faster_rcnn", convention)
    reference, ours = Reference(state, convention), convention == "mmdetection"
    batch = detector.prepare([image()])
    outputs = detector(batch)
    levels = reference.pyramid(batch.pixels, first=2)
    rpn = "rpn_head.rpn_" if ours else "proposal_generator.rpn_head."
    objectness, anchors, deltas = [], [], []
    for level, x in enumerate(levels):
        y = F.relu(reference.conv(f"{rpn}conv", x))
        objectness.append(
            reference.conv(f"{rpn}cls" if ours else f"{rpn}objectness_logits", y)[0].permute(1, 2, 0).flatten()
        )
        moves = reference.conv(f"{rpn}reg" if ours else f"{rpn}anchor_deltas", y)
        deltas.append(moves[0].permute(1, 2, 0).reshape(-1, 4))
        anchors.append(reference.anchors(x, 4 * 2**level, sizes_of("faster_rcnn", level)).flatten(0, 2))
    torch.testing.assert_close(outputs["objectness"][:, 0], torch.cat(objectness), rtol=1e-3, atol=1e-3)
    # Not the boxes: they are exponentials of what random weights give, and rounding grows with them.
    torch.testing.assert_close(outputs["anchors"][0], torch.cat(anchors), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(outputs["rpn_deltas"], torch.cat(deltas), rtol=1e-3, atol=1e-3)

    proposals = torch.tensor([[4.0, 6.0, 60.5, 50.0], [0.0, 0.0, 150.0, 120.0], [80.0, 70.0, 88.0, 79.0]])
    logits, changes = detector._classify(outputs, [proposals], batch)  # type: ignore[operator]
    pooled = torch.cat([
        roi_align(levels[level], [box[None]], 7, 1 / (4 * 2**level), sampling_ratio=0, aligned=True)
        for box, level in zip(proposals, (0, 1, 0), strict=True)  # sides of 50, 134 and 9: below 112, 224 and 112
    ]).flatten(1)  # fmt: skip
    box = "roi_head.bbox_head." if ours else "roi_heads."
    for name in ("shared_fcs.0", "shared_fcs.1") if ours else ("box_head.fc1", "box_head.fc2"):
        pooled = F.relu(F.linear(pooled, state[f"{box}{name}.weight"], state[f"{box}{name}.bias"]))
    cls, reg = ("fc_cls", "fc_reg") if ours else ("box_predictor.cls_score", "box_predictor.bbox_pred")
    theirs = F.linear(pooled, state[f"{box}{cls}.weight"], state[f"{box}{cls}.bias"])
    torch.testing.assert_close(logits.roll(-1, dims=1), theirs, rtol=1e-3, atol=1e-3)  # background last
    wanted = F.linear(pooled, state[f"{box}{reg}.weight"], state[f"{box}{reg}.bias"]).reshape(-1, CLASSES, 4)
    decoded = detector.net.roi_heads.box_coder.decode(changes, [proposals])[:, 1:]
    torch.testing.assert_close(
        decoded, decode(proposals[:, None].expand_as(wanted), wanted, std=(0.1, 0.1, 0.2, 0.2)), rtol=1e-3, atol=1e-2
    )


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_torchvisions_anchors_differ_by_rounding_on_fine_levels_and_by_stride_on_coarse_ones(arch: str) -> None:
    """What `convention` repairs, in pixels: the figures of docs/guides/convert.md."""
    pixels = torch.zeros(1, 3, 800, 1344)
    batch = Batch(pixels, [(800, 1344)], [(800, 1344)])
    grids = [(1, 8, -(-800 // stride), -(-1344 // stride)) for stride in (4, 8, 16, 32, 64, 128)]
    grids = grids[1:] if arch == "retinanet" else grids[:-1]
    features = {str(level): pixels.new_empty(()).expand(grid) for level, grid in enumerate(grids)}
    found = []
    for convention in ("torchvision", "mmdetection"):
        detector = model(arch, convention, backbone="resnet18")
        generator = detector.net.anchor_generator if arch == "retinanet" else detector.net.rpn.anchor_generator
        found.append(detector._anchors(generator, features, batch)[0])
    counts = [(9 if arch == "retinanet" else 3) * height * width for _, _, height, width in grids]
    gaps = [gap.abs().max().item() for gap in torch.split(found[0] - found[1], counts)]
    exact = 4 if arch == "faster_rcnn" else 3
    assert max(gaps[:exact]) < 1.2
    coarse = {"retinanet": (36, 84), "faster_rcnn": (36,)}[arch]
    assert gaps[exact:] == pytest.approx(coarse, abs=1.2)


def test_x101_has_the_names_of_mmdetections() -> None:
    with torch.device("meta"):
        net = model("retinanet", "mmdetection", backbone="torchvision/resnext101_64x4d", fpn_channels=256).net
    names = {name.removeprefix("backbone.body.") for name in net.state_dict() if name.startswith("backbone.body.")}
    assert len({name for name in names if name.startswith("layer3.")}) > 23 * 15
    state = {f"backbone.{name}": torch.zeros(1) for name in names}
    assert set(to_torchvision(state, "mmdetection")) == {f"backbone.body.{name}" for name in names}
    assert net.backbone.body.layer2[0].conv2.groups == 64
    assert net.backbone.body.layer2[0].conv2.in_channels == 64 * 4 * 2


@pytest.mark.parametrize(("arch", "parameters", "background"), [
    ("retinanet", 37_915_572, 9 * (9 * 256 + 1)), ("faster_rcnn", 41_699_936, 4 * (1024 + 1)),
])  # fmt: skip
def test_detectron2_counts_as_many_parameters(arch: str, parameters: int, background: int) -> None:
    """The figures of detectron2's own test of its R_50_FPN_1x models, whose batch norm is frozen."""
    with torch.device("meta"):
        section = Model(arch=arch, backbone="torchvision/resnet50", options={"convention": "detectron2"})
        net = build(section.model_copy(update={"backbone_weights": None}), "detection", 80).net
    counted = {n: p.numel() for n, p in net.named_parameters() if ".bn" not in n and ".downsample.1." not in n}
    assert sum(counted.values()) == parameters + background


def test_another_convention_than_the_files_is_refused(tmp_path: Path) -> None:
    for framework, layer in (("mmdetection", "neck.lateral_convs.0.conv"), ("detectron2", "backbone.fpn_lateral2")):
        torch.save({f"{layer}.weight": torch.zeros(1)}, tmp_path / "model.pth")
        with pytest.raises(AcamkdError, match=rf"give faster_rcnn .* `options: \{{convention: {framework}\}}`"):
            model("faster_rcnn", "torchvision", backbone="torchvision/resnet18", weights=str(tmp_path / "model.pth"))
        arch, last = ("fcos", ", and reppoints as it is$") if framework == "mmdetection" else ("reppoints", "$")
        section = Model(
            arch=arch, backbone="mobilenetv3_small_050", fpn_channels=32, weights=str(tmp_path / "model.pth")
        )
        message = rf"which {arch} .* does not read: retinanet and .* `options: \{{convention: {framework}\}}`{last}"
        with pytest.raises(AcamkdError, match=message), torch.device("meta"):
            build(section, "detection", 3)


def test_a_pickle_of_arrays_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "model_final.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(AcamkdError, match="reading a pickle can run any code"):
        model("retinanet", "detectron2", backbone="torchvision/resnet18", weights=str(tmp_path / "model_final.pkl"))


def test_an_unknown_convention_is_refused() -> None:
    with pytest.raises(AcamkdError, match="convention must be one of torchvision, mmdetection, detectron2, not caffe"):
        model("retinanet", "caffe", backbone="torchvision/resnet18")
    with pytest.raises(AcamkdError, match="fcos has no option convention"):
        model("fcos", "mmdetection", fpn_channels=32)
