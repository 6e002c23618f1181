from __future__ import annotations

import contextlib
import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

from acamkd import config
from acamkd.engine.metrics import Scorer, score, scorer_of, why_unscored
from acamkd.errors import AcamkdError
from acamkd.models.base import VOID, Prediction, Target
from acamkd.models.segmentation import Segmenter

CLASSES = ("ant", "bee", "cat")


def _boxes(count: int, generator: torch.Generator) -> torch.Tensor:
    """Boxes of all three of COCO's sizes in images of 300 pixels."""
    corner = 200 * torch.rand(count, 2, generator=generator)
    side = 8 + 92 * torch.rand(count, 2, generator=generator) ** 2 + 40 * torch.rand(count, 1, generator=generator)
    return torch.cat([corner, corner + side], dim=1)


def _detections(images: int = 6) -> tuple[list[Prediction], list[Target]]:
    """Random boxes and what a mediocre detector makes of them; image 1 is empty, image 2 holds a crowd."""
    generator = torch.Generator().manual_seed(5)
    predictions, targets = [], []
    for index in range(images):
        count = 0 if index == 1 else 12
        boxes = _boxes(count, generator)
        labels = torch.randint(1, 3, (count,), generator=generator)  # never a cat
        crowd = torch.zeros(count, dtype=torch.int64)
        if index == 2:
            crowd[0] = 1
        targets.append({"boxes": boxes, "labels": labels, "iscrowd": crowd})
        moved = boxes + 6 * torch.randn(boxes.shape, generator=generator)
        wrong = _boxes(4, generator)
        predictions.append(
            {
                "boxes": torch.cat([moved, wrong]),
                "labels": torch.cat([labels, torch.randint(1, 4, (4,), generator=generator)]),
                "scores": torch.rand(count + 4, generator=generator),
            }
        )
    return predictions, targets


def _oracle(predictions: list[Prediction], targets: list[Target], label: int | None = None) -> list[float]:
    """pycocotools' mAP, AP50, AP75, AP_s, AP_m, AP_l in percent; of one class where a label is given."""

    def entries(items: list[dict[str, torch.Tensor]], extra: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for image, item in enumerate(items):
            for row, (x1, y1, x2, y2) in enumerate(item["boxes"].tolist()):
                found.append(
                    {
                        "id": len(found) + 1,
                        "image_id": image,
                        "category_id": int(item["labels"][row]),
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "area": (x2 - x1) * (y2 - y1),
                        extra: item[extra][row].item() if extra == "scores" else int(item[extra][row]),
                    }
                )
        return found

    truth = COCO()
    truth.dataset = {
        "info": {},
        "images": [{"id": index} for index in range(len(targets))],
        "categories": [{"id": number} for number in range(1, 1 + len(CLASSES))],
        "annotations": entries(targets, "iscrowd"),
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        found = truth.loadRes([{**entry, "score": entry.pop("scores")} for entry in entries(predictions, "scores")])
        evaluation = COCOeval(truth, found, "bbox")
        if label is not None:
            evaluation.params.catIds = [label]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [100 * float(value) for value in evaluation.stats[:6]]


def test_detection_is_what_pycocotools_says() -> None:
    predictions, targets = _detections()
    scorer = Scorer("detection", CLASSES)
    scorer.update(predictions[:2], targets[:2])
    scorer.update(predictions[2:], targets[2:])
    scores = scorer.compute()
    expected = _oracle(predictions, targets)
    assert [scores[name] for name in ("mAP", "AP50", "AP75", "AP_s", "AP_m", "AP_l")] == pytest.approx(expected)
    assert len({round(value, 3) for value in expected}) == 6  # six different questions
    assert min(expected) > 0
    for label, name in ((1, "ant"), (2, "bee")):
        assert scores[f"AP/{name}"] == pytest.approx(_oracle(predictions, targets, label)[0])


def test_a_crowd_forgives_and_a_real_object_does_not() -> None:
    target = {"boxes": torch.tensor([[0.0, 0, 50, 50], [100, 100, 200, 200]]), "labels": torch.tensor([1, 1])}
    found = {
        "boxes": torch.tensor([[0.0, 0, 50, 50], [100, 100, 150, 150]]),
        "labels": torch.tensor([1, 1]),
        "scores": torch.tensor([0.8, 0.9]),
    }
    ap = []
    for iscrowd in ([0, 1], [0, 0]):
        scorer = Scorer("detection", CLASSES)
        scorer.update([found], [{**target, "iscrowd": torch.tensor(iscrowd)}])
        ap.append(scorer.compute()["AP50"])
    assert ap[0] == pytest.approx(100)
    assert ap[1] < 51


def test_what_is_not_in_the_set_is_nan_and_what_is_not_found_is_0() -> None:
    large = {"boxes": torch.tensor([[0.0, 0, 150, 150]]), "labels": torch.tensor([2]), "iscrowd": torch.tensor([0])}
    scorer = Scorer("detection", CLASSES)
    scorer.update([{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long(), "scores": torch.zeros(0)}], [large])
    scores = scorer.compute()
    assert (scores["mAP"], scores["AP_l"], scores["AP/bee"]) == (0, 0, 0)
    assert all(math.isnan(scores[name]) for name in ("AP_s", "AP_m", "AP/ant", "AP/cat"))


def _grid(count: int) -> tuple[Prediction, Target]:
    """So many objects of one class, all of them found."""
    corners = torch.stack([torch.arange(count) % 20, torch.arange(count) // 20], dim=1) * 12.0
    boxes = torch.cat([corners, corners + 10], dim=1)
    found = {"boxes": boxes, "labels": torch.ones(count).long(), "scores": torch.linspace(0.9, 0.5, count)}
    return found, {"boxes": boxes, "labels": torch.ones(count).long(), "iscrowd": torch.zeros(count).long()}


def test_the_images_of_every_process_are_counted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    other = _grid(120)
    monkeypatch.setattr("acamkd.engine.metrics.gathered", lambda own: [own, [other]])
    scorer = Scorer("detection", CLASSES)
    scorer.update(*([side] for side in _grid(5)))
    scorer.compute()
    [said] = caplog.messages
    assert said.startswith("1 images have more than 100 objects (up to 120)")


def test_why_a_teacher_has_no_score() -> None:
    segmenter = Segmenter(nn.Conv2d(3, 3, 1), 3)
    assert why_unscored(segmenter, 3) is None
    assert why_unscored(segmenter, 6) == "it has 3 classes of its own, the data 6"


def test_more_objects_than_count_are_said_and_can_be_made_to_count(caplog: pytest.LogCaptureFixture) -> None:
    found, target = _grid(150)
    scorer = Scorer("detection", CLASSES)
    for _ in range(2):
        scorer.update([found], [target])
        assert scorer.compute()["mAP"] == pytest.approx(100 * 67 / 101)  # the recalls up to 100 / 150
    [said] = [message for message in caplog.messages if "objects" in message]
    assert said.startswith("1 images have more than 100 objects (up to 150)")
    assert "options: {detections_per_img: N}" in said

    student = {"arch": "fcos", "options": {"detections_per_img": 200}}
    content = {"name": "x", "task": "detection", "data": {}, "student": student, "train": {"epochs": 1}}
    raised = scorer_of(config.parse(content), CLASSES)
    raised.update([found], [target])
    scores = raised.compute()
    assert scores["mAP"] == scores["AP_s"] == 100
    assert len(caplog.messages) == 1
    student["options"] = {"detections_per_img": 20}
    assert scorer_of(config.parse(content), CLASSES).max_detections == 100
    student["options"] = {"detections_per_img": "300"}
    with pytest.raises(AcamkdError, match=r"student\.options\.detections_per_img must be a whole number, not '300'"):
        scorer_of(config.parse(content), CLASSES)


def test_sizes_are_those_of_the_outlines_where_they_are_known() -> None:
    slim = {"boxes": torch.tensor([[0.0, 0, 150, 150]]), "labels": torch.tensor([2]), "iscrowd": torch.tensor([0])}
    found = {"boxes": slim["boxes"], "labels": slim["labels"], "scores": torch.tensor([0.9])}
    for area, size in ((0.0, "AP_l"), (500.0, "AP_s"), (5000.0, "AP_m")):
        scorer = Scorer("detection", CLASSES)
        scorer.update([found], [{**slim, "area": torch.tensor([area])}])
        scores = scorer.compute()
        assert [name for name in ("AP_s", "AP_m", "AP_l") if not math.isnan(scores[name])] == [size]
        assert scores[size] == scores["mAP"] == 100


def test_segmentation_is_one_confusion_matrix_over_the_set() -> None:
    rng = np.random.default_rng(0)
    masks = [rng.integers(0, 2, (20 + 9 * index, 31)) for index in range(4)]  # class 2 is in no image
    found = [np.where(rng.random(mask.shape) < 0.3, 1 - mask, mask) for mask in masks]
    masks[0][:] = 0  # the average of images would differ
    for mask in masks:
        mask[rng.random(mask.shape) < 0.1] = VOID
    scorer = Scorer("segmentation", CLASSES)
    for one, other in zip(found, masks, strict=True):
        scorer.update([{"mask": torch.from_numpy(one)}], [{"mask": torch.from_numpy(other)}])
    scores = scorer.compute()

    truth, guess = (np.concatenate([each.ravel() for each in group]) for group in (masks, found))
    truth, guess = truth[truth != VOID], guess[truth != VOID]
    ious = [100 * np.sum((truth == k) & (guess == k)) / np.sum((truth == k) | (guess == k)) for k in (0, 1)]
    assert [scores["IoU/ant"], scores["IoU/bee"]] == pytest.approx(ious)
    assert scores["mIoU"] == pytest.approx(sum(ious) / 2)
    assert math.isnan(scores["IoU/cat"])


def test_a_class_that_is_only_guessed_counts_as_0() -> None:
    scorer = Scorer("segmentation", CLASSES)
    scorer.update([{"mask": torch.tensor([[0, 0, 2]])}], [{"mask": torch.tensor([[0, 0, 0]])}])
    assert scorer.compute() == pytest.approx({"mIoU": 100 / 3, "IoU/ant": 200 / 3, "IoU/bee": math.nan, "IoU/cat": 0},
                                             nan_ok=True)  # fmt: skip


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_compute_starts_anew(task: Any) -> None:
    predictions, targets = _detections()
    if task == "segmentation":
        predictions = [{"mask": torch.tensor([[0, 1, 1]])}] * 6
        targets = [{"mask": torch.tensor([[0, 1, 2]])}, {"mask": torch.tensor([[1, 1, 1]])}] * 3
    scorer = Scorer(task, CLASSES)
    scorer.update(predictions, targets)
    first = scorer.compute()
    scorer.update(predictions[:1], targets[:1])
    alone = scorer.compute()
    scorer.update(predictions, targets)
    assert scorer.compute() == pytest.approx(first, nan_ok=True)
    assert alone != pytest.approx(first, nan_ok=True)


def test_a_single_class_cannot_be_segmented() -> None:
    with pytest.raises(AcamkdError, match=r"data\.classes has cat alone: list the background too"):
        Scorer("segmentation", ("cat",))


def test_score_takes_eval_mode_and_restores_what_was() -> None:
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    model = Segmenter(net, 3, (0.0,) * 3, (1.0,) * 3, None).train()
    before = net[1].running_mean.clone()  # type: ignore[operator]
    batch = [torch.rand(3, 8, 8)], [{"mask": torch.zeros(8, 8, dtype=torch.int64)}]
    scores = score(model, [batch], Scorer("segmentation", CLASSES))
    assert 0 <= scores["mIoU"] <= 100
    assert model.training
    assert torch.equal(net[1].running_mean, before)  # type: ignore[arg-type]
