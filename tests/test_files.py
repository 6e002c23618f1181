from __future__ import annotations

import errno
from pathlib import Path

import pytest

from acamkd.errors import AcamkdError
from acamkd.files import check_writable, check_writable_file, written_whole


def test_a_file_takes_its_place_only_when_it_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "image.png"
    with written_whole(file) as unfinished:
        unfinished.write_text("first")
        assert not file.exists()
        assert unfinished.suffix == ".png"
    assert file.read_text() == "first"
    with pytest.raises(TypeError), written_whole(file) as unfinished:
        unfinished.open("w").writelines(["sec", 2])  # type: ignore[list-item]
    assert file.read_text() == "first"
    with written_whole(file, previous=tmp_path / "previous.png") as unfinished:
        unfinished.write_text("third")
    assert [(tmp_path / name).read_text() for name in ("image.png", "previous.png")] == ["third", "first"]


def test_what_cannot_reach_the_disk_takes_nobodys_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, previous = tmp_path / "last", tmp_path / "previous"
    for path in (file, previous):
        path.write_text(path.name)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr("acamkd.files.os.fsync", full)
    with pytest.raises(OSError, match="no space"), written_whole(file, previous=previous) as unfinished:
        unfinished.touch()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"last": "last", "previous": "previous"}
    with written_whole(file, durable=False) as unfinished:
        unfinished.write_text("here")
    assert file.read_text() == "here"
    assert sorted(tmp_path.iterdir()) == [file, previous]


def test_a_folder_that_cannot_be_written_is_found_before_it_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_writable(tmp_path / "new" / "deep")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(AcamkdError, match=rf"cannot write {tmp_path}/file/a: Not a directory; --out"):
        check_writable(tmp_path / "file" / "a")

    with pytest.raises(AcamkdError, match="x: File name too long; --out"):
        check_writable(tmp_path / ("x" * 300))
    with pytest.raises(AcamkdError, match=rf"cannot write {tmp_path}/file: File exists; --out"):
        check_writable(tmp_path / "file")

    def refuse(dir: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("acamkd.files.TemporaryFile", refuse)  # the administrator may write everywhere else
    with pytest.raises(AcamkdError, match=rf"cannot write the run {tmp_path}: Read-only file system; copy it"):
        check_writable(tmp_path, "the run", "copy it")
    monkeypatch.setattr(Path, "is_dir", refuse)  # a folder that only others may enter
    with pytest.raises(AcamkdError, match=rf"cannot write {tmp_path}: Read-only file system; --out"):
        check_writable_file(tmp_path / "out.json")
