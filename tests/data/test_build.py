"""`data.format: auto`: which reader a folder gets, and why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from acamkd import config, data
from acamkd.data.scenes import write_scenes
from acamkd.errors import AcamkdError
from acamkd.models.base import Task


def _touch(*names: str) -> Callable[[Path], None]:
    def write(root: Path) -> None:
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            if name.endswith("/"):
                (root / name).mkdir(exist_ok=True)
            else:
                (root / name).touch()

    return write


@pytest.mark.parametrize(
    ("task", "write", "expected", "reason"),
    [
        ("detection", _touch("annotations/instances_a.json"), "coco", "annotations/instances_*.json is in ROOT"),
        ("detection", _touch("data.yaml", "images/", "labels/"), "yolo", "data.yaml is in ROOT"),
        ("detection", _touch("Annotations/", "ImageSets/Main/"), "voc", "Annotations and ImageSets/Main are in ROOT"),
        ("segmentation", _touch("Annotations/", "ImageSets/Segmentation/", "SegmentationClass/"), "voc",
         "SegmentationClass and ImageSets/Segmentation are in ROOT"),
        ("segmentation", _touch("leftImg8bit/", "gtFine/"), "cityscapes", "leftImg8bit and gtFine are in ROOT"),
        ("segmentation", _touch("images/", "masks/"), "masks", "images and masks are in ROOT"),
    ],
)  # fmt: skip
def test_a_layout_is_found_and_explained(
    tmp_path: Path, task: Task, write: Callable[[Path], None], expected: str, reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    write(tmp_path)
    caplog.set_level("INFO")
    options = config.Data(root=tmp_path, classes=("a",))
    assert data.resolve(options, task).format == expected
    assert caplog.messages == [f"data.format: {expected}, because {reason.replace('ROOT', str(tmp_path))}"]
    assert data.resolve(data.resolve(options, task), task).format == expected
    assert len(caplog.messages) == 2  # a format that is named is not explained


def test_paths_in_the_recipe_say_it_too(tmp_path: Path) -> None:
    coco = config.Split(images=Path("p"), annotations=Path("boxes.json"))
    assert data.resolve(config.Data(root=tmp_path, train=coco, val=coco), "detection").format == "coco"
    masks = config.Split(images=Path("p"), masks=Path("m"))
    options = config.Data(root=tmp_path, train=masks, val=masks, classes=("a",))
    assert data.resolve(options, "segmentation").format == "masks"
    with pytest.raises(
        AcamkdError, match=r"task detection needs data\.format: coco, yolo, voc, parquet, shards, not masks"
    ):
        data.resolve(options, "detection")


def test_no_layout_is_found(tmp_path: Path) -> None:
    with pytest.raises(AcamkdError) as caught:
        data.resolve(config.Data(root=tmp_path), "segmentation")
    assert str(caught.value) == (
        f"data.format: auto finds no layout that is known in {tmp_path} for segmentation; looked for "
        "annotations/instances_*.json (coco); SegmentationClass and ImageSets/Segmentation (voc); images and masks "
        "(masks); leftImg8bit and gtFine (cityscapes); *.parquet or data/*.parquet (parquet); *-00*.tar or "
        "train/*00*.tar (shards): set data.root to the folder that holds these, or name data.format"
    )


def test_two_layouts_are_found(tmp_path: Path) -> None:
    _touch("data.yaml", "annotations/instances_val.json")(tmp_path)
    with pytest.raises(AcamkdError, match=r"auto finds both coco and yolo in .*name data\.format"):
        data.resolve(config.Data(root=tmp_path), "detection")


def test_masks_found_need_class_names(tmp_path: Path) -> None:
    _touch("images/", "masks/")(tmp_path)
    with pytest.raises(AcamkdError, match=r"data\.classes is missing"):
        data.resolve(config.Data(root=tmp_path), "segmentation")


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        (
            "segmentation",
            {"format": "yolo"},
            "needs data.format: coco, voc, masks, cityscapes, parquet, shards, not yo",
        ),
        ("detection", {"format": "coc"}, "data.format: there is no format 'coc'; did you mean coco"),
        ("detection", {"format": "coco", "val": {"images": "x"}}, "data.val.annotations is missing"),
        ("detection", {"format": "coco", "val": {"name": "x", "masks": "y"}}, "data.val.masks: data.format coco does"),
        (
            "detection",
            {"format": "voc", "val": {"name": "x", "masks": "y"}},
            "data.val.masks: data.format voc",
        ),
        (
            "segmentation",
            {"format": "voc", "val": {"images": "x"}},
            "data.val.images: .* give the split's `name` instead",
        ),
        ("detection", {"format": "acamkd.data:augmentation"}, "must be a subclass of acamkd.data.ImageDataset"),
        ("detection", {"format": "acamkd.data:MaskFolder"}, "is for segmentation, but the recipe's task is detection"),
        ("detection", {"format": "nowhere:Reader"}, "data.format nowhere:Reader: No module named 'nowhere'"),
    ],
    ids=str,
)
def test_what_does_not_fit_a_format_is_named(task: Task, options: dict[str, Any], message: str) -> None:
    with pytest.raises(AcamkdError, match=message):
        data.resolve(config.Data.model_validate(options), task)


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_drawn_scenes_need_no_paths(tmp_path: Path, task: Task) -> None:
    write_scenes(tmp_path / "s", train=2, val=1, size=(32, 32), seed=0, task=task)
    names = None if task == "detection" else ("background", "a", "b", "c", "d", "e")
    options = config.Data(root=tmp_path / "s", classes=names)
    for split, count in (("train", 2), ("val", 1)):
        dataset = data.build(options, task, split, seed=0, augment=False)  # type: ignore[arg-type]
        data.check(dataset, "full")
        assert len(dataset) == count


@pytest.mark.parametrize("place", ["images/train2017", "train2017"])
def test_cocos_own_names(tmp_path: Path, place: str) -> None:
    write_scenes(tmp_path, train=2, val=1, size=(32, 32), seed=0, task="detection")
    (tmp_path / "images/train").rename(tmp_path / "moved")
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / "moved").rename(tmp_path / place)
    (tmp_path / "annotations/instances_train.json").rename(tmp_path / "annotations/instances_train2017.json")
    dataset = data.build(config.Data(root=tmp_path), "detection", "train", seed=0, augment=False)
    assert data.check(dataset, "full") == []
    assert dataset.files[0].parent == tmp_path / place
    (tmp_path / "annotations/instances_train2017.json").rename(tmp_path / "few.json")
    split = config.Split(name="train", annotations=Path("few.json"))  # other labels of the same images
    given = data.build(config.Data(root=tmp_path, train=split), "detection", "train", seed=0, augment=False)
    assert (given.annotation_files, given.files) == ([tmp_path / "few.json"], dataset.files)
    with pytest.raises(AcamkdError, match=r"cannot read the annotations .*annotations/instances_minival\.json"):
        data.build(
            config.Data(root=tmp_path, train=config.Split(name="minival")), "detection", "train", seed=0, augment=False
        )
