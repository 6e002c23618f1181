"""In which order images are read, by which process."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, distributed
from torch.utils.data import Sampler

from acamkd.data.dataset import seed_of


class SeededSampler(Sampler[int]):
    """Shuffled keys of one epoch, a function of (seed, epoch) alone.

    Pass after pass over the data set, each in an order of its own; an epoch is one pass, or the next `length` keys of
    every process. In a distributed run every process takes its own equal share of the common order; Lightning must not
    shard it once more (`Trainer(use_distributed_sampler=False)`), because its wrapper keeps `set_epoch` from arriving
    here.

    Args:
        n: Length of the data set.
        seed: Of the order.
        length: Keys per process and epoch; None for one pass.
    """

    def __init__(self, n: int, seed: int, length: int | None = None) -> None:
        self.n = n
        self.seed = seed
        self.length = length
        self.epoch = 0
        self.begin = (0, 0)
        """(epoch, keys): the one epoch that a resumed run begins in its middle, and how many of its keys were seen."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration belongs to; Lightning calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length or self.n // rank_and_world_size()[1]

    def __iter__(self) -> Iterator[int]:
        epoch, seen = self.begin
        return iter(self.keys()[seen if epoch == self.epoch else 0 :])

    def keys(self) -> list[int]:
        """This process's keys of the whole current epoch."""
        rank, processes = rank_and_world_size()
        count = len(self) * processes
        start = self.epoch * (count if self.length else self.n)
        passes = range(start // self.n, -(-(start + count) // self.n))
        order = torch.cat([self._pass(number) for number in passes])[start - passes[0] * self.n :]
        keys: list[int] = order[rank:count:processes].tolist()
        return keys

    def _pass(self, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed_of("order", self.seed, number))
        return number * self.n + torch.randperm(self.n, generator=generator)


class DistributedSequentialSampler(Sampler[int]):
    """Every image once, in order; of several processes each takes its share, and none repeats an image.

    Args:
        n: Length of the data set.
    """

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return len(self._share())

    def __iter__(self) -> Iterator[int]:
        return iter(self._share())

    def _share(self) -> range:
        rank, processes = rank_and_world_size()
        return range(rank, self.n, processes)


def rank_and_world_size() -> tuple[int, int]:
    """Rank of this process and number of processes."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1
