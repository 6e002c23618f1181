"""Synthetic scenes: a detection or segmentation task without a download.

Five classes differ in shape and texture, never in color. Clutter, occlusion, uneven light, noise and a wide range of
sizes make the task non-trivial.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from acamkd.data.dataset import seed_of
from acamkd.errors import AcamkdError
from acamkd.models.base import PixelSize, Task

Floats: TypeAlias = npt.NDArray[np.float64]
Bools: TypeAlias = npt.NDArray[np.bool_]
Pattern: TypeAlias = Callable[[Floats, Floats], Bools]
"""Coordinates in the object's own frame, the unit disc around it, to inside / outside."""

SUPERSAMPLING = 4
"""Samples per pixel side, for smooth edges."""

VISIBLE = 0.4
"""Objects with a smaller visible share have no box."""


def _cells(*coordinates: Floats) -> Bools:
    """Alternating cells of unit side."""
    return np.asarray(sum(np.floor(coordinate) for coordinate in coordinates) % 2 == 0)


class Kind(NamedTuple):
    """What the objects of a class look like."""

    shape: Pattern
    texture: Pattern


KINDS: Mapping[str, Kind] = {
    "disc": Kind(lambda u, v: np.hypot(u, v) < 1, lambda u, v: _cells(2.5 * v)),  # striped
    "square": Kind(lambda u, v: np.maximum(abs(u), abs(v)) < 0.8, lambda u, v: _cells(2 * u, 2 * v)),  # checkered
    "triangle": Kind(
        lambda u, v: (v < 0.6) & (np.sqrt(3) * abs(u) - v < 1),
        lambda u, v: np.hypot((2.5 * u) % 1 - 0.5, (2.5 * v) % 1 - 0.5) < 0.32,  # dotted
    ),
    "ring": Kind(
        lambda u, v: abs(np.hypot(u, v) - 0.75) < 0.25,
        lambda u, v: _cells(np.arctan2(v, u) * 4 / np.pi),  # spokes
    ),
    "cross": Kind(
        lambda u, v: (np.minimum(abs(u), abs(v)) < 0.3) & (np.maximum(abs(u), abs(v)) < 0.95),
        lambda u, v: _cells(3.5 * np.hypot(u, v)),  # concentric
    ),
}
"""Class -> its look."""

CLASSES = tuple(KINDS)
"""Label k (from 1) is CLASSES[k - 1]; in masks 0 is background."""

OTHER_KINDS: Mapping[str, Kind] = {
    "bar": Kind(
        lambda u, v: (abs(u) < 0.95) & (abs(v) < 0.35),
        lambda u, v: _cells(3 * v + abs((3 * u) % 2 - 1)),  # zigzag
    ),
    "moon": Kind(
        lambda u, v: (np.hypot(u, v) < 1) & (np.hypot(u - 0.6, v) > 0.75),
        lambda u, v: np.minimum((3 * u) % 1, (3 * v) % 1) < 0.3,  # grid
    ),
    "star": Kind(
        lambda u, v: np.hypot(u, v) < 0.65 + 0.35 * np.cos(5 * np.arctan2(v, u)),
        lambda u, v: _cells(3 * np.hypot(u, v) + np.arctan2(v, u) / np.pi),  # spiral
    ),
    "hexagon": Kind(
        lambda u, v: np.maximum(abs(u), abs(u) / 2 + 0.87 * abs(v)) < 0.9,
        lambda u, v: _cells(2 * u + 1.2 * v, 2 * u - 1.2 * v, 2.4 * v),  # triangles
    ),
    "frame": Kind(
        lambda u, v: abs(np.maximum(abs(u), abs(v)) - 0.6) < 0.2,
        lambda u, v: _cells(5 * u, 0.5 * v),  # bricks
    ),
}
"""Classes for a pretraining: no object of KINDS looks like them."""


@dataclass(frozen=True)
class Scene:
    """One drawn image.

    Attributes:
        pixels: (H, W, 3) uint8.
        labels: (H, W) uint8, label of the object seen at each pixel, 0 = background.
        owners: (H, W) int64, number of the object seen at each pixel, -1 = background.
        objects: Number -> label, of the objects that are visible enough to be annotated.
    """

    pixels: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.uint8]
    owners: npt.NDArray[np.int64]
    objects: dict[int, int]


def draw_scene(size: PixelSize, *, seed: int, split: str, index: int, kinds: Mapping[str, Kind] = KINDS) -> Scene:
    """Draw one scene, which depends only on the arguments."""
    classes = list(kinds)
    rng = np.random.default_rng(seed_of("scene", seed, split, index))
    unit = min(size) / 128
    canvas = _background(rng, size, kinds)
    for _ in range(rng.integers(1, 4)):  # the same shapes without texture belong to the background
        alpha, _, window = _stamp(rng, size, kinds[str(rng.choice(classes))], rng.uniform(4, 20) * unit)
        canvas[window] += alpha[..., None] * (_color(rng) - canvas[window]) * 0.4
    owners = np.full(size, -1)
    names = [str(rng.choice(classes)) for _ in range(rng.integers(3, 7))]
    areas = []
    for number, name in enumerate(names):
        radius = np.exp(rng.uniform(np.log(8), np.log(36))) * unit  # small ones are common
        alpha, texture, window = _stamp(rng, size, kinds[name], radius)
        first = _color(rng)
        second = np.clip(first + rng.choice([-1, 1]) * rng.uniform(70, 140), 0, 255)
        color = first + texture[..., None] * (second - first)
        canvas[window] += alpha[..., None] * (color - canvas[window])
        owners[window][alpha >= 0.5] = number
        areas.append(np.count_nonzero(alpha >= 0.5))
    seen = np.bincount(owners[owners >= 0], minlength=len(names))
    labels = np.array([0, *(classes.index(name) + 1 for name in names)], dtype=np.uint8)
    objects = {n: int(labels[n + 1]) for n, area in enumerate(areas) if seen[n] > max(VISIBLE * area, 8)}
    return Scene(_light(rng, canvas), labels[owners + 1], owners, objects)


def write_scenes(
    root: Path,
    *,
    train: int,
    val: int,
    size: PixelSize,
    seed: int,
    task: Task,
    unlabeled: int = 0,
    kinds: Mapping[str, Kind] = KINDS,
) -> None:
    """Write scenes as an ordinary data set on disk.

    Detection: `images/{train,val}/*.jpg` and COCO's `annotations/instances_{train,val}.json`. Segmentation:
    `images/{train,val}/*.jpg` and `masks/{train,val}/*.png`, 0 = background. `images/unlabeled/*.jpg` have neither. The
    folder appears when it is complete; an existing one with the same arguments stays unchanged.

    Args:
        root: Folder to make.
        train: Number of training images.
        val: Number of validation images.
        size: (height, width) in pixels.
        seed: Seed of the scenes; with more images, the first ones stay the same.
        task: Which layout.
        unlabeled: Number of images without labels.
        kinds: The classes.

    Raises:
        AcamkdError: The folder holds other files, or cannot be written.
    """
    asked: dict[str, Any] = {"train": train, "val": val, "size": list(size), "seed": seed, "task": task}
    asked |= {"unlabeled": unlabeled} if unlabeled else {}
    asked |= {"classes": list(kinds)} if kinds is not KINDS else {}
    if _is_written(root, asked):
        return
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=root.parent, prefix=f".{root.name}-"))
    except OSError as error:
        raise AcamkdError(f"cannot write the scenes {root}: {error.strerror or error}") from error
    try:
        for split, count in (("train", train), ("val", val)):
            scenes = _draw(size, seed, split, count, kinds)
            if task == "detection":
                _write_coco(draft, split, scenes, list(kinds))
            else:
                _write_masks(draft, split, scenes)
        for number, scene in enumerate(_draw(size, seed, "unlabeled", unlabeled, kinds), start=1):
            _write_image(draft / "images/unlabeled", number, scene)
        (draft / "scenes.json").write_text(json.dumps(asked), encoding="utf-8")
        draft.chmod(0o755)  # mkdtemp's folders are private
        draft.rename(root)
    except OSError as error:
        if not _is_written(root, asked):  # unless another process was faster
            raise AcamkdError(f"cannot write the scenes {root}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _draw(size: PixelSize, seed: int, split: str, count: int, kinds: Mapping[str, Kind]) -> Iterator[Scene]:
    return (draw_scene(size, seed=seed, split=split, index=index, kinds=kinds) for index in range(count))


def _is_written(root: Path, asked: Mapping[str, Any]) -> bool:
    """Whether the folder holds exactly these scenes; raises AcamkdError if it holds other files."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    note = root / "scenes.json"
    if note.is_file() and json.loads(note.read_text(encoding="utf-8")) == asked:
        return True
    raise AcamkdError(f"{root} exists and holds something else than these scenes: name another folder, or delete it")


def _write_coco(root: Path, split: str, scenes: Iterable[Scene], classes: Sequence[str]) -> None:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, scene in enumerate(scenes, start=1):
        height, width = scene.labels.shape
        name = _write_image(root / "images" / split, number, scene)
        images.append({"id": number, "file_name": name, "width": width, "height": height})
        for owner, label in scene.objects.items():
            ys, xs = np.nonzero(scene.owners == owner)
            left, top = int(xs.min()), int(ys.min())
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": label,
                    "bbox": [left, top, int(xs.max()) + 1 - left, int(ys.max()) + 1 - top],
                    "area": len(xs),
                    "iscrowd": 0,
                }
            )
    categories = [{"id": label, "name": name} for label, name in enumerate(classes, start=1)]
    file = root / "annotations" / f"instances_{split}.json"
    file.parent.mkdir(exist_ok=True)
    content = {"images": images, "annotations": annotations, "categories": categories}
    file.write_text(json.dumps(content), encoding="utf-8")


def _write_masks(root: Path, split: str, scenes: Iterable[Scene]) -> None:
    folder = root / "masks" / split
    folder.mkdir(parents=True)
    for number, scene in enumerate(scenes, start=1):
        name = _write_image(root / "images" / split, number, scene)
        Image.fromarray(scene.labels).save((folder / name).with_suffix(".png"))


def _write_image(folder: Path, number: int, scene: Scene) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{number:05d}.jpg"
    Image.fromarray(scene.pixels).save(folder / name, quality=92)
    return name


def _stamp(
    rng: np.random.Generator, size: PixelSize, kind: Kind, radius: float
) -> tuple[Floats, Floats, tuple[slice, slice]]:
    """One object at a random location, rotated and squeezed: coverage, texture (both in [0, 1]) and window."""
    center = rng.uniform(0, 1, 2) * size
    low = np.maximum(np.floor(center - radius), 0).astype(int)
    high = np.minimum(np.ceil(center + radius), size).astype(int)
    window = (slice(low[0], high[0]), slice(low[1], high[1]))
    rows, columns = (
        (low[axis] + (np.arange((high[axis] - low[axis]) * SUPERSAMPLING) + 0.5) / SUPERSAMPLING - center[axis])
        / radius
        for axis in (0, 1)
    )
    angle, squeeze = rng.uniform(0, 2 * np.pi), rng.uniform(0.7, 1)
    u = np.cos(angle) * columns + np.sin(angle) * rows[:, None]
    v = (np.cos(angle) * rows[:, None] - np.sin(angle) * columns) / squeeze
    inside = kind.shape(u, v)
    alpha = _pixel_mean(inside)
    return alpha, _pixel_mean(inside & kind.texture(u, v)) / np.maximum(alpha, 1e-9), window


def _pixel_mean(samples: Bools) -> Floats:
    """(S H, S W) samples to (H, W) shares."""
    height, width = (side // SUPERSAMPLING for side in samples.shape)
    means: Floats = samples.reshape(height, SUPERSAMPLING, width, SUPERSAMPLING).mean(axis=(1, 3))
    return means


def _color(rng: np.random.Generator) -> Floats:
    return rng.uniform(20, 235, 3)


def _background(rng: np.random.Generator, size: PixelSize, kinds: Mapping[str, Kind]) -> Floats:
    """(H, W, 3): soft color clouds of several scales, with one of the objects' own textures faintly over a part."""
    canvas = np.full((*size, 3), rng.uniform(70, 190, 3))
    for cells, strength in ((3, 50), (8, 20), (24, 15)):
        canvas += strength * _clouds(rng, size, cells)
    rows, columns = np.indices(size) / (min(size) * rng.uniform(0.12, 0.3))
    texture = kinds[str(rng.choice(list(kinds)))].texture(columns + 0.3 * rows, rows - 0.3 * columns)
    where = np.clip(2 * _clouds(rng, size, 3)[..., :1], 0, 1)
    return canvas + where * (texture[..., None] - 0.5) * rng.uniform(15, 45)


def _clouds(rng: np.random.Generator, size: PixelSize, cells: int) -> Floats:
    """(H, W, 3) smooth noise around 0, of about unit range."""
    channels = [
        Image.fromarray(rng.uniform(-1, 1, (cells, cells)).astype(np.float32)).resize(
            size[::-1], Image.Resampling.BICUBIC
        )
        for _ in range(3)
    ]
    return np.stack([np.asarray(channel) for channel in channels], axis=-1).astype(np.float64)


def _light(rng: np.random.Generator, canvas: Floats) -> npt.NDArray[np.uint8]:
    """A gradient of light across the image, then the camera's noise."""
    height, width = canvas.shape[:2]
    angle = rng.uniform(0, 2 * np.pi)
    slope = np.cos(angle) * np.linspace(-1, 1, width) + np.sin(angle) * np.linspace(-1, 1, height)[:, None]
    lit = canvas * (1 + rng.uniform(0, 0.45) * slope[..., None]) + rng.normal(0, rng.uniform(2, 8), canvas.shape)
    pixels: npt.NDArray[np.uint8] = np.clip(lit, 0, 255).round().astype(np.uint8)
    return pixels
