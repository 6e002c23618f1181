"""`acamkd predict` on graphs made by hand; tests/jobs/export has those of real networks."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from acamkd.errors import AcamkdError
from acamkd.jobs.predict import predict as predicting
from acamkd.jobs.predict.predict import predict
from acamkd.jobs.predict.sinks import MARK
from acamkd.report.visualize import draw_predictions
from tiny_video import frames_of, write_video


def test_a_video_of_masks(red: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="acamkd")
    folder = predict(red, write_video(tmp_path / "film.mp4")).folder
    assert folder == tmp_path / "predictions"
    masks = sorted((folder / "masks/film").iterdir())
    assert [mask.name for mask in masks] == [f"{number:06d}.png" for number in range(5)]
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert lines[2] == {
        "file_name": "film.mp4", "width": 64, "height": 48, "frame": 2, "seconds": 0.2,
        "shares": {"a": pytest.approx(0.5, abs=0.05), "b": pytest.approx(0.5, abs=0.05)},
        "mask": "masks/film/000002.png",
    }  # fmt: skip
    for mask in masks:
        seen = np.array(Image.open(mask))
        assert seen.shape == (48, 64)
        assert (seen[:, :30] == 1).all()
        assert (seen[:, 34:] == 0).all()
    overlays = frames_of(folder / "overlays/film.mp4")
    assert len({frame.shape for frame in overlays}) == 1  # the legend of each names all classes
    assert len(overlays) == 5
    assert overlays[0].shape[1] == 64
    assert overlays[0].shape[0] > 48
    assert overlays[0][48:].max() > 240
    assert [file.name for file in (folder / "overlays").iterdir()] == ["film.mp4"]
    assert caplog.messages[-1].startswith("5 frames, ")


def test_predictions_of_a_runs_export_lie_in_the_run(
    red: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = tmp_path / "run/export"
    export.mkdir(parents=True)
    shutil.copy(red, export / "student.onnx")
    image = tmp_path / "image.png"
    Image.new("RGB", (40, 30)).save(image)
    for name in ("recipe.yaml", "export/onnx_model.py"):
        (tmp_path / "run" / name).touch()
    assert predict(export / "student.onnx", image).folder == tmp_path / "run/predictions"
    monkeypatch.chdir(export)
    assert predict("student.onnx", image).folder == tmp_path / "run/predictions"
    assert sorted(file.name for file in export.iterdir()) == ["onnx_model.py", "student.onnx"]
    (export / "onnx_model.py").unlink()  # no export
    assert predict(export / "student.onnx", image).folder == export / "predictions"


def test_a_video_of_boxes(box: Path, tmp_path: Path) -> None:
    folder = predict(box, write_video(tmp_path / "film.mp4"), out=tmp_path / "out").folder
    found = json.loads((folder / "predictions.json").read_text())
    assert [each["frame"] for each in found] == [0, 1, 2, 3, 4]
    assert found[3] == {
        "file_name": "film.mp4", "frame": 3, "category_id": 2, "category_name": "b", "bbox": [1, 2, 10, 20],
        "score": pytest.approx(0.9),
    }  # fmt: skip
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    del found[3]["file_name"], found[3]["frame"]
    assert lines[3] == {
        "file_name": "film.mp4", "width": 64, "height": 48, "frame": 3, "seconds": 0.3, "objects": [found[3]],
    }  # fmt: skip
    plain, drawn = frames_of(tmp_path / "film.mp4")[0], frames_of(folder / "overlays/film.mp4")[0]
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
    folder = predict(red, write_video(tmp_path / "film.mp4", turned=True)).folder
    seen = np.array(Image.open(folder / "masks/film/000000.png"))
    assert seen.shape == (64, 48)
    assert (seen[:30] == 1).all()
    assert (seen[34:] == 0).all()


def test_a_broken_video_leaves_nothing(red: Path, tmp_path: Path) -> None:
    (tmp_path / "film.mp4").write_bytes(b"no video")
    with pytest.raises(AcamkdError, match=r"film\.mp4: the video cannot be read"):
        predict(red, tmp_path / "film.mp4", out=tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.mp4"))


def test_a_video_needs_pyav(red: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "film.mp4").touch()
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(AcamkdError, match=r"a video needs PyAV: pip install 'acamkd\[video\]'"):
        predict(red, tmp_path / "film.mp4", out=tmp_path / "out")


def test_a_bar_shows_how_many_go_through(red: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[dict[str, Any]] = []

    def bar(items: Any, **options: Any) -> Any:
        shown.append(options)
        return items

    monkeypatch.setattr(predicting, "tqdm", bar)
    predict(red, write_video(tmp_path / "film.mp4"))
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
        monkeypatch.setattr(predicting, "_open", lambda _, limit=limit: replace(opened, limit=limit))
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
        "notes.txt": "give an image .* a folder of them, a video .* or the number of a camera",
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


def test_the_home_folder_is_written_with_a_tilde(box: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    Image.new("RGB", (32, 32)).save(tmp_path / "~1.png")
    assert predict("~/box.onnx", "~/~1.png").folder == tmp_path / "predictions"
    monkeypatch.chdir(tmp_path)
    made = predict(f"~/{box.name}", "~1.png", out="~/out")
    assert made.to_coco("~/found.json") == tmp_path / "found.json"
    assert {file.name for file in tmp_path.iterdir()} == {"box.onnx", "found.json", "out", "predictions", "~1.png"}


def test_what_is_written_can_be_chosen(red: Path, box: Path, tmp_path: Path) -> None:
    Image.new("RGB", (16, 8)).save(tmp_path / "a.png")
    for model, names, there in (
        (red, ["json"], {"predictions.jsonl"}),
        (red, ["masks"], {"masks"}),
        (box, ["overlays", "masks"], {"overlays"}),
    ):
        folder = predict(model, tmp_path / "a.png", out=tmp_path / "-".join([model.stem, *names]), write=names).folder
        assert {each.name for each in folder.iterdir()} == {*there, MARK}
    with pytest.raises(AcamkdError, match=r"predict cannot write 'overlay'; .*overlays"):
        predict(red, tmp_path / "a.png", write=["overlay"])


def test_an_earlier_predictions_lists_are_not_taken_for_this_one(box: Path, red: Path, tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    predict(box, tmp_path / "a.png", out=tmp_path / "out")
    assert (tmp_path / "out/predictions.json").is_file()
    with pytest.raises(AcamkdError, match="a detector gives boxes, no masks: write overlays or json"):
        predict(box, tmp_path / "a.png", out=tmp_path / "out", write=["masks"])
    assert (tmp_path / "out/predictions.json").is_file()  # and nothing was lost
    predict(box, tmp_path / "a.png", out=tmp_path / "out", write=["overlays"])
    assert not list((tmp_path / "out").glob("predictions.json*"))
    made = predict(red, tmp_path, out=tmp_path / "lines", write=["json"])  # no mask is written, so names may repeat
    assert [line["file_name"] for line in made.lines()] == ["a.jpg", "a.png", "out/overlays/a.png"]


def test_options_of_live_sources_are_for_them_alone(red: Path, tmp_path: Path) -> None:
    Image.new("RGB", (16, 8)).save(tmp_path / "a.png")
    for options, message in (
        ({"seconds": 1.0}, "a number of seconds is for a camera, an address, --live or --watch"),
        ({"live": True}, r"--live plays a video file .*a\.png is none"),
        ({"watch": True}, r"--watch waits for images in a folder, and .*a\.png is none"),
        ({"watch": True, "live": True}, "--live plays a video file and --watch waits for images in a folder: give one"),
    ):
        with pytest.raises(AcamkdError, match=message):
            predict(red, tmp_path / "a.png", out=tmp_path / "out", **options)


def test_masks_of_somebody_else_are_not_written_over(red: Path, tmp_path: Path) -> None:
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
        Image.new("L", (16, 8), 3).save(tmp_path / folder / "a.png")
    before = (tmp_path / "masks/a.png").read_bytes()
    with pytest.raises(
        AcamkdError, match=r"masks is there, and of no earlier prediction: choose another folder with --o"
    ):
        predict(red, tmp_path / "images", out=tmp_path)
    assert (tmp_path / "masks/a.png").read_bytes() == before
    for _ in range(2):  # those of an earlier prediction are
        predict(red, tmp_path / "images", out=tmp_path / "out", write=["masks"])
