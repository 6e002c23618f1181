from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from acamkd import config, data
from acamkd.data.checks import LISTED_PROBLEMS
from acamkd.data.dataset import seed_of
from acamkd.data.image_io import read_image, read_size
from acamkd.errors import AcamkdError, ImageError
from acamkd.models.base import Target


def _write(file: Path, image: Image.Image) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file)


def _masks(root: Path, *, count: int = 5) -> config.Data:
    """Tiny segmentation data: noise, with masks of two classes."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for number in range(count):
            _write(
                root / split / "images" / f"{number}.png", Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
            )
            _write(root / split / "masks" / f"{number}.png", Image.fromarray(rng.integers(0, 2, (12, 16), np.uint8)))
    train, val = (config.Split(images=Path(split, "images"), masks=Path(split, "masks")) for split in ("train", "val"))
    changes = config.Augmentation(scale=(0.5, 2), crop=(10, 10), photometric=True)
    return config.Data(format="masks", root=root, train=train, val=val, classes=("sky", "road"), augment=changes)


def _train(root: Path, *, seed: int = 0) -> data.ImageDataset:
    return data.build(_masks(root), "segmentation", "train", seed=seed, augment=True)


def test_same_key_same_item_in_any_order(tmp_path: Path) -> None:
    dataset = _train(tmp_path)
    forwards = [dataset[key] for key in range(10)]
    backwards = [dataset[key] for key in reversed(range(10))][::-1]
    for (image, target), (again, target_again) in zip(forwards, backwards, strict=True):
        assert torch.equal(image, again)
        assert torch.equal(target["mask"], target_again["mask"])


def test_seed_epoch_and_index_each_change_the_draws(tmp_path: Path) -> None:
    image, _ = _train(tmp_path)[0]
    assert not torch.equal(_train(tmp_path)[5][0], image)  # the same image in epoch 1
    assert not torch.equal(_train(tmp_path, seed=1)[0][0], image)
    assert len({seed_of(0, epoch, index) for epoch in range(20) for index in range(20)}) == 400


def test_a_hand_over_that_the_end_of_training_cuts_off_prints_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    dataset = _train(tmp_path)
    target = dataset.target

    def cut_off(index: int, size: tuple[int, int]) -> Target:
        sys.excepthook(EOFError, EOFError("cut off"), None)  # as multiprocessing does in a loading process
        return target(index, size)

    monkeypatch.setattr(dataset, "target", cut_off)
    assert len(list(data.loader(dataset, 2, 1, shuffle=False, seed=0))) == 3
    assert "cut off" not in capfd.readouterr().err


def test_items_leave_the_global_generator_alone(tmp_path: Path) -> None:
    dataset = _train(tmp_path)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    for _ in data.loader(dataset, 2, 0, shuffle=True, seed=0):
        pass
    assert torch.equal(torch.get_rng_state(), before)


def test_items_are_plain_tensors_of_the_agreed_types(tmp_path: Path) -> None:
    image, target = _train(tmp_path)[0]
    assert type(image) is torch.Tensor
    assert (image.dtype, image.shape) == (torch.uint8, (3, 10, 10))
    assert set(target) == {"mask"}
    assert type(target["mask"]) is torch.Tensor
    assert (target["mask"].dtype, target["mask"].shape) == (torch.int64, (10, 10))


def test_iteration_ends_after_one_epoch(tmp_path: Path) -> None:
    assert len(list(_train(tmp_path))) == 5


def test_workers_change_nothing(tmp_path: Path) -> None:
    batches = []
    for workers in (0, 2):
        loader = data.loader(_train(tmp_path), 2, workers, shuffle=True, seed=4)
        assert isinstance(loader.sampler, data.SeededSampler)
        for epoch in (0, 1):
            loader.sampler.set_epoch(epoch)
            batches.append([image for images, _ in loader for image in images])
    for here, there in zip([*batches[0], *batches[1]], [*batches[2], *batches[3]], strict=True):
        assert torch.equal(here, there)


def test_sampler_permutes_as_a_function_of_seed_and_epoch() -> None:
    sampler = data.SeededSampler(50, seed=1)
    first = list(sampler)
    assert sorted(first) == list(range(50))
    assert first == list(sampler) != list(range(50))
    sampler.set_epoch(3)
    later = list(sampler)
    assert sorted(later) == list(range(150, 200))
    assert [key - 150 for key in later] != first
    assert list(data.SeededSampler(50, seed=2)) != first


@pytest.mark.parametrize("workers", [0, 2])
def test_one_epoch_can_begin_in_its_middle(tmp_path: Path, workers: int) -> None:
    loader = data.loader(_train(tmp_path), 2, workers, shuffle=True, seed=4)
    assert isinstance(loader.sampler, data.SeededSampler)
    epochs = []
    for begin in (0, 1):
        loader.begin(3, begin)
        for epoch in (3, 4):
            early = iter(loader)  # as Lightning makes it, before it names the epoch
            loader.sampler.set_epoch(epoch)
            epochs.append([image for images, _ in early for image in images])
    whole, following, rest, following_again = epochs
    assert [len(images) for images in epochs] == [4, 4, 2, 4]
    for expected, found in ((whole[2:], rest), (following, following_again)):
        assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
    assert len(loader) == 2  # of the whole epoch, which is what Lightning counts by


def test_a_batch_names_its_images(tmp_path: Path) -> None:
    dataset = _train(tmp_path)
    loader = data.loader(dataset, 2, 0, shuffle=True, seed=4)
    assert isinstance(loader.sampler, data.SeededSampler)
    loader.sampler.set_epoch(1)
    dataset.transform = None
    for number, (images, _) in enumerate(loader):
        for image, file in zip(images, loader.files(number), strict=True):
            assert torch.equal(image, read_image(file))


def test_processes_share_an_epoch_without_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = data.SeededSampler(11, seed=0)
    whole = list(sampler)
    monkeypatch.setattr("acamkd.data.samplers.rank_and_world_size", lambda: (1, 3))
    assert list(sampler) == whole[1:9:3]
    assert len(sampler) == 3


@pytest.mark.parametrize(("length", "processes"), [(4, 1), (7, 3), (30, 2)])
def test_epochs_of_any_length_go_on_pass_after_pass(
    length: int, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = data.SeededSampler(11, seed=0, length=length)
    keys = []
    for epoch in range(6):
        sampler.set_epoch(epoch)
        shares = []
        for rank in range(processes):
            monkeypatch.setattr("acamkd.data.samplers.rank_and_world_size", lambda rank=rank: (rank, processes))
            shares.append(list(sampler))
            assert len(sampler) == len(shares[-1]) == length
        keys += [key for together in zip(*shares, strict=True) for key in together]
    monkeypatch.undo()
    whole, passes = data.SeededSampler(11, seed=0), []
    for number in range(-(-len(keys) // 11)):
        whole.set_epoch(number)
        passes += list(whole)
    assert keys == passes[: len(keys)]


def test_an_epoch_of_so_many_batches_repeats_images_with_other_changes(tmp_path: Path) -> None:
    loader = data.loader(_train(tmp_path), 2, 0, shuffle=True, seed=0, batches=10)
    images = [image for batch, _ in loader for image in batch]
    assert len(loader) == 10
    assert len(images) == 20
    assert len({image.numpy().tobytes() for image in images}) == 20


def test_processes_share_the_validation_images_and_repeat_none(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = []
    for rank in range(3):
        monkeypatch.setattr("acamkd.data.samplers.rank_and_world_size", lambda rank=rank: (rank, 3))
        sampler = data.DistributedSequentialSampler(7)
        shares.append(list(sampler))
        assert len(sampler) == len(shares[-1])
    assert shares == [[0, 3, 6], [1, 4], [2, 5]]


def test_loader_drops_the_incomplete_batch_only_when_shuffled(tmp_path: Path) -> None:
    dataset = _train(tmp_path)
    assert [len(images) for images, _ in data.loader(dataset, 2, 0, shuffle=True, seed=0)] == [2, 2]
    assert [len(images) for images, _ in data.loader(dataset, 2, 0, shuffle=False, seed=0)] == [2, 2, 1]
    assert [len(images) for images, _ in data.loader(dataset, 9, 0, shuffle=True, seed=0)] == [5]


def test_unshuffled_images_come_unchanged_in_order(tmp_path: Path) -> None:
    dataset = data.build(_masks(tmp_path), "segmentation", "val", seed=0, augment=False)
    images = [image for batch, _ in data.loader(dataset, 2, 0, shuffle=False, seed=0) for image in batch]
    for image, file in zip(images, sorted((tmp_path / "val" / "images").iterdir()), strict=True):
        assert torch.equal(image, torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1))


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:, :8] = 255  # white on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: left becomes top
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif, quality=100)
    image = read_image(tmp_path / "a.jpg")
    assert image.shape == (3, 24, 8)
    assert read_size(tmp_path / "a.jpg") == (24, 8)
    assert image[:, :8].min() > 250
    assert image[:, 8:].max() < 5


@pytest.mark.parametrize("orientation", [1, 4, 5, 8, 9, 255])
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
@pytest.mark.parametrize("where", ["exif", "xmp"])
def test_the_headers_say_what_decoding_finds(tmp_path: Path, name: str, where: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    xmp = f'<x:xmpmeta><rdf:Description tiff:Orientation="{orientation}"/></x:xmpmeta>'.encode()
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt("XML:com.adobe.xmp", xmp.decode())
    options: dict[str, Any] = {"exif": exif} if where == "exif" else {"xmp": xmp}
    if (where, name) == ("xmp", "a.png"):
        options = {"pnginfo": chunks}
    Image.new("RGB", (24, 8)).save(tmp_path / name, **options)
    assert tuple(read_image(tmp_path / name).shape[1:]) == read_size(tmp_path / name)
    if orientation < 10 or where == "exif":  # of an XMP entry the first digit is read
        assert read_size(tmp_path / name) == ((24, 8) if orientation in (5, 8) else (8, 24))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_every_8_bit_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    file = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.new("RGB", (6, 4), (255, 255, 255)).convert(mode).save(file)
    assert torch.equal(read_image(file), torch.full((3, 4, 6), 255, dtype=torch.uint8))


def test_16_bit_images_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 3000, np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(AcamkdError, match="8 bits per channel"):
        read_image(tmp_path / "a.png")


def test_training_and_validation_are_compared(tmp_path: Path) -> None:
    options = _masks(tmp_path)
    train, val = (data.build(options, "segmentation", split, seed=0, augment=False) for split in ("train", "val"))

    def warnings(val: data.ImageDataset, **augment: Any) -> list[str]:
        changed = {"resize": (6, 8), "augment": config.Augmentation(**augment)}
        return data.compare_splits(train, val, options.model_copy(update=changed))

    assert data.compare_splits(train, val, options) == []  # without resize a crop has the scale of the image
    assert warnings(val) == warnings(val, crop=(12, 16)) == warnings(val, crop=(6, 8), scale=(0.5, 1)) == []
    (seen,) = data.compare_splits(train, val, options, unlabeled=val)
    assert seen.startswith(f"{len(val)} of {len(val)} validation images are unlabeled images too")
    (shared,) = warnings(train)
    assert shared.startswith("5 of 5 validation images are training images too")
    (smaller,) = warnings(val, crop=(6, 8), scale=(0.75, 1.5))
    assert "training sees things 1.5 to 3 times as large as validation, where 0.png, 16 x 12 pixels" in smaller


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-80])


def _replace(file: Path) -> None:
    file.write_text("<html>not found</html>")


@pytest.mark.parametrize("harm", [_truncate, _replace])
def test_check_finds_broken_images(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    dataset = _train(tmp_path)
    assert data.check(dataset, "full") == []
    harm(tmp_path / "train" / "images" / "3.png")
    with pytest.raises(AcamkdError, match=r"1 problem:\n.*3\.png: the image cannot be read"):
        data.check(dataset, "full")


def test_headers_mode_decodes_nothing(tmp_path: Path) -> None:
    dataset = _train(tmp_path)
    _truncate(tmp_path / "train" / "images" / "3.png")
    assert data.check(dataset, "headers") == []


def test_truncated_jpeg_is_found(tmp_path: Path) -> None:
    dataset = _train(tmp_path)
    rng = np.random.default_rng(0)
    file = tmp_path / "train" / "images" / "3.png"
    Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).save(file, format="JPEG")
    assert data.check(dataset, "full") == []
    _truncate(file)
    with pytest.raises(AcamkdError, match=r"3\.png: the image cannot be read: .*truncated"):
        data.check(dataset, "full")


def test_missing_images_are_listed_and_counted(tmp_path: Path) -> None:
    _masks(tmp_path, count=LISTED_PROBLEMS + 3)
    dataset = data.build(_masks(tmp_path), "segmentation", "train", seed=0, augment=False)
    for file in dataset.files:
        file.unlink()
    with pytest.raises(AcamkdError) as caught:
        data.check(dataset, "full")
    lines = str(caught.value).splitlines()
    assert lines[0] == "the data cannot be used, 13 problems:"
    assert lines[1].endswith("0.png: there is no such image")
    assert len(lines) == LISTED_PROBLEMS + 2
    assert lines[-1].strip() == "... and 3 more"


def test_loader_refuses_unchecked_problems(tmp_path: Path) -> None:
    dataset = _train(tmp_path)
    dataset.problems.append("something is wrong")
    with pytest.raises(AcamkdError, match="something is wrong"):
        data.loader(dataset, 2, 0, shuffle=True, seed=0)


def test_classes_of_the_splits_must_agree(tmp_path: Path) -> None:
    train, val = _train(tmp_path), _train(tmp_path)
    data.check_same_classes(train, val)
    val.classes = ("road", "sky")
    with pytest.raises(AcamkdError, match="train has sky, road and val has road, sky"):
        data.check_same_classes(train, val)


def test_fingerprint_follows_content_but_not_place(tmp_path: Path) -> None:
    here, there = _train(tmp_path / "a").fingerprint(), _train(tmp_path / "b").fingerprint()
    assert here == there
    assert len(here) == 16
    mask = tmp_path / "b" / "train" / "masks" / "0.png"
    Image.fromarray(np.zeros((12, 16), np.uint8)).save(mask)
    dataset = data.MaskFolder(tmp_path / "b" / "train" / "images", mask.parent, ("sky", "road"))
    assert dataset.fingerprint() != here
    other_names = data.MaskFolder(tmp_path / "a" / "train" / "images", tmp_path / "a" / "train" / "masks", ("a", "b"))
    assert other_names.fingerprint() != here
    dataset.files[0].unlink()
    with pytest.raises(ImageError, match=rf"{dataset.files[0].name}: No such file"):
        dataset.fingerprint()
