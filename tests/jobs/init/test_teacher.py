from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny
from acamkd import config, models
from acamkd.errors import AcamkdError
from acamkd.jobs.init.teacher import identify
from acamkd.models.base import Task


@pytest.mark.parametrize(
    ("task", "arch", "backbone", "prefix"),
    [
        ("detection", "fcos", "mobilenetv3_small_050", ""),
        ("detection", "reppoints", "mobilenetv3_small_050", ""),
        ("detection", "retinanet", "resnet18", "module."),
        ("segmentation", "fpn", "tu-mobilenetv3_small_050", ""),
        ("segmentation", "unet", "resnet34", ""),  # has every tensor of resnet18
    ],
)  # fmt: skip
def test_a_checkpoint_says_what_it_is(tmp_path: Path, task: Task, arch: str, backbone: str, prefix: str) -> None:
    section = config.Model(arch=arch, backbone=backbone, backbone_weights=None, fpn_channels=32)
    state = models.build(section, task, 5).net.state_dict()
    torch.save({"state_dict": {prefix + name: x for name, x in state.items()}}, tmp_path / "t.pth")
    found = identify(tmp_path / "t.pth", task)
    assert (found.section.arch, found.section.backbone, found.num_classes) == (arch, backbone, 5)
    assert found.section.weights == str(tmp_path / "t.pth")
    if task == "detection":
        assert found.section.fpn_channels == 32
    assert f"{arch} on {backbone} with 5 classes" in found.text


def test_a_runs_teacher_is_what_its_recipe_says(tmp_path: Path) -> None:
    options = {"decoder_pyramid_channels": 32, "decoder_segmentation_channels": 32}
    recipe = tiny.recipe(tiny.write_data(tmp_path / "data"))
    (tmp_path / "recipe.yaml").write_text(config.dump(recipe))
    section = config.Model(**tiny.FPN)
    models.save_weights(models.build(section, "segmentation", 6).net, tmp_path / "student.safetensors")
    found = identify(tmp_path / "student.safetensors", "segmentation")
    assert found.section.options == options
    assert f"of the run {tmp_path}" in found.text
    foreign = config.override(recipe, ["student.arch=torch.hub:load"])
    (tmp_path / "recipe.yaml").write_text(config.dump(foreign))
    with pytest.raises(AcamkdError, match=r"recipe\.yaml names code that would run, torch\.hub:load"):
        identify(tmp_path / "student.safetensors", "segmentation")


def test_what_is_not_known_is_asked_for(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2), "b.c": torch.zeros(3)}, tmp_path / "t.pth")
    with pytest.raises(AcamkdError, match="--teacher-network ARCH/BACKBONE"):
        identify(tmp_path / "t.pth", "detection")
    net = models.build(config.Model(arch="unet", backbone="resnet18", backbone_weights=None), "segmentation", 3).net
    torch.save(net.state_dict(), tmp_path / "unet.pth")
    with pytest.raises(AcamkdError, match="it is not fpn/resnet18"):
        identify(tmp_path / "unet.pth", "segmentation", "fpn/resnet18")
    assert identify(tmp_path / "unet.pth", "segmentation", "unet/resnet18").num_classes == 3
