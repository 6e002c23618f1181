from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from acamkd.config import Model
from acamkd.distillation.audit import AUDITED_STEPS, _anywhere
from acamkd.distillation.distiller import Distiller, NonFiniteError
from acamkd.distillation.schedule import WeightSchedule
from acamkd.errors import AcamkdError
from acamkd.jobs.estimate import step_of
from acamkd.losses import ACAM, FGD, PKD, DistillationContext, FeatureLoss, FitNet, HeadLoss
from acamkd.losses.acam.statistics import WATCH_EVERY
from acamkd.models import Batch, Target, TaskModel, build


class Net(nn.Module):
    """stem -> body (batch norm) -> head; counts the head's runs."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.body = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True), nn.Conv2d(channels, channels, 1))
        self.head = nn.Conv2d(channels, 2, 1)
        self.head_runs = 0

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.body(self.stem(pixels))
        self.head_runs += 1
        return self.head(x)  # type: ignore[no-any-return]


class Tiny(TaskModel):
    """Segments noise."""

    task = "segmentation"
    net: Net

    def __init__(self, channels: int) -> None:
        super().__init__(Net(channels), 2, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

    def prepare(self, images: Sequence[Tensor], targets: Sequence[Target] | None = None) -> Batch:
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        return Batch(torch.stack(list(images)), sizes, sizes, None if targets is None else list(targets))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return {"out": self.net(self.normalize(batch))}

    def loss(self, outputs: Mapping[str, Any], batch: Batch) -> dict[str, Tensor]:
        return {"size": outputs["out"].square().mean(), "level": outputs["out"].mean().abs()}

    def decode(self, outputs: Mapping[str, Any], batch: Batch) -> list[dict[str, Tensor]]:
        return [{"mask": logits.argmax(dim=0)} for logits in outputs["out"]]


class Constant(FeatureLoss):
    """Factor times the student's map of a step; None: no gradient; counts its calls."""

    def __init__(self, value: Any) -> None:
        super().__init__(4, 6)
        self.value = value
        self.seen: list[DistillationContext] = []

    def terms(self, student: Tensor, teacher: Tensor, context: DistillationContext) -> dict[str, Tensor]:
        self.seen.append(context)
        value = self.value(context.step) if callable(self.value) else self.value
        return {"value": (student * value).abs().sum()}


class Heads(HeadLoss):
    """Compares what both heads put out."""

    TERMS = ("logits",)

    def layers(self, student: TaskModel, teacher: TaskModel) -> tuple[list[str], list[str]]:
        return ["head"], ["head", "stem"]

    def forward(
        self,
        student: TaskModel,
        teacher: TaskModel,
        student_taps: Mapping[str, Tensor],
        teacher_taps: Mapping[str, Tensor],
        batch: Batch,
        context: DistillationContext,
    ) -> dict[str, Tensor]:
        assert {"head", "stem"} <= set(teacher_taps)
        return {"logits": F.mse_loss(student_taps["head"], teacher_taps["head"])}


@pytest.fixture
def student() -> Tiny:
    return Tiny(4)


@pytest.fixture
def teacher() -> Tiny:
    return Tiny(6)


@pytest.fixture
def batch(student: Tiny) -> Batch:
    return student.prepare([torch.rand(3, 6, 5) for _ in range(2)])


BODY = ("body", "body")


def test_the_teacher_is_no_part_of_the_distiller(student: Tiny, teacher: Tiny) -> None:
    distiller = Distiller(student, teacher, [BODY], [FitNet(4, 6)])
    of_teacher = {id(parameter) for parameter in teacher.parameters()}
    assert not of_teacher & {id(parameter) for parameter in distiller.parameters()}
    assert {name.partition(".")[0] for name in distiller.state_dict()} == {"student", "losses"}
    assert {name for name, _ in distiller.named_parameters() if name.startswith("losses")} == {
        "losses.0.align.weight",
        "losses.0.align.bias",
    }
    distiller.train()
    assert distiller.student.training
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    distiller.to(torch.float64)
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.float64}
    assert teacher.mean.dtype == torch.float64
    assert distiller.teacher is teacher


def test_the_teacher_is_unchanged_by_training_and_gets_no_gradient(student: Tiny, teacher: Tiny, batch: Batch) -> None:
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    distiller = Distiller(student, teacher, [BODY], [ACAM(4, 6, masks="both")]).train()
    torch.stack(list(distiller(batch).values())).sum().backward()  # type: ignore[no-untyped-call]
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in distiller.parameters())


def test_the_teachers_forward_ends_at_the_last_tapped_layer(student: Tiny, teacher: Tiny, batch: Batch) -> None:
    distiller = Distiller(student, teacher, [BODY], [FitNet(4, 6)])
    distiller(batch, 0)
    assert (student.net.head_runs, teacher.net.head_runs) == (1, 1)  # looks once for layers that run again
    distiller(batch, 1)
    assert (student.net.head_runs, teacher.net.head_runs) == (2, 1)


def test_a_teachers_layer_that_runs_again_behind_the_last_tapped_one_is_named(
    student: Tiny, teacher: Tiny, batch: Batch
) -> None:
    class Twice(Net):
        def forward(self, pixels: Tensor) -> Tensor:
            return self.head(self.body(self.body(self.stem(pixels))))  # type: ignore[no-any-return]

    teacher.net = Twice(6)
    with pytest.raises(AcamkdError, match=r"the layer body ran 2 times in one forward: name one call \(body@0 "):
        Distiller(student, teacher, [BODY], [FitNet(4, 6)])(batch)
    distiller = Distiller(student, teacher, [("body", "body@0")], [FitNet(4, 6)])
    assert len(distiller(batch)) == 3


def test_what_a_loss_refuses_names_it(student: Tiny, teacher: Tiny) -> None:
    batch = student.prepare([torch.rand(3, 1, 1)])
    with pytest.raises(AcamkdError, match=r"^body/pkd: a feature map of \(1, 6, 1, 1\) has a single value"):
        Distiller(student.eval(), teacher, [BODY], [PKD(4, 6)])(batch)


def test_terms_are_those_of_the_task_and_of_the_losses(student: Tiny, teacher: Tiny, batch: Batch) -> None:
    losses = [FitNet(4, 6, weight=2.0), PKD(4, 6, weight=3.0)]
    distiller = Distiller(student, teacher, [("stem", "body"), BODY], losses).eval()
    terms = distiller(batch)
    with torch.no_grad():
        stem, logits = student.net.stem(batch.pixels), student(batch)
        body, of_teacher = student.net.body(stem.clone()), teacher.net.body(teacher.net.stem(batch.pixels))
        expected = {
            "task/size": logits["out"].square().mean(),
            "task/level": logits["out"].mean().abs(),
            "stem/fitnet/feature": losses[0](stem, of_teacher)["feature"],
            "body/pkd/correlation": losses[1](body, of_teacher)["correlation"],
        }
    assert list(terms) == list(expected)
    for name, term in terms.items():
        torch.testing.assert_close(term, expected[name])


def test_statistics_have_the_losses_names(student: Tiny, teacher: Tiny, batch: Batch) -> None:
    distiller = Distiller(student, teacher, [BODY, None], [ACAM(4, 6, masks="spatial"), Heads()])
    assert distiller.statistics() == {}
    distiller(batch)
    figures = ("mask", "mask_std", "mask_entropy", "mask_overlap", "mask_correlation", "mask_weight_std")
    assert list(distiller.statistics()) == [f"body/acam/spatial_{figure}" for figure in figures]
    assert 0 < distiller.statistics()["body/acam/spatial_mask"].item() < 1


def test_schedule() -> None:
    assert [WeightSchedule()(step) for step in (0, 9)] == [1, 1]
    assert [WeightSchedule(4)(step) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert [WeightSchedule(2, 3)(step) for step in range(5)] == [0.5, 1, 1, 0, 0]


def test_weights_follow_their_schedules(student: Tiny, teacher: Tiny, batch: Batch) -> None:
    losses = [FitNet(4, 6), PKD(4, 6)]
    distiller = Distiller(student, teacher, [BODY, BODY], losses, [WeightSchedule(4), WeightSchedule(0, 2)]).eval()
    full = distiller(batch, 100)["body/fitnet/feature"].item()
    for step in range(4):
        terms = distiller(batch, step)
        assert terms["body/fitnet/feature"].item() == pytest.approx(full * (step + 1) / 4)
        assert ("body/pkd/correlation" in terms) == (step < 2)


def test_after_the_last_stop_the_teacher_rests(student: Tiny, teacher: Tiny, batch: Batch) -> None:
    runs = []
    teacher.net.stem.register_forward_hook(lambda *_: runs.append(1))
    distiller = Distiller(student, teacher, [BODY], [FitNet(4, 6)], [WeightSchedule(0, 2)])
    assert [len(distiller(batch, step)) for step in range(4)] == [3, 3, 2, 2]
    assert len(runs) == 2


def test_the_context_is_the_batchs(student: Tiny, teacher: Tiny) -> None:
    images = [torch.rand(3, 6, 5) for _ in range(2)]
    boxes = [{"boxes": torch.ones(2, 4), "iscrowd": torch.tensor([0, 1])}, {"boxes": torch.ones(0, 4)}]
    loss = Constant(1.0)
    distiller = Distiller(student, teacher, [BODY], [loss])
    distiller(student.prepare(images, boxes), 8)
    loss.needs = frozenset({"boxes"})
    distiller(student.prepare(images, boxes), 7)
    without, with_boxes = loss.seen
    assert (with_boxes.step, with_boxes.input_size) == (7, (6, 5))
    assert with_boxes.boxes is not None
    assert [len(each) for each in with_boxes.boxes] == [1, 0]
    assert (without.step, without.boxes) == (8, None)


def test_a_loss_that_needs_boxes_says_so(student: Tiny, teacher: Tiny, batch: Batch) -> None:
    with pytest.raises(ValueError, match="FGD needs boxes in the DistillationContext"):
        Distiller(student, teacher, [BODY], [FGD(4, 6)])(batch)


def test_head_losses_name_their_layers(student: Tiny, teacher: Tiny, batch: Batch) -> None:
    distiller = Distiller(student, teacher, [None, BODY], [Heads(), FitNet(4, 6)]).eval()
    terms = distiller(batch)
    assert list(terms) == ["task/size", "task/level", "head/heads/logits", "body/fitnet/feature"]
    expected = F.mse_loss(student(batch)["out"], teacher(batch)["out"])
    torch.testing.assert_close(terms["head/heads/logits"], expected)


def test_without_a_teacher_the_student_trains_alone(student: Tiny, batch: Batch) -> None:
    distiller = Distiller(student)
    for step in range(AUDITED_STEPS + 1):
        assert list(distiller(batch, step)) == ["task/size", "task/level"]
    with pytest.raises(AcamkdError, match="has no teacher: it trains the baseline"):
        distiller.teacher  # noqa: B018
    distiller.to(torch.float64)


def test_what_cannot_be_is_refused(student: Tiny, teacher: Tiny, batch: Batch) -> None:
    with pytest.raises(AcamkdError, match="one loss per pair of layers, not 1 for 2"):
        Distiller(student, teacher, [BODY, BODY], [FitNet(4, 6)])
    with pytest.raises(AcamkdError, match="distillation losses need a teacher"):
        Distiller(student, None, [BODY], [FitNet(4, 6)])
    with pytest.raises(AcamkdError, match=r"the same method stands twice at one layer: body/fitnet$"):
        Distiller(student, teacher, [BODY, BODY, BODY], [FitNet(4, 6), FitNet(4, 6), PKD(4, 6)])
    with pytest.raises(AcamkdError, match=r"there is no layer 'bdy' to tap .*did you mean body"):
        Distiller(student, teacher, [("bdy", "body")], [FitNet(4, 6)])(batch)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_term_that_is_not_finite_stops_the_run(value: float, student: Tiny, teacher: Tiny, batch: Batch) -> None:
    distiller = Distiller(student, teacher, [BODY], [Constant(lambda step: 1.0 if step < 3 else value)])
    distiller(batch, 2)
    message = rf"step 3: the loss is not finite, body/constant/value is {value}: lower"
    with pytest.raises(NonFiniteError, match=message) as caught:
        distiller(batch, 3)
    assert set(caught.value.terms) == {"task/size", "task/level", "body/constant/value"}
    assert all(term.requires_grad for term in caught.value.terms.values())
    with torch.no_grad():
        student.net.head.weight.fill_(value)
    with pytest.raises(AcamkdError, match=r"step 4: the loss is not finite, task/size is .*, task/level is "):
        distiller(batch, 4)


def train(distiller: Distiller, batch: Batch, steps: int = AUDITED_STEPS) -> None:
    distiller.train()
    for step in range(steps):
        distiller(batch, step)


def test_audit_a_distillation_of_zero_is_an_error(student: Tiny, teacher: Tiny, batch: Batch) -> None:
    distiller = Distiller(student, teacher, [BODY], [Constant(0.0)])
    train(distiller, batch, AUDITED_STEPS - 1)
    with pytest.raises(AcamkdError, match="the distillation total was exactly 0 in each of the first 20 steps"):
        distiller(batch)


def test_audit_takes_the_batches_that_a_step_accumulates_for_one(student: Tiny, teacher: Tiny, batch: Batch) -> None:
    """A layer that starts at zero lets nothing through before the first step: residual networks begin so."""
    with torch.no_grad():
        last: Any = student.net.body[-1]
        last.weight.zero_()
        last.bias.zero_()
    distiller = Distiller(student, teacher, [BODY], [FitNet(4, 6)]).train()
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.01)
    for numbered in (True, False):  # a loop of one's own need not number its steps
        for step in range(3):
            for _ in range(AUDITED_STEPS + 5):
                torch.stack(list(distiller(batch, step if numbered else 0).values())).sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()


def test_audit_counts_steps_that_are_not_numbered(student: Tiny, teacher: Tiny, batch: Batch) -> None:
    distiller = Distiller(student, teacher, [BODY], [Constant(0.0)]).train()
    with pytest.raises(AcamkdError, match="exactly 0 in each of the first 20 steps"):  # noqa: PT012
        for _ in range(AUDITED_STEPS):
            distiller(batch)
            with torch.no_grad():
                student.net.head.weight.add_(0.0)


def test_audit_names_the_parameters_that_are_never_reached(student: Tiny, teacher: Tiny, batch: Batch) -> None:
    class Last(FeatureLoss):
        """Looks at one channel of the stem only."""

        def terms(self, student: Tensor, teacher: Tensor, context: DistillationContext) -> dict[str, Tensor]:
            return {"value": student.detach().sum() * 0 + student[:, :, :1].mul(0).sum() + 1 + 0 * teacher.sum()}

    distiller = Distiller(student, teacher, [BODY, ("body.0", "body.0")], [Constant(1.0), Last(4, 6)])
    train(distiller, batch)  # what one loss does not reach, the other does
    deaf = Distiller(Tiny(4), teacher, [BODY], [Last(4, 6)])
    train(deaf, batch, AUDITED_STEPS - 1)
    with pytest.raises(
        AcamkdError,
        match=r"no distillation gradient reached 6 student parameters below .*: "
        r"stem\.weight, stem\.bias, body\.0\.weight, body\.0\.bias, body\.2\.weight, \.\.\.; tap a layer behind",
    ):
        deaf(batch)


def test_audit_sees_what_a_schedule_or_float16_makes_too_small(student: Tiny, teacher: Tiny, batch: Batch) -> None:
    distiller = Distiller(student, teacher, [BODY], [FitNet(4, 6)], schedules=[lambda step: 1e-50])
    train(distiller, batch)
    assert distiller(batch, 3)["body/fitnet/feature"] == 0
    with torch.autocast(torch.get_default_device().type, torch.float16):
        train(Distiller(student, teacher, [BODY], [Constant(1e-8)]), batch)


def test_audit_is_not_content_with_what_is_not_finite(student: Tiny, teacher: Tiny, batch: Batch) -> None:
    distiller = Distiller(student, teacher, [BODY], [Constant(lambda step: 0.0 if step else torch.nan)]).train()
    with pytest.raises(NonFiniteError):
        distiller(batch, 0)
    for step in range(1, AUDITED_STEPS - 1):
        distiller(batch, step)
    with pytest.raises(AcamkdError, match="the distillation total was exactly 0 in each of the first 20 steps"):
        distiller(batch, AUDITED_STEPS)


def test_audit_warns_of_a_single_loss_that_stays_zero_or_compares_a_frozen_layer(
    student: Tiny, teacher: Tiny, batch: Batch, caplog: pytest.LogCaptureFixture
) -> None:
    student.net.stem.requires_grad_(False)
    pairs, losses = [BODY, BODY, ("stem", "stem")], [Constant(0.0), FitNet(4, 6), FitNet(4, 6)]
    train(Distiller(student, teacher, pairs, losses), batch)
    assert caplog.messages == [
        "no trainable student parameter lies below stem: nothing can be distilled there",
        "in each of the first 20 steps body/constant was exactly 0: check that teacher and student differ and that the "
        "loss weights are not 0",
    ]


def test_audit_comes_to_the_same_in_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    assert _anywhere([True, False, False], device) == [True, False, False]

    def reduce(found: Tensor, operation: Any) -> None:
        assert operation is distributed.ReduceOp.MAX
        found.copy_(found.maximum(torch.tensor([0, 1, 0])))  # of another process

    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "all_reduce", reduce)
    assert _anywhere([True, False, False], device) == [True, True, False]


def test_audit_is_content_with_a_gradient_in_a_later_step(student: Tiny, teacher: Tiny, batch: Batch) -> None:
    train(Distiller(student, teacher, [BODY], [Constant(lambda step: float(step == 15))]), batch, AUDITED_STEPS + 5)


def test_audit_ignores_what_lies_behind_the_taps_and_what_is_frozen(student: Tiny, teacher: Tiny, batch: Batch) -> None:
    student.net.stem.requires_grad_(False)
    train(Distiller(student, teacher, [BODY], [FitNet(4, 6)]), batch)
    student.net.body.requires_grad_(False)
    message = "no trainable student parameter lies below body: nothing can be distilled"
    for loss in (FitNet(4, 6), ACAM(4, 6)):
        with pytest.raises(AcamkdError, match=message):
            train(Distiller(student, teacher, [BODY], [loss]), batch, 1)


def test_audit_waits_while_evaluating(student: Tiny, teacher: Tiny, batch: Batch) -> None:
    distiller = Distiller(student, teacher, [BODY], [Constant(0.0)]).eval()
    for step in range(AUDITED_STEPS + 1):
        distiller(batch, step)


def test_audit_leaves_the_training_gradient_alone(student: Tiny, teacher: Tiny, batch: Batch) -> None:
    distiller = Distiller(student, teacher, [BODY], [FitNet(4, 6)])
    distiller.student.eval()  # the same statistics twice
    gradients = []
    for training in (True, False):
        distiller.training = training
        distiller.zero_grad()
        torch.stack(list(distiller(batch).values())).sum().backward()  # type: ignore[no-untyped-call]
        gradients.append([parameter.grad for parameter in distiller.parameters()])
    torch.testing.assert_close(*gradients)


def test_masks_that_learn_from_the_teachers_own_loss(student: Tiny, teacher: Tiny, batch: Batch) -> None:
    loss = ACAM(4, 6, masks="both", mask_grad="task")
    distiller = Distiller(student, teacher, [BODY], [loss]).eval()
    terms = distiller(batch)
    assert teacher.net.head_runs == 1
    of_teacher = teacher.net.body(teacher.net.stem(batch.pixels))
    seen = loss.masked(student.net.body(student.net.stem(batch.pixels)), of_teacher)
    for name, term in teacher.loss({"out": teacher.net.head(seen)}, batch).items():
        torch.testing.assert_close(terms[f"teacher/{name}"], term)
    torch.stack([term for name, term in terms.items() if name.startswith("teacher/")]).sum().backward()  # type: ignore[no-untyped-call]
    reached = {name for name, parameter in distiller.named_parameters() if parameter.grad is not None}
    assert reached == {f"losses.0.{name}" for name, _ in loss.named_parameters() if not name.startswith("align")}
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_look_ahead_masks_see_the_task_gradient_at_the_students_map(
    student: Tiny, teacher: Tiny, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = ACAM(4, 6, mask_grad="look_ahead")
    seen: list[DistillationContext] = []
    terms = loss.terms

    def watched(s: Tensor, t: Tensor, context: DistillationContext) -> dict[str, Tensor]:
        seen.append(context)
        return terms(s, t, context)

    monkeypatch.setattr(loss, "terms", watched)
    Distiller(student, teacher, [BODY], [loss])(batch)
    features = student.net.body(student.net.stem(batch.pixels)).detach().requires_grad_()
    task = student.loss({"out": student.net.head(features)}, batch)
    (expected,) = torch.autograd.grad(torch.stack(list(task.values())).sum(), features)
    assert seen[0].task_gradient is not None
    torch.testing.assert_close(seen[0].task_gradient, expected)


SECTIONS: dict[str, dict[str, Any]] = {
    "segmentation": {"arch": "fpn", "backbone": "tu-mobilenetv3_small_050"},
    "detection": {"arch": "retinanet", "backbone": "mobilenetv3_small_050", "fpn_channels": 16},
}

LEVELS: dict[str, Any] = {"segmentation": [("segmentation_head.0",) * 2], "detection": [("backbone:0",) * 2]}


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_with_real_networks(task: Any) -> None:
    section = Model(backbone_weights=None, **SECTIONS[task])
    student, teacher = build(section, task, 3, (64, 64)), build(section, task, 3, (64, 64))
    images = [torch.rand(3, 64, 64) for _ in range(2)]
    target = (
        {"mask": torch.zeros(64, 64, dtype=torch.long)}
        if task == "segmentation"
        else {
            "boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]),
            "labels": torch.ones(1).long(),
            "iscrowd": torch.zeros(1),
        }
    )
    channels = {"segmentation": 3, "detection": 16}[task]
    distiller = Distiller(student, teacher, LEVELS[task], [ACAM(channels, channels)]).train()
    terms = distiller(student.prepare(images, [target, target]))
    own = f"{LEVELS[task][0][0]}/acam"
    assert {name for name in terms if not name.startswith("task/")} == {
        f"{own}/{term}" for term in ("spatial", "spatial_selection", "diversity")
    }
    torch.stack([term for name, term in terms.items() if name.startswith(own)]).sum().backward()  # type: ignore[no-untyped-call]
    stem = next(student.backbone.parameters())
    assert stem.grad is not None
    assert stem.grad.any()
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("pairs", [[("body.0", "body.0")], [("body", "body"), ("body@0", "body@0")]])
def test_looking_ahead_before_an_operation_in_place_and_at_a_map_of_two_names(
    pairs: list[tuple[str, str]], student: Tiny, teacher: Tiny, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    distiller = Distiller(student, teacher, pairs, [ACAM(4, 6, masks="both") for _ in pairs]).eval()

    def gradients() -> list[Tensor]:
        student.zero_grad()
        torch.stack(list(distiller(batch).values())).sum().backward()  # type: ignore[no-untyped-call]
        return [parameter.grad.clone() for parameter in student.parameters() if parameter.grad is not None]

    found = gradients()
    monkeypatch.setattr("acamkd.distillation.distiller.split_backward", backward_twice)
    torch.testing.assert_close(found, gradients())


def test_factors_of_the_tasks_terms_are_looked_at_until_the_audit_has_ended(
    student: Tiny, teacher: Tiny, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    distiller = Distiller(student, teacher, [("body", "body")], [ACAM(4, 6)]).train()
    looks: list[Tensor] = []
    close = torch.allclose

    def looking(input: Tensor, other: Tensor, **options: Any) -> bool:
        looks.append(input)
        return close(input, other, **options)

    monkeypatch.setattr(torch, "allclose", looking)
    for step in range(AUDITED_STEPS + 3):
        torch.stack(list(distiller(batch, step).values())).sum().backward()  # type: ignore[no-untyped-call]
        if distiller._audit.has_ended:
            break
    before = len(looks)
    assert before == step + 1
    torch.stack(list(distiller(batch, step + 1).values())).sum().backward()  # type: ignore[no-untyped-call]
    assert len(looks) == before  # each look waits for a GPU


def backward_twice(
    terms: dict[str, Tensor], maps: list[Tensor], _: Any, *, check: bool
) -> tuple[list[Tensor], dict[str, Tensor]]:
    total = torch.stack(list(terms.values())).sum()
    return list(torch.autograd.grad(total, maps, retain_graph=True)), terms


@pytest.mark.parametrize("arch", ["retinanet", "fcos"])
def test_looking_ahead_repeats_no_work_of_a_detectors_heads_and_changes_no_gradient(
    arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = Model(arch=arch, backbone="mobilenetv3_small_050", backbone_weights=None, fpn_channels=64)
    student, teacher = build(section, "detection", 3, (64, 64)), build(section, "detection", 3, (64, 64))
    target = {
        "boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]),
        "labels": torch.ones(1).long(),
        "iscrowd": torch.zeros(1),
    }
    batch = student.prepare([torch.rand(3, 64, 64) for _ in range(2)], [target, target])
    levels = [f"backbone:{level}" for level in ("0", "1", "2", "p6", "p7")]
    pairs = [(level, level) for level in levels]

    def distiller(mask_grad: str) -> Distiller:
        torch.manual_seed(0)
        losses = [ACAM(64, 64, masks="both", mask_grad=mask_grad) for _ in levels]  # type: ignore[arg-type]
        whole = Distiller(student, teacher, pairs, losses).train()
        whole.training = False  # without the watch over the first steps, which costs a backward
        return whole

    def gradients() -> list[Tensor]:
        student.zero_grad()
        torch.stack(list(distiller("look_ahead")(batch).values())).sum().backward()  # type: ignore[no-untyped-call]
        return [parameter.grad.clone() for parameter in student.parameters() if parameter.grad is not None]

    found = gradients()
    once, detached = (step_of(distiller(mask_grad), batch)[0] for mask_grad in ("look_ahead", "detached"))
    monkeypatch.setattr("acamkd.distillation.distiller.split_backward", backward_twice)
    torch.testing.assert_close(found, gradients(), rtol=1e-3, atol=1e-6)
    assert step_of(distiller("look_ahead"), batch)[0] > 1.04 * once
    assert once == pytest.approx(detached, rel=0.01)


def test_unlabeled_images_are_compared_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    student, teacher = Tiny(4), Tiny(6)
    fgd, cwd, heads = FGD(4, 6), PKD(4, 6), Heads()
    pairs = [("body", "body"), ("stem", "stem"), None]
    distiller = Distiller(student, teacher, pairs, [fgd, cwd, heads])
    batch = student.prepare(torch.rand(2, 3, 8, 8))  # type: ignore[arg-type]
    terms = distiller(batch, labeled=False)
    assert list(terms) == ["stem/pkd/correlation"]
    assert student.net.head_runs == 0  # the student, too, ends at its last tapped layer
    gradient = torch.autograd.grad(terms["stem/pkd/correlation"], student.net.stem.weight)[0]
    assert gradient.count_nonzero() > 0
    distiller.check_unlabeled()
    assert caplog.messages[-1] == ("these losses need targets and see the labeled images only: body/fgd, head/heads")
    for losses in ([fgd], [ACAM(4, 6, mask_grad="task")]):
        with pytest.raises(AcamkdError, match=r"each needs targets: body/.*; leave data.unlabeled out, or add a loss"):
            Distiller(student, teacher, pairs[:1], losses).check_unlabeled()
    assert Distiller(student, teacher, pairs[:1], [fgd])(batch, labeled=False) == {}


def test_look_ahead_masks_choose_on_unlabeled_images_what_labeled_ones_taught() -> None:
    student, teacher = Tiny(4), Tiny(6)
    acam = ACAM(4, 6, masks="both", mask_grad="look_ahead")
    distiller = Distiller(student, teacher, [("body", "body")], [acam])
    batch = student.prepare(torch.rand(2, 3, 8, 8))  # type: ignore[arg-type]
    distiller.check_unlabeled()
    terms = distiller(batch, labeled=False)
    assert list(terms) == ["body/acam/channel", "body/acam/spatial", "body/acam/diversity"]
    torch.stack([terms["body/acam/channel"], terms["body/acam/spatial"]]).sum().backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is None for parameter in acam.selection.parameters())
    with torch.no_grad():
        for parameter in acam.selection.parameters():
            parameter.mul_(-1)
    assert distiller(batch, labeled=False)["body/acam/spatial"] != terms["body/acam/spatial"]


def test_messages_of_a_loss_name_its_level(
    student: Tiny, teacher: Tiny, batch: Batch, caplog: pytest.LogCaptureFixture
) -> None:
    def distiller(**options: Any) -> Distiller:
        losses = [ACAM(4, 6, mask_grad="detached", **options) for _ in range(2)]
        for loss in losses:
            torch.nn.init.zeros_(loss.selection.spatial)  # type: ignore[arg-type]
        return Distiller(student, teacher, [("stem", "stem"), ("body", "body")], losses).train()

    distiller()(batch, WATCH_EVERY - 1)
    assert [message.partition(" by ")[0] for message in caplog.messages] == [
        "stem/acam: the spatial masks have collapsed", "body/acam: the spatial masks have collapsed",
    ]  # fmt: skip
    with pytest.raises(AcamkdError, match=r"^stem/acam: the spatial masks have collapsed by step 100: "):
        distiller(on_mask_collapse="stop")(batch, WATCH_EVERY - 1)
