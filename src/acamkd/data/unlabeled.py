"""Images without targets, which only the distillation uses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from acamkd.data.dataset import ImageDataset, Transform, note_reading, seed_of
from acamkd.data.folders import Folder, no_images
from acamkd.data.formats.shards import Shards
from acamkd.models.base import VOID, PixelSize, Target, Task


class UnlabeledImages(ImageDataset):
    """All images in a folder and the folders below it, with empty targets: no boxes, or only void.

    Args:
        images: Folder of images, or of tar files that hold images.
        task: Task whose target format the transform expects.
        transform: Augmentation.
        seed: Seed of the augmentation.

    Raises:
        AcamkdError: The folder cannot be read.
    """

    def __init__(self, images: Path, task: Task, *, transform: Transform | None = None, seed: int = 0) -> None:
        folder = Folder(images)
        shards = Shards([] if folder.files else sorted(images.glob("**/*.tar")))
        super().__init__(folder.files or shards.images, [], (), transform=transform, seed=seed)
        self.task = task
        self.problems += shards.problems or ([] if shards.images else no_images(folder))
        self.warnings += folder.described_left_out()

    def target(self, index: int, size: PixelSize) -> Target:
        """An empty target."""
        if self.task == "segmentation":
            return {"mask": tv_tensors.Mask(torch.full(size, VOID))}
        none = torch.empty(0, dtype=torch.int64)
        boxes = tv_tensors.BoundingBoxes(torch.empty(0, 4), format="XYXY", canvas_size=size)
        return {"boxes": boxes, "labels": none, "iscrowd": none.clone()}

    def inspect(self, index: int, size: PixelSize) -> list[str]:
        """Return no problem: there are no annotations to check."""
        return []


class WithUnlabeled(Dataset[tuple[Tensor, Target, Tensor]]):
    """Pairs every labeled image with an unlabeled one, as (image, target, unlabeled image).

    The pairing and the augmentation depend only on the key and the seed. With m unlabeled images, m consecutive keys
    use each of them once.

    Args:
        labeled: Images and targets.
        unlabeled: Images to pair with them.
    """

    def __init__(self, labeled: ImageDataset, unlabeled: ImageDataset) -> None:
        self.labeled = labeled
        self.unlabeled = unlabeled
        self.problems: Sequence[str] = [*labeled.problems, *unlabeled.problems]
        self.groups = labeled.groups
        self.reading: Tensor | None = None  # shared with loading processes, as in ImageDataset
        generator = torch.Generator().manual_seed(seed_of("unlabelled", unlabeled.seed))
        self._order: list[int] = torch.randperm(len(unlabeled), generator=generator).tolist()

    def __len__(self) -> int:
        return len(self.labeled)

    def __getitem__(self, key: int) -> tuple[Tensor, Target, Tensor]:
        note_reading(self.reading, key)
        image, target = self.labeled[key]
        return image, target, self.unlabeled[self._partner(key)][0]

    def sources(self, key: int) -> list[Path]:
        """The image files of an item."""
        return [*self.labeled.sources(key), *self.unlabeled.sources(self._partner(key))]

    def _partner(self, key: int) -> int:
        turn, place = divmod(key, len(self.unlabeled))
        return turn * len(self.unlabeled) + self._order[place]
