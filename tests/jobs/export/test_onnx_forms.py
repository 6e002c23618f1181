from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from acamkd.errors import AcamkdError
from acamkd.jobs.export.onnx_forms import (
    Form,
    OnnxForm,
    Worker,
    begin,
    images_per_second,
    peak_mib,
    predict_one,
    time_calls,
)
from acamkd.jobs.export.onnx_model import OnnxModel, Pixels
from tiny_onnx import write_onnx, write_segmenter

IMAGES = list(np.random.default_rng(0).integers(0, 256, (3, 40, 50, 3), np.uint8))


def leave(_: Form, __: Sequence[Pixels]) -> None:
    """End the process, as the system does where memory runs out."""
    os._exit(3)


def fail(_: Form, __: Sequence[Pixels], what: str) -> None:
    raise RuntimeError(f"{what}\nand more")


def has_torch(_: Form, __: Sequence[Pixels]) -> bool:
    return "torch" in sys.modules


def process(_: Form, images: Sequence[Pixels]) -> tuple[int, str | None, int]:
    print("what a library says")  # noqa: T201
    return os.getpid(), os.environ.get("OMP_NUM_THREADS"), len(images)


def test_a_batch_is_predicted_as_its_images_are(tmp_path: Path) -> None:
    form = OnnxForm("student", write_segmenter(tmp_path / "student.onnx", resize=(33, 47)), 1)
    form.load()
    assert form.name == "onnxruntime"
    assert form.takes_batches
    model = OnnxModel(form.file)
    for image, found in zip(IMAGES, form.predict(IMAGES), strict=True):
        np.testing.assert_array_equal(found["mask"], model.predict(image)["mask"])
        np.testing.assert_array_equal(predict_one(form, [], image)["mask"], found["mask"])


@pytest.mark.filterwarnings("ignore:Specified provider")  # onnxruntime's own words
def test_a_form_is_named_after_its_file_and_provider(tmp_path: Path) -> None:
    assert OnnxForm("student", tmp_path / "student.int8.onnx", 1).name == "onnxruntime int8"
    assert OnnxForm("student", tmp_path / "student.onnx", 1, "CUDAExecutionProvider").name == "onnxruntime, CUDA"
    with pytest.raises(AcamkdError, match="onnxruntime has no NoneExecutionProvider"):
        OnnxForm("student", write_segmenter(tmp_path / "s.onnx"), 1, "NoneExecutionProvider").load()


def test_single_images_alone_have_a_rate_of_their_own(tmp_path: Path) -> None:
    values: dict[str, Any] = {"boxes": np.zeros((1, 4), np.float32), "scores": np.ones(1, np.float32)}
    import onnx

    nodes = [
        onnx.helper.make_node("Constant", [], [name], value=onnx.numpy_helper.from_array(value))
        for name, value in {**values, "labels": np.ones(1, np.int64)}.items()
    ]
    shapes: dict[str, list[Any]] = {"boxes": [1, 4], "scores": [1], "labels": [1]}
    form = OnnxForm("student", write_onnx(tmp_path / "d.onnx", "detection", nodes, [], shapes), 1)
    form.load()
    assert images_per_second(form, IMAGES, 2, 0.0) is None
    rate = images_per_second(form, IMAGES, 1, 0.0)
    assert rate is not None
    assert rate > 0


def test_stages_are_timed_one_by_one(tmp_path: Path) -> None:
    form = OnnxForm("student", write_segmenter(tmp_path / "student.onnx", resize=(32, 32)), 1)
    form.load()
    times = time_calls(form, IMAGES, 5)
    assert len(times) == 5
    assert all(stage > 0 for call in times for stage in call)


def test_a_form_has_a_process_of_its_own(tmp_path: Path) -> None:
    with Worker(OnnxForm("student", write_segmenter(tmp_path / "student.onnx"), 1), IMAGES) as worker:
        assert worker(begin) > 0
        pid, threads, count = worker(process)
        assert pid != os.getpid()
        assert (threads, count) == ("1", 3)
        assert worker(peak_mib) > 20
        assert not worker(has_torch)
        with pytest.raises(AcamkdError, match=r"^student, onnxruntime: of the runtime$"):
            worker(fail, "of the runtime")
        assert worker(predict_one, IMAGES[0])["mask"].shape == (40, 50)  # it goes on
        with pytest.raises(AcamkdError, match=r"^student, onnxruntime: its process ended"):
            worker(leave)


@pytest.mark.parametrize(("system", "mib"), [("linux", 300.0), ("darwin", 300 / 1024)])
def test_memory_is_known_where_proc_does_not_tell(system: str, mib: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux counts KiB, macOS bytes."""
    form = OnnxForm("student", Path("none"), 1)
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr("resource.getrusage", lambda _: SimpleNamespace(ru_maxrss=300 * 1024))
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "Name:\tpython\nVmRSS:\t1 kB\n")
    assert peak_mib(form, []) == mib
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: (_ for _ in ()).throw(FileNotFoundError()))
    assert peak_mib(form, []) == mib
    monkeypatch.setitem(sys.modules, "resource", None)
    assert peak_mib(form, []) is None


def test_what_cannot_be_loaded_is_said_with_its_name(tmp_path: Path) -> None:
    with (
        Worker(OnnxForm("student", tmp_path / "no.int8.onnx", 1), IMAGES) as worker,
        pytest.raises(AcamkdError, match=r"^student, onnxruntime int8: .*there is no such file$"),
    ):
        worker(begin)
