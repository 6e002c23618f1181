"""Order in which the processes read images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, distributed
from torch.utils.data import Sampler

from acamkd.data.dataset import seed_of
from acamkd.processes import is_distributed

TOGETHER = 4
"""Shards or row groups whose images are mixed with each other."""


class SeededSampler(Sampler[int]):
    """Shuffled keys of one epoch, which depend only on (seed, epoch).

    The sampler passes over the data set repeatedly, each time in a new order. An epoch is one pass, or the next
    `length` keys of every process. In a distributed run, every process takes an equal share of the common order.
    Lightning must not shard it again (`Trainer(use_distributed_sampler=False)`), because its wrapper hides `set_epoch`.

    Args:
        n: Length of the data set.
        seed: Seed of the order.
        length: Keys per process and epoch; None for one pass.
        groups: Lengths of the runs of images that lie together; see ImageDataset. The groups come in random order, and
            the images of TOGETHER groups at a time are mixed, so that few places of a disk are read at once.
    """

    def __init__(self, n: int, seed: int, length: int | None = None, groups: Sequence[int] | None = None) -> None:
        self.n = n
        self.seed = seed
        self.length = length
        self.groups = groups
        self.epoch = 0
        self.begin = (0, 0)
        """(epoch, keys): the epoch that a resumed run starts in its middle, and the number of its keys already seen."""

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration; Lightning calls this."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length or self.n // rank_and_world_size()[1]

    def __iter__(self) -> Iterator[int]:
        epoch, seen = self.begin
        return iter(self.keys()[seen if epoch == self.epoch else 0 :])

    def keys(self) -> list[int]:
        """Keys of this process for the whole current epoch."""
        rank, processes = rank_and_world_size()
        count = len(self) * processes
        start = self.epoch * (count if self.length else self.n)
        passes = range(start // self.n, -(-(start + count) // self.n))
        order = torch.cat([self._pass(number) for number in passes])[start - passes[0] * self.n :]
        keys: list[int] = order[rank:count:processes].tolist()
        return keys

    def _pass(self, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed_of("order", self.seed, number))
        if self.groups is None:
            return number * self.n + torch.randperm(self.n, generator=generator)
        runs = torch.split(number * self.n + torch.arange(self.n), list(self.groups))
        mixed = []
        for drawn in torch.split(torch.randperm(len(runs), generator=generator), TOGETHER):
            keys = torch.cat([runs[group] for group in drawn])
            mixed.append(keys[torch.randperm(len(keys), generator=generator)])
        return torch.cat(mixed)


class DistributedSequentialSampler(Sampler[int]):
    """Every image once, in order; several processes share the images, and none repeats one.

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
    if is_distributed():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1
