"""Loading: batches that can begin in the middle of an epoch, and that know which files they came from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor
from torch.utils.data import DataLoader

from acamkd.data.base import PictureDataset, SeededSampler
from acamkd.data.unlabelled import WithUnlabelled
from acamkd.models.base import Target

Pictures: TypeAlias = tuple[list[Tensor], list[Target]]


class PictureLoader(DataLoader[Any]):
    """Batches as (list of pictures, list of targets), and a list of unlabelled pictures where there are some.

    Args:
        dataset: The pictures.
        sampler: Keys of one epoch; None reads every picture once, in order.
        options: As of torch's DataLoader.
    """

    dataset: PictureDataset | WithUnlabelled

    def __init__(self, dataset: PictureDataset | WithUnlabelled, sampler: SeededSampler | None, **options: Any) -> None:
        super().__init__(dataset, sampler=sampler, collate_fn=_as_lists, **options)

    def __iter__(self) -> Iterator[Any]:
        # A generator, which reads nothing before the first batch is asked for: Lightning makes iterators early, and
        # tells the sampler its epoch, and `begin` where to begin, later.
        yield from super().__iter__()

    def begin(self, epoch: int, batches: int) -> None:
        """Leave out this epoch's first batches; every other epoch begins at its beginning."""
        assert isinstance(self.sampler, SeededSampler)
        self.sampler.begin = (epoch, batches * self._size)

    def files(self, batch: int) -> list[Path]:
        """The pictures of one batch of the current epoch in this process; batches count from 0."""
        assert isinstance(self.sampler, SeededSampler)
        keys = self.sampler.keys()[batch * self._size : (batch + 1) * self._size]
        return [file for key in keys for file in self.dataset.sources(key)]

    @property
    def _size(self) -> int:
        assert self.batch_size is not None
        return self.batch_size


def _as_lists(samples: Sequence[tuple[Any, ...]]) -> tuple[list[Any], ...]:
    return tuple(map(list, zip(*samples, strict=True)))
