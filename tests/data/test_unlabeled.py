from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from acamkd import config, data
from acamkd.data.scenes import write_scenes
from acamkd.data.unlabeled import UnlabeledImages, WithUnlabeled
from acamkd.errors import AcamkdError
from acamkd.models.base import VOID, Task

COUNT = 3


def _options(root: Path, task: Task) -> config.Data:
    write_scenes(root / "scenes", train=4, val=1, size=(32, 32), seed=0, task=task)
    more = root / "scenes" / "more"
    more.mkdir(exist_ok=True)
    for number in range(COUNT):
        Image.new("RGB", (40, 36), (number, 100, 200)).save(more / f"{number}.png")
    changes = config.Augmentation(scale=(0.8, 1.2), crop=(24, 24), photometric=False)
    names = None if task == "detection" else ("background", "a", "b", "c", "d", "e")
    return config.Data(root=root / "scenes", unlabeled=Path("more"), augment=changes, classes=names)


def _mixed(root: Path, task: Task = "segmentation", seed: int = 0) -> WithUnlabeled:
    options = _options(root, task)
    labeled = data.build(options, task, "train", seed=seed, augment=True)
    return WithUnlabeled(labeled, data.build_unlabeled(options, task, seed=seed))


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_nothing_is_known_of_them(tmp_path: Path, task: Task) -> None:
    images = data.build_unlabeled(_options(tmp_path, task), task, seed=0)
    assert data.check(images, "full") == []
    assert len(images) == COUNT
    image, target = images[0]
    assert image.shape == (3, 24, 24)  # changed as the labeled ones
    if task == "segmentation":
        assert (target["mask"] == VOID).all()
    else:
        assert [target[name].shape for name in ("boxes", "labels", "iscrowd")] == [(0, 4), (0,), (0,)]


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_a_batch_brings_as_many(tmp_path: Path, task: Task) -> None:
    mixed = _mixed(tmp_path, task)
    plain = data.loader(mixed.labeled, 2, 0, shuffle=True, seed=0)
    for (images, targets), (same, same_targets, more) in zip(
        plain, data.loader(mixed, 2, 0, shuffle=True, seed=0), strict=True
    ):
        assert all(torch.equal(one, other) for one, other in zip(images, same, strict=True))
        assert all(
            torch.equal(one[name], other[name])
            for one, other in zip(targets, same_targets, strict=True)
            for name in one
        )
        assert [image.shape for image in more] == [(3, 24, 24)] * 2


def test_they_are_a_function_of_key_and_seed_and_come_in_turn(tmp_path: Path) -> None:
    mixed = _mixed(tmp_path)
    shown = [mixed[key][2] for key in range(6 * COUNT)]
    again = _mixed(tmp_path)
    assert all(torch.equal(image, again[key][2]) for key, image in reversed(list(enumerate(shown))))
    numbers = [int(image[0].float().median()) for image in shown]
    assert all(set(numbers[turn : turn + COUNT]) == set(range(COUNT)) for turn in range(0, len(numbers), COUNT))
    assert any(numbers[:COUNT] != [int(_mixed(tmp_path, seed=seed)[key][2][0].float().median()) for key in range(COUNT)]
               for seed in (1, 2, 3))  # fmt: skip


def test_workers_change_nothing(tmp_path: Path) -> None:
    batches = [
        [image for *_, more in data.loader(_mixed(tmp_path), 2, workers, shuffle=True, seed=0) for image in more]
        for workers in (0, 2)
    ]
    assert len(batches[0]) == 4
    assert all(torch.equal(one, other) for one, other in zip(*batches, strict=True))


def test_what_cannot_be_used(tmp_path: Path) -> None:
    options = _options(tmp_path, "segmentation")
    with pytest.raises(AcamkdError, match=r"cannot read the folder .*gone: No such file"):
        UnlabeledImages(tmp_path / "gone", "segmentation")
    (tmp_path / "empty").mkdir()
    with pytest.raises(AcamkdError, match="empty: the folder holds no images"):
        data.check(UnlabeledImages(tmp_path / "empty", "segmentation"), "full")
    (tmp_path / "scenes/more/1.png").write_text("no image")
    with pytest.raises(AcamkdError, match=r"more/1\.png: the image cannot be read"):
        data.check(data.build_unlabeled(options, "segmentation", seed=0), "full")
