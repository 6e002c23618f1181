from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from acamkd.config import Model
from acamkd.errors import AcamkdError
from acamkd.models import Task, TaskModel, build

FACTORIES = """
import torch
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from acamkd.config import Model
from acamkd.models import build


def own_segmenter(num_classes, width=1):
    return torch.nn.Conv2d(3, num_classes, width, padding="same")


def ready(num_classes):
    section = Model(arch="unet", backbone="tu-mobilenetv3_small_050", backbone_weights=None)
    return build(section, "segmentation", num_classes)


def retinanet(num_classes):
    features = torch.nn.Conv2d(3, 32, 3, stride=8)
    anchors = AnchorGenerator(((16, 32),), ((1.0,),))
    return RetinaNet(features, num_classes + 1, anchor_generator=anchors, image_mean=[0.1, 0.2, 0.3])


def one_class_short(num_classes):
    return FCOS(torch.nn.Conv2d(3, 32, 3, stride=8), num_classes)


def number(num_classes):
    return num_classes
"""


@pytest.fixture(autouse=True)
def _own_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_models.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_models", raising=False)


def from_factory(name: str, task: Task, **settings: Any) -> TaskModel:
    return build(Model(arch=f"own_models:{name}", **settings), task, 3)


def test_a_module_becomes_a_segmenter(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        model = from_factory("own_segmenter", "segmentation", options={"width": 3}, mean=(0.1, 0.2, 0.3))
    assert "importing own_models:own_segmenter" in caplog.text
    assert tuple(model.net.weight.shape) == (3, 3, 3, 3)  # type: ignore[arg-type]
    assert model.predict([torch.rand(3, 10, 11)])[0]["mask"].shape == (10, 11)
    assert model.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    with pytest.raises(AcamkdError, match="Conv2d has neither an encoder nor a backbone"):
        _ = model.backbone


def test_a_task_model_is_used_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(AcamkdError, match=r"std: own_models:ready returns a Segmenter, which has its own std, \["):
        from_factory("ready", "segmentation", std=(1, 1, 1))
    build(Model(arch="own_models:ready"), "segmentation", 3, (32, 32))
    assert "data.resize has no effect on own_models:ready: its own `prepare` decides" in caplog.text
    assert type(from_factory("ready", "segmentation").net).__name__ == "Unet"
    with pytest.raises(AcamkdError, match="gives a network for segmentation, but the recipe's task is detection"):
        from_factory("ready", "detection")


def test_a_torchvision_detector_is_wrapped() -> None:
    model = from_factory("retinanet", "detection").eval()
    assert model.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert model.prepare([torch.rand(3, 40, 50)]).sizes == [(40, 50)]
    assert model.backbone is model.net.backbone
    assert model.predict([torch.rand(3, 64, 64)])[0]["boxes"].shape[1] == 4


def test_an_option_may_count_the_background_too() -> None:
    settings = {"weights": None, "weights_backbone": None, "num_classes": 4}
    section = Model(arch="torchvision.models.detection:fasterrcnn_mobilenet_v3_large_fpn", options=settings)
    assert build(section, "detection", 3).num_classes == 3


@pytest.mark.parametrize(
    ("name", "task", "message"),
    [
        ("number", "segmentation", "returned int; allowed: an acamkd TaskModel, any module"),
        ("own_segmenter", "detection", "returned Conv2d; allowed: .*RetinaNet, FCOS or FasterRCNN"),
        ("one_class_short", "detection", "FCOS has 3 classes with background, .* build it with num_classes=4"),
        ("absent", "detection", "has no attribute 'absent'"),
    ],
)
def test_unusable_factories(name: str, task: Task, message: str) -> None:
    with pytest.raises(AcamkdError, match=message):
        from_factory(name, task)


def test_unknown_module() -> None:
    with pytest.raises(
        AcamkdError, match="No module named 'nowhere'; the module must be installed or lie on PYTHONPATH"
    ):
        build(Model(arch="nowhere:net"), "detection", 3)


def test_a_teacher_without_weights_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    section = Model(arch="retinanet", backbone="mobilenetv3_small_050", backbone_weights=None, fpn_channels=8)
    build(section, "detection", 3, teacher=True)
    assert "the teacher, retinanet on mobilenetv3_small_050, has no `weights`" in caplog.text


def test_whole_weights_replace_the_backbones(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"arch": "retinanet", "backbone": "mobilenetv3_small_050", "fpn_channels": 8}
    source = build(Model(**settings, backbone_weights=None), "detection", 3)
    torch.save(source.net.state_dict(), tmp_path / "w.pth")
    model = build(Model(**settings, weights=str(tmp_path / "w.pth")), "detection", 3, teacher=True)
    for name, tensor in model.net.state_dict().items():
        assert torch.equal(tensor, source.net.state_dict()[name])
    with pytest.raises(AcamkdError, match=r"2 of wrong shape \(head.classification_head.cls_logits.weight"):
        build(Model(**settings, weights=str(tmp_path / "w.pth")), "detection", 5, teacher=True)
