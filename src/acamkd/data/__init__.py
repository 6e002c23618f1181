"""Pictures and targets: one class per format, and the loader that both networks are fed from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from acamkd import config
from acamkd.data.base import PictureDataset, Sample, SeededSampler, Transform, check, check_same_classes, refuse
from acamkd.data.coco import CocoDetection
from acamkd.data.masks import MaskFolder
from acamkd.data.transforms import augmentation
from acamkd.models.base import Target, Task

__all__ = [
    "FORMATS",
    "CocoDetection",
    "MaskFolder",
    "PictureDataset",
    "SeededSampler",
    "augmentation",
    "build",
    "check",
    "check_same_classes",
    "loader",
]


def build(data: config.Data, task: Task, split: Literal["train", "val"], *, seed: int, augment: bool) -> PictureDataset:
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
    transform = augmentation(data.augment, task) if augment else None
    return FORMATS[data.format](data, split, transform, seed)


def loader(
    dataset: PictureDataset, batch_size: int, workers: int, *, shuffle: bool, seed: int, batches: int | None = None
) -> DataLoader[Sample]:
    """Batches as (list of pictures, list of targets).

    A shuffled loader leaves out an incomplete last batch, which batch norm cannot always use; the next epoch's order
    brings other pictures there. Otherwise every picture comes once, in order.

    Args:
        dataset: Pictures and targets.
        batch_size: Pictures per batch.
        workers: Processes that load; 0 loads in this one. Changes nothing about the batches.
        shuffle: Draw each epoch's order from (seed, epoch).
        seed: Of the order.
        batches: Shuffled batches per epoch; None for one pass over the pictures.

    Raises:
        AcamkdError: The data set's annotations have problems.
    """
    refuse(dataset.problems)
    sampler = SeededSampler(len(dataset), seed, batches and batches * batch_size) if shuffle else None
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        drop_last=sampler is not None and len(sampler) > batch_size,
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=_as_lists,
        # Without its own generator every epoch would move torch's global one.
        generator=torch.Generator().manual_seed(seed),
    )


def _coco(data: config.Data, split: Literal["train", "val"], transform: Transform | None, seed: int) -> PictureDataset:
    paths: config.Split = getattr(data, split)
    return CocoDetection(
        data.root / paths.images,
        data.root / _given(paths.annotations),
        classes=data.classes,
        keep_crowd=split == "val",
        transform=transform,
        seed=seed,
    )


def _masks(data: config.Data, split: Literal["train", "val"], transform: Transform | None, seed: int) -> PictureDataset:
    paths: config.Split = getattr(data, split)
    return MaskFolder(
        data.root / paths.images,
        data.root / _given(paths.masks),
        data.classes or (),
        ignore_index=data.ignore_index,
        transform=transform,
        seed=seed,
    )


FORMATS: dict[str, Callable[[config.Data, Literal["train", "val"], Transform | None, int], PictureDataset]] = {
    "coco": _coco,
    "masks": _masks,
}
"""`data.format` in a recipe."""


def _given(path: Path | None) -> Path:
    assert path is not None, "config.Recipe refuses a split without its annotations"
    return path


def _as_lists(samples: Sequence[Sample]) -> tuple[list[Tensor], list[Target]]:
    return [image for image, _ in samples], [target for _, target in samples]
