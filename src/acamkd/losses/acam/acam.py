"""ACAM-KD: student and teacher decide together, anew at every step, where the student learns from the teacher.

`reference.py` beside this file is the paper; this is the same in little memory, with options.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acamkd.losses.acam.distances import distillation_distances
from acamkd.losses.acam.fusion import STCAFF
from acamkd.losses.acam.masks import ASCM, Masks, apply_masks, mask_overlap
from acamkd.losses.acam.objective import look_ahead_reward, selection_loss
from acamkd.losses.acam.statistics import CollapseWatch, mask_statistics
from acamkd.losses.base import DistillationContext, FeatureLoss, TokenModule
from acamkd.losses.functional import (
    align_layer,
    check_choices,
    freeze_tokens,
    full_precision,
    masked_error,
    resample,
)

LEARNING = ("cooperative", "teacher")
"""Sources of masks that learn while the student does."""


class ACAM(FeatureLoss):
    """Distillation under masks that cross-attention between student and teacher makes.

    Paper: Lan and Tian, ACAM-KD: Adaptive and Cooperative Attention Masking for Knowledge Distillation, ICCV 2025.
    https://arxiv.org/abs/2503.06307

    The published method is the preset `paper`. The defaults depart from it, mainly so that the masks do not collapse.

    Code:
        - (1) S' = f(S): align_layer
        - (2), (3) F = A V: STCAFF.forward
        - (4) M^c, M^s: ASCM.masks
        - (5), (6) L_c, L_s: masked_error
        - (7) L_div: mask_overlap
        - D, in every channel and at every location: distillation_distances
        - r: look_ahead_reward
        - L_sel: selection_loss
        - mean_m M^s_m M^c_m T, with mask_grad="task": apply_masks

    Example:
        >>> student, teacher = torch.randn(2, 16, 8, 8, requires_grad=True), torch.randn(2, 32, 8, 8)
        >>> terms = ACAM(16, 32, **ACAM.PRESETS["paper"])(student, teacher)
        >>> sorted(terms)
        ['channel', 'diversity', 'spatial']

    Args:
        student_channels: C_s.
        teacher_channels: C_t; masks and comparison live in the teacher's channels.
        num_masks: M. The paper takes 6 for detection and the number of classes for segmentation.
        weight: alpha, factor of L_c and L_s.
        diversity_weight: lambda, factor of L_div.
        query: Whose feature map is the query; the other's is key and value. `teacher` is the paper.
        masks: `spatial`, `channel` or `both` (the paper).
        mask_source: What the masks come from. `cooperative`: both networks. `teacher`: the teacher alone. `fixed`:
            tokens that `acamkd tokens RECIPE` learned, without fusion. `random`: the method, untrained and frozen.
            `uniform`: all ones, so that each term is the plain mean of the distance, without diversity.
        mask_grad: What trains the masks, beside the diversity. `look_ahead`: the reward L_sel. `joint` (the paper): the
            distillation terms, which the student feels through K and V. `detached`: nothing. `task`: the frozen
            teacher's own loss on its masked feature map, which costs it a second forward and a backward.
        imitation: The distance D. `squared`: the paper. `standardized`: of feature maps standardized per channel, as
            in PKD. For logits: `softmax`, KL as in CWD, and `correlation`, as in DIST.
        temperature: tau of imitation="softmax" and "correlation".
        diversity: `literal` (the paper) or `pairwise`, the mean over pairs of masks.
        tokens: With mask_source="fixed": learned state of `selection`; in a recipe the file that `acamkd tokens` wrote.
            Without it the tokens stay random.
        kv_stride: Side of the square windows that are one key and value each. 1 is exact, and the paper. `auto`: the
            smallest side that leaves at most 128 windows, which makes the cost linear in the number of locations.
        normalize: Layer norm of both feature maps before the fusion, over the channels of each location.
        align: Project the student even where the channels agree.
        on_mask_collapse: Masks that learn are checked every 100 steps. Of collapsed ones `warn` says so once, and
            `stop` ends the training.
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
        masks: Literal["spatial", "channel", "both"] = "spatial",
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
            ACAM.__init__, query=query, masks=masks, mask_source=mask_source, mask_grad=mask_grad, imitation=imitation,
            diversity=diversity, on_mask_collapse=on_mask_collapse,
        )  # fmt: skip
        self.kinds: tuple[str, ...] = Masks._fields if masks == "both" else (masks,)
        if tokens is not None and mask_source != "fixed":
            raise ValueError(f"tokens belong to mask_source='fixed', not to {mask_source!r}")
        if num_masks < 1:
            raise ValueError(f"num_masks must be at least 1, not {num_masks}")
        if kv_stride != "auto" and not (isinstance(kv_stride, int) and kv_stride >= 1):
            raise ValueError(f"kv_stride must be a whole number from 1, or 'auto', not {kv_stride!r}")
        fuses = mask_source not in ("fixed", "uniform")
        for name, is_given in (("normalize", normalize), ("kv_stride", kv_stride != 1)):
            if is_given and not fuses:
                raise ValueError(f"{name} acts on the fusion, and mask_source={mask_source!r} has none")
        if query != "teacher" and mask_source not in ("cooperative", "random"):
            raise ValueError(f"query={query!r} needs masks of both networks, not those of mask_source={mask_source!r}")
        if temperature != 1 and imitation in ("squared", "standardized"):
            raise ValueError(f"temperature acts on 'softmax' and 'correlation', not on imitation={imitation!r}")
        if mask_grad == "task" and mask_source not in LEARNING:
            raise ValueError(f"mask_grad='task' needs masks that learn, and mask_source={mask_source!r} has none")
        if on_mask_collapse == "stop" and mask_source not in LEARNING:
            raise ValueError(f"on_mask_collapse='stop' needs masks that learn; mask_source={mask_source!r} has none")
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
        self.fuses = fuses
        if fuses:
            self.fusion = STCAFF(teacher_channels, kv_stride, normalize, average="channel" in self.kinds)
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
        learning = "task_gradient" in self.needs and context.labeled and torch.is_grad_enabled()
        looking_ahead = learning and context.task_gradient is not None
        if looking_ahead and not student.requires_grad:
            student = student.detach().requires_grad_()  # the reward is a gradient at it
        errors = distillation_distances(student, teacher, self.kinds, self.imitation, self.temperature)
        rewards = {}
        if looking_ahead and torch.compiler.is_compiling():
            rewards = self._rewards_apart(student, teacher, context)
        elif looking_ahead:
            rewards = self._rewards(errors, student, context)
        terms = {}
        self.statistics = {}
        for kind, mask in masks.in_use().items():
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
            self.watch.look(masks, self.statistics, context.step, self.title)
        return terms

    def _masks(self, student: Tensor, teacher: Tensor) -> Masks:
        """Masks from the aligned student's feature map and the teacher's, both (N, C, H, W)."""
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
            query, key_value = (teacher, partner) if self.query == "teacher" else (partner, teacher)
            return self.selection.masks(*self.fusion(query, key_value, self.selection.spatial_units()))

    @torch.no_grad()
    def masks(self, student: Tensor, teacher: Tensor, context: DistillationContext | None = None) -> dict[str, Tensor]:
        """The masks in use: `channel`, (N, M, C_t), and `spatial`, (N, M, H_t, W_t)."""
        student, teacher = self._to_common_form(student, teacher)
        return self._masks(self.align(student), teacher).in_use()

    @property
    def teacher_task(self) -> bool:
        """With mask_grad="task"."""
        return self.mask_grad == "task"

    @property
    def masks_minimize(self) -> bool:
        """With mask_grad="joint"."""
        return self.mask_grad == "joint" and self.mask_source in LEARNING

    @property
    def tokens(self) -> TokenModule | None:
        """The selection units, with mask_source="fixed"."""
        return self.selection if self.mask_source == "fixed" else None

    @property
    def attention_module(self) -> nn.Module | None:
        """STCA-FF, where the masks come from a fusion."""
        return self.fusion if self.fuses else None

    @classmethod
    def scaled_options(cls, options: Mapping[str, Any]) -> tuple[str, ...]:
        """The diversity reaches the student only where the masks' gradient does."""
        return ("weight", "diversity_weight") if options["mask_grad"] == "joint" else ("weight",)

    def masked(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The teacher's feature map under the masks, for its own loss.

        The gradient reaches the masks' parts, and what the feature map was computed from: masks of an earlier layer.

        Args:
            student: (N, C_s, H_s, W_s).
            teacher: (N, C_t, H, W).
        """
        with full_precision(teacher):
            aligned, target = self._to_common_form(student.detach(), teacher)
            masks = self._masks(self.align(aligned).detach(), target)
            return apply_masks(masks, teacher.to(target.dtype)).to(teacher.dtype)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _rewards_apart(self, student: Tensor, teacher: Tensor, context: DistillationContext) -> dict[str, Tensor]:
        """`_rewards` of distances of their own: a compiled graph gives no gradient between two of its outputs."""
        student = student.detach().requires_grad_()
        errors = distillation_distances(student, teacher, self.kinds, self.imitation, self.temperature)
        return self._rewards(errors, student, context)

    def _rewards(
        self, errors: Mapping[str, Tensor], student: Tensor, context: DistillationContext
    ) -> dict[str, Tensor]:
        """Of each distance (see `terms`) of the aligned student's feature map, (N, C, H, W)."""
        assert context.task_gradient is not None  # `needs` names it, and the images are labeled
        gradient = resample(context.task_gradient.detach().to(student.dtype), student.shape[-2:])
        if isinstance(self.align, nn.Conv2d):
            # A step of S' is felt through the transposed align, so the task's gradient is carried over by the align.
            gradient = F.conv2d(gradient, self.align.weight.detach())
        return look_ahead_reward(errors, student, gradient)
