"""Copies of images: identical files, and near-duplicates of another size or quality."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from acamkd.data.packed import open_binary, size_of

Hash: TypeAlias = npt.NDArray[np.uint8]
"""(32,): 256 bits."""

GRID = 16
"""Rows and columns of bits."""

MARGIN = 2
"""A bit is set if the neighbor is lighter by this many gray levels; noise in a flat area sets none."""

NEAREST = 32
"""Bits by which copies may differ. Half the size, or JPEG at quality 40, changes 16 to 24, another focus of the same
slide 25; the closest unrelated photographs of five data sets differ by 48."""

START = 4096
"""Bytes at the start of a file that are compared first."""


def difference_hash(pixels: Tensor) -> Hash:
    """Hash of an image: where it gets lighter from left to right, on a grid of 16 x 17 means.

    The library imagehash offers the same but needs SciPy and PyWavelets. This function needs neither, and uses pixels
    that are already decoded.

    Source:
        N. Krawetz, "Kind of Like That", 2013, https://www.hackerfactor.com/blog/index.php?/archives/529-Kind-of-Like-That.html

    Args:
        pixels: (3, H, W) uint8.
    """
    green = Image.fromarray(pixels[1].numpy())  # most of the brightness
    means = np.asarray(green.resize((GRID + 1, GRID), Image.Resampling.BOX), dtype=np.int16)
    return np.packbits(means[:, 1:] > means[:, :-1] + MARGIN)


def near_copies(hashes: npt.NDArray[np.uint8], others: npt.NDArray[np.uint8]) -> list[tuple[int, int]]:
    """(index, index in `others`) of each image that looks like another one; the closest one is given.

    Args:
        hashes: (N, 32), of `difference_hash`.
        others: (M, 32).
    """
    if not len(hashes) or not len(others):
        return []
    bits, other_bits = (torch.from_numpy(np.unpackbits(each, axis=1)) for each in (hashes, others))
    signs = other_bits.float() * 2 - 1
    found = []
    for begin in range(0, len(bits), 256):
        chunk = bits[begin : begin + 256].float()
        distances = (GRID**2 - (chunk * 2 - 1) @ signs.T) / 2
        nearest, which = distances.min(dim=1)
        # A flat image has almost no bits set, and resembles every other flat image.
        allowed = (chunk.sum(dim=1) / 3).clamp(max=NEAREST)
        alike = ((nearest <= allowed) & (allowed >= 2)).nonzero()[:, 0].tolist()
        found += [(begin + row, int(which[row])) for row in alike]
    return found


def identical(files: Iterable[Path], others: Iterable[Path] | None = None) -> list[tuple[Path, Path]]:
    """Pair each file with another one of the same bytes.

    Only files that share their size and their first bytes with another one are read completely.

    Args:
        files: Paths; those that do not exist are no copies.
        others: Where to look for copies. None = among `files`; each is then paired with the first identical one.
    """
    first = list(dict.fromkeys(files))
    second = first if others is None else list(dict.fromkeys(others))
    groups = [(first, second)]
    with ThreadPoolExecutor() as pool:
        for key in (_size, _start, _content):
            groups = [split for group in groups for split in _split(group, key, pool)]
    if others is None:
        return [(file, own[0]) for own, _ in groups for file in own[1:]]
    return [(file, copies[0]) for own, copies in groups for file in own]


def _split(
    group: tuple[Sequence[Path], Sequence[Path]], key: Callable[[Path], Hashable], pool: ThreadPoolExecutor
) -> Iterable[tuple[list[Path], list[Path]]]:
    """Group files by a key; only groups with files of both kinds, and at least two, are kept."""
    everything = list(dict.fromkeys([*group[0], *group[1]]))
    keys = dict(zip(everything, pool.map(key, everything), strict=True))
    split: dict[Hashable, tuple[list[Path], list[Path]]] = defaultdict(lambda: ([], []))
    for side in (0, 1):
        for file in group[side]:
            split[keys[file]][side].append(file)
    return [
        pair for key, pair in split.items() if key is not None and pair[0] and pair[1] and len({*pair[0], *pair[1]}) > 1
    ]


def _size(file: Path) -> Hashable:
    with suppress(OSError):
        return size_of(file)
    return None


def _start(file: Path) -> Hashable:
    with suppress(OSError), open_binary(file) as stream:
        return stream.read(START)
    return None


def _content(file: Path) -> Hashable:
    with suppress(OSError), open_binary(file) as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
        return digest.digest()
    return None
