from __future__ import annotations

import math

import pytest
import torch

from acamkd.losses.base import DistillationContext
from acamkd.losses.fgd import FGD, GlobalContext, attention_maps, background_mask, foreground_mask
from tiny_maps import vanishing_terms

FRAME = (32, 64)
SIZE = (4, 8)  # one position for 8 pixels
BOXES = [torch.tensor([[8.0, 8.0, 24.0, 16.0], [40.0, 0.0, 60.0, 20.0]]), torch.zeros(0, 4)]
CONTEXT = DistillationContext(input_size=FRAME, boxes=BOXES)


def test_a_box_covers_its_last_row_and_column() -> None:
    mask = foreground_mask(torch.tensor([[8.0, 8.0, 24.0, 16.0]]), FRAME, SIZE)
    expected = torch.zeros(SIZE)
    expected[1:3, 1:4] = 1 / (2 * 3)  # columns 1..3, rows 1..2
    torch.testing.assert_close(mask, expected)


def test_corners_are_rounded_outwards() -> None:
    mask = foreground_mask(torch.tensor([[9.0, 7.0, 17.0, 9.0]]), FRAME, SIZE)
    expected = torch.zeros(SIZE)
    expected[0:3, 1:4] = 1 / 9
    torch.testing.assert_close(mask, expected)


def test_the_area_counts_what_lies_outside_the_map() -> None:
    mask = foreground_mask(torch.tensor([[0.0, 0.0, 64.0, 32.0]]), FRAME, SIZE)
    torch.testing.assert_close(mask, torch.full(SIZE, 1 / (5 * 9)))


def test_the_smallest_box_wins() -> None:
    large, small = [0.0, 0.0, 60.0, 30.0], [8.0, 8.0, 15.0, 15.0]
    mask = foreground_mask(torch.tensor([large, small]), FRAME, SIZE)
    assert mask[1, 1].item() == pytest.approx(1 / 4)
    assert mask[0, 0].item() == pytest.approx(1 / (5 * 9))
    torch.testing.assert_close(foreground_mask(torch.tensor([small, large]), FRAME, SIZE), mask)


def test_background_is_even_and_sums_to_one_unless_all_is_foreground() -> None:
    foreground = torch.stack([torch.zeros(SIZE), torch.full(SIZE, 0.1), torch.eye(8)[:4]])
    background = background_mask(foreground)
    torch.testing.assert_close(background[0], torch.full(SIZE, 1 / 32))
    assert background.sum(dim=(1, 2)).tolist() == pytest.approx([1, 0, 1])
    assert background[2][foreground[2] > 0].eq(0).all()


def test_masks_of_an_image_without_boxes() -> None:
    x = torch.randn(2, 3, *SIZE)
    masks = FGD(3, 3).masks(x, x, CONTEXT)
    assert masks["foreground"].shape == masks["background"].shape == (2, 1, *SIZE)
    assert masks["foreground"][1].eq(0).all()
    torch.testing.assert_close(masks["background"][1], torch.full((1, *SIZE), 1 / 32))


def test_attention_by_hand() -> None:
    x = torch.tensor([[0.0, math.log(3.0)]]).view(1, 1, 1, 2)
    spatial, channel = attention_maps(-x, temperature=1.0)
    torch.testing.assert_close(spatial, torch.tensor([[[0.5, 1.5]]]))
    torch.testing.assert_close(channel, torch.tensor([[1.0]]))
    spatial, channel = attention_maps(torch.randn(2, 3, 4, 5), temperature=0.5)
    torch.testing.assert_close(spatial.sum(dim=(1, 2)), torch.full((2,), 20.0))
    torch.testing.assert_close(channel.sum(dim=1), torch.full((2,), 3.0))


def test_terms_by_hand_under_even_attention() -> None:
    # |T| = 1 everywhere, so that both attentions are 1; (S - T)^2 = 4, and S has the same attention.
    teacher = torch.ones(2, 3, *SIZE)
    fgd = FGD(3, 3, weight=2.0, foreground=1.0, background=1.0, attention=1.0, relation=1.0)
    terms = fgd(-teacher, teacher, CONTEXT)
    covered = foreground_mask(BOXES[0], FRAME, SIZE).sum().item()
    assert terms["foreground"].item() == pytest.approx(2 / 2 * 4 * 3 * covered)
    assert terms["background"].item() == pytest.approx(2 / 2 * 4 * 3 * 2)  # M_bg sums to 1 in each of two images
    assert terms["attention"].item() == pytest.approx(0, abs=1e-5)
    # The context blocks start as the identity: sum (S - T)^2 / N.
    assert terms["relation"].item() == pytest.approx(2 / 2 * 4 * 3 * 32 * 2)


def test_context_blocks_start_as_the_identity_and_learn() -> None:
    x = torch.randn(2, 4, 3, 5)
    torch.testing.assert_close(GlobalContext(4)(x), x)
    fgd = FGD(4, 4)
    fgd(x, torch.randn(2, 4, 3, 5), CONTEXT)["relation"].backward()
    for block in (fgd.student_context, fgd.teacher_context):
        gradient = block.transform[-1].weight.grad
        assert isinstance(gradient, torch.Tensor)
        assert gradient.abs().sum() > 0


def test_foreground_gradient_stays_inside_the_boxes() -> None:
    student = torch.randn(2, 3, *SIZE, requires_grad=True)
    FGD(3, 3)(student, torch.randn(2, 3, *SIZE), CONTEXT)["foreground"].backward()
    assert student.grad is not None
    inside = (foreground_mask(BOXES[0], FRAME, SIZE) > 0).expand(3, *SIZE)
    assert student.grad[0][inside].ne(0).all()
    assert student.grad[0][~inside].eq(0).all()
    assert student.grad[1].eq(0).all()


def test_boxes_and_size_are_needed() -> None:
    x = torch.randn(2, 3, *SIZE)
    with pytest.raises(ValueError, match="boxes, input_size"):
        FGD(3, 3)(x, x)


def test_presets_are_finite() -> None:
    for preset in FGD.PRESETS.values():
        terms = FGD(3, 4, **preset)(torch.randn(2, 3, *SIZE), torch.randn(2, 4, *SIZE), CONTEXT)
        assert all(term.isfinite() for term in terms.values())
    default = FGD(4, 4)
    assert all(getattr(default, option) == value for option, value in FGD.PRESETS["retinanet"].items())
    assert FGD.PRESETS["fcos"]["temperature"] == 0.8


def test_equal_feature_maps_cost_nothing() -> None:
    assert vanishing_terms(FGD(8, 8)) == {
        "foreground",
        "background",
        "attention",
        "relation",
    }  # while both context blocks are the identity
