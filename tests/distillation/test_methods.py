from __future__ import annotations

import inspect
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from acamkd.config import Loss, Model
from acamkd.distillation.build import build_distiller
from acamkd.distillation.distiller import Distiller
from acamkd.distillation.methods import METHODS, describe, find, options
from acamkd.distillation.schedule import WeightSchedule
from acamkd.distillation.taps import probe
from acamkd.errors import AcamkdError
from acamkd.losses import ACAM, DistillationContext, FeatureLoss, FitNet, FreeKD, HeadLoss, MasKD
from acamkd.losses.acam.masks import ASCM
from acamkd.losses.maskd import TokenMasks
from acamkd.models import Task, TaskModel, build

SECTIONS: dict[Task, dict[str, Any]] = {
    "detection": {"arch": "retinanet", "backbone": "mobilenetv3_small_050"},
    "segmentation": {"arch": "fpn", "backbone": "tu-mobilenetv3_small_050"},
}


def network(task: Task, **settings: Any) -> TaskModel:
    torch.manual_seed(0)
    return build(Model(**{**SECTIONS[task], "backbone_weights": None, **settings}), task, 3, (64, 64))


@pytest.fixture(scope="module")
def detectors() -> tuple[TaskModel, TaskModel]:
    return network("detection", fpn_channels=8), network("detection", fpn_channels=12)


@pytest.fixture(scope="module")
def segmenters() -> tuple[TaskModel, TaskModel]:
    widths = [
        {"decoder_pyramid_channels": width, "decoder_segmentation_channels": width, "decoder_dropout": 0.0}
        for width in (32, 64)
    ]
    return network("segmentation", options=widths[0]), network("segmentation", options=widths[1])


def entry(name: str, *pairs: Any, **settings: Any) -> Loss:
    return Loss(name=name, pairs=pairs, **settings)


def channels(distiller: Distiller) -> list[tuple[int, int]]:
    losses = [loss for loss in distiller.losses if isinstance(loss, FeatureLoss)]
    return [(loss.student_channels, loss.teacher_channels) for loss in losses]


def test_names_are_the_classes_names() -> None:
    assert {name: method.__name__.lower() for name, method in METHODS.items()} == {name: name for name in METHODS}
    assert list(METHODS) == sorted(METHODS)
    assert all(issubclass(method, (FeatureLoss, HeadLoss)) for method in METHODS.values())
    assert find("maskd") is MasKD


def test_an_unknown_method_lists_the_nearest() -> None:
    with pytest.raises(AcamkdError, match=r"there is no method 'acamkd'; did you mean acam"):
        find("acamkd")
    with pytest.raises(AcamkdError, match=r"there is no method 'zzz'; known: acam, at, cankd"):
        options("zzz")


def test_options_are_those_given_over_the_presets() -> None:
    assert options("acam") == {}
    assert options("fitnet", "fcos") == {"weight": 10.0, "align": True}
    assert options("fitnet", "fcos", {"weight": 2}) == {"weight": 2.0, "align": True}
    assert options("acam", "paper", {"num_masks": 3}) == {**ACAM.PRESETS["paper"], "num_masks": 3}
    assert options("acam", None, {"masks": "channel"}) == {"masks": "channel"}
    assert options("maskd", None, {"tokens": "t.safetensors", "custom_mask_after": None}) == {
        "tokens": "t.safetensors",
        "custom_mask_after": None,
    }


@pytest.mark.parametrize(
    ("name", "preset", "given", "message"),
    [
        ("acam", None, {"weigth": 1}, "acam has no option 'weigth'; did you mean weight"),
        ("acam", None, {"student_channels": 1}, "acam has no option 'student_channels'"),
        ("crosskd", None, {"temperature": 1}, "crosskd has no option 'temperature'; "),
        ("acam", None, {"num_masks": 2.5}, r"acam.num_masks: .*integer.* \(given: 2.5\)"),
        ("acam", None, {"num_masks": "6"}, r"acam.num_masks: .*integer.* \(given: '6'\)"),
        ("acam", None, {"num_masks": True}, r"acam.num_masks: .*integer.* \(given: True\)"),
        ("acam", None, {"weight": "1"}, r"acam.weight: .*number.* \(given: '1'\)"),
        ("acam", None, {"query": "pupil"}, r"acam.query: Input should be 'teacher' or 'student' \(given: 'pupil'\)"),
        ("acam", None, {"masks": "all"}, r"acam.masks: Input should be 'spatial', 'channel' or 'both'"),
        ("fitnet", None, {"align": 1}, r"fitnet.align: .*boolean.* \(given: 1\)"),
        ("maskd", None, {"tokens": 3}, r"maskd.tokens: .*string.* \(given: 3\)"),
        ("acam", None, {"a": 1, "num_masks": "x"}, "acam.num_masks.*; acam has no option 'a'"),
        ("acam", "papr", {}, "acam has no preset 'papr'; did you mean paper"),
        ("fgd", "yolo", {}, "fgd has no preset 'yolo'; known: faster_rcnn, fcos, gfl, reppoints, retinanet"),
    ],
)
def test_wrong_options_are_refused(name: str, preset: str | None, given: dict[str, Any], message: str) -> None:
    with pytest.raises(AcamkdError, match=message):
        options(name, preset, given)


@pytest.mark.parametrize("name", METHODS)
def test_presets_and_defaults_pass_their_own_check(name: str) -> None:
    method = METHODS[name]
    for preset, values in method.PRESETS.items():
        assert options(name, preset) == values
    defaults = {
        parameter.name: parameter.default
        for parameter in inspect.signature(method).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    assert "weight" in defaults
    assert options(name, None, defaults) == defaults


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_described(name: str) -> None:
    description = describe(name)
    assert description["name"] == name
    assert len(description["summary"]) > 30
    assert description["authors"]
    assert description["venue"].split()[-1].isdecimal()
    assert description["terms"]
    assert {option["name"] for option in description["options"]} >= {"weight"}
    for option in description["options"]:
        assert option["help"]
        assert option["type"]
    assert set(description["presets"]) == set(METHODS[name].PRESETS)


def test_a_description_by_hand() -> None:
    description = describe("fitnet")
    assert description["paper"] == "Romero et al., FitNets: Hints for Thin Deep Nets, ICLR 2015"
    assert (description["authors"], description["venue"]) == ("Romero et al.", "ICLR 2015")
    assert (description["terms"], description["parameters"], description["needs"]) == (["feature"], 0, [])
    weight, distance, align = description["options"]
    assert (weight["name"], weight["type"], weight["default"]) == ("weight", "float", 1.0)
    assert (distance["name"], distance["type"]) == ("distance", "mse | l1 | smooth_l1")
    assert (align["name"], align["type"], align["default"]) == ("align", "bool", False)
    acam = describe("acam")
    assert acam["parameters"] == 2 * (128 * 256 + 128) + 256 * 256 + 256 + 6 * 256
    assert acam["terms"] == ["diversity", "spatial", "spatial_selection"]
    assert acam["needs"] == ["task_gradient"]
    by_name = {option["name"]: option["type"] for option in acam["options"]}
    assert by_name["query"] == "teacher | student"
    assert by_name["tokens"] == "str | none"
    assert describe("fgd")["needs"] == ["boxes", "input_size"]
    assert describe("maskd")["needs"] == ["learned tokens"]


def test_a_star_stands_for_every_level(
    detectors: tuple[TaskModel, TaskModel], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="acamkd"):
        distiller = build_distiller(*detectors, [entry("fitnet", "backbone:*", weight=2)])
    names = [f"backbone:{level}" for level in ("0", "1", "2", "p6", "p7")]
    assert distiller.pairs == [(name, name) for name in names]
    assert channels(distiller) == [(8, 12)] * 5
    assert [loss.weight for loss in distiller.losses] == [2.0] * 5
    assert caplog.messages[0] == "fitnet: backbone:0 [8, 8, 8] <- backbone:0 [12, 8, 8]"


def test_coarse_levels_may_count_less(detectors: tuple[TaskModel, TaskModel]) -> None:
    pyramid = entry("pkd", "backbone:*", weight=2, level_decay=0.5)
    # Sides of 8, 4, 2, 1 and 1 locations: the side halves three times.
    assert [loss.weight for loss in build_distiller(*detectors, [pyramid]).losses] == [2, 1, 0.5, 0.25, 0.25]
    acam = entry("acam", "backbone:0", "backbone:1", preset="paper", level_decay=0.25)
    assert [loss.factors for loss in build_distiller(*detectors, [acam]).losses] == [
        {"weight": 1.0, "diversity_weight": 1.0},
        {"weight": 0.25, "diversity_weight": 0.25},  # its gradient reaches the student too, as the masks are `joint`
    ]
    heads = entry("crosskd", preset="fcos", level_decay=0.5)
    with pytest.raises(AcamkdError, match="level_decay is for methods that compare pairs of layers: leave it out"):
        build_distiller(*detectors, [heads])


def test_layers_may_have_two_names(segmenters: tuple[TaskModel, TaskModel]) -> None:
    entries = [
        entry("pkd", ("encoder.model.conv_stem", "segmentation_head.0"), "decoder"),
        entry("acam", "segmentation_head.0", preset="paper", ramp_epochs=0.5, stop_epoch=1.5),
    ]
    distiller = build_distiller(*segmenters, entries)
    assert distiller.pairs == [
        ("encoder.model.conv_stem", "segmentation_head.0"), ("decoder", "decoder"),
        ("segmentation_head.0", "segmentation_head.0"),
    ]  # fmt: skip
    assert channels(distiller) == [(16, 3), (32, 64), (3, 3)]
    acam = distiller.losses[2]
    assert isinstance(acam, ACAM)
    assert acam.diversity == "literal"
    schedule = distiller.schedules[2]
    assert isinstance(schedule, WeightSchedule)
    schedule.steps_per_epoch = 10
    assert [schedule(step) for step in (0, 4, 14, 15)] == [0.2, 1, 1, 0]
    assert [distiller.schedules[0](step) for step in (0, 99)] == [1, 1]


def test_building_leaves_the_networks_as_they_were(segmenters: tuple[TaskModel, TaskModel]) -> None:
    student, teacher = segmenters
    student.train()
    frozen = next(module for module in student.modules() if isinstance(module, nn.BatchNorm2d)).eval()
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    build_distiller(student, teacher, [entry("fitnet", "segmentation_head.0")])
    assert student.training
    assert [module for module in student.modules() if not module.training] == [frozen]
    assert not teacher.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())


def test_probe_gives_maps(detectors: tuple[TaskModel, TaskModel]) -> None:
    student = detectors[0]
    maps = probe(student, ["backbone:0", "backbone:2"], student.prepare([torch.rand(3, 64, 64)]))
    assert {name: tuple(x.shape) for name, x in maps.items()} == {
        "backbone:0": (1, 8, 8, 8),
        "backbone:2": (1, 8, 2, 2),
    }


@pytest.mark.parametrize(
    ("task", "wrong", "message"),
    [
        ("detection", entry("fitnet"), r"losses.1 \(fitnet\): `pairs` is missing: set it to auto, or name"),
        (
            "detection",
            entry("fitnet", "backbnoe:*"),
            r"losses.1 \(fitnet\): student: there is no layer 'backbnoe' to tap",
        ),
        ("detection", entry("fitnet", "backbone:9"), r"losses.1 \(fitnet\): student: the tap backbone:9 did not fire"),
        (
            "detection",
            entry("fitnet", ("backbone:*", "backbone:0")),
            r"losses.1 \(fitnet\): backbone:\* stands for 5 outputs of the student, backbone:0 for 1 of the teacher",
        ),
        (
            "detection",
            entry("fitnet", "head:cls_logits"),
            r"student: head:cls_logits is \(1, \d+, 4\), not a feature map",
        ),
        (
            "detection",
            entry("fitent", "backbone:*"),
            r"losses.1 \(fitent\): there is no method 'fitent'; did you mean fit",
        ),
        ("detection", entry("pkd", "backbone:*", temperature=1), r"losses.1 \(pkd\): pkd has no option 'temperature'"),
        (
            "detection",
            entry("acam", "backbone:*", num_masks=0),
            r"losses.1 \(acam\): num_masks must be at least 1",
        ),
        ("detection", entry("pkd", "backbone:*", preset="x"), r"losses.1 \(pkd\): pkd has no preset 'x'"),
        ("detection", entry("crosskd", layer=9), r"losses.1 \(crosskd\): CrossKD"),
        ("segmentation", entry("fgd", "segmentation_head.0"), r"losses.1 \(fgd\): this method needs boxes, and segm"),
        ("segmentation", entry("crosskd"), r"losses.1 \(crosskd\): CrossKD needs .* RetinaNet"),
    ],
    ids=lambda value: value.name if isinstance(value, Loss) else "",
)
def test_entries_that_do_not_fit_are_named(
    task: Task,
    wrong: Loss,
    message: str,
    detectors: tuple[TaskModel, TaskModel],
    segmenters: tuple[TaskModel, TaskModel],
) -> None:
    right = entry("at", {"detection": "backbone:0", "segmentation": "segmentation_head.0"}[task])
    with pytest.raises(AcamkdError, match=message):
        build_distiller(*(detectors if task == "detection" else segmenters), [right, wrong])


def test_head_losses_need_no_pairs(detectors: tuple[TaskModel, TaskModel], caplog: pytest.LogCaptureFixture) -> None:
    student = detectors[0]
    distiller = build_distiller(student, student, [entry("crosskd", preset="retinanet", weight=2)])
    assert distiller.pairs == [None]
    assert distiller.losses[0].weight == 2
    assert not caplog.messages
    build_distiller(student, student, [entry("crosskd", "backbone:0")])
    assert caplog.messages == ["crosskd works on the heads and names its layers itself: `pairs` is not used"]


def test_a_weight_that_is_measured_needs_images(detectors: tuple[TaskModel, TaskModel]) -> None:
    said = (
        r"losses\.0 \(pkd\): `weight: auto` needs images: `acamkd\.distillation\.auto_weight\.calibrate` makes it a nu"
    )
    with pytest.raises(AcamkdError, match=said):
        build_distiller(*detectors, [entry("pkd", "backbone:0", weight="auto")])


def write_tokens(path: Path, layers: dict[str, dict[str, Tensor]]) -> str:
    save_file({f"{layer}/{name}": x.contiguous() for layer, state in layers.items() for name, x in state.items()}, path)
    return str(path)


def test_tokens_reach_their_levels(
    tmp_path: Path, detectors: tuple[TaskModel, TaskModel], caplog: pytest.LogCaptureFixture
) -> None:
    levels = ("backbone:0", "backbone:1")
    maskd = {level: TokenMasks(12, 6, weighted=True).state_dict() for level in levels}
    acam = {level: ASCM(12, 6).state_dict() for level in levels}
    entries = [
        entry("maskd", *levels, tokens=write_tokens(tmp_path / "maskd.safetensors", maskd)),
        entry(
            "acam", *levels, masks="both", mask_source="fixed", tokens=write_tokens(tmp_path / "acam.safetensors", acam)
        ),
    ]
    distiller = build_distiller(*detectors, entries)
    assert "untrained" not in caplog.text
    for loss, (student_layer, _) in zip(distiller.losses, distiller.pairs, strict=True):  # type: ignore[misc]
        assert isinstance(loss, (MasKD, ACAM))
        given = (maskd if isinstance(loss, MasKD) else acam)[student_layer]
        held = (loss.token_module if isinstance(loss, MasKD) else loss.selection).state_dict()
        assert set(held) == set(given)
        assert all(torch.equal(held[name], given[name]) for name in given)
    assert not torch.equal(maskd[levels[0]]["tokens"], maskd[levels[1]]["tokens"])


def test_tokens_of_another_layer_or_form_are_refused(tmp_path: Path, detectors: tuple[TaskModel, TaskModel]) -> None:
    path = write_tokens(tmp_path / "tokens.safetensors", {"backbone:0": {"tokens": torch.zeros(6, 12)}})
    with pytest.raises(
        AcamkdError, match="the tokens file has none for the teacher's layer backbone:1, only for backb"
    ):
        build_distiller(*detectors, [entry("maskd", "backbone:1", weighted=False, tokens=path)])
    with pytest.raises(
        AcamkdError, match=r"losses.0 \(maskd\): the tokens given are \{'tokens': \(6, 12\)\}, but must"
    ):
        build_distiller(*detectors, [entry("maskd", "backbone:0", weighted=False, num_tokens=4, tokens=path)])
    with pytest.raises(AcamkdError, match=r"losses.0 \(acam\): tokens belong to mask_source='fixed'"):
        build_distiller(*detectors, [entry("acam", "backbone:0", tokens=path)])
    with pytest.raises(AcamkdError, match=r"losses.0 \(freekd\): weights .*none.safetensors: there is no such file"):
        build_distiller(*detectors, [entry("freekd", "backbone:0", tokens=str(tmp_path / "none.safetensors"))])


def test_without_tokens_the_log_warns(detectors: tuple[TaskModel, TaskModel], caplog: pytest.LogCaptureFixture) -> None:
    distiller = build_distiller(*detectors, [entry("freekd", "backbone:0"), entry("fitnet", "backbone:0")])
    assert [type(loss) for loss in distiller.losses] == [FreeKD, FitNet]
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
        "FrequencyTokens are untrained: no `tokens` were given. Learn them first: acamkd tokens RECIPE"
    ]


@pytest.mark.parametrize(
    ("task", "loss", "message"),
    [
        (
            "detection",
            entry("crosskd"),
            r"losses\.0 \(crosskd\): it compares heads, but the teacher has 5 classes of its",
        ),
        (
            "detection",
            entry("pkd", "head.classification_head.cls_logits@1"),
            r"the channels of .*cls_logits@1 are class",
        ),
        (
            "segmentation",
            entry("cwd", "segmentation_head.0"),
            r"segmentation_head\.0 are classes, .* and the student 3: c",
        ),
        ("detection", entry("pkd", "backbone:*"), None),
        ("detection", entry("fgd", "backbone:*"), None),
        ("segmentation", entry("acam", "encoder:4", mask_grad="look_ahead"), None),
    ],
)
def test_a_teacher_of_other_classes_gives_features_only(task: Task, loss: Loss, message: str | None) -> None:
    student, teacher = network(task), network(task, num_classes=5)
    assert (student.num_classes, teacher.num_classes) == (3, 5)
    if message is None:
        assert build_distiller(student, teacher, [loss]).losses
        return
    with pytest.raises(AcamkdError, match=message):
        build_distiller(student, teacher, [loss])


class Plain(FeatureLoss):
    """Says nothing of itself but this line."""

    def __init__(self, student_channels: int, teacher_channels: int, *, factor: float = 1.0) -> None:
        super().__init__(student_channels, teacher_channels)
        self.factor = factor

    def terms(self, student: Tensor, teacher: Tensor, context: DistillationContext) -> dict[str, Tensor]:
        return {"size": self.factor * student.square().mean()}


class Untyped(Plain):
    """An option without a type."""

    def __init__(self, student_channels, teacher_channels, *, factor=1.0):  # type: ignore[no-untyped-def]
        super().__init__(student_channels, teacher_channels, factor=factor)


def test_a_method_of_ones_own_may_be_terse_but_has_types() -> None:
    description = describe(f"{__name__}:Plain")
    assert (description["paper"], description["options"][0]["help"], description["terms"]) == ("", "", ["size"])
    message = r":Untyped: Untyped.__init__ gives no type for factor: annotate it"
    with pytest.raises(AcamkdError, match=message):
        options(f"{__name__}:Untyped", None, {"factor": 2.0})
