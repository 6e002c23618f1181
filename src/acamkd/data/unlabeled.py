"""Images without targets, which only the distillation sees."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from acamkd.data.dataset import ImageDataset, Transform, note_reading, seed_of
from acamkd.data.folders import Folder, no_images
from acamkd.models.base import VOID, PixelSize, Target, Task


class UnlabeledImages(ImageDataset):
    """A folder of images, with all folders in it, of which nothing is known: no boxes, nothing but void.

    Args:
        images: Folder of images.
        task: What the targets are to look like, for the sake of the transform.
        transform: Random changes.
        seed: Of the random changes.

    Raises:
        AcamkdError: The folder cannot be read.
    """

    def __init__(self, images: Path, task: Task, *, transform: Transform | None = None, seed: int = 0) -> None:
        folder = Folder(images)
        super().__init__(folder.files, [], (), transform=transform, seed=seed)
        self.task = task
        self.problems += no_images(folder)
        self.warnings += folder.described_left_out()

    def target(self, index: int, size: PixelSize) -> Target:
        """An empty target."""
        if self.task == "segmentation":
            return {"mask": tv_tensors.Mask(torch.full(size, VOID))}
        none = torch.empty(0, dtype=torch.int64)
        boxes = tv_tensors.BoundingBoxes(torch.empty(0, 4), format="XYXY", canvas_size=size)
        return {"boxes": boxes, "labels": none, "iscrowd": none.clone()}

    def inspect(self, index: int, size: PixelSize) -> list[str]:
        """There is nothing to be wrong."""
        return []


class WithUnlabeled(Dataset[tuple[Tensor, Target, Tensor]]):
    """Every labeled image with an unlabeled one, as (image, target, unlabeled image).

    Which one and how it is changed is a function of the key and the seed, as everything else. Of m unlabeled images
    m keys in a row show each one once.

    Args:
        labeled: Images and targets.
        unlabeled: Images that go with them.
    """

    def __init__(self, labeled: ImageDataset, unlabeled: ImageDataset) -> None:
        self.labeled = labeled
        self.unlabeled = unlabeled
        self.problems: Sequence[str] = [*labeled.problems, *unlabeled.problems]
        self.reading: Tensor | None = None  # as of the labeled ones
        generator = torch.Generator().manual_seed(seed_of("unlabelled", unlabeled.seed))
        self._order: list[int] = torch.randperm(len(unlabeled), generator=generator).tolist()

    def __len__(self) -> int:
        return len(self.labeled)

    def __getitem__(self, key: int) -> tuple[Tensor, Target, Tensor]:
        note_reading(self.reading, key)
        image, target = self.labeled[key]
        return image, target, self.unlabeled[self._partner(key)][0]

    def sources(self, key: int) -> list[Path]:
        """The files that an item is made of."""
        return [*self.labeled.sources(key), *self.unlabeled.sources(self._partner(key))]

    def _partner(self, key: int) -> int:
        turn, place = divmod(key, len(self.unlabeled))
        return turn * len(self.unlabeled) + self._order[place]
