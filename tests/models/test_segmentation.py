from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acamkd.config import Model, ShortLong
from acamkd.errors import AcamkdError
from acamkd.models import build
from acamkd.models.base import VOID
from acamkd.models.resize import frame_size
from acamkd.models.segmentation import Segmenter


class Rows(nn.Module):
    """Logits whose best class is the color's channel of largest value, so that masks can be read off images."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def segmenter(resize: tuple[int, int] | ShortLong | None = None, **settings: Any) -> Segmenter:
    torch.manual_seed(0)
    section = {"arch": "deeplabv3plus", "backbone": "tu-mobilenetv3_small_050", **settings}
    model = build(Model(backbone_weights=None, **section), "segmentation", 4, resize)
    assert isinstance(model, Segmenter)
    return model


def colors(resize: tuple[int, int] | ShortLong | None = None) -> Segmenter:
    return Segmenter(Rows(), 3, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), resize)


def image_of(mask: Tensor) -> Tensor:
    """(H, W) classes 0..2 -> (3, H, W), one channel bright."""
    return (F.one_hot(mask, 3).permute(2, 0, 1) * 255).to(torch.uint8)


@pytest.mark.parametrize("size", [(45, 60), (33, 31), (64, 64), (480, 360)])
def test_masks_have_the_size_of_any_image(size: tuple[int, int]) -> None:
    model = segmenter().eval()
    small = torch.zeros(3, 20, 20, dtype=torch.uint8)
    first, second = model.predict([torch.zeros(3, *size, dtype=torch.uint8), small])
    assert first["mask"].shape == size
    assert second["mask"].shape == (20, 20)
    assert first["mask"].dtype == torch.int64


def test_images_pass_unchanged_and_predictions_come_back_in_place() -> None:
    mask = torch.randint(0, 3, (45, 60), generator=torch.Generator().manual_seed(0))
    model = colors()
    batch = model.prepare([image_of(mask), image_of(mask[:20, :30])], [{"mask": mask}, {"mask": mask[:20, :30]}])
    assert batch.input_size == (64, 64)
    assert batch.sizes == [(45, 60), (20, 30)]
    torch.testing.assert_close(batch.pixels[0, :, :45, :60], image_of(mask) / 255)
    assert (batch.pixels[0, :, 45:] == 0.5).all()
    assert (batch.pixels[1, :, :, 30:] == 0.5).all()
    assert batch.targets is not None
    assert torch.equal(batch.targets[0]["mask"][:45, :60], mask)
    assert (batch.targets[1]["mask"][20:] == VOID).all()
    first, second = model.decode(model(batch), batch)
    assert torch.equal(first["mask"], mask)
    assert torch.equal(second["mask"], mask[:20, :30])


def test_resized_masks_hold_only_classes_of_the_original() -> None:
    mask = torch.zeros(40, 40, dtype=torch.int64)
    mask[:, 20:] = 2
    batch = colors((64, 96)).prepare([image_of(mask)], [{"mask": mask}])
    assert batch.targets is not None
    resized = batch.targets[0]["mask"]
    assert resized.shape == (64, 96)
    assert torch.equal(resized, torch.cat([torch.zeros(64, 48), torch.full((64, 48), 2)], dim=1).long())
    [prediction] = colors((64, 96)).predict([image_of(mask)])
    assert (prediction["mask"] == mask).float().mean() > 0.94


def test_frame_size() -> None:
    assert frame_size((480, 360), None) == (480, 360)
    assert frame_size((480, 360), (100, 200)) == (100, 200)
    assert frame_size((480, 360), ShortLong(short=180, long=1000)) == (240, 180)
    assert frame_size((480, 360), ShortLong(short=180, long=120)) == (120, 90)


def test_a_strip_keeps_a_pixel_of_its_short_side() -> None:
    strip, model = torch.randint(0, 256, (3, 2000, 8), dtype=torch.uint8), segmenter(ShortLong(short=100, long=160))
    batch = model.eval().prepare([strip], [{"mask": torch.ones(2000, 8, dtype=torch.int64)}])
    assert batch.sizes == [(160, 1)]
    assert batch.targets is not None
    assert (batch.targets[0]["mask"] != VOID).sum() == 160
    assert model.loss(model(batch), batch)["cross_entropy"].isfinite()
    assert model.predict([strip])[0]["mask"].shape == (2000, 8)


def test_whole_numbers_as_colors_make_floats() -> None:
    model = Segmenter(Rows(), 3, (0, 0, 0), (1, 1, 1))
    assert model.mean.dtype == model.std.dtype == torch.float32
    image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(model.prepare([image]).pixels[0], image / 255)


@pytest.mark.parametrize(
    ("norm", "said"),
    [
        (nn.GroupNorm(3, 3), "a group norm needs more than one value to normalize: give larger images"),
        (nn.InstanceNorm2d(3), "an instance norm needs more than one value to normalize: give larger images"),
        (nn.BatchNorm2d(3), "a batch norm needs more than one value of each channel: raise train.batch_size"),
    ],
)
def test_a_norm_without_two_values_is_called_by_its_name(norm: nn.Module, said: str) -> None:
    net = nn.Sequential(nn.AvgPool2d(32), norm, nn.Upsample(scale_factor=32))
    with pytest.raises(AcamkdError, match=said):
        Segmenter(net, 3).train().predict([torch.rand(3, 32, 32)])


def test_loss_is_the_mean_over_pixels_that_are_not_void() -> None:
    model = segmenter().eval()
    mask = torch.randint(0, 4, (45, 60), generator=torch.Generator().manual_seed(0))
    mask[:10] = VOID
    batch = model.prepare([torch.rand(3, 45, 60), torch.rand(3, 32, 32)], [{"mask": mask}, {"mask": mask[:32, :32]}])
    outputs = model(batch)
    assert outputs["out"].shape == (2, 4, 64, 64)
    [(name, value)] = model.loss(outputs, batch).items()
    assert name == "cross_entropy"
    each = [
        F.cross_entropy(outputs["out"][:1, :, 10:45, :60], mask[None, 10:], reduction="sum"),
        F.cross_entropy(outputs["out"][1:, :, 10:32, :32], mask[None, 10:32, :32], reduction="sum"),
    ]
    torch.testing.assert_close(value, torch.stack(each).sum() / (35 * 60 + 22 * 32))


def test_a_batch_of_void_costs_nothing_and_has_a_gradient() -> None:
    model = segmenter().eval()
    void = torch.full((32, 32), VOID)
    batch = model.prepare([torch.rand(3, 32, 32)], [{"mask": void}])
    loss = model.loss(model(batch), batch)["cross_entropy"]
    assert loss == 0
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = [p.grad for p in model.net.segmentation_head.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_auxiliary_head_counts_two_fifths() -> None:
    model = segmenter(arch="torchvision/deeplabv3_mobilenet_v3_large", options={"aux_loss": True}).eval()
    batch = model.prepare([torch.rand(3, 40, 40)], [{"mask": torch.zeros(40, 40, dtype=torch.int64)}])
    outputs = model(batch)
    terms = model.loss(outputs, batch)
    assert set(terms) == {"cross_entropy", "aux_cross_entropy"}
    logits = outputs["aux"][:, :, :40, :40]
    expected = 0.4 * F.cross_entropy(logits, torch.zeros(1, 40, 40, dtype=torch.int64))
    torch.testing.assert_close(terms["aux_cross_entropy"], expected)


def test_backbone_is_the_part_that_classification_weights_fit() -> None:
    inner = segmenter().backbone.state_dict()
    whole = timm.create_model("mobilenetv3_small_050").state_dict()
    assert len(inner) > 100
    assert inner.keys() <= whole.keys()
    assert "layer4.1.conv2.weight" in segmenter(arch="fpn", backbone="resnet18").backbone.state_dict()


def test_mean_and_std_follow_the_encoder() -> None:
    model = segmenter(backbone="tu-tf_efficientnet_lite0")
    assert model.mean.flatten().tolist() == [0.5, 0.5, 0.5]
    assert segmenter(mean=(0.1, 0.2, 0.3)).mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert segmenter(mean=(0, 0, 0)).mean.dtype == torch.float32
    assert segmenter(arch="unet", backbone="resnet18").std.flatten().tolist() == pytest.approx([0.229, 0.224, 0.225])


def test_logits_of_another_shape_are_an_error() -> None:
    model = Segmenter(nn.Conv2d(3, 5, 1, stride=2), 5)
    batch = model.prepare([torch.rand(3, 32, 32)])
    with pytest.raises(AcamkdError, match=r"gives logits \(1, 5, 16, 16\), but must give \(1, 5, 32, 32\)"):
        model(batch)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"arch": "deeplabv4"}, "unknown segmenter deeplabv4; did you mean deeplabv3"),
        ({"arch": "torchvision/deeplabv3_resnet51"}, "did you mean deeplabv3_resnet50"),
        ({"backbone": "resnett18"}, "unknown encoder resnett18; did you mean resnet18"),
        ({"backbone": "mobilenetv3_small_050"}, "did you mean tu-mobilenetv3_small_050"),
        ({"backbone": "tu-resnet18.a1_in1kk"}, r"timm's resnet18\.a1_in1kk: .*; did you mean resnet18\.a1_in1k"),
        ({"arch": "unet", "backbone": "tu-vit_tiny_patch16_224"}, "unet cannot be built over tu-vit_tiny_patch16_224"),
        ({"backbone": "resnet18", "options": {"decoder_chanels": 8}}, "did you mean decoder_channels"),
        ({"options": {"decoder_chanels": 8}}, "deeplabv3plus cannot be built over tu-mobilenetv3_small_050"),
        ({"arch": "torchvision/fcn_resnet50", "options": {"aux": True}}, "has no option aux; did you mean aux_loss"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(AcamkdError, match=message):
        segmenter(**settings)
