from __future__ import annotations

from typing import Any

import pytest
import torch

from acamkd.losses.fitnet import FitNet
from tiny_maps import vanishing_terms


def test_is_the_mean_squared_error() -> None:
    student = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 2, 1, 2)
    teacher = torch.tensor([1.0, 0.0, 0.0, 4.0]).view(1, 2, 1, 2)
    terms = FitNet(2, 2, weight=5.0)(student, teacher)
    assert list(terms) == ["feature"]
    assert terms["feature"].item() == pytest.approx(5 * (0 + 4 + 9 + 0) / 4)


@pytest.mark.parametrize(
    ("distance", "expected"), [("l1", (0 + 2 + 3 + 0.5) / 4), ("smooth_l1", (0 + 1.5 + 2.5 + 0.125) / 4)]
)
def test_other_distances(distance: Any, expected: float) -> None:
    student = torch.tensor([1.0, 2.0, 3.0, 4.5]).view(1, 2, 1, 2)
    teacher = torch.tensor([1.0, 0.0, 0.0, 4.0]).view(1, 2, 1, 2)
    assert FitNet(2, 2, weight=2.0, distance=distance)(student, teacher)["feature"].item() == pytest.approx(
        2 * expected
    )
    with pytest.raises(ValueError, match="distance must be one of 'mse', 'l1', 'smooth_l1', not 'l2'"):
        FitNet(2, 2, distance="l2")  # type: ignore[arg-type]


def test_gradient_by_hand() -> None:
    student, teacher = torch.randn(2, 3, 4, 5, requires_grad=True), torch.randn(2, 3, 4, 5)
    FitNet(3, 3, weight=2.0)(student, teacher)["feature"].backward()
    assert student.grad is not None
    torch.testing.assert_close(student.grad, 2 * 2 * (student - teacher).detach() / student.numel())


def test_the_projection_learns() -> None:
    loss = FitNet(3, 5)
    student, teacher = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4)
    projected = torch.einsum("oc,nchw->nohw", loss.align.weight[:, :, 0, 0], student)  # type: ignore[index]
    expected = (projected + loss.align.bias[:, None, None] - teacher).square().mean()  # type: ignore[index]
    term = loss(student, teacher)["feature"]
    torch.testing.assert_close(term, expected)
    term.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in loss.parameters())


@pytest.mark.parametrize(("preset", "weight"), [
    ("retinanet", 5.0), ("fcos", 10.0), ("faster_rcnn", 1.0), ("faster_rcnn_cascade_teacher", 2.0),
])  # fmt: skip
def test_presets_project_even_equal_channels(preset: str, weight: float) -> None:
    loss = FitNet(4, 4, **FitNet.PRESETS[preset])
    assert loss.weight == weight
    assert {name: tuple(x.shape) for name, x in loss.state_dict().items()} == {
        "align.weight": (4, 4, 1, 1),
        "align.bias": (4,),
    }
    assert not FitNet(4, 4).state_dict()


def test_equal_feature_maps_cost_nothing() -> None:
    assert vanishing_terms(FitNet(8, 8)) == {"feature"}
