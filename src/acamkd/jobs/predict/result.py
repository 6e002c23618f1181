"""The predictions that a run of `predict` left behind, in the forms that other tools read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from rich.text import Text

from acamkd.engine.printing import Printable
from acamkd.errors import AcamkdError
from acamkd.jobs.predict.sinks import LINES, whole
from acamkd.report.visualize import is_background

if TYPE_CHECKING:
    from supervision import Detections


@dataclass(frozen=True)
class Predictions(Printable):
    """Summary of a prediction run, and its predictions.

    Attributes:
        folder: Output folder.
        count: Number of images or frames.
        unit: `image` or `frame`.
        per_second: Images or frames per second, including reading, drawing and writing.
        network_per_second: The same of resizing, network and decoding alone.
        dropped: Frames of a live source that came while the network was busy.
        classes: Class names.
    """

    folder: Path
    count: int
    unit: str
    per_second: float
    network_per_second: float
    dropped: int
    classes: tuple[str, ...]

    def __rich__(self) -> Text:
        plural = "" if self.count == 1 else "s"
        dropped = f", {self.dropped} dropped" if self.dropped else ""
        rate = f"{self.per_second:.1f} per second (the network alone: {self.network_per_second:.1f})"
        return Text(f"{self.count} {self.unit}{plural}{dropped}, {rate}, in {self.folder}")

    def lines(self) -> Iterator[dict[str, Any]]:
        """Every line of `predictions.jsonl`; raises AcamkdError if it was not written."""
        try:
            with (self.folder / LINES).open(encoding="utf-8") as file:
                for line in file:
                    yield json.loads(line)
        except OSError as error:
            raise AcamkdError(
                f"cannot read {self.folder / LINES}: {error.strerror}; predict writes it unless `write` leaves out json"
            ) from error

    def to_supervision(self) -> list[Detections]:
        """One `supervision.Detections` per image or frame, in order.

        `class_id` is the index in `classes`, and `data["class_name"]` its name. `metadata` has the rest of the line,
        such as `file_name`. A segmenter's have one entry per class in the image, with its mask, and no confidence. The
        background has none.

        Raises:
            AcamkdError: supervision is missing, or a file of the predictions.
        """
        try:
            import supervision
        except ImportError as error:
            raise AcamkdError("supervision is not installed: pip install 'acamkd[supervision]'") from error
        found = []
        for line in self.lines():
            objects = line.pop("objects", None)
            arrays = self._of_mask(line) if objects is None else self._of_objects(objects)
            names = np.array([self.classes[label] for label in arrays["class_id"]], dtype=str)
            found.append(supervision.Detections(**arrays, data={"class_name": names}, metadata=line))
        return found

    def to_coco(self, out: Path | str, annotations: Path | str | None = None) -> Path:
        """Write a detector's predictions as a results file for COCO's tools.

        Its ids are those of the annotations: images by `file_name`, or by its last part if that is unique, and
        categories by name. Without annotations, categories count from 1 in the recipe's order. Images then have the
        number that their name is, as COCO's do, or their name; frames have their number.

        COCO's mAP needs the boxes with low scores, too: predict with `score=0`.

        Args:
            out: JSON file to write.
            annotations: COCO JSON of the same images.

        Raises:
            AcamkdError: The predictions are masks, or the annotations lack an image or a class.
        """
        categories, images = (None, None) if annotations is None else _ids(Path(annotations).expanduser())
        entries, lines = [], list(self.lines())
        if not all("objects" in line for line in lines):
            raise AcamkdError("COCO's results are of boxes: a segmenter's are in the folder masks")
        if images is None:
            numbers = _own_ids(lines)
        else:
            numbers = [_image_id(line["file_name"], images, annotations) for line in lines]
            number, count = next(iter(Counter(numbers).most_common(1)), (None, 0))
            if count > 1:
                both = " and ".join(
                    line["file_name"] for line, other in zip(lines, numbers, strict=True) if other == number
                )
                raise AcamkdError(f"{annotations} has one image for {both} (id {number}): predict on its own images")
        for line, image in zip(lines, numbers, strict=True):
            for each in line["objects"]:
                name, category = each["category_name"], each["category_id"]
                if categories is not None:
                    if name not in categories:
                        raise AcamkdError(f"{annotations} has no category {name}, only {', '.join(categories)}")
                    category = categories[name]
                entries.append(
                    {"image_id": image, "category_id": category, "bbox": each["bbox"], "score": each["score"]}
                )
        out = Path(out).expanduser()
        with whole(out) as unfinished:
            unfinished.write_text(json.dumps(entries), encoding="utf-8")
        return out

    def _of_objects(self, objects: list[dict[str, Any]]) -> dict[str, Any]:
        boxes = np.array([each["bbox"] for each in objects], np.float32).reshape(-1, 4)
        return {
            "xyxy": np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1),
            "confidence": np.array([each["score"] for each in objects], np.float32),
            "class_id": np.array([each["category_id"] - 1 for each in objects], int),
        }

    def _of_mask(self, line: dict[str, Any]) -> dict[str, Any]:
        if "mask" not in line:
            raise AcamkdError("the masks were not written: predict writes them unless `write` leaves out masks")
        with Image.open(self.folder / line["mask"]) as image:
            mask = np.array(image)
        labels = [label for label in np.unique(mask).tolist() if not is_background(self.classes[label])]
        masks = np.array([mask == label for label in labels], bool).reshape(-1, *mask.shape)
        return {"xyxy": _extents(masks), "mask": masks, "class_id": np.array(labels, int)}


def _extents(masks: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Box around each mask, (K, H, W) -> (K, 4): x1 y1 x2 y2."""
    found = np.empty((len(masks), 4), np.float32)
    for index, mask in enumerate(masks):
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        found[index] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return found


def _ids(annotations: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Category name -> id, and image name -> id; a name's last part is a key, too, if it is unique."""
    try:
        content = json.loads(annotations.read_bytes())
        categories = {each["name"]: each["id"] for each in content["categories"]}
        images = {each["file_name"]: each["id"] for each in content["images"]}
    except OSError as error:
        raise AcamkdError(f"cannot read the annotations {annotations}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise AcamkdError(f"{annotations} is not a COCO file: it needs the lists images and categories") from error
    ends: dict[str, list[Any]] = {}
    for name, number in images.items():
        ends.setdefault(PurePosixPath(name).name, []).append(number)
    return categories, {**{name: found[0] for name, found in ends.items() if len(found) == 1}, **images}


def _image_id(name: str, images: Mapping[str, Any], annotations: Path | str | None) -> Any:
    for each in (name, PurePosixPath(name).name):
        if each in images:
            return images[each]
    raise AcamkdError(f"{annotations} lists no image {name}: predict on its own images")


def _own_ids(lines: Sequence[Mapping[str, Any]]) -> list[int | str]:
    """Ids of images without annotations: a frame's number, or that in a file's name if no two have the same."""
    if any("frame" in line for line in lines):
        return [line["frame"] for line in lines]
    names = [str(line["file_name"]) for line in lines]
    stems = [PurePosixPath(name).stem for name in names]
    own: list[int | str] = [int(stem) if stem.isdecimal() else name for stem, name in zip(stems, names, strict=True)]
    return own if len(set(own)) == len(own) else list(names)
