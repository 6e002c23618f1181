"""MasKD against hand-computed values, and its tokens' life."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from acamkd.losses.base import DistillationContext
from acamkd.losses.maskd import MasKD, TokenMasks
from tiny_maps import vanishing_terms

LOG3 = 1.0986122886681098  # sigmoid(log 3) = 3/4


def maps() -> tuple[Tensor, Tensor]:
    """(1, 1, 1, 2) each: the teacher is log 3 and 0, the student 2 less and 1 less."""
    teacher = torch.tensor([LOG3, 0.0]).view(1, 1, 1, 2)
    return teacher - torch.tensor([2.0, 1.0]).view(1, 1, 1, 2), teacher


def one_token(**options: object) -> MasKD:
    return MasKD(1, 1, num_tokens=1, tokens={"tokens": torch.ones(1, 1)}, weighted=False, **options)  # type: ignore[arg-type]


def test_mask_is_squared_above_and_not_below() -> None:
    # M = 3/4, 1/2 and d^2 = 4, 1: (9/16 * 4 + 1/4 * 1) / (3/4 + 1/2) = 2
    assert one_token(weight=3.0)(*maps())["masked"].item() == pytest.approx(6.0)


def test_students_masks_join_from_the_given_step() -> None:
    student, teacher = maps()
    loss = one_token(custom_mask_after=5)
    mask = teacher.sigmoid() * student.sigmoid()
    joint = (mask.square() * (student - teacher).square()).sum() / mask.sum()
    assert loss(student, teacher, DistillationContext(step=4))["masked"].item() == pytest.approx(2.0)
    assert loss(student, teacher, DistillationContext(step=5))["masked"].item() == pytest.approx(joint.item())


def test_no_gradient_through_the_students_masks() -> None:
    student, teacher = maps()
    student.requires_grad_()
    one_token(custom_mask_after=0)(student, teacher)["masked"].backward()
    mask = (teacher.sigmoid() * student.sigmoid()).detach()
    expected = 2 * mask.square() * (student.detach() - teacher) / mask.sum()
    assert student.grad is not None
    torch.testing.assert_close(student.grad, expected)


def test_weighting_averages_the_tokens_errors() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 4, 5, 6), torch.randn(2, 4, 5, 6)
    loss = MasKD(4, 4, num_tokens=3)
    masks, weights = loss.token_module(teacher)
    assert weights.shape == (2, 3)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(2))
    masked = masks.unsqueeze(2) * (student - teacher).unsqueeze(1)  # (N, T, C, H, W)
    error = masked.square().sum(dim=(2, 3, 4)) / (4 * masks.sum(dim=(2, 3)))
    assert loss(student, teacher)["masked"].item() == pytest.approx((weights * error).sum(dim=1).mean().item())


def test_masks_of_are_the_teachers() -> None:
    student, teacher = maps()
    masks = one_token().masks(student, teacher)["spatial"]
    torch.testing.assert_close(masks, torch.tensor([0.75, 0.5]).view(1, 1, 1, 2))


def test_masked_map_of_the_token_stage() -> None:
    module = TokenMasks(1, num_tokens=2, weighted=False)
    module.load_state_dict({"tokens": torch.tensor([[1.0], [-1.0]])})
    x = torch.tensor([LOG3, 0.0]).view(1, 1, 1, 2)
    masked, dice = module.masked(x)
    torch.testing.assert_close(masked, x)  # sigmoid(a) + sigmoid(-a) = 1
    # <M1, M2> = 3/16 + 1/4, |M1|^2 = 9/16 + 1/4, |M2|^2 = 1/16 + 1/4
    assert dice.item() == pytest.approx(2 * (7 / 16) / (18 / 16))
    dice.backward()  # type: ignore[no-untyped-call]
    assert module.tokens.grad is not None
    assert module.tokens.grad.count_nonzero() == 2


def test_weights_enter_the_masked_map() -> None:
    torch.manual_seed(0)
    module, x = TokenMasks(4, num_tokens=3, weighted=True), torch.randn(2, 4, 5, 6)
    masks, weights = module(x)
    torch.testing.assert_close(module.masked(x)[0], torch.einsum("nt,nthw,nchw->nchw", weights, masks, x))


def test_tokens_are_frozen_and_the_projection_is_not() -> None:
    loss = MasKD(4, 6, num_tokens=3)
    student, teacher = torch.randn(2, 4, 5, 6, requires_grad=True), torch.randn(2, 6, 5, 6)
    loss(student, teacher)["masked"].backward()
    trainable = {name for name, parameter in loss.named_parameters() if parameter.requires_grad}
    assert trainable == {"align.weight", "align.bias"}
    assert all((parameter.grad is not None) == (name in trainable) for name, parameter in loss.named_parameters())


def test_learned_tokens_are_taken_over_silently_and_random_ones_are_not(caplog: pytest.LogCaptureFixture) -> None:
    learned = TokenMasks(6, num_tokens=3, weighted=True)
    with caplog.at_level(logging.WARNING):
        loss = MasKD(4, 6, num_tokens=3, tokens=learned.state_dict())
        assert not caplog.records
        MasKD(4, 6, num_tokens=3)
    assert "untrained" in caplog.text
    assert "acamkd tokens RECIPE" in caplog.text
    assert all(torch.equal(x, loss.token_module.state_dict()[name]) for name, x in learned.state_dict().items())


def test_tokens_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"are \{'tokens': \(3, 6\)\}, but must be \{'tokens': \(4, 6\)\}"):
        MasKD(4, 6, num_tokens=4, weighted=False, tokens={"tokens": torch.zeros(3, 6)})


def test_random_tokens_follow_the_seed() -> None:
    student, teacher = torch.randn(2, 4, 5, 6), torch.randn(2, 4, 5, 6)
    values = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        values.append(MasKD(4, 4)(student, teacher)["masked"].item())
    assert values[0] == values[1] != values[2]


def test_equal_feature_maps_cost_nothing() -> None:
    assert vanishing_terms(MasKD(8, 8)) == {"masked"}
