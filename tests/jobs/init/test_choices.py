from __future__ import annotations

import pytest

from acamkd import config
from acamkd.data.statistics import Statistics
from acamkd.errors import AcamkdError
from acamkd.jobs.init.choices import CPU, GPU, choose_batch, choose_epochs, choose_frame, inherited


def _found(median: float | None, **sizes: int) -> Statistics:
    named = {f"{name[1:].replace('x', ' x ')} pixels": number for name, number in sizes.items()}
    sides = {"shortest": 1.0, "median": median, "longest": 200.0} if median else {}
    return Statistics(images=sum(sizes.values()), sizes=named, sides=sides)


@pytest.mark.parametrize(
    ("median", "resize"),
    [(96.0, [256, 320]), (110.0, [224, 288]), (20.0, [256, 352]), (400.0, [160, 224])],
)  # fmt: skip
def test_a_detectors_frame_shows_the_median_box_at_48_pixels_within_limits(median: float, resize: list[int]) -> None:
    frame = choose_frame(_found(median, _640x480=10), "detection", CPU)
    assert frame.resize == resize
    assert frame.augment["crop"] == [480, 640]


def test_images_are_never_enlarged_and_sides_are_multiples_of_32() -> None:
    assert choose_frame(_found(10.0, _320x200=10), "detection", GPU).resize == [192, 320]


def test_masks_take_the_images_size_up_to_what_the_machine_can() -> None:
    assert choose_frame(_found(None, _128x96=10), "segmentation", CPU).resize == [96, 128]
    assert choose_frame(_found(None, _480x360=10), "segmentation", CPU).resize == [160, 224]
    assert choose_frame(_found(None, _480x360=10), "segmentation", GPU).resize == [352, 480]


def test_images_of_many_sizes_keep_their_shape_and_have_no_crop() -> None:
    frame = choose_frame(_found(None, _320x240=5, _240x320=4, _320x320=1), "segmentation", CPU)
    assert frame.resize == {"short": 160, "long": 224}
    assert "crop" not in frame.augment


def test_images_of_which_none_can_be_read_are_named() -> None:
    found = Statistics(images=1, problems=["a.jpg: it is a pointer of Git LFS"])
    with pytest.raises(AcamkdError, match=r"the data cannot be used, 1 problem:\n  a\.jpg: it is a pointer of Git LFS"):
        choose_frame(found, "segmentation", CPU)


@pytest.mark.parametrize(
    ("images", "largest", "batch"), [(1000, None, 8), (1000, 5, 4), (13, None, 2), (23, 100, 4), (4, 0, 2)]
)
def test_a_batch_is_a_power_of_2_that_fits(images: int, largest: int | None, batch: int) -> None:
    assert choose_batch(images, CPU, largest) == batch


@pytest.mark.parametrize(("images", "epochs"), [(367, (40, 5)), (13, (128, 16)), (100_000, (16, 2))])
def test_epochs_come_to_about_as_many_steps_and_eight_evaluations(images: int, epochs: tuple[int, int]) -> None:
    assert choose_epochs(images, 8, CPU) == epochs
    config.Train(epochs=epochs[0], eval_every=epochs[1])


def test_only_dense_detectors_of_one_kind_and_width_inherit() -> None:
    teacher, student = (config.Model.model_validate(section) for section in CPU.networks["detection"])
    assert inherited(teacher, student, True) == ["head", "backbone.fpn.layer_blocks"]
    assert inherited(teacher, student, False) == []
    assert inherited(teacher, student.model_copy(update={"fpn_channels": 32}), True) == []
    segmenter = config.Model(arch="fpn")
    assert inherited(segmenter, segmenter, True) == []
