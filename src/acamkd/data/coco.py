"""Pictures with boxes in one COCO JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torchvision import tv_tensors

from acamkd.data.base import PictureDataset, Transform, describe
from acamkd.errors import AcamkdError
from acamkd.models.base import PixelSize, Target

Entry: TypeAlias = Mapping[str, Any]


class CocoDetection(PictureDataset):
    """Object detection in COCO's format; categories in the order of their ids become the labels 1..K.

    Boxes that reach beyond the picture are clipped to it, with a warning.

    Args:
        images: Folder that the JSON's `file_name` entries are relative to.
        annotations: The JSON: `images` (id, file_name, width, height), `annotations` (image_id, category_id, bbox
            [x, y, width, height], iscrowd) and `categories` (id, name).
        classes: Names that the file must list; None takes the file's own.
        keep_crowd: Keep the boxes around crowds. Evaluation needs them, since it forgives what a network finds in one;
            training does without, since such a box would teach that a group is one large object.
        transform: Random changes.
        seed: Of the random changes.

    Raises:
        AcamkdError: The file cannot be read, is not a COCO JSON, or lists other classes.
    """

    def __init__(
        self,
        images: Path,
        annotations: Path,
        *,
        classes: Sequence[str] | None = None,
        keep_crowd: bool = True,
        transform: Transform | None = None,
        seed: int = 0,
    ) -> None:
        content = _read(annotations)
        categories = sorted(content["categories"], key=lambda category: category["id"])
        names = tuple(category["name"] for category in categories)
        if classes is not None and names != tuple(classes):
            raise AcamkdError(
                f"data.classes is {', '.join(classes)}, but the categories of {annotations} are {', '.join(names)}: "
                "leave data.classes out, or list these"
            )
        files = [images / image["file_name"] for image in content["images"]]
        super().__init__(files, [annotations], names, transform=transform, seed=seed)
        self.sizes = [(image["height"], image["width"]) for image in content["images"]]
        self._index_of = {image["id"]: index for index, image in enumerate(content["images"])}
        self._label_of = {category["id"]: label for label, category in enumerate(categories, start=1)}
        for what, ids in (("images", self._index_of), ("categories", self._label_of)):
            if not ids:
                self.problems.append(f"{annotations}: the list of {what} is empty")
            elif len(ids) < len(content[what]):
                self.problems.append(f"{annotations}: {len(content[what]) - len(ids)} {what} share an id with another")
        if not content["annotations"]:
            self.problems.append(f"{annotations}: the list of annotations is empty")
        self._gather(content["annotations"], keep_crowd)

    def target(self, index: int, size: PixelSize) -> Target:
        """`boxes` (K, 4) float32 x1 y1 x2 y2, `labels` (K,) and `iscrowd` (K,) int64."""
        rows = slice(self._first[index], self._first[index + 1])
        return {
            # A copy: a transform that works in place must not reach the table.
            "boxes": tv_tensors.BoundingBoxes(self._boxes[rows].clone(), format="XYXY", canvas_size=size),
            "labels": self._labels[rows].clone(),
            "iscrowd": self._iscrowd[rows].clone(),
        }

    def inspect(self, index: int, size: PixelSize, *, decode: bool) -> list[str]:
        """The picture must have the size that the JSON says."""
        if size == self.sizes[index]:
            return []
        return [
            f"{self.files[index]} has {describe(size)} (rotated as its EXIF entry says), but "
            f"{self.annotation_files[0]} says {describe(self.sizes[index])}"
        ]

    def _gather(self, annotations: Sequence[Entry], keep_crowd: bool) -> None:
        """Turn the annotations into one table sorted by picture: few large tensors, which worker processes share."""
        rows: list[tuple[int, int, int, list[float]]] = []
        clipped = 0
        for annotation in annotations:
            try:
                index, label, given = self._parse(annotation)
                box = self._clip(given, index)
            except AcamkdError as error:
                name = f"annotation {annotation.get('id')} of image {annotation.get('image_id')}"
                self.problems.append(f"{self.annotation_files[0]}: {name}: {error}")
                continue
            clipped += box != given
            crowd = int(annotation.get("iscrowd", 0))
            if keep_crowd or not crowd:
                rows.append((index, label, crowd, box))
        rows.sort(key=lambda row: row[0])
        counts = torch.bincount(torch.tensor([row[0] for row in rows], dtype=torch.int64), minlength=len(self))
        self._first: list[int] = [0, *counts.cumsum(0).tolist()]
        self._labels = torch.tensor([row[1] for row in rows], dtype=torch.int64)
        self._iscrowd = torch.tensor([row[2] for row in rows], dtype=torch.int64)
        self._boxes = torch.tensor([row[3] for row in rows], dtype=torch.float32).reshape(-1, 4)
        if clipped:
            self.warnings.append(
                f"{self.annotation_files[0]}: {clipped} boxes reach beyond their picture and are clipped"
            )
        if empty := int((counts == 0).sum()):
            self.warnings.append(f"{self.annotation_files[0]}: {empty} of {len(self)} pictures have no boxes")

    def _parse(self, annotation: Entry) -> tuple[int, int, list[float]]:
        """Index of the picture, label, and box as x1 y1 x2 y2; raises AcamkdError with what is wrong."""
        try:
            image, category = annotation["image_id"], annotation["category_id"]
            x, y, width, height = (float(value) for value in annotation["bbox"])
        except (KeyError, TypeError, ValueError) as error:
            raise AcamkdError("it needs image_id, category_id and bbox [x, y, width, height]") from error
        if image not in self._index_of:
            raise AcamkdError(f"the file lists no image {image}")
        if category not in self._label_of:
            raise AcamkdError(f"the file lists no category {category}, only {', '.join(map(str, self._label_of))}")
        index = self._index_of[image]
        if not (width > 0 and height > 0):
            raise AcamkdError(f"the box {annotation['bbox']} on {self.files[index].name} has no area")
        return index, self._label_of[category], [x, y, x + width, y + height]

    def _clip(self, box: list[float], index: int) -> list[float]:
        height, width = self.sizes[index]
        x1, y1, x2, y2 = max(box[0], 0.0), max(box[1], 0.0), min(box[2], float(width)), min(box[3], float(height))
        if not (x1 < x2 and y1 < y2):
            where = f"{self.files[index].name}, which has {describe(self.sizes[index])}"
            raise AcamkdError(f"the box from ({box[0]:g}, {box[1]:g}) to ({box[2]:g}, {box[3]:g}) lies outside {where}")
        return [x1, y1, x2, y2]


def _read(annotations: Path) -> dict[str, Any]:
    """The JSON, once every entry of its lists has the keys that are needed."""
    needed = {"images": ("id", "file_name", "width", "height"), "annotations": (), "categories": ("id", "name")}
    try:
        content = json.loads(annotations.read_bytes())
    except OSError as error:
        raise AcamkdError(f"cannot read the annotations {annotations}: {error.strerror}") from error
    except ValueError as error:
        raise AcamkdError(f"{annotations} is not valid JSON: {error}") from error
    for what, keys in needed.items():
        if not isinstance(content, dict) or not isinstance(content.get(what), list):
            raise AcamkdError(f"{annotations} is not a COCO file: it needs the lists {', '.join(needed)}")
        for number, entry in enumerate(content[what]):
            missing = [key for key in keys if key not in entry] if isinstance(entry, dict) else ["{...}"]
            if missing:
                raise AcamkdError(f"{annotations}: {what}[{number}] has no {', '.join(missing)}")
    result: dict[str, Any] = content
    return result
