"""ACAM-KD: student and teacher decide together, anew at every step, where the student imitates the teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acamkd.losses.acam.fusion import Condensed, cross_attention, heavy_hitters, layer_norm, window_side
from acamkd.losses.acam.masks import (
    CollapseWatch,
    Masks,
    apply_masks,
    look_ahead_reward,
    mask_overlap,
    mask_statistics,
    selection_loss,
)
from acamkd.losses.base import DistillationContext, FeatureLoss
from acamkd.losses.functional import (
    align_layer,
    check_choices,
    freeze_tokens,
    full_precision,
    imitation_errors,
    masked_error,
    resample,
    safe_divide,
)

LEARNING = ("cooperative", "teacher")
"""Sources of masks that learn while the student does."""


class STCAFF(nn.Module):
    """Student-teacher cross-attention feature fusion: one network asks, the other answers.

    Of the fused map F = A V, the masks read its average over positions and its products with the spatial units. Both
    are linear in V, so that F itself, and V, need never be computed: (A V)^T m = A (V^T m), and the average of F is V
    times the average row of A.

    With windows, the positions to which a sample of the queries attends most stay keys of their own, and of the others
    each window is one key, the mean of its positions, and counts as many times. What this leaves out, that a query
    attends more to some positions of a window than to others, is put back into what the spatial units see, to first
    order in the query: by the covariance of keys and values within windows, averaged over all of them, times the
    attention a_i that the query pays to windows, m F_i += a_i m E[dV dK^T] q_i / sqrt(C_q). The shift is damped to stay
    below the deviation of m V within windows, as no mean over a window can differ by much more from the plain one.

    Args:
        channels: C, of both maps.
        kv_stride: Side of the windows, or `auto` for `window_side`; 1 is the paper.
        normalize: Layer norm of both maps first, over the channels of each position and without parameters.
    """

    def __init__(self, channels: int, kv_stride: int | Literal["auto"] = 1, normalize: bool = False) -> None:
        super().__init__()
        self.kv_stride = kv_stride
        self.normalize = normalize
        query_channels = max(1, channels // 2)
        self.query = nn.Conv2d(channels, query_channels, kernel_size=1)
        self.key = nn.Conv2d(channels, query_channels, kernel_size=1)
        self.value = nn.Conv2d(channels, channels, kernel_size=1)

    def forward(self, asking: Tensor, answering: Tensor, units: Tensor) -> tuple[Tensor, Tensor]:
        """Fuse two maps of (N, C, H, W) into F, seen through units (M, C): its average (N, C), and (N, M, H, W)."""
        if self.normalize:
            asking, answering = layer_norm(asking), layer_norm(answering)
        weight, bias = self.value.weight.flatten(1), self.value.bias
        assert bias is not None
        query, readout = self.query(asking), units @ weight  # (N, C_q, H, W), (M, C)
        side = window_side(answering.shape[2:]) if self.kv_stride == "auto" else self.kv_stride
        if side == 1:
            answers = answering.flatten(2)
            read, received = cross_attention(query.flatten(2), self.key(answering).flatten(2), readout @ answers)
        else:
            answers, read, received = self._condensed(query, answering, readout, side)
        pooled = torch.einsum("nck,nk->nc", answers, received)
        logits = read + (units @ bias).unsqueeze(1)  # the rows of A sum to 1, so that the bias of V is one of F
        return F.linear(pooled, weight, bias), logits.reshape(*logits.shape[:2], *asking.shape[-2:])

    def _condensed(self, query: Tensor, answering: Tensor, readout: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor]:
        """With windows: what answers (N, C, K), A V seen through the units (N, M, HW), the average row of A (N, K)."""
        to_key = self.key.weight.flatten(1) * query.shape[1] ** -0.5  # (C_q, C)
        keys = Condensed.of(answering, side, heavy_hitters(answering, query, to_key))
        query, answers = query.flatten(2), torch.cat([keys.means, keys.singles], dim=2)
        counts = F.pad(keys.counts, (0, keys.singles.shape[2]), value=1.0)
        in_windows = F.pad(torch.ones_like(keys.counts), (0, keys.singles.shape[2])).unsqueeze(1)
        values = torch.cat([readout @ answers, in_windows], dim=1)
        read, received = cross_attention(query, self.key(answers.unsqueeze(3)).flatten(2), values, counts)
        # The covariance is that of the map; what keys and values make of it is linear.
        varied = keys.covariance(readout.mT.expand(len(query), -1, -1))  # (N, C, M)
        shift = (to_key @ varied).mT @ query
        variance = (readout.mT * varied).sum(dim=1).unsqueeze(2)  # of m V within windows
        shift = shift * torch.rsqrt(1 + safe_divide(shift.square(), variance))
        return answers, read[:, :-1] + read[:, -1:] * shift, received


class ASCM(nn.Module):
    """Adaptive spatial-channel masking: M learnable selection units of each kind turn the fused map into masks.

    Args:
        channels: C.
        num_masks: M.
        kinds: Which of `channel` and `spatial`; only these get units.
    """

    def __init__(self, channels: int, num_masks: int, kinds: Sequence[str] = Masks._fields) -> None:
        super().__init__()
        self.channels = channels
        # Unit-variance logits for unit-variance features: the masks start around 0.5 and differ from each other.
        self.channel = nn.Parameter(torch.randn(num_masks, 1)) if "channel" in kinds else None
        self.spatial = nn.Parameter(torch.randn(num_masks, channels) * channels**-0.5) if "spatial" in kinds else None

    def forward(self, fused: Tensor) -> Masks:
        """Masks from the fused map (N, C, H, W)."""
        return self.masks(fused.mean(dim=(2, 3)), torch.einsum("mc,nchw->nmhw", self.spatial_units(), fused))

    def spatial_units(self) -> Tensor:
        """m_s, (M, C); none where there are only channel masks."""
        return self.spatial if self.spatial is not None else next(self.parameters()).new_empty(0, self.channels)

    def masks(self, pooled: Tensor, logits: Tensor) -> Masks:
        """Masks from v, (N, C), and m_s F, (N, M, H, W)."""
        return Masks(
            None if self.channel is None else torch.sigmoid(self.channel * pooled.unsqueeze(1)),  # (N, M, C)
            None if self.spatial is None else torch.sigmoid(logits),
        )

    def masked(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What fixed masks are learned from: a map (N, C, H, W) under its own masks, and the overlap of these."""
        masks = self(x)
        return apply_masks(masks, x), mask_overlap(masks)


class ACAM(FeatureLoss):
    """Masked imitation where cross-attention between student and teacher decides the masks.

    Paper: Lan and Tian, ACAM-KD: Adaptive and Cooperative Attention Masking for Knowledge Distillation, ICCV 2025.

    With the teacher's map T, the aligned student's S' = f(S), both (C, H, W), and D = (T - S')^2:

        STCA-FF   Q = W_q T, K = W_k S', V = W_v S', F = softmax(Q^T K / sqrt(C_q)) V
        ASCM      M^c = sigmoid(m_c v), v the average of F over positions;  M^s = sigmoid(m_s F)
        channel   L_c = 1/M sum_m sum_{k,p} (M^c_{m,k})^2 D_{k,p} / (HW sum_k M^c_{m,k})
        spatial   L_s = 1/M sum_m sum_{k,p} (M^s_{m,p})^2 D_{k,p} / (C sum_p M^s_{m,p})
        diversity L_div = Dice overlap between different masks of one kind, summed over the kinds
        total     weight (L_c + L_s) + diversity_weight L_div

    All three are means over the images. Nothing of this remains at inference. The paper compares every level of a
    detector's neck, or a segmenter's logits before upsampling; its detectors' necks and heads start from the teacher's
    (`student.inherit`).

    The paper leaves open, and here is done:
        - The normalizer of L_c and L_s is read as a fraction (MasKD's code has the same form); the only other reading,
          a factor, would be of the order of 1e4 to 1e7 beside a detection loss of order 1.
        - Diversity: `literal` is the formula as typeset, in [0, M - 1]; `pairwise` is MasKD's mean over pairs, in
          [0, 1], which keeps diversity_weight = 1 comparable for every M.
        - C_q = C // 2, at least 1; the 1x1 convolutions have a bias; the units start from N(0, 1) (channel) and
          N(0, 1/C) (spatial), so that masks of normalized features start around 0.5 and unequal.
        - Denominators are clamped to 1e-31 (float32); the paper names no epsilon.
        - MasKD's softmax weighting of the masks is left out: nothing in the paper speaks of it.
        - `query="student"`: Q from the student, K and V from the teacher.

    Four defaults depart from the method as published, which is the preset `paper`. The diversity is the mean over pairs
    (above). Of the two kinds of masks the default has the spatial ones alone: with channel masks beside them students
    were worse on one data set and no better on the other (docs/results.md). With imitation="squared" the channels with
    the largest values decide, and their scale is the loss's; the default compares channels that are standardized over
    the batch. With mask_grad="joint" both terms shrink with the masks and nothing holds the masks up, so that training
    drives them to zero and the distillation with them. The default is mask_grad="look_ahead", with an objective of the
    masks' own, for every mask and image

        L_sel = -sum_p M_p r_p / sum_p M_p + 10 (mean_p M_p - 1/2)^2,  r_p = <dL_task/dS'_p, d(sum D)/dS'_p>

    where r is what a step of imitation at p does to the student's task loss, to first order, divided by the image's
    mean |r|; for channels likewise. mask_grad="task" holds them up too: a teacher whose features are masked away loses
    its own task.

    Args:
        student_channels: C_s.
        teacher_channels: C_t; masks and comparison live in the teacher's channels.
        num_masks: M. The paper takes 6 for detection and the number of classes for segmentation.
        weight: alpha, factor of L_c and L_s.
        diversity_weight: lambda, factor of L_div.
        query: Who asks in the fusion: `teacher` (the paper's choice) or `student`.
        masks: `spatial`, `channel` or `both` (the paper's choice); or a list of the first two.
        mask_source: What the masks come from. `cooperative`: the method. `teacher`: Q, K and V all from the teacher.
            `fixed`: frozen tokens, learned beforehand (`acamkd tokens RECIPE`, by the teacher's own loss on
            mean_m M^s_m M^c_m T), on the teacher's map without fusion.
            `random`: the method with everything that makes masks untrained and frozen. `uniform`: all-ones masks, so
            that each term is the plain mean squared error, and no diversity.
        mask_grad: What trains the masks that learn, beside the diversity. `look_ahead`: a place is worth imitating when
            a step of imitation there lowers the student's task loss; the terms `KIND_selection` collect that reward
            within a budget, mean M = 0.5. The Distiller takes that slope from the student's own backward, which it then
            does not repeat; elsewhere it comes with the context. Unlabeled images get the masks that labeled
            ones taught. `joint`: the distillation terms, and the student feels them through K and V (the method). With
            all others the student feels only the finished masks. `detached`: nothing. `task`: the frozen teacher's own
            loss on the map that they mask, mean_m M^s_m M^c_m T. This costs a second forward and a backward of the
            teacher.
        imitation: What D is. `squared`: the method. `standardized`: the same of maps standardized per channel over the
            batch (PKD). `softmax`, for logits: divergence of each position's distribution over the channels (L_s) and
            of each channel's over the positions (L_c, CWD). `correlation`, for logits: one minus the correlation of
            the channels' probabilities, over the channels of a position (L_s) and the positions of a channel (L_c), as
            in DIST.
        temperature: tau of imitation="softmax" and "correlation".
        diversity: `pairwise` or `literal`.
        tokens: With mask_source="fixed": learned state of `selection`; in a recipe the file that `acamkd tokens` wrote.
            Without it the tokens stay random.
        kv_stride: Side of the square windows over which the map that answers is averaged before keys and values are
            made of it. Every position still asks, up to 128 positions that get the most attention stay keys of their
            own, and what varies within the windows counts to first order. 1 is exact. `auto`: on each level the
            smallest side that leaves at most 128 windows (1 on maps of up to 256 positions), which makes the cost
            linear in the positions.
        normalize: Fuse maps after a layer norm, over the channels of each position and without parameters. Raw maps are
            the paper's; where their values are large, a query may see a single key (1.1 of 320 in a trained FCOS).
        align: Project the student even where the channels agree.
        on_mask_collapse: Masks that learn are looked at every 100 steps. Where their mean or their deviation has left
            what can still select, `warn` says so once, `stop` ends the training.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {
            "num_masks": 6, "weight": 1.0, "diversity_weight": 1.0, "query": "teacher", "masks": "both",
            "mask_source": "cooperative", "mask_grad": "joint", "imitation": "squared", "diversity": "literal",
            "kv_stride": 1, "normalize": False,
        }
    }  # fmt: skip

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        *,
        num_masks: int = 6,
        weight: float = 1.0,
        diversity_weight: float = 1.0,
        query: Literal["teacher", "student"] = "teacher",
        masks: Literal["spatial", "channel", "both"] | Sequence[str] = "spatial",
        mask_source: Literal["cooperative", "teacher", "fixed", "random", "uniform"] = "cooperative",
        mask_grad: Literal["look_ahead", "joint", "detached", "task"] = "look_ahead",
        imitation: Literal["squared", "standardized", "softmax", "correlation"] = "standardized",
        temperature: float = 1.0,
        diversity: Literal["pairwise", "literal"] = "pairwise",
        tokens: Mapping[str, Tensor] | None = None,
        kv_stride: int | Literal["auto"] = 1,
        normalize: bool = False,
        align: bool = False,
        on_mask_collapse: Literal["warn", "stop"] = "warn",
    ) -> None:
        super().__init__(student_channels, teacher_channels)
        check_choices(
            ACAM.__init__, query=query, mask_source=mask_source, mask_grad=mask_grad, imitation=imitation,
            diversity=diversity, on_mask_collapse=on_mask_collapse,
        )  # fmt: skip
        self.kinds = Masks._fields if masks == "both" else (masks,) if isinstance(masks, str) else tuple(masks)
        if not self.kinds or not set(self.kinds) <= set(Masks._fields):
            raise ValueError(f"masks must be 'spatial', 'channel' or 'both', or a list of the first two, not {masks!r}")
        if tokens is not None and mask_source != "fixed":
            raise ValueError(f"tokens belong to mask_source='fixed', not to {mask_source!r}")
        if num_masks < 1:
            raise ValueError(f"num_masks must be at least 1, not {num_masks}")
        if kv_stride != "auto" and not (isinstance(kv_stride, int) and kv_stride >= 1):
            raise ValueError(f"kv_stride must be a whole number from 1, or 'auto', not {kv_stride!r}")
        fuses = mask_source not in ("fixed", "uniform")
        if normalize and not fuses:
            raise ValueError(f"normalize acts on the fusion, and mask_source={mask_source!r} has none")
        if mask_grad == "task" and mask_source not in LEARNING:
            raise ValueError(f"mask_grad='task' needs masks that learn, and mask_source={mask_source!r} has none")
        if mask_grad == "look_ahead" and mask_source in LEARNING:
            self.needs = self.needs | {"task_gradient"}
        self.num_masks = num_masks
        self.weight = weight
        self.diversity_weight = diversity_weight
        self.query = query
        self.mask_source = mask_source
        self.mask_grad = mask_grad
        self.imitation = imitation
        self.temperature = temperature
        self.diversity = diversity
        self.watch = CollapseWatch(stop=on_mask_collapse == "stop")
        self.align = align_layer(student_channels, teacher_channels, align)
        if fuses:
            self.fusion = STCAFF(teacher_channels, kv_stride, normalize)
        if mask_source != "uniform":
            self.selection = ASCM(teacher_channels, num_masks, self.kinds)
        if mask_source == "fixed":
            freeze_tokens(self.selection, tokens)
        if mask_source == "random":
            self.requires_grad_(False)
            self.align.requires_grad_(True)

    def terms(self, student: Tensor, teacher: Tensor, context: DistillationContext) -> dict[str, Tensor]:
        """Return `channel`, `spatial`, `diversity` and the look-ahead's `KIND_selection`, as far as they are in use."""
        student = self.align(student)
        masks = self._masks(student if self.mask_grad == "joint" else student.detach(), teacher)
        errors = imitation_errors(student, teacher, self.kinds, self.imitation, self.temperature)
        looking_ahead = "task_gradient" in self.needs and context.labeled and context.task_gradient is not None
        rewards = self._rewards(student, teacher, context) if looking_ahead else {}
        terms = {}
        self.statistics = {}
        for kind, mask in masks._asdict().items():
            if mask is None:
                continue
            mask = mask.flatten(2)  # (N, M, C) or (N, M, HW)
            selecting = mask if self.mask_grad == "joint" else mask.detach()
            terms[kind] = self.weight * masked_error(errors[kind], selecting).mean()
            if kind in rewards:
                terms[f"{kind}_selection"] = selection_loss(mask, rewards[kind])
            figures = mask_statistics(mask.detach(), errors[kind].detach())
            self.statistics |= {f"{kind}_{name}": value for name, value in figures.items()}
        if self.mask_source != "uniform":
            terms["diversity"] = self.diversity_weight * mask_overlap(masks, self.diversity)
        if self.training and self.mask_source in LEARNING:
            self.watch.look(masks, self.statistics, context.step)
        return terms

    def _masks(self, student: Tensor, teacher: Tensor) -> Masks:
        """Masks from the aligned student's map and the teacher's, both (N, C, H, W)."""
        if self.mask_source == "uniform":
            images, channels, height, width = teacher.shape
            return Masks(
                teacher.new_ones(images, self.num_masks, channels) if "channel" in self.kinds else None,
                teacher.new_ones(images, self.num_masks, height, width) if "spatial" in self.kinds else None,
            )
        frozen = self.mask_source in ("fixed", "random")  # constants of the loss, without gradient to the student too
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            if self.mask_source == "fixed":
                masks: Masks = self.selection(teacher)
                return masks
            partner = teacher if self.mask_source == "teacher" else student
            asking, answering = (teacher, partner) if self.query == "teacher" else (partner, teacher)
            return self.selection.masks(*self.fusion(asking, answering, self.selection.spatial_units()))

    @torch.no_grad()
    def masks_of(self, student: Tensor, teacher: Tensor) -> Masks:
        """The masks of two maps, (N, C_s, H_s, W_s) and (N, C_t, H, W), for images and statistics."""
        student, teacher = self._to_common_form(student, teacher)
        return self._masks(self.align(student), teacher)

    @property
    def teacher_task(self) -> bool:
        """Whether the Distiller is to add the teacher's own loss on `masked` features."""
        return self.mask_grad == "task"

    def masked(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The teacher's map under the masks, for its own loss.

        The gradient reaches the masks' parts and whatever the map was computed from, as the masks of an earlier layer.

        Args:
            student: (N, C_s, H_s, W_s).
            teacher: (N, C_t, H, W).
        """
        with full_precision(teacher):
            aligned, target = self._to_common_form(student.detach(), teacher)
            masks = self._masks(self.align(aligned).detach(), target)
            return apply_masks(masks, teacher.to(target.dtype)).to(teacher.dtype)

    def _rewards(self, student: Tensor, teacher: Tensor, context: DistillationContext) -> dict[str, Tensor]:
        assert context.task_gradient is not None  # `needs` names it, and the images are labeled
        gradient = resample(context.task_gradient.detach().to(student.dtype), student.shape[-2:])
        if isinstance(self.align, nn.Conv2d):
            # A step of S' is felt through the transposed align, so the task's gradient is carried over by the align.
            gradient = F.conv2d(gradient, self.align.weight.detach())
        return look_ahead_reward(student, teacher, gradient, self.kinds, self.imitation, self.temperature)
