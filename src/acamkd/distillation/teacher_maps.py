"""SharedMaps: a frozen teacher's feature maps, computed once for all trainings that see the same batches."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from acamkd.data.disk_cache import Shelf, Tensors
from acamkd.models.base import Batch


class SharedMaps:
    """Reads what a teacher gives at its tapped layers, and runs the teacher only for layers that are not there.

    A key is made of the padded input's pixels and of the layer. It therefore holds whatever decides the pixels: images,
    augmentation, seed, epoch, and which images share a batch, which decides padding and rounding.

    Args:
        shelf: Its identity names everything else: the teacher's weights, precision and the machine.
        half: Round the feature maps to float16, those that are computed too; otherwise they are exact to the bit.
    """

    def __init__(self, shelf: Shelf, *, half: bool = False) -> None:
        self.shelf = shelf
        self.half = half

    def __call__(
        self, batch: Batch, names: Sequence[str], run: Callable[[Sequence[str]], Tensors]
    ) -> dict[str, Tensor]:
        """Feature maps of a batch by tap.

        Args:
            batch: The teacher's input.
            names: Taps.
            run: Runs the teacher up to the last of some taps and gives what they recorded, `*` expanded.
        """
        begun = time.perf_counter()
        device = batch.pixels.device
        inputs = _described(batch) if self.shelf.pays else ""

        def computed(keys: list[str]) -> dict[str, Tensors]:
            taps = [key.removeprefix(inputs) for key in keys]
            maps = {name: self._rounded(x) for name, x in run(taps).items()}
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # whoever asks wants to know how long it took
            # A tap with `*` stands for several maps, of which it gets all.
            return {inputs + tap: {tap: maps[tap]} if tap in maps else maps for tap in taps}

        found = self.shelf.fetch([inputs + name for name in names], computed, overhead=time.perf_counter() - begun)
        return {name: self._restored(x, device) for entry in found.values() for name, x in entry.items()}

    def _rounded(self, x: Tensor) -> Tensor:
        return x.half() if self.half and x.is_floating_point() else x

    def _restored(self, x: Tensor, device: torch.device) -> Tensor:
        return (x.float() if self.half and x.dtype == torch.float16 else x).to(device)


def _described(batch: Batch) -> str:
    """Everything of a batch that a teacher in eval mode reads, and what decides its rounding."""
    kind = batch.pixels.device.type
    digest = hashlib.sha256(batch.pixels.detach().cpu().contiguous().numpy().data)
    rounding = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
    threads = torch.get_num_threads() if kind == "cpu" else 0
    return f"{digest.hexdigest()} {tuple(batch.pixels.shape)} {batch.sizes} {kind} {rounding} {threads} "
