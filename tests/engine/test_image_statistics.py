from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from acamkd.engine.image_statistics import BoxStatistics, ImageStatistics, MaskStatistics, image_interval
from acamkd.engine.metrics import METRICS, Scorer
from acamkd.models.base import VOID, Prediction, Target

CLASSES = ("ant", "bee", "cat")


def _boxes(images: int = 5) -> tuple[list[Prediction], list[Target]]:
    """Random objects and what a mediocre detector makes of them; image 1 is empty, image 2 holds a crowd."""
    generator = torch.Generator().manual_seed(3)
    predictions, targets = [], []
    for index in range(images):
        count = 0 if index == 1 else 10
        corner = 200 * torch.rand(count, 2, generator=generator)
        boxes = torch.cat([corner, corner + 25 + 90 * torch.rand(count, 2, generator=generator)], dim=1)
        labels = torch.randint(1, 3, (count,), generator=generator)  # never a cat
        crowd = torch.zeros(count, dtype=torch.int64)
        crowd[: index == 2] = 1
        targets.append({"boxes": boxes, "labels": labels, "iscrowd": crowd})
        again = boxes[:4] + 3 * torch.randn(boxes[:4].shape, generator=generator)
        found = torch.cat([boxes + 5 * torch.randn(boxes.shape, generator=generator), again, again[:1] + 150])
        more = torch.randint(1, 4, (len(found) - count,), generator=generator)
        scores = torch.rand(len(found), generator=generator)
        predictions.append({"boxes": found, "labels": torch.cat([labels, more]), "scores": scores})
    return predictions, targets


def _masks() -> tuple[list[Prediction], list[Target]]:
    """Masks of unequal sizes with void, and predictions that are mostly right."""
    rng = np.random.default_rng(0)
    predictions, targets = [], []
    for index in range(5):
        true = rng.integers(0, 2 + (index == 3), (20 + 9 * index, 31))  # class 2 is in one image alone
        found = np.where(rng.random(true.shape) < 0.3, 1, true)
        true[rng.random(true.shape) < 0.1] = VOID
        predictions.append({"mask": torch.from_numpy(found)})
        targets.append({"mask": torch.from_numpy(true)})
    return predictions, targets


@pytest.mark.parametrize("statistics", [BoxStatistics(CLASSES), MaskStatistics(CLASSES)], ids=["boxes", "masks"])
def test_the_metric_of_a_choice_of_images_is_that_of_the_scorer(statistics: ImageStatistics) -> None:
    task = "detection" if isinstance(statistics, BoxStatistics) else "segmentation"
    predictions, targets = _boxes() if task == "detection" else _masks()
    statistics.update(predictions[:2], targets[:2])
    statistics.update(predictions[2:], targets[2:])
    choices = np.array([[1, 1, 1, 1, 1], [0, 2, 0, 0, 3], [3, 1, 1, 0, 0], [0, 0, 2, 1, 2]])
    expected: list[float] = []
    alone: list[float] = []
    scorer = Scorer(task, CLASSES)  # type: ignore[arg-type]
    for times in (*choices, *np.eye(5, dtype=int)):
        chosen = [index for index, count in enumerate(times) for _ in range(count)]
        scorer.update([predictions[index] for index in chosen], [targets[index] for index in chosen])
        (expected if len(expected) < len(choices) else alone).append(scorer.compute()[METRICS[scorer.task]])
    assert statistics.metric(choices.astype(float)) == pytest.approx(expected, rel=1e-5)
    assert statistics.of_each() == pytest.approx(alone, rel=1e-5, nan_ok=True)
    assert math.isnan(alone[1]) is (task == "detection")  # an image without objects
    assert len({round(value, 3) for value in expected}) == 4


def test_detections_beyond_the_limit_do_not_count() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10]])
    found = {"boxes": boxes, "labels": torch.ones(2).long(), "scores": torch.tensor([0.9, 0.8])}
    target = {"boxes": boxes, "labels": torch.ones(2).long(), "iscrowd": torch.zeros(2).long()}
    for limit, expected in ((2, 100), (1, 100 * 51 / 101)):  # the recalls up to one half
        statistics = BoxStatistics(CLASSES, limit)
        statistics.update([found], [target])
        assert statistics.of_each() == pytest.approx([expected])


def test_objects_are_counted_by_size_and_class() -> None:
    target = {
        "boxes": torch.tensor([[0.0, 0, 31, 31], [0, 0, 95, 95], [0, 0, 97, 97], [0, 0, 97, 97], [0, 0, 97, 97]]),
        "labels": torch.tensor([1, 1, 2, 2, 2]),
        "iscrowd": torch.tensor([0, 0, 0, 0, 1]),
        "area": torch.tensor([0.0, 0, 0, 900, 0]),
    }
    statistics = BoxStatistics(CLASSES)
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long(), "scores": torch.zeros(0)}
    statistics.update([nothing], [target])
    assert statistics.objects() == {"AP_s": 2, "AP_m": 1, "AP_l": 1, "AP/ant": 2, "AP/bee": 2, "AP/cat": 0}
    assert MaskStatistics(CLASSES).objects() == {}


def _of_two_classes(right: list[int]) -> MaskStatistics:
    """Images of ten pixels of one class, so many of them found, the others taken for the other class."""
    statistics = MaskStatistics(("ant", "bee"))
    for count in right:
        found = torch.tensor([[0] * count + [1] * (10 - count)])
        statistics.update([{"mask": found}], [{"mask": torch.zeros(1, 10, dtype=torch.int64)}])
    return statistics


def test_the_interval_is_that_of_every_sample_of_two_images() -> None:
    before, after = _of_two_classes([8, 8]), _of_two_classes([8, 4])
    # mIoU is half the share found: bee is never there. 4 equally likely samples differ by 0, -10 (twice) and -20.
    samples = [np.bincount(pair, minlength=2) for pair in itertools.product(range(2), repeat=2)]
    differences = after.metric(np.array(samples, float)) - before.metric(np.array(samples, float))
    assert sorted(differences.tolist()) == pytest.approx([-20, -10, -10, 0])
    interval = image_interval(before, after)
    assert interval is not None
    assert [interval.low, interval.high, interval.images] == pytest.approx([-20, 0, 2])
    assert interval.verdict == "no evidence"


def test_the_interval_of_many_images_is_that_of_their_mean() -> None:
    rng = np.random.default_rng(1)
    counts = rng.integers(3, 8, 80)
    gains = rng.integers(0, 3, 80)
    before, after = _of_two_classes(counts.tolist()), _of_two_classes((counts + gains).tolist())
    interval = image_interval(before, after)
    assert interval is not None
    mean, error = 5 * gains.mean(), 5 * gains.std() / math.sqrt(80)  # a pixel of ten is 5 points of mIoU
    assert interval.low == pytest.approx(mean - 1.96 * error, abs=0.15 * error)
    assert interval.high == pytest.approx(mean + 1.96 * error, abs=0.15 * error)
    assert interval.verdict == "too few seeds"
    assert str(interval).startswith("95 % interval from the 80 images alone: +")
    assert image_interval(before, after) == interval


def test_one_image_has_no_interval_and_equal_networks_an_empty_one() -> None:
    assert image_interval(_of_two_classes([5]), _of_two_classes([9])) is None
    same = image_interval(_of_two_classes([5, 9]), _of_two_classes([5, 9]))
    assert same is not None
    assert (same.low, same.high, same.verdict) == (0, 0, "no evidence")
