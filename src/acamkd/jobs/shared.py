"""What trainings of one comparison compute alike: augmented images, a teacher's feature maps and its scores."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch

from acamkd import config
from acamkd.data.disk_cache import DiskCache, Shelf
from acamkd.distillation.distiller import Distiller
from acamkd.distillation.teacher_maps import SharedMaps
from acamkd.engine.devices import device_of
from acamkd.engine.machine import processor
from acamkd.jobs.setup import Loaders

LIBRARIES = ("acamkd", "torch", "torchvision", "timm", "segmentation-models-pytorch", "transformers", "numpy")
"""Other versions of these may compute other numbers."""

ROUNDING_KEYS = frozenset({"precision", "channels_last", "compile", "batch_size"})
"""Keys of a recipe's `train` that decide how a teacher's forward rounds."""


@dataclass(frozen=True)
class SharedWork:
    """A cache on disk, and what trainings keep in it.

    Args:
        folder: Of the cache.
        limit: Bytes that it may take.
        half: Keep feature maps in float16; otherwise exactly.
    """

    folder: Path
    limit: int
    half: bool = False

    def share_images(self, batches: Loaders) -> None:
        """Let data sets share their augmented images; after `Batches.check`, which computes the fingerprints."""
        for name, images in batches.training_images.items():
            identity = (batches.identity(name), images.seed, _versions())
            images.shared = Shelf(self._cache, "augmented images", identity)

    def share_maps(self, distiller: Distiller, batches: Loaders, teacher: str, *, calibrating: bool = False) -> None:
        """Let a Distiller share its teacher's feature maps; `teacher` is the hash of the weights.

        A calibration runs before the training's precision and memory format are set, and so has entries of its own.
        """
        recipe = batches.resolved
        form = distiller.teacher_form(device_of(recipe.train))
        identity = (calibrating, teacher, _network(recipe, distiller), form, self.half, _machine(recipe))
        distiller.shared_maps = SharedMaps(Shelf(self._cache, "the teacher's feature maps", identity), half=self.half)

    def scores(self, distiller: Distiller, batches: Loaders, teacher: str) -> dict[str, float] | None:
        """The teacher's scores on the validation images; None before any training has kept them."""
        entry = self._cache.get(self._scores_key(distiller, batches, teacher))
        return None if entry is None else {name: value.item() for name, value in entry.items()}

    def keep_scores(self, distiller: Distiller, batches: Loaders, teacher: str, scores: dict[str, float]) -> None:
        """Keep what `scores` then gives."""
        entry = {name: torch.tensor(value, dtype=torch.float64) for name, value in scores.items()}
        self._cache.put(self._scores_key(distiller, batches, teacher), entry)

    def _scores_key(self, distiller: Distiller, batches: Loaders, teacher: str) -> str:
        recipe = batches.resolved
        return repr((
            "scores", teacher, batches.identity("val"), _network(recipe, distiller), recipe.student.options,
            _machine(recipe),
        ))  # fmt: skip

    @property
    def _cache(self) -> DiskCache:
        return DiskCache(self.folder, self.limit)


def _network(recipe: config.Recipe, distiller: Distiller) -> str:
    """What a teacher is beside its weights."""
    assert recipe.teacher is not None
    colors = [x.flatten().tolist() for x in (distiller.teacher.mean, distiller.teacher.std)]
    return f"{recipe.teacher.model_dump_json(exclude={'weights', 'backbone_weights'})} {colors}"


def _machine(recipe: config.Recipe) -> str:
    """What the rounding depends on: precision, libraries, device and its instructions."""
    device = device_of(recipe.train)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{processor()} {platform.machine()}"
    instructions = torch.backends.cpu.get_cpu_capability(), os.environ.get("ONEDNN_MAX_CPU_ISA")
    return f"{recipe.train.model_dump_json(include=set(ROUNDING_KEYS))} {name} {instructions} {_versions()}"


def _versions() -> list[str]:
    present = [name for name in LIBRARIES if find_spec(name.replace("-", "_"))]
    return [f"{name} {version(name)}" for name in (*present, "pillow")]
