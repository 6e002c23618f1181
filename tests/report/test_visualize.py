from __future__ import annotations

import numpy as np
import torch

from acamkd.models.base import VOID
from acamkd.report.visualize import COLOURS, MIN_SCORE, SCALE, Block, draw_findings, draw_masks, draw_sheet

IMAGE = torch.full((3, 8, 8), 100, dtype=torch.uint8)


def _colour(label: int) -> torch.Tensor:
    text = COLOURS[label - 1].lstrip("#")
    return torch.tensor([int(text[i : i + 2], 16) for i in (0, 2, 4)], dtype=torch.uint8)


def test_boxes_have_the_colours_of_their_classes() -> None:
    boxes = torch.tensor([[1.0, 1.0, 6.0, 6.0]])
    drawn = draw_findings(IMAGE, {"boxes": boxes, "labels": torch.tensor([2])})
    assert drawn.shape == (3, 8 * SCALE, 8 * SCALE)
    assert torch.equal(drawn[:, 3 * SCALE, SCALE], _colour(2))
    assert torch.equal(drawn[:, 3 * SCALE, 3 * SCALE], IMAGE[:, 0, 0])  # nothing fills the box


def test_weak_boxes_are_left_out() -> None:
    boxes, labels = torch.tensor([[1.0, 1.0, 6.0, 6.0]]), torch.tensor([1])
    weak = draw_findings(IMAGE, {"boxes": boxes, "labels": labels, "scores": torch.tensor([MIN_SCORE - 0.01])})
    strong = draw_findings(IMAGE, {"boxes": boxes, "labels": labels, "scores": torch.tensor([MIN_SCORE + 0.01])})
    assert (weak == 100).all()
    assert not (strong == 100).all()


def test_masks_colour_classes_and_leave_background_and_void() -> None:
    mask = torch.zeros((8, 8), dtype=torch.int64)
    mask[:2], mask[2:4] = 3, VOID
    drawn = draw_findings(IMAGE, {"mask": mask})
    towards = (drawn[:, 0, 0].int() - 100).sign()
    assert torch.equal(towards, (_colour(3).int() - 100).sign())
    assert (drawn[:, 2 * SCALE :] == 100).all()


def test_a_picture_without_objects_stays_as_it_is() -> None:
    assert (draw_findings(IMAGE, {"mask": torch.zeros((8, 8), dtype=torch.int64)}) == 100).all()
    empty = {"boxes": torch.zeros((0, 4)), "labels": torch.zeros(0, dtype=torch.int64)}
    assert (draw_findings(IMAGE, empty) == 100).all()


def test_spatial_masks_are_brightest_where_they_are_highest() -> None:
    masks = torch.full((6, 4, 4), 0.5)
    masks[0, :2] = 0.6  # a faint difference is stretched, a flat mask stays dark
    drawn = draw_masks(IMAGE, masks).float().mean(dim=0)
    side, margin = 8 * SCALE, 3 * SCALE
    first = drawn[margin : margin + side, margin : margin + side]
    second = drawn[margin : margin + side, 2 * margin + side : 2 * (margin + side)]
    assert drawn.shape == (2 * (side + margin) + margin, 3 * (side + margin) + margin)
    assert first[0].mean() > first[-1].mean() + 100
    assert second.max() - second.min() < 1


def test_sheet_holds_every_picture_and_names_every_class() -> None:
    tall = Block("Detection", ["a", "b", "wide"], [[IMAGE, IMAGE, torch.zeros((3, 8, 12), dtype=torch.uint8)]] * 2)
    sheet = draw_sheet([tall, tall], ["disc", "square"])
    headings = [axis.get_title() for part in sheet.subfigs for axis in part.axes if axis.get_title()]
    pictures = [np.asarray(axis.get_images()[0].get_array()) for part in sheet.subfigs for axis in part.axes]
    assert headings == ["a", "b", "wide"] * 2
    assert [picture.shape for picture in pictures] == [(8, 8, 3), (8, 8, 3), (8, 12, 3)] * 4
    assert [text.get_text() for text in sheet.subfigs[-1].legends[0].get_texts()] == ["disc", "square"]
    assert sheet.get_figwidth() == 12
