"""Run a network that `acamkd export` wrote, with onnxruntime and NumPy alone; files of images need Pillow.

This file does not need acamkd. Every export contains a copy of it:

    model = OnnxModel("student.onnx")
    found = model.predict(read_image("cell.jpg"))
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from PIL import Image

try:
    from acamkd.errors import AcamkdError as AcamkdError
except ImportError:  # beside an exported network, without acamkd
    AcamkdError = ValueError  # type: ignore[assignment,misc]

Pixels: TypeAlias = npt.NDArray[np.uint8]
"""(H, W, 3), RGB."""

Floats: TypeAlias = npt.NDArray[np.float32]

Prediction: TypeAlias = dict[str, npt.NDArray[Any]]
"""Prediction for one image, in the image's own pixels. Detection: `boxes` (K, 4) x1 y1 x2 y2, `scores` (K,), best
first, and `labels` (K,) from 1. Segmentation: `mask` (H, W) int64."""

STRIDE = 32
"""Inputs are padded to multiples of this many pixels."""

METADATA = ("acamkd_version", "task", "classes", "resize", "mean", "nms")
"""Metadata entries that the export writes, each as JSON."""

MISSING = "ONNX files need onnxruntime: pip install onnxruntime"

PREPARATION = "preparation"
"""Metadata entry of networks that prepare their images in a way of their own: `resize`, `multiple` and `kernel`."""


class ExportedModel(ABC):
    """An exported network that predicts on images, in any runtime.

    The graph takes `pixels` (N, 3, H, W), RGB in [0, 1], and normalizes them itself. A segmenter gives `logits`
    (N, K, H, W). A dense detector gives `scores` (N, A, K + 1), with the background in column 0, `boxes` (N, A, 4) as
    x1 y1 x2 y2 in pixels of the padded input, and `levels` (A,), each anchor's pyramid level. A detector exported with
    its non-maximum suppression takes one image and gives its `boxes` (K, 4), `scores` (K,) and `labels` (K,). A query
    detector gives the same with a first dimension N.

    Args:
        metadata: Entries that the export wrote into the file; acamkd's guide to exports lists them.

    Attributes:
        metadata: These entries.
        task: `detection` or `segmentation`.
        classes: Class names. A mask holds their indices; a box with label k has the class `classes[k - 1]`.
        input_size: (height, width) of the only input that the graph takes; None where they are free, or not known.
    """

    input_size: tuple[int, int] | None = None

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self.metadata = metadata
        self.task: str = metadata["task"]
        self.classes: tuple[str, ...] = tuple(metadata["classes"])
        # As in training: torchvision's detectors shrink images without antialiasing.
        kernel = "plain" if self.task == "detection" else "smooth"
        usual = {"resize": metadata["resize"], "multiple": STRIDE, "kernel": kernel}
        self.preparation: Mapping[str, Any] = metadata.get(PREPARATION, usual)

    @property
    def takes_batches(self) -> bool:
        """Not where suppression is a part of the graph."""
        return self.task == "segmentation" or self.metadata["nms"] is not None or PREPARATION in self.metadata

    @abstractmethod
    def run(self, pixels: Floats) -> dict[str, npt.NDArray[Any]]:
        """The graph's outputs by name."""

    def predict(self, image: Pixels) -> Prediction:
        """Predictions of one image, (H, W, 3) uint8 RGB."""
        pixels, size = self.prepare(image)
        return self.decode(self.run(pixels), size, (image.shape[0], image.shape[1]))

    def prepare(self, image: Pixels) -> tuple[Floats, tuple[int, int]]:
        """Resize an image and pad it with the mean color, on the right and at the bottom.

        Returns:
            The graph's input (1, 3, H, W), and (height, width) of the image in it.

        Raises:
            AcamkdError: The graph takes inputs of another size alone.
        """
        rule, multiple, kernel = (self.preparation[name] for name in ("resize", "multiple", "kernel"))
        height, width = size = frame_size((image.shape[0], image.shape[1]), rule, self.task)
        filled = (math.ceil(height / multiple) * multiple, math.ceil(width / multiple) * multiple)
        if self.input_size is not None and self.input_size != filled:
            taken, given = ("{} x {}".format(*each) for each in (self.input_size, filled))
            raise AcamkdError(
                f"the graph takes inputs of {taken} pixels alone, and an image of {image.shape[0]} x {image.shape[1]} "
                f"becomes one of {given}: export with --set data.resize='{list(self.input_size)}', which resizes all "
                "images to this size, or take a graph of free size"
            )
        if kernel in ("bilinear", "bicubic"):
            image = resize_bytes(image, size, kernel)
        pixels: Floats = (image.transpose(2, 0, 1) / 255).astype(np.float32)
        pixels = resize_smoothly(pixels, size) if kernel == "smooth" else resize(pixels, size)
        frame = np.empty((1, 3, *filled), np.float32)
        frame[:] = np.reshape(self.metadata["mean"], (3, 1, 1))
        frame[0, :, :height, :width] = pixels
        return frame, size

    def decode(
        self,
        outputs: Mapping[str, npt.NDArray[Any]],
        size: tuple[int, int],
        original: tuple[int, int],
        index: int = 0,
    ) -> Prediction:
        """Turn the outputs for one image into predictions.

        Args:
            outputs: What `run` returned.
            size: (height, width) of the image within the padded input.
            original: (height, width) of the original image.
            index: Which image of the batch.
        """
        if self.task == "segmentation":
            logits = outputs["logits"][index, :, : size[0], : size[1]]
            return {"mask": best_classes(logits, original)}
        found = dict(outputs)
        if (settings := self.metadata["nms"]) is not None:
            found = detections(outputs["scores"][index], outputs["boxes"][index], outputs["levels"], size, settings)
        elif outputs["scores"].ndim == 2:
            found = {name: values[index] for name, values in outputs.items()}
        scale = np.array([original[1] / size[1], original[0] / size[0]], np.float32)
        return {**found, "boxes": found["boxes"] * np.tile(scale, 2)}


class OnnxModel(ExportedModel):
    """An exported network in onnxruntime.

    Args:
        file: The ONNX file.
        threads: Threads of onnxruntime; 0 = one per core.
        provider: onnxruntime's execution provider.

    Attributes:
        session: The session of onnxruntime.

    Raises:
        AcamkdError: The file cannot be read or was not written by `acamkd export`, or onnxruntime or its provider is
            missing. Without acamkd it is a ValueError.
    """

    def __init__(self, file: Path | str, *, threads: int = 0, provider: str = "CPUExecutionProvider") -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise AcamkdError(MISSING) from error
        if not Path(file).is_file():
            raise AcamkdError(f"{file}: there is no such file")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        try:
            self.session = onnxruntime.InferenceSession(file, options, providers=[provider])
        except Exception as error:  # onnxruntime has a separate exception class for each kind of damage
            raise AcamkdError(f"{file}: onnxruntime cannot read it: {error}") from error
        if provider not in self.session.get_providers():  # onnxruntime would silently use the processor
            raise AcamkdError(f"onnxruntime has no {provider} on this machine")
        super().__init__(read_metadata(self.session.get_modelmeta().custom_metadata_map, file))
        sides = self.session.get_inputs()[0].shape[2:]
        if all(isinstance(side, int) for side in sides):  # free ones have names
            self.input_size = (sides[0], sides[1])

    def run(self, pixels: Floats) -> dict[str, npt.NDArray[Any]]:
        """The graph's outputs by name."""
        names = [output.name for output in self.session.get_outputs()]
        return dict(zip(names, self.session.run(names, {"pixels": pixels}), strict=True))


def read_metadata(found: Mapping[str, str], file: Path | str) -> dict[str, Any]:
    """What the export wrote into a file; raises AcamkdError if there is nothing."""
    try:
        # Other tools, such as onnxruntime's quantization, add their own entries.
        return {name: json.loads(found[name]) for name in (*METADATA, PREPARATION) if name in METADATA or name in found}
    except (KeyError, ValueError) as error:
        raise AcamkdError(
            f"{file} was not written by acamkd export: it lacks the metadata on its input and output"
        ) from error


def detections(
    scores: Floats,
    boxes: Floats,
    levels: npt.NDArray[np.int64],
    size: tuple[int, int],
    settings: Mapping[str, Any],
) -> Prediction:
    """Turn the outputs of a dense detector for one image into detections, as torchvision does.

    Args:
        scores: (A, K + 1), column 0 for the background.
        boxes: (A, 4), x1 y1 x2 y2.
        levels: (A,), level of each anchor.
        size: (height, width) that the boxes are clipped to.
        settings: `score_threshold`, `candidates` (number kept per level, the best), `iou_threshold` and `detections`
            (largest number).

    Returns:
        `boxes`, `scores` and `labels`, best first.
    """
    rows, labels = np.nonzero(scores > settings["score_threshold"])
    order = np.argsort(-scores[rows, labels], kind="stable")
    level = levels[rows[order]]
    best = [np.flatnonzero(level == each)[: settings["candidates"]] for each in np.unique(level)]
    order = order[np.sort(np.concatenate(best))] if best else order
    rows, labels = rows[order], labels[order]
    clipped = boxes[rows].clip(0, np.array([size[1], size[0], size[1], size[0]], np.float32))
    kept = suppress(clipped, labels, settings["iou_threshold"], settings["detections"])
    kept = kept[labels[kept] > 0]  # only now, as in torchvision, where background boxes count among the candidates
    return {"boxes": clipped[kept], "scores": scores[rows[kept], labels[kept]], "labels": labels[kept]}


def suppress(boxes: Floats, labels: npt.NDArray[np.int64], threshold: float, limit: int) -> npt.NDArray[np.int64]:
    """Non-maximum suppression: drop each box that overlaps a better one of its class.

    Args:
        boxes: (K, 4), x1 y1 x2 y2, best first.
        labels: (K,).
        threshold: Intersection over union above which the box with the lower score is dropped.
        limit: Largest number of boxes to keep.

    Returns:
        Indices of the kept boxes, best first.
    """
    area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    alive = np.ones(len(boxes), dtype=bool)
    kept: list[int] = []
    for index, box in enumerate(boxes):
        if not alive[index]:
            continue
        kept.append(index)
        if len(kept) == limit:
            break
        sides = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])
        shared = sides.clip(0).prod(axis=1)
        alive &= (shared <= threshold * (area[index] + area - shared)) | (labels != labels[index])
    return np.array(kept, dtype=np.int64)


def frame_size(size: tuple[int, int], resize: Sequence[int] | Mapping[str, int] | None, task: str) -> tuple[int, int]:
    """(height, width) of an image after resizing; `resize` as in a recipe's `data`."""
    if resize is None:
        return size
    if not isinstance(resize, Mapping):
        return (resize[0], resize[1])
    scale = min(resize["short"] / min(size), resize["long"] / max(size))
    whole = math.floor if task == "detection" else round  # as in PyTorch
    return (max(1, whole(size[0] * scale)), max(1, whole(size[1] * scale)))


def resize(maps: Floats, size: tuple[int, int]) -> Floats:
    """Bilinear resizing without antialiasing, (C, H, W) -> (C, *size): torch's `interpolate(align_corners=False)`."""
    for axis in (2, 1):  # gathering along rows is the slow part, so it comes while there are few of them
        given, length = maps.shape[axis], size[axis - 1]
        if given == length:
            continue
        at = np.maximum((np.arange(length) + 0.5) * (given / length) - 0.5, 0)
        low = at.astype(np.int64)
        share = (at - low).astype(np.float32).reshape(-1, *(1,) * (2 - axis))
        lower, upper = (maps.take(np.minimum(index, given - 1), axis) for index in (low, low + 1))
        upper -= lower
        upper *= share
        upper += lower
        maps = upper
    return maps


def best_classes(scores: Floats, size: tuple[int, int]) -> npt.NDArray[np.int64]:
    """The best class of every pixel after resizing, (K, H, W) -> (*size); class by class, which fits into caches."""
    best, classes = resize(scores[:1], size)[0].copy(), np.zeros(size, np.int64)
    for index in range(1, len(scores)):
        each = resize(scores[index : index + 1], size)[0]
        np.putmask(classes, each > best, index)
        np.maximum(best, each, out=best)
    return classes


def resize_smoothly(maps: Floats, size: tuple[int, int]) -> Floats:
    """Bilinear resizing with antialiasing, (C, H, W) -> (C, *size): torch's with `antialias=True`."""
    if maps.shape[1:] == size:
        return maps
    from PIL import Image

    channels = (Image.fromarray(each).resize(size[::-1], Image.Resampling.BILINEAR) for each in maps)
    return np.stack([np.asarray(each) for each in channels])


def resize_bytes(image: Pixels, size: tuple[int, int], kernel: str) -> Pixels:
    """Resizing with antialiasing to whole numbers, (H, W, 3) -> (*size, 3), as image processors do."""
    if image.shape[:2] == size:
        return image
    from PIL import Image

    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling[kernel.upper()]))


TURNS = {
    2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE",
    8: "ROTATE_90",
}  # fmt: skip
"""EXIF orientation -> Pillow's transposition that makes the image upright; as acamkd.data.image_io does in training."""


def _orientation(image: Image.Image) -> Any:
    """The EXIF orientation; 1 if the EXIF block is damaged, as image viewers assume."""
    try:
        return image.getexif().get(274, 1)
    except Exception:  # parsing a damaged block may raise any error
        return 1


def read_image(file: Path | str) -> Pixels:
    """Decode an image of any 8-bit mode, rotated as its EXIF orientation says; raises AcamkdError if it cannot be."""
    try:
        from PIL import Image
    except ImportError as error:
        raise AcamkdError("files of images need Pillow: pip install pillow") from error
    try:
        with Image.open(file, formats=("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF")) as image:
            if image.mode[0] in "IF":  # Pillow would silently clip them to white
                raise ValueError(f"its pixels are of mode {image.mode}; save it with 8 bits per channel")
            image.load()
            turn = TURNS.get(_orientation(image))
            return np.array((image if turn is None else image.transpose(Image.Transpose[turn])).convert("RGB"))
    except Exception as error:  # decoding a damaged file may raise any error
        raise AcamkdError(f"{file}: the image cannot be read: {error}") from error
