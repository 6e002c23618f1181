from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from acamkd import config, data
from acamkd.data import CocoDetection
from acamkd.errors import AcamkdError

SHARED = Path(__file__).parents[4] / "shared" / "data"


def _content() -> dict[str, Any]:
    """Two images of 20 x 10 pixels, the second without boxes; categories out of order, with a gap."""
    return {
        "images": [
            {"id": 7, "file_name": "a.png", "width": 20, "height": 10},
            {"id": 3, "file_name": "sub/b.png", "width": 20, "height": 10},
        ],
        "categories": [{"id": 9, "name": "dog"}, {"id": 2, "name": "cat"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 9, "bbox": [1, 2, 3, 4], "iscrowd": 0, "area": 7.5},
            {"id": 2, "image_id": 7, "category_id": 2, "bbox": [10, 0, 10, 10], "iscrowd": 1},
            {"id": 3, "image_id": 7, "category_id": 2, "bbox": [5.5, 1, 2, 2]},
        ],
    }


def _dataset(root: Path, content: object, **options: Any) -> CocoDetection:
    (root / "sub").mkdir(exist_ok=True)
    for name, color in (("a.png", "red"), ("sub/b.png", "blue")):
        Image.new("RGB", (20, 10), color).save(root / name)
    (root / "boxes.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return CocoDetection(root, root / "boxes.json", **options)


def test_targets(tmp_path: Path) -> None:
    dataset = _dataset(tmp_path, _content())
    assert dataset.classes == ("cat", "dog")
    assert [file.name for file in dataset.files] == ["a.png", "b.png"]
    image, target = dataset[0]
    assert image.shape == (3, 10, 20)
    assert set(target) == {"boxes", "labels", "iscrowd", "area"}
    assert target["area"].tolist() == [7.5, 0, 0]
    assert target["boxes"].dtype == torch.float32
    assert target["boxes"].tolist() == [[1, 2, 4, 6], [10, 0, 20, 10], [5.5, 1, 7.5, 3]]
    assert target["labels"].tolist() == [2, 1, 1]
    assert target["iscrowd"].tolist() == [0, 1, 0]
    assert target["labels"].dtype == target["iscrowd"].dtype == torch.int64
    _, empty = dataset[1]
    assert empty["boxes"].shape == (0, 4)
    assert empty["labels"].shape == empty["iscrowd"].shape == (0,)


def test_crowds_are_for_evaluation_only(tmp_path: Path) -> None:
    _dataset(tmp_path, _content())
    split = config.Split(images=Path(), annotations=Path("boxes.json"))
    options = config.Data(format="coco", root=tmp_path, train=split, val=split)
    train = data.build(options, "detection", "train", seed=0, augment=False)
    val = data.build(options, "detection", "val", seed=0, augment=False)
    assert train[0][1]["boxes"].tolist() == [[1, 2, 4, 6], [5.5, 1, 7.5, 3]]
    assert val[0][1]["iscrowd"].tolist() == [0, 1, 0]


def test_images_without_boxes_are_a_warning(tmp_path: Path) -> None:
    (warning,) = data.check(_dataset(tmp_path, _content()), "full")
    assert warning.endswith("boxes.json: 1 of 2 images have no boxes")


@pytest.mark.parametrize("bbox", [[1, 2, 0, 4], [1, 2, 3, 0], [1, 2, 0, 0], [0, 2, 1e-6, 4], [20 - 1e-13, 2, 1e-13, 4]])
def test_boxes_without_area_are_left_out(tmp_path: Path, bbox: list[float]) -> None:
    content = _content()
    before = len(_dataset(tmp_path, content)[0][1]["boxes"])
    content["annotations"].append({**content["annotations"][0], "id": 99, "bbox": bbox})
    dataset = _dataset(tmp_path, content)
    assert len(dataset[0][1]["boxes"]) == before
    assert "boxes.json: 1 boxes have no area and are left out" in data.check(dataset, "headers")[0]


def test_boxes_of_another_unit_are_a_warning(tmp_path: Path) -> None:
    content = _content()
    for entry in content["annotations"]:
        entry["bbox"] = [0.1, 0.2, 0.3, 0.4]
    (shares,) = (text for text in data.check(_dataset(tmp_path, content), "full") if "shares" in text)
    assert shares.endswith("boxes.json: most boxes have a pixel or less: are they shares of the image?")
    for entry in content["annotations"]:
        entry["bbox"] = [15, 4, 19, 8]  # x1 y1 x2 y2
    (clipped, *_) = data.check(_dataset(tmp_path, content), "full")
    assert clipped.endswith("are clipped, of 3: are their numbers in another order or unit?")


def test_boxes_beyond_the_image_are_clipped(tmp_path: Path) -> None:
    content = _content()
    content["annotations"][0]["bbox"] = [-2, 4, 30, 4]
    dataset = _dataset(tmp_path, content)
    assert dataset[0][1]["boxes"][0].tolist() == [0, 4, 20, 8]
    assert "boxes.json: 1 boxes reach beyond their image and are clipped" in data.check(dataset, "headers")[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bbox": [20, 0, 5, 5]}, r"annotation 1 of image 7: the box from \(20, 0\) to \(25, 5\) lies outside a\.png"),
        ({"bbox": [19.999999, 0, 5, 5]}, r"the box from \(20, 0\) to \(25, 5\) lies outside a\.png"),
        ({"bbox": [1, 2, 3, -4]}, r"annotation 1 of image 7: the box from \(1, 2\) to \(4, -2\) on a\.png has no area"),
        ({"bbox": [1, 2, 0, -4]}, "has no area"),
        ({"bbox": [1, 2, 3]}, r"annotation 1 of image 7: it needs image_id, category_id and bbox"),
        ({"area": "wide"}, r"annotation 1 of image 7: .* an area must be a number"),
        ({"bbox": ["a", 2, 3, 4]}, "it needs image_id, category_id and bbox"),
        ({"image_id": [7]}, "it needs image_id, category_id and bbox"),
        ({"category_id": 5}, "annotation 1 of image 7: the file lists no category 5, only 2, 9"),
        ({"image_id": 8}, "annotation 1 of image 8: the file lists no image 8"),
    ],
)
@pytest.mark.parametrize("mode", ["full", "headers"])
def test_bad_annotations(tmp_path: Path, change: dict[str, Any], message: str, mode: Any) -> None:
    content = _content()
    content["annotations"][0].update(change)
    with pytest.raises(AcamkdError, match=message) as caught:
        data.check(_dataset(tmp_path, content), mode)
    assert "1 problem:" in str(caught.value)
    assert "boxes.json" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"annotations": []}, "there is no box for any image"),
        ({"images": [], "annotations": []}, "the list of images is empty"),
        ({"categories": [], "annotations": []}, "the list of categories is empty"),
        (
            {"categories": [{"id": 2, "name": "a"}, {"id": 2, "name": "b"}, {"id": 9, "name": "c"}]},
            "1 categories share",
        ),
    ],
)
def test_bad_lists(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(AcamkdError, match=message):
        data.check(_dataset(tmp_path, _content() | change), "full")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ([], "is not a COCO file: it needs the lists images, annotations, categories"),
        ({"images": []}, "is not a COCO file"),
        (_content() | {"images": [{"id": 1, "file_name": "a.png"}]}, r"images\[0\] has no width, height, or one of a"),
        (
            _content() | {"categories": [{"id": 1, "name": "a"}, {"id": True, "name": "b"}]},
            r"categories\[1\] has no id, or",
        ),
        (_content() | {"annotations": [7]}, r"annotations\[0\] is 7, but must be a mapping"),
    ],
)
def test_unusable_files(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(AcamkdError, match=message):
        _dataset(tmp_path, content)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(AcamkdError, match=r"cannot read the annotations .*no\.json: No such file"):
        CocoDetection(tmp_path, tmp_path / "no.json")


@pytest.mark.parametrize("mode", ["full", "headers"])
def test_image_of_another_size(tmp_path: Path, mode: Any) -> None:
    dataset = _dataset(tmp_path, _content())
    Image.new("RGB", (10, 20)).save(tmp_path / "a.png")
    with pytest.raises(AcamkdError, match=r"a\.png has 10 x 20 pixels, but .* says 20 x 10 pixels"):
        data.check(dataset, mode)


def test_all_kinds_of_problems_in_one_error(tmp_path: Path) -> None:
    content = _content()
    content["annotations"][0]["category_id"] = 5
    dataset = _dataset(tmp_path, content)
    (tmp_path / "a.png").unlink()
    with pytest.raises(AcamkdError, match=r"2 problems:\n.*no category 5.*\n.*a\.png: there is no such image"):
        data.check(dataset, "full")


def test_classes_given_must_be_the_files_own(tmp_path: Path) -> None:
    assert _dataset(tmp_path, _content(), classes=("cat", "dog")).classes == ("cat", "dog")
    with pytest.raises(AcamkdError, match=r"data\.classes is dog, cat, but the categories of .* are cat, dog"):
        _dataset(tmp_path, _content(), classes=("dog", "cat"))


def test_items_do_not_share_memory_with_the_table(tmp_path: Path) -> None:
    dataset = _dataset(tmp_path, _content())
    dataset[0][1]["boxes"].zero_()
    assert dataset[0][1]["boxes"][0].tolist() == [1, 2, 4, 6]


@pytest.mark.skipif(not (SHARED / "bccd").is_dir(), reason="the BCCD images are not beside the checkout")
def test_real_blood_cells() -> None:
    root = SHARED / "bccd"
    dataset = CocoDetection(root / "images" / "val", root / "annotations" / "instances_val.json")
    data.check(dataset, "headers")
    assert len(dataset) == 87
    assert dataset.classes == ("RBC", "WBC", "Platelets")
    assert sum(len(dataset.target(index, (480, 640))["boxes"]) for index in range(87)) == 1137
    image, target = dataset[0]
    assert image.shape == (3, 480, 640)
    assert target["boxes"][0].tolist() == [260, 177, 491, 376]
    assert target["labels"][0] == 2


def test_ids_and_sizes_as_other_tools_write_them(tmp_path: Path) -> None:
    plain = _dataset(tmp_path, _content())
    content = _content()
    for image in content["images"]:
        image.update(id=str(image["id"]), width=float(image["width"]))
    content["categories"][0]["id"] = "9"
    content["annotations"][0]["image_id"] = 7.0
    dataset = _dataset(tmp_path, content)
    assert dataset.problems == []
    assert dataset.classes == plain.classes
    assert dataset[0][1]["boxes"].tolist() == plain[0][1]["boxes"].tolist()
    assert dataset[0][1]["labels"].tolist() == plain[0][1]["labels"].tolist()
    content["images"][1]["id"] = 7
    assert "1 images share an id with another" in _dataset(tmp_path, content).problems[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"width": "20"},
            r'images\[0\] has no width, or one of a wrong type \(width is "20"\): give width a whole number',
        ),
        ({"height": 9.5}, r"height is 9\.5\): give height a whole number above 0"),
        ({"height": 0}, r"height is 0\)"),
        ({"file_name": 7}, r"file_name is 7\): give file_name text"),
    ],
)
def test_what_is_wrong_with_an_image_is_said(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    content = _content()
    content["images"][0].update(change)
    with pytest.raises(AcamkdError, match=message):
        _dataset(tmp_path, content)


@pytest.mark.parametrize("name", [True, 750, None])
def test_names_must_be_text(tmp_path: Path, name: Any) -> None:
    content = _content()
    content["categories"][1]["name"] = name
    with pytest.raises(
        AcamkdError, match=r"categories\[1\] has no name, or one of a wrong type.*: give name text, in quo"
    ):
        _dataset(tmp_path, content)


def test_a_category_without_boxes_is_told_and_may_be_left_out(tmp_path: Path) -> None:
    content = _content()
    content["categories"].append({"id": 0, "name": "animals"})
    dataset = _dataset(tmp_path, content)
    assert dataset.classes == ("animals", "cat", "dog")
    (warning, *_) = data.compare_splits(dataset, dataset, config.Data())
    assert warning.startswith("no training image has a box of the class animals: the networks cannot learn it; is it a")
    dataset = _dataset(tmp_path, content, classes=("cat", "dog"))
    assert dataset[0][1]["labels"].tolist() == [2, 1, 1]
    (same,) = data.compare_splits(dataset, dataset, config.Data())
    assert "validation images are training images too" in same
    with pytest.raises(AcamkdError, match=r"data\.classes is cat, but the categories of .* are cat, dog"):
        _dataset(tmp_path, content, classes=("cat",))


def test_crowds_alone_cannot_be_scored(tmp_path: Path) -> None:
    content = _content()
    for entry in content["annotations"]:
        entry["iscrowd"] = 1
    with pytest.raises(
        AcamkdError, match=r"none of the 2 images has a box that counts \(crowds and difficult ones do not"
    ):
        data.check(_dataset(tmp_path, content), "headers")
