from __future__ import annotations

import logging
import socket
import threading
import time
import wave
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest

from acamkd.errors import AcamkdError, without_password
from acamkd.jobs.export.onnx_model import OnnxModel, Pixels, Prediction
from acamkd.jobs.predict import video
from acamkd.jobs.predict.predict import predict
from acamkd.jobs.predict.video import LiveVideo, PacedVideo, Stream, VideoWriter
from tiny_video import frames_of, write_video


class Clock:
    """A clock and a stop that never comes: waiting takes no time, but the clock goes on."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now

    def wait(self, seconds: float) -> bool:
        self.now += seconds
        return False

    def set(self) -> None:
        """Nobody waits for it."""


def test_a_file_at_its_own_pace_stands_for_a_camera(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock: Any = Clock()
    monkeypatch.setattr(video, "time", clock)
    with PacedVideo(write_video(tmp_path / "film.mp4"), Event()) as source:
        monkeypatch.setattr(source, "_stop", clock)
        found = []
        for _, seconds in source.arrivals():
            found.append((round(clock.now - 100, 3), seconds))
            clock.now += 0.25 if len(found) == 1 else 0  # the machine was busy
    assert found == [(0.0, 0.0), (0.25, 0.1), (0.25, 0.2), (0.3, 0.3), (0.4, 0.4)]


def test_only_the_newest_frame_waits_for_the_network() -> None:
    is_busy, has_come = threading.Event(), threading.Event()

    class Burst(LiveVideo):
        """One frame, and three more while the network is busy with it."""

        def open(self) -> Any:
            return SimpleNamespace(
                streams=SimpleNamespace(video=[SimpleNamespace(average_rate=10)]), close=lambda: None
            )

        def arrivals(self) -> Iterator[tuple[av.VideoFrame, float]]:
            for number in range(4):
                yield av.VideoFrame.from_ndarray(np.full((4, 4, 3), number, np.uint8), format="rgb24"), number / 10
                if number == 0:
                    is_busy.wait()
            has_come.set()

    found = []
    with Burst("", "camera", Event()) as source:
        for frame in source.frames():
            found.append((frame.number, frame.seconds, frame.pixels[0, 0, 0]))
            is_busy.set()
            has_come.wait()
    assert found == [(0, 0.0, 0), (3, 0.3, 3)]
    assert source.dropped == 2


def test_live_predictions_have_the_frames_own_times(
    red: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="acamkd")
    one = OnnxModel.predict

    def slow(self: OnnxModel, image: Pixels) -> Prediction:
        time.sleep(0.15)
        return one(self, image)

    monkeypatch.setattr(OnnxModel, "predict", slow)
    made = predict(red, write_video(tmp_path / "film.mp4"), live=True)
    lines = list(made.lines())
    assert made.count + made.dropped == 5
    assert [line["seconds"] for line in lines] == [line["frame"] / 10 for line in lines]
    assert [line["utc"] for line in lines] == sorted(line["utc"] for line in lines)
    assert all((made.folder / line["mask"]).is_file() for line in lines)
    with av.open(made.folder / "overlays/film.mp4") as reader:
        found = [frame.time for frame in reader.decode(video=0)]
    assert found == pytest.approx([line["seconds"] for line in lines], abs=1e-3)
    assert caplog.messages[-1] == str(made)
    assert made.network_per_second < 1 / 0.15


@contextmanager
def _server(content: bytes, connections: int) -> Iterator[str]:
    """Sends a stream to each connection and breaks it; refuses further ones."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]

        def serve() -> None:
            for number in range(connections):
                connection, _ = listening.accept()
                if number == connections - 1:
                    listening.close()
                with connection:
                    connection.sendall(content)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"tcp://127.0.0.1:{port}"


def test_a_stream_is_connected_again(
    box: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(video, "DELAYS", (0.01, 0.02))
    content = write_video(tmp_path / "film.ts", format="mpegts").read_bytes()
    out = tmp_path / "out"
    with _server(content, connections=2) as address, pytest.raises(
        AcamkdError, match=r"the stream broke \(.*Connection refused\), also after 2 new connections"
    ):  # fmt: skip
        predict(box, address, out=out)
    name = address.replace("://", "-").replace(":", "-").replace(".", "-")
    assert [record.message.split(": ", 1)[1] for record in caplog.records if "broke" in record.message] == [
        "the stream broke (it ended); connecting again in 0.01 s",
        "the stream broke (it ended); connecting again in 0.01 s",  # frames set the count back
        "the stream broke (the stream cannot be read: Connection refused); connecting again in 0.02 s",
    ]
    lines = (out / "predictions.jsonl").read_text().splitlines()
    assert 1 <= len(lines) <= 10
    with open(out / "overlays" / f"{name}.mp4", "rb") as file:  # it is whole all the same
        assert b"moov" in file.read()


def test_an_address_that_does_not_answer_is_said_without_its_password(box: Path, tmp_path: Path) -> None:
    with pytest.raises(AcamkdError) as told:
        predict(box, "rtsp://me:secret@127.0.0.1:9/stream", out=tmp_path / "out")
    assert str(told.value) == "rtsp://127.0.0.1:9/stream: the stream cannot be read: Connection refused"
    assert not (tmp_path / "out").exists()
    assert without_password("rtsp://host/a@b") == "rtsp://host/a@b"
    assert without_password("rtsp://me:p@ss@host/a") == "rtsp://host/a"
    assert (
        without_password("http://10.0.0.5/a.cgi?user=me&pwd=x&size=2")
        == "http://10.0.0.5/a.cgi?user=...&pwd=...&size=2"
    )
    assert without_password("http://h/v?loginuse=me&api_key=x") == "http://h/v?loginuse=...&api_key=..."
    assert without_password("http://h/v?token=ab/cd==") == "http://h/v?token=..."
    assert (
        without_password("rtsp://h:554/user=me&password=x&channel=1") == "rtsp://h:554/user=...&password=...&channel=1"
    )


def test_a_stopped_stream_ends(tmp_path: Path) -> None:
    """An image of FFmpeg's own that never ends stands for the camera."""
    stop = Event()
    with Stream("testsrc=size=64x48:rate=50,realtime", stop, format="lavfi") as source:
        for frame in source.frames():
            assert frame.pixels.shape == (48, 64, 3)
            if (frame.number or 0) >= 3:  # a busy machine drops frames
                stop.set()
    assert (frame.number or 0) >= 3
    assert source.problem() is None


def test_a_camera_that_is_not_there(box: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    with pytest.raises(AcamkdError, match="/dev/video71: the stream cannot be read: No such file or directory"):
        predict(box, 71, out=tmp_path / "out")
    monkeypatch.setattr("sys.platform", "win32")
    with pytest.raises(AcamkdError, match="camera 71: cameras are read on Linux and macOS alone"):
        predict(box, "71", out=tmp_path / "out")


def _silent(file: Path) -> None:
    """Sound without a picture."""
    with wave.open(str(file), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(1600))


def _empty(file: Path) -> None:
    with av.open(file, "w") as writer:
        stream = writer.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        writer.start_encoding()


def _cut(file: Path) -> None:
    content = write_video(file, options={"movflags": "faststart"}).read_bytes()
    file.write_bytes(content[: content.index(b"mdat") + 40])


@pytest.mark.parametrize(
    ("write", "name", "message", "live_message"),
    [
        (_silent, "film.mp4", "the video holds no video", "the stream holds no video"),
        (_empty, "film.avi", "the video holds no frames", "no frame came"),
        (_cut, "film.mp4", "the video cannot be read to its end: Invalid data found when processing input",
         "the video cannot be read beyond frame 0: Invalid data found when processing input"),
    ],
)  # fmt: skip
def test_a_video_that_shows_nothing_is_said(
    write: Callable[[Path], None], name: str, message: str, live_message: str, box: Path, tmp_path: Path
) -> None:
    write(tmp_path / name)
    for live, said in ((False, message), (True, live_message)):
        with pytest.raises(AcamkdError, match=rf"{name}: {said}$"):
            predict(box, tmp_path / name, out=tmp_path / "out", live=live)
    assert not list(tmp_path.glob("out/overlays/*"))


def test_an_address_of_no_video_is_said_without_its_password(box: Path, tmp_path: Path) -> None:
    """A camera that asks to log in."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = b"<html>Log in" * 1000
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Be silent."""

    with HTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(AcamkdError) as told:
            predict(box, f"http://me:secret@127.0.0.1:{server.server_port}/live?token=secret", out=tmp_path / "out")
        server.shutdown()
    assert str(told.value) == (
        f"http://127.0.0.1:{server.server_port}/live?token=...: the stream cannot be read: Invalid data found when "
        "processing input"
    )


def test_a_disk_that_is_full_is_said(box: Path, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="Windows has no limit of a file's size")
    film, (soft, hard) = write_video(tmp_path / "film.mp4"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(AcamkdError, match=r"cannot write .*/overlays/film\.mp4: File too large"):
            predict(box, film, out=tmp_path / "out", write=["overlays"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.rglob("*film.mp4"))[1:]


def test_frames_of_odd_sizes_are_written(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "out.mp4", 10) as film:
        film.write(np.zeros((17, 33, 3), np.uint8), None)
    assert [frame.shape for frame in frames_of(tmp_path / "out.mp4")] == [(16, 32, 3)]
