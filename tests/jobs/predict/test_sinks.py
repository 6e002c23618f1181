"""Where predictions cannot be written; the tests of `predict` have the rest."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from threading import Event

import numpy as np
import pytest
from PIL import Image

from acamkd.errors import AcamkdError
from acamkd.jobs.predict.predict import predict
from acamkd.jobs.predict.sinks import Lines, sinks_of
from acamkd.jobs.predict.sources import Frame, GrowingFolder


def test_a_file_in_the_place_of_a_folder_is_named(red: Path, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/masks").touch()
    with pytest.raises(AcamkdError, match=rf"^cannot write {tmp_path}/out/masks/a\.png: File exists$"):
        predict(red, tmp_path / "a.png", out=tmp_path / "out")


def test_lines_of_a_live_source_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    source = GrowingFolder(tmp_path, without=[], stop=Event())
    message = rf"^cannot write {tmp_path}/taken/predictions\.jsonl: File exists$"
    with pytest.raises(AcamkdError, match=message), sinks_of(
        source, tmp_path / "taken", ["a"], masks=False, write=["json"]
    ):  # fmt: skip
        pass


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a device that is always full")
def test_a_line_that_a_full_disk_does_not_take() -> None:
    frame = Frame(np.zeros((2, 2, 3), np.uint8), "a.png", "a.png")
    message = r"^cannot write /dev/full: No space left on device$"
    # Closing it fails as well.
    with suppress(OSError), open("/dev/full", "w") as full, pytest.raises(AcamkdError, match=message):
        Lines(full, ["a"], with_masks=False).write(frame, {"mask": np.zeros((2, 2), np.uint8)})
