from __future__ import annotations

import pytest
import torch
from torch import nn

from acamkd.losses.mgd import MGD
from tiny_maps import vanishing_terms


def seeded(mgd: MGD, student: torch.Tensor, teacher: torch.Tensor, seed: int) -> float:
    torch.manual_seed(seed)
    return float(mgd(student, teacher)["generation"].item())


@pytest.mark.parametrize("mask_ratio", [0.15, 0.65])
def test_share_of_masked_positions(mask_ratio: float) -> None:
    torch.manual_seed(0)
    mask = MGD(4, 4, mask_ratio=mask_ratio).random_mask(torch.zeros(4, 4, 100, 100))
    assert mask.shape == (4, 1, 100, 100)
    shares = 1 - mask.float().mean(dim=(1, 2, 3))
    assert shares.tolist() == pytest.approx([mask_ratio] * 4, abs=0.02)  # 4 standard deviations
    assert not torch.equal(mask[0], mask[1])


def test_channel_mask() -> None:
    torch.manual_seed(0)
    mask = MGD(1000, 1000, mask_ratio=0.15, mask_on="channel").random_mask(torch.zeros(4, 1000, 2, 3))
    assert mask.shape == (4, 1000, 1, 1)
    assert 1 - mask.float().mean().item() == pytest.approx(0.15, abs=0.025)


def test_bounds_of_the_ratio() -> None:
    x = torch.zeros(1, 2, 50, 50)
    assert MGD(2, 2, mask_ratio=0.0).random_mask(x).all()
    assert MGD(2, 2, mask_ratio=1.0).random_mask(x).sum() <= 1  # only a draw of exactly 0 is kept


def test_a_seed_fixes_the_mask() -> None:
    student, teacher, mgd = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8), MGD(3, 3)
    assert seeded(mgd, student, teacher, seed=1) == seeded(mgd, student, teacher, seed=1)
    assert seeded(mgd, student, teacher, seed=1) != seeded(mgd, student, teacher, seed=2)


def test_is_the_squared_error_per_image_with_an_identity_generator() -> None:
    mgd = MGD(2, 2, weight=3.0, mask_ratio=0.0)
    for layer in mgd.generator:
        if isinstance(layer, nn.Conv2d):
            nn.init.dirac_(layer.weight)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    student, teacher = torch.rand(2, 2, 4, 5), torch.randn(2, 2, 4, 5)  # non-negative: the ReLU lets it pass
    expected = 3.0 * (student - teacher).square().sum() / 2
    torch.testing.assert_close(mgd(student, teacher)["generation"], expected)


def test_dropped_positions_get_no_gradient() -> None:
    student, teacher = torch.randn(1, 2, 6, 6, requires_grad=True), torch.randn(1, 2, 6, 6)
    mgd = MGD(2, 2, mask_ratio=0.5)
    torch.manual_seed(3)
    mgd(student, teacher)["generation"].backward()
    torch.manual_seed(3)
    dropped = ~mgd.random_mask(student).expand_as(student)
    assert student.grad is not None
    assert dropped.any()
    assert student.grad[dropped].eq(0).all()
    assert student.grad[~dropped].ne(0).any()


def test_presets_are_finite() -> None:
    for preset in MGD.PRESETS.values():
        assert MGD(3, 5, **preset)(torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4))["generation"].isfinite()
    assert MGD.PRESETS["two_stage"] == {"weight": 5e-7, "mask_ratio": 0.45}


def test_unknown_mask() -> None:
    with pytest.raises(ValueError, match="'spatial', 'channel', not 'pixel'"):
        MGD(2, 2, mask_on="pixel")  # type: ignore[arg-type]


def test_even_equal_feature_maps_cost_something() -> None:
    assert vanishing_terms(MGD(8, 8)) == set()  # a generator stands between the feature maps
