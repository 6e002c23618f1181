from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from acamkd import config, data
from acamkd.data import packed
from acamkd.data.unlabeled import UnlabeledImages
from acamkd.errors import AcamkdError

WIDTH, HEIGHT = 12, 8
BOX = {"bbox": [1, 2, 3, 4], "category": 1}


def _png(pixels: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def _image(number: int, suffix: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (WIDTH, HEIGHT), (number, 0, 0)).save(stream, suffix)
    return stream.getvalue()


def _pack(tar: Path, files: Mapping[str, bytes]) -> Path:
    tar.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(tar, "w") as content:
        for name, text in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text)
            content.addfile(entry, io.BytesIO(text))
    return tar


def _boxes(root: Path, split: str, counts: tuple[int, ...] = (3, 2), **content: Any) -> None:
    """Shards of so many images, which are numbered in their red and have one box each."""
    number = 0
    for shard, count in enumerate(counts):
        files: dict[str, bytes] = {}
        for _ in range(count):
            files[f"{number:04d}.png"] = _image(number + 100 * (split == "val"))
            files[f"{number:04d}.json"] = json.dumps({"objects": [BOX], **content}).encode()
            number += 1
        _pack(root / f"{split}-{shard:06d}.tar", files)


def _options(root: Path, **more: Any) -> config.Data:
    return config.Data.model_validate({"root": root, "classes": ["cat", "dog"], **more})


def test_boxes_of_shards_go_through_check_and_loader(tmp_path: Path) -> None:
    _boxes(tmp_path, "train")
    _boxes(tmp_path, "val", (2,))
    assert data.resolve(_options(tmp_path), "detection").format == "shards"
    train, val = (data.build(_options(tmp_path), "detection", s, seed=0, augment=False) for s in ("train", "val"))
    assert train.groups == [3, 2]
    assert train.files[3] == tmp_path / "train-000001.tar/0003.png"
    some = _options(tmp_path, train={"name": "train-000001*"})
    assert len(data.build(some, "detection", "train", seed=0, augment=False)) == 2
    image, target = train[3]
    assert image[:, 0, 0].tolist() == [3, 0, 0]
    assert target["boxes"].tolist() == [[1, 2, 4, 6]]
    assert target["labels"].tolist() == [2]
    for split in (train, val):
        assert data.check(split, "full") == []
    assert data.compare_splits(train, val, _options(tmp_path)) == [
        "no training image has a box of the class cat: the networks cannot learn it"
    ]
    loader = data.loader(train, 2, 1, shuffle=True, seed=0)
    with data.reading(loader):
        shown = [int(image[0, 0, 0]) for images, _ in loader for image in images]
    assert shown == [int(file.stem) for batch in range(2) for file in loader.files(batch)]
    before = train.fingerprint()
    assert data.build(_options(tmp_path), "detection", "train", seed=0, augment=False).fingerprint() == before
    _boxes(tmp_path, "train", iscrowd=0)  # the JSONs have other bytes
    assert data.build(_options(tmp_path), "detection", "train", seed=0, augment=False).fingerprint() != before


def test_the_list_of_a_tar_file_is_kept_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _boxes(tmp_path, "train", (2,))
    opened = data.build(_options(tmp_path, val=0.5), "detection", "train", seed=0, augment=False)
    assert (tmp_path / "train-000000.tar.index").is_file()
    packed._indexed.cache_clear()
    monkeypatch.setattr(tarfile, "open", lambda *_: pytest.fail("listed again"))
    again = data.build(_options(tmp_path, val=0.5), "detection", "train", seed=0, augment=False)
    assert torch.equal(opened[0][0], again[0][0])
    monkeypatch.undo()
    _boxes(tmp_path, "train", (4,))  # another file of the same name
    assert len(data.build(_options(tmp_path, val=0.5), "detection", "train", seed=0, augment=False)) == 2
    (tmp_path / "train-000000.tar.index").write_text("{")
    packed._indexed.cache_clear()
    assert len(data.build(_options(tmp_path, val=0.5), "detection", "val", seed=0, augment=False)) == 2


def test_objects_of_other_conventions(tmp_path: Path) -> None:
    columns = {"bbox": [[1, 2, 4, 6], [0, 0, 12, 8]], "category": ["dog", "cat"], "iscrowd": [0, 1], "area": [5, 6]}
    sample = {"a.jpg": _image(0, "JPEG"), "a.json": json.dumps({"objects": columns}).encode()}
    for split in ("train", "val"):
        _pack(tmp_path / split / "00000.tar", sample)
    options = _options(tmp_path, format="shards", box_format="xyxy")
    (_, target) = data.build(options, "detection", "val", seed=0, augment=False)[0]
    assert target["boxes"].tolist() == [[1, 2, 4, 6], [0, 0, 12, 8]]
    assert (target["labels"].tolist(), target["iscrowd"].tolist()) == ([2, 1], [0, 1])
    assert target["area"].tolist() == [5, 6]
    (_, target) = data.build(options, "detection", "train", seed=0, augment=False)[0]
    assert target["labels"].tolist() == [2]


@pytest.mark.parametrize(("size", "said"), [({}, 1), ({"width": HEIGHT, "height": WIDTH}, 0)])
def test_a_turned_image_is_told_where_no_size_is_beside_it(tmp_path: Path, size: dict[str, int], said: int) -> None:
    exif, stream = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6  # a quarter
    Image.new("RGB", (WIDTH, HEIGHT)).save(stream, "JPEG", exif=exif)
    content = json.dumps({"objects": [BOX], **size}).encode()
    _pack(tmp_path / "train.tar", {"a.jpg": stream.getvalue(), "a.json": content})
    split = data.build(_options(tmp_path, format="shards"), "detection", "train", seed=0, augment=False)
    assert sum("turned as their EXIF entry says" in each for each in data.check(split, "headers")) == said


@pytest.mark.parametrize(
    ("objects", "said"),
    [
        ([{"bbox": [1, 2, 3, 4], "category": 2}], "object 1: class 2 is none of the 2, 0 to 1"),
        ([{"bbox": [1, 2, 3, 4], "category": "cow"}], "object 1: there is no class 'cow'"),
        ([{"bbox": [1, 2, 3, 4]}], "object 1: it needs category, the name of a class or its number, not None"),
        ([BOX, {"bbox": [1, 2, 3], "category": 0}], r"object 2: it needs bbox, four numbers \(xywh\)"),
        ([BOX, {**BOX, "iscrowd": 2}], "object 2: iscrowd must be 0 or 1, not 2"),
        ([BOX, {"bbox": [12, 2, 3, 4], "category": 0}], "object 2: the box from .* lies outside 0000.png"),
        ({"bbox": [[1, 2, 3, 4]], "category": [0, 1]}, "its objects must be a list of mappings"),
        (3, "its objects must be a list of mappings"),
    ],
)
def test_what_is_no_object_is_named(tmp_path: Path, objects: Any, said: str) -> None:
    _boxes(tmp_path, "train", (1,), objects=objects)
    split = data.build(_options(tmp_path, train={"name": "train"}), "detection", "train", seed=0, augment=False)
    with pytest.raises(AcamkdError, match=rf"train-000000\.tar/0000\.png: {said}"):
        data.check(split, "headers")


@pytest.mark.parametrize(("image", "mask"), [("jpg", "png"), ("png", "mask.png"), ("jpg", "seg.png")])
def test_masks_of_shards(tmp_path: Path, image: str, mask: str) -> None:
    ids = np.zeros((HEIGHT, WIDTH), np.uint8)
    ids[0, 0], ids[1, 1] = 1, 9
    kind = "JPEG" if image == "jpg" else "PNG"
    for split in ("train", "val"):
        _pack(tmp_path / f"{split}-000000.tar", {f"a/1.{mask}": _png(ids), f"a/1.{image}": _image(0, kind)})
    options = _options(tmp_path, ignore_index=9)
    found = data.build(options, "segmentation", "val", seed=0, augment=False)
    assert data.check(found, "full") == []
    assert found[0][1]["mask"][:2, :2].tolist() == [[1, 0], [0, 255]]
    given = _options(tmp_path, mask_values={0: "dog", 1: "cat", 9: "dog"})
    assert data.build(given, "segmentation", "val", seed=0, augment=False)[0][1]["mask"][:2, :2].tolist() == [
        [0, 1],
        [1, 1],
    ]


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    def fails(said: str, task: Any = "detection", **more: Any) -> None:
        with pytest.raises(AcamkdError, match=said):
            data.check(
                data.build(_options(tmp_path, format="shards", **more), task, "train", seed=0, augment=False), "full"
            )

    fails(r"no file train\.tar, train-\*\.tar or train/\*\.tar in .*: there is no \*\.tar; name the split")
    fails(r"/train is no name of a split in data\.root .*, and no pattern of names", train={"name": "/train"})
    fails(r"tr\*\* is no name of a split", train={"name": "tr**"})
    _boxes(tmp_path, "val", (1,))
    fails(r"there are val-000000\.tar; name the split")
    tar = tmp_path / "train-000000.tar"
    _pack(tar, {"0.jpg": _image(0, "JPEG")})
    fails(r"train-000000\.tar/0\.jpg: the image has no file \.json beside it")
    fails(r"the image has no file \.mask\.png or \.seg\.png or \.png beside it", "segmentation")
    _pack(tar, {"0.txt": b""})
    fails(r"train-000000\.tar: the tar file holds no images")
    _pack(tar, {"0.png": _image(0), "0.json": b"[]"})
    fails(r"0\.json must be a mapping with `objects`")
    _pack(tar, {"0.png": _image(0), "0.json": b"{"})
    fails(r"0\.json is not valid JSON")
    _pack(tar, {"0.png": b"nothing", "0.json": b'{"objects": [], "width": 3, "height": 4}'})
    fails(r"train-000000\.tar/0\.png: the image cannot be read")
    whole = tar.read_bytes()
    tar.write_bytes(whole[:600])
    fails(r"train-000000\.tar is no whole tar file .*: unexpected end of data; copy it again")
    with tarfile.open(tar, "w:gz"):
        pass
    fails(r"is no whole tar file .*; copy it again, and pack a compressed one again without compression")
    tar.unlink()
    tar.mkdir()
    fails(rf"^cannot read {tar}: Is a directory$")


def test_links_and_dots_in_names_lose_no_image_silently(tmp_path: Path) -> None:
    _pack(tmp_path / "train-000000.tar", {"a.png": _image(1), "a.json": json.dumps({"objects": [BOX]}).encode(),
                                          "frame.0001.jpg": _image(2, "JPEG")})  # fmt: skip
    dataset = data.build(
        _options(tmp_path, format="shards", val={"name": "train"}), "detection", "val", seed=0, augment=False
    )
    (problem,) = dataset.problems
    assert "frame.0001.jpg: the key of an image ends at the first dot" in problem
    with tarfile.open(tmp_path / "train-000001.tar", "w") as content:
        entry = tarfile.TarInfo("b.png")
        entry.type, entry.linkname = tarfile.SYMTYPE, "a.png"
        content.addfile(entry)
    with pytest.raises(AcamkdError, match=r"000001\.tar holds b\.png as a link: pack it again"):
        packed.tar_members(tmp_path / "train-000001.tar")


def test_a_url_is_refused_with_advice() -> None:
    with pytest.raises(
        AcamkdError, match=r"data\.root s3:/bucket/shards: only folders that this machine sees are read"
    ):
        data.resolve(config.Data(root=Path("s3://bucket/shards")), "detection")


def test_unlabeled_images_may_lie_in_shards(tmp_path: Path) -> None:
    _pack(tmp_path / "more/0.tar", {"./1.png": _image(1), "./1.json": b"{}", "/a//2.png": _image(2)})
    images = UnlabeledImages(tmp_path / "more", "segmentation")
    assert [int(image[0, 0, 0]) for image, _ in images] == [1, 2]
    assert data.check(images, "full") == []
    _pack(tmp_path / "none/0.tar", {"1.txt": b""})
    with pytest.raises(AcamkdError, match="holds no images"):
        data.check(UnlabeledImages(tmp_path / "none", "segmentation"), "full")


def test_validation_images_drawn_from_shards(tmp_path: Path) -> None:
    _boxes(tmp_path, "train", (4, 4))
    train, val = (
        data.build(_options(tmp_path, val=0.25), "detection", s, seed=0, augment=False) for s in ("train", "val")
    )
    assert (len(train), len(val)) == (6, 2)
    assert train.groups is not None
    assert val.groups is not None
    assert [one + other for one, other in zip(train.groups, val.groups, strict=True)] == [4, 4]
    assert {file.parent.name for file in train.files} == {"train-000000.tar", "train-000001.tar"}


def test_the_order_keeps_few_shards_open() -> None:
    groups = [5, 0, 7, 3, 9, 4, 2, 6, 8]
    sampler = data.SeededSampler(sum(groups), seed=3, groups=groups)
    group_of = np.repeat(np.arange(len(groups)), groups)
    keys = list(sampler)
    assert sorted(keys) == list(range(sum(groups)))
    assert keys == list(sampler)
    first = [keys.index(key) for key in keys]
    assert first == list(range(len(keys)))
    shards = group_of[keys]
    for start, end in (
        (int(np.flatnonzero(shards == g)[0]), int(np.flatnonzero(shards == g)[-1])) for g in set(shards)
    ):
        assert len(set(shards[start : end + 1].tolist())) <= 4
    assert shards.tolist() != sorted(shards.tolist())
    sampler.set_epoch(1)
    later = list(sampler)
    assert sorted(later) == list(range(sum(groups), 2 * sum(groups)))
    assert [key - sum(groups) for key in later] != keys
    sampler.begin = (1, 10)
    assert list(sampler) == later[10:]
