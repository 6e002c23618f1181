"""What must hold for every method, present and future: one battery over the entries of METHODS."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acamkd.config import Model
from acamkd.distillation.distiller import Distiller
from acamkd.distillation.methods import METHODS
from acamkd.distillation.taps import FeatureTap
from acamkd.losses.base import DistillationContext, FeatureLoss, HeadLoss
from acamkd.losses.crosskd import CrossKD
from acamkd.losses.queries import QueryLoss
from acamkd.models import Batch, TaskModel, build
from tiny_maps import context_of

FEATURE_LOSSES = {name: method for name, method in METHODS.items() if issubclass(method, FeatureLoss)}

PRESETS = [(name, preset) for name, method in METHODS.items() for preset in method.PRESETS]


@dataclass(frozen=True)
class Case:
    """(N, C, H, W) of the student and of the teacher."""

    student: tuple[int, int, int, int]
    teacher: tuple[int, int, int, int]


CASES = {
    "equal": Case((2, 8, 8, 8), (2, 8, 8, 8)),
    "odd, one image": Case((1, 8, 7, 5), (1, 8, 7, 5)),
    "other channels": Case((2, 4, 6, 9), (2, 7, 6, 9)),
    "finer student": Case((2, 8, 13, 11), (2, 6, 7, 5)),
    "coarser student": Case((3, 5, 3, 4), (3, 8, 5, 9)),
}


def maps(case: Case, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(shape, generator=generator) for shape in (case.student, case.teacher))
    return student.requires_grad_(), teacher


def make(name: str, case: Case, seed: int = 0, **options: Any) -> FeatureLoss:
    torch.manual_seed(seed)
    loss: FeatureLoss = FEATURE_LOSSES[name](case.student[1], case.teacher[1], **options)
    return loss


def run(loss: FeatureLoss, student: Tensor, teacher: Tensor, seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    terms: dict[str, Tensor] = loss(student, teacher, context_of(student))
    return terms


def total(terms: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(terms.values())).sum()


def gradient(terms: dict[str, Tensor], student: Tensor) -> Tensor:
    return torch.autograd.grad(total(terms), student)[0]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Random tokens are warned of; here they are meant."""
    logger = logging.getLogger("acamkd")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


@pytest.fixture(params=FEATURE_LOSSES)
def name(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_terms_and_gradients_are_finite_and_the_teacher_gets_none(name: str, case: Case) -> None:
    loss, (student, teacher) = make(name, case), maps(case)
    teacher.requires_grad_()
    terms = run(loss, student, teacher)
    assert terms
    for term in terms.values():
        assert term.shape == ()
        assert term.isfinite()
        assert term.item() >= 0
    total(terms).backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert student.grad.count_nonzero() > student.numel() // 4  # MGD drops two thirds
    assert teacher.grad is None
    for parameter in loss.parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all()


def test_autocast_changes_nothing(name: str) -> None:
    case = CASES["other channels"]
    loss, (student, teacher) = make(name, case), maps(case)
    student, teacher = student.detach().bfloat16(), teacher.bfloat16()
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        mixed = run(loss, student, teacher)
    plain = run(loss, student.float(), teacher.float())
    assert {term.dtype for term in mixed.values()} == {torch.float32}
    assert {key: term.item() for key, term in mixed.items()} == {key: term.item() for key, term in plain.items()}


def test_the_memory_format_changes_nothing_but_rounding(name: str) -> None:
    case = CASES["other channels"]
    loss, (student, teacher) = make(name, case), maps(case)
    plain = run(loss, student, teacher)
    direction = gradient(plain, student)  # before a second forward moves CanKD's running statistics
    student, teacher = (x.detach().contiguous(memory_format=torch.channels_last) for x in (student, teacher))
    terms = run(loss.to(memory_format=torch.channels_last), student.requires_grad_(), teacher)
    for key, term in plain.items():
        torch.testing.assert_close(terms[key], term)
    torch.testing.assert_close(gradient(terms, student), direction, check_stride=False)


def test_seed_decides_everything(name: str) -> None:
    case = CASES["equal"]
    student, teacher = maps(case)
    first, second = (run(make(name, case), student, teacher) for _ in range(2))
    assert {key: term.item() for key, term in first.items()} == {key: term.item() for key, term in second.items()}
    assert torch.equal(gradient(first, student), gradient(second, student))


def test_state_dict_holds_all_that_was_learned(name: str) -> None:
    case = CASES["other channels"]
    student, teacher = maps(case)
    loss = make(name, case)
    optimizer = torch.optim.SGD([*loss.parameters(), nn.Parameter(torch.zeros(1))], lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        total(run(loss, student, teacher)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    other = make(name, case, seed=1)
    other.load_state_dict(loss.state_dict())
    first, second = run(loss, student, teacher), run(other, student, teacher)
    assert {key: term.item() for key, term in first.items()} == {key: term.item() for key, term in second.items()}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in ("acam", "pkd") else [pytest.mark.slow]) for name in FEATURE_LOSSES],
    indirect=True,
)
def test_compiled_it_gives_the_same(name: str) -> None:
    case = CASES["other channels"]
    loss, (student, teacher) = make(name, case), maps(case)
    plain = run(loss, student, teacher)
    direction = gradient(plain, student)  # before a second forward moves CanKD's running statistics
    torch.compiler.reset()
    compiled: Callable[..., dict[str, Tensor]] = torch.compile(loss, backend="aot_eager")
    torch.manual_seed(0)
    traced = compiled(student, teacher, context_of(student))
    for key, term in plain.items():
        torch.testing.assert_close(traced[key], term)
    torch.testing.assert_close(gradient(traced, student), direction)


@pytest.mark.parametrize(("method", "preset"), [each for each in PRESETS if each[0] in FEATURE_LOSSES])
def test_presets_are_finite(method: str, preset: str) -> None:
    case = CASES["other channels"]
    student, teacher = maps(case)
    terms = run(make(method, case, **METHODS[method].PRESETS[preset]), student, teacher)
    assert total(terms).isfinite()
    assert gradient(terms, student).isfinite().all()


def detector(seed: int) -> TaskModel:
    torch.manual_seed(seed)
    section = Model(arch="retinanet", backbone="mobilenetv3_small_050", backbone_weights=None, fpn_channels=32)
    model = build(section, "detection", 2, (64, 64)).eval()
    for parameter in model.net.head.parameters():  # type: ignore[union-attr]
        if parameter.ndim == 4:  # torchvision's start makes every head say nearly the same
            nn.init.kaiming_normal_(parameter)
    return model


@pytest.fixture(scope="module")
def networks() -> tuple[TaskModel, TaskModel, Batch]:
    student, teacher = detector(1), detector(0)
    target = {"boxes": torch.tensor([[4.0, 4.0, 40.0, 52.0]]), "labels": torch.tensor([1]), "iscrowd": torch.zeros(1)}
    images = [torch.rand(3, 61, 64, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    return student, teacher.requires_grad_(False), student.prepare(images, [target, target])


def crosskd(loss: CrossKD, student: TaskModel, teacher: TaskModel, batch: Batch) -> dict[str, Tensor]:
    of_student, of_teacher = loss.layers(student, teacher)
    with torch.no_grad(), FeatureTap(teacher.net, of_teacher) as tap:
        teacher(batch)
        teacher_maps = tap.features()
    with FeatureTap(student.net, of_student) as tap:
        student(batch)
        terms: dict[str, Tensor] = loss(student, teacher, tap.features(), teacher_maps, batch, DistillationContext())
    return terms


@pytest.mark.parametrize("images", [1, 2])
def test_crosskd_reaches_the_student_alone(images: int, networks: tuple[TaskModel, TaskModel, Batch]) -> None:
    student, teacher, full = networks
    assert full.targets is not None
    batch = Batch(full.pixels[:images], full.sizes[:images], full.original_sizes[:images], full.targets[:images])
    terms = crosskd(CrossKD(), student, teacher, batch)
    assert set(terms) == set(CrossKD.TERMS)
    assert all(term.shape == () and term.isfinite() and term > 0 for term in terms.values())
    student.zero_grad()
    total(terms).backward()  # type: ignore[no-untyped-call]
    gradients = [parameter.grad for parameter in student.backbone.parameters() if parameter.grad is not None]
    assert gradients
    assert all(each.isfinite().all() for each in gradients)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_crosskd_under_autocast_is_float32(networks: tuple[TaskModel, TaskModel, Batch]) -> None:
    plain = crosskd(CrossKD(), *networks)
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        mixed = crosskd(CrossKD(), *networks)
    for key, term in mixed.items():
        assert term.dtype == torch.float32
        assert term.item() == pytest.approx(plain[key].item(), rel=0.1)


def test_crosskd_is_near_zero_for_equal_networks_and_deterministic(
    networks: tuple[TaskModel, TaskModel, Batch],
) -> None:
    student, teacher, batch = networks
    first, second = (crosskd(CrossKD(), student, teacher, batch) for _ in range(2))
    same = crosskd(CrossKD(), teacher, teacher, batch)
    for key, term in first.items():
        assert term.item() == second[key].item()
        assert same[key].item() < 2e-3 * term.item()


def test_crosskd_learns_nothing_itself(networks: tuple[TaskModel, TaskModel, Batch]) -> None:
    student, teacher, batch = networks
    assert not CrossKD().state_dict()
    distiller = Distiller(student, teacher, [None], [CrossKD(**CrossKD.PRESETS["retinanet"])])
    terms = distiller(batch)
    assert all(terms[f"head/crosskd/{name}"].isfinite() for name in CrossKD.TERMS)


@pytest.mark.parametrize("preset", CrossKD.PRESETS)
def test_crosskd_presets_are_finite(preset: str, networks: tuple[TaskModel, TaskModel, Batch]) -> None:
    assert total(crosskd(CrossKD(**CrossKD.PRESETS[preset]), *networks)).isfinite()


@pytest.mark.slow
def test_crosskd_compiled_gives_the_same(networks: tuple[TaskModel, TaskModel, Batch]) -> None:
    student = networks[0]
    weight = next(student.backbone.parameters())
    plain = crosskd(CrossKD(), *networks)
    (direction,) = torch.autograd.grad(total(plain), weight)
    torch.compiler.reset()
    compiled: Any = torch.compile(CrossKD(), backend="aot_eager")
    traced = crosskd(compiled, *networks)
    for key, term in plain.items():
        torch.testing.assert_close(traced[key], term)
    torch.testing.assert_close(torch.autograd.grad(total(traced), weight)[0], direction)


def test_no_two_methods_are_the_same(networks: tuple[TaskModel, TaskModel, Batch]) -> None:
    """On one seed, in one detector: another value, and another gradient in the student's first layer."""
    student, teacher, batch = networks
    layer, channels = "backbone:0", 32
    weight = next(student.backbone.parameters())
    values, directions = {}, {}
    here = {name: made for name, made in METHODS.items() if not issubclass(made, QueryLoss)}  # for other detectors
    for method, made in here.items():
        torch.manual_seed(0)
        loss, pair = (made(), None) if issubclass(made, HeadLoss) else (made(channels, channels), (layer, layer))
        terms = Distiller(student, teacher, [pair], [loss])(batch)
        distillation = torch.stack([term for key, term in terms.items() if not key.startswith("task/")]).sum()
        values[method] = distillation.item()
        directions[method] = nn.functional.normalize(torch.autograd.grad(distillation, weight)[0].flatten(), dim=0)
        assert directions[method].norm() == pytest.approx(1), method
    for one, other in combinations(here, 2):
        assert values[one] != pytest.approx(values[other], rel=1e-6), (one, other)
        assert directions[one] @ directions[other] < 1 - 1e-6, (one, other)
