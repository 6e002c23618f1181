"""Build data sets and loaders from a recipe's `data`."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Literal

import torch

from acamkd import config
from acamkd.data.checks import refuse
from acamkd.data.dataset import OPTIONAL_KEYS, ImageDataset, SplitName
from acamkd.data.folders import existing
from acamkd.data.formats import FORMATS
from acamkd.data.layouts import hint, layouts
from acamkd.data.loading import ImageLoader
from acamkd.data.part import Part, draw_share
from acamkd.data.samplers import DistributedSequentialSampler, SeededSampler
from acamkd.data.transforms import augmentation
from acamkd.data.unlabeled import UnlabeledImages, WithUnlabeled
from acamkd.errors import AcamkdError, nearest
from acamkd.models.base import Task

log = logging.getLogger(__name__)

AUTO = "auto"


def build(
    data: config.Data, task: Task, split: SplitName | Literal["test"], *, seed: int, augment: bool
) -> ImageDataset:
    """Open one split of a recipe's data.

    Args:
        data: The recipe's `data`.
        task: The recipe's task.
        split: `train`, `val`, or `test` of a recipe that has one.
        seed: Seed of the augmentation.
        augment: Whether `data.augment` is applied.

    Raises:
        AcamkdError: A file or folder cannot be read; `check` finds everything else.
    """
    data = resolve(data, task)
    if split == "test":  # which formats read as they read validation images
        data, split = data.model_copy(update={"val": data.test}), "val"
    transform = augmentation(data.augment, task) if augment else None
    reader, drawn = reader_of(data.format, task), data.val
    if drawn.share is None:
        return reader.open_split(data, split, transform=transform, seed=seed)
    # Opened as `split`, since a format may keep more boxes for validation, such as crowds.
    whole = reader.open_split(data.model_copy(update={"val": data.train}), split, transform=None, seed=seed)
    stay, held_out = draw_share(whole.files, drawn.share, drawn.seed)
    part = Part(whole, stay if split == "train" else held_out, transform=transform, seed=seed)
    if split == "train":
        part.warnings = list(whole.warnings)
        log.info("data.val: %d of %d training images, a share of %g drawn with seed %d", len(held_out),
                 len(whole), drawn.share, drawn.seed)  # fmt: skip
    return part


def build_unlabeled(data: config.Data, task: Task, *, seed: int) -> UnlabeledImages:
    """Open a recipe's `data.unlabeled`, with its augmentation; raises AcamkdError if the folder cannot be read."""
    assert data.unlabeled is not None
    return UnlabeledImages(data.root / data.unlabeled, task, transform=augmentation(data.augment, task), seed=seed)


def resolve(data: config.Data, task: Task) -> config.Data:
    """Replace the format `auto` by the one that is found, log the reason, and check the keys.

    Raises:
        AcamkdError: No layout or more than one is found, the format does not fit the task, or a key is missing.
    """
    if re.match(r"\w\w+:/", str(data.root)):
        raise AcamkdError(
            f"data.root {data.root}: only folders that this machine sees are read: mount the storage, or copy the data "
            "to a disk first"
        )
    try:
        data = _spelled(data)
    except OSError as error:
        raise AcamkdError(f"data.root {data.root}: {error.filename} cannot be read: {error.strerror}") from error
    if not data.root.is_dir() and ":" not in data.format:
        where = "" if data.root.is_absolute() else f" in {Path.cwd()}, where relative paths start"
        raise AcamkdError(f"data.root {data.root}: there is no such folder{where}")
    if data.format == AUTO:
        data = data.model_copy(update={"format": _find_format(data, task)})
    _check_keys(data, reader_of(data.format, task))
    return data


def _spelled(data: config.Data) -> config.Data:
    """The same data with its paths as spelled on disk; see `existing`."""
    root = existing(data.root)

    def found(path: Path | None) -> Path | None:
        return path if path is None or (root / path).exists() else existing(root / path).absolute()

    splits = {
        name: split.model_copy(update={key: found(getattr(split, key)) for key in ("images", "masks", "annotations")})
        for name, split in data.splits.items()
    }
    return data.model_copy(update={"root": root, "unlabeled": found(data.unlabeled), **splits})


def reader_of(name: str, task: Task) -> type[ImageDataset]:
    """The class that reads a format for a task: one of FORMATS, or the user's own, `package.module:Class`.

    Raises:
        AcamkdError: There is no such class, or it is for another task.
    """
    if ":" in name:
        reader = config.imported(name, "data.format")
        if not (isinstance(reader, type) and issubclass(reader, ImageDataset)):
            raise AcamkdError(f"data.format {name} must be a subclass of acamkd.data.ImageDataset")
        if task != reader.TASK:
            raise AcamkdError(f"data.format {name} is for {reader.TASK}, but the recipe's task is {task}")
        return reader
    if name not in FORMATS:
        raise AcamkdError(f"data.format: there is no format {name!r}; {nearest(name, [*FORMATS, AUTO])}")
    found = [reader for reader in FORMATS[name] if task == reader.TASK]
    if not found:
        fitting = [
            name
            for name, readers in FORMATS.items()
            if any(task == reader.TASK and (reader.LAYOUT or reader.SPARE_LAYOUT) for reader in readers)
        ]
        raise AcamkdError(f"task {task} needs data.format: {', '.join(fitting)}, not {name}")
    return found[0]


def _find_format(data: config.Data, task: Task) -> str:
    """Find the format by the recipe's paths or by the layout of the root."""
    found = _found(data, data.root, task)
    if len(found) != 1:
        looked = "; ".join(
            f"{' and '.join(reader.LAYOUT or reader.SPARE_LAYOUT)} ({name})"
            for name, readers in FORMATS.items() for reader in readers
            if task == reader.TASK and (reader.LAYOUT or reader.SPARE_LAYOUT)
        )  # fmt: skip
        what = f"both {' and '.join(found)}" if found else "no layout that is known"
        raise AcamkdError(
            f"data.format: auto finds {what} in {data.root} for {task}; looked for {looked}: set data.root to the "
            f"folder that holds these, or name data.format{'' if found else hint(data, task)}"
        )
    ((name, reason),) = found.items()
    log.info("data.format: %s, because %s", name, reason)
    return name


def _found(data: config.Data, root: Path, task: Task) -> dict[str, str]:
    """Formats that fit, each with the reason."""
    if data.train.masks is not None:
        return {"masks": f"data.train.masks is {data.train.masks}"}
    if data.train.annotations is not None and data.train.annotations.suffix == ".json":
        return {"coco": f"data.train.annotations is {data.train.annotations}"}
    return layouts(root, task)


def _check_keys(data: config.Data, reader: type[ImageDataset]) -> None:
    """Raise AcamkdError if a split has paths that its format does not read, or lacks one that it needs."""
    for name, split in data.splits.items():
        for key in ("masks", "annotations"):
            if getattr(split, key) is not None and key not in reader.SPLIT_KEYS:
                raise AcamkdError(f"data.{name}.{key}: data.format {data.format} does not read it")
        if split.images is None:
            continue
        if "images" not in reader.SPLIT_KEYS:
            raise AcamkdError(
                f"data.{name}.images: data.format {data.format} has folders of its own: give the split's `name` instead"
            )
        if reader.BESIDE_IMAGES is not None and getattr(split, reader.BESIDE_IMAGES) is None:
            raise AcamkdError(
                f"data.{name}.{reader.BESIDE_IMAGES} is missing: data.format {data.format} needs it beside `images`"
            )
    for key in OPTIONAL_KEYS:
        if getattr(data, key) != config.Data.model_fields[key].default and key not in reader.DATA_KEYS:
            raise AcamkdError(f"data.{key}: data.format {data.format} does not read it for {reader.TASK}")
    if reader.NEEDS_CLASSES and not data.classes:
        raise AcamkdError(
            f"data.classes is missing: data.format {data.format} does not say the class names, so the recipe lists them"
        )


def loader(
    dataset: ImageDataset | WithUnlabeled,
    batch_size: int,
    workers: int,
    *,
    shuffle: bool,
    seed: int,
    batches: int | None = None,
    pin: bool = False,
) -> ImageLoader:
    """Batches as (list of images, list of targets), and a list of unlabeled images where there are some.

    A shuffled loader drops an incomplete last batch, since batch norm may not accept it; every epoch drops other
    images. Without shuffling, every image comes once, in order.

    Args:
        dataset: Images and targets.
        batch_size: Images per batch.
        workers: Processes that load images; 0 loads in this one. The batches do not depend on it.
        shuffle: Shuffle every epoch, by (seed, epoch).
        seed: Seed of the order.
        batches: Shuffled batches per epoch; None for one pass over the images.
        pin: Give the batches in pinned memory, from which a GPU copies beside the program.

    Raises:
        AcamkdError: The data set's annotations have problems.
    """
    refuse(dataset.problems)
    sampler = (
        SeededSampler(len(dataset), seed, batches and batches * batch_size, dataset.groups)
        if shuffle
        else DistributedSequentialSampler(len(dataset))
    )
    return ImageLoader(
        dataset,
        sampler,
        workers,
        batch_size=batch_size,
        drop_last=shuffle and len(sampler) > batch_size,
        pin_memory=pin,
        # Without its own generator, every epoch would advance torch's global one.
        generator=torch.Generator().manual_seed(seed),
    )
