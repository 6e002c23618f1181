"""What tells active masks from collapsed ones, and the watch over them during a training."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from acamkd.errors import AcamkdError
from acamkd.losses.acam.masks import Masks
from acamkd.losses.functional import dice_overlap, safe_divide
from acamkd.mask_health import collapse
from acamkd.processes import mean_over_processes

log = logging.getLogger(__name__)

WATCH_EVERY = 100
"""Steps between two looks at the masks."""


def mask_weights(mask: Tensor) -> Tensor:
    """What the masks of an image together give each error, mean_m M^2 / sum M: from (N, M, K) to (N, K).

    The mean over the masks of `masked_error` is sum_k w_k e_k.
    """
    return safe_divide(mask.square(), mask.sum(dim=2, keepdim=True)).mean(dim=1)


def mask_statistics(mask: Tensor, error: Tensor) -> dict[str, Tensor]:
    """What tells an active mask from a collapsed one, averaged over images and masks.

    Args:
        mask: (N, M, K).
        error: (N, K), the distillation distance of each channel or location.

    Returns:
        `mask`: the mean. `mask_std`: the standard deviation over the K channels or locations. `mask_entropy`: in bits.
        `mask_overlap`: the pairwise Dice overlap. `mask_correlation`: with the error. `mask_weight_std`: the standard
        deviation of `mask_weights` relative to their mean. Saturated masks that differ can give equal weights.
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

    def look(self, masks: Masks, statistics: Mapping[str, Tensor], step: int, title: str) -> None:
        """Judge the masks in use by their statistics, `KIND_mask` and `KIND_mask_std`; `title` is the level's."""
        if not step:  # a number that changes with every step would be compiled anew
            self._looks += 1
        steps = step + 1 if step else self._looks  # a loop of one's own need not number its steps
        if steps % WATCH_EVERY:
            return
        figures = mean_over_processes(statistics)  # or one process would stop alone, and leave the others waiting
        values = dict(zip(figures, torch.stack([*figures.values()]).tolist(), strict=True))  # waits for a GPU once
        for kind, mask in masks.in_use().items():
            if kind in self._said or mask.flatten(2).shape[2] == 1:  # a single location cannot vary
                continue
            if why := collapse(values[f"{kind}_mask"], values[f"{kind}_mask_std"]):
                message = f"the {kind} masks have collapsed by step {steps}: {why}"
                if self.stop:
                    raise AcamkdError(f"{message} (on_mask_collapse: stop)")  # a Distiller adds the title
                log.warning("%s: %s", title, message)
                self._said.add(kind)
