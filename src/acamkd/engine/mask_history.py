"""MaskHistory: masks and feature maps of a few validation images over the epochs, for the report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import lightning as L
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from acamkd.data import ImageDataset
from acamkd.distillation.distiller import Distiller
from acamkd.distillation.taps import FeatureTap
from acamkd.engine.module import TrainingModule
from acamkd.engine.trackers import trackers_of
from acamkd.files import written_whole
from acamkd.losses.base import DistillationContext, DistillationLoss, HeadLoss
from acamkd.losses.functional import dice_overlap
from acamkd.mask_health import LEARNED, collapse
from acamkd.models.base import Batch, head_of, keeping_modes, to_device

Arrays: TypeAlias = dict[str, npt.NDArray[Any]]

REPLAY = "replay.npz"
IMAGES = 4
SNAPSHOTS = 32
"""About this many snapshots are kept of a long run; a shorter run keeps one per epoch."""
TILE = 96
"""About as many pixels have the sides of a mask as an image for a tracker."""
SIDE = 40
"""Longest side of a saved feature map, in locations."""
UNITS = 12
CHANNELS = 256
"""At most UNITS masks, and CHANNELS entries of a channel mask, are saved."""


class MaskHistory(Callback):
    """Records masks of the same few validation images before the first step and after the epochs, in replay.npz.

    Trackers get their statistics and drawings.

    This does not change the training: both networks run in eval mode, without gradients, and every training step sets
    its own seed. For E snapshots and K images the file holds

        epoch                       (E,), completed epochs
        images                    (K,), indices in the validation set
        LAYER/METHOD/student        (E, K, 1, h, w) uint8: mean magnitude over the channels, 255 = its largest
        LAYER/METHOD/teacher        likewise
        LAYER/METHOD/MASK           (E, K, M, h, w) or (E, K, M, C) uint8, 255 = 1, for each of the method's masks
        LAYER/METHOD/MASK/figures   (E, 3): mean, standard deviation over locations or channels, Dice overlap

    Args:
        folder: The run folder.
        images: The validation images.
    """

    def __init__(self, folder: Path, images: ImageDataset) -> None:
        self.file = folder / REPLAY
        self.images = images
        self.chosen = spread(len(images), IMAGES)
        self.snapshots: list[Arrays] = []
        self.teacher_maps: dict[str, Tensor] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record the start; a resumed run keeps the snapshots up to its checkpoint."""
        if trainer.global_step == 0:
            self._record(trainer, pl_module, epoch=0)
        elif self.file.is_file():
            self.snapshots = [
                snapshot for snapshot in read_snapshots(self.file) if snapshot["epoch"] <= trainer.current_epoch
            ]

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record the end of an epoch."""
        epoch = trainer.current_epoch + 1
        if is_kept(epoch, trainer.max_epochs or epoch):
            self._record(trainer, pl_module, epoch)

    def _record(self, trainer: L.Trainer, pl_module: L.LightningModule, epoch: int) -> None:
        assert isinstance(pl_module, TrainingModule)
        if not trainer.is_global_zero:
            return
        student = pl_module.distiller.student
        images, targets = zip(*(self.images[index] for index in self.chosen), strict=True)
        with keeping_modes(student):
            student.eval()  # before `prepare`: a detector in training mode may draw its input size at random
            batch = student.prepare(*to_device(images, targets, pl_module.device))
            if not self.teacher_maps:  # the teacher never changes, and its forward pass is the expensive one
                self.teacher_maps = {name: x.cpu() for name, x in pl_module.distiller.teacher_maps(batch).items()}
            found = look(pl_module.distiller, batch, self.teacher_maps)
        self.snapshots.append({"epoch": np.array(epoch), **found})
        self._write()
        for tracker in trackers_of(trainer.loggers):
            step = max(0, trainer.global_step - 1)  # the last one that is done
            tracker.log_metrics(mask_values(found), step)
            for name, sheet in mask_sheets(found, images).items():
                tracker.log_image(f"masks/{name}", sheet, step)

    def _write(self) -> None:
        stacked = {name: np.stack([snapshot[name] for snapshot in self.snapshots]) for name in self.snapshots[0]}
        with written_whole(self.file) as unfinished:
            np.savez(unfinished, **stacked, images=np.array(self.chosen))  # type: ignore[arg-type]


def read_snapshots(file: Path) -> list[Arrays]:
    """Read the snapshots of a replay.npz, one mapping each, without `images`."""
    with np.load(file) as stored:
        stacked = {name: stored[name] for name in stored.files if name != "images"}
    return [{name: array[snapshot] for name, array in stacked.items()} for snapshot in range(len(stacked["epoch"]))]


def mask_values(found: Arrays) -> dict[str, float]:
    """Statistics of the masks that `look` found, over its images.

    Returns:
        `LAYER/METHOD/MASK/STATISTIC`: `mean`, `std` over locations or channels, Dice `overlap` and, of learned masks,
        `collapsed`, the share of the first UNITS masks that have collapsed.
    """
    values: dict[str, float] = {}
    for name, figures in found.items():
        mask, _, ending = name.rpartition("/")
        if ending != "figures":
            continue
        values |= {f"{mask}/{what}": float(x) for what, x in zip(("mean", "std", "overlap"), figures, strict=True)}
        if mask.rpartition("/")[2] in LEARNED:
            each = found[mask].reshape(*found[mask].shape[:2], -1) / 255  # (K, M, P)
            means, deviations = each.mean((0, 2)).tolist(), each.std(2).mean(0).tolist()
            collapsed = [bool(collapse(*pair)) for pair in zip(means, deviations, strict=True)]
            values[f"{mask}/collapsed"] = sum(collapsed) / len(collapsed)
    return values


def mask_sheets(found: Arrays, images: Sequence[Tensor]) -> dict[str, npt.NDArray[np.uint8]]:
    """Draw the masks that `look` found: each image's in one row, black for 0 and white for 1.

    Args:
        found: What `look` returned.
        images: (3, H, W) uint8 each; they stand before their spatial masks.

    Returns:
        `LAYER/METHOD/MASK`: (H, W, 3) uint8. A channel mask is one line.
    """
    sheets = {}
    for name, masks in found.items():
        if name.count("/") != 2 or name.endswith(("/student", "/teacher")):
            continue
        is_spatial = masks.ndim == 4
        if not is_spatial:  # (K, M, C): all masks of an image are one tile
            masks = masks[:, None]
        scale = max(1, TILE // max(masks.shape[-2:]))
        large = masks.repeat(scale, 2).repeat(scale, 3)
        rows = []
        for image, row in zip(images, large, strict=True):
            tiles = [mask[..., None].repeat(3, 2) for mask in row]
            if is_spatial:
                small = F.interpolate(image[None].float(), large.shape[-2:], mode="area")[0]
                tiles.insert(0, small.byte().permute(1, 2, 0).numpy())
            rows.append(np.concatenate([np.pad(tile, ((1, 1), (1, 1), (0, 0))) for tile in tiles], axis=1))
        sheets[name] = np.concatenate(rows)
    return sheets


def is_kept(epoch: int, epochs: int) -> bool:
    """Whether this epoch, counted from 1, is among about SNAPSHOTS evenly spaced ones; the last epoch always is."""
    return epoch % math.ceil(epochs / SNAPSHOTS) == 0 or epoch == epochs


def spread(count: int, wanted: int) -> list[int]:
    """Up to `wanted` indices, evenly spaced over `count` entries."""
    return [index * count // min(wanted, count) for index in range(min(wanted, count))]


@torch.no_grad()
def look(distiller: Distiller, batch: Batch, teacher_maps: Mapping[str, Tensor]) -> Arrays:
    """Compute a batch's feature maps and masks in the form that `MaskHistory` saves; expects eval mode."""
    pairs = list(compared_pairs(distiller))
    context = DistillationContext(input_size=batch.input_size, boxes=batch.boxes)
    shares = [(h / batch.input_size[0], w / batch.input_size[1]) for h, w in batch.sizes]
    found: Arrays = {}
    with FeatureTap(distiller.student.net, [pair[0] for pair in pairs]) as tap:
        with tap.early_stop():
            distiller.student(batch)
        for student_layer, teacher_layer, loss in pairs:
            key = f"{student_layer}/{type(loss).__name__.lower()}"
            student = tap[student_layer]
            teacher = teacher_maps[teacher_layer].to(student.device)
            for who, x in (("student", student), ("teacher", teacher)):
                found[f"{key}/{who}"] = _bytes(_scaled(_pooled(_inside(x.abs().mean(1, keepdim=True), shares))))
            for name, masks in loss.masks(student, teacher, context).items():
                visible = _inside(masks, shares) if masks.ndim == 4 else list(masks)
                if masks.ndim == 4 and name != "spatial":  # weights that may exceed 1
                    visible = _scaled(visible)
                found[f"{key}/{name}/figures"] = np.mean([_statistics(x.flatten(1)) for x in visible], axis=0)
                kept = _pooled(visible) if masks.ndim == 4 else masks[..., :CHANNELS]
                found[f"{key}/{name}"] = _bytes(kept[:, :UNITS])
    return found


def compared_pairs(distiller: Distiller) -> Iterator[tuple[str, str, DistillationLoss]]:
    """Student layer, teacher layer and loss of every compared pair of feature maps; losses of queries have none."""
    for pair, loss in distiller.levels:
        if isinstance(loss, HeadLoss):
            layers = loss.layers(distiller.student, head_of(distiller.teacher))
            yield from ((*names, loss) for names in zip(*layers, strict=False))
        elif pair is not None:
            yield (*pair, loss)


def _inside(maps: Tensor, shares: Sequence[tuple[float, float]]) -> list[Tensor]:
    """(K, M, H, W) -> (M, h, w) per image, without its padding."""
    height, width = maps.shape[-2:]
    return [
        x[:, : math.ceil(height * rows), : math.ceil(width * columns)]
        for x, (rows, columns) in zip(maps, shares, strict=True)
    ]


def _pooled(maps: Sequence[Tensor]) -> Tensor:
    """Pool to at most SIDE locations per side, with one size for all images: (K, M, h, w)."""
    height, width = (min(SIDE, max(x.shape[axis] for x in maps)) for axis in (-2, -1))
    return torch.stack([F.adaptive_avg_pool2d(x, (height, width)) for x in maps])


def _scaled(maps: Iterable[Tensor]) -> list[Tensor]:
    """Divide each image's maps by their largest value."""
    return [x / x.amax().clamp_min(1e-12) for x in maps]


def _statistics(masks: Tensor) -> list[float]:
    """Mean, standard deviation over locations and Dice overlap of the masks (M, P) of one image."""
    return [masks.mean().item(), masks.std(dim=1, correction=0).mean().item(), dice_overlap(masks[None]).item()]


def _bytes(maps: Iterable[Tensor]) -> npt.NDArray[np.uint8]:
    stacked: npt.NDArray[np.uint8] = (255 * torch.stack(list(maps))).round().byte().cpu().numpy()
    return stacked
