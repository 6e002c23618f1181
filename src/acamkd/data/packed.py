"""Files inside tar and Parquet files, named by paths that go on below these: shards/train-000000.tar/000017.jpg.

Such a path goes wherever an image's path goes, and two processes that know it read the same bytes. A tar file is read
at the offset of one file alone, a Parquet file by its row groups.
"""

from __future__ import annotations

import errno
import json
import os
import tarfile
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from io import BytesIO
from itertools import accumulate
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import Any, BinaryIO, TypeAlias
from urllib.parse import quote, unquote

from acamkd.errors import AcamkdError
from acamkd.files import written_whole

Members: TypeAlias = Mapping[str, tuple[int, int]]
"""Name of each file in a tar file -> (offset, size) in bytes, in their order there."""

KEPT_GROUPS = 8
"""Row groups of one column that a process keeps decoded."""

_reading = Lock()


def open_binary(file: Path) -> BinaryIO:
    """Open a file, or a file inside a tar or Parquet file, for reading; raises OSError if there is none."""
    found = read_packed(file)
    return file.open("rb") if found is None else BytesIO(found)


def size_of(file: Path) -> int:
    """Size in bytes; raises OSError if there is no such file."""
    container = _container(file)
    if container is not None and container.suffix == ".tar":
        return _member(container, file)[1]
    found = read_packed(file)
    return file.stat().st_size if found is None else len(found)


def stamp_of(file: Path) -> tuple[int, int]:
    """Size in bytes and time of the last change of a file, or of what holds it; raises OSError if there is none."""
    status = (_container(file) or file).stat()
    return status.st_size, status.st_mtime_ns


def read_packed(file: Path) -> bytes | None:
    """Content of a file inside a tar or Parquet file; None if the path is an ordinary one.

    Raises:
        OSError: The tar or Parquet file cannot be read, or holds no such file.
    """
    container = _container(file)
    return None if container is None else _READERS[container.suffix](container, file)


def tar_members(tar: Path) -> Members:
    """List the files in a tar file, and keep the list beside it in NAME.tar.index for the next time.

    Raises:
        AcamkdError: The file cannot be read, or is no whole tar file without compression.
    """
    try:
        return _members(tar)
    except OSError as error:
        raise AcamkdError(f"cannot read {tar}: {error.strerror or error}") from error


def parquet_file(file: Path) -> Any:
    """Open a Parquet file with pyarrow.

    Raises:
        AcamkdError: pyarrow is not installed, or the file cannot be read.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise AcamkdError("Parquet files need pyarrow: pip install 'acamkd[parquet]'") from error
    try:
        # Mapped, so that processes share no position in the file.
        return pyarrow.parquet.ParquetFile(file, memory_map=True)
    except (OSError, pyarrow.ArrowException) as error:
        raise AcamkdError(f"cannot read {file}: {error}") from error


def cell_path(parquet: Path, column: str, row: int) -> Path:
    """The path of one cell of a Parquet file: an image's bytes, or anything else as JSON."""
    return parquet / quote(column, safe="") / f"{row:06d}"


def _container(file: Path) -> Path | None:
    """The tar or Parquet file that a path goes on below."""
    if not any(f"{suffix}{os.sep}" in str(file) for suffix in _READERS):  # what every ordinary image ends with
        return None
    return next((each for each in file.parents if each.suffix in _READERS and each.is_file()), None)


def _member(tar: Path, file: Path) -> tuple[int, int]:
    found = _members(tar).get(file.relative_to(tar).as_posix())
    if found is None:
        raise FileNotFoundError(2, "there is no such file in the tar file", str(file))
    return found


def _from_tar(tar: Path, file: Path) -> bytes:
    offset, size = _member(tar, file)
    with tar.open("rb") as stream:
        stream.seek(offset)
        return stream.read(size)


def _members(tar: Path) -> Members:
    status = tar.stat()
    return _indexed(tar, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=64)
def _indexed(tar: Path, size: int, changed: int) -> Members:
    index, stamp = tar.with_name(f"{tar.name}.index"), [size, changed]
    with suppress(OSError, ValueError, KeyError, TypeError):
        stored = json.loads(index.read_bytes())
        if stored["stamp"] == stamp:
            return {name: (offset, length) for name, offset, length in stored["members"]}
    members = _listed(tar)
    text = json.dumps({"stamp": stamp, "members": [(name, *place) for name, place in members.items()]})
    with suppress(OSError), written_whole(index, durable=False) as unfinished:  # the folder may be read-only
        unfinished.write_text(text, encoding="utf-8")
    return members


def _listed(tar: Path) -> Members:
    try:
        with tarfile.open(tar, "r:") as content:
            entries = list(content)
    except tarfile.TarError as error:
        raise AcamkdError(
            f"{tar} is no whole tar file whose images can be read one by one: {error}; copy it again, and pack a "
            "compressed one again without compression"
        ) from error
    if links := [each.name for each in entries if each.issym() or each.islnk()]:
        raise AcamkdError(
            f"{tar} holds {links[0]} as a link: pack it again with the files, tar --dereference --hard-dereference"
        )
    files = [each for each in entries if each.isreg()]
    # As paths write it: no ./ or / at the start, no // within.
    return {PurePosixPath(each.name.lstrip("/")).as_posix(): (each.offset_data, each.size) for each in files}


def _from_parquet(parquet: Path, file: Path) -> bytes:
    column, row = file.relative_to(parquet).parts
    column = unquote(column)
    changed = parquet.stat().st_mtime_ns
    with _reading:  # threads would decode one group several times
        starts = _group_starts(parquet, changed)
        group = bisect_right(starts, int(row)) - 1
        found = _cell(parquet, changed, column, group, int(row) - starts[group])
    if isinstance(found, dict) and "bytes" in found:  # as the library datasets stores images
        found = found["bytes"]
        if found is None:
            raise OSError(f"the row holds no image in {column}, at most its path: write the data set with its images")
    return found if isinstance(found, bytes) else json.dumps(found, default=str).encode()


@lru_cache(maxsize=64)
def _group_starts(parquet: Path, changed: int) -> Sequence[int]:
    """First row of each row group."""
    lengths = group_lengths(parquet_file(parquet))
    return [0, *accumulate(lengths)][:-1]


def group_lengths(opened: Any) -> list[int]:
    """Rows of each row group of an open Parquet file."""
    return [opened.metadata.row_group(group).num_rows for group in range(opened.metadata.num_row_groups)]


def _cell(parquet: Path, changed: int, column: str, group: int, place: int) -> Any:
    """One value; raises OSError if its row group is damaged."""
    import pyarrow

    try:
        return _column(parquet, changed, column, group)[place].as_py()
    except pyarrow.ArrowException as error:
        raise OSError(errno.EIO, str(error), str(parquet)) from error


@lru_cache(maxsize=KEPT_GROUPS)
def _column(parquet: Path, changed: int, column: str, group: int) -> Any:
    """One row group of a column, as an Arrow array."""
    # Threads of Arrow's own would not survive the fork of a loading process.
    return parquet_file(parquet).read_row_group(group, columns=[column], use_threads=False).column(column)


_READERS: Mapping[str, Callable[[Path, Path], bytes]] = {".tar": _from_tar, ".parquet": _from_parquet}
