"""The look-ahead reward, and what masks learn from it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from acamkd.losses.acam.distances import distillation_distances
from acamkd.losses.acam.masks import Masks
from acamkd.losses.acam.objective import look_ahead_reward, selection_loss
from acamkd.losses.base import DistillationContext
from acamkd.losses.functional import resample
from tiny_maps import joint, maps


@pytest.mark.parametrize("form", ["squared", "standardized", "softmax", "correlation"])
def test_the_look_ahead_reward_is_what_a_step_of_distillation_does_to_the_task_loss(form: str) -> None:
    student = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    labels = torch.randint(3, (2, 4, 5))

    def task(x: Tensor) -> Tensor:
        return F.cross_entropy(x, labels, reduction="sum")

    (gradient,) = torch.autograd.grad(task(student), student)
    errors = distillation_distances(student, teacher, Masks._fields, form, temperature=2.0)
    rewards = look_ahead_reward(errors, student, gradient)
    for kind, reward in rewards.items():
        assert not reward.requires_grad
        torch.testing.assert_close(reward.abs().mean(dim=1), torch.ones(2, dtype=torch.float64))
        (error,) = distillation_distances(student, teacher, (kind,), form, 2.0).values()
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


@pytest.mark.parametrize(
    ("of_student", "of_teacher"), [((2, 2), (2, 2)), ((4, 4), (2, 2)), ((2, 2), (4, 4)), ((2, 6), (4, 3))]
)
def test_an_align_carries_the_task_gradient_to_the_teachers_channels(
    of_student: tuple[int, int], of_teacher: tuple[int, int]
) -> None:
    """And resampling to the teacher's size, which is linear too."""
    student, (_, teacher) = maps(1, 2, 3, *of_student)[0], maps(1, 2, 3, *of_teacher)
    loss = joint(2, 3, num_masks=1, mask_grad="look_ahead").double()
    gradient = torch.randn_like(student)
    aligned = loss.align(resample(student, of_teacher))
    errors = distillation_distances(aligned, teacher, loss.kinds)
    rewards = loss._rewards(errors, aligned, DistillationContext(task_gradient=gradient))
    for kind, dims in (("channel", (2, 3)), ("spatial", 1)):
        reward = rewards[kind]
        squared = (aligned - teacher).square().mean(dim=dims).flatten()
        felt = torch.stack([
            (torch.autograd.grad(error, student, retain_graph=True)[0] * gradient).sum() for error in squared
        ])  # fmt: skip
        torch.testing.assert_close(reward[0], felt / felt.abs().mean())


def test_look_ahead_masks_rise_where_imitation_pays_and_stay_active() -> None:
    """The task wants the teacher's map on the left half and the opposite on the right."""
    teacher = torch.randn(4, 6, 8, 8)
    teacher[:, 0, :, :4] += 3  # by which the masks can tell them apart
    student = teacher / 2
    sign = torch.where(torch.arange(8) < 4, 1.0, -1.0)
    context = DistillationContext(task_gradient=(student - teacher) * sign)
    loss = joint(6, 6, num_masks=2, mask_grad="look_ahead", diversity_weight=0.0)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.02)
    for _ in range(100):
        optimizer.zero_grad()
        loss(student, teacher, context)["spatial_selection"].backward()
        optimizer.step()
    mask = loss.masks(student, teacher)["spatial"]
    assert 0.3 < mask.mean() < 0.7
    assert mask[..., :4].mean() > 0.7
    assert mask[..., 4:].mean() < 0.3


def test_only_the_masks_learn_from_the_look_ahead() -> None:
    student, teacher = maps(2, 3, 4, 6, 5)
    loss = joint(3, 4, mask_grad="look_ahead").double()
    context = DistillationContext(task_gradient=torch.randn_like(student))
    terms = loss(student, teacher, context)
    assert set(terms) == {"channel", "channel_selection", "spatial", "spatial_selection", "diversity"}
    for name, kind in (("channel_selection", "spatial"), ("spatial_selection", "channel"), ("diversity", "none")):
        gradients = torch.autograd.grad(
            terms[name], [student, *loss.parameters()], retain_graph=True, allow_unused=True
        )
        reached = {n for (n, _), g in zip(loss.named_parameters(), gradients[1:], strict=True) if g is not None}
        assert gradients[0] is None
        assert reached == {
            n for n, _ in loss.named_parameters() if not n.startswith("align") and n != f"selection.{kind}"
        }
    for name in ("channel", "spatial"):  # the student feels the masks, and does not move them
        gradients = torch.autograd.grad(terms[name], list(loss.parameters()), retain_graph=True, allow_unused=True)
        reached = {n for (n, _), g in zip(loss.named_parameters(), gradients, strict=True) if g is not None}
        assert reached == {"align.weight", "align.bias"}
    with pytest.raises(ValueError, match="ACAM needs task_gradient in the DistillationContext"):
        loss(student, teacher)
    with torch.no_grad():  # a validation's loss: nothing learns
        assert set(loss(student, teacher)) == {"channel", "spatial", "diversity"}
