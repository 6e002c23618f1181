from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from acamkd.errors import AcamkdError
from acamkd.jobs.init.splits import by_split, check_apart, find_unlabeled, split_of


def _image(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 2)).save(folder / "0.jpg")


@pytest.mark.parametrize(
    ("name", "split"),
    [("annotations/instances_val2017", "val"), ("valid", "val"), ("train/_annotations.coco", "train"),
     ("test", "test"), ("result", None), ("restraining", None), ("training_data/test", "test"),
     ("train_set/val/images", "val"), ("train\\Validation", "val"), ("train_val", None), ("train_val/test", "test")],
)  # fmt: skip
def test_names_say_their_split(name: str, split: str | None) -> None:
    assert split_of(name) == split


def test_one_name_without_a_split_is_for_training() -> None:
    def splits(*names: str) -> dict[str, str]:
        return {split: keys["name"] for split, keys in by_split((name, {"name": name}) for name in names).items()}

    assert splits("default", "a/val", "b/val") == {"train": "default", "val": "a/val"}
    assert splits("one", "two", "val") == {}
    assert splits("one", "instances_trainval", "val", "test") == {"train": "instances_trainval", "test": "test"}
    assert splits("train", "trainval", "val") == {"train": "train", "val": "val"}


def test_folders_of_two_splits_lie_beside_each_other(tmp_path: Path) -> None:
    for folder in ("images/val", "images/valid", "rest"):
        _image(tmp_path / folder)
    check_apart({"train": [tmp_path / "images/val"], "val": [tmp_path / "images/valid"], "unlabeled": []})
    check_apart({"train": [tmp_path / "images"], "val": [tmp_path / "images"]})  # as somebody's data.yaml says
    with pytest.raises(AcamkdError, match=r"images/val \(val\) lies in .*images \(train\), .*: move it beside"):
        check_apart({"train": [tmp_path / "images"], "val": [tmp_path / "rest/../images/val"]})
    with pytest.raises(AcamkdError, match=r"rest \(unlabeled\) lies in .*: move it beside, .*; --unlabeled FOLDER"):
        check_apart({"train": [tmp_path], "unlabeled": [tmp_path / "rest"]})


def test_folders_without_labels_are_known_by_their_names(tmp_path: Path) -> None:
    _image(tmp_path / "images/train")
    assert find_unlabeled(tmp_path) == []
    (tmp_path / "images/unlabeled").mkdir()
    assert find_unlabeled(tmp_path) == []  # no image in it
    _image(tmp_path / "Extra")
    _image(tmp_path / "images/train/rest")
    assert find_unlabeled(tmp_path) == ["Extra"]
    assert find_unlabeled(tmp_path, [tmp_path / "images/train"]) == ["Extra", "images/train/rest"]
