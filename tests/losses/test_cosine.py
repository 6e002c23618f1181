from __future__ import annotations

import pytest
import torch
from torch import nn

from acamkd.losses.cosine import Cosine
from tiny_maps import vanishing_terms


def test_is_one_minus_the_mean_cosine_of_the_locations() -> None:
    student, teacher = torch.randn(2, 3, 2, 2, dtype=torch.float64), torch.randn(2, 3, 2, 2, dtype=torch.float64)
    found = [
        float(s @ t / (s.norm() * t.norm()))
        for s, t in zip(student.movedim(1, 3).reshape(8, 3), teacher.movedim(1, 3).reshape(8, 3), strict=True)
    ]
    loss = Cosine(3, 3, weight=2.0, align=False)(student, teacher)["cosine"]
    assert loss.item() == pytest.approx(2 * (1 - sum(found) / 8))


def test_lengths_do_not_matter() -> None:
    x = torch.randn(1, 4, 3, 3)
    assert Cosine(4, 4, align=False)(7 * x, 0.1 * x)["cosine"].item() == pytest.approx(0, abs=1e-6)
    assert Cosine(4, 4, align=False)(-x, x)["cosine"].item() == pytest.approx(2)
    assert vanishing_terms(Cosine(8, 8, align=False)) == {"cosine"}


def test_projects_unless_told_not_to() -> None:
    assert isinstance(Cosine(4, 4).align, nn.Conv2d)
    assert isinstance(Cosine(4, 4, align=False).align, nn.Identity)
    assert Cosine(4, 6, align=False)(torch.randn(1, 4, 2, 2), torch.randn(1, 6, 3, 3))["cosine"].isfinite()
