from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from acamkd.engine.metrics import Scorer
from acamkd.errors import AcamkdError
from acamkd.jobs.predict.predict import predict

BOXES = [[1, 2, 10, 20], [1, 3, 10, 18], [8, 8, 6, 6]]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three images, the first half red."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("7.png", "8.png", "x9.png"):
        image = Image.new("RGB", (32, 32), "blue")
        image.paste("red", (0, 0, 16, 32) if name == "7.png" else (0, 0, 0, 0))
        image.save(folder / name)
    return folder


@pytest.fixture
def ground_truth(images: Path, tmp_path: Path) -> Path:
    """One box of class b in each image: exactly, nearly and not at all where the detector finds it."""
    names = [file.name for file in sorted(images.iterdir())]
    content = {
        "images": [
            {"id": 40 + index, "file_name": f"images/{name}", "width": 32, "height": 32}
            for index, name in enumerate(names)
        ],
        "categories": [{"id": 3, "name": "b"}, {"id": 9, "name": "a"}],
        "annotations": [
            {"id": 1 + index, "image_id": 40 + index, "category_id": 3, "bbox": box, "area": box[2] * box[3],
             "iscrowd": 0}
            for index, box in enumerate(BOXES)
        ],
    }  # fmt: skip
    (tmp_path / "val.json").write_text(json.dumps(content))
    return tmp_path / "val.json"


def test_cocos_tools_score_the_results_as_we_do(box: Path, images: Path, ground_truth: Path, tmp_path: Path) -> None:
    made = predict(box, images, out=tmp_path / "out", score=0)
    results = made.to_coco(tmp_path / "results.json", ground_truth)
    assert json.loads(results.read_text())[0] == {
        "image_id": 40, "category_id": 3, "bbox": [1, 2, 10, 20], "score": pytest.approx(0.9),
    }  # fmt: skip
    truth = COCO(str(ground_truth))
    evaluation = COCOeval(truth, truth.loadRes(str(results)), "bbox")
    for step in (evaluation.evaluate, evaluation.accumulate, evaluation.summarize):
        step()
    scorer = Scorer("detection", ("a", "b"))
    found = {"boxes": [[1, 2, 11, 22], [0, 0, 4, 4]], "scores": [0.9, 0.2], "labels": [2, 1]}
    for x, y, width, height in BOXES:
        target = {"boxes": [[x, y, x + width, y + height]], "labels": [2], "iscrowd": [0]}
        scorer.update(
            [{name: torch.tensor(values) for name, values in found.items()}],
            [{name: torch.tensor(values) for name, values in target.items()}],
        )
    expected = scorer.compute()
    assert 0 < expected["mAP"] < 100
    assert 100 * evaluation.stats[:3] == pytest.approx([expected[name] for name in ("mAP", "AP50", "AP75")])


def test_ids_without_annotations(box: Path, images: Path, tmp_path: Path) -> None:
    made = predict(box, images, out=tmp_path / "out")
    entries = json.loads(made.to_coco(tmp_path / "results.json").read_text())
    assert [(each["image_id"], each["category_id"]) for each in entries] == [(7, 2), (8, 2), ("x9.png", 2)]


def test_no_two_images_get_the_same_id(box: Path, images: Path, ground_truth: Path, tmp_path: Path) -> None:
    file, root = next(images.glob("*.png")), tmp_path / "cameras"
    for name in ("cam1/0001.png", "cam2/0001.png", "cam2/1.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, root / name)
    made = predict(box, root, out=tmp_path / "out")
    entries = json.loads(made.to_coco(tmp_path / "results.json").read_text())
    assert {each["image_id"] for each in entries} == {"cam1/0001.png", "cam2/0001.png", "cam2/1.png"}
    content = json.loads(ground_truth.read_text())
    content["images"] = [{"id": 7, "file_name": "cam2/0001.png"}, {"id": 8, "file_name": "cam2/1.png"}]
    ground_truth.write_text(json.dumps(content))
    with pytest.raises(
        AcamkdError, match=r"has one image for cam1/0001\.png and cam2/0001\.png \(id 7\): predict on its"
    ):
        made.to_coco(tmp_path / "results.json", ground_truth)


def test_what_the_annotations_lack_is_said(box: Path, red: Path, images: Path, ground_truth: Path) -> None:
    content = json.loads(ground_truth.read_text())
    made = predict(box, images)
    for key, message in (("categories", "has no category b, only"), ("images", "lists no image 7.png")):
        ground_truth.write_text(json.dumps({**content, key: content[key][1:]}))
        with pytest.raises(AcamkdError, match=message):
            made.to_coco(made.folder / "results.json", ground_truth)
    assert not (made.folder / "results.json").exists()
    with pytest.raises(AcamkdError, match="COCO's results are of boxes"):
        predict(red, images).to_coco(made.folder / "results.json")
    with pytest.raises(AcamkdError, match="predict writes it unless `write` leaves out json"):
        predict(red, images, out=images / "out", write=["masks"]).to_supervision()


def test_annotations_that_are_none_are_said(box: Path, images: Path, tmp_path: Path) -> None:
    made = predict(box, images)
    with pytest.raises(AcamkdError, match=rf"^cannot read the annotations {tmp_path}/no\.json: No such file or direct"):
        made.to_coco(tmp_path / "results.json", tmp_path / "no.json")
    (tmp_path / "val.json").write_text('{"images": []}')
    with pytest.raises(
        AcamkdError, match=rf"^{tmp_path}/val\.json is not a COCO file: it needs the lists images and c"
    ):
        made.to_coco(tmp_path / "results.json", tmp_path / "val.json")


def test_masks_that_were_not_written_are_said(red: Path, images: Path) -> None:
    pytest.importorskip("supervision")
    with pytest.raises(
        AcamkdError, match=r"^the masks were not written: predict writes them unless `write` leaves out"
    ):
        predict(red, images, write=["json"]).to_supervision()


def test_supervision_is_asked_for(box: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(AcamkdError, match=r"supervision is not installed: pip install 'acamkd\[supervision\]'"):
        predict(box, images).to_supervision()


def test_supervision_gets_boxes_and_masks(box: Path, red: Path, images: Path) -> None:
    pytest.importorskip("supervision")
    found: Any = predict(box, images, score=0.1).to_supervision()
    first, second, _ = found
    np.testing.assert_array_equal(first.xyxy, [[1, 2, 11, 22], [0, 0, 4, 4]])
    assert first.confidence.tolist() == pytest.approx([0.9, 0.2])
    assert (first.class_id.tolist(), first.data["class_name"].tolist()) == ([1, 0], ["b", "a"])
    assert (first.metadata["file_name"], second.metadata["file_name"]) == ("7.png", "8.png")
    found = predict(red, images).to_supervision()
    halves, blue, _ = found
    np.testing.assert_array_equal(halves.xyxy, [[16, 0, 32, 32], [0, 0, 16, 32]])
    assert halves.mask[1, :, :16].all()
    assert halves.mask.sum() == 32 * 32
    assert blue.data["class_name"].tolist() == ["a"]
    found = predict(box, images, score=0.95).to_supervision()
    assert [len(each) for each in found] == [0, 0, 0]
    assert len(first[first.confidence > 0.5]) == 1
