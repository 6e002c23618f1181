"""FGD: the objects and the background apart (focal), and their relations (global)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from acamkd.losses.base import DistillationContext, FeatureLoss
from acamkd.losses.functional import align_layer


def attention_maps(x: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Where and in which channels a feature map (N, C, H, W) is strong.

    Returns:
        Spatial attention (N, H, W) of sum HW and channel attention (N, C) of sum C, per image.
    """
    count, channels, height, width = x.shape
    strength = x.abs()
    spatial = (strength.mean(dim=1).flatten(1) / temperature).softmax(dim=1) * (height * width)  # (N, HW)
    channel = (strength.mean(dim=(2, 3)) / temperature).softmax(dim=1) * channels
    return spatial.view(count, height, width), channel


def foreground_mask(boxes: Tensor, input_size: tuple[int, int], size: Sequence[int]) -> Tensor:
    """One over the area of the smallest box at each location of a feature map, 0 outside every box.

    Args:
        boxes: (K, 4), x1 y1 x2 y2 in pixels of the padded input; K may be 0.
        input_size: (height, width) of the padded input.
        size: (H, W) of the feature map.

    Returns:
        (H, W).
    """
    height, width = size
    x = boxes[:, 0::2] * width / input_size[1]  # (K, 2), in columns of the feature map
    y = boxes[:, 1::2] * height / input_size[0]
    left, right = x[:, :1].floor(), x[:, 1:].ceil()  # (K, 1)
    top, bottom = y[:, :1].floor(), y[:, 1:].ceil()
    column = torch.arange(width, device=boxes.device)
    row = torch.arange(height, device=boxes.device)
    # The end belongs to the box, and the area is that of the whole box even where it leaves the feature map.
    in_columns = (left <= column) & (column <= right)  # (K, W)
    in_rows = (top <= row) & (row <= bottom)  # (K, H)
    area = (right + 1 - left) * (bottom + 1 - top)  # (K, 1)
    covered = in_rows.unsqueeze(2) * (in_columns / area).unsqueeze(1)  # (K, H, W)
    return torch.cat([covered.new_zeros(1, height, width), covered]).amax(dim=0)


def background_mask(foreground: Tensor) -> Tensor:
    """One over the number of locations outside all boxes, there; 0 inside: (N, H, W) -> (N, H, W)."""
    outside = (foreground == 0).to(foreground.dtype)
    return outside / outside.sum(dim=(1, 2), keepdim=True).clamp_min(1)


class GlobalContext(nn.Module):
    """Global context block: X + MLP(sum_p X_p softmax_p(conv(X))), (N, C, H, W) -> (N, C, H, W).

    The identity at first, since the last layer starts from zero.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = channels // 2
        self.attention = nn.Conv2d(channels, 1, kernel_size=1)
        self.transform = nn.Sequential(
            nn.Conv2d(channels, hidden, kernel_size=1),
            nn.LayerNorm([hidden, 1, 1]),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, channels, kernel_size=1),
        )
        nn.init.kaiming_normal_(self.attention.weight, nonlinearity="relu")
        for parameter in self.transform[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """Add the transformed context to every location."""
        weights = self.attention(x).flatten(2).softmax(dim=2)  # (N, 1, HW)
        context = x.flatten(2) @ weights.transpose(1, 2)  # (N, C, 1)
        added: Tensor = self.transform(context.unsqueeze(3))  # (N, C, 1, 1)
        return x + added


class FGD(FeatureLoss):
    """Focal and global distillation: objects, background, attention and global relations, each with a weight.

    Paper: Yang et al., Focal and Global Knowledge Distillation for Detectors, CVPR 2022.
    https://arxiv.org/abs/2111.11837
    Official code: https://github.com/yzd-v/FGD

    A^S(X) = HW softmax_p(mean_c |X| / tau),  A^C(X) = C softmax_c(mean_p |X| / tau)
    e = (f(S) - T)^2 A^S(T) A^C(T)
    L_fg  = 1/N sum e M_fg     M_fg: 1 / area of the smallest box that covers the location, 0 outside
    L_bg  = 1/N sum e M_bg     M_bg: 1 / number of locations outside all boxes, 0 inside
    L_att = 1/N (sum |A^S(f(S)) - A^S(T)| + sum |A^C(f(S)) - A^C(T)|)
    L_rel = 1/N sum (GC_s(f(S)) - GC_t(T))^2     GC: GlobalContext, one for each network, both learned
    L = weight (foreground L_fg + background L_bg + attention L_att + relation L_rel)

    f is a 1x1 convolution where the channels differ. The terms are sums over channels and locations, hence the small
    weights.

    Defaults: the published RetinaNet setting, which GFL and SOLO share. Presets carry the weights and temperatures of
    the other published detectors; `faster_rcnn` is also Mask R-CNN's. The layers are the outputs of the pyramid's
    convolutions. The students' necks and heads start from the teacher's (`student.inherit`), except under a cascade.

    Deviations, all of them the authors' code's from the paper's text: a box covers its last row and column too, and
    its area counts them and what lies outside the feature map. The relation term passes gradient to both context
    blocks. The default of gamma in their class (0.001) is used by none of their settings. The student's attention is
    only in L_att. Boxes are scaled from the padded input here; the code scales by each image's size without padding,
    which stretches the boxes of a padded image into the padding.

    Code:
        - A^S, A^C: attention_maps
        - M_fg: foreground_mask
        - M_bg: background_mask
        - GC: GlobalContext.forward
        - e, L_fg, L_bg, L_att, L_rel, L: FGD.terms

    Example:
        >>> context = DistillationContext(input_size=(64, 64), boxes=[torch.tensor([[8.0, 8.0, 40.0, 40.0]])])
        >>> terms = FGD(16, 32)(torch.randn(1, 16, 8, 8, requires_grad=True), torch.randn(1, 32, 8, 8), context)
        >>> sorted(terms)
        ['attention', 'background', 'foreground', 'relation']

    Args:
        student_channels: C_s.
        teacher_channels: C_t.
        weight: Factor of all terms together.
        foreground: Factor of L_fg, alpha in the paper.
        background: Factor of L_bg, beta in the paper.
        attention: Factor of L_att, gamma in the paper.
        relation: Factor of L_rel, lambda in the paper.
        temperature: tau; larger values make the attention more even.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "retinanet": {"foreground": 1e-3, "background": 5e-4, "attention": 5e-4, "relation": 5e-6},
        "gfl": {"foreground": 1e-3, "background": 5e-4, "attention": 5e-4, "relation": 5e-6},
        "fcos": {
            "foreground": 1.6e-3, "background": 8e-4, "attention": 8e-4, "relation": 8e-6, "temperature": 0.8,
        },
        "reppoints": {"foreground": 1.6e-3, "background": 8e-4, "attention": 8e-4, "relation": 8e-6},
        "faster_rcnn": {"foreground": 5e-5, "background": 2.5e-5, "attention": 5e-5, "relation": 5e-7},
    }  # fmt: skip

    needs = frozenset({"boxes", "input_size"})

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        *,
        weight: float = 1.0,
        foreground: float = 1e-3,
        background: float = 5e-4,
        attention: float = 5e-4,
        relation: float = 5e-6,
        temperature: float = 0.5,
    ) -> None:
        super().__init__(student_channels, teacher_channels)
        self.weight = weight
        self.foreground = foreground
        self.background = background
        self.attention = attention
        self.relation = relation
        self.temperature = temperature
        self.align = align_layer(student_channels, teacher_channels)
        self.student_context = GlobalContext(teacher_channels)
        self.teacher_context = GlobalContext(teacher_channels)

    def terms(self, student: Tensor, teacher: Tensor, context: DistillationContext) -> dict[str, Tensor]:
        """Return `foreground`, `background`, `attention` and `relation`: see the class."""
        aligned = self.align(student)
        foreground, background = self._box_masks(teacher, context)  # (N, H, W)
        spatial_s, channel_s = attention_maps(aligned, self.temperature)  # (N, H, W), (N, C)
        spatial_t, channel_t = attention_maps(teacher, self.temperature)
        error = torch.einsum("nchw,nc->nhw", (aligned - teacher).square(), channel_t) * spatial_t
        attention = (spatial_s - spatial_t).abs().sum() + (channel_s - channel_t).abs().sum()
        relation = (self.student_context(aligned) - self.teacher_context(teacher)).square().sum()
        scale = self.weight / len(teacher)
        return {
            "foreground": scale * self.foreground * (error * foreground).sum(),
            "background": scale * self.background * (error * background).sum(),
            "attention": scale * self.attention * attention,
            "relation": scale * self.relation * relation,
        }

    @torch.no_grad()
    def masks(self, student: Tensor, teacher: Tensor, context: DistillationContext | None = None) -> dict[str, Tensor]:
        """M_fg and M_bg as `foreground` and `background`, (N, 1, H_t, W_t); `context` must have the boxes."""
        foreground, background = self._box_masks(teacher, context or DistillationContext())
        return {"foreground": foreground.unsqueeze(1), "background": background.unsqueeze(1)}

    def _box_masks(self, teacher: Tensor, context: DistillationContext) -> tuple[Tensor, Tensor]:
        assert context.boxes is not None  # `needs` names both
        assert context.input_size is not None
        size = teacher.shape[-2:]
        foreground = torch.stack(
            [foreground_mask(boxes.to(teacher), context.input_size, size) for boxes in context.boxes]
        )
        return foreground, background_mask(foreground)
