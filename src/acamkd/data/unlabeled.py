"""Pictures without targets, which only the distillation sees."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from acamkd.data.dataset import PictureDataset, Transform, note_reading, seed_of
from acamkd.data.image_io import files_of
from acamkd.files import PICTURES
from acamkd.models.base import VOID, PixelSize, Target, Task


class UnlabelledPictures(PictureDataset):
    """A folder of pictures of which nothing is known: no boxes, nothing but void.

    Args:
        images: Folder of pictures.
        task: What the targets are to look like, for the sake of the transform.
        transform: Random changes.
        seed: Of the random changes.

    Raises:
        AcamkdError: The folder cannot be read.
    """

    def __init__(self, images: Path, task: Task, *, transform: Transform | None = None, seed: int = 0) -> None:
        super().__init__(files_of(images, PICTURES), [], (), transform=transform, seed=seed)
        self.task = task
        if not self.files:
            self.problems.append(f"{images}: the folder holds no pictures ({', '.join(PICTURES)})")

    def target(self, index: int, size: PixelSize) -> Target:
        """An empty target."""
        if self.task == "segmentation":
            return {"mask": tv_tensors.Mask(torch.full(size, VOID))}
        none = torch.empty(0, dtype=torch.int64)
        boxes = tv_tensors.BoundingBoxes(torch.empty(0, 4), format="XYXY", canvas_size=size)
        return {"boxes": boxes, "labels": none, "iscrowd": none.clone()}

    def inspect(self, index: int, size: PixelSize, *, decode: bool) -> list[str]:
        """There is nothing to be wrong."""
        return []


class WithUnlabelled(Dataset[tuple[Tensor, Target, Tensor]]):
    """Every labelled picture with an unlabelled one, as (picture, target, unlabelled picture).

    Which one and how it is changed is a function of the key and the seed, as everything else. Of m unlabelled pictures
    m keys in a row show each one once.

    Args:
        labelled: Pictures and targets.
        unlabelled: Pictures that go with them.
    """

    def __init__(self, labelled: PictureDataset, unlabelled: PictureDataset) -> None:
        self.labelled = labelled
        self.unlabelled = unlabelled
        self.problems: Sequence[str] = [*labelled.problems, *unlabelled.problems]
        self.reading: Tensor | None = None  # as of the labelled ones
        generator = torch.Generator().manual_seed(seed_of("unlabelled", unlabelled.seed))
        self._order: list[int] = torch.randperm(len(unlabelled), generator=generator).tolist()

    def __len__(self) -> int:
        return len(self.labelled)

    def __getitem__(self, key: int) -> tuple[Tensor, Target, Tensor]:
        note_reading(self.reading, key)
        image, target = self.labelled[key]
        return image, target, self.unlabelled[self._partner(key)][0]

    def sources(self, key: int) -> list[Path]:
        """The files that an item is made of."""
        return [*self.labelled.sources(key), *self.unlabelled.sources(self._partner(key))]

    def _partner(self, key: int) -> int:
        turn, place = divmod(key, len(self.unlabelled))
        return turn * len(self.unlabelled) + self._order[place]
