"""FreeKD against hand-computed values, and its wavelets' laws."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from acamkd.losses.freekd import FreeKD, FrequencyTokens, haar, inverse_haar
from tiny_maps import vanishing_terms

SIZES = [(16, 16), (13, 18), (1, 1), (7, 2)]


def random_map(size: tuple[int, int], seed: int = 0) -> Tensor:
    return torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_haar_of_one_block() -> None:
    low, (detail,) = haar(torch.tensor([[1.0, 2.0], [3.0, 6.0]]).view(1, 1, 2, 2), levels=1)
    assert low.item() == 6.0
    assert detail.flatten().tolist() == [-3.0, -2.0, 1.0]  # top - bottom, left - right, diagonal; each halved


def test_haar_pads_odd_sides_right_and_bottom() -> None:
    low, details = haar(torch.ones(1, 1, 3, 1), levels=1)
    assert low.flatten().tolist() == [1.0, 0.5]
    assert details[0][0, 0, :, :, 0].tolist() == [[0.0, 0.5], [1.0, 0.5], [0.0, 0.5]]


@pytest.mark.parametrize("size", SIZES)
def test_haar_keeps_the_energy(size: tuple[int, int]) -> None:
    x = random_map(size)
    low, details = haar(x)
    assert [tuple(bands.shape[:3]) for bands in details] == [(2, 4, 3)] * 3
    energy = sum(bands.square().sum().item() for bands in (low, *details))
    assert energy == pytest.approx(x.square().sum().item(), rel=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_inverse_haar_rebuilds_the_map(size: tuple[int, int]) -> None:
    x = random_map(size)
    torch.testing.assert_close(inverse_haar(*haar(x), size), x)


@pytest.mark.parametrize("axis", ["level", "orientation"])
def test_frequency_term_by_definition(axis: str) -> None:
    student, teacher = random_map((13, 18), 0), random_map((13, 18), 1)
    loss = FreeKD(4, 4, num_tokens=3, token_axis=axis, weight=2.0, frequency_weight=0.5).double()  # type: ignore[arg-type]
    torch.nn.init.normal_(loss.token_module.tokens)
    tokens, expected = loss.token_module.tokens, 0.0
    for level, (s, t) in enumerate(zip(haar(student)[1], haar(teacher)[1], strict=True)):
        for o in range(3):
            if axis == "level":
                mask = torch.einsum("tc,nchw->nthw", tokens[1 + level], t.sum(dim=2)).sigmoid()
            else:
                mask = torch.einsum("tc,nchw->nthw", tokens[1 + o], t[:, :, o]).sigmoid()
            expected += (mask.unsqueeze(2) * (s - t)[:, None, :, o].abs()).mean().item() / 3
    terms = loss(student, teacher)
    assert terms["frequency"].item() == pytest.approx(expected)
    assert terms["feature"].item() == pytest.approx(10 * (student - teacher).square().mean().item())


def test_low_pass_is_not_distilled_by_the_frequency_term() -> None:
    teacher = random_map((16, 16))
    terms = FreeKD(4, 4).double()(teacher + 1, teacher)
    assert terms["frequency"].item() == pytest.approx(0, abs=1e-12)
    assert terms["feature"].item() == pytest.approx(5)


@pytest.mark.parametrize("axis", ["level", "orientation"])
def test_masked_map_of_the_token_stage(axis: str) -> None:
    module, x = FrequencyTokens(4, num_tokens=3, token_axis=axis).double(), random_map((13, 18))  # type: ignore[arg-type]
    torch.nn.init.zeros_(module.tokens)
    masked, dice = module.masked(x)
    torch.testing.assert_close(masked, 1.5 * x)  # three masks of 1/2
    assert dice.item() == pytest.approx(4.0)  # equal masks, at low-pass and three levels
    masked.square().sum().backward()  # type: ignore[no-untyped-call]
    assert module.tokens.grad is not None
    assert module.tokens.grad.abs().sum(dim=(1, 2)).count_nonzero() == 4


def test_tokens_are_frozen_and_the_projection_is_not() -> None:
    loss = FreeKD(3, 4, tokens={"tokens": torch.randn(4, 6, 4)})
    torch.stack(list(loss(torch.randn(2, 3, 8, 8), torch.randn(2, 4, 8, 8)).values())).sum().backward()  # type: ignore[no-untyped-call]
    trained = {name for name, parameter in loss.named_parameters() if parameter.grad is not None}
    assert trained == {"align.weight", "align.bias"}
    assert not loss.token_module.tokens.requires_grad


def test_same_maps_same_loss() -> None:
    student, teacher = random_map((13, 18), 0).float(), random_map((13, 18), 1).float()
    loss = FreeKD(4, 4)
    assert loss(student, teacher)["frequency"].item() == loss(student, teacher)["frequency"].item()


def test_unknown_token_axis_is_refused() -> None:
    with pytest.raises(ValueError, match="token_axis must be one of 'level', 'orientation', not 'band'"):
        FreeKD(4, 4, token_axis="band")  # type: ignore[arg-type]


def test_equal_feature_maps_cost_nothing() -> None:
    assert vanishing_terms(FreeKD(8, 8)) == {"frequency", "feature"}
