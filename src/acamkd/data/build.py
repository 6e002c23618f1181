"""From a recipe's `data` to data sets and loaders."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from acamkd import config
from acamkd.data.checks import refuse
from acamkd.data.dataset import ImageDataset, SplitName
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


def build(data: config.Data, task: Task, split: SplitName, *, seed: int, augment: bool) -> ImageDataset:
    """Open one split of a recipe's data.

    Args:
        data: The recipe's `data`.
        task: The recipe's task.
        split: Which split.
        seed: Of the random changes.
        augment: Whether `data.augment` is applied.

    Raises:
        AcamkdError: A file or folder cannot be read; `check` finds everything else.
    """
    data = resolve(data, task)
    transform = augmentation(data.augment, task) if augment else None
    reader, drawn = reader_of(data.format, task), data.val
    if drawn.share is None:
        return reader.open_split(data, split, transform=transform, seed=seed)
    # Opened as `split`, since a format may leave more to validation, such as crowds.
    whole = reader.open_split(data.model_copy(update={"val": data.train}), split, transform=None, seed=seed)
    stay, held_out = draw_share(whole.files, drawn.share, drawn.seed)
    part = Part(whole, stay if split == "train" else held_out, transform=transform, seed=seed)
    if split == "train":
        part.warnings = list(whole.warnings)
        log.info("data.val: %d of %d training images, a share of %g drawn with seed %d", len(held_out),
                 len(whole), drawn.share, drawn.seed)  # fmt: skip
    return part


def build_unlabeled(data: config.Data, task: Task, *, seed: int) -> UnlabeledImages:
    """Open a recipe's `data.unlabelled`, with its augmentation; raises AcamkdError if the folder cannot be read."""
    assert data.unlabelled is not None
    return UnlabeledImages(data.root / data.unlabelled, task, transform=augmentation(data.augment, task), seed=seed)


def resolve(data: config.Data, task: Task) -> config.Data:
    """The same data with the format that `auto` stands for, which the log says and explains; its keys are checked.

    Raises:
        AcamkdError: No layout is found, or several are; the format is none for this task, or lacks a key.
    """
    data = _spelled(data)
    if not data.root.is_dir() and ":" not in data.format:
        where = "" if data.root.is_absolute() else f" in {Path.cwd()}, where relative paths start"
        raise AcamkdError(f"data.root {data.root}: there is no such folder{where}")
    if data.format == AUTO:
        data = data.model_copy(update={"format": _find_format(data, task)})
    _check_keys(data, reader_of(data.format, task))
    return data


def _spelled(data: config.Data) -> config.Data:
    """The same data with its paths as they are spelled on the disk; see `existing`."""
    root = existing(data.root)

    def found(path: Path | None) -> Path | None:
        return path if path is None or (root / path).exists() else existing(root / path).absolute()

    splits = {
        name: split.model_copy(update={key: found(getattr(split, key)) for key in ("images", "masks", "annotations")})
        for name, split in (("train", data.train), ("val", data.val))
    }
    return data.model_copy(update={"root": root, "unlabelled": found(data.unlabelled), **splits})


def reader_of(name: str, task: Task) -> type[ImageDataset]:
    """The class that reads a format for a task: one of FORMATS, or a class of the user's, `package.module:Class`.

    Raises:
        AcamkdError: There is none, or it is for another task.
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
        fitting = [name for name, readers in FORMATS.items() if any(task == reader.TASK for reader in readers)]
        raise AcamkdError(f"task {task} needs data.format: {', '.join(fitting)}, not {name}")
    return found[0]


def _find_format(data: config.Data, task: Task) -> str:
    """The format that a recipe's paths or the layout of the root tell."""
    found = _found(data, data.root, task)
    if len(found) != 1:
        looked = "; ".join(
            f"{' and '.join(reader.LAYOUT)} ({name})"
            for name, readers in FORMATS.items() for reader in readers if task == reader.TASK
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
    """Formats that it may be, each with the reason."""
    if data.train.masks is not None:
        return {"masks": f"data.train.masks is {data.train.masks}"}
    if data.train.annotations is not None and data.train.annotations.suffix == ".json":
        return {"coco": f"data.train.annotations is {data.train.annotations}"}
    return layouts(root, task)


def _check_keys(data: config.Data, reader: type[ImageDataset]) -> None:
    """Raise AcamkdError if a split has paths that its format does not read, or lacks one that it needs."""
    for name in ("train", "val"):
        split: config.Split = getattr(data, name)
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
    if data.mask_values is not None and not reader.READS_MASK_VALUES:
        raise AcamkdError(f"data.mask_values: data.format {data.format} says itself what its values mean")
    if reader.NEEDS_CLASSES and not data.classes:
        raise AcamkdError("data.classes is missing: masks hold ids only, so the recipe lists the class names")


def loader(
    dataset: ImageDataset | WithUnlabeled,
    batch_size: int,
    workers: int,
    *,
    shuffle: bool,
    seed: int,
    batches: int | None = None,
) -> ImageLoader:
    """Batches as (list of images, list of targets), and a list of unlabeled images where there are some.

    A shuffled loader leaves out an incomplete last batch, which batch norm cannot always use; the next epoch's order
    brings other images there. Otherwise every image comes once, in order.

    Args:
        dataset: Images and targets.
        batch_size: Images per batch.
        workers: Processes that load; 0 loads in this one. Changes nothing about the batches.
        shuffle: Draw each epoch's order from (seed, epoch).
        seed: Of the order.
        batches: Shuffled batches per epoch; None for one pass over the images.

    Raises:
        AcamkdError: The data set's annotations have problems.
    """
    refuse(dataset.problems)
    sampler = (
        SeededSampler(len(dataset), seed, batches and batches * batch_size)
        if shuffle
        else DistributedSequentialSampler(len(dataset))
    )
    return ImageLoader(
        dataset,
        sampler,
        workers,
        batch_size=batch_size,
        drop_last=shuffle and len(sampler) > batch_size,
        # Without its own generator every epoch would move torch's global one.
        generator=torch.Generator().manual_seed(seed),
    )
