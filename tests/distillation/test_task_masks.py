"""ACAM with mask_grad="task": masks learn from the teacher's own loss, the student only feels them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acamkd.distillation.distiller import Distiller
from acamkd.losses import ACAM
from acamkd.losses.acam.masks import ASCM, Masks, apply_masks
from acamkd.models.base import Batch, TaskModel, head_of
from acamkd.models.segmentation import Segmenter

COLORS = torch.tensor([[0.1, 0.1, 0.1], [0.8, 0.2, 0.2], [0.2, 0.8, 0.2], [0.2, 0.2, 0.8]])
LAYER = "3"


def segmenter(width: int) -> Segmenter:
    first, second = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
    net = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Conv2d(width, 4, 1))
    return Segmenter(net, 4, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def noisy_squares(model: TaskModel) -> Batch:
    labels = torch.randint(0, 4, (1, 4, 4)).repeat_interleave(8, 1).repeat_interleave(8, 2)  # (1, 32, 32)
    images = COLORS[labels].permute(0, 3, 1, 2) + 0.15 * torch.randn(1, 3, 32, 32)
    return model.prepare(list(images.clamp(0, 1)), [{"mask": mask} for mask in labels])


def distiller(loss: ACAM, teacher: Segmenter | None = None) -> Distiller:
    return Distiller(segmenter(8), teacher or segmenter(16), [(LAYER, LAYER)], [loss])


def gradients(total: Tensor, module: nn.Module) -> list[Tensor | None]:
    return list(torch.autograd.grad(total, list(module.parameters()), retain_graph=True, allow_unused=True))


def test_the_teachers_loss_reaches_the_masks_alone() -> None:
    loss = ACAM(8, 16, num_masks=3, masks="both", mask_grad="task")
    model = distiller(loss)
    terms = model(noisy_squares(model.student))
    assert {name for name in terms if name.startswith("teacher/")} == {"teacher/cross_entropy"}
    own = terms["teacher/cross_entropy"]
    assert all(g is not None and g.abs().sum() > 0 for g in gradients(own, loss.selection))
    fusion = {name: g for (name, _), g in zip(loss.fusion.named_parameters(), gradients(own, loss.fusion), strict=True)}
    assert all(fusion[f"{layer}.weight"].abs().sum() > 0 for layer in ("query", "key", "value"))  # type: ignore[union-attr]
    assert gradients(own, model.student) == [None] * 6
    assert gradients(own, loss.align) == [None] * 2
    assert not any(parameter.requires_grad for parameter in model.teacher.parameters())


def test_distillation_and_diversity_do_not_pass_through_the_masks_to_the_student() -> None:
    loss = ACAM(8, 16, num_masks=3, masks="both", mask_grad="task")
    model = distiller(loss)
    terms = model(noisy_squares(model.student))
    imitation = terms[f"{LAYER}/acam/channel"] + terms[f"{LAYER}/acam/spatial"]
    assert gradients(imitation, loss.selection) == [None] * 2
    assert gradients(imitation, loss.fusion) == [None] * 6
    assert all(g is not None for g in gradients(imitation, loss.align))
    diversity = terms[f"{LAYER}/acam/diversity"]
    assert gradients(diversity, model.student) == [None] * 6
    assert all(g is not None for g in gradients(diversity, loss.selection))


def test_the_teacher_goes_on_with_its_masked_map() -> None:
    loss = ACAM(8, 16, num_masks=3, masks="both", mask_grad="task")
    model = distiller(loss)
    batch = noisy_squares(model.student)
    student_net: Any = model.student.net
    teacher_net: Any = model.teacher.net
    student_map, teacher_map = student_net[:4](batch.pixels), teacher_net[:4](batch.pixels)
    masks = loss.masks(student_map, teacher_map)
    seen = sum(masks["channel"][:, m, :, None, None] * masks["spatial"][:, m, None] for m in range(3)) / 3 * teacher_map
    expected = head_of(model.teacher).loss({"out": teacher_net[4](seen)}, batch)["cross_entropy"]
    torch.testing.assert_close(model(batch)["teacher/cross_entropy"], expected)


def test_a_kind_that_is_not_in_use_counts_as_one() -> None:
    x = torch.ones(1, 2, 3, 3)
    channel, spatial = torch.full((1, 4, 2), 0.5), torch.full((1, 4, 3, 3), 0.25)
    assert apply_masks(Masks(channel, None), x).tolist() == (0.5 * x).tolist()
    assert apply_masks(Masks(None, spatial), x).tolist() == (0.25 * x).tolist()
    assert apply_masks(Masks(channel, spatial), x).tolist() == (0.125 * x).tolist()
    masked, overlap = ASCM(2, 4, ["spatial"]).masked(torch.zeros(1, 2, 3, 3))
    assert masked.abs().sum() == 0
    assert overlap.item() == pytest.approx(1.0)  # all masks are 0.5


@pytest.mark.parametrize("source", ["fixed", "random", "uniform"])
def test_masks_that_do_not_learn_are_refused(source: str) -> None:
    with pytest.raises(ValueError, match=f"mask_grad='task' needs masks that learn, and mask_source='{source}'"):
        ACAM(8, 8, mask_source=source, mask_grad="task")  # type: ignore[arg-type]


def test_masks_that_joint_training_drives_to_zero_stay() -> None:
    teacher = segmenter(16)
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=1e-2)
    for _ in range(60):
        batch = noisy_squares(teacher)
        optimizer.zero_grad()
        teacher.loss(teacher(batch), batch)["cross_entropy"].backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    joint, task = (
        _masks_after(ACAM(8, 16, num_masks=4, masks="both", mask_grad=how), teacher) for how in ("joint", "task")
    )
    assert joint["spatial_mask"] < 0.01
    assert task["spatial_mask"] > 0.3
    assert task["channel_mask"] > 0.3


def _masks_after(loss: ACAM, teacher: Segmenter) -> dict[str, float]:
    torch.manual_seed(1)
    model = distiller(loss, teacher)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(80):
        optimizer.zero_grad()
        torch.stack(list(model(noisy_squares(teacher), step).values())).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return {name: float(value) for name, value in loss.statistics.items()}
