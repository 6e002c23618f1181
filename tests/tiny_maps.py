"""Small feature maps, and what several tests of losses do with them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from acamkd.losses import ACAM, DistillationContext, FeatureLoss


def maps(
    n: int, c_s: int, c_t: int, height: int, width: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Random ones of student and teacher."""
    student = torch.randn(n, c_s, height, width, dtype=dtype, requires_grad=True)
    return student, torch.randn(n, c_t, height, width, dtype=dtype)


def context_of(student: Tensor) -> DistillationContext:
    """Two boxes in the first image, one of them beyond the border, and none in the others; a task that is content."""
    first = torch.tensor([[4.0, 6.0, 30.0, 50.0], [20.0, 10.0, 40.0, 70.0]])
    boxes = [first] + [torch.zeros(0, 4)] * (len(student) - 1)
    return DistillationContext(input_size=(64, 48), boxes=boxes, task_gradient=torch.zeros_like(student))


def vanishing_terms(loss: FeatureLoss) -> set[str]:
    """The terms of a loss between 8 channels that equal feature maps bring to zero."""
    student, teacher = maps(2, 8, 8, 8, 8, torch.float32)
    apart, same = (loss(x, teacher, context_of(x)) for x in (student, teacher.clone()))
    return {name for name in same if same[name].item() <= 1e-5 * apart[name].item()}


def joint(student_channels: int, teacher_channels: int, **options: Any) -> ACAM:
    """ACAM with the published masks, their published training and distance, unless the options name others."""
    published = {"masks": "both", "mask_grad": "joint", "imitation": "squared"}
    return ACAM(student_channels, teacher_channels, **(published | options))


def gradients_of(term: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """Gradient of one term; zero where it depends on nothing."""
    if not term.requires_grad:
        return [torch.zeros_like(tensor) for tensor in tensors]
    return list(torch.autograd.grad(term, tensors, retain_graph=True, materialize_grads=True))
