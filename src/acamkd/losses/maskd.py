"""MasKD: masks of learned receptive tokens weigh the distance of the features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from acamkd.losses.base import DistillationContext, FeatureLoss, TokenModule
from acamkd.losses.functional import align_layer, dice_overlap, freeze_tokens, masked_error


class TokenMasks(TokenModule):
    """Receptive tokens of one level: masks M_t(p) = sigmoid(<E_t, X_p>) and weights pi = softmax(head(X)).

    Args:
        channels: C, channels of the feature map.
        num_tokens: T.
        weighted: Have a head that weighs the masks of each image; without it they count alike.
    """

    def __init__(self, channels: int, num_tokens: int, weighted: bool) -> None:
        super().__init__()
        self.tokens = nn.Parameter(0.01 * torch.randn(num_tokens, channels))
        self.weighting: nn.Sequential | None = None
        if weighted:
            convolutions = nn.Conv2d(channels, channels, 3, padding=1), nn.Conv2d(channels, num_tokens, 1)
            for convolution in convolutions:
                nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
            self.weighting = nn.Sequential(
                convolutions[0], nn.AdaptiveAvgPool2d(1), convolutions[1], nn.Flatten(), nn.Softmax(dim=1)
            )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Masks (N, T, H, W) of a feature map (N, C, H, W), and their weights (N, T), which sum to 1, or None."""
        return self.masks(x), None if self.weighting is None else self.weighting(x)

    def masks(self, x: Tensor) -> Tensor:
        """The masks alone, (N, T, H, W)."""
        return torch.einsum("tc,nchw->nthw", self.tokens, x).sigmoid()

    def masked(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the tokens are learned from, stage 1 of the paper.

        Args:
            x: The teacher's feature map, (N, C, H, W).

        Returns:
            sum_t pi_t M_t X, (N, C, H, W), with pi_t = 1 where the masks are unweighted; and the Dice overlap of the
            masks.
        """
        masks, weights = self(x)
        weighted = masks if weights is None else weights[:, :, None, None] * masks
        return weighted.sum(dim=1, keepdim=True) * x, dice_overlap(masks.flatten(2))


class MasKD(FeatureLoss):
    """Mean squared error under the masks of receptive tokens, which were learned on the teacher beforehand.

    Paper: Huang et al., Masked Distillation with Receptive Tokens, ICLR 2023. https://arxiv.org/abs/2205.14589
    Official code: https://github.com/hunto/MasKD

    M_t(p) = sigmoid(<E_t, T_p>), tokens E (T x C), T the teacher's feature map;
    D_t = sum_{c,p} (M_t(p) (f(S) - T)_{c,p})^2 / (C sum_p M_t(p)), the mask squared above and not below;
    L = weight * mean_n sum_t pi_t(T) D_t with weighted masks (detection), weight * mean_{n,t} D_t otherwise.
    From step `custom_mask_after` on, M := M(T) M(f(S)), both of the same tokens, without gradient through M(f(S)).

    Tokens are learned in a stage of their own (`acamkd tokens RECIPE`) and frozen here. Six weighted tokens are the
    official detection setting, eight unweighted ones on the logits the segmentation setting. Weights and steps of the
    presets are those of the released configurations; their steps count batches of 16 images. There RetinaNet's neck
    and head start from the teacher's (`student.inherit`).

    Deviations: the official segmentation code adds 1e-5 to each denominator and halves the loss. Here the denominator
    is clamped instead, and the half is in the preset's weight. Its auxiliary head takes 0.4 of that weight. The
    released detection configurations (all but FCOS) also compare the box predictions: a loss of its own, see
    `recipes/combinations/maskd_retinanet.yaml`. They freeze the tokens by a zero learning rate, which gives the same
    numbers.

    Code:
        - M_t(p) = sigmoid(<E_t, X_p>), pi_t: TokenMasks.forward
        - D_t: masked_error
        - L, M := M(T) M(f(S)): MasKD.terms
        - stage 1, sum_t pi_t M_t X: TokenMasks.masked
        - stage 1, Dice overlap: dice_overlap

    Example:
        >>> student, teacher = torch.randn(2, 16, 8, 8, requires_grad=True), torch.randn(2, 32, 8, 8)
        >>> terms = MasKD(16, 32, tokens=TokenMasks(32, 6, weighted=True).state_dict())(student, teacher)
        >>> sorted(terms)
        ['masked']

    Args:
        student_channels: C_s.
        teacher_channels: C_t.
        weight: Factor of the loss.
        num_tokens: Number of tokens.
        weighted: Weigh the masks of each image by a learned head (pi).
        tokens: Learned state of this level's `token_module`; in a recipe the file that `acamkd tokens` wrote. Without
            it the tokens stay random.
        custom_mask_after: Step from which the student's masks multiply the teacher's; None = never.
        align: Project the student even where the channels agree, as the published detection settings do.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "retinanet": {"weight": 7.0, "custom_mask_after": 7000, "align": True},
        "retinanet_x101_teacher": {"weight": 7.0, "custom_mask_after": 8500, "align": True},
        "fcos": {"weight": 10.0, "custom_mask_after": 5000, "align": True},
        "reppoints_x101_teacher": {"weight": 10.0, "custom_mask_after": 5000, "align": True},
        "faster_rcnn": {"weight": 1.0, "custom_mask_after": 7330, "align": True},
        "faster_rcnn_cascade_teacher": {"weight": 1.0, "custom_mask_after": 5000, "align": True},
        "segmentation": {"weight": 0.5, "num_tokens": 8, "weighted": False},
    }

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        *,
        weight: float = 1.0,
        num_tokens: int = 6,
        weighted: bool = True,
        tokens: Mapping[str, Tensor] | None = None,
        custom_mask_after: int | None = None,
        align: bool = False,
    ) -> None:
        super().__init__(student_channels, teacher_channels)
        self.weight = weight
        self.custom_mask_after = custom_mask_after
        self.align = align_layer(student_channels, teacher_channels, align)
        self.token_module = TokenMasks(teacher_channels, num_tokens, weighted)
        freeze_tokens(self.token_module, tokens)

    def terms(self, student: Tensor, teacher: Tensor, context: DistillationContext) -> dict[str, Tensor]:
        """Return `masked`: see the class."""
        student = self.align(student)
        masks, weights = self.token_module(teacher)  # (N, T, H, W), (N, T)
        if self.custom_mask_after is not None and context.step >= self.custom_mask_after:
            with torch.no_grad():
                masks = masks * self.token_module.masks(student)
        squared = (student - teacher).square().mean(dim=1)  # (N, H, W)
        error = masked_error(squared.flatten(1), masks.flatten(2))  # (N, T)
        mean = error.mean() if weights is None else (weights * error).sum(dim=1).mean()
        return {"masked": self.weight * mean}

    @property
    def tokens(self) -> TokenModule:
        """The receptive tokens."""
        return self.token_module

    @torch.no_grad()
    def masks(self, student: Tensor, teacher: Tensor, context: DistillationContext | None = None) -> dict[str, Tensor]:
        """The teacher's masks, `spatial` (N, T, H, W), which the student's multiply from `custom_mask_after` on."""
        return {"spatial": self.token_module.masks(teacher)}
