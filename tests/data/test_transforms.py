from __future__ import annotations

import torch
from torchvision import tv_tensors

from acamkd.config import Augmentation
from acamkd.data.dataset import Sample
from acamkd.data.transforms import PADDING, augmentation, batch_scale
from acamkd.models.base import Target


def _image(height: int, width: int) -> tv_tensors.Image:
    return tv_tensors.Image(torch.arange(3 * height * width).remainder(251).to(torch.uint8).view(3, height, width))


def _detection(boxes: list[list[float]], height: int = 20, width: int = 30) -> Sample:
    target: Target = {
        "boxes": tv_tensors.BoundingBoxes(
            torch.tensor(boxes, dtype=torch.float32).view(-1, 4), format="XYXY", canvas_size=(height, width)
        ),
        "labels": torch.arange(1, len(boxes) + 1),
        "iscrowd": torch.arange(len(boxes)) % 2,
    }
    return _image(height, width), target


def _segmentation(height: int = 20, width: int = 30) -> Sample:
    mask = torch.arange(height * width).remainder(5).view(height, width)
    return _image(height, width), {"mask": tv_tensors.Mask(mask)}


def test_flip_moves_boxes_exactly() -> None:
    image, target = _detection([[1, 2, 4, 6], [10.5, 0, 30, 20]])
    flipped, moved = augmentation(Augmentation(flip=1), "detection")(image, target)
    assert torch.equal(flipped, image.flip(-1))
    assert moved["boxes"].tolist() == [[26, 2, 29, 6], [0, 0, 19.5, 20]]
    assert moved["labels"].tolist() == [1, 2]
    assert moved["iscrowd"].tolist() == [0, 1]


def test_flip_moves_masks_exactly() -> None:
    image, target = _segmentation()
    flipped, moved = augmentation(Augmentation(flip=1), "segmentation")(image, target)
    assert torch.equal(flipped, image.flip(-1))
    assert torch.equal(moved["mask"], target["mask"].flip(-1))


def test_no_change_by_probability_zero() -> None:
    image, target = _detection([[1, 2, 4, 6]])
    same, unmoved = augmentation(Augmentation(flip=0), "detection")(image, target)
    assert torch.equal(same, image)
    assert unmoved["boxes"].tolist() == [[1, 2, 4, 6]]


def test_scale_moves_boxes_and_masks_alike() -> None:
    double = Augmentation(scale=(2, 2), flip=0)
    image, target = augmentation(double, "detection")(*_detection([[1, 2, 4, 6]]))
    assert image.shape == (3, 40, 60)
    assert target["boxes"].tolist() == [[2, 4, 8, 12]]
    before = _segmentation()
    image, target = augmentation(double, "segmentation")(*before)
    assert image.shape == (3, 40, 60)
    assert torch.equal(target["mask"], before[1]["mask"].repeat_interleave(2, 0).repeat_interleave(2, 1))


def test_scale_covers_its_range_with_one_factor_for_both_sides() -> None:
    change = augmentation(Augmentation(scale=(0.5, 2), flip=0), "segmentation")
    torch.manual_seed(0)
    sizes = [change(*_segmentation(100, 200))[0].shape[-2:] for _ in range(40)]
    assert all(abs(width - 2 * height) <= 2 for height, width in sizes)
    assert min(sizes)[0] < 60
    assert max(sizes)[0] > 180


def test_crop_clamps_boxes_and_drops_what_lies_outside() -> None:
    change = augmentation(Augmentation(crop=(10, 10), flip=0), "detection")
    whole = _detection([[0, 0, 30, 20], [0, 0, 3, 3], [27, 17, 30, 20]])
    torch.manual_seed(0)
    counts = set()
    for _ in range(20):
        image, target = change(*whole)
        assert image.shape == (3, 10, 10)
        assert target["boxes"][0].tolist() == [0, 0, 10, 10]
        assert (target["boxes"][:, 2:] - target["boxes"][:, :2] >= 1).all()
        assert (target["labels"] - 1).remainder(2).tolist() == target["iscrowd"].tolist()
        assert len(target["boxes"]) == len(target["labels"])
        counts.add(len(target["boxes"]))
    assert {1, 2} <= counts


def test_crop_may_leave_no_boxes() -> None:
    change = augmentation(Augmentation(crop=(4, 4), flip=0), "detection")
    torch.manual_seed(0)
    targets = [change(*_detection([[0, 0, 2, 2]]))[1] for _ in range(5)]
    assert targets[0]["boxes"].shape == (0, 4)
    assert targets[0]["labels"].shape == targets[0]["iscrowd"].shape == (0,)


def test_images_without_boxes_pass_through_everything() -> None:
    change = augmentation(Augmentation(scale=(0.5, 2), crop=(16, 16), flip=0.5, photometric=True), "detection")
    image, target = change(*_detection([]))
    assert image.shape == (3, 16, 16)
    assert target["boxes"].shape == (0, 4)


def test_small_images_are_padded_with_void() -> None:
    image, target = _segmentation(6, 8)
    torch.manual_seed(1)
    padded, moved = augmentation(Augmentation(crop=(12, 12), flip=0), "segmentation")(image, target)
    void = moved["mask"] == 255
    assert padded.shape == (3, 12, 12)
    assert int((~void).sum()) == 6 * 8
    assert torch.equal(moved["mask"][~void].view(6, 8), target["mask"])
    assert torch.equal(padded[:, ~void].view(3, 6, 8), image)
    assert (padded[:, void] == torch.tensor(PADDING)[:, None]).all()


def test_padding_moves_boxes_with_their_pixels() -> None:
    image, target = _detection([[1, 2, 4, 5]], 6, 8)
    torch.manual_seed(1)
    padded, moved = augmentation(Augmentation(crop=(12, 12), flip=0), "detection")(image, target)
    left, top, right, bottom = (int(value) for value in moved["boxes"][0])
    assert torch.equal(padded[:, top:bottom, left:right], image[:, 2:5, 1:4])


def test_photometric_changes_colors_and_nothing_else() -> None:
    image, target = _segmentation()
    torch.manual_seed(0)
    changed, same = augmentation(Augmentation(flip=0, photometric=True), "segmentation")(image, target)
    assert changed.dtype == torch.uint8
    assert not torch.equal(changed, image)
    assert torch.equal(same["mask"], target["mask"])


def test_a_batchs_scale_depends_on_its_place_alone() -> None:
    state = torch.random.get_rng_state()
    drawn = [batch_scale((0.5, 2.0), 0, epoch, batch) for epoch in range(20) for batch in range(20)]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert len(set(drawn)) == 400
    assert 0.5 <= min(drawn) < 0.55 < 1.95 < max(drawn) <= 2
    assert batch_scale((0.5, 2.0), 0, 3, 4) == drawn[64] != batch_scale((0.5, 2.0), 1, 3, 4)
