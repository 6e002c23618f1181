"""Batch loader that can start in the middle of an epoch and knows the files of every batch."""

from __future__ import annotations

import atexit
import multiprocessing
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from acamkd import stopwatch
from acamkd.data.dataset import ImageDataset
from acamkd.data.samplers import SeededSampler
from acamkd.data.unlabeled import WithUnlabeled
from acamkd.errors import AcamkdError
from acamkd.models.base import Target
from acamkd.stopwatch import timed

Images: TypeAlias = tuple[list[Tensor], list[Target]]

KILLED = 5.0
"""Seconds to wait for the end of a killed process, which a hanging file system can delay."""
ALIGNMENT = 16
"""Tensors in a shared block of memory start at multiples of this many bytes."""


class ImageLoader(DataLoader[Any]):
    """Batches as (list of images, list of targets), and a list of unlabeled images where there are some.

    Its processes ignore SIGTERM; only `close` or the end of the program ends them.

    Args:
        dataset: The images.
        sampler: Keys of one epoch.
        workers: Processes that load images; 0 loads in this one.
        options: Options of torch's DataLoader.
    """

    dataset: ImageDataset | WithUnlabeled

    def __init__(
        self, dataset: ImageDataset | WithUnlabeled, sampler: Sampler[int], workers: int, **options: Any
    ) -> None:
        super().__init__(
            dataset, sampler=sampler, num_workers=workers, persistent_workers=workers > 0,
            collate_fn=_packed if workers else _as_lists, worker_init_fn=_be_ended, **options,
        )  # fmt: skip
        _LOADERS.add(self)
        dataset.reading = torch.full((workers, 2), -1).share_memory_() if workers else None  # type: ignore[no-untyped-call]

    def __iter__(self) -> Any:
        # A generator, which reads nothing before the first batch is asked for: Lightning makes iterators early, and
        # tells the sampler its epoch, and `begin` where to begin, later.
        try:
            for batch in super().__iter__():
                yield batch.unpacked() if isinstance(batch, _Block) else batch
        except (ConnectionError, EOFError) as error:  # the loading process ended while it handed over a batch
            time.sleep(0.5)  # its sockets close a moment before it is reported dead
            alive = {process.pid for process in multiprocessing.active_children()}
            raise _death("has ended", [self], lambda pid: pid not in alive) from error

    def close(self) -> None:
        """End the loading processes; the next iteration starts new ones."""
        iterator: Any = self._iterator
        self._iterator = None
        if iterator is None or not self.num_workers:
            return
        iterator._shutdown_workers()
        for worker in iterator._workers:
            if worker.is_alive():  # still decoding a slow image
                worker.kill()
                worker.join(KILLED)

    def begin(self, epoch: int, batches: int) -> None:
        """Skip the first batches of this epoch; every other epoch starts at its first batch."""
        assert isinstance(self.sampler, SeededSampler)
        self.sampler.begin = (epoch, batches * self._size)

    def files(self, batch: int) -> list[Path]:
        """The image files of one batch of the current epoch in this process; batches count from 0."""
        assert isinstance(self.sampler, SeededSampler)
        keys = self.sampler.keys()[batch * self._size : (batch + 1) * self._size]
        return [file for key in keys for file in self.dataset.sources(key)]

    @property
    def _size(self) -> int:
        assert self.batch_size is not None
        return self.batch_size


_LOADERS: WeakSet[ImageLoader] = WeakSet()


@atexit.register
def _close_all() -> None:
    """Runs before multiprocessing's own exit, which would wait forever for processes that ignore its SIGTERM."""
    for loader in tuple(_LOADERS):
        loader.close()


@contextmanager
def reading(*loaders: ImageLoader) -> Iterator[None]:
    """Close loaders at the end of the context, also after an error.

    The death of a loading process, which torch may report at any time, becomes an error that names its image.
    """
    try:
        yield
    except RuntimeError as error:
        found = re.search(r"DataLoader worker \(pid\(?s?\)? ([\d, ]+)\)", str(error))
        if not found:
            raise
        dead = {int(pid) for pid in found[1].split(",")}
        reason = str(error).partition(str(found[0]))[2].partition(".")[0].strip()
        raise _death(reason, loaders, dead.__contains__) from error
    finally:
        for loader in loaders:
            loader.close()


def _death(what: str, loaders: Sequence[ImageLoader], is_dead: Callable[[int], bool]) -> AcamkdError:
    held = [
        str(file)
        for loader in loaders
        if loader.dataset.reading is not None
        for pid, key in loader.dataset.reading.tolist()
        if pid > 0 and is_dead(pid)
        for file in loader.dataset.sources(key)
    ]
    if not held and multiprocessing.get_start_method() != "fork":
        return AcamkdError(
            f"a process that loads images {what} before it read any. Such a process first imports the script that "
            'started it: put all that the script does below a line `if __name__ == "__main__":`, or set data.workers=0'
        )
    return AcamkdError(
        f"a process that loads images {what}; the last that it read was {', '.join(held) or 'none'}. If memory ran "
        "out, lower data.workers or train.batch_size; otherwise look at that image"
    )


def _be_ended(_: int) -> None:
    """Set up a loading process so that only the training process ends it."""
    stopwatch.begin_process()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # schedulers send SIGTERM to every process
    # By this hook multiprocessing prints that training has ended amid a hand-over, and nothing else: every other
    # exception is sent to the training process.
    sys.excepthook = lambda *_: None


def _as_lists(samples: Sequence[tuple[Any, ...]]) -> tuple[list[Any], ...]:
    return tuple(map(list, zip(*samples, strict=True)))


@dataclass(frozen=True)
class _Place:
    """Location of a tensor in a block: first byte, shape and type."""

    start: int
    shape: torch.Size
    dtype: torch.dtype

    def view(self, memory: Tensor) -> Tensor:
        """The tensor within a block's memory."""
        size = self.shape.numel() * self.dtype.itemsize
        return memory[self.start : self.start + size].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class _Block:
    """A batch in transfer between processes, as one block of memory: each shared tensor would keep a file open.

    Attributes:
        memory: (bytes,) uint8.
        batch: The batch, with a `_Place` for every tensor.
        seconds: That its process took, by part, while somebody measures.
    """

    memory: Tensor
    batch: Any
    seconds: Mapping[str, float]

    def pin_memory(self) -> _Block:
        """The same in memory from which a GPU copies beside the program; torch calls this."""
        return replace(self, memory=self.memory.pin_memory())

    def unpacked(self) -> Any:
        """The batch, as views of the block."""
        watch = stopwatch.current()
        if watch is not None and watch.current not in watch.whole:  # an evaluation's images are not counted either
            for part, seconds in self.seconds.items():
                watch.beside[part] += seconds
        return _changed(self.batch, lambda part: part.view(self.memory) if isinstance(part, _Place) else part)


def _packed(samples: Sequence[tuple[Any, ...]]) -> _Block:
    found: list[tuple[_Place, Tensor]] = []
    size = 0

    def place(part: Any) -> Any:
        nonlocal size
        if not isinstance(part, Tensor):
            return part
        found.append((_Place(size, part.shape, part.dtype), part))
        size += -(-part.nbytes // ALIGNMENT) * ALIGNMENT
        return found[-1][0]

    with timed("collation"):
        batch = _changed(_as_lists(samples), place)
        memory = torch.empty(size, dtype=torch.uint8).share_memory_()  # type: ignore[no-untyped-call]
        for where, tensor in found:
            where.view(memory).copy_(tensor)
    seconds: dict[str, float] = {}
    if watch := stopwatch.current():
        seconds = dict(watch.seconds)
        watch.reset()
    return _Block(memory, batch, seconds)


def _changed(batch: Any, change: Callable[[Any], Any]) -> Any:
    """Apply a function to every leaf of nested lists, tuples and mappings."""
    if isinstance(batch, dict):
        return {name: _changed(part, change) for name, part in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(_changed(part, change) for part in batch)
    return change(batch)
