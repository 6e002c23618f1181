"""Parquet files as the library `datasets` of Hugging Face writes them: a row per image, with its objects or mask."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

from acamkd.config import Data
from acamkd.data.checks import check_classes
from acamkd.data.dataset import SplitName, Transform
from acamkd.data.formats.masks import MaskDataset, mask_ids
from acamkd.data.formats.objects import BOXES, CATEGORIES, ObjectDataset, size_in, split_files
from acamkd.data.packed import cell_path, group_lengths, parquet_file
from acamkd.errors import AcamkdError

Role: TypeAlias = Literal["image", "objects", "mask"]

LARGE_GROUP = 2**30
"""Bytes of a row group from which on a warning says how to make them smaller."""


class ParquetFiles:
    """The rows of one split, of which only the columns that are asked for are read.

    Args:
        data: A recipe's `data`.
        split: Which split.

    Raises:
        AcamkdError: pyarrow is not installed, there is no such file, or one of them cannot be read.

    Attributes:
        paths: The files.
        groups: Rows of each row group, over all files.
        warnings: As in ImageDataset.
    """

    def __init__(self, data: Data, split: SplitName) -> None:
        self.paths = split_files(data.root, getattr(data, split).name or split, ".parquet")
        self._opened = [parquet_file(path) for path in self.paths]
        self._schema = self._opened[0].schema_arrow
        self._given: Mapping[Role, str] = data.columns or {}
        lengths = [group_lengths(each) for each in self._opened]
        self._rows = [sum(each) for each in lengths]
        self.groups = [length for each in lengths for length in each]
        self.warnings: list[str] = []
        sizes = [each.metadata.row_group(k).total_byte_size for each in self._opened
                 for k in range(each.metadata.num_row_groups)]  # fmt: skip
        if max(sizes, default=0) > LARGE_GROUP:
            self.warnings.append(
                f"{self.paths[0].parent}: a row group has {max(sizes) / 2**30:.1f} GiB, and a loading process keeps "
                "several: write the files again with pyarrow.parquet.write_table(..., row_group_size=100)"
            )

    def cells(self, column: str) -> list[Path]:
        """The path of each row's cell in a column."""
        return [
            cell_path(path, column, row)
            for path, rows in zip(self.paths, self._rows, strict=True)
            for row in range(rows)
        ]

    def rows(self, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Those columns that are there, row by row."""
        there = [name for name in columns if name in self._schema.names]
        for each in self._opened:
            for batch in each.iter_batches(columns=there, use_threads=False):
                yield from batch.to_pylist()

    def column(self, role: Role) -> str:
        """The column of images, objects or masks.

        Raises:
            AcamkdError: The names and types do not tell, or `data.columns` names one that is not there.
        """
        names: list[str] = self._schema.names
        if (given := self._given.get(role)) is not None:
            if given not in names:
                raise AcamkdError(f"data.columns.{role}: {self.paths[0]} has no column {given}, but {', '.join(names)}")
            return given
        if role == "objects":
            fitting = [name for name in names if set(_fields(self._schema.field(name).type)) & set(BOXES)]
        else:
            fitting = [name for name in names if self._holds_images(name) and name not in self._given.values()]
            if "image" in fitting:
                fitting = ["image"] if role == "image" else [name for name in fitting if name != "image"]
        if len(fitting) != 1:
            found = f"{' and '.join(fitting)} could be it" if fitting else "no column has the type"
            raise AcamkdError(
                f"{self.paths[0]}: which column is the {role}? {found}, of {', '.join(names)}; say so with "
                f"data.columns: {{{role}: NAME}}"
            )
        return fitting[0]

    def class_names(self, column: str) -> tuple[str, ...] | None:
        """Names of the classes of a column of objects, where the data set says them (ClassLabel)."""
        stored = (self._schema.metadata or {}).get(b"huggingface")
        features = json.loads(stored)["info"]["features"] if stored else {}
        return _names_in(features.get(column))

    def _holds_images(self, name: str) -> bool:
        kind = self._schema.field(name).type
        return str(kind) in ("binary", "large_binary") or "bytes" in _fields(kind)


class ParquetDetection(ObjectDataset):
    """Object detection: a column of images, and one of objects with `bbox` and `category`; see ObjectDataset.

    Class names are those of the data set's ClassLabel. Columns `width` and `height`, where they are there, spare
    reading every image's header at the start.
    """

    SPARE_LAYOUT = ("*.parquet or data/*.parquet",)
    DATA_KEYS = frozenset({"box_format", "columns"})

    @classmethod
    def open_split(cls, data: Data, split: SplitName, *, transform: Transform | None, seed: int) -> ParquetDetection:
        """Open one split of a recipe's `data`."""
        files = ParquetFiles(data, split)
        images, objects = files.cells(files.column("image")), files.column("objects")
        rows = list(files.rows([objects, "width", "height"]))
        names = files.class_names(objects)
        if names is None and data.classes is None:
            raise AcamkdError(
                f"data.classes is missing: {files.paths[0]} has no ClassLabel in {objects}, which would say the names"
            )
        if names is not None:
            check_classes(data.classes, names, f"the classes of {files.paths[0]}")
        reader = cls(
            images, files.cells(objects), names or data.classes or (), [row[objects] for row in rows],
            box_format=data.box_format, source=files.paths[0].parent,
            sizes=[size_in(row) for row in rows], keep_crowd=split == "val", transform=transform, seed=seed,
        )  # fmt: skip
        reader.groups = files.groups
        reader.warnings += files.warnings
        return reader


class ParquetSegmentation(MaskDataset):
    """Semantic segmentation: a column of images and one of masks, whose values are class ids."""

    SPARE_LAYOUT = ("*.parquet or data/*.parquet",)
    DATA_KEYS = frozenset({"ignore_index", "mask_values", "columns"})
    NEEDS_CLASSES = True

    @classmethod
    def open_split(cls, data: Data, split: SplitName, *, transform: Transform | None, seed: int) -> ParquetSegmentation:
        """Open one split of a recipe's `data`."""
        files, classes = ParquetFiles(data, split), data.classes or ()
        ids = mask_ids(data, classes)
        reader = cls(
            files.cells(files.column("image")), files.cells(files.column("mask")), classes,
            ignore_index=data.ignore_index, ids=ids, same_palette=ids is None, transform=transform, seed=seed,
        )  # fmt: skip
        reader.groups = files.groups
        reader.warnings += files.warnings
        return reader


def _fields(kind: Any) -> list[str]:
    """Names in a struct, or in a list of structs."""
    inner = kind.value_type if "list" in str(kind).partition("<")[0] else kind
    return [inner.field(k).name for k in range(inner.num_fields)] if str(inner).startswith("struct") else []


def _names_in(feature: Any) -> tuple[str, ...] | None:
    """The names of the ClassLabel in a feature, as `datasets` writes it: nested in lists, sequences and mappings."""
    if isinstance(feature, list):
        return _names_in(feature[0]) if feature else None
    if not isinstance(feature, dict):
        return None
    if feature.get("_type") == "ClassLabel" and feature.get("names"):
        return tuple(feature["names"])
    inner = [feature.get(name) for name in ("feature", *CATEGORIES)]
    return next((found for each in inner if (found := _names_in(each))), None)
