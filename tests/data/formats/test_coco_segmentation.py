from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as oracle
import pytest
import torch
from PIL import Image

from acamkd import config, data
from acamkd.data import CocoSegmentation
from acamkd.errors import AcamkdError, ImageError

HEIGHT, WIDTH = 6, 8
SQUARE = [[1, 1, 5, 1, 5, 5, 1, 5]]
INNER = [[2, 2, 4, 2, 4, 4, 2, 4]]


def _entry(number: int, segmentation: Any, category: int = 2, **more: Any) -> dict[str, Any]:
    return {"id": number, "image_id": 7, "category_id": category, "segmentation": segmentation, **more}


def _content(*entries: dict[str, Any], categories: tuple[tuple[int, str], ...] = ((9, "dog"), (2, "cat"))) -> Any:
    """An image of 8 x 6 pixels with these annotations, and one without."""
    return {
        "images": [
            {"id": 7, "file_name": "a.png", "width": WIDTH, "height": HEIGHT},
            {"id": 8, "file_name": "b.png", "width": WIDTH, "height": HEIGHT},
        ],
        "categories": [{"id": number, "name": name} for number, name in categories],
        "annotations": list(entries),
    }


def _dataset(root: Path, content: Any, **options: Any) -> CocoSegmentation:
    for name, color in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (WIDTH, HEIGHT), color).save(root / name)
    (root / "outlines.json").write_text(json.dumps(content))
    return CocoSegmentation(root, root / "outlines.json", **options)


def _mask(dataset: CocoSegmentation, index: int = 0) -> torch.Tensor:
    return dataset[index][1]["mask"]


def _square(*corners: int) -> np.ndarray[Any, Any]:
    left, top, right, bottom = corners
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[top:bottom, left:right] = 1
    return mask


def _uncompressed(mask: np.ndarray[Any, Any]) -> dict[str, Any]:
    flat = np.concatenate([[0], mask.flatten(order="F"), [2]])  # the first run is of zeros, and may be empty
    runs = np.diff([0, *np.flatnonzero(np.diff(flat))]).tolist()
    return {"size": list(mask.shape), "counts": runs}


def test_outlines_become_masks_above_the_background(tmp_path: Path) -> None:
    dataset = _dataset(tmp_path, _content(_entry(1, SQUARE), _entry(2, INNER, category=9)))
    assert dataset.classes == ("background", "cat", "dog")
    expected = _square(1, 1, 5, 5) + _square(2, 2, 4, 4)
    assert _mask(dataset).dtype == torch.int64
    assert _mask(dataset).tolist() == expected.tolist()
    assert _mask(dataset, 1).tolist() == np.zeros((HEIGHT, WIDTH)).tolist()
    assert dataset.warnings == [f"{tmp_path / 'outlines.json'}: 1 of 2 images have no outlines"]
    assert data.check(dataset, "full") == dataset.warnings
    assert dataset.counts is not None
    assert dataset.counts.tolist() == [2 * HEIGHT * WIDTH - 16, 12, 4, 0]


def test_what_nothing_covers_may_be_void(tmp_path: Path) -> None:
    dataset = _dataset(tmp_path, _content(_entry(1, SQUARE)), uncovered="void")
    assert dataset.classes == ("cat", "dog")
    assert _mask(dataset).tolist() == np.where(_square(1, 1, 5, 5), 0, 255).tolist()


def test_a_category_called_background_is_the_background(tmp_path: Path) -> None:
    categories = ((0, "cat"), (1, "_background_"))
    dataset = _dataset(tmp_path, _content(_entry(1, SQUARE, 0), categories=categories))
    assert dataset.classes == ("cat", "_background_")
    assert _mask(dataset).tolist() == (1 - _square(1, 1, 5, 5)).tolist()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_the_smallest_is_on_top_and_crowds_are_below(tmp_path: Path, order: tuple[int, ...]) -> None:
    crowd = _uncompressed(_square(0, 0, 3, 3))  # smaller than the square that is above it
    entries = [_entry(1, SQUARE), _entry(2, INNER, 9), _entry(3, crowd, 9, iscrowd=1)]
    dataset = _dataset(tmp_path, _content(*(entries[k] for k in order)))
    expected = 2 * _square(0, 0, 3, 3)
    expected[1:5, 1:5] = 1
    expected[2:4, 2:4] = 2
    assert _mask(dataset).tolist() == expected.tolist()


def test_polygons_and_runs_are_those_of_pycocotools(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for _ in range(12):
        polygons = [rng.uniform(-2, 10, 2 * rng.integers(3, 8)).tolist() for _ in range(rng.integers(1, 3))]
        merged = oracle.merge(oracle.frPyObjects(polygons, HEIGHT, WIDTH))
        expected = np.asarray(oracle.decode(merged))
        if not expected.any():
            continue
        packed = {"size": [HEIGHT, WIDTH], "counts": merged["counts"].decode()}
        for given in (polygons, packed, _uncompressed(expected)):
            assert _mask(_dataset(tmp_path, _content(_entry(1, given)))).tolist() == expected.tolist()


def test_outlines_of_no_pixel_are_left_out(tmp_path: Path) -> None:
    dataset = _dataset(
        tmp_path, _content(_entry(1, SQUARE), _entry(2, [[1, 1, 3, 3]]), _entry(3, [[2, 2, 2, 2, 2, 2]]))
    )
    assert "outlines.json: 2 outlines have less than three corners or no pixel, and are left out" in dataset.warnings[0]
    assert _mask(dataset).sum() == 16


@pytest.mark.parametrize(
    ("segmentation", "said"),
    [
        ([[0, 0, 1e7, 0, 1e7, 1e7]], "a corner of its segmentation lies far outside the image: are the numbers pixels"),
        ({"size": [6, 8], "counts": "T31S31O1O1O1O1O1O1O1OP"}, "whose runs fill the image"),
        ([], "a box alone is no mask"),
        (None, "a box alone is no mask"),
        ([[1, 1, 5, 1, 5]], "must be a list of polygons"),
        ([1, 1, 5, 1, 5, 5], "must be a list of polygons"),
        ([["a", 1, 5, 1, 5, 5]], "must be a list of polygons"),
        ({"size": [8, 6], "counts": "123"}, "its RLE is of 6 x 8 pixels, but the image has 8 x 6 pixels"),
        ({"size": [6, 8], "counts": "1200"}, "whose runs fill the image"),
        ({"size": [6, 8], "counts": [3, 4]}, "whose runs fill the image"),
        ({"size": [6, 8], "counts": [-1, 49]}, "whose runs fill the image"),
        ({"size": [6, 8], "counts": 48}, "whose runs fill the image"),
        ({"size": [6, 8]}, "whose runs fill the image"),
    ],
)
def test_what_is_no_outline_is_named(tmp_path: Path, segmentation: Any, said: str) -> None:
    dataset = _dataset(tmp_path, _content(_entry(1, SQUARE), _entry(5, segmentation)))
    (problem,) = dataset.problems
    assert problem.startswith(f"{tmp_path / 'outlines.json'}: annotation 5 of image 7: ")
    assert said in problem


def test_images_and_categories_that_are_not_listed_are_named(tmp_path: Path) -> None:
    entries = _entry(1, SQUARE), _entry(2, SQUARE, 4), {**_entry(3, SQUARE), "image_id": 1}
    dataset = _dataset(tmp_path, _content(*entries))
    assert [problem.partition(": ")[2].partition(": ")[2] for problem in dataset.problems] == [
        "the file lists no category 4, only 2, 9",
        "the file lists no image 1",
    ]


def test_an_image_of_another_size_is_named(tmp_path: Path) -> None:
    dataset = _dataset(tmp_path, _content(_entry(1, SQUARE)))
    Image.new("RGB", (5, 4)).save(tmp_path / "a.png")
    with pytest.raises(AcamkdError, match=r"a\.png has 5 x 4 pixels, but .*outlines\.json says 8 x 6 pixels"):
        data.check(dataset, "headers")
    with pytest.raises(ImageError, match=r"a\.png has 5 x 4 pixels"):
        _mask(dataset)


def _options(root: Path, **more: Any) -> config.Data:
    split = {"images": ".", "annotations": "outlines.json"}
    return config.Data.model_validate({"root": root, "train": split, "val": split, **more})


def test_a_recipe_names_it_by_the_task(tmp_path: Path) -> None:
    _dataset(tmp_path, _content(_entry(1, SQUARE)))
    resolved = data.resolve(_options(tmp_path), "segmentation")
    assert resolved.format == "coco"
    found = data.build(resolved, "segmentation", "val", seed=0, augment=False)
    assert found.classes == ("background", "cat", "dog")
    given = _options(tmp_path, classes=["background", "cat"])  # dog has no outline
    assert data.build(given, "segmentation", "train", seed=0, augment=True).classes == ("background", "cat")
    with pytest.raises(AcamkdError, match=r"data\.classes is cat, dog, but the categories of .* are background, cat"):
        data.build(_options(tmp_path, classes=["cat", "dog"]), "segmentation", "val", seed=0, augment=False)
    void = data.build(_options(tmp_path, uncovered="void"), "segmentation", "val", seed=0, augment=False)
    assert void.classes == ("cat", "dog")
    with pytest.raises(AcamkdError, match=r"data\.uncovered: data\.format coco does not read it for detection"):
        data.resolve(_options(tmp_path, uncovered="void"), "detection")


def test_too_many_classes_for_a_mask(tmp_path: Path) -> None:
    categories = tuple((number, f"kind {number}") for number in range(1, 256))
    content = _content(_entry(1, SQUARE, 3), categories=categories)
    assert "256 classes, but a mask holds at most 255 and void" in _dataset(tmp_path, content).problems[0]
    assert not _dataset(tmp_path, content, uncovered="void").problems
