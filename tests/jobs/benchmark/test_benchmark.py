from __future__ import annotations

import json
import os
import re
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest
import torch

import acamkd as package
from acamkd import config, data
from acamkd.engine.metrics import Scorer
from acamkd.errors import AcamkdError
from acamkd.jobs.benchmark import benchmark as module
from acamkd.jobs.benchmark.benchmark import RUNTIMES, benchmark, forms_of
from acamkd.jobs.benchmark.networks import Network
from acamkd.jobs.export.onnx_forms import Form, predict_one
from acamkd.jobs.export.onnx_model import OnnxModel, Pixels, Prediction
from command import Command
from tiny_onnx import write_segmenter
from tiny_recipes import write_recipe

GUIDE = Path(__file__).parents[3] / "docs/guides/benchmark.md"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file in the export of a run; its network is drawn at random."""
    folder = tmp_path_factory.mktemp("run")
    recipe = config.load(write_recipe(folder, "segmentation"))
    (folder / "export").mkdir()
    assert recipe.data.classes is not None
    return write_segmenter(folder / "export/student.onnx", recipe.data.classes, (64, 64))


def test_a_file_is_measured_on_the_images_of_its_run(acamkd: Command, exported: Path, tmp_path: Path) -> None:
    done = acamkd("benchmark", exported, "--threads", "1", "--batches", "1,2", "--seconds", "0.1", "--runtimes",
                  "onnxruntime", "--out", tmp_path / "new/out.json", "--json")  # fmt: skip
    assert done.code == 0, done.err
    content = json.loads(done.out)
    assert content == json.loads((tmp_path / "new/out.json").read_text())
    [row] = content["rows"]
    assert (row["network"], row["form"], row["threads"], row["rank"]) == ("student", "onnxruntime", 1, 1)
    assert set(row["images_per_second"]) == {"1", "2"}
    assert row["peak_mib"] < 250  # the process has no torch
    assert row["file_mib"] == exported.stat().st_size / 2**20

    recipe = config.load(exported.parent.parent / "recipe.yaml")
    images = data.build(recipe.data, recipe.task, "val", seed=0, augment=False)
    scorer, model = Scorer(recipe.task, images.classes), OnnxModel(exported)
    for image, target in (images[index] for index in range(len(images))):
        mask = model.predict(image.permute(1, 2, 0).numpy())["mask"]
        scorer.update([{"mask": torch.from_numpy(mask)}], [target])
    assert row["score"] == pytest.approx(scorer.compute()["mIoU"])
    assert row["on_front"]


def end_with_two_threads(form: Form, images: Sequence[Pixels], image: Pixels) -> Prediction:
    """As the system ends a process."""
    if form.threads == 2:
        os._exit(3)
    return predict_one(form, images, image)


def test_a_form_that_fails_on_an_image_of_the_metric_is_left_out_alone(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "predict_one", end_with_two_threads)
    found = benchmark(exported, runtimes=["onnxruntime"], threads=[2, 1], batches=[1], seconds=0.1,
                      out=tmp_path / "out.json")  # fmt: skip
    [row] = found.rows
    assert (row.threads, row.against) == (1, None)
    assert row.score == row.score
    assert found.left_out == ("student, onnxruntime: its process ended (-)",)
    with pytest.raises(AcamkdError, match=r"^no form can be run on this machine: student, onnxruntime: its process"):
        benchmark(exported, runtimes=["onnxruntime"], threads=[2], batches=[1], seconds=0.1, out=tmp_path / "none.json")
    assert not (tmp_path / "none.json").exists()


def test_what_cannot_be_measured_is_said(
    acamkd: Command, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    lone = write_segmenter(tmp_path / "lone.onnx")
    with pytest.raises(AcamkdError, match=r"lone\.onnx does not lie in a run's export: name a recipe"):
        benchmark(lone)
    with pytest.raises(AcamkdError, match=r"lone\.onnx was made for the classes a, b, and the images have background"):
        benchmark(lone, recipe=exported.parent.parent / "recipe.yaml")
    with pytest.raises(AcamkdError, match="there is no runtime 'onnx'; did you mean onnxruntime"):
        benchmark(exported, runtimes=["onnx"])
    with pytest.raises(AcamkdError, match="an ONNX file runs in onnxruntime and openvino, not in pytorch"):
        benchmark(exported, runtimes=["pytorch"])
    with pytest.raises(AcamkdError, match=f"{tmp_path} is a folder: --out takes the name of a file"):
        benchmark(exported, out="~")
    assert "--threads 1,x: write whole numbers" in acamkd("benchmark", exported, "--threads", "1,x").error


def test_every_network_has_every_form_of_this_machine(tmp_path: Path) -> None:
    files = tuple(tmp_path / name for name in ("a.onnx", "a.int8.onnx"))
    network = Network("distilled", tmp_path / "a.safetensors", torch.nn.Module, files)  # type: ignore[arg-type]
    left_out: list[str] = []
    forms = forms_of([network], RUNTIMES, (1, 2), left_out)
    names = [form.name for form in forms if form.threads == 1]
    assert names[:3] == ["PyTorch", "PyTorch bf16", "PyTorch compiled"]
    assert {"onnxruntime", "onnxruntime int8"} <= set(names)
    assert len(forms) == 2 * len(names)
    assert ("OpenVINO int8" in names) != ("openvino: it is not installed" in left_out)
    assert [form.name for form in forms_of([network], ["bf16"], (1,), left_out)] == ["PyTorch bf16"]


def test_a_version_is_that_of_the_package_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "onnxruntime":
            raise PackageNotFoundError(name)
        return f"the version of {name}"

    monkeypatch.setattr(module, "version", version)
    brought = {"onnxruntime": ["onnxruntime-gpu"]}
    monkeypatch.setattr(module, "packages_distributions", lambda: brought)
    assert module._machine()["versions"]["onnxruntime"] == "the version of onnxruntime-gpu"
    brought.clear()
    assert module._machine()["versions"]["onnxruntime"] is None


@pytest.mark.slow
def test_the_guides_code_runs(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [block] = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    exec(block.replace("runs/street/distilled", str(exported)), {})
    assert re.search(r"^onnxruntime [\d.]+ [\d.]+$", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.slow
def test_figures_are_those_of_a_loop_written_by_hand(tmp_path: Path) -> None:
    """Ratios alone; the least of three tries, since another program may take the processor in between."""
    recipe = write_recipe(tmp_path, "segmentation")
    package.train(recipe, out=tmp_path / "baseline")
    run = package.open_run(tmp_path / "baseline")
    package.export(run)
    images = data.build(run.recipe.data, "segmentation", "val", seed=0, augment=False)
    image = images[0][0]
    model, session = run.load(), OnnxModel(run.folder / "export/student.onnx", threads=1)
    pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    calls: dict[str, Callable[[], object]] = {
        "PyTorch": lambda: model.predict([image]),
        "onnxruntime": lambda: session.predict(pixels),
    }
    ratios: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(3):
        found = benchmark(run, runtimes=["pytorch", "onnxruntime"], threads=[1], batches=[1], seconds=2.0)
        for row in found.rows:
            times = []
            for _ in range(200):
                start = time.perf_counter()
                calls[row.form]()
                times.append(time.perf_counter() - start)
            ratios[row.form].append(row.timing.median / (1e3 * statistics.median(times)))
    for form, each in ratios.items():
        assert min(abs(ratio - 1) for ratio in each) < 0.1, (form, each)


def test_options_that_do_not_fit_the_model_are_refused(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text((exported.parent.parent / "recipe.yaml").read_text())
    (tmp_path / "student.safetensors").touch()
    with pytest.raises(
        AcamkdError, match=r"^--recipe is for a file; a run has a recipe of its own, which --set changes"
    ):
        benchmark(tmp_path, recipe=tmp_path / "recipe.yaml")
    with pytest.raises(AcamkdError, match=r"^--baseline is for a run: give its folder instead of a file"):
        benchmark(exported, baseline=tmp_path)


@pytest.mark.parametrize(
    ("option", "given"), [("--threads", "1,0"), ("--threads", "-1"), ("--batches", "two"), ("--batches", "")]
)
def test_counts_that_are_none_are_named(option: str, given: str, acamkd: Command, exported: Path) -> None:
    result = acamkd("benchmark", exported, f"{option}={given}")
    assert result.error == f"{option} {given}: write whole numbers from 1 on, separated by commas, such as 1,8\n"


def test_a_machine_that_runs_no_form_is_told_why(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "measure", lambda *_, **__: ({}, ["student, onnxruntime: its process ended"]))
    with pytest.raises(
        AcamkdError, match=r"^no form can be run on this machine: student, onnxruntime: its process end"
    ):
        benchmark(exported, runtimes=["onnxruntime"], threads=[1], out=tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()
