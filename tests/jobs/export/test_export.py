"""`acamkd export` and `acamkd predict`, which need one another's files: the exporter is slow."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import huggingface_hub
import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import tiny
from acamkd import cli, config, data, load_student, models
from acamkd.engine.metrics import Scorer, score
from acamkd.engine.runs import Run, as_run, open_run
from acamkd.errors import AcamkdError
from acamkd.jobs.export import graph
from acamkd.jobs.export.card import write_card
from acamkd.jobs.export.export import Export, _measure_teacher, check_repository, export, push_to_hub, require
from acamkd.jobs.export.onnx_model import OnnxModel
from acamkd.jobs.export.quantize import quantize
from acamkd.jobs.predict.predict import predict
from acamkd.jobs.train import distill
from acamkd.models.base import ExportForm, head_of
from acamkd.models.segmentation import Segmenter
from tiny_recipes import write_recipe

TASKS = ("detection", "segmentation")
GUIDE = Path(__file__).parents[3] / "docs/guides/export.md"
FILES = [
    "README.md", "onnx_benchmark.py", "onnx_forms.py", "onnx_model.py", "student.onnx", "student.safetensors",
]  # fmt: skip


@pytest.fixture(scope="module", params=TASKS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp(request.param)
    recipe = write_recipe(folder, request.param)
    # Untrained scores lie far below any usual threshold. The smallest network of timm makes them too much alike.
    options = [f"student.{key}" for key in (
        "options.score_thresh=0.0", "options.detections_per_img=20", "backbone=mobilenetv3_small_050",
    )]  # fmt: skip
    return distill(config.load(recipe, options if request.param == "detection" else []), out=folder / "run")


@pytest.fixture(scope="module")
def exported(run: Run) -> Export:
    return export(run)


@pytest.fixture
def image(run: Run) -> Path:
    return sorted((run.recipe.data.root / "images/val").iterdir())[0]


def test_the_file_finds_what_pytorch_finds(run: Run, exported: Export) -> None:
    assert sorted(file.name for file in exported.folder.iterdir()) == FILES
    assert exported.folder == run.folder / "export"
    assert exported.relative_difference < 1e-4
    teacher, ours, theirs = exported.measured
    assert (teacher.network, ours.runtime, theirs.runtime) == ("teacher", "PyTorch", "onnxruntime")
    assert theirs.scores == pytest.approx(ours.scores, abs=0.1, nan_ok=True)
    assert teacher.scores[exported.metric] == run.metrics["teacher"][exported.metric]
    assert ours.cost is not None
    assert theirs.cost is not None
    assert ours.cost.parameters == theirs.cost.parameters == run.metrics["parameters"]
    kinds = {node.op_type for node in onnx.load(exported.folder / "student.onnx").graph.node}
    assert "ReduceSum" not in kinds  # the FPN's feature maps are added without a fifth dimension
    kept, trained = ((folder / "student.safetensors").read_bytes() for folder in (exported.folder, run.folder))
    assert kept == trained


@torch.no_grad()
def test_batches_of_any_size(run: Run, exported: Export) -> None:
    pixels = torch.rand(3, 3, 64, 64)
    expected = graph.build_graph(run.load(), run.recipe.data.resize, with_nms=False)(pixels)
    found = OnnxModel(exported.folder / "student.onnx").run(pixels.numpy())
    for ours, theirs in zip(expected, found.values(), strict=True):
        np.testing.assert_allclose(theirs, ours.numpy(), rtol=1e-3, atol=1e-4)


def test_the_card_runs_what_lies_beside_it(run: Run, exported: Export, image: Path) -> None:
    card = (exported.folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: onnx\npipeline_tag: ")
    for text in (f"| student | onnxruntime | {run.metrics['student'][exported.metric]:.2f} |", "TO FILL IN",
                 "Distilled by fitnet at", "Teacher: "):  # fmt: skip
        assert text in card, text
    by_onnxruntime, by_pytorch = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    alone = (
        f"import sys; sys.modules['acamkd'] = sys.modules['torch'] = None\n{by_onnxruntime}print(len(model.classes))"
    )
    done = subprocess.run(
        [sys.executable, "-c", alone.replace("image.jpg", str(image))],
        cwd=exported.folder, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(len(run.recipe.data.classes or ()))
    plain: dict[str, Any] = {}
    exec(by_pytorch.replace("student.safetensors", str(exported.folder / "student.safetensors")), plain)
    ours = load_student(run.folder).net
    pixels = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(_tensors(plain["net"](pixels)), _tensors(ours(pixels)))


@torch.no_grad()
def test_the_card_builds_another_frameworks_network(tmp_path: Path) -> None:
    section = {"arch": "retinanet", "backbone": "torchvision/resnet50", "backbone_weights": None, "fpn_channels": 8,
               "options": {"convention": "mmdetection"}}  # fmt: skip
    raw = tiny.raw_recipe(tmp_path, "detection") | {"student": section}
    raw["data"]["resize"] = {"short": 64, "long": 96}
    recipe = config.parse(raw)
    model = models.build(recipe.student, "detection", 2, recipe.data.resize).eval()
    models.save_weights(model.net, tmp_path / "student.safetensors")
    for has_ended in (False, True):
        _write_card(tmp_path, recipe, model, has_ended=has_ended)
        assert ("stopped before their end" in (tmp_path / "README.md").read_text()) is not has_ended
    pixels = [torch.rand(3, 48, 80)]
    torch.testing.assert_close(_tensors(_run_card(tmp_path)["net"](pixels)), _tensors(model.net(pixels)))


def _write_card(folder: Path, recipe: config.Recipe, model: models.TaskModel, *, has_ended: bool = True) -> None:
    metric = "mAP" if recipe.task == "detection" else "mIoU"
    figures = SimpleNamespace(
        measured=[SimpleNamespace(network="student", runtime="PyTorch", scores={metric: 1.0}, cost=None)],
        images=4, threads=1, difference=0.0, relative_difference=0.0,
    )  # fmt: skip
    graph_inputs = [SimpleNamespace(shape=["batch", 3, 64, 96])]
    exported: Any = SimpleNamespace(classes=("a", "b"), session=SimpleNamespace(get_inputs=lambda: graph_inputs))
    run: Any = SimpleNamespace(recipe=recipe, role="student", has_ended=has_ended, metrics={"epochs": 2})
    write_card(folder / "README.md", run, model, exported, cast(Export, figures))


def _run_card(folder: Path) -> dict[str, Any]:
    """What the card's code for PyTorch leaves behind."""
    block = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    found: dict[str, Any] = {}
    exec(block.replace("student.safetensors", str(folder / "student.safetensors")), found)
    return found


def _tensors(found: Any) -> list[Tensor]:
    return list(found[0].values()) if isinstance(found, list) else [found]


def test_an_export_shows_its_table_in_a_notebook(exported: Export) -> None:
    shown = tiny.in_notebook(exported)["text/html"]
    assert "onnxruntime" in shown
    assert f"{exported.measured[-1].scores[exported.metric]:.2f}" in shown


@pytest.mark.parametrize("run", ["segmentation"], indirect=True)
def test_the_guides_code_runs(
    run: Run, exported: Export, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    _, by_onnxruntime, _, by_acamkd = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    shutil.copytree(exported.folder, tmp_path, dirs_exist_ok=True)
    shutil.copy(image, tmp_path / "image.jpg")
    shutil.copy(run.folder.parent / "recipe.yaml", tmp_path / "street.yaml")
    monkeypatch.chdir(tmp_path)
    exec(by_onnxruntime.replace("from onnx_model", "from acamkd.jobs.export.onnx_model"), {})
    assert "'background': " in capsys.readouterr().out
    exec(by_acamkd, {})
    assert capsys.readouterr().out.startswith("runs/street/distilled: mIoU student ")


def test_the_command_prints_how_the_two_runtimes_compare(
    run: Run, exported: Export, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("acamkd.jobs.export.export.export", lambda *_, **__: exported)  # it has run, and takes its time
    monkeypatch.setattr(sys, "argv", ["acamkd", "export", str(run.folder)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    out = capsys.readouterr().out
    assert end.value.code == 0
    assert re.search(rf"student .* onnxruntime .* {run.metrics['student'][exported.metric]:.2f} ", out)
    assert f"largest difference of the outputs {exported.difference:.1e}" in out


def test_an_export_is_not_replaced_unasked(run: Run, exported: Export, tmp_path: Path) -> None:
    with pytest.raises(AcamkdError, match=r"export already holds an export: --overwrite replaces it"):
        export(run)
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(AcamkdError, match="exists and is not an export: choose another folder"):
        export(run, out=tmp_path, overwrite=True)
    shutil.copy(exported.folder / "onnx_model.py", tmp_path)
    (tmp_path / "__pycache__").mkdir()  # as its programs leave it
    with pytest.raises(AcamkdError, match=r"also holds thesis\.txt, which no export writes: choose another folder"):
        export(run, out=tmp_path, overwrite=True)


def test_a_folder_that_cannot_be_written_is_said_first(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken").touch()
    monkeypatch.setattr(data, "build", None)
    with pytest.raises(AcamkdError, match=rf"cannot write {tmp_path}/taken: File exists; --out"):
        export(run, out=tmp_path / "taken" / "export")


def test_at_another_size_the_teacher_is_scored_again(run: Run) -> None:
    """Otherwise the table would set scores of two sizes side by side."""
    other = as_run(run, ["data.resize=[96, 96]"])
    images = data.build(other.recipe.data, other.recipe.task, "val", seed=0, augment=False)
    [same], [again] = _measure_teacher(run, images), _measure_teacher(other, images)
    assert same.scores == run.metrics["teacher"]
    batches = [([image], [target]) for image, target in (images[index] for index in range(len(images)))]
    scores = score(head_of(other.load_teacher()), batches, Scorer(other.recipe.task, images.classes))
    assert again.scores == pytest.approx(scores, nan_ok=True)
    assert again.cost is not None
    assert same.cost is not None
    assert again.cost.gflops > 2 * same.cost.gflops


def test_a_file_that_computes_something_else_is_not_left_behind(
    run: Run, exported: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(_: Any, file: Path, __: Any) -> None:
        file.write_bytes((exported.folder / "student.onnx").read_bytes())

    monkeypatch.setattr("acamkd.jobs.export.export.write_graph", wrong)
    changed = run.load()
    for parameter in changed.net.parameters():
        parameter.data.mul_(1.1)
    monkeypatch.setattr(Run, "load", lambda _: changed)
    with pytest.raises(AcamkdError, match=r"the exported file is wrong: .*; nothing was written"):
        export(run, out=tmp_path / "export")
    assert list(tmp_path.iterdir()) == []


def test_an_image_that_cannot_be_decoded_is_named(
    run: Run, exported: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(run.recipe.data.root, tmp_path / "data")
    for file in (tmp_path / "data/images/val").iterdir():
        file.write_bytes(file.read_bytes()[:-200])
    ready = exported.folder / "student.onnx"
    monkeypatch.setattr("acamkd.jobs.export.export.write_graph", lambda _, file, __: shutil.copy(ready, file))
    with pytest.raises(AcamkdError, match=rf"^{tmp_path}/data/images/val/.*: the image cannot be read"):
        export(run, overrides=[f"data.root={tmp_path / 'data'}"], out=tmp_path / "export")
    assert [folder.name for folder in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize("run", ["detection"], indirect=True)
def test_the_full_graph_suppresses_boxes_itself(
    run: Run, tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = run.load()
    for parameter in model.net.parameters():  # or many scores are equal
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    monkeypatch.setattr(Run, "load", lambda _: model)
    figures = export(run, out=tmp_path / "full", with_nms=True)
    assert figures.difference < 1e-5
    exported = OnnxModel(tmp_path / "full/student.onnx")
    assert exported.metadata["nms"] is None
    pixels = np.array(Image.open(image).convert("RGB"))
    (expected,) = model.predict([torch.from_numpy(pixels).permute(2, 0, 1)])
    found = exported.predict(pixels)
    np.testing.assert_allclose(found["scores"], expected["scores"].numpy(), atol=1e-5)
    gaps = np.abs(np.subtract.outer(found["scores"], found["scores"]))
    alone = (gaps < 1e-5).sum(axis=1) == 1  # which of several boxes with one score is kept is a matter of rounding
    assert alone.sum() > 5
    np.testing.assert_allclose(found["boxes"][alone], expected["boxes"].numpy()[alone], atol=0.11)
    np.testing.assert_array_equal(found["labels"][alone], expected["labels"].numpy()[alone])
    assert len(set(found["labels"][alone])) > 1


@pytest.mark.parametrize("run", ["detection"], indirect=True)
def test_faster_rcnn_is_exported_with_its_suppression_alone(run: Run, tmp_path: Path) -> None:
    torch.manual_seed(0)
    section = config.Model(arch="faster_rcnn", backbone="mobilenetv3_small_050", backbone_weights=None, fpn_channels=16)
    model: Any = models.build(section, "detection", 3, (64, 64)).eval()
    model.net.roi_heads.score_thresh = 0.0
    model.net.roi_heads.detections_per_img = 20
    for parameter in model.net.roi_heads.box_predictor.parameters():  # or all scores are equal
        torch.nn.init.normal_(parameter, std=0.5)
    assert graph.needs_nms(model)
    with pytest.raises(AcamkdError, match=r"FasterRCNN suppresses boxes .*: use --with-nms"):
        graph.build_graph(model, (64, 64), with_nms=False)
    with pytest.raises(AcamkdError, match="writes a graph for one image size"):
        graph.build_graph(model, None, with_nms=True)
    recipe = run.recipe.model_copy(update={"data": run.recipe.data.model_copy(update={"classes": ("a", "b", "c")})})
    graph.write_graph(graph.build_graph(model, (64, 64), with_nms=True), tmp_path / "x.onnx", recipe)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    (expected,) = model.predict([torch.from_numpy(pixels).permute(2, 0, 1)])
    found = OnnxModel(tmp_path / "x.onnx").predict(pixels)
    assert len(found["scores"]) > 5
    for name in ("scores", "labels", "boxes"):
        np.testing.assert_allclose(found[name], expected[name].numpy(), atol=0.11 if name == "boxes" else 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("run", ["detection"], indirect=True)
@pytest.mark.parametrize("threshold", [0.05, 1.0])
def test_a_graph_that_suppresses_boxes_is_quantized(run: Run, tmp_path: Path, threshold: float) -> None:
    """Its convolutions alone; and an image may have no box."""
    model: Any = run.load()
    model.net.score_thresh = threshold
    file, small = tmp_path / "full.onnx", tmp_path / "small.onnx"
    graph.write_graph(graph.build_graph(model, run.recipe.data.resize, with_nms=True), file, run.recipe)
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    found = quantize(file, small, [image], lambda _: 50.0, before=50.0, max_drop=0.0)
    assert {name.rpartition(" of ")[2] for name in found.tried} == {"convolving operators", "weighted operators"}
    content = onnx.load(small).graph
    stored = {value.name for value in content.initializer}
    rounded = {n.output[0] for n in content.node if n.op_type == "DequantizeLinear" and n.input[0] in stored}
    assert all((n.op_type == "Conv") == (not rounded.isdisjoint(n.input)) for n in content.node)
    expected, boxes = (OnnxModel(each).predict(image)["boxes"] for each in (file, small))
    assert (len(expected) > 0) == (threshold < 1)
    assert len(boxes) == len(expected)
    np.testing.assert_allclose(boxes, expected, atol=10)


@pytest.mark.slow
def test_every_file_comes_with_its_metric_or_not_at_all(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    figures = export(run, out=tmp_path / "small", int8=True, openvino=True, max_drop=100.0)
    added = [
        "student.int8.onnx",
        "openvino_model.py",
        *(f"student{i}.{s}" for i in ("", ".int8") for s in ("bin", "xml")),
    ]
    assert sorted(file.name for file in figures.folder.iterdir()) == sorted([*FILES, *added])
    pytorch, before, after, openvino, _ = figures.measured[-5:]
    assert [row.runtime for row in figures.measured[-5:]] == [
        "PyTorch", "onnxruntime", "onnxruntime int8", "OpenVINO", "OpenVINO int8",
    ]  # fmt: skip
    assert openvino.scores == pytest.approx(pytorch.scores, abs=0.1, nan_ok=True)
    assert figures.quantized is not None
    assert figures.quantized.before == before.scores[figures.metric]
    assert figures.quantized.after == after.scores[figures.metric]
    assert "INT8: " in str(figures)
    card = (figures.folder / "README.md").read_text()
    assert "| student | onnxruntime int8 | " in card
    assert "| student | OpenVINO | " in card
    for ending in ("onnx", "bin"):
        sizes = [(figures.folder / f"student{kind}.{ending}").stat().st_size for kind in ("", ".int8")]
        assert sizes[1] < 0.7 * sizes[0]
    # No file can be better than the float one by 101 points.
    with pytest.raises(AcamkdError, match=r"INT8 loses .* nodes in float \(allowed: -101\): nothing was written"):
        export(run, out=tmp_path / "none", int8=True, max_drop=-101.0)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["small"]


@pytest.mark.parametrize("run", ["segmentation"], indirect=True)
def test_a_file_that_another_tool_has_changed_is_still_read(exported: Export, tmp_path: Path) -> None:
    content = onnx.load(exported.folder / "student.onnx")
    content.metadata_props.add(key="onnx.infer", value="onnxruntime.quant")  # as its quantization does
    onnx.save(content, tmp_path / "quantized.onnx")
    assert OnnxModel(tmp_path / "quantized.onnx").metadata == OnnxModel(exported.folder / "student.onnx").metadata
    del content.metadata_props[:]
    onnx.save(content, tmp_path / "bare.onnx")
    with pytest.raises(AcamkdError, match=r"bare\.onnx was not written by acamkd export"):
        OnnxModel(tmp_path / "bare.onnx")


@pytest.mark.parametrize("run", ["segmentation"], indirect=True)
def test_what_cannot_be_exported_is_said(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AcamkdError, match="segmentation has no non-maximum suppression"):
        export(run, with_nms=True)
    monkeypatch.setattr("acamkd.jobs.export.export.find_spec", lambda name: None if name == "onnx" else "there")
    with pytest.raises(AcamkdError, match=r"export needs onnx: pip install 'acamkd\[export\]'"):
        require("onnx", "onnxruntime")


class ConnectionlessError(Exception):
    """Of the transport's own, as where there is no network."""


class Hub:
    """The Hub, offline."""

    def __init__(self) -> None:
        self.files: list[str] = []

    def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> str:
        assert private
        assert exist_ok
        return f"https://hub/{name}"

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        if repo_id.endswith("full"):
            raise OSError("no space left")
        if repo_id.endswith("away"):
            raise ConnectionlessError("no route")
        self.files = sorted(file.name for file in folder_path.iterdir())


def test_an_export_goes_to_the_hub(exported: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    assert push_to_hub(exported.folder, "me/student") == "https://hub/me/student"
    assert hub.files == FILES
    with pytest.raises(AcamkdError, match=r"me/full could not be uploaded: no space left\n .*`hf upload me/full"):
        push_to_hub(exported.folder, "me/full")
    with pytest.raises(AcamkdError, match=r"me/away could not be uploaded: no route\n .* is complete"):
        push_to_hub(exported.folder, "me/away")
    with pytest.raises(AcamkdError, match="--push-to-hub student: give OWNER/NAME"):
        check_repository("student")


def test_a_run_and_its_export_predict_alike(run: Run, exported: Export, image: Path, tmp_path: Path) -> None:
    ours = predict(run.folder, image.parent, out=tmp_path / "run", score=0.0).folder
    # onnxruntime alone: torch is not importable there.
    script = (
        "import sys; sys.modules['torch'] = None; from pathlib import Path; "
        "from acamkd.jobs.predict.predict import predict; "
        f"predict(Path({str(exported.folder / 'student.onnx')!r}), Path({str(image.parent)!r}), "
        f"out=Path({str(tmp_path / 'onnx')!r}), score=0.0)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
    names = sorted(file.name for file in image.parent.iterdir())
    for folder in (ours, tmp_path / "onnx"):
        assert sorted(file.name for file in (folder / "overlays").iterdir()) == names
        width, height = Image.open(folder / "overlays" / names[0]).size
        assert width == Image.open(image).width
        assert (height > Image.open(image).height) == (run.recipe.task == "segmentation")  # with its legend
    if run.recipe.task == "segmentation":
        (expected,) = run.load().predict([torch.from_numpy(np.array(Image.open(image))).permute(2, 0, 1)])
        masks = [np.array(Image.open(folder / f"masks/{image.stem}.png")) for folder in (ours, tmp_path / "onnx")]
        np.testing.assert_array_equal(masks[0], expected["mask"].numpy())
        assert (masks[0] == masks[1]).mean() > 0.999
        return
    by_run, by_onnx = (json.loads((folder / "predictions.json").read_text()) for folder in (ours, tmp_path / "onnx"))
    assert len(by_run) == len(by_onnx) > 0
    scores = [sorted(box["score"] for box in boxes) for boxes in (by_run, by_onnx)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    assert {box["category_name"] for box in by_run} <= set(run.recipe.data.classes or ())
    assert set(by_run[0]) == {"file_name", "category_id", "category_name", "bbox", "score"}
    strict = predict(run.folder, image, out=tmp_path / "strict", score=1.0).folder
    assert json.loads((strict / "predictions.json").read_text()) == []


def test_a_run_prints_itself(run: Run) -> None:
    text, table = repr(run), tiny.in_notebook(run)["text/plain"]
    name = run.metrics["metric"]
    assert re.fullmatch(
        rf".*run: {name} student [\d.]+, teacher [\d.]+, best epoch 1, [\d,]+ parameters, 0:00:\d+", text
    )
    assert re.search(rf"│ student +│ {run.metrics['student'][name]:.2f} ", table)
    assert open_run(run.folder).metrics == run.metrics
    unfinished = Run(run.folder / "none", run.recipe, "student")
    assert repr(unfinished) == f"{run.folder / 'none'}: student of recipe, not ended" == str(unfinished)


class OwnSegmenter(Segmenter):
    """A TaskModel of the user's, which holds the network."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(nn.Conv2d(3, num_classes, 1), num_classes, (0.5,) * 3, (0.2,) * 3, None)


def test_the_card_takes_the_network_out_of_a_task_model(tmp_path: Path) -> None:
    raw = tiny.raw_recipe(tmp_path)
    raw["student"] = {"arch": f"{__name__}:OwnSegmenter", "backbone": "resnet50"}
    raw["train"] |= {"epochs": 3, "ema": 0.9998}
    recipe = config.parse(raw)
    model = models.build(recipe.student, "segmentation", 2).eval()
    models.save_weights(model.net, tmp_path / "student.safetensors")
    _write_card(tmp_path, recipe, model)
    text = (tmp_path / "README.md").read_text()
    assert f"# tiny: {__name__}:OwnSegmenter\n" in text
    assert "3 epochs in batches of 4, adamw at 0.001, seed 0; ended early, after epoch 2\n- Weights: the moving" in text
    found = _run_card(tmp_path)
    pixels = torch.rand(1, 3, 8, 8)
    torch.testing.assert_close(found["net"](pixels), model.net(pixels))


class _OfItsOwn(Segmenter):
    """Says itself how it is exported."""

    def export_form(self) -> ExportForm:
        return ExportForm(lambda pixels: {"logits": self.net(pixels)}, resize=None, multiple=8)


def test_a_segmenters_own_form_of_an_export_counts() -> None:
    model = _OfItsOwn(torch.nn.Conv2d(3, 2, 1), 2).eval()
    built = graph.build_graph(model, (64, 64), with_nms=False)
    assert isinstance(built, graph.FormGraph)
    assert (built.multiple, built.resize) == (8, None)
    assert isinstance(graph.build_graph(Segmenter(model.net, 2), (64, 64), with_nms=False), graph.SegmentationGraph)
