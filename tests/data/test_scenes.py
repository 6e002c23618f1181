from __future__ import annotations

import errno
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from acamkd import data
from acamkd.data.scenes import CLASSES, draw_scene, write_scenes
from acamkd.errors import AcamkdError
from acamkd.models.base import Task


def _bytes(root: Path) -> dict[str, bytes]:
    return {file.relative_to(root).as_posix(): file.read_bytes() for file in root.rglob("*") if file.is_file()}


def test_a_scene_is_a_function_of_its_arguments() -> None:
    scene = draw_scene((48, 64), seed=0, split="train", index=3)
    again = draw_scene((48, 64), seed=0, split="train", index=3)
    assert scene.pixels.shape == (48, 64, 3)
    assert np.array_equal(scene.pixels, again.pixels)
    assert scene.objects == again.objects
    for seed, split, index in ((1, "train", 3), (0, "val", 3), (0, "train", 4)):
        assert not np.array_equal(scene.pixels, draw_scene((48, 64), seed=seed, split=split, index=index).pixels)


def test_labels_are_those_of_the_owners() -> None:
    for index in range(10):
        scene = draw_scene((64, 64), seed=0, split="train", index=index)
        assert np.array_equal(scene.labels == 0, scene.owners == -1)
        for number, label in scene.objects.items():
            assert set(scene.labels[scene.owners == number]) == {label}


def test_mostly_hidden_objects_have_no_box(monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = [draw_scene((64, 64), seed=0, split="train", index=index) for index in range(30)]
    dropped = [set(np.unique(scene.owners)) - {-1} - set(scene.objects) for scene in scenes]
    assert any(dropped)  # seen in the mask, yet not asked for
    assert sum(len(scene.objects) for scene in scenes) > 5 * sum(len(numbers) for numbers in dropped)
    of_share = []
    for share in (0.0, 0.99):
        monkeypatch.setattr("acamkd.data.scenes.VISIBLE", share)
        of_share.append([draw_scene((64, 64), seed=0, split="train", index=index) for index in range(30)])
    assert all(np.array_equal(one.labels, other.labels) for one, other in zip(*of_share, strict=True))
    least, most = (sum(len(scene.objects) for scene in drawn) for drawn in of_share)
    assert most < sum(len(scene.objects) for scene in scenes) < least


def test_every_class_and_many_sizes_occur() -> None:
    areas: dict[int, list[int]] = {label: [] for label in range(1, len(CLASSES) + 1)}
    for index in range(40):
        scene = draw_scene((128, 128), seed=0, split="train", index=index)
        for number, label in scene.objects.items():
            areas[label].append(int((scene.owners == number).sum()))
    for sizes in areas.values():
        assert len(sizes) > 20
        assert max(sizes) > 15 * min(sizes)


def test_colors_do_not_tell_the_classes_apart() -> None:
    means: dict[int, list[float]] = {label: [] for label in range(1, len(CLASSES) + 1)}
    for index in range(60):
        scene = draw_scene((64, 64), seed=0, split="train", index=index)
        for number, label in scene.objects.items():
            means[label].append(float(scene.pixels[scene.owners == number].mean()))
    centers = [np.mean(values) for values in means.values()]
    assert max(centers) - min(centers) < np.mean([np.std(values) for values in means.values()])


def test_detection_layout(tmp_path: Path) -> None:
    write_scenes(tmp_path / "scenes", train=4, val=2, size=(48, 64), seed=0, task="detection")
    for split, count in (("train", 4), ("val", 2)):
        annotations = tmp_path / "scenes" / "annotations" / f"instances_{split}.json"
        dataset = data.CocoDetection(tmp_path / "scenes" / "images" / split, annotations)
        data.check(dataset, "full")
        assert len(dataset) == count
        assert dataset.classes == CLASSES
        for index in range(count):
            scene = draw_scene((48, 64), seed=0, split=split, index=index)
            image, target = dataset[index]
            assert (
                abs(image.permute(1, 2, 0).numpy().astype(int) - scene.pixels).mean() < 15
            )  # JPEG averages colored noise
            assert target["labels"].tolist() == list(scene.objects.values())
            for number, box in zip(scene.objects, target["boxes"].int().tolist(), strict=True):
                left, top, right, bottom = box
                seen = scene.owners == number
                assert seen[top:bottom, left:right].sum() == seen.sum()  # nothing outside
                inside = seen[top:bottom, left:right]  # and no side could move in
                assert inside[0].any()
                assert inside[-1].any()
                assert inside[:, 0].any()
                assert inside[:, -1].any()


def test_annotated_areas_are_visible_pixels(tmp_path: Path) -> None:
    write_scenes(tmp_path / "scenes", train=2, val=1, size=(48, 48), seed=0, task="detection")
    content = json.loads((tmp_path / "scenes" / "annotations" / "instances_val.json").read_text())
    scene = draw_scene((48, 48), seed=0, split="val", index=0)
    areas = [np.count_nonzero(scene.owners == number) for number in scene.objects]
    assert [annotation["area"] for annotation in content["annotations"]] == areas


def test_segmentation_layout(tmp_path: Path) -> None:
    root = tmp_path / "scenes"
    write_scenes(root, train=3, val=2, size=(48, 64), seed=0, task="segmentation")
    dataset = data.MaskFolder(root / "images" / "train", root / "masks" / "train", ("background", *CLASSES))
    assert data.check(dataset, "full") == []
    assert len(dataset) == 3
    scene = draw_scene((48, 64), seed=0, split="train", index=1)
    assert np.array_equal(dataset[1][1]["mask"].numpy(), scene.labels)


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_two_folders_are_equal_to_the_byte(tmp_path: Path, task: Task) -> None:
    for name in ("a", "b"):
        write_scenes(tmp_path / name, train=2, val=1, size=(32, 32), seed=5, task=task)
    assert _bytes(tmp_path / "a") == _bytes(tmp_path / "b")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a", "b"]  # no draft is left behind


def test_complete_folder_is_reused(tmp_path: Path) -> None:
    write_scenes(tmp_path / "a", train=1, val=1, size=(32, 32), seed=0, task="detection")
    image = tmp_path / "a" / "images" / "train" / "00001.jpg"
    Image.new("RGB", (32, 32)).save(image)
    changed = image.read_bytes()
    write_scenes(tmp_path / "a", train=1, val=1, size=(32, 32), seed=0, task="detection")
    assert image.read_bytes() == changed


def test_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    write_scenes(tmp_path / "a", train=1, val=1, size=(32, 32), seed=0, task="detection")
    before = _bytes(tmp_path / "a")
    with pytest.raises(AcamkdError, match="exists and holds something else than these scenes"):
        write_scenes(tmp_path / "a", train=1, val=1, size=(32, 32), seed=1, task="detection")
    assert _bytes(tmp_path / "a") == before


def test_folder_that_cannot_be_made_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(AcamkdError, match=r"cannot write the scenes .*file/data: File exists"):
        write_scenes(tmp_path / "file/data", train=1, val=1, size=(32, 32), seed=0, task="detection")


def test_a_disk_that_fills_up_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("acamkd.data.scenes._write_masks", fail)
    with pytest.raises(AcamkdError, match=rf"^cannot write the scenes {tmp_path}/a: No space left on device$"):
        write_scenes(tmp_path / "a", train=1, val=1, size=(32, 32), seed=0, task="segmentation")
    assert list(tmp_path.iterdir()) == []


def test_interrupted_drawing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("acamkd.data.scenes._write_masks", fail)
    with pytest.raises(KeyboardInterrupt):
        write_scenes(tmp_path / "a", train=1, val=1, size=(32, 32), seed=0, task="segmentation")
    assert list(tmp_path.iterdir()) == []
