"""`acamkd predict` on graphs made by hand; tests/test_export.py has those of real networks."""

from __future__ import annotations

import json
import logging
import struct
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import onnx
import pytest
from PIL import Image

from acamkd.errors import AcamkdError
from acamkd.jobs import predict as predicting
from acamkd.jobs.predict import Video, predict
from acamkd.report.visualize import draw_predictions
from tiny_onnx import write_onnx


@pytest.fixture
def red(tmp_path: Path) -> Path:
    """A segmenter: class 1 where there is more red than blue."""
    weights = onnx.numpy_helper.from_array(np.array([[0, 0, 0], [1, 0, -1]], np.float32)[..., None, None], "w")
    node = onnx.helper.make_node("Conv", ["pixels", "w"], ["logits"])
    return write_onnx(tmp_path / "red.onnx", "segmentation", [node], [weights], {"logits": ["n", 2, "h", "w"]})


@pytest.fixture
def box(tmp_path: Path) -> Path:
    """A detector that finds the same two boxes in every image, one of them with a score of 0.2."""
    found = {
        "boxes": np.array([[1, 2, 11, 22], [0, 0, 4, 4]], np.float32), "scores": np.array([0.9, 0.2], np.float32),
        "labels": np.array([2, 1]),
    }  # fmt: skip
    nodes = [
        onnx.helper.make_node("Constant", [], [name], value=onnx.numpy_helper.from_array(value))
        for name, value in found.items()
    ]
    shapes = {name: list(value.shape) for name, value in found.items()}
    return write_onnx(tmp_path / "box.onnx", "detection", nodes, [], shapes)


def _film(file: Path, turned: bool = False) -> Path:
    """Five frames of 64 x 48 at 10 per second: red on the left, blue on the right."""
    frame = np.zeros((48, 64, 3), np.uint8)
    frame[:, :32, 0] = frame[:, 32:, 2] = 200
    with av.open(file, "w") as writer:
        stream = writer.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(5):
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


def _frames(file: Path) -> list[Any]:
    with av.open(file) as reader:
        assert reader.streams.video[0].average_rate == 10
        return [frame.to_ndarray(format="rgb24") for frame in reader.decode(video=0)]


def test_a_video_of_masks(red: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="acamkd")
    folder = predict(red, _film(tmp_path / "film.mp4")).folder
    assert folder == tmp_path / "predictions"
    masks = sorted((folder / "masks/film").iterdir())
    assert [mask.name for mask in masks] == [f"{number:06d}.png" for number in range(5)]
    for mask in masks:
        seen = np.array(Image.open(mask))
        assert seen.shape == (48, 64)
        assert (seen[:, :30] == 1).all()
        assert (seen[:, 34:] == 0).all()
    overlays = _frames(folder / "overlays/film.mp4")
    assert len({frame.shape for frame in overlays}) == 1  # the legend of each names all classes
    assert len(overlays) == 5
    assert overlays[0].shape[1] == 64
    assert overlays[0].shape[0] > 48
    assert overlays[0][48:].max() > 240
    assert [file.name for file in (folder / "overlays").iterdir()] == ["film.mp4"]
    assert caplog.messages[-1].startswith("5 frames, ")


def test_a_video_of_boxes(box: Path, tmp_path: Path) -> None:
    folder = predict(box, _film(tmp_path / "film.mp4"), out=tmp_path / "out").folder
    found = json.loads((folder / "predictions.json").read_text())
    assert [each["frame"] for each in found] == [0, 1, 2, 3, 4]
    assert found[3] == {
        "file_name": "film.mp4", "frame": 3, "category_id": 2, "category_name": "b", "bbox": [1, 2, 10, 20],
        "score": pytest.approx(0.9),
    }  # fmt: skip
    plain, drawn = _frames(tmp_path / "film.mp4")[0], _frames(folder / "overlays/film.mp4")[0]
    changed = np.abs(plain.astype(int) - drawn.astype(int)).max(axis=-1) > 60
    assert changed[10, 1]  # the left edge of the box
    assert not changed[30:, 40:].any()


def test_boxes_and_names_grow_with_the_image() -> None:
    found = {"boxes": np.array([[0.25, 0.5, 0.75, 1.0]]), "scores": np.array([0.9]), "labels": np.array([1])}
    shares = []
    for side in (400, 1600):
        drawn = draw_predictions(
            np.zeros((side, side, 3), np.uint8), {**found, "boxes": found["boxes"] * side}, ("name",)
        )
        shares.append((drawn > 0).any(axis=-1).mean())
    assert shares[0] == pytest.approx(shares[1], rel=0.2)


def test_frames_keep_their_times(red: Path, tmp_path: Path) -> None:
    """Telephones record at a rate that varies: overlays would run ahead of the video, or behind it."""
    times = [0, 100, 150, 400, 1000]  # milliseconds
    with av.open(tmp_path / "film.mp4", "w") as writer:
        stream = writer.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for time in times:
            frame = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            writer.mux(stream.encode(frame))
        writer.mux(stream.encode())
    folder = predict(red, tmp_path / "film.mp4").folder
    for file in (tmp_path / "film.mp4", folder / "overlays/film.mp4"):
        with av.open(file) as reader:
            found = [frame.time for frame in reader.decode(video=0)]
        assert found == pytest.approx([time / 1000 for time in times], abs=1e-3), file


def test_a_video_is_turned_upright(red: Path, tmp_path: Path) -> None:
    folder = predict(red, _film(tmp_path / "film.mp4", turned=True)).folder
    seen = np.array(Image.open(folder / "masks/film/000000.png"))
    assert seen.shape == (64, 48)
    assert (seen[:30] == 1).all()
    assert (seen[34:] == 0).all()


def test_frames_of_odd_sizes_are_written(tmp_path: Path) -> None:
    with Video(_film(tmp_path / "film.mp4"), tmp_path / "out.mp4") as film:
        film.write(Image.new("RGB", (33, 17)))
    assert [frame.shape for frame in _frames(tmp_path / "out.mp4")] == [(16, 32, 3)]


def test_a_broken_video_leaves_nothing(red: Path, tmp_path: Path) -> None:
    (tmp_path / "film.mp4").write_bytes(b"no video")
    with pytest.raises(AcamkdError, match=r"film\.mp4: the video cannot be read"):
        predict(red, tmp_path / "film.mp4", out=tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.mp4"))


def test_a_video_needs_pyav(red: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "film.mp4").touch()
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(AcamkdError, match=r"a video needs PyAV: pip install '\.\[video\]' in the checkout"):
        predict(red, tmp_path / "film.mp4", out=tmp_path / "out")


def test_a_bar_shows_how_many_go_through(red: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[dict[str, Any]] = []

    def bar(items: Any, **options: Any) -> Any:
        shown.append(options)
        return items

    monkeypatch.setattr(predicting, "tqdm", bar)
    predict(red, _film(tmp_path / "film.mp4"))
    assert shown[0] == {"total": 5, "unit": " frames", "disable": None}


def test_an_image_that_cannot_be_read_does_not_lose_the_others(box: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "images", tmp_path / "out"
    source.mkdir()
    for name in ("a.png", "b.png", "c.png"):
        Image.new("RGB", (32, 32)).save(source / name)
    (source / "b.png").write_bytes((source / "b.png").read_bytes()[:60])
    with pytest.raises(AcamkdError, match=r"1 of 3 images are left out: .*b\.png: the image cannot be read"):
        predict(box, source, out=out)
    found = json.loads((out / "predictions.json").read_text())
    assert {entry["file_name"] for entry in found} == {"a.png", "c.png"}
    assert sorted(file.name for file in (out / "overlays").iterdir()) == ["a.png", "c.png"]


def test_a_full_list_of_detections_is_said(
    box: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    opened = predicting._open(box)
    for limit, score, said in ((2, 0.1, True), (2, 0.3, False), (3, 0.1, False), (None, 0.1, False)):
        caplog.clear()
        monkeypatch.setattr(predicting, "_open", lambda _, limit=limit: (*opened[:3], limit))
        predict(box, tmp_path / "a.png", out=tmp_path / "out", score=score)
        assert ("limit of 2 detections was reached in 1 image" in caplog.text) == said


def test_an_output_folder_that_cannot_be_written_is_said_before_the_first_image(red: Path, tmp_path: Path) -> None:
    source = tmp_path / "image.png"
    source.write_bytes(b"not read")
    with pytest.raises(AcamkdError, match=rf"cannot write {source}/out: Not a directory; --out"):
        predict(red, source, out=source / "out")


def test_a_source_without_images_is_refused(tmp_path: Path) -> None:
    model = tmp_path / "none.onnx"
    for source, message in {
        "missing": "there is no such image, folder or video",
        "empty": "the folder holds no images",
        "notes.txt": "give an image .* a folder of them or a video",
    }.items():
        path = tmp_path / source
        if source == "empty":
            path.mkdir()
        if source == "notes.txt":
            path.touch()
        with pytest.raises(AcamkdError, match=rf"{source}: {message}"):
            predict(model, path)


def test_folders_in_the_folder_and_every_suffix(red: Path, box: Path, tmp_path: Path) -> None:
    places = ["a.jpg", "camera2/a.jpg", "camera2/deep/b.TIF", "c.gif", "d.jfif", "e.tiff"]
    for number, place in enumerate(places):
        (tmp_path / "images" / place).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 8), (40 * number, 0, 0)).save(tmp_path / "images" / place)
    for _ in range(2):  # what the first run wrote is no image of the second
        made = predict(red, tmp_path / "images", out=tmp_path / "images/found")
        assert made.count == len(places)
        for place in places:
            assert (made.folder / "overlays" / place).is_file()
            assert (made.folder / "masks" / place).with_suffix(".png").is_file()
    made = predict(box, tmp_path / "images", out=tmp_path / "images/found")
    found = json.loads((made.folder / "predictions.json").read_text())
    assert sorted(entry["file_name"] for entry in found) == sorted(places)


def test_two_images_of_one_name_are_for_a_detector_alone(red: Path, box: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a.jpg", "a.png"):
        Image.new("RGB", (16, 8)).save(folder / name)
    with pytest.raises(AcamkdError, match=rf"{folder}: 2 images are called a, and their masks would be one file"):
        predict(red, folder)
    out = predict(box, folder, out=tmp_path / "found").folder
    assert [entry["file_name"] for entry in json.loads((out / "predictions.json").read_text())] == ["a.jpg", "a.png"]
