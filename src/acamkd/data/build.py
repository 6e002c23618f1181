"""From a recipe's `data` to data sets and loaders."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeAlias

import torch

from acamkd import config
from acamkd.data.checks import refuse
from acamkd.data.dataset import ImageDataset, Transform
from acamkd.data.formats import yolo
from acamkd.data.formats.cityscapes import Cityscapes
from acamkd.data.formats.coco import CocoDetection
from acamkd.data.formats.masks import MaskFolder
from acamkd.data.formats.voc import VocDetection, VocSegmentation
from acamkd.data.loading import ImageLoader
from acamkd.data.samplers import DistributedSequentialSampler, SeededSampler
from acamkd.data.transforms import augmentation
from acamkd.data.unlabeled import UnlabeledImages, WithUnlabeled
from acamkd.errors import AcamkdError
from acamkd.models.base import Task

log = logging.getLogger(__name__)

SplitName: TypeAlias = Literal["train", "val"]


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
    return READERS[data.format, task](data, split, transform, seed)


def build_unlabeled(data: config.Data, task: Task, *, seed: int) -> UnlabeledImages:
    """Open a recipe's `data.unlabelled`, with its augmentation; raises AcamkdError if the folder cannot be read."""
    assert data.unlabelled is not None
    return UnlabeledImages(data.root / data.unlabelled, task, transform=augmentation(data.augment, task), seed=seed)


def resolve(data: config.Data, task: Task) -> config.Data:
    """The same data with the format that `auto` stands for, which the log says and explains.

    Raises:
        AcamkdError: No layout is found, or several are; the message says what was looked for.
    """
    if data.format != "auto":
        return data
    if not data.root.is_dir():
        raise AcamkdError(f"data.root {data.root}: there is no such folder")
    found = _found(data, task)
    if len(found) != 1:
        looked = "; ".join(f"{' and '.join(LAYOUTS[each])} ({each[0]})" for each in LAYOUTS if each[1] == task)
        what = f"both {' and '.join(found)}" if found else "no layout that is known"
        raise AcamkdError(
            f"data.format: auto finds {what} in {data.root} for {task}; looked for {looked}: set data.root to the "
            "folder that holds these, or name data.format"
        )
    ((name, reason),) = found.items()
    log.info("data.format: %s, because %s", name, reason)
    data = data.model_copy(update={"format": name})
    config.check_data(data, task)
    return data


def _found(data: config.Data, task: Task) -> dict[str, str]:
    """Formats that it may be, each with the reason."""
    for key, name in (("masks", "masks"), ("annotations", "coco")):
        path = getattr(data.train, key)
        if path is not None and (key == "masks" or path.suffix == ".json"):
            return {name: f"data.train.{key} is {path}"}
    return {
        name: f"{' and '.join(entries)} {'are' if len(entries) > 1 else 'is'} in {data.root}"
        for (name, for_task), entries in LAYOUTS.items()
        if for_task == task and all(any(data.root.glob(entry)) for entry in entries)
    }


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


def _coco(data: config.Data, split: SplitName, transform: Transform | None, seed: int) -> ImageDataset:
    images, annotations = _coco_paths(data.root, getattr(data, split))
    return CocoDetection(
        images, annotations, classes=data.classes, keep_crowd=split == "val", transform=transform, seed=seed
    )


def _coco_paths(root: Path, split: config.Split) -> tuple[Path, Path]:
    if split.images is not None and split.annotations is not None:
        return root / split.images, root / split.annotations
    # COCO's own train and val are called so, and its archives lay their folders of images beside `annotations`.
    names = [str(split.name), f"{split.name}2017"]
    name = next((each for each in names if _instances(root, each).is_file()), names[0])
    annotations = root / split.annotations if split.annotations else _instances(root, name)
    folders = [folder for each in dict.fromkeys([name, *names]) for folder in (root / "images" / each, root / each)]
    return next((folder for folder in folders if folder.is_dir()), folders[0]), annotations


def _instances(root: Path, name: str) -> Path:
    return root / "annotations" / f"instances_{name}.json"


def _yolo(data: config.Data, split: SplitName, transform: Transform | None, seed: int) -> ImageDataset:
    said: config.Split = getattr(data, split)
    images, labels = yolo.folders(
        data.root,
        said.name or split,
        images=data.root / said.images if said.images else None,
        labels=data.root / said.annotations if said.annotations else None,
    )
    names = yolo.class_names(data.root, data.classes)
    return yolo.YoloDetection(images, labels, names, transform=transform, seed=seed)


def _voc(data: config.Data, split: SplitName, transform: Transform | None, seed: int) -> ImageDataset:
    name = getattr(data, split).name
    return VocDetection(
        data.root, name, classes=data.classes, keep_crowd=split == "val", transform=transform, seed=seed
    )


def _voc_masks(data: config.Data, split: SplitName, transform: Transform | None, seed: int) -> ImageDataset:
    return VocSegmentation(data.root, getattr(data, split).name, classes=data.classes, transform=transform, seed=seed)


def _cityscapes(data: config.Data, split: SplitName, transform: Transform | None, seed: int) -> ImageDataset:
    return Cityscapes(data.root, getattr(data, split).name, classes=data.classes, transform=transform, seed=seed)


def _masks(data: config.Data, split: SplitName, transform: Transform | None, seed: int) -> ImageDataset:
    paths: config.Split = getattr(data, split)
    return MaskFolder(
        data.root / (paths.images or f"images/{paths.name}"),
        data.root / (paths.masks or f"masks/{paths.name}"),
        data.classes or (),
        ignore_index=data.ignore_index,
        transform=transform,
        seed=seed,
    )


READERS: dict[tuple[str, Task], Callable[[config.Data, SplitName, Transform | None, int], ImageDataset]] = {
    ("coco", "detection"): _coco,
    ("yolo", "detection"): _yolo,
    ("voc", "detection"): _voc,
    ("voc", "segmentation"): _voc_masks,
    ("masks", "segmentation"): _masks,
    ("cityscapes", "segmentation"): _cityscapes,
}
"""By `data.format` and `task` of a recipe."""

LAYOUTS: dict[tuple[str, Task], tuple[str, ...]] = {
    ("coco", "detection"): ("annotations/instances_*.json",),
    ("yolo", "detection"): (yolo.NAMES,),
    ("voc", "detection"): ("Annotations", "ImageSets/Main"),
    ("voc", "segmentation"): ("SegmentationClass", "ImageSets/Segmentation"),
    ("masks", "segmentation"): ("images", "masks"),
    ("cityscapes", "segmentation"): ("leftImg8bit", "gtFine"),
}
"""What `data.format: auto` looks for in the root."""
