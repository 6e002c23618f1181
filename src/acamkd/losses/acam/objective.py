"""What trains the masks with mask_grad="look_ahead": a reward for each channel or location, within a budget."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from acamkd.losses.functional import safe_divide


def look_ahead_reward(errors: Mapping[str, Tensor], student: Tensor, task_gradient: Tensor) -> dict[str, Tensor]:
    """How much the student's task loss falls where one channel, or one location, moves as distillation would move it.

    A step of x_k, the student's values there, against the gradient of all distances changes the task loss by
    -<dL_task/dx_k, d(sum_j e_j)/dx_k>, to first order. The reward of k is this inner product, divided by the image's
    mean magnitude. Where distances share statistics (`standardized`, `correlation`), weighting e_k alone would change
    something else. Rewarding that made worse masks.

    Args:
        errors: `channel`, (N, C), and `spatial`, (N, HW), or one of them: `distillation_distances` of the student.
        student: Aligned feature map S', (N, C, H, W), with gradient.
        task_gradient: Of the task loss at S', (N, C, H, W).

    Returns:
        A reward for each error, without gradient.
    """
    rewards = {}
    for kind, error in errors.items():
        (gradient,) = torch.autograd.grad(error, student, torch.ones_like(error), retain_graph=True)
        reward = (gradient * task_gradient).sum(dim=(2, 3) if kind == "channel" else 1).flatten(1)
        rewards[kind] = safe_divide(reward, reward.abs().mean(dim=1, keepdim=True))
    return rewards


def selection_loss(mask: Tensor, reward: Tensor, budget: float = 0.5) -> Tensor:
    """Collect reward within a budget: -sum M r / sum M + 10 (mean M - budget)^2, averaged over masks and images.

    The first part does not change with the mask's scale, which the second holds.

    Args:
        mask: (N, M, K).
        reward: (N, K).
        budget: Mean of the mask.
    """
    collected = safe_divide(torch.einsum("nmk,nk->nm", mask, reward), mask.sum(dim=2))
    return (10 * (mask.mean(dim=2) - budget).square() - collected).mean()
