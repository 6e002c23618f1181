"""Folders of images, masks and labels: one rule for names and suffixes in every format."""

from __future__ import annotations

import mimetypes
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from acamkd.errors import AcamkdError
from acamkd.files import IMAGE_SUFFIXES, files_below


class Folder:
    """Visible files of given types in a folder and in all folders below it, found by name.

    A file's name is its path below the folder without suffix. `find` also takes the path with its suffix. If only one
    file fits, it takes another spelling too: other case, another Unicode form, back-slashes, or `%20` for a blank.
    Suffixes match in any case.

    Args:
        path: The folder.
        suffixes: Endings of the files, in lower case.
        without: Folders below it that are skipped.

    Raises:
        AcamkdError: The folder cannot be read.

    Attributes:
        files: The files, sorted by name.
        left_out: Images of types that are not read.
    """

    def __init__(self, path: Path, suffixes: Sequence[str] = IMAGE_SUFFIXES, *, without: Sequence[Path] = ()) -> None:
        self.path = path
        self.suffixes = tuple(suffixes)
        try:
            found = files_below(path, without=without)
        except OSError as error:
            raise AcamkdError(f"cannot read the folder {error.filename or path}: {error.strerror}") from error
        self.files = [file for file in found if file.suffix.lower() in self.suffixes]
        self.left_out = [file for file in found if file.suffix.lower() not in self.suffixes and _is_image(file)]
        names = {file: self.name(file) for file in self.files}
        self._written = {name + file.suffix: file for file, name in names.items()} | {
            name: file for file, name in reversed(names.items())
        }
        self._spelled: dict[str, set[Path]] = {}
        self._last: dict[str, set[Path]] = {}  # by the last part of the name
        for name, file in self._written.items():
            self._spelled.setdefault(_spelling(name), set()).add(file)
            self._last.setdefault(_spelling(PurePosixPath(name).name), set()).add(file)

    def name(self, file: Path) -> str:
        """The name of one of its files."""
        return file.relative_to(self.path).with_suffix("").as_posix()

    def find(self, name: str) -> Path | None:
        """The file of a name; None if there is none, or if several fit and none is spelled exactly so."""
        if name in self._written:
            return self._written[name]
        return _only(self._spelled.get(_spelling(name)) or self._spelled.get(_spelling(unquote(name)), set()))

    def find_end(self, name: str) -> Path | None:
        """The file of the longest end of a path that is a name here."""
        parts = _parts(name)
        return next((file for k in range(len(parts)) if (file := self.find("/".join(parts[k:])))), None)

    def find_ends(self, names: Iterable[str]) -> dict[str, Path]:
        """Files of names that all begin elsewhere: on another machine, as an URL, or in a sub folder that they omit."""
        found = {
            name: self.find_end(name) or _only(self._last.get(_spelling("".join(_parts(name)[-1:])), set()))
            for name in names
        }
        return {name: file for name, file in found.items() if file is not None}

    def described_left_out(self) -> list[str]:
        """A warning about images of other types, if there are any."""
        if not self.left_out:
            return []
        return [
            f"{self.path}: {len(self.left_out)} images of other types are left out ({_some(self.left_out)}); those "
            f"that are read end in {', '.join(self.suffixes)}"
        ]


def existing(path: Path) -> Path:
    """A path, or the existing one of another spelling; see Folder."""
    if path.exists() or path == path.parent:
        return path
    parent = existing(path.parent)
    if not parent.is_dir():
        return path
    fitting = [each for each in parent.iterdir() if _spelling(each.name) == _spelling(path.name)]
    return fitting[0] if len(fitting) == 1 else parent / path.name


def twins(pairs: Iterable[tuple[Path, Path | None]], what: str) -> list[str]:
    """Problems of images that share a file of `what`: their names differ only in suffix, case or folder."""
    first: dict[Path, Path] = {}
    return [
        f"{file}: the image has the same name as {one.name}, and so the same {what}, {shared}: rename one of them"
        for file, shared in pairs
        if shared is not None and (one := first.setdefault(shared, file)) != file
    ]


def described_ends(ends: Mapping[str, Path], where: Path) -> list[str]:
    """A warning of images that `Folder.find_ends` has found, if there are any."""
    return [
        f"{where}: none of its names is there, but {len(ends)} files end alike and are taken instead ({name} is {file})"
        for name, file in list(ends.items())[:1]
    ]


def no_images(folder: Folder) -> list[str]:
    """The problem of a folder without images."""
    if folder.files:
        return []
    return [f"{folder.path}: the folder holds no images ({', '.join(folder.suffixes)})"]


def _spelling(name: str) -> str:
    return unicodedata.normalize("NFC", name.replace("\\", "/")).casefold()


def _parts(name: str) -> tuple[str, ...]:
    return PurePosixPath(unquote(name).replace("\\", "/")).parts


def _only(fitting: Collection[Path]) -> Path | None:
    return next(iter(fitting)) if len(fitting) == 1 else None


def _is_image(file: Path) -> bool:
    kind, _ = mimetypes.guess_type(file.name)
    return kind is not None and kind.startswith("image/")


def _some(files: Iterable[Path]) -> str:
    names = [file.name for file in files]
    return ", ".join([*names[:3], *(["..."] if len(names) > 3 else [])])
