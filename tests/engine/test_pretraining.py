from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from acamkd.distillation.distiller import Distiller
from acamkd.engine.pretraining import HeldOutLoss, NearestNeighbors, regions
from acamkd.losses import FitNet
from acamkd.models.base import VOID, Batch, Target
from acamkd.models.segmentation import Segmenter


def boxes(*found: tuple[int, list[float]], crowds: int = 0) -> Target:
    return {
        "boxes": torch.tensor([box for _, box in found]), "labels": torch.tensor([label for label, _ in found]),
        "iscrowd": torch.tensor([0] * (len(found) - crowds) + [1] * crowds),
    }  # fmt: skip


def test_boxes_cover_shares_of_cells() -> None:
    target = boxes((2, [8.0, 0, 24, 16]), (1, [4.0, 20, 12, 28]), (1, [0.0, 0, 32, 32]), crowds=1)
    labels, weights = regions(target, (32, 32), (2, 2))
    assert labels.tolist() == [1, 0]
    torch.testing.assert_close(weights, torch.tensor([[[0.5, 0.5], [0, 0]], [[0, 0], [0.25, 0]]]))


def test_a_wide_input_has_two_strides() -> None:
    _, weights = regions(boxes((1, [0.0, 0, 20, 10])), (20, 80), (2, 4))
    torch.testing.assert_close(weights, torch.tensor([[[1.0, 0, 0, 0], [0, 0, 0, 0]]]))


def test_classes_of_a_mask_cover_shares_of_cells() -> None:
    mask = torch.full((4, 4), VOID)
    mask[:, :2], mask[0, 2:] = 1, 3
    labels, weights = regions({"mask": mask}, (4, 4), (2, 2))
    assert labels.tolist() == [1, 3]
    torch.testing.assert_close(weights, torch.tensor([[[1.0, 0], [1, 0]], [[0, 0.5], [0, 0]]]))


def seen(images: list[list[tuple[int, Tensor]]], classes: int = 2) -> dict[str, float]:
    """Objects side by side, one per cell of a row, whose features are given."""
    validator = NearestNeighbors([f"c{k}" for k in range(classes)])
    for objects in images:
        target = boxes(*((label + 1, [16.0 * k, 0, 16.0 * k + 16, 16]) for k, (label, _) in enumerate(objects)))
        size = (16, 16 * len(objects))
        maps = torch.stack([vector for _, vector in objects], dim=1)[None, :, None]
        batch = Batch(torch.zeros(1, 3, *size), [size], [size], [target])
        validator.add(batch, {"map": maps})
    return validator.compute()


X, Y = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])


def test_neighbors_of_other_images_decide() -> None:
    clear = seen([[(0, X), (1, Y)], [(0, 2 * X), (1, 3 * Y)]])
    assert clear == {"kNN": 100, "kNN/c0": 100, "kNN/c1": 100}
    # Within each image the twins agree, but the other image has them the other way round.
    swapped = seen([[(0, X), (0, X), (1, Y)], [(0, Y), (1, X), (1, X)]])
    assert swapped["kNN"] == 0


def test_a_mean_over_classes_that_can_be_found() -> None:
    found = seen([[(0, X), (0, X), (0, X), (1, X)], [(0, X), (0, X), (1, X), (2, Y)]], classes=4)
    assert (found["kNN/c0"], found["kNN/c1"], found["kNN"]) == (100, 0, 50)
    assert math.isnan(found["kNN/c2"])  # in a single image
    assert math.isnan(found["kNN/c3"])


def test_nothing_to_compare() -> None:
    assert math.isnan(NearestNeighbors(["a"]).compute()["kNN"])


def test_a_loss_that_is_not_finite_is_a_score_without_a_basis() -> None:
    student, teacher = (
        Segmenter(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)), 2).eval() for _ in range(2)
    )
    distiller = Distiller(student, teacher, [("1", "1")], [FitNet(4, 4)])
    validator, images = HeldOutLoss(), [torch.rand(3, 32, 32)]
    validator.see(distiller, images, [{}])
    assert validator.compute()["alignment"] < 0
    torch.nn.init.constant_(next(student.parameters()), torch.nan)
    validator.see(distiller, images, [{}])
    assert math.isnan(validator.compute()["alignment"])


def test_it_starts_anew() -> None:
    validator = NearestNeighbors(["a", "b"])
    size = (16, 16)
    for features in (X, Y):
        for _ in range(2):
            target = boxes((1, [0.0, 0, 16, 16]))
            validator.add(Batch(torch.zeros(1, 3, 16, 16), [size], [size], [target]), {"m": features.view(1, 2, 1, 1)})
        assert validator.compute()["kNN"] == pytest.approx(100)
