"""Around ACAM's masks: applying, measuring and watching them, and the look-ahead objective that trains them."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from acamkd.errors import AcamkdError
from acamkd.losses.functional import dice_overlap, imitation_errors, safe_divide
from acamkd.losses.processes import mean_over_processes
from acamkd.mask_health import collapse

log = logging.getLogger(__name__)

WATCH_EVERY = 100
"""Steps between two looks at the masks."""


class Masks(NamedTuple):
    """The masks of one level; a kind that is not in use is None."""

    channel: Tensor | None
    """(N, M, C), in (0, 1)."""
    spatial: Tensor | None
    """(N, M, H, W), in (0, 1)."""

    def __repr__(self) -> str:
        """Shape, mean and deviation (over channels or positions) of each kind: whether it is alive."""
        parts = []
        for name, x in self._asdict().items():
            if x is not None:
                deviation = x.detach().flatten(2).std(dim=2, correction=0).mean()
                parts.append(f"{name} {tuple(x.shape)}: mean {x.detach().mean():.2f}, varying by {deviation:.3f}")
        return f"Masks({'; '.join(parts)})"


def apply_masks(masks: Masks, x: Tensor) -> Tensor:
    """A map seen through its masks, mean_m M^s_m M^c_m X, (N, C, H, W); a kind that is not in use counts as 1."""
    channel, spatial = masks
    if channel is not None and spatial is not None:
        return torch.einsum("nmc,nmhw->nchw", channel, spatial) / channel.shape[1] * x
    if channel is not None:
        return channel.mean(dim=1)[:, :, None, None] * x
    assert spatial is not None
    return spatial.mean(dim=1, keepdim=True) * x


def mask_overlap(masks: Masks, form: str = "pairwise") -> Tensor:
    """Dice overlap of the masks of each kind, summed over the kinds."""
    return torch.stack([dice_overlap(x.flatten(2), form) for x in masks if x is not None]).sum()


def mask_weights(mask: Tensor) -> Tensor:
    """What the masks of an image together give each error, mean_m M^2 / sum M: from (N, M, K) to (N, K).

    The mean over the masks of `masked_error` is sum_k w_k e_k.
    """
    return safe_divide(mask.square(), mask.sum(dim=2, keepdim=True)).mean(dim=1)


def mask_statistics(mask: Tensor, error: Tensor) -> dict[str, Tensor]:
    """What tells a living mask from a dead one, averaged over images and masks.

    Args:
        mask: (N, M, K).
        error: (N, K), of the imitation.

    Returns:
        `mask`, the mean; `mask_std` over the K channels or positions; `mask_entropy` in bits; `mask_overlap`, the
        pairwise Dice overlap; `mask_correlation` with the error; `mask_weight_std`, how far `mask_weights` vary,
        relative to their mean: hard masks that differ can give equal weights.
    """
    inside = mask.clamp(1e-6, 1 - 1e-6)
    entropy = -(inside * inside.log2() + (1 - inside) * (1 - inside).log2())
    centered, error = mask - mask.mean(dim=2, keepdim=True), error - error.mean(dim=1, keepdim=True)
    weights = mask_weights(mask)
    return {
        "mask": mask.mean(),
        "mask_std": centered.square().mean(dim=2).sqrt().mean(),
        "mask_entropy": entropy.mean(),
        "mask_overlap": dice_overlap(mask),
        "mask_correlation": F.cosine_similarity(centered, error.unsqueeze(1), dim=2).mean(),
        "mask_weight_std": safe_divide(weights.std(dim=1, correction=0), weights.mean(dim=1)).mean(),
    }


class CollapseWatch:
    """Looks at the masks of one level every 100 steps, and says once of each kind that it has collapsed.

    Args:
        stop: Raise an AcamkdError instead, which ends the training.
    """

    def __init__(self, stop: bool) -> None:
        self.stop = stop
        self._looks = 0
        self._said: set[str] = set()

    def look(self, masks: Masks, statistics: Mapping[str, Tensor], step: int) -> None:
        """Judge the masks in use by their statistics, `KIND_mask` and `KIND_mask_std`."""
        self._looks += 1
        steps = step + 1 if step else self._looks  # a loop of one's own need not number its steps
        if steps % WATCH_EVERY:
            return
        statistics = mean_over_processes(statistics)  # or one process would stop alone, and leave the others waiting
        for kind, mask in masks._asdict().items():
            if mask is None or kind in self._said or mask.flatten(2).shape[2] == 1:  # a single position cannot vary
                continue
            mean, spread = (statistics[f"{kind}_{name}"].item() for name in ("mask", "mask_std"))
            if why := collapse(mean, spread):
                message = f"the {kind} masks have collapsed by step {steps}: {why}"
                if self.stop:
                    raise AcamkdError(f"{message} (on_mask_collapse: stop)")
                log.warning(message)
                self._said.add(kind)


def look_ahead_reward(
    student: Tensor,
    teacher: Tensor,
    task_gradient: Tensor,
    kinds: Collection[str],
    form: str = "squared",
    temperature: float = 1.0,
) -> dict[str, Tensor]:
    """How much the student's task loss falls where one channel, or one position, moves as imitation would move it.

    A step of x_k, the student's values there, against the gradient of all errors changes the task loss by
    -<dL_task/dx_k, d(sum_j e_j)/dx_k>, to first order; the reward of k is this inner product, divided by the image's
    mean magnitude. Where errors share statistics (`standardized`, `correlation`) this is not what weighing e_k alone
    would change, which made worse masks (docs/masks.md).

    Args:
        student: Aligned map S', (N, C, H, W).
        teacher: (N, C, H, W).
        task_gradient: Of the task loss at S', (N, C, H, W).
        kinds: Which of `channel` and `spatial`.
        form: Of the imitation: see `imitation_errors`.
        temperature: tau.

    Returns:
        `channel`, (N, C), and `spatial`, (N, HW), as far as asked for, without gradient.
    """
    rewards = {}
    with torch.enable_grad():
        student = student.detach().requires_grad_()
        for kind, error in imitation_errors(student, teacher, kinds, form, temperature).items():
            (gradient,) = torch.autograd.grad(error.sum(), student, retain_graph=True)
            reward = (gradient * task_gradient).sum(dim=(2, 3) if kind == "channel" else 1).flatten(1)
            rewards[kind] = safe_divide(reward, reward.abs().mean(dim=1, keepdim=True))
    return rewards


def selection_loss(mask: Tensor, reward: Tensor, budget: float = 0.5) -> Tensor:
    """What a mask is to minimise that collects reward within a budget: -sum M r / sum M + 10 (mean M - budget)^2.

    The first part does not change with the mask's scale, which the second holds.

    Args:
        mask: (N, M, K).
        reward: (N, K).
        budget: Mean of the mask.
    """
    collected = safe_divide(torch.einsum("nmk,nk->nm", mask, reward), mask.sum(dim=2))
    return (10 * (mask.mean(dim=2) - budget).square() - collected).mean()
