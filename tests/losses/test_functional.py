from __future__ import annotations

import logging
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acamkd.losses.functional import (
    align_layer,
    check_choices,
    dice_overlap,
    distribution_error,
    freeze_tokens,
    masked_error,
    pearson,
    resample,
    safe_divide,
    standardize,
)

ROWS = torch.tensor([[[1.0, 0.0], [1.0, 1.0], [0.0, 2.0]]])
"""(1, 3, 2): squared norms 1, 2, 4; inner products 1 (first and second), 0 (first and third), 2."""


def test_check_choices_names_what_is_allowed() -> None:
    def construct(size: int, mode: Literal["a", "b"], way: Literal["up", "down"]) -> None: ...

    check_choices(construct, mode="b", way="up")
    with pytest.raises(ValueError, match="way must be one of 'up', 'down', not 'c'"):
        check_choices(construct, mode="b", way="c")


def test_resample_averages_where_the_feature_map_shrinks() -> None:
    x = torch.arange(16.0).view(1, 1, 4, 4)
    torch.testing.assert_close(resample(x, (2, 2)).flatten(), torch.tensor([2.5, 4.5, 10.5, 12.5]))
    torch.testing.assert_close(resample(x, (4, 1)).flatten(), torch.tensor([1.5, 5.5, 9.5, 13.5]))
    assert resample(x, (4, 4)) is x


@pytest.mark.parametrize("size", [(8, 8), (2, 8), (7, 3)])
def test_resample_is_bilinear_where_any_side_grows(size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, 4, 5)
    expected = F.interpolate(x, size, mode="bilinear", align_corners=False)
    torch.testing.assert_close(resample(x, size), expected, rtol=0, atol=0)


def test_align_layer_is_there_only_where_needed() -> None:
    assert isinstance(align_layer(4, 4), nn.Identity)
    for layer in (align_layer(4, 6), align_layer(6, 6, align=True)):
        assert isinstance(layer, nn.Conv2d)
        assert layer.kernel_size == (1, 1)
        assert layer.bias is not None
        assert layer.out_channels == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_safe_divide(dtype: torch.dtype) -> None:
    assert safe_divide(torch.tensor(3.0, dtype=dtype), torch.tensor(4.0, dtype=dtype)).item() == 0.75
    for smallness in (0.0, 5e-324, *(10.0**-exponent for exponent in range(20, 45))):
        denominator = torch.tensor(smallness, dtype=dtype, requires_grad=True)
        quotient = safe_divide(5 * denominator, denominator)
        quotient.backward()  # type: ignore[no-untyped-call]
        assert 0 <= quotient.item() <= 5 + 1e-6
        assert denominator.grad is not None
        assert denominator.grad.isfinite()


def test_masked_losses_are_the_norms_of_the_masked_difference() -> None:
    n, m, channels, height, width = 2, 3, 4, 5, 6
    difference = torch.randn(n, channels, height, width, dtype=torch.float64)
    over_channels = torch.rand(n, m, channels, dtype=torch.float64)
    over_locations = torch.rand(n, m, height, width, dtype=torch.float64)

    def norm(mask: Tensor) -> Tensor:
        return (mask * difference.unsqueeze(1)).square().sum(dim=(2, 3, 4))

    squared = difference.square()
    torch.testing.assert_close(
        masked_error(squared.mean(dim=(2, 3)), over_channels),
        norm(over_channels[..., None, None]) / (height * width * over_channels.sum(dim=2)),
        rtol=1e-12, atol=0,
    )  # fmt: skip
    torch.testing.assert_close(
        masked_error(squared.mean(dim=1).flatten(1), over_locations.flatten(2)),
        norm(over_locations.unsqueeze(2)) / (channels * over_locations.sum(dim=(2, 3))),
        rtol=1e-12, atol=0,
    )  # fmt: skip


def test_masked_error_under_a_constant_mask_is_that_share_of_the_mean() -> None:
    error = torch.rand(2, 12)
    expected = (error.mean(dim=1) / 4).unsqueeze(1)
    torch.testing.assert_close(masked_error(error, torch.full((2, 1, 12), 0.25)), expected)


@pytest.mark.parametrize("error", [1.0, 4e8, 1e30])
def test_masked_error_under_no_mask_at_all_is_zero_and_so_is_its_gradient(error: float) -> None:
    mask, errors = torch.zeros(1, 2, 16, requires_grad=True), torch.full((1, 16), error, requires_grad=True)
    masked = masked_error(errors, mask)
    masked.sum().backward()  # type: ignore[no-untyped-call]
    assert torch.equal(masked, torch.zeros(1, 2))
    for tensor in (mask, errors):
        assert tensor.grad is not None
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


@pytest.mark.parametrize("value", [0.0, 3.3, -1e4])
def test_constants_are_not_standardized_and_correlate_with_nothing(value: float) -> None:
    constant = torch.full((2, 3, 5, 7), value)
    constant[:, 1] = torch.randn(2, 5, 7)
    constant.requires_grad_()
    standard = standardize(constant)
    correlation = pearson(constant.flatten(2), torch.randn(2, 3, 35), dim=2)
    (standard * torch.randn(2, 3, 5, 7)).sum().backward()  # type: ignore[no-untyped-call]
    assert constant.grad is not None
    of_deviation, constant.grad = constant.grad, None
    correlation.sum().backward()  # type: ignore[no-untyped-call]
    for gradient in (of_deviation, constant.grad):
        assert torch.equal(gradient[:, ::2], torch.zeros(2, 2, 5, 7))
        assert (gradient[:, 1] != 0).all()
    assert standard[:, ::2].abs().max() == correlation[:, ::2].abs().max() == 0
    torch.testing.assert_close(standard[:, 1].std(), torch.tensor(1.0))


def test_the_gradient_of_a_distribution_error_is_bounded_by_the_temperature() -> None:
    student = torch.full((1, 11), -50.0).requires_grad_()
    teacher = torch.eye(11)[:1] * 1000
    distribution_error(student, teacher, 4.0, dim=1).sum().backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None
    assert 0 < student.grad.abs().max() <= 4


def test_dice_overlap_by_hand() -> None:
    pairs = (2 * 1 / (1 + 2) + 0 + 2 * 2 / (2 + 4)) / 3
    assert dice_overlap(ROWS).item() == pytest.approx(pairs)
    assert dice_overlap(ROWS, "literal").item() == pytest.approx(2 * (1 + 0 + 2) / (1 + 2 + 4))
    both = torch.cat([ROWS, torch.ones(1, 3, 2)])
    assert dice_overlap(both).item() == pytest.approx((pairs + 1) / 2)
    assert dice_overlap(torch.ones(1, 6, 5), "literal").item() == pytest.approx(5)


@pytest.mark.parametrize("form", ["pairwise", "literal"])
def test_dice_overlap_of_one_mask_or_none_at_all_is_zero(form: str) -> None:
    assert dice_overlap(torch.rand(2, 1, 5), form).item() == 0
    nothing = torch.zeros(2, 3, 5, requires_grad=True)
    overlap = dice_overlap(nothing, form)
    overlap.backward()  # type: ignore[no-untyped-call]
    assert overlap.item() == 0
    assert torch.equal(nothing.grad, torch.zeros_like(nothing))  # type: ignore[arg-type]


def test_freeze_tokens(caplog: pytest.LogCaptureFixture) -> None:
    learned, module = nn.Linear(3, 2), nn.Linear(3, 2)
    with caplog.at_level(logging.WARNING, logger="acamkd"):
        freeze_tokens(module, learned.state_dict())
        assert not caplog.records
        freeze_tokens(nn.Linear(3, 2), None)
    assert [record.getMessage() for record in caplog.records] == [
        "Linear are untrained: no `tokens` were given. Learn them first: acamkd tokens RECIPE"
    ]
    assert torch.equal(module.weight, learned.weight)
    assert not any(parameter.requires_grad for parameter in module.parameters())
    with pytest.raises(ValueError, match=r"the tokens given are \{'weight': \(2, 4\), 'bias': \(2,\)\}, but must be"):
        freeze_tokens(module, nn.Linear(4, 2).state_dict())
    with pytest.raises(ValueError, match="learn them for this teacher and layer"):
        freeze_tokens(module, {"weight": torch.zeros(2, 3)})
