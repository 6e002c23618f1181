"""FreeKD: wavelet bands are compared under the masks of frequency tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acamkd.losses.base import DistillationContext, FeatureLoss, TokenModule
from acamkd.losses.functional import align_layer, check_choices, dice_overlap, freeze_tokens

TokenAxis: TypeAlias = Literal["level", "orientation"]

LEVELS = 3


def haar(x: Tensor, levels: int = LEVELS) -> tuple[Tensor, list[Tensor]]:
    """Orthonormal Haar wavelet transform; odd sides are padded by one zero, right or bottom.

    Args:
        x: (N, C, H, W).
        levels: Number of decompositions.

    Returns:
        The low-pass (N, C, h, w), and per level, finest first, three oriented bands (N, C, 3, h_j, w_j).
    """
    details = []
    for _ in range(levels):
        x = F.pad(x, (0, x.shape[-1] % 2, 0, x.shape[-2] % 2))
        blocks = F.pixel_unshuffle(x, 2)  # (N, 4C, h, w)
        bands = _blocks_to_bands(blocks.reshape(*x.shape[:2], 4, *blocks.shape[-2:]))  # (N, C, 4, h, w)
        x = bands[:, :, 0]
        details.append(bands[:, :, 1:])
    return x, details


def inverse_haar(low: Tensor, details: Sequence[Tensor], size: Sequence[int]) -> Tensor:
    """Undo `haar`: (N, C, h, w) and its details -> (N, C, *size), `size` being that of the original feature map."""
    sizes = [size, *(detail.shape[-2:] for detail in details)]
    for detail, (height, width) in zip(reversed(details), reversed(sizes[:-1]), strict=True):
        blocks = _blocks_to_bands(torch.cat((low.unsqueeze(2), detail), dim=2))
        low = F.pixel_shuffle(blocks.flatten(1, 2), 2)[..., :height, :width]
    return low


def _blocks_to_bands(blocks: Tensor) -> Tensor:
    """One Haar step on blocks of 2 x 2 locations, (N, C, 4, h, w), which is its own inverse."""
    a, b, c, d = (blocks / 2).unbind(dim=2)
    top, bottom, top_difference, bottom_difference = a + b, c + d, a - b, c - d
    return torch.stack(
        (top + bottom, top - bottom, top_difference + bottom_difference, top_difference - bottom_difference), dim=2
    )


class FrequencyTokens(TokenModule):
    """Tokens (4, T, C) of one feature level: set 0 for the low-pass, three for the bands.

    Args:
        channels: C, channels of the feature map.
        num_tokens: T.
        token_axis: See FreeKD.
    """

    def __init__(self, channels: int, num_tokens: int, token_axis: TokenAxis) -> None:
        super().__init__()
        check_choices(FrequencyTokens.__init__, token_axis=token_axis)
        self.token_axis = token_axis
        self.tokens = nn.Parameter(0.01 * torch.randn(1 + LEVELS, num_tokens, channels))

    def forward(self, details: Sequence[Tensor]) -> list[Tensor]:
        """Masks of the bands (N, C, 3, h_j, w_j): (N, T, O, h_j, w_j), O = 1 where the orientations share them."""
        if self.token_axis == "orientation":
            return [torch.einsum("otc,ncohw->ntohw", self.tokens[1:], bands).sigmoid() for bands in details]
        return [
            torch.einsum("tc,ncohw->nthw", tokens, bands).sigmoid().unsqueeze(2)
            for tokens, bands in zip(self.tokens[1:], details, strict=True)
        ]

    def masked(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the tokens are learned from, stage 1 of the paper.

        Args:
            x: The teacher's feature map, (N, C, H, W).

        Returns:
            The feature map rebuilt from its masked bands, of the same shape; and the sum of the masks' Dice overlaps.
        """
        low, details = haar(x)
        low_masks = torch.einsum("tc,nchw->nthw", self.tokens[0], low).sigmoid()
        masks = self(details)
        rebuilt = inverse_haar(
            low_masks.sum(dim=1, keepdim=True) * low,
            [mask.sum(dim=1, keepdim=True) * bands for mask, bands in zip(masks, details, strict=True)],
            x.shape[-2:],
        )
        overlaps = [dice_overlap(mask.flatten(2)) for mask in (low_masks, *masks)]
        return rebuilt, torch.stack(overlaps).sum()


class FreeKD(FeatureLoss):
    """L1 distance of Haar wavelet bands under masks of tokens, which were learned on the teacher, plus an MSE hint.

    Paper: Zhang et al., FreeKD: Knowledge Distillation via Semantic Frequency Prompt, CVPR 2024.
    https://arxiv.org/abs/2311.12079
    Official code: https://github.com/Gumpest/FreeKD

    B_{j,o}(X): the detail bands o = 1..3 at level j = 1..3 of X's Haar transform, level 1 the finest;
    M_{j,t} = sigmoid(<E_{j,t}, sum_o B_{j,o}(T)>);
    frequency = sum_j mean_{n,t,c,o,p} M_{j,t}(p) |B_{j,o}(f(S)) - B_{j,o}(T)|;
    L = weight * (frequency_weight * frequency + feature_weight * mean_{n,c,p} (f(S) - T)^2).
    The low-pass band is not distilled.

    Tokens are learned in a stage of their own (`acamkd tokens RECIPE`) and frozen here. But for `align`, the defaults
    are the one released configuration, RetinaNet with a ResNet-101 teacher, which is the preset `retinanet`. The
    weights of the other presets stand in configurations whose loss was not released.

    Deviations: none from the official code with a preset. The paper gives each orientation a token set. The code takes
    the three levels for the three orientations, so that its sets belong to levels. The orientations of a level share
    the masks that the sum of their bands gives. `token_axis: level` is that code. `orientation` is the paper:
    set o masks orientation o at every level, M_{j,o,t} = sigmoid(<E_{o,t}, B_{j,o}(T)>). The released configuration
    also compares the box predictions: a loss of its own, see `recipes/combinations/freekd_retinanet.yaml`.

    Code:
        - B_{j,o}: haar
        - M_{j,t}: FrequencyTokens.forward
        - frequency, L: FreeKD.terms
        - stage 1, the feature map rebuilt from masked bands, and the Dice overlap: FrequencyTokens.masked

    Example:
        >>> student, teacher = torch.randn(2, 16, 8, 8, requires_grad=True), torch.randn(2, 32, 8, 8)
        >>> terms = FreeKD(16, 32, tokens=FrequencyTokens(32, 6, "level").state_dict())(student, teacher)
        >>> sorted(terms)
        ['feature', 'frequency']

    Args:
        student_channels: C_s.
        teacher_channels: C_t.
        weight: Factor of the whole loss.
        frequency_weight: Factor of the wavelet term.
        feature_weight: Factor of the mean squared error.
        num_tokens: Number of tokens per set.
        tokens: Learned state of this level's `token_module`; in a recipe the file that `acamkd tokens` wrote. Without
            it the tokens stay random.
        token_axis: What a token set belongs to: `level` (official code) or `orientation` (paper).
        align: Project the student even where the channels agree, as the published settings do.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "retinanet": {"frequency_weight": 1.0, "feature_weight": 5.0, "align": True},
        "retinanet_x101_teacher": {"frequency_weight": 1.0, "feature_weight": 5.0, "align": True},
        "fcos": {"frequency_weight": 5.0, "feature_weight": 10.0, "align": True},
        "faster_rcnn": {"frequency_weight": 0.8, "feature_weight": 1.0, "align": True},
        "faster_rcnn_cascade_teacher": {"frequency_weight": 1.0, "feature_weight": 2.0, "align": True},
    }

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        *,
        weight: float = 1.0,
        frequency_weight: float = 1.0,
        feature_weight: float = 5.0,
        num_tokens: int = 6,
        tokens: Mapping[str, Tensor] | None = None,
        token_axis: TokenAxis = "level",
        align: bool = False,
    ) -> None:
        super().__init__(student_channels, teacher_channels)
        self.weight = weight
        self.frequency_weight = frequency_weight
        self.feature_weight = feature_weight
        self.align = align_layer(student_channels, teacher_channels, align)
        self.token_module = FrequencyTokens(teacher_channels, num_tokens, token_axis)
        freeze_tokens(self.token_module, tokens)

    def terms(self, student: Tensor, teacher: Tensor, context: DistillationContext) -> dict[str, Tensor]:
        """Return `frequency` and `feature`: see the class."""
        student = self.align(student)
        targets = haar(teacher)[1]
        masks = self.token_module(targets)
        distances = [(bands - target).abs() for bands, target in zip(haar(student)[1], targets, strict=True)]
        # Masks know no channels and distances no tokens: their means are taken before they meet.
        frequency = torch.stack(
            [(mask.mean(dim=1) * d.mean(dim=1)).mean() for mask, d in zip(masks, distances, strict=True)]
        ).sum()
        return {
            "frequency": self.weight * self.frequency_weight * frequency,
            "feature": self.weight * self.feature_weight * F.mse_loss(student, teacher),
        }

    @property
    def tokens(self) -> TokenModule:
        """The frequency tokens."""
        return self.token_module
