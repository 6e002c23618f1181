from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from acamkd import data
from acamkd.data import Cityscapes
from acamkd.data.formats.cityscapes import CLASSES, LABEL_IDS
from acamkd.errors import AcamkdError

VALUES = np.array([[7, 8, 33], [0, 3, 255]], np.uint8)  # road, sidewalk, bicycle; unlabeled, out of roi, license plate
TRAIN = np.array([[0, 1, 18], [255, 255, 255]], np.uint8)
FRAMES = ("aachen/aachen_000000_000019", "aachen/aachen_000001_000019", "zurich/zurich_000000_000019")


def _write(root: Path, split: str = "train", *, labels: bool = True, train_ids: bool = False) -> Path:
    for frame in FRAMES:
        image = root / "leftImg8bit" / split / f"{frame}_leftImg8bit.png"
        mask = root / "gtFine" / split / frame
        for file in (image, mask):
            file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (3, 2)).save(image)
        Image.new("RGBA", (3, 2)).save(f"{mask}_gtFine_color.png")  # never read
        Path(f"{mask}_gtFine_polygons.json").write_text("{}")
        if labels:
            Image.fromarray(VALUES).save(f"{mask}_gtFine_labelIds.png")
        if train_ids:
            Image.fromarray(TRAIN).save(f"{mask}_gtFine_labelTrainIds.png")
    return root


@pytest.mark.parametrize("made", ["labels", "train_ids", "both"])
def test_both_kinds_of_masks_give_train_ids(tmp_path: Path, made: str) -> None:
    _write(tmp_path, labels=made != "train_ids", train_ids=made != "labels")
    dataset = Cityscapes(tmp_path, "train")
    assert data.check(dataset, "full") == []
    assert dataset.classes == CLASSES
    assert len(CLASSES) == 19
    assert [file.name for file in dataset.files][2] == "zurich_000000_000019_leftImg8bit.png"
    assert dataset.annotation_files[0].name.endswith("Ids.png" if made == "labels" else "TrainIds.png")
    assert dataset[0][1]["mask"].tolist() == [[0, 1, 18], [255, 255, 255]]


def test_the_table_is_that_of_cityscapes() -> None:
    assert len(LABEL_IDS) == 35
    assert {label: train for label, train in LABEL_IDS.items() if train != 255} == dict(
        zip([7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33], range(19), strict=True)
    )
    assert (CLASSES[0], CLASSES[13], CLASSES[16], CLASSES[18]) == ("road", "car", "train", "bicycle")


def test_a_missing_mask_and_an_unknown_value(tmp_path: Path) -> None:
    _write(tmp_path)
    masks = tmp_path / "gtFine/train"
    (masks / f"{FRAMES[0]}_gtFine_labelIds.png").unlink()
    Image.fromarray(np.full((2, 3), 34, np.uint8)).save(masks / f"{FRAMES[2]}_gtFine_labelIds.png")
    with pytest.raises(AcamkdError) as caught:
        data.check(Cityscapes(tmp_path, "train"), "full")
    lines = str(caught.value).splitlines()
    assert lines[1].endswith("aachen_000000_000019_gtFine_labelIds.png: there is no such mask")
    assert lines[2].endswith("the mask holds 34, but the values for the 19 classes and for void are 0 to 33 and 255")


def test_one_mask_of_train_ids_too_few_falls_back_to_label_ids(tmp_path: Path) -> None:
    _write(tmp_path, train_ids=True)
    (tmp_path / "gtFine/train" / f"{FRAMES[1]}_gtFine_labelTrainIds.png").unlink()
    dataset = Cityscapes(tmp_path, "train")
    assert data.check(dataset, "full") == []
    assert dataset[1][1]["mask"].tolist() == dataset[0][1]["mask"].tolist() == [[0, 1, 18], [255, 255, 255]]


def test_coarse_masks_alone_are_said(tmp_path: Path) -> None:
    _write(tmp_path, "train_extra")
    (tmp_path / "gtFine/train_extra").rename(tmp_path / "gtCoarse")
    (tmp_path / "gtCoarse").rename(tmp_path / "c")
    (tmp_path / "gtCoarse").mkdir()
    (tmp_path / "c").rename(tmp_path / "gtCoarse/train_extra")
    with pytest.raises(
        AcamkdError, match=r"gtFine/train_extra: there is no such folder; .*gtCoarse/train_extra is the"
    ):
        Cityscapes(tmp_path, "train_extra")


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(AcamkdError, match=r"leftImg8bit/val: there is no such folder$"):
        Cityscapes(_write(tmp_path), "val")
    with pytest.raises(AcamkdError, match=r"data\.classes is sky, but the classes of Cityscapes are road, sidewalk"):
        Cityscapes(tmp_path, "train", classes=("sky",))
    for folder in (tmp_path / "leftImg8bit/train").iterdir():
        for file in folder.iterdir():
            file.unlink()
    with pytest.raises(AcamkdError, match=r"the folder holds no images CITY/\*_leftImg8bit\.png"):
        data.check(Cityscapes(tmp_path, "train"), "full")
