"""What surrounds ACAM's masks: application, measurement and the look-ahead reward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from acamkd.losses.acam.masks import (
    Masks,
    apply_masks,
    look_ahead_reward,
    mask_overlap,
    mask_statistics,
    mask_weights,
    selection_loss,
)
from acamkd.losses.functional import dice_overlap, imitation_errors, masked_error


def test_a_map_through_its_masks_is_their_mean_times_the_map() -> None:
    x, channel, spatial = torch.randn(2, 3, 4, 5), torch.rand(2, 6, 3), torch.rand(2, 6, 4, 5)
    by_channel, by_position = channel[..., None, None] * x.unsqueeze(1), spatial.unsqueeze(2) * x.unsqueeze(1)
    torch.testing.assert_close(apply_masks(Masks(channel, None), x), by_channel.mean(dim=1))
    torch.testing.assert_close(apply_masks(Masks(None, spatial), x), by_position.mean(dim=1))
    both = (spatial.unsqueeze(2) * by_channel).mean(dim=1)
    torch.testing.assert_close(apply_masks(Masks(channel, spatial), x), both)
    expected = dice_overlap(channel, "literal") + dice_overlap(spatial.flatten(2), "literal")
    torch.testing.assert_close(mask_overlap(Masks(channel, spatial), "literal"), expected)


def test_statistics_tell_a_living_mask_from_a_dead_one() -> None:
    error = torch.arange(6.0).expand(2, 6)
    rising = torch.stack([error / 5, 1 - error / 5], dim=1)  # (2, 2, 6)
    statistics = mask_statistics(rising, error)
    torch.testing.assert_close(statistics["mask"], torch.tensor(0.5))
    torch.testing.assert_close(statistics["mask_std"], (error[0] / 5).std(correction=0))
    torch.testing.assert_close(statistics["mask_correlation"], torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(mask_statistics(rising[:, :1], error)["mask_correlation"], torch.tensor(1.0))
    torch.testing.assert_close(statistics["mask_overlap"], torch.tensor(20 / 55))  # 2 (1 4 + 2 3) / (1 + 4 + ... + 25)
    halves = torch.tensor([[[1.0, 0, 1, 0], [0, 1, 0, 1]], [[1, 0, 1, 0], [1, 0, 1, 0]]])  # they cancel, and they agree
    for masks, spread in zip(halves, (0.0, 1.0), strict=True):
        weights = mask_statistics(masks[None], error[:1, :4])["mask_weight_std"]
        torch.testing.assert_close(weights, torch.tensor(spread))
    torch.testing.assert_close((mask_weights(rising) * error).sum(dim=1), masked_error(error, rising).mean(dim=1))
    dead = mask_statistics(torch.full((2, 2, 6), 0.5), error)
    assert dead["mask_std"] == dead["mask_correlation"] == 0
    assert dead["mask_overlap"] == 1
    assert dead["mask_entropy"] == 1
    closed = mask_statistics(1e-25 * rising[:, :1], error)  # its squares are no numbers of float32 any more
    torch.testing.assert_close(closed["mask_correlation"], torch.tensor(0.0))


@pytest.mark.parametrize("form", ["squared", "standardized", "softmax", "correlation"])
def test_the_look_ahead_reward_is_what_a_step_of_imitation_does_to_the_task_loss(form: str) -> None:
    student = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    labels = torch.randint(3, (2, 4, 5))

    def task(x: Tensor) -> Tensor:
        return F.cross_entropy(x, labels, reduction="sum")

    (gradient,) = torch.autograd.grad(task(student), student)
    rewards = look_ahead_reward(student, teacher, gradient, Masks._fields, form, temperature=2.0)
    for kind, reward in rewards.items():
        assert not reward.requires_grad
        torch.testing.assert_close(reward.abs().mean(dim=1), torch.ones(2, dtype=torch.float64))
        (error,) = imitation_errors(student, teacher, (kind,), form, 2.0).values()
        (step,) = torch.autograd.grad(error.sum(), student)
        steps = [torch.zeros_like(step).flatten(2) for _ in range(3)]
        for place, alone in enumerate(steps):  # a small step of this channel or position alone
            at = (1, place) if kind == "channel" else (1, slice(None), place)
            alone[at] = step.flatten(2)[at]
        gains = [task(student) - task(student - 1e-6 * alone.view_as(step)) for alone in steps]
        for place in (0, 2):
            ratio = gains[place] / gains[1]
            torch.testing.assert_close(reward[1, place] / reward[1, 1], ratio.detach(), rtol=1e-3, atol=0)


def test_the_selection_loss_is_the_reward_collected_within_a_budget() -> None:
    mask = torch.tensor([[[0.2, 0.6], [0.4, 0.4]]])
    reward = torch.tensor([[1.0, -3.0]])
    collected = torch.tensor([(0.2 - 1.8) / 0.8, (0.4 - 1.2) / 0.8])
    outside = torch.tensor([0.1, 0.1]).square()  # of a budget of 1/2, with a mean of 0.4
    torch.testing.assert_close(selection_loss(mask, reward), (10 * outside - collected).mean())
    torch.testing.assert_close(selection_loss(mask, reward, budget=0.4), -collected.mean())


def test_masks_print_what_they_are() -> None:
    half = torch.tensor([0.4, 0.6]).expand(1, 3, 2).requires_grad_()
    assert repr(Masks(half, None)) == "Masks(channel (1, 3, 2): mean 0.50, varying by 0.100)"
    both = repr(Masks(half, torch.full((1, 3, 4, 5), 0.02)))
    assert both.endswith("; spatial (1, 3, 4, 5): mean 0.02, varying by 0.000)")
