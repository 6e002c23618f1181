"""Folders of images, masks and labels: one rule for names and suffixes in every format."""

from __future__ import annotations

import mimetypes
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from acamkd.errors import AcamkdError
from acamkd.files import IMAGE_SUFFIXES, files_below


class Folder:
    """Visible files of some types in a folder and in all folders below it, found by their names.

    A file's name is its path below the folder without suffix. `find` also takes the path with its suffix and, where one
    file alone fits, another spelling: other case, another Unicode form, or back-slashes. Suffixes count in any case.

    Args:
        path: The folder.
        suffixes: Endings of the files, in lower case.
        without: Folders below it that are left out.

    Raises:
        AcamkdError: The folder cannot be read.

    Attributes:
        files: In the order of their names.
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
        for name, file in self._written.items():
            self._spelled.setdefault(_spelling(name), set()).add(file)

    def name(self, file: Path) -> str:
        """Of one of its files."""
        return file.relative_to(self.path).with_suffix("").as_posix()

    def find(self, name: str) -> Path | None:
        """The file of a name; None if there is none, or if several fit and none is spelled so."""
        if name in self._written:
            return self._written[name]
        fitting = self._spelled.get(_spelling(name), set())
        return next(iter(fitting)) if len(fitting) == 1 else None

    def described_left_out(self) -> list[str]:
        """A warning of the images that are not read, if there are any."""
        if not self.left_out:
            return []
        return [
            f"{self.path}: {len(self.left_out)} images of other types are left out ({_some(self.left_out)}); those "
            f"that are read end in {', '.join(self.suffixes)}"
        ]


def existing(path: Path) -> Path:
    """A path, or the one that is there under another spelling; see Folder."""
    if path.exists() or path == path.parent:
        return path
    parent = existing(path.parent)
    if not parent.is_dir():
        return path
    fitting = [each for each in parent.iterdir() if _spelling(each.name) == _spelling(path.name)]
    return fitting[0] if len(fitting) == 1 else parent / path.name


def twins(folder: Folder, what: str) -> list[str]:
    """Problems of images that differ in their suffix alone and so share `what`."""
    first: dict[str, Path] = {}
    return [
        f"{file}: the image has the same name as {one.name}, and so the same {what}"
        for file in folder.files
        if (one := first.setdefault(folder.name(file), file)) != file
    ]


def no_images(folder: Folder) -> list[str]:
    """A problem of a folder that holds none."""
    if folder.files:
        return []
    return [f"{folder.path}: the folder holds no images ({', '.join(folder.suffixes)})"]


def _spelling(name: str) -> str:
    return unicodedata.normalize("NFC", name.replace("\\", "/")).casefold()


def _is_image(file: Path) -> bool:
    kind, _ = mimetypes.guess_type(file.name)
    return kind is not None and kind.startswith("image/")


def _some(files: Iterable[Path]) -> str:
    names = [file.name for file in files]
    return ", ".join([*names[:3], *(["..."] if len(names) > 3 else [])])
