"""CanKD against the definition of its parts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from acamkd.losses.cankd import CanKD
from tiny_maps import vanishing_terms


def random_map(size: tuple[int, int], seed: int, channels: int = 4) -> Tensor:
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def awake(loss: CanKD) -> CanKD:
    """The attention shows only once its normalization has left zero."""
    torch.nn.init.ones_(loss.output[1].weight)  # type: ignore[arg-type]
    return loss.double()


def test_starts_as_one_minus_pearson() -> None:
    student, teacher = random_map((6, 7), 0), 3 * random_map((6, 7), 1) + 2
    correlation = [
        torch.corrcoef(torch.stack((student[n, c].flatten(), teacher[n, c].flatten())))[0, 1]
        for n in range(2)
        for c in range(4)
    ]
    expected = 1 - torch.stack(correlation).mean().item()
    assert CanKD(4, 4, weight=1.0).double()(student, teacher)["feature"].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("subsample", [True, False])
def test_attention_by_definition(subsample: bool) -> None:
    student, teacher = random_map((6, 7), 0), random_map((6, 7), 1)
    loss = awake(CanKD(4, 4, subsample=subsample))
    keys, values = loss.phi(teacher), loss.g(teacher)
    if subsample:
        keys, values = (torch.nn.MaxPool2d(2)(x) for x in (keys, values))
    keys, values, queries = (x.flatten(2) for x in (keys, values, loss.theta(student)))
    attention = queries.transpose(1, 2) @ keys / keys.shape[2]  # (N, HW, positions)
    attended = (attention @ values.transpose(1, 2)).transpose(1, 2).view(2, 2, 6, 7)
    enhanced = student + loss.output(attended)
    normalized = (torch.nn.InstanceNorm2d(4)(x) for x in (enhanced, teacher))
    expected = 5 * torch.nn.functional.mse_loss(*normalized)
    assert loss(student, teacher)["feature"].item() == pytest.approx(expected.item())


def test_a_shift_of_the_teacher_matters_through_attention_only() -> None:
    student, teacher = random_map((6, 7), 0), random_map((6, 7), 1)
    change = []
    for loss in (CanKD(4, 4).double(), awake(CanKD(4, 4))):
        before, after = (loss(student, x)["feature"].item() for x in (teacher, teacher + 1))
        change.append(abs(after - before))
    assert change[0] < 1e-9
    assert change[1] > 1e-3


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (3, 1)])
def test_sides_of_one_position(size: tuple[int, int]) -> None:
    student = random_map(size, 0).requires_grad_()
    value = awake(CanKD(4, 4))(student, random_map(size, 1))["feature"]
    value.backward()
    assert value.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_every_parameter_learns_and_unequal_channels_are_aligned() -> None:
    loss = awake(CanKD(3, 4))
    loss(random_map((6, 7), 0, channels=3), random_map((6, 7), 1))["feature"].backward()
    assert all(parameter.grad is not None for parameter in loss.parameters())
    assert loss.align.weight.shape == (4, 3, 1, 1)


def test_same_seed_same_loss() -> None:
    values = []
    for _ in range(2):
        torch.manual_seed(0)
        values.append(awake(CanKD(4, 4))(random_map((6, 7), 0), random_map((6, 7), 1))["feature"].item())
    assert values[0] == values[1]


def test_equal_feature_maps_cost_nothing() -> None:
    assert vanishing_terms(CanKD(8, 8)) == {"feature"}  # as long as its batch norm is at its start
