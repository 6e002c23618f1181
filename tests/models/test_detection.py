from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection import fasterrcnn_resnet50_fpn, fcos_resnet50_fpn, retinanet_resnet50_fpn
from torchvision.transforms.v2.functional import to_dtype

from acamkd.config import Model, ShortLong
from acamkd.errors import AcamkdError
from acamkd.models import Target, build
from acamkd.models.detection import Detector, wrap_detector

ARCHITECTURES = ("retinanet", "fcos", "faster_rcnn")
TORCHVISION = {
    "retinanet": retinanet_resnet50_fpn,
    "fcos": fcos_resnet50_fpn,
    "faster_rcnn": fasterrcnn_resnet50_fpn,
}


def detector(arch: str, resize: tuple[int, int] | ShortLong | None = None, **settings: Any) -> Detector:
    torch.manual_seed(0)
    width = 64 if arch == "fcos" else 32
    section = {"backbone": "mobilenetv3_small_050", "fpn_channels": width, **settings}
    model = build(Model(arch=arch, backbone_weights=None, **section), "detection", 3, resize)
    assert isinstance(model, Detector)
    return model


def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator) for size in ((50, 70), (64, 40))]


def targets() -> list[Target]:
    boxes = torch.tensor([[5.0, 5.0, 40.0, 40.0], [20.0, 10.0, 60.0, 45.0]])
    return [
        {"boxes": boxes, "labels": torch.tensor([1, 3]), "iscrowd": torch.zeros(2, dtype=torch.int64)},
        {
            "boxes": torch.zeros(0, 4),
            "labels": torch.zeros(0, dtype=torch.int64),
            "iscrowd": torch.zeros(0, dtype=torch.int64),
        },
    ]


def floats(images: list[Tensor]) -> list[Tensor]:
    return [to_dtype(image, torch.float32, scale=True) for image in images]


def losses(model: Detector, wanted: list[Target]) -> dict[str, Tensor]:
    torch.manual_seed(2)  # Faster R-CNN samples
    batch = model.prepare(images(), wanted)
    return model.loss(model(batch), batch)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("resize", [None, (64, 96), ShortLong(short=48, long=60)])
def test_loss_is_torchvisions(arch: str, resize: tuple[int, int] | ShortLong | None) -> None:
    model = detector(arch, resize).train()
    ours = losses(model, targets())
    torch.manual_seed(2)
    theirs = model.net(floats(images()), targets())
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("arch", ["retinanet", "fcos"])
def test_loss_is_the_same_in_eval_mode(arch: str) -> None:
    model = detector(arch).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    trained = losses(model, targets())
    evaluated = losses(model.eval(), targets())
    assert {name: value.item() for name, value in trained.items()} == pytest.approx(
        {name: value.item() for name, value in evaluated.items()}
    )


def test_faster_rcnn_loss_in_eval_mode_trains_the_box_head() -> None:
    model = detector("faster_rcnn").eval()
    torch.stack(list(losses(model, targets()).values())).sum().backward()  # type: ignore[no-untyped-call]
    assert model.net.roi_heads.box_predictor.cls_score.weight.grad.abs().sum() > 0
    assert model.net.rpn.head.cls_logits.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("resize", [None, (64, 96), ShortLong(short=48, long=60)])
def test_detections_are_torchvisions(arch: str, resize: tuple[int, int] | ShortLong | None) -> None:
    option = "box_score_thresh" if arch == "faster_rcnn" else "score_thresh"
    model = detector(arch, resize, options={option: 1e-4}).eval()
    for name, parameter in model.net.named_parameters():
        if name.endswith(("cls_logits.weight", "cls_score.weight")):
            parameter.data *= 50  # scores far enough apart not to change places by rounding
    ours = [model.predict([image])[0] for image in images()]  # in a batch rounding would swap some
    with torch.no_grad():
        theirs = [model.net([image])[0] for image in floats(images())]
    for mine, reference in zip(ours, theirs, strict=True):
        kept = reference["labels"] > 0
        assert kept.sum() > 10
        assert torch.equal(mine["labels"], reference["labels"][kept])
        torch.testing.assert_close(mine["boxes"], reference["boxes"][kept], rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(mine["scores"], reference["scores"][kept], rtol=1e-4, atol=1e-5)


def test_boxes_come_back_in_each_images_own_pixels() -> None:
    model = detector("retinanet", (128, 128), options={"score_thresh": 1e-4}).eval()
    for prediction, image in zip(model.predict(images()), images(), strict=True):
        height, width = image.shape[-2:]
        largest = prediction["boxes"].amax(dim=0)
        assert largest[2] == pytest.approx(width, rel=1e-3)
        assert largest[3] == pytest.approx(height, rel=1e-3)


def test_the_frame_is_padded_with_the_mean_color_and_boxes_follow() -> None:
    model = detector("retinanet", ShortLong(short=100, long=1000))
    batch = model.prepare(images(), targets())
    assert batch.sizes == [(100, 140), (160, 100)]
    assert batch.original_sizes == [(50, 70), (64, 40)]
    assert batch.input_size == (160, 160)
    corner = batch.pixels[0, :, -1, -1]
    torch.testing.assert_close(corner, torch.tensor([0.485, 0.456, 0.406]))
    assert batch.targets is not None
    torch.testing.assert_close(batch.targets[0]["boxes"], 2 * targets()[0]["boxes"])
    assert batch.pixels.min() >= -1e-6
    assert batch.pixels.max() <= 1 + 1e-6


@pytest.mark.parametrize("training", [True, False])
def test_without_resize_images_keep_their_size(training: bool) -> None:
    batch = detector("fcos").train(training).prepare(images())
    assert batch.sizes == [(50, 70), (64, 40)]
    assert batch.input_size == (64, 96)
    expected = images()[0] / 255
    torch.testing.assert_close(batch.pixels[0, :, :50, :70], expected)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_strip_keeps_a_pixel_of_its_short_side(arch: str) -> None:
    strip = torch.randint(0, 256, (3, 2000, 8), dtype=torch.uint8)
    target = {"boxes": torch.tensor([[1.0, 500.0, 7.0, 1500.0]]), "labels": torch.tensor([2])}
    model = detector(arch, ShortLong(short=100, long=160), fpn_channels=64)
    batch = model.prepare([strip], [target])
    assert batch.sizes == [(160, 1)]
    assert batch.targets is not None
    torch.testing.assert_close(batch.targets[0]["boxes"], torch.tensor([[0.125, 40.0, 0.875, 120.0]]))
    assert torch.stack(list(model.loss(model(batch), batch).values())).sum().isfinite()
    [found] = model.eval().predict([strip.transpose(1, 2)])
    assert found["boxes"].shape[1] == 4


def test_an_exact_size_is_height_and_width() -> None:
    assert detector("retinanet", (32, 64)).prepare(images()).sizes == [(32, 64), (32, 64)]


def test_a_teacher_of_other_colors_normalizes_for_itself() -> None:
    student = detector("retinanet", (64, 64)).eval()
    teacher = detector("retinanet", (64, 64), mean=(0.5, 0.5, 0.5), std=(0.25, 0.5, 1.0)).eval()
    seen: list[Tensor] = []
    teacher.net.backbone.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    batch = student.prepare(images())
    teacher(batch)
    alone, _ = teacher.net.transform(floats(images()))
    torch.testing.assert_close(seen[0], alone.tensors, rtol=1e-5, atol=1e-5)


def test_whole_numbers_as_colors_make_floats() -> None:
    model = detector("retinanet", mean=(0, 0, 0), std=(1, 1, 1))
    model = wrap_detector(model.net, 3, None, (0, 0, 0), (1, 1, 1))
    assert model.mean.dtype == model.std.dtype == torch.float32
    batch = model.prepare(images())
    torch.testing.assert_close(batch.pixels[0, :, :50, :70], images()[0] / 255)


def test_group_norm_of_single_channels_is_refused_where_a_map_has_one_value() -> None:
    model = detector("fcos", (128, 128), fpn_channels=32)
    said = (
        r"FCOS: the heads' group norm has as many groups as channels \(32\), and the coarsest map of an input of "
        r"128 x 128 has one value, .* give fpn_channels 64 or more, or larger images \(data.resize above 128\)"
    )
    for training, count in ((True, 2), (False, 2), (False, 1)):  # two images would pass torch's own check
        with pytest.raises(AcamkdError, match=said):
            model.train(training).predict(images()[:1] * count)
    for resize, width in (((160, 96), 32), ((128, 128), 64)):
        assert len(detector("fcos", resize, fpn_channels=width).eval().predict(images())) == 2


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_largest_number_of_detections(arch: str) -> None:
    option = "box_detections_per_img" if arch == "faster_rcnn" else "detections_per_img"
    assert detector(arch, options={option: 17}).max_detections == 17


def test_crowds_do_not_train() -> None:
    model = detector("retinanet").eval()
    crowd = targets()
    crowd[0]["iscrowd"] = torch.tensor([0, 1])
    single = targets()
    single[0] = {name: value[:1] for name, value in single[0].items()}
    assert losses(model, crowd) == losses(model, single)
    assert losses(model, crowd) != losses(model, targets())


def test_raw_outputs_of_a_dense_detector() -> None:
    model = detector("retinanet").eval()
    batch = model.prepare(images())
    outputs = model(batch)
    assert list(outputs["features"]) == ["0", "1", "2", "p6", "p7"]
    assert [tuple(x.shape) for x in outputs["features"].values()] == [
        (2, 32, 8, 12),
        (2, 32, 4, 6),
        (2, 32, 2, 3),
        (2, 32, 1, 2),
        (2, 32, 1, 1),
    ]
    rows = 9 * (96 + 24 + 6 + 2 + 1)
    assert outputs["cls_logits"].shape == (2, rows, 4)
    assert outputs["bbox_regression"].shape == (2, rows, 4)
    assert [tuple(x.shape) for x in outputs["anchors"]] == [(rows, 4)] * 2


def test_faster_rcnn_has_a_finer_pyramid() -> None:
    model = detector("faster_rcnn").eval()
    outputs = model(model.prepare(images()))
    widths = {name: x.shape[-1] for name, x in outputs["features"].items()}
    assert widths == {"0": 24, "1": 12, "2": 6, "3": 3, "pool": 2}


def test_anchors_and_losses_stay_in_float32_under_autocast() -> None:
    model = detector("retinanet", (320, 320)).eval()
    expected = losses(model, targets())
    with torch.autocast("cpu", torch.bfloat16):
        batch = model.prepare(images(), targets())
        outputs = model(batch)
        terms = model.loss(outputs, batch)
    anchors = torch.cat(outputs["anchors"])
    assert anchors.dtype == torch.float32
    assert len(torch.unique(anchors, dim=0)) == len(anchors) // 2  # bfloat16 cannot tell 257 from 256
    for name, value in terms.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected[name], rtol=0.02, atol=0.01)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_state_dict_is_torchvisions(arch: str) -> None:
    model = build(Model(arch=arch, backbone="torchvision/resnet50", backbone_weights=None), "detection", 3)
    reference = TORCHVISION[arch](weights=None, weights_backbone=None, num_classes=4)
    assert {n: t.shape for n, t in model.net.state_dict().items()} == {
        n: t.shape for n, t in reference.state_dict().items()
    }
    reference.load_state_dict(model.net.state_dict())


def test_torchvision_backbone_trains_wholly_from_scratch_and_partly_from_weights(tmp_path: Any) -> None:
    scratch = detector("retinanet", backbone="torchvision/resnet18")
    assert all(parameter.requires_grad for parameter in scratch.parameters())
    file = tmp_path / "body.pth"
    torch.save(scratch.backbone.state_dict(), file)
    section = Model(arch="retinanet", backbone="torchvision/resnet18", backbone_weights=str(file), fpn_channels=32)
    model = build(section, "detection", 3)
    assert not [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    frozen = {name.split(".")[0] for name, p in model.backbone.named_parameters() if not p.requires_grad}
    assert frozen == {"conv1", "layer1"}
    assert torch.equal(model.backbone.conv1.weight, scratch.backbone.conv1.weight)  # type: ignore[union-attr, arg-type]


@pytest.mark.parametrize(
    ("arch", "expected"), [("retinanet", [(8, 10, 12), (16, 20, 25)]), ("faster_rcnn", [(8,), (16,)])]
)
def test_anchor_sizes(arch: str, expected: list[tuple[int, ...]]) -> None:
    model = detector(arch, options={"anchor_sizes": [8, 16, 32, 64, 128]})
    generator = model.net.anchor_generator if arch == "retinanet" else model.net.rpn.anchor_generator
    assert list(generator.sizes[:2]) == expected
    terms = losses(model, targets())
    assert all(torch.isfinite(value) for value in terms.values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"arch": "retinnet"}, "unknown detector retinnet; did you mean retinanet?"),
        ({"backbone": "resnett18"}, "timm has no backbone resnett18; did you mean resnet18"),
        ({"backbone": "resnet18.a1_in1kk"}, r"timm's resnet18\.a1_in1kk: .*; did you mean resnet18\.a1_in1k"),
        ({"backbone": "vit_tiny_patch16_224"}, r"strides \[16, 16, 16\], but retinanet needs \[8, 16, 32\]"),
        ({"backbone": "torchvision/resnet19"}, "did you mean resnet1"),
        (
            {"backbone": "torchvision/swin_t"},
            "swin_t gives maps of strides \\[\\], but retinanet needs \\[8, 16, 32\\]",
        ),
        ({"options": {"score_tresh": 0.1}}, "retinanet has no option score_tresh; did you mean score_thresh"),
        ({"options": {"score_thresh": "0.1"}}, r"retinanet: options\.score_thresh must be a number, not '0\.1'"),
        ({"options": {"anchor_sizes": [8, 16]}}, "anchor_sizes must be five numbers"),
        ({"options": {"anchor_sizes": [8, 16, 32, 64, "96"]}}, "anchor_sizes must be five numbers"),
        ({"arch": "fcos", "options": {"anchor_sizes": [8]}}, "fcos has no option anchor_sizes"),
        ({"arch": "fcos", "fpn_channels": 48}, "give a multiple of 32"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(AcamkdError, match=message):
        detector(**{"arch": "retinanet", **settings})


def test_a_channels_last_backbone_feeds_the_pyramid() -> None:
    model = detector("retinanet", backbone="mambaout_femto", fpn_channels=8).eval()
    outputs = model(model.prepare(images()))
    assert [tuple(x.shape[1:]) for x in outputs["features"].values()][:2] == [(8, 8, 12), (8, 4, 6)]


def test_a_swin_takes_images_of_any_size() -> None:
    model = detector("retinanet", backbone="swin_tiny_patch4_window7_224", fpn_channels=8).eval()
    outputs = model(model.prepare([torch.rand(3, 64, 96)]))
    assert [tuple(x.shape[1:]) for x in outputs["features"].values()][:2] == [(8, 8, 12), (8, 4, 6)]


@pytest.mark.parametrize("backbone", ["mobilenet_v3_large", "efficientnet_b0", "convnext_tiny"])
def test_torchvisions_other_backbones_feed_the_pyramid_at_the_usual_strides(backbone: str) -> None:
    model = detector("retinanet", backbone=f"torchvision/{backbone}").eval()
    levels = model.net.backbone(model.prepare([torch.rand(3, 64, 64)]).pixels)
    assert [tuple(x.shape[-2:]) for x in levels.values()] == [(8, 8), (4, 4), (2, 2), (1, 1), (1, 1)]
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_network_of_torchvisions_is_wrapped_and_no_other() -> None:
    ssd = torchvision.models.detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None)
    with pytest.raises(AcamkdError, match="SSD is none of RetinaNet, FCOS, FasterRCNN"):
        wrap_detector(ssd, 90)


def test_a_backbone_that_refuses_a_size_is_said() -> None:
    section = Model(arch="fcos", backbone="maxvit_tiny_rw_224", backbone_weights=None)
    model: Any = build(section, "detection", 2).eval()
    with pytest.raises(AcamkdError, match=r"does not take images of 256 x 256 .*: set data\.resize to a size that it"):
        model.predict([torch.zeros(3, 256, 256)])
