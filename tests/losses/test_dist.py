"""DIST against hand-computed values and its invariances."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from acamkd.losses.dist import DIST
from acamkd.losses.functional import pearson
from tiny_maps import vanishing_terms


def logits(seed: int) -> Tensor:
    return torch.randn(2, 5, 6, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_pearson_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    y = torch.tensor([[10.0, 20.0, 30.0], [3.0, 2.0, 1.0], [1.0, 3.0, 2.0], [7.0, 7.0, 7.0]])
    torch.testing.assert_close(pearson(x, y, dim=1), torch.tensor([1.0, -1.0, 0.5, 0.0]))
    torch.testing.assert_close(pearson(x.T, y.T, dim=0), torch.tensor([1.0, -1.0, 0.5, 0.0]))


def test_pearson_of_constants_has_a_finite_gradient() -> None:
    x = torch.full((2, 3), 1 / 3, requires_grad=True)
    pearson(x, torch.rand(2, 3), dim=1).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_equal_logits_cost_nothing() -> None:
    x = logits(0)
    for term in DIST(5, 5)(x, x).values():
        assert term.item() == pytest.approx(0, abs=1e-6)


def test_affine_changes_of_a_pixels_probabilities_do_not_matter_between_classes() -> None:
    student, teacher = logits(0).softmax(dim=1), logits(1)
    a = torch.rand(2, 1, 6, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    moved = a * student + (1 - a) / 5  # still probabilities
    loss = DIST(5, 5)
    before, after = (loss(x.log(), teacher) for x in (student, moved))
    assert after["inter"].item() == pytest.approx(before["inter"].item(), rel=1e-5)
    assert after["intra"].item() != pytest.approx(before["intra"].item(), rel=1e-3)


def test_inter_is_over_classes_and_intra_over_all_pixels_of_the_batch() -> None:
    student, teacher = logits(0), logits(1)
    p_student, p_teacher = (x.softmax(dim=1).permute(1, 0, 2, 3).flatten(1) for x in (student, teacher))  # (C, NHW)
    inter = [torch.corrcoef(torch.stack((p_student[:, k], p_teacher[:, k])))[0, 1] for k in range(84)]
    intra = [torch.corrcoef(torch.stack((p_student[c], p_teacher[c])))[0, 1] for c in range(5)]
    terms = DIST(5, 5, weight=2.0, beta=3.0, gamma=4.0)(student, teacher)
    assert terms["inter"].item() == pytest.approx(6 * (1 - torch.stack(inter).mean().item()), rel=1e-6)
    assert terms["intra"].item() == pytest.approx(8 * (1 - torch.stack(intra).mean().item()), rel=1e-6)


def test_temperature_divides_the_logits_and_its_square_multiplies() -> None:
    student, teacher = logits(0), logits(1)
    plain, warm = DIST(5, 5)(student / 4, teacher / 4), DIST(5, 5, temperature=4.0)(student, teacher)
    for name, term in plain.items():
        assert warm[name].item() == pytest.approx(16 * term.item())


def test_other_class_counts_are_aligned() -> None:
    loss = DIST(3, 5).double()
    terms = loss(logits(0)[:, :3], logits(1))
    torch.stack(list(terms.values())).sum().backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None and p.grad.count_nonzero() for p in loss.align.parameters())


def test_equal_feature_maps_cost_nothing() -> None:
    assert vanishing_terms(DIST(8, 8)) == {"inter", "intra"}
