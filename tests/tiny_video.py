"""Videos of a few small frames."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import av
import numpy as np


def write_video(file: Path, turned: bool = False, count: int = 5, **options: Any) -> Path:
    """Frames of 64 x 48 at 10 per second: red on the left, blue on the right; `turned` for an upright telephone."""
    frame = np.zeros((48, 64, 3), np.uint8)
    frame[:, :32, 0] = frame[:, 32:, 2] = 200
    with av.open(file, "w", **options) as writer:
        stream = writer.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(count):
            writer.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        writer.mux(stream.encode())
    if turned:  # a quarter to the right, as a telephone that is held upright says it
        upright, quarter = (1, 0, 0, 0, 1, 0), (0, 1, 0, -1, 0, 0)
        old, new = (
            b"".join(struct.pack(">i", x << (30 if k == 8 else 16)) for k, x in enumerate((*matrix, 0, 0, 1)))
            for matrix in (upright, quarter)
        )
        content = file.read_bytes()
        track = content.index(b"tkhd")
        file.write_bytes(content[:track] + content[track:].replace(old, new, 1))
    return file


def frames_of(file: Path) -> list[Any]:
    """Every frame of a video of 10 per second, (H, W, 3)."""
    with av.open(file) as reader:
        assert reader.streams.video[0].average_rate == 10
        return [frame.to_ndarray(format="rgb24") for frame in reader.decode(video=0)]
