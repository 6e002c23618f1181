"""Teachers without a head: timm's backbones."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from acamkd import config
from acamkd.errors import AcamkdError
from acamkd.models import Batch, FeatureModel, TaskModel, build, build_teacher, save_weights
from acamkd.models.timm_features import TimmFeatures

SMALL = {"depth": 3, "embed_dim": 16, "num_heads": 2}
DINOV3 = {"arch": "timm/vit_small_patch16_dinov3", "options": SMALL}
MOBILENET = {"arch": "timm/mobilenetv3_small_050"}


def make(section: dict[str, Any], **more: Any) -> TimmFeatures:
    torch.manual_seed(0)
    built = build_teacher(config.Model(**{"backbone_weights": None, **section, **more}), "detection", 3).eval()
    assert isinstance(built, TimmFeatures)
    return built


def batch(height: int, width: int) -> Batch:
    return Batch(torch.rand(1, 3, height, width), [(height, width)], [(height, width)])


def shapes(model: FeatureModel, given: Batch) -> list[tuple[int, ...]]:
    with torch.no_grad():
        maps: list[Tensor] = model(given)
    return [tuple(x.shape[1:]) for x in maps]


@pytest.mark.parametrize(
    ("resize", "size", "expected"),
    [
        (None, (64, 96), (16, 4, 6)),
        (0.5, (64, 96), (16, 2, 3)),
        ((32, 48), (64, 96), (16, 2, 3)),
        (2.0, (32, 32), (16, 4, 4)),
        (0.5, (72, 40), (16, 2, 1)),  # 36 x 20, rounded to patches
    ],
)
def test_a_vit_has_one_level_at_its_own_input_size(resize: Any, size: tuple[int, int], expected: Any) -> None:
    assert shapes(make(DINOV3, resize=resize), batch(*size)) == [expected]


def test_patches_of_14_pixels_meet_any_input() -> None:
    vit = make({"arch": "timm/vit_small_patch14_dinov2", "options": SMALL})
    assert vit.input_size((64, 96)) == (70, 98)
    assert shapes(vit, batch(64, 96)) == [(16, 5, 7)]


def test_a_vit_is_read_behind_its_last_norm() -> None:
    vit = make(DINOV3)
    (x,) = vit(batch(32, 32))
    torch.testing.assert_close(x.std(dim=1, correction=0), torch.ones(1, 2, 2), atol=0.01, rtol=0)
    raw = make(DINOV3, options={**SMALL, "out_indices": [0, 2]})
    assert shapes(raw, batch(32, 32)) == [(16, 2, 2)] * 2
    assert raw.comparable_layers() == ("levels:0", "levels:1")


def test_of_others_the_levels_are_those_of_the_strides() -> None:
    assert shapes(make(MOBILENET), batch(64, 64)) == [(c, 64 // s, 64 // s) for c, s in
                                                      ((16, 2), (8, 4), (16, 8), (24, 16), (288, 32))]  # fmt: skip
    swin = {"arch": "timm/swin_tiny_patch4_window7_224", "options": {"embed_dim": 12, "depths": [1, 1, 1, 1]}}
    assert shapes(make(swin), batch(64, 96)) == [(12 * 2**k, 16 // 2**k, 24 // 2**k) for k in range(4)]


def test_normalization_is_that_of_the_pretraining(caplog: pytest.LogCaptureFixture) -> None:
    vit = make({"arch": "timm/vit_tiny_patch16_224", "options": SMALL})
    assert vit.mean.flatten().tolist() == [0.5, 0.5, 0.5]
    assert vit.license is None  # of weights that are not there
    assert "nothing was trained" in caplog.text
    given = batch(32, 32)
    torch.testing.assert_close(vit.normalize(given), 2 * given.pixels - 1)


def test_a_file_of_the_backbone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for section in (DINOV3, MOBILENET):
        file = tmp_path / "backbone.safetensors"
        one = make(section)
        with torch.no_grad():
            for parameter in one.parameters():
                parameter.add_(0.01)
        save_weights(one.backbone, file)
        with caplog.at_level(logging.INFO):
            other = make(section, backbone_weights=str(file))
        given = batch(32, 32)
        assert all(torch.equal(a, b) for a, b in zip(one(given), other(given), strict=True))
    assert "the license of its weights is dinov3-license" in caplog.text


def test_pretrained_weights_need_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise OSError("no connection")

    monkeypatch.setattr("timm.models._builder.load_pretrained", offline)
    with pytest.raises(AcamkdError, match=r"pretrained weights of vit_small.*give a local file \(backbone_weights: F"):
        make(DINOV3, backbone_weights="pretrained")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"arch": "timm/vit_smal_patch16_dinov3"},
            "timm has no backbone vit_smal_patch16_dinov3; did you mean vit_small",
        ),
        ({**DINOV3, "options": {"dept": 3}}, "cannot give feature maps with {'dept': 3}: .*dept"),
        ({**DINOV3, "options": {"depth": 2}}, "cannot give feature maps with {'depth': 2}"),
    ],
)
def test_what_cannot_be_built(section: dict[str, Any], message: str) -> None:
    with pytest.raises(AcamkdError, match=message):
        make(section)


def test_a_size_that_the_network_refuses() -> None:
    beit = make({"arch": "timm/beit_base_patch16_224", "options": SMALL})
    assert shapes(beit, batch(224, 224)) == [(16, 14, 14)]
    with pytest.raises(AcamkdError, match=r"does not take images of 64 x 64 .*set teacher.resize to \[224, 224\]"):
        beit(batch(64, 64))


class Stripes(FeatureModel):
    """A teacher of one's own."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(torch.nn.Conv2d(3, 4, 8, stride=8), (0, 0, 0), (1, 1, 1))

    def forward(self, given: Batch) -> Tensor:
        out: Tensor = self.net(self.normalize(given))
        return out


def test_a_factory_may_give_one() -> None:
    section = config.Model(arch=f"{__name__}:Stripes")
    assert isinstance(build_teacher(section, "segmentation", 3), Stripes)
    with pytest.raises(AcamkdError, match="Stripes has no head, and only a teacher can do without"):
        build(section, "segmentation", 3)
    assert not issubclass(Stripes, TaskModel)
    assert (Stripes(3).net_name, make(MOBILENET).net_name) == ("Conv2d", "MobileNetV3Features")
    with pytest.raises(AcamkdError, match=r"Stripes does not say which .* need a class that defines `backbone`"):
        build_teacher(section.model_copy(update={"backbone_weights": "file.safetensors"}), "segmentation", 3)
    with pytest.raises(AcamkdError, match=r"mean: .*:Stripes returns a Stripes, which has its own mean, \[0.0, 0.0"):
        build_teacher(section.model_copy(update={"mean": (0.5, 0.5, 0.5)}), "segmentation", 3)
    build_teacher(section.model_copy(update={"std": (1.0, 1.0, 1.0)}), "segmentation", 3)
