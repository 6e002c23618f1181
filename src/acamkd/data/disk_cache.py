"""Tensors that several trainings compute alike, on disk by key: each is computed once and then read."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import TypeAlias

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from acamkd.stopwatch import timed

log = logging.getLogger(__name__)

Tensors: TypeAlias = dict[str, Tensor]

RESERVE = 2 << 30
"""Bytes of the disk that stay free, for the checkpoints of the trainings."""

TRIES = 8
"""After so many entries that were computed, written and read again, it is decided whether reading pays."""

WORTH = 0.5
"""Reading must take at most this share of the time that computing takes."""

ABANDONED = 3600.0
"""Seconds after which an unfinished file is taken for one of a killed process."""


class DiskCache:
    """A folder of tensors by key, which processes fill and read beside each other.

    A file appears whole or not at all, so that any process may be killed. The folder may be deleted at any time. What
    cannot be written is left out, and the log says so once.

    Args:
        folder: Where the files are; made with the first of them.
        limit: Bytes of all files; None = as far as the disk has RESERVE left. Processes that write at the same time
            may pass it by an eighth.
    """

    def __init__(self, folder: Path, limit: int | None = None) -> None:
        self.folder = folder
        self.limit = limit
        self.is_full = False
        self._allowance = 0.0
        """Bytes that this process may write before it looks at the folder again."""

    def get(self, key: str) -> Tensors | None:
        """The tensors of a key; None where it is missing or damaged."""
        try:
            return _unpacked(self._file(key).read_bytes())
        except (OSError, SafetensorError):
            return None

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep the tensors of a key, unless there is no room."""
        if self.is_full:
            return
        file, content = self._file(key), _packed(tensors)
        unfinished = file.with_name(f".{file.name}.{os.getpid()}.{threading.get_ident()}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            if not self._has_room(len(content)):
                return
            unfinished.write_bytes(content)
            unfinished.replace(file)
        except OSError as error:
            self._stop(error.strerror or str(error))
            with suppress(OSError):
                unfinished.unlink()

    def _file(self, key: str) -> Path:
        name = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:40]
        return self.folder / name[:2] / f"{name}.safetensors"

    def _has_room(self, size: int) -> bool:
        if self._allowance < size:
            left = float(shutil.disk_usage(self.folder).free - RESERVE)
            if self.limit is not None:
                left = min(left, self.limit - _used(self.folder))
            if left < max(size, (self.limit or 0) / 100):
                limit = "" if self.limit is None else f" of {self.limit / 1e9:g} GB is reached, or its disk"
                self._stop(f"its limit{limit} has {max(0.0, left) / 1e9:.2g} GB left")
                return False
            self._allowance = max(size, left / 8)
        self._allowance -= size
        return True

    def _stop(self, why: str) -> None:
        self.is_full = True
        log.warning("the cache %s keeps nothing more (%s); what is there is used", self.folder, why)


class MemoryCache:
    """The same in this process's own memory, without a limit."""

    is_full = False

    def __init__(self) -> None:
        self._kept: dict[str, bytes] = {}

    def get(self, key: str) -> Tensors | None:
        """The tensors of a key; None where it is missing."""
        content = self._kept.get(key)
        return None if content is None else _unpacked(content)

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep the tensors of a key."""
        self._kept[key] = _packed(tensors)


class Shelf:
    """One kind of entries in a cache; it is left as soon as reading turns out to take longer than computing.

    Args:
        cache: Where the entries are.
        kind: What they are, for the log.
        identity: Everything that they depend on beside their keys; its `repr` counts.
    """

    def __init__(self, cache: DiskCache | MemoryCache, kind: str, identity: object) -> None:
        self.cache = cache
        self.kind = kind
        self.identity = hashlib.sha256(repr((kind, identity)).encode()).hexdigest()
        self.pays = True
        self._times: list[tuple[float, float]] = []

    def fetch(
        self, keys: Sequence[str], compute: Callable[[list[str]], Mapping[str, Tensors]], *, overhead: float = 0.0
    ) -> dict[str, Tensors]:
        """The entries of some keys, read or computed.

        Args:
            keys: What is asked for.
            compute: Gives the entries of those keys that are not there, which are then kept.
            overhead: Seconds that the keys themselves took, which count as reading.
        """
        if not self.pays:
            return dict(compute(list(keys)))
        with timed("cache"):
            found = {key: self.cache.get(self.identity + key) for key in keys}
        missing = [key for key, entry in found.items() if entry is None]
        if missing:
            begun = time.perf_counter()
            computed = compute(missing)
            took = time.perf_counter() - begun
            with timed("cache"):
                for key in missing:
                    self.cache.put(self.identity + key, computed[key])
            if len(self._times) < TRIES and not self.cache.is_full and len(missing) == len(keys):
                self._judge(took, missing, overhead)
            found.update(computed)
        return {key: entry for key, entry in found.items() if entry is not None}

    def _judge(self, took: float, keys: Sequence[str], overhead: float) -> None:
        begun = time.perf_counter()
        for key in keys:
            self.cache.get(self.identity + key)
        self._times.append((took, time.perf_counter() - begun + overhead))
        if len(self._times) < TRIES:
            return
        computing, reading = (median(times) for times in zip(*self._times, strict=True))
        self.pays = reading <= WORTH * computing
        log.info("cache of %s: reading takes %.2g ms, computing %.2g: %s", self.kind, 1e3 * reading, 1e3 * computing,
                 "it pays" if self.pays else "it would not pay and is left")  # fmt: skip


def _used(folder: Path) -> int:
    """Bytes of all files below a folder; abandoned ones are removed."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            file = Path(path, name)
            with suppress(OSError):  # another process has finished it
                status = file.stat()
                if name.startswith(".") and time.time() - status.st_mtime > ABANDONED:
                    file.unlink()
                else:
                    total += status.st_size
    return total


def _packed(tensors: Mapping[str, Tensor]) -> bytes:
    """A safetensors file; each name says the place, the type and the strides that the tensor had."""
    named = {}
    for place, (name, tensor) in enumerate(tensors.items()):
        kind = str(tensor.dtype).removeprefix("torch.")
        strides = "" if tensor.is_contiguous() else ",".join(map(str, tensor.stride()))
        plain = tensor.detach().cpu()
        if plain.dtype == torch.int64 and plain.numel() and plain.amin() >= 0 and plain.amax() <= 255:
            plain = plain.to(torch.uint8)  # masks
        named[f"{place:04}|{kind}|{strides}|{name}"] = plain.contiguous()
    return safetensors.torch.save(named)


def _unpacked(content: bytes) -> Tensors:
    tensors = {}
    for stored, tensor in sorted(safetensors.torch.load(content).items()):
        _, kind, strides, name = stored.split("|", 3)
        dtype = getattr(torch, kind)
        # A copy: the tensors of the file lie at any address, and what is computed from them may depend on that.
        if strides:
            fresh = torch.empty_strided(tensor.shape, [int(stride) for stride in strides.split(",")], dtype=dtype)
        else:
            fresh = torch.empty(tensor.shape, dtype=dtype)
        tensors[name] = fresh.copy_(tensor)
    return tensors
