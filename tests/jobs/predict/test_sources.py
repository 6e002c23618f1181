from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from threading import Event, Timer

import pytest
from PIL import Image

from acamkd.errors import AcamkdError
from acamkd.jobs.predict import sources
from acamkd.jobs.predict.predict import predict
from acamkd.jobs.predict.sources import GrowingFolder


def test_a_folder_grows(red: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "POLL", 0.01)
    inbox, out = tmp_path / "inbox", tmp_path / "out"
    inbox.mkdir()
    Image.new("RGB", (32, 32), "red").save(inbox / "a.png")

    def grow() -> None:
        while not (out / "masks/a.png").is_file():  # it is predicted before the others come
            time.sleep(0.005)
        Image.new("RGB", (32, 32), "blue").save(inbox / "b.png")
        (inbox / "c.png").write_bytes(b"no image")

    thread = threading.Thread(target=grow)
    thread.start()
    made = predict(red, inbox, out=out, watch=True, seconds=0.4)
    thread.join()
    assert (made.count, made.unit) == (2, "image")
    lines = list(made.lines())
    assert [(line["file_name"], line["shares"]) for line in lines] == [("a.png", {"b": 1.0}), ("b.png", {"a": 1.0})]
    assert lines[0]["utc"] < lines[1]["utc"]
    assert sorted(file.name for file in (out / "overlays").iterdir()) == ["a.png", "b.png"]


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


def test_masks_of_one_name_end_the_watching(red: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "POLL", 0.01)
    (tmp_path / "inbox").mkdir()
    for name in ("a.png", "a.jpg"):
        Image.new("RGB", (16, 16)).save(tmp_path / "inbox" / name)
    with pytest.raises(AcamkdError, match="2 images are called a, and their masks would be one file"):
        predict(red, tmp_path / "inbox", watch=True, seconds=5)


def test_a_signal_ends_it_with_whole_lines(box: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os
    import signal

    monkeypatch.setattr(sources, "POLL", 0.01)
    (tmp_path / "inbox").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "inbox/a.png")
    before = signal.getsignal(signal.SIGINT)
    Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    made = predict(box, tmp_path / "inbox", out=tmp_path / "out", watch=True, seconds=30)
    assert [json.loads(line)["file_name"] for line in (made.folder / "predictions.jsonl").open()] == ["a.png"]
    assert signal.getsignal(signal.SIGINT) is before
