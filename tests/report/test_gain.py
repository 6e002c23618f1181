"""Which images the report shows, with which scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tiny
from acamkd.data import ImageDataset
from acamkd.data.formats.coco import CocoDetection
from acamkd.data.scenes import write_scenes
from acamkd.models.base import Prediction
from acamkd.models.segmentation import Segmenter
from acamkd.report import gain


class _Scripted(Segmenter):
    """Says of every image what a test wants, as a detector; images are told apart by their pixels."""

    task = "detection"  # type: ignore[assignment]

    def __init__(self, data: ImageDataset, answers: list[Prediction]) -> None:
        super().__init__(nn.Identity(), 5)
        self.known = [(image, answer) for (image, _), answer in zip(data, answers, strict=True)]

    def predict(self, images: Any) -> list[Prediction]:
        return [next(answer for image, answer in self.known if torch.equal(image, each)) for each in images]


@pytest.fixture
def scenes(tmp_path: Path) -> CocoDetection:
    """Three images with objects."""
    write_scenes(tmp_path / "s", train=1, val=3, size=(64, 64), seed=0, task="detection")
    return CocoDetection(tmp_path / "s/images/val", tmp_path / "s/annotations/instances_val.json")


def _answers(data: ImageDataset) -> tuple[list[Prediction], list[Prediction]]:
    """What is right of every image, and nothing."""
    right: list[Prediction] = [
        {"boxes": target["boxes"], "labels": target["labels"], "scores": torch.ones(len(target["labels"]))}
        for _, target in data
    ]
    return right, [{name: value[:0] for name, value in each.items()} for each in right]


def test_images_are_chosen_by_what_they_gained_and_lost(scenes: CocoDetection, tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path, "detection")
    right, nothing = _answers(scenes)
    before = _Scripted(scenes, [nothing[0], right[1], nothing[2]])
    after = _Scripted(scenes, [right[0], nothing[1], right[2]])
    found, objects = gain.compare(scenes, recipe, ("baseline", before), ("distilled", after))
    changes = [(change.index, change.before, change.after) for change in found.changes]
    assert np.array(changes) == pytest.approx(np.array([(0, 0, 100), (2, 0, 100), (1, 100, 0)]))
    assert [found.better, found.worse, found.median] == pytest.approx([2, 1, 100])
    assert [example.index for example in found.improved] == [0, 2]
    assert [example.index for example in found.harmed] == [1]
    panels_of_first = found.improved[0].panels
    assert [(panel.title, panel.score) for panel in panels_of_first] == [
        ("truth", None), ("baseline", 0), ("distilled", pytest.approx(100)),
    ]  # fmt: skip
    assert all(box.right for box in panels_of_first[2].boxes)
    assert found.interval is not None
    assert found.interval.images == 3
    assert found.interval.low < 0 < found.interval.high
    assert sum(objects[f"AP/{name}"] for name in scenes.classes) == sum(len(target["labels"]) for _, target in scenes)


def test_what_has_no_objects_has_no_score_of_its_own(scenes: CocoDetection, tmp_path: Path) -> None:
    file = tmp_path / "s/annotations/instances_val.json"
    content = json.loads(file.read_text())
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != content["images"][1]["id"]]
    file.write_text(json.dumps(content))
    data = CocoDetection(tmp_path / "s/images/val", file)
    right, nothing = _answers(data)
    sides = ("before", _Scripted(data, nothing)), ("after", _Scripted(data, right))
    found, _ = gain.compare(data, tiny.recipe(tmp_path, "detection"), *sides)
    assert sorted(change.index for change in found.changes) == [0, 2]


def test_a_run_alone_shows_its_best_and_its_worst_image(scenes: CocoDetection, tmp_path: Path) -> None:
    right, nothing = _answers(scenes)
    halves = [{name: value[: max(1, len(value) // 2)] for name, value in each.items()} for each in right]
    own = _Scripted(scenes, [nothing[0], right[1], halves[2]])
    examples, _ = gain.sample(scenes, tiny.recipe(tmp_path, "detection"), ("teacher", own))
    assert [example.index for example in examples] == [1, 2, 0]
    assert [panel.title for panel in examples[0].panels] == ["truth", "teacher"]
    scores = [example.panels[1].score for example in examples]
    assert [scores[0], scores[2]] == pytest.approx([100, 0])


def test_rows_by_class_and_size() -> None:
    before = {"mAP": 1.0, "AP_s": None, "AP_l": 5.0, "AP/a": 10.0, "AP/b": 20.0}
    after = {"mAP": 2.0, "AP_s": 3.0, "AP_l": 7.0, "AP/a": 9.0, "AP/b": 25.0}
    classes, sizes = gain.rows(before, after, {"AP_s": 0, "AP_l": 7, "AP/a": 3})
    assert [(row.name, row.gain) for row in classes] == [("b", 5.0), ("a", -1.0)]
    assert [(row.name, row.before, row.after, row.count) for row in sizes] == [
        ("small objects", None, 3.0, 0), ("large objects", 5.0, 7.0, 7),
    ]  # fmt: skip
    assert [row.count for row in classes] == [None, 3]
