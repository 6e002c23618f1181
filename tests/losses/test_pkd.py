from __future__ import annotations

import pytest
import torch

from acamkd.losses.functional import standardize
from acamkd.losses.pkd import PKD
from tiny_maps import vanishing_terms


def test_is_one_minus_the_mean_correlation() -> None:
    student, teacher = torch.randn(2, 3, 4, 5, dtype=torch.float64), torch.randn(2, 3, 4, 5, dtype=torch.float64)
    rows = zip(student.transpose(0, 1).flatten(1), teacher.transpose(0, 1).flatten(1), strict=True)
    correlation = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in rows]).mean()
    count = 2 * 4 * 5
    expected = 6 * (1 - correlation) * (count - 1) / count
    torch.testing.assert_close(PKD(3, 3, weight=6.0)(student, teacher)["correlation"], expected, rtol=1e-5, atol=0)


def test_extremes() -> None:
    x = torch.randn(2, 3, 8, 8)
    pkd = PKD(3, 3, weight=1.0)
    assert pkd(2 * x + 5, x)["correlation"].item() == pytest.approx(0, abs=1e-6)
    assert pkd(-x, x)["correlation"].item() == pytest.approx(2 * 127 / 128, rel=1e-4)


def test_statistics_are_those_of_the_batch() -> None:
    # Constant images of two levels: nothing to standardize image by image, +-1/sqrt(2) with the unbiased deviation.
    x = torch.tensor([0.0, 10.0]).view(2, 1, 1, 1)
    torch.testing.assert_close(standardize(x).flatten(), torch.tensor([-(0.5**0.5), 0.5**0.5]))


def test_a_single_value_cannot_be_standardized() -> None:
    with pytest.raises(ValueError, match=r"a feature map of \(1, 3, 1, 1\) has a single value per channel"):
        PKD(3, 3)(torch.ones(1, 3, 1, 1), torch.ones(1, 3, 1, 1))


def test_a_constant_channel_has_a_finite_gradient() -> None:
    student = torch.ones(2, 3, 4, 4, requires_grad=True)
    loss = PKD(3, 3)(student, torch.randn(2, 3, 4, 4))["correlation"]
    loss.backward()
    assert loss.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_presets_are_finite() -> None:
    assert {name: preset["weight"] for name, preset in PKD.PRESETS.items()} == {
        "retinanet": 10.0, "retinanet_mask_rcnn_teacher": 6.0, "reppoints": 10.0, "faster_rcnn": 6.0,
    }  # fmt: skip
    for preset in PKD.PRESETS.values():
        assert PKD(3, 5, **preset)(torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4))["correlation"].isfinite()


def test_equal_feature_maps_cost_nothing() -> None:
    assert vanishing_terms(PKD(8, 8)) == {"correlation"}
