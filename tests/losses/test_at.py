from __future__ import annotations

import pytest
import torch

from acamkd.losses.at import AT, attention_vector
from tiny_maps import vanishing_terms


def test_values_by_hand() -> None:
    student = torch.tensor([3.0, 4.0]).sqrt().view(1, 1, 1, 2)  # energies 3, 4: a = (0.6, 0.8)
    teacher = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)  # a = (1, 0)
    squared = 0.4**2 + 0.8**2
    assert AT(1, 1, weight=10.0)(student, teacher)["attention"].item() == pytest.approx(10 * squared / 2)
    assert AT(1, 1, weight=10.0, form="paper")(student, teacher)["attention"].item() == pytest.approx(10 * squared**0.5)


@pytest.mark.parametrize("form", ["code", "paper"])
def test_scale_does_not_matter(form: str) -> None:
    student, teacher = torch.randn(2, 3, 4, 5), torch.randn(2, 6, 4, 5)
    at = AT(3, 6, form=form)  # type: ignore[arg-type]
    plain, scaled = at(student, teacher)["attention"], at(-8 * student, teacher / 16)["attention"]
    assert plain > 0
    torch.testing.assert_close(scaled, plain)


def test_each_image_has_a_vector_of_length_one() -> None:
    vectors = attention_vector(torch.randn(3, 4, 5, 6))
    assert vectors.shape == (3, 30)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))


@pytest.mark.parametrize("form", ["code", "paper"])
def test_equal_maps_and_empty_maps_have_finite_gradients(form: str) -> None:
    for student in (torch.randn(1, 2, 3, 3), torch.zeros(1, 2, 3, 3)):
        student.requires_grad_()
        loss = AT(2, 2, form=form)(student, student.detach().clone())["attention"]  # type: ignore[arg-type]
        loss.backward()
        assert loss.item() == 0
        assert student.grad is not None
        assert student.grad.eq(0).all()


def test_presets_are_finite_and_learn_nothing() -> None:
    for preset in AT.PRESETS.values():
        at = AT(3, 5, **preset)
        assert at(torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4))["attention"].isfinite()
        assert not list(at.parameters())


def test_unknown_form() -> None:
    with pytest.raises(ValueError, match="'code', 'paper', not 'thesis'"):
        AT(2, 2, form="thesis")  # type: ignore[arg-type]


def test_equal_feature_maps_cost_nothing() -> None:
    assert vanishing_terms(AT(8, 8)) == {"attention"}
