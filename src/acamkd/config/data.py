"""Schema of a recipe's `data`: images, targets, and their augmentation. Imports no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

Size: TypeAlias = tuple[Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)]]
"""(height, width) in pixels."""

Positive: TypeAlias = Annotated[int, Field(gt=0, lt=2**31)]
Fraction: TypeAlias = Annotated[float, Field(ge=0, le=1)]
Deviation: TypeAlias = Annotated[float, Field(gt=0)]


def written_path(path: Path) -> Path:
    """Expand `~`, and use this system's slashes."""
    text = str(path)
    try:
        return Path(text if os.name == "nt" else text.replace("\\", "/")).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{error}: write the path without ~") from error


DataPath: TypeAlias = Annotated[Path, AfterValidator(written_path)]
"""Path of images or annotations: `~` is the home folder, and back-slashes count as slashes."""


def parse_mask_value(text: str) -> int | tuple[int, int, int]:
    """A gray level or index, `7`, or a color, `#ff8000` or `255, 128, 0`; ValueError if it is neither."""
    plain = text.strip(" []()")
    if found := re.fullmatch(r"#([0-9a-fA-F]{2})([0-9a-fA-F]{2})([0-9a-fA-F]{2})", plain):
        red, green, blue = (int(part, 16) for part in found.groups())
        return red, green, blue
    parts = [int(part) for part in plain.split(",")] if re.fullmatch(r"\d{1,3}(\s*,\s*\d{1,3})*", plain) else []
    if len(parts) not in (1, 3) or max(parts) > 255:
        raise ValueError(
            f'{text} is no value of a mask: give a number from 0 to 255, or a color as "#ff8000" or "255, 128, 0", in '
            "quotes"
        )
    return parts[0] if len(parts) == 1 else (parts[0], parts[1], parts[2])


class Section(BaseModel):
    """A mapping in a recipe; unknown keys and infinite numbers are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    READ_BY: ClassVar[Mapping[str, str]] = {}
    """Keys that are read under one `name` alone, and which."""

    @model_validator(mode="after")
    def _check_read(self) -> Section:
        given, fields = dict(self), type(self).model_fields
        for key, name in self.READ_BY.items():
            if name != given["name"] and given[key] != fields[key].default:
                raise ValueError(f"{given['name']} has no {key}: leave it out, or set name: {name}, which reads it")
        return self


class Split(Section):
    """Location of one split: by `name`, in the format's own layout, or by `images`, with paths below `data.root`.

    Validation can also be a `share` of the training images.
    """

    name: str | None = None
    """Such as `val`, `trainval` (VOC) or `train2017` (COCO). Formats parquet and shards: the files NAME-*, or those in
    the folder NAME."""
    images: DataPath | None = None
    """Folder of images, including the folders below it. Format yolo: also a text file that lists images."""
    masks: DataPath | None = None
    """Format masks: folder of masks, one per image, of the same name."""
    annotations: DataPath | None = None
    """Format coco: the JSON file, unless it is the one of this `name`. Formats yolo and voc: folder of text or XML
    files, unless it is beside `images`."""
    share: Annotated[float, Field(gt=0, lt=1)] | None = None
    """`data.val` only: this share of the training images validates and does not train. Drawn by the images' names and
    `seed`, so that every run draws the same ones; no file is moved. `val: 0.2` says the same."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the draw."""

    @model_validator(mode="after")
    def _check(self) -> Split:
        if sum(each is not None for each in (self.name, self.images, self.share)) != 1:
            raise ValueError(
                "give either the split's `name` in the format's own layout, or its `images`, or for `val` a `share`"
            )
        if self.share is not None and (self.masks or self.annotations):
            raise ValueError("a `share` of the training images takes their masks and annotations: leave both out")
        return self


class Augmentation(Section):
    """Random augmentation of the training images, in their own pixels, before `data.resize`."""

    scale: tuple[float, float] | None = None
    """Range of a random factor for both sides, drawn uniformly."""
    crop: Size | None = None
    """(height, width) of a random crop; smaller images are padded."""
    flip: Fraction = 0.5
    """Probability of a horizontal flip."""
    photometric: bool = False
    """Random brightness, contrast, saturation and hue."""

    @model_validator(mode="after")
    def _check(self) -> Augmentation:
        if self.scale is not None and not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale must be a range of factors above 0, such as [0.5, 2], not {list(self.scale)}")
        return self


class ShortLong(Section):
    """Resize so that the short side has `short` pixels, unless the long side would pass `long`."""

    short: Positive
    long: Positive


class Data(Section):
    """Images and targets."""

    format: str = "auto"
    """`coco`: images and a COCO JSON, for masks by its outlines. `yolo`: images and text files. `voc`: Pascal VOC,
    boxes or masks. `masks`: images and 8-bit masks. `cityscapes`. `parquet`: rows of a Hugging Face data set.
    `shards`: tar files as of WebDataset. `images`: images without labels, for `pretrain` alone.
    `package.module:Class`: a reader of your own. `auto`: by what lies in `root`."""
    root: DataPath = Path()
    """Folder of the data; the splits' paths are relative to it."""
    train: Split = Split(name="train")
    val: Split = Split(name="val")
    test: Split | None = None
    """Images that no training and no choice sees: `run`, `compare` and `evaluate --split test` score on them."""
    classes: tuple[str, ...] | None = None
    """Class names in the order of their ids. Needed for masks and shards; the other formats bring their own."""
    ignore_index: Annotated[int, Field(ge=0, le=255)] = 255
    """Formats masks, voc, parquet and shards: mask value that is ignored in training and evaluation."""
    mask_values: dict[str, str | int | None] | None = None
    """Formats masks, voc, parquet and shards: class, by name or number, of each value of the masks, where value k is
    not class k: `{0: background, 255: crack}`. Or of each color: `{"#ff0000": road, "0, 0, 255": car}`. `void` is
    ignored in training and evaluation."""
    uncovered: Literal["background", "void"] = "background"
    """Format coco for segmentation: what pixels without an outline are: a class of their own, or `void`, which is
    ignored in training and evaluation."""
    columns: dict[Literal["image", "objects", "mask"], str] | None = None
    """Format parquet: which columns hold these, where their names and types do not tell."""
    box_format: Literal["xywh", "xyxy"] = "xywh"
    """Formats parquet and shards: a box is left, top, width, height, or left, top, right, bottom, in pixels."""
    unlabeled: DataPath | None = None
    """Folder of further images, or of tar files of images, relative to `root`, without targets. `distill` uses them:
    each batch has as many of them as labeled images. `pretrain` learns from them alone."""
    resize: Size | ShortLong | None = None
    """Input size of the networks: (height, width), or {short, long}; nothing = the images' own size."""
    augment: Augmentation = Augmentation()
    workers: Annotated[int, Field(ge=0)] = 2
    """Processes that load images."""
    decode: Literal["full", "reduced"] = "full"
    """Training images: all pixels (full), or JPEGs at 1/2, 1/4 or 1/8 of their size, no smaller than `resize` needs
    (reduced). That is faster for photographs, and changes the pixels slightly."""
    cache: Literal["ram", "disk"] | None = None
    """Keep the training's decoded images and masks, whose pixels are the same: in the memory of each process that loads
    images (ram), or in runs/NAME/cache for later trainings, too (disk); nothing = decode them each time."""
    check: Literal["full", "headers"] = "full"
    """Before training, decode every image (full) or only read its header (headers)."""

    @property
    def splits(self) -> dict[str, Split]:
        """The splits that it names, by their keys."""
        named = {"train": self.train, "val": self.val, "test": self.test}
        return {name: split for name, split in named.items() if split is not None}

    @field_validator("val", mode="before")
    @classmethod
    def _share(cls, given: Any) -> Any:
        is_number = isinstance(given, (int, float)) and not isinstance(given, bool)
        return {"share": float(given)} if is_number else given

    @field_validator("mask_values", mode="before")
    @classmethod
    def _text_keys(cls, given: Any) -> Any:
        return {str(key): value for key, value in given.items()} if isinstance(given, dict) else given

    @field_validator("mask_values")
    @classmethod
    def _check_values(cls, given: dict[str, Any] | None) -> dict[str, Any] | None:
        parsed = [parse_mask_value(value) for value in given or ()]
        if len({type(value) for value in parsed}) > 1:
            raise ValueError("give values or colors, not both")
        if len(set(parsed)) < len(parsed):
            raise ValueError(f"{', '.join(given or ())} has one value twice")
        return given

    @model_validator(mode="after")
    def _check(self) -> Data:
        for name, split in self.splits.items():
            if name != "val" and split.share is not None:
                raise ValueError(f"{name}.share: only `val` can be a share, of the training images")
        if self.decode == "reduced" and (self.resize is None or self.augment.crop is not None):
            raise ValueError(
                "decode: reduced needs `resize`, and no `augment.crop`, whose size is in the images' own pixels"
            )
        colors = [value for value in self.mask_values or () if isinstance(parse_mask_value(value), tuple)]
        if colors and self.ignore_index != type(self).model_fields["ignore_index"].default:
            raise ValueError("ignore_index is no color: say in mask_values which color is `void`")
        return self
