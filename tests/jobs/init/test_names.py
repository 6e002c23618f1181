from __future__ import annotations

from typing import Any

import pytest

from acamkd.errors import AcamkdError
from acamkd.jobs.init.layout import Layout
from acamkd.jobs.init.names import name_classes


def _masks(*values: int) -> Layout:
    return Layout("segmentation", "masks", {"train": {"name": "train"}}, "", values=values, needs_names=True)


@pytest.mark.parametrize(
    ("values", "names", "keys"),
    [
        ((0, 1), "ab", {}),
        ((0, 1, 255), "ab", {}),
        ((1, 2), "abc", {}),
        ((), "ab", {}),  # colors
        ((0, 1, 2), "ab", {"ignore_index": 2}),
        ((0, 255), "ab", {"mask_values": {0: "a", 255: "b"}}),
        ((1, 2), "ab", {"mask_values": {1: "a", 2: "b"}}),
        ((1, 2, 255), "ab", {"mask_values": {1: "a", 2: "b"}}),
        ((0, 2), "ab", {"mask_values": {0: "a", 2: "b"}}),
        ((0, 127, 255), "abc", {"mask_values": {0: "a", 127: "b", 255: "c"}}),
    ],
)
def test_what_the_values_of_masks_mean(values: tuple[int, ...], names: str, keys: dict[str, Any]) -> None:
    found = name_classes(_masks(*values), list(names), None)
    assert found.keys == {"classes": list(names), **keys}
    assert set(found.reasons) == set(found.keys)
    assert found.warnings == ()


@pytest.mark.parametrize(
    ("values", "names", "held"),
    [((1, 2, 3), "ab", "1, 2, 3"), ((0, 1, 2, 255), "ab", "0 to 2 and 255"), ((0, 255), "abc", "0, 255"),
     (tuple(range(0, 256, 5)), "ab", "0, 5, 10, 15, 20, 25, 30, 35, 40, 45, 50, 55 and 40 more")],
)  # fmt: skip
def test_names_that_do_not_fit_the_values_are_refused(values: tuple[int, ...], names: str, held: str) -> None:
    with pytest.raises(AcamkdError, match=rf"hold the values {held}, but there are {len(names)} names .*one name for"):
        name_classes(_masks(*values), list(names), None)


def test_255_is_void_where_that_leaves_two_classes_and_a_warning_says_what_else_it_may_be() -> None:
    found = name_classes(_masks(0, 1, 255), ["sky", "road", "car"], None)
    assert "mask_values" not in found.keys
    (warning,) = found.warnings
    assert "holds 2, which is car, and 255 is read as void" in warning
    assert "data.mask_values: {0: sky, 1: road, 255: car}" in warning


def test_numbers_of_boxes_need_names() -> None:
    boxes = Layout("detection", "yolo", {"train": {"name": "train"}}, "", needs_names=True)
    with pytest.raises(AcamkdError, match="what the numbers of the classes mean: give the names, --classes cat,dog"):
        name_classes(boxes, None, None)
    assert name_classes(boxes, None, lambda _question: "cat, dog").keys == {"classes": ["cat", "dog"]}
    assert name_classes(boxes, ["cat"], None).keys == {"classes": ["cat"]}
