from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from threading import Event

import pytest
from PIL import Image

from acamkd.errors import AcamkdError
from acamkd.jobs.predict import sources
from acamkd.jobs.predict.predict import predict
from acamkd.jobs.predict.sources import GrowingFolder


def test_a_folder_grows_until_a_signal(
    red: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sources, "POLL", 0.01)
    inbox, out = tmp_path / "inbox", tmp_path / "out"
    inbox.mkdir()
    Image.new("RGB", (32, 32), "red").save(inbox / "a.png")
    before = signal.getsignal(signal.SIGINT)

    def wait_for(name: str) -> None:
        while not (out / "masks" / name).is_file():
            time.sleep(0.005)

    def grow() -> None:
        wait_for("a.png")
        (inbox / "b.png").write_bytes(b"no image")
        Image.new("RGB", (32, 32), "blue").save(tmp_path / "c.png")
        (tmp_path / "c.png").replace(inbox / "c.png")
        wait_for("c.png")
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=grow, daemon=True)
    thread.start()
    made = predict(red, inbox, out=out, watch=True, seconds=60)
    assert (made.count, made.unit) == (2, "image")
    lines = list(made.lines())
    assert [(line["file_name"], line["shares"]) for line in lines] == [("a.png", {"b": 1.0}), ("c.png", {"a": 1.0})]
    assert lines[0]["utc"] < lines[1]["utc"]
    assert sorted(file.name for file in (out / "overlays").iterdir()) == ["a.png", "c.png"]
    assert "left out: " in caplog.text
    assert "b.png: the image cannot be read" in caplog.text
    assert signal.getsignal(signal.SIGINT) is before


def test_an_image_is_read_when_it_has_stopped_growing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop, looks = Event(), 0
    Image.new("RGB", (32, 32)).save(tmp_path / "whole.png")
    content = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "whole.png").unlink()

    def wait(seconds: float) -> bool:
        nonlocal looks
        looks += 1
        with (tmp_path / "a.png").open("ab") as file:  # the image arrives in three parts, one per look
            file.write(content[(looks - 1) * 30 : looks * 30 if looks < 3 else None] if looks <= 3 else b"")
        if looks == 6:
            stop.set()
        return False

    monkeypatch.setattr(stop, "wait", wait)
    found = [(frame.file_name, looks) for frame in GrowingFolder(tmp_path, without=[], stop=stop).frames()]
    assert found == [("a.png", 4)]


def test_a_folder_that_goes_while_it_is_looked_at_is_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stop, looks = Event(), 0
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")

    def look(*_: object, **__: object) -> list[Path]:
        nonlocal looks
        looks += 1
        if looks < 3:
            raise FileNotFoundError(2, "No such file or directory", "inbox/tmp123")
        return [tmp_path / "a.png"]

    monkeypatch.setattr(sources, "files_below", look)
    monkeypatch.setattr(stop, "wait", lambda _: stop.set() if looks == 5 else False)
    assert [frame.file_name for frame in GrowingFolder(tmp_path, without=[], stop=stop).frames()] == ["a.png"]
    assert caplog.messages == ["cannot read the folder inbox/tmp123: No such file or directory; looking again"]


def test_masks_of_one_name_end_the_watching(red: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "POLL", 0.01)
    (tmp_path / "inbox").mkdir()
    for name in ("a.png", "a.jpg"):
        Image.new("RGB", (16, 16)).save(tmp_path / "inbox" / name)
    with pytest.raises(AcamkdError, match="2 images are called a, and their masks would be one file"):
        predict(red, tmp_path / "inbox", watch=True, seconds=60)


def test_a_time_ends_it(box: Path, tmp_path: Path) -> None:
    (tmp_path / "inbox").mkdir()
    made = predict(box, tmp_path / "inbox", out=tmp_path / "out", watch=True, seconds=0.02)
    assert (made.count, list(made.lines())) == (0, [])
