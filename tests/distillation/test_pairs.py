"""`pairs: auto` between families of networks."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import pytest
import torch

from acamkd.config import Loss, Model
from acamkd.distillation.build import build_distiller
from acamkd.distillation.pairs import blank_batch, propose, resolve_pairs
from acamkd.distillation.taps import probe
from acamkd.errors import AcamkdError
from acamkd.models import build, build_teacher
from acamkd.models.base import Task
from tiny import FPN, RETINANET, VIT
from tiny_hf import OPTIONS

SMALL = {name: value for name, value in RETINANET.items() if name != "options"} | {"fpn_channels": 64}
SECTIONS: dict[str, tuple[Task, dict[str, Any]]] = {
    "retinanet": ("detection", RETINANET),
    "fcos": ("detection", {**SMALL, "arch": "fcos"}),
    "fcos of torchvision": ("detection", {**SMALL, "arch": "fcos", "backbone": "torchvision/resnet18"}),
    "fpn": ("segmentation", FPN),
    "unet": ("segmentation", {**FPN, "arch": "unet", "options": {"decoder_channels": [32, 24, 16, 8, 8]}}),
    "vit": ("segmentation", VIT),
    **{
        name: ("segmentation" if name in ("segformer", "mask2former") else "detection", {"arch": f"hf/{name}"})
        for name in ("rt_detr_v2", "d_fine", "detr", "yolos", "segformer", "mask2former")
    },
}
HYBRID = [f"model.encoder.{name}" for name in ("fpn_blocks.1", "pan_blocks.0", "pan_blocks.1")]
PYRAMID = [f"backbone:{level}" for level in range(3)]


@cache
def network(name: str, classes: int = 3, *, student: bool = False) -> Any:
    task, section = SECTIONS[name]
    model = Model(**{**section, "options": OPTIONS.get(name, section.get("options", {}))})
    return (build if student else build_teacher)(model, task, classes, (128, 128))


@pytest.fixture(scope="module", autouse=True)
def _needs_transformers() -> None:
    pytest.importorskip("transformers")


@pytest.mark.parametrize(
    ("student", "teacher", "pairs"),
    [
        ("fcos", "retinanet", [f"backbone:{level}" for level in ("0", "1", "2", "p6", "p7")]),
        ("fcos of torchvision", "rt_detr_v2", list(zip(PYRAMID, HYBRID, strict=True))),
        ("d_fine", "rt_detr_v2", HYBRID),
        ("rt_detr_v2", "vit", [("model.encoder.pan_blocks.0", "levels:0")]),
        ("yolos", "d_fine", [("vit.encoder.layer.3#16+1", HYBRID[1])]),
        ("segformer", "fpn", [("decode_head", "segmentation_head.0")]),
        ("unet", "vit", [("encoder:4", "levels:0")]),
        ("fpn", "mask2former", [("decoder", "model.pixel_level_module.decoder:mask_features")]),
    ],
)  # fmt: skip
def test_families_find_each_other(
    student: str, teacher: str, pairs: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    learner, wise = network(student, student=True), network(teacher)
    before = {name: buffer.clone() for name, buffer in learner.named_buffers()}
    with caplog.at_level(logging.INFO):
        distiller = build_distiller(learner, wise, [Loss(name="fitnet", pairs="auto")])
    named = [(pair, pair) if isinstance(pair, str) else pair for pair in pairs]
    assert distiller.pairs == named
    assert caplog.text.count("fitnet: pairs: auto stands for ") == 1
    assert all(torch.equal(buffer, before[name]) for name, buffer in learner.named_buffers())
    target = {"boxes": torch.tensor([[4.0, 4.0, 40.0, 30.0]]), "labels": torch.tensor([2])}
    target |= {"mask": torch.ones(64, 64, dtype=torch.long)}
    terms = distiller(learner.prepare([torch.rand(3, 64, 64)] * 2, [target] * 2))
    torch.stack([term for name, term in terms.items() if not name.startswith("task/")]).sum().backward()  # type: ignore[no-untyped-call]
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in learner.parameters())
    learner.zero_grad()


def test_segmenters_of_other_classes_compare_features() -> None:
    (loss,) = resolve_pairs(network("fpn", 5, student=True), network("fpn", 7), [Loss(name="pkd", pairs="auto")])
    assert isinstance(loss.pairs, tuple)
    assert "decoder" in loss.pairs
    assert "encoder:0" not in loss.pairs  # the image itself
    assert not any("head" in str(pair) for pair in loss.pairs)


@pytest.mark.parametrize("level", [3, 4])
def test_logits_are_no_encoder_map_with_as_many_channels(level: int) -> None:
    """The head of a Unet gives them at stride 1."""
    batch = blank_batch(network("unet", student=True))
    (x,) = probe(network("unet", student=True), [f"encoder:{level}"], batch).values()
    classes = x.shape[1]
    student = network("unet", classes, student=True)
    assert propose(network("fpn", classes), student) == [("segmentation_head", "segmentation_head.0")]
    assert any(f"encoder:{level}" in pair for pair in propose(network("fpn", 7), student))
    by_chance = Loss(name="fitnet", pairs=((f"encoder:{level}", "segmentation_head.0"),))
    build_distiller(student, network("fpn", 7), [by_chance])
    with pytest.raises(AcamkdError, match=r"segmentation_head are classes, but the teacher has 7"):
        build_distiller(student, network("fpn", 7), [Loss(name="cwd", pairs=("segmentation_head",))])


def test_heads_need_no_pairs_and_given_ones_stay() -> None:
    entries = [Loss(name="kddetr", pairs="auto"), Loss(name="pkd", pairs=("a",))]
    resolved = resolve_pairs(network("d_fine", student=True), network("rt_detr_v2"), entries)
    assert [loss.pairs for loss in resolved] == [(), ("a",)]


def test_what_has_nothing_in_common_is_said() -> None:
    message = (
        r"losses.0 \(pkd\): `pairs: auto`: the feature maps have no stride in common: the student "
        r"YolosForObjectDetection \[16\], the teacher DetrForObjectDetection \[32\]: name the layers yourself, "
        "acamkd inspect RECIPE lists"
    )
    with pytest.raises(AcamkdError, match=message):
        build_distiller(network("yolos", student=True), network("detr"), [Loss(name="pkd", pairs="auto")])
