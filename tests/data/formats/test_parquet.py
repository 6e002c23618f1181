from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from acamkd import config, data
from acamkd.errors import AcamkdError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

WIDTH, HEIGHT = 12, 8


def _image(number: int) -> dict[str, Any]:
    stream = io.BytesIO()
    Image.new("RGB", (WIDTH, HEIGHT), (number, 0, 0)).save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": f"{number}.png"}


def _mask(number: int) -> dict[str, Any]:
    stream = io.BytesIO()
    Image.fromarray(np.full((HEIGHT, WIDTH), number, np.uint8)).save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": None}


NAMES = {"names": ["cat", "dog"], "_type": "ClassLabel"}
BOXES = {"feature": {"dtype": "float32", "_type": "Value"}, "length": 4, "_type": "Sequence"}
OBJECTS: dict[str, Any] = {
    "sequence": {"feature": {"bbox": BOXES, "category": NAMES}, "_type": "Sequence"},
    "mapping": {"bbox": BOXES, "category": {"feature": NAMES, "_type": "Sequence"}},
    "list": {"feature": {"bbox": BOXES, "category": NAMES}, "_type": "List"},
    "old list": [{"bbox": BOXES, "category": NAMES}],
}
"""As several versions of `datasets` describe objects."""


def _write(file: Path, columns: dict[str, Any], features: dict[str, Any] | None = None, size: int = 2) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, file, row_group_size=size)
    return file


def _columns(count: int, *, as_list: bool = False, start: int = 0) -> dict[str, Any]:
    objects: list[Any] = [{"bbox": [[1.0, 2, 3, 4]], "category": [k % 2]} for k in range(count)]
    if as_list:
        objects = [[{"bbox": [1.0, 2, 3, 4], "category": k % 2}] for k in range(count)]
    return {"image": [_image(start + k) for k in range(count)], "objects": objects}


def _options(root: Path, **more: Any) -> config.Data:
    return config.Data.model_validate({"root": root, **more})


@pytest.mark.parametrize("kind", OBJECTS)
def test_boxes_and_class_names(tmp_path: Path, kind: str) -> None:
    features = {"image": {"_type": "Image"}, "objects": OBJECTS[kind]}
    as_list = "list" in kind
    _write(tmp_path / "data/train-00000-of-00002.parquet", _columns(3, as_list=as_list), features)
    _write(tmp_path / "data/train-00001-of-00002.parquet", _columns(1, as_list=as_list, start=3), features)
    _write(tmp_path / "data/validation-00000-of-00001.parquet", _columns(2, as_list=as_list, start=50), features)
    assert data.resolve(_options(tmp_path), "detection").format == "parquet"
    train, val = (data.build(_options(tmp_path), "detection", s, seed=0, augment=False) for s in ("train", "val"))
    assert train.classes == val.classes == ("cat", "dog")
    assert train.groups == [2, 1, 1]
    assert train.files[3] == tmp_path / "data/train-00001-of-00002.parquet/image/000000"
    assert [int(image[0, 0, 0]) for image, _ in train] == [0, 1, 2, 3]
    assert train[1][1]["boxes"].tolist() == [[1, 2, 4, 6]]
    assert [target["labels"].tolist() for _, target in train] == [[1], [2], [1], [1]]
    for split in (train, val):
        assert data.check(split, "full") == []
    assert data.compare_splits(train, val, _options(tmp_path)) == []
    assert train.fingerprint() != val.fingerprint()


def test_loading_processes_read_row_groups(tmp_path: Path) -> None:
    for split in ("train", "val"):
        _write(tmp_path / f"{split}.parquet", _columns(7), {"objects": OBJECTS["sequence"]})
    train = data.build(_options(tmp_path), "detection", "train", seed=0, augment=False)
    loader = data.loader(train, 2, 2, shuffle=True, seed=0)
    with data.reading(loader):
        shown = [int(image[0, 0, 0]) for images, _ in loader for image in images]
    assert shown == [int(file.name) for batch in range(3) for file in loader.files(batch)]


def test_columns_width_and_height_are_checked(tmp_path: Path) -> None:
    columns = {**_columns(2), "width": [WIDTH, 13], "height": [HEIGHT, HEIGHT]}
    _write(tmp_path / "train.parquet", columns, {"objects": OBJECTS["sequence"]})
    split = data.build(_options(tmp_path), "detection", "train", seed=0, augment=False)
    with pytest.raises(AcamkdError, match=r"image/000001 has 12 x 8 pixels, but .*objects/000001 says 13 x 8 pixels"):
        data.check(split, "headers")


def test_masks(tmp_path: Path) -> None:
    columns = {"pixel_values": [_image(k) for k in range(3)], "label": [_mask(k) for k in (0, 1, 2)]}
    _write(tmp_path / "train-00000-of-00001.parquet", columns)
    given = {"classes": ["sky", "road"], "val": {"name": "train"}, "ignore_index": 2}
    with pytest.raises(
        AcamkdError, match=r"which column is the image\? pixel_values and label could be it, of .*columns"
    ):
        data.build(_options(tmp_path, **given), "segmentation", "train", seed=0, augment=False)
    options = _options(tmp_path, **given, columns={"image": "pixel_values"})
    found = data.build(options, "segmentation", "train", seed=0, augment=False)
    assert [int(target["mask"][0, 0]) for _, target in found] == [0, 1, 255]
    assert data.check(found, "full") == ["1 of 3 masks hold nothing but void: nothing is learned from them"]
    wrong = _options(tmp_path, **given, columns={"image": "pixel_values", "mask": "masks"})
    with pytest.raises(AcamkdError, match=r"data\.columns\.mask: .* has no column masks, but pixel_values, label"):
        data.build(wrong, "segmentation", "train", seed=0, augment=False)
    with pytest.raises(AcamkdError, match=r"data\.classes is missing"):
        data.resolve(_options(tmp_path), "segmentation")


def test_what_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "train.parquet"

    def fails(said: str, **more: Any) -> None:
        with pytest.raises(AcamkdError, match=said):
            data.check(data.build(_options(tmp_path, **more), "detection", "train", seed=0, augment=False), "full")

    _write(file, _columns(2))
    fails(r"data\.classes is missing: .*train\.parquet has no ClassLabel in objects")
    with_names = {"objects": OBJECTS["sequence"]}
    _write(file, _columns(2), with_names)
    fails(r"data\.classes is dog, but the classes of .*train\.parquet are cat, dog", classes=["dog"])
    fails(r"no file val\.parquet, val-\*\.parquet or val/\*\.parquet in .*: there are train\.parquet",
          train={"name": "val"})  # fmt: skip
    _write(file, {**_columns(1), "image": [{"bytes": None, "path": "a.jpg"}]}, with_names)
    fails(r"train\.parquet/image/000000: the image cannot be read: the row holds no image in image, at most its path")
    _write(file, {"image": [_image(0)], "text": ["a"]})
    fails(r"which column is the objects\? no column has the type, of image, text; say so with data\.columns: \{objects")
    file.write_bytes(b"PAR1")
    fails(r"cannot read .*train\.parquet")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    fails(r"Parquet files need pyarrow: pip install 'acamkd\[parquet\]'")


def test_a_column_may_have_a_slash(tmp_path: Path) -> None:
    columns = _columns(2)
    renamed = {"image/encoded": columns["image"], "objects": columns["objects"]}
    _write(tmp_path / "train.parquet", renamed, {"objects": OBJECTS["mapping"]})
    read = data.build(
        _options(tmp_path, columns={"image": "image/encoded"}), "detection", "train", seed=0, augment=False
    )
    assert read[1][0][0].max() == 1
    assert len(read.fingerprint()) == 16
