from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet_ResNet50_FPN_Weights, fasterrcnn_resnet50_fpn, retinanet_resnet50_fpn

from acamkd.config import Model
from acamkd.errors import AcamkdError
from acamkd.models import build, inherit, load_weights, save_weights
from acamkd.models.detection import Detector
from acamkd.models.weights import with_epsilon


def small(outputs: int = 3) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, outputs, 1))


def detector(channels: int = 16, **settings: Any) -> Detector:
    settings = {"backbone": "mobilenetv3_small_050", "backbone_weights": None, **settings}
    model = build(Model(arch="retinanet", fpn_channels=channels, **settings), "detection", 3)
    assert isinstance(model, Detector)
    return model


def equal(first: nn.Module, second: nn.Module) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def write_safetensors(state: dict[str, Tensor], path: Path) -> None:
    save_file(state, path.with_suffix(".safetensors"))


WRITERS: dict[str, Callable[[dict[str, Tensor], Path], object]] = {
    "plain.pth": lambda state, path: torch.save(state, path),
    "container.pt": lambda state, path: torch.save({"epoch": 3, "state_dict": state}, path),
    "model.pth": lambda state, path: torch.save({"model": state}, path),
    "ddp.pth": lambda state, path: torch.save({f"module.net.{n}": t for n, t in state.items()}, path),
    "file.safetensors": write_safetensors,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_form_of_file_fills_the_network(name: str, tmp_path: Path) -> None:
    source, target = small(), small()
    WRITERS[name](source.state_dict(), tmp_path / name)
    report = load_weights(target, str(tmp_path / name), strict=True, what="teacher")
    assert equal(source, target)
    assert (len(report.matched), report.missing, report.unexpected, report.mismatched) == (8, (), (), ())
    assert str(report) == repr(report) == f"teacher from {tmp_path / name}: 8 of 8 tensors matched"


def test_a_student_takes_what_fits_and_the_report_says_what_did_not(tmp_path: Path) -> None:
    state = small(outputs=7).state_dict()
    del state["1.bias"]
    file = tmp_path / "x.pth"
    torch.save({**state, "9.weight": torch.zeros(1)}, file)
    target = small()
    report = load_weights(target, str(file), strict=False, what="student")
    assert report.missing == ("1.bias",)
    assert report.unexpected == report.deeper == ("9.weight",)
    assert report.mismatched == (("2.weight", (7, 4, 1, 1), (3, 4, 1, 1)), ("2.bias", (7,), (3,)))
    assert len(report.matched) == 5
    assert torch.equal(target.state_dict()["0.weight"], state["0.weight"])
    assert str(report) == (
        f"student from {file}: 5 of 8 tensors matched; 1 missing (1.bias); 1 left over (9.weight); 2 of wrong shape "
        "(2.weight (7, 4, 1, 1) in the file, (3, 4, 1, 1) in the network, 2.bias (7,) in the file, (3,) in the network)"
    )
    with pytest.raises(AcamkdError, match="every tensor is needed here"):
        load_weights(target, str(file), strict=True, what="teacher")


def test_a_deeper_teachers_file_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """All that a ResNet-50 has is in a ResNet-101's file, too; a head that is absent altogether is legitimate."""
    state = {**small().state_dict(), "aux.weight": torch.zeros(1)}
    torch.save(state, tmp_path / "same.pth")
    torch.save({**state, "3.weight": torch.zeros(1)}, tmp_path / "deeper.pth")
    assert load_weights(small(), str(tmp_path / "same.pth"), strict=True, what="teacher").deeper == ()
    assert caplog.messages == []
    load_weights(small(), str(tmp_path / "deeper.pth"), strict=True, what="teacher")
    (message,) = caplog.messages
    assert message.endswith(
        "deeper.pth is of a network with further parts (3.weight), of which teacher has none: check its backbone"
    )


def test_step_counters_of_batch_norm_do_not_count(tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in small().state_dict().items() if "num_batches" not in name}
    torch.save(state, tmp_path / "x.pth")
    assert load_weights(small(), str(tmp_path / "x.pth"), strict=True, what="teacher").total == 8


def pickled(path: Path) -> None:
    torch.save({"state_dict": small().state_dict(), "configuration": Path("x")}, path)


BAD_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "absent.pth": (lambda path: None, "there is no such file"),
    "model.onnx": (lambda path: path.write_bytes(b"x"), "give a .safetensors, .pth or .pt file"),
    "objects.pth": (pickled, "holds Python objects beside tensors.*convert it once"),
    "objects.pt": (pickled, r"pathlib\.\w*Path.*safe_globals\(\[pathlib\.\w*Path\]\)"),
    "noise.pth": (lambda path: path.write_bytes(bytes(range(200))), "damaged"),
    "text.pth": (lambda path: path.write_text("hello world"), "damaged"),
    "empty.pth": (lambda path: path.touch(), "damaged"),
    "short.safetensors": (lambda path: path.write_bytes(b"1234"), "damaged"),
    "list.pth": (lambda path: torch.save([1, 2], path), "no state dict in it"),
    "other.pth": (
        lambda path: torch.save(nn.LSTM(2, 2).state_dict(), path),
        "matched almost nothing of student: 0 of 8 tensors; the file has weight_ih_l0",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_each_bad_file_has_its_message(name: str, tmp_path: Path) -> None:
    write, message = BAD_FILES[name]
    write(tmp_path / name)
    with pytest.raises(AcamkdError, match=message):
        load_weights(small(), str(tmp_path / name), strict=False, what="student")


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_a_file_that_may_not_be_read_is_not_called_damaged(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    write = WRITERS["file.safetensors" if name == "x.safetensors" else "plain.pth"]
    write(small().state_dict(), tmp_path / name)
    monkeypatch.setattr(Path, "open", refuse)  # as nobody does to the administrator
    with pytest.raises(AcamkdError, match=rf"^cannot read {tmp_path}/{name}: Permission denied$"):
        load_weights(small(), str(tmp_path / name), strict=True, what="teacher")


def test_older_names_of_another_width_do_not_fit(tmp_path: Path) -> None:
    """torchvision's heads rename such tensors while they load."""
    state = detector().net.state_dict()
    name = "head.classification_head.conv.0.0.weight"
    state[name.replace("0.0", "0")] = torch.cat([state.pop(name)] * 2)
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(AcamkdError, match=rf"(?s)^{tmp_path}/x\.pth does not fit teacher: .*size mismatch for {name}"):
        load_weights(detector().net, str(tmp_path / "x.pth"), strict=True, what="teacher")


def test_a_truncated_file_is_damaged(tmp_path: Path) -> None:
    file = tmp_path / "x.pth"
    torch.save(small().state_dict(), file)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(AcamkdError, match="damaged"):
        load_weights(small(), str(file), strict=False, what="student")


@pytest.mark.parametrize("name", ["RetinaNet_ResNet50_FPN_Weights.COCO_V9", "RetinaNet_ResNet51_FPN_Weights.COCO_V1"])
def test_unknown_torchvision_weights(name: str) -> None:
    with pytest.raises(AcamkdError, match=r"did you mean .*RetinaNet_ResNet50_FPN_Weights.COCO_V1"):
        load_weights(small(), name, strict=True, what="teacher")


@pytest.mark.parametrize(
    ("arch", "whole"), [("retinanet", retinanet_resnet50_fpn), ("faster_rcnn", fasterrcnn_resnet50_fpn)]
)
def test_coco_detectors_of_torchvision_fit_the_80_real_classes(
    arch: str, whole: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    published = whole(weights=None, weights_backbone=None, num_classes=91).eval()
    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", lambda *_, **__: published.state_dict())
    name = {"retinanet": "RetinaNet", "faster_rcnn": "FasterRCNN"}[arch] + "_ResNet50_FPN_Weights.COCO_V1"
    section = Model(arch=arch, backbone="torchvision/resnet50", weights=name)
    teacher: Any = build(section, "detection", 80, (64, 64), teacher=True)
    categories = RetinaNet_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    kept = [index for index, category in enumerate(categories) if category != "N/A"]
    assert len(kept) == 81
    head: Any = published
    if arch == "retinanet":
        rows = teacher.net.head.classification_head.cls_logits.bias.view(9, 81)
        assert torch.equal(rows, head.head.classification_head.cls_logits.bias.view(9, 91)[:, kept])
    else:
        predictor, full = teacher.net.roi_heads.box_predictor, head.roi_heads.box_predictor
        assert torch.equal(predictor.cls_score.weight, full.cls_score.weight[kept])
        assert torch.equal(predictor.bbox_pred.bias.view(81, 4), full.bbox_pred.bias.view(91, 4)[kept])
    norms = [net.backbone.body.bn1 for net in (teacher.net, head)]
    assert torch.equal(norms[0].weight, norms[1].weight * float(1 + 1e-5) ** 0.5)  # its variance is 1


def test_frozen_batch_norm_without_epsilon_is_the_same_with_one() -> None:
    without, with_one = (torchvision.ops.FrozenBatchNorm2d(4, eps) for eps in (0.0, 1e-5))
    for tensor, values in (("weight", [1, -2, 0.5, 3]), ("running_mean", [0, 1, 2, 3]), ("bias", [1, 1, 0, 0]),
                           ("running_var", [1, 1e-3, 1e-8, 5.6e-45])):  # fmt: skip
        getattr(without, tensor).copy_(torch.tensor(values))
    net = nn.ModuleDict({"bn": with_one})
    net.load_state_dict(with_epsilon(nn.ModuleDict({"bn": without}).state_dict()))
    images = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(with_one(images), without(images), rtol=1e-5, atol=1e-5)


def test_torchvisions_older_names_are_understood(tmp_path: Path) -> None:
    source, target = detector(), detector()
    state = {n.replace("_blocks.0.0.", "_blocks.0."): t for n, t in source.net.state_dict().items()}
    assert "backbone.fpn.inner_blocks.0.weight" in state
    torch.save(state, tmp_path / "old.pth")
    load_weights(target.net, str(tmp_path / "old.pth"), strict=True, what="teacher")
    assert equal(source.net, target.net)


def test_a_student_that_starts_from_a_part_of_a_file_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = detector().net.state_dict()
    del state["backbone.fpn.inner_blocks.0.0.bias"]
    torch.save(state, tmp_path / "part.pth")
    detector(weights=str(tmp_path / "part.pth"))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "1 missing (backbone.fpn.inner_blocks.0.0.bias)" in record.message


@pytest.mark.parametrize("backbone", ["mobilenetv3_small_050", "convnext_atto"])
def test_classification_file_fills_a_timm_backbone(
    backbone: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    classifier = timm.create_model(backbone)
    torch.save(classifier.state_dict(), tmp_path / "timm.pth")
    with caplog.at_level(logging.INFO):
        model = detector(backbone=backbone, backbone_weights=str(tmp_path / "timm.pth"))
    own = model.backbone.state_dict()
    assert f"{len([n for n in own if 'num_batches' not in n])} tensors matched" in caplog.text
    first = next(name for name in own if name.startswith(("conv_stem", "stem_0")))
    assert torch.equal(own[first], classifier.state_dict()[first.replace("stem_0", "stem.0")])


@pytest.mark.parametrize(
    ("arch", "backbone", "patched"),
    [
        ("retinanet", "mobilenetv3_small_050", (timm, "create_model")),
        ("retinanet", "torchvision/resnet18", (torchvision.models, "get_model")),
        ("unet", "resnet18", (smp, "create_model")),
        ("unet", "tu-resnet18", (smp, "create_model")),
        ("torchvision/fcn_resnet50", "resnet50", (torchvision.models, "get_model")),
    ],
)
def test_an_unreachable_hub_is_explained(
    arch: str, backbone: str, patched: tuple[Any, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: Any, **__: Any) -> nn.Module:
        raise OSError("no route to host")

    monkeypatch.setattr(*patched, unreachable)
    task = "detection" if arch == "retinanet" else "segmentation"
    with pytest.raises(AcamkdError, match=r"OSError: no route to host.*local file.*backbone_weights: null"):
        build(Model(arch=arch, backbone=backbone), task, 3)  # type: ignore[arg-type]


def test_saved_file_is_loaded_by_the_plain_framework(tmp_path: Path) -> None:
    torch.manual_seed(0)
    section = Model(arch="retinanet", backbone="torchvision/resnet50", backbone_weights=None)
    model = build(section, "detection", 3)
    save_weights(model.net, tmp_path / "student.safetensors")
    plain = retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=4)
    plain.load_state_dict(load_file(tmp_path / "student.safetensors"))
    assert equal(plain, model.net)
    assert [path.name for path in tmp_path.iterdir()] == ["student.safetensors"]


def test_shared_tensors_are_saved_under_every_name(tmp_path: Path) -> None:
    layer = nn.Linear(3, 3)
    net = nn.Sequential(layer, nn.ReLU(), layer)
    save_weights(net, tmp_path / "shared.safetensors")
    assert load_file(tmp_path / "shared.safetensors").keys() == net.state_dict().keys()


def test_inherited_parts_start_from_the_teacher() -> None:
    student, teacher = detector(), detector(backbone="resnet18")
    inherit(student, teacher, ["head", "backbone.fpn.layer_blocks"])
    assert equal(student.net.head, teacher.net.head)
    assert equal(student.net.backbone.fpn.layer_blocks, teacher.net.backbone.fpn.layer_blocks)
    before = teacher.net.head.classification_head.cls_logits.bias.clone()
    student.net.head.classification_head.cls_logits.bias.data.zero_()
    assert torch.equal(teacher.net.head.classification_head.cls_logits.bias, before)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("haed", "the student's network has no such part; did you mean head"),
        ("backbone.body.conv_stem", "the teacher's network has no such part"),
        ("head", r"head.classification_head.conv.0.0.weight is \(16, 16, 3, 3\) in the student and \(32, 32, 3, 3\)"),
        ("backbone.body", r"inherit backbone.body: the teacher has no tensor backbone.body.conv_stem.weight"),
    ],
)
def test_what_cannot_be_inherited(part: str, message: str) -> None:
    with pytest.raises(AcamkdError, match=message):
        inherit(detector(), detector(channels=32, backbone="resnet18"), [part])
