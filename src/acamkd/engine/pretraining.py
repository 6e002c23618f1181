"""Pretraining of a backbone on images alone: the module, and two ways to judge what it has learned."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from acamkd.distillation.audit import parameters_below
from acamkd.distillation.distiller import Distiller
from acamkd.distillation.taps import FeatureTap, probe_batch
from acamkd.engine.mask_history import spread
from acamkd.engine.metrics import Validator, gathered
from acamkd.engine.module import TrainingModule
from acamkd.models.base import VOID, Batch, PixelSize, Target, keeping_modes
from acamkd.models.weights import save_weights
from acamkd.stopwatch import counted, timed

NEIGHBORS = 5
TEMPERATURE = 0.07
"""A neighbor's vote is exp(cosine / TEMPERATURE), as in DINO's evaluation (arXiv 2104.14294)."""
BEYOND_RAMPS = 2**62
"""A step at which every loss has its full weight."""
MOST = 5000
"""Objects that are compared with each other at most; of more, evenly spaced ones."""


class NearestNeighbors(Validator):
    """Class of each object by its nearest neighbors in other images, without any training.

    An object is a box, or all pixels of one class in an image. Its vector is the mean of the feature map over it, of
    length 1, and with several maps these one behind the other. It is given the class for which its 5 nearest objects in
    other images vote most. `kNN` is the share of objects that get their own class, as a mean over the classes;
    `kNN/CLASS` is that of one class. A class with objects in a single image does not count.

    Args:
        classes: Class names in the order of their ids.
    """

    metric = "kNN"
    why_undefined = "no class has objects in two of the validation images: add images to data.val"

    def __init__(self, classes: Sequence[str]) -> None:
        super().__init__()
        self.classes = tuple(classes)
        self._objects: list[tuple[int, int, Tensor]] = []
        """Image, class and vector (D,) of each object."""
        self._images = 0

    def see(self, distiller: Distiller, images: Sequence[Tensor], targets: Sequence[Target]) -> None:
        """Add the objects as the student's tapped layers show them."""
        batch = distiller.student.prepare(images, targets)
        self.add(batch, student_maps(distiller, batch))

    def add(self, batch: Batch, maps: Mapping[str, Tensor]) -> None:
        """Add the objects of a batch with targets, as feature maps (N, C, H, W) of its padded input show them."""
        assert batch.targets is not None
        for index, target in enumerate(batch.targets):
            parts = []
            for x in maps.values():
                labels, weights = regions(target, batch.input_size, (x.shape[-2], x.shape[-1]))
                vectors = torch.einsum("rhw,chw->rc", weights, x[index].float())  # their length does not matter
                parts.append(F.normalize(vectors, dim=1))
            self._objects += [
                (self._images, label, vector)
                for label, vector in zip(labels.tolist(), torch.cat(parts, dim=1).cpu(), strict=True)
            ]
            self._images += 1

    def compute(self) -> dict[str, float]:
        """Return `kNN` and `kNN/CLASS` in percent, NaN where there is nothing to compare."""
        shares = gathered(self._objects)
        self._objects, self._images = [], 0
        every = [((rank, image), label, vector) for rank, share in enumerate(shares) for image, label, vector in share]
        objects = [every[index] for index in spread(len(every), MOST)]
        seen = {label: {image for image, of, _ in objects if of == label} for label in range(len(self.classes))}
        found = self._found(objects) if objects else []
        right: dict[str, float] = {}
        for label, name in enumerate(self.classes):
            own = [guess == label for guess, (_, of, _) in zip(found, objects, strict=True) if of == label]
            right[f"kNN/{name}"] = 100 * sum(own) / len(own) if len(seen[label]) > 1 else math.nan
        known = [value for value in right.values() if value == value]
        return {"kNN": sum(known) / len(known) if known else math.nan, **right}

    def _found(self, objects: Sequence[tuple[Any, int, Tensor]]) -> list[int]:
        """The class that each object gets."""
        numbers = {image: number for number, image in enumerate(dict.fromkeys(image for image, _, _ in objects))}
        images = torch.tensor([numbers[image] for image, _, _ in objects])
        labels = torch.tensor([label for _, label, _ in objects])
        vectors = F.normalize(torch.stack([vector for _, _, vector in objects]), dim=1)
        votes = torch.zeros(len(objects), len(self.classes))
        for rows in torch.split(torch.arange(len(objects)), 1024):
            near = (vectors[rows] @ vectors.T).masked_fill(images[rows, None] == images, -math.inf)
            best, index = near.topk(min(NEIGHBORS, len(objects)), dim=1)
            votes[rows] = votes[rows].scatter_add(1, labels[index], (best / TEMPERATURE).exp())
        return votes.argmax(dim=1).tolist()


class HeldOutLoss(Validator):
    """The distillation loss on held-out images, where there are no labels.

    `alignment` is minus 100 times the loss with all its terms: of `cosine` with weight 1, the missing similarity in
    percent. It is 0 where student and teacher agree, unless a term has nothing to do with that, such as the diversity
    of ACAM's masks. It does not say whether the features are of use.
    """

    metric = "alignment"
    why_undefined = "the loss on the validation images is not finite"

    def __init__(self) -> None:
        super().__init__()
        self.classes = ()
        self._sums: list[tuple[float, int]] = []

    def see(self, distiller: Distiller, images: Sequence[Tensor], targets: Sequence[Target]) -> None:
        """Add the loss of some images."""
        batch = distiller.student.prepare(images)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(len(self._sums))  # random masks
            terms = distiller(batch, BEYOND_RAMPS, labeled=False, check=False)  # NaN is a score without a basis
        self._sums.append((float(torch.stack(list(terms.values())).sum()) * len(images), len(images)))

    def compute(self) -> dict[str, float]:
        """Return `alignment`."""
        sums = [pair for share in gathered(self._sums) for pair in share]
        self._sums = []
        return {"alignment": -100 * sum(loss for loss, _ in sums) / sum(count for _, count in sums)}


def regions(target: Target, size: PixelSize, cells: PixelSize) -> tuple[Tensor, Tensor]:
    """The objects of an image and how much of each cell of a feature map they cover.

    Args:
        target: In pixels of the padded input.
        size: (height, width) of the padded input.
        cells: (height, width) of the feature map.

    Returns:
        (R,) classes from 0, and (R, height, width) covered shares of the cells.
    """
    if "mask" in target:
        mask = target["mask"]
        labels = torch.unique(mask)
        labels = labels[labels != VOID]
        covered = F.adaptive_avg_pool2d((mask == labels[:, None, None]).float()[None], cells)[0]
        return labels, covered
    single = target["iscrowd"] == 0 if "iscrowd" in target else torch.ones_like(target["labels"], dtype=torch.bool)
    boxes = target["boxes"][single].float()
    down, right = (
        _overlap(boxes[:, low] * count / whole, boxes[:, low + 2] * count / whole, count)
        for low, count, whole in ((1, cells[0], size[0]), (0, cells[1], size[1]))
    )
    return target["labels"][single] - 1, down[:, :, None] * right[:, None, :]


def _overlap(low: Tensor, high: Tensor, count: int) -> Tensor:
    """How much of each of `count` unit intervals lies in [low, high): (R,) -> (R, count)."""
    start = torch.arange(count, device=low.device)
    return (torch.minimum(high[:, None], start + 1) - torch.maximum(low[:, None], start)).clamp(min=0)


def student_maps(distiller: Distiller, batch: Batch) -> dict[str, Tensor]:
    """The student's tapped feature maps, with their graph unless gradients are off."""
    names = list(dict.fromkeys(pair[0] for pair in distiller.pairs if pair is not None))
    with FeatureTap(distiller.student.net, names) as tap:
        with tap.early_stop():
            distiller.student(batch)
        return tap.features()


def freeze_beyond(distiller: Distiller) -> list[str]:
    """Freeze the student's parameters that no tapped layer depends on, such as its head's; the names of the others.

    Several processes would otherwise wait for gradients that never come.

    Args:
        distiller: Its losses compare feature maps.
    """
    student = distiller.student
    with keeping_modes(student), torch.random.fork_rng(devices=[]):
        student.eval()
        maps = student_maps(distiller, probe_batch(student))
    reached = parameters_below(student.net, maps)
    for name, parameter in student.net.named_parameters():
        parameter.requires_grad_(name in reached)
    return list(reached)


class PretrainingModule(TrainingModule):
    """Trains a Distiller's student on images alone, and saves its backbone; arguments as TrainingModule."""

    def _terms(
        self, images: list[Tensor], targets: list[Target], unlabeled: list[Tensor] | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The targets, if there are any, are not looked at."""
        counted("images", len(images))
        with timed("collation"):
            batch = self.distiller.student.prepare(images)
        terms = self.run_losses(batch, labeled=False)
        return terms, self.distiller.statistics()

    def save_best(self, file: Path) -> None:
        """Write the backbone alone, in the names of its framework."""
        save_weights(self.distiller.student.backbone, file)
