from __future__ import annotations

import numpy as np
import pytest

from acamkd.models.base import VOID
from acamkd.report.visualize import (
    ENLARGEMENT,
    Block,
    color,
    draw_predictions,
    draw_sheet,
    draw_spatial_masks,
    hex_color,
    is_background,
    with_legend,
)  # fmt: skip

IMAGE = np.full((32, 32, 3), 100, dtype=np.uint8)
NAMES = ("background", "disc", "square", "ring")


def test_a_class_has_one_color_and_neighbors_differ() -> None:
    assert hex_color(1) == "#{:02x}{:02x}{:02x}".format(*color(1))
    colors = np.array([color(label) for label in range(1, 21)], dtype=int)
    assert len({tuple(each) for each in colors.tolist()}) == 20
    assert (np.abs(np.diff(colors, axis=0)).sum(axis=1) > 150).all()


def test_boxes_have_the_colors_of_their_classes() -> None:
    found = {"boxes": np.array([[4.0, 4.0, 24.0, 24.0]]), "labels": np.array([2])}
    drawn = draw_predictions(IMAGE, found, NAMES[1:], with_names=False)
    assert drawn.shape == IMAGE.shape
    assert tuple(drawn[12, 4]) == color(2)
    assert tuple(drawn[12, 12]) == (100, 100, 100)  # nothing fills the box
    named = draw_predictions(IMAGE, {**found, "scores": np.array([0.5])}, NAMES[1:])
    assert (named[4:12, 6:20] < 40).all(axis=-1).any()  # black letters


def test_masks_color_classes_and_leave_background_and_void() -> None:
    mask = np.zeros((32, 32), dtype=np.int64)
    mask[:8], mask[8:16] = 3, VOID
    drawn = draw_predictions(IMAGE, {"mask": mask}, NAMES)
    assert tuple(drawn[0, 0]) == tuple(round((100 + channel) / 2) for channel in color(3))
    assert (drawn[8:] == 100).all()


@pytest.mark.parametrize("name", ["background", "Background", "_background_", "BG"])
def test_a_background_is_told_by_its_name(name: str) -> None:
    mask = np.zeros((32, 32), dtype=np.int64)
    assert (draw_predictions(IMAGE, {"mask": mask}, (name, "disc")) == 100).all()
    assert not is_background(f"{name} noise")


def test_labels_stay_within_the_image() -> None:
    edge = {"boxes": np.array([[380.0, 390.0, 399.0, 399.0]]), "labels": np.array([1])}
    drawn = draw_predictions(np.full((400, 400, 3), 100, np.uint8), edge, ("a-long-name",))
    rows, columns = np.nonzero((drawn < 40).all(axis=-1))  # its letters
    assert columns.max() - columns.min() > 50
    assert columns.max() < 399
    assert rows.max() < 399


def test_a_legend_names_classes_below_the_image() -> None:
    wide = np.full((100, 300, 3), 100, dtype=np.uint8)
    drawn = with_legend(wide, {"disc": 1, "square": 2})
    assert (drawn[:100] == wide).all()
    assert drawn.shape[1] == 300
    strip = drawn[100:].reshape(-1, 3)
    for label in (1, 2):
        assert (strip == color(label)).all(axis=-1).sum() >= 81  # a square of 9 pixels
    assert not (strip == color(3)).all(axis=-1).any()
    narrow = with_legend(np.full((300, 60, 3), 100, np.uint8), {"disc": 1, "square": 2})
    assert narrow.shape[0] - 300 > len(drawn) - 100  # a line for each
    assert with_legend(wide, {}) is wide


def test_without_objects_an_image_stays_as_it_is() -> None:
    assert (draw_predictions(IMAGE, {"mask": np.zeros((32, 32), dtype=np.int64)}, NAMES) == 100).all()
    empty = {"boxes": np.zeros((0, 4)), "labels": np.zeros(0, dtype=np.int64)}
    assert (draw_predictions(IMAGE, empty, NAMES) == 100).all()


def test_spatial_masks_are_brightest_where_they_are_highest() -> None:
    small = IMAGE[:8, :8]
    masks = np.full((6, 4, 4), 0.5, dtype=np.float32)
    masks[0, :2] = 0.6  # a faint difference is stretched, a flat mask stays dark
    drawn = draw_spatial_masks(small, masks).astype(float).mean(axis=2)
    side, margin = 8 * ENLARGEMENT, 3 * ENLARGEMENT
    first = drawn[margin : margin + side, margin : margin + side]
    second = drawn[margin : margin + side, 2 * margin + side : 2 * (margin + side)]
    assert drawn.shape == (2 * (side + margin) + margin, 3 * (side + margin) + margin)
    assert first[0].mean() > first[-1].mean() + 100
    assert second.max() - second.min() < 1


def test_a_sheet_holds_every_image_and_names_every_class() -> None:
    tall = Block("Detection", ["a", "b", "wide"], [[IMAGE, IMAGE, np.zeros((32, 48, 3), dtype=np.uint8)]] * 2)
    sheet = draw_sheet([tall, tall], {"disc": 1, "square": 2})
    headings = [axis.get_title() for part in sheet.subfigs for axis in part.axes if axis.get_title()]
    images = [np.asarray(axis.get_images()[0].get_array()) for part in sheet.subfigs for axis in part.axes]
    assert headings == ["a", "b", "wide"] * 2
    assert [image.shape for image in images] == [(32, 32, 3), (32, 32, 3), (32, 48, 3)] * 4
    assert [text.get_text() for text in sheet.subfigs[-1].legends[0].get_texts()] == ["disc", "square"]
    assert sheet.get_figwidth() == 12
