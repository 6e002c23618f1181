from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest

from acamkd import config, models
from acamkd.engine.runs import Run
from acamkd.errors import AcamkdError
from acamkd.files import write_text
from acamkd.jobs.benchmark.networks import files_of_run, networks_of
from tiny_onnx import write_segmenter
from tiny_recipes import MODELS, write_recipe


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with `distilled` and `baseline`, as trainings leave them, with random weights."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = config.load(write_recipe(folder, "segmentation"))
    weights = folder / "teacher.safetensors"
    for name, losses in (("distilled", recipe.losses), ("baseline", ())):
        (folder / name).mkdir()
        own = recipe.model_copy(
            update={"losses": losses, "data": recipe.data.model_copy(update={"root": recipe.data.root})}
        )
        write_text(folder / name / "recipe.yaml", config.dump(own))
        shutil.copy(weights, folder / name / "student.safetensors")
    return folder


def test_a_distilled_student_comes_with_its_teacher_and_its_baseline(trained: Path) -> None:
    run = Run(
        trained / "distilled", config.load(trained / "distilled/recipe.yaml", ["data.resize=[96, 64]"]), "student"
    )
    teacher, baseline, distilled = networks_of(run, None)
    assert [each.name for each in (teacher, baseline, distilled)] == ["teacher", "baseline", "distilled"]
    assert teacher.weights == trained / "teacher.safetensors"
    assert all(pickle.loads(pickle.dumps(each.build))() for each in (teacher, distilled))  # another process builds it
    assert baseline.weights == trained / "baseline/student.safetensors"
    assert distilled.weights == trained / "distilled/student.safetensors"
    assert baseline.build is not None
    assert baseline.build().resize == (96, 64)  # all see the same input


def test_a_teacher_of_other_classes_has_no_score_and_is_left_out(
    trained: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = config.load(trained / "distilled/recipe.yaml", ["teacher.num_classes=9"])
    run = Run(trained / "distilled", recipe, "student")
    caplog.set_level("INFO")
    assert [each.name for each in networks_of(run, None)] == ["baseline", "distilled"]
    assert "the teacher has 9 classes of its own, has no score and is left out" in caplog.text


def test_a_teacher_without_its_file_is_left_out(trained: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = config.load(trained / "distilled/recipe.yaml", ["teacher.weights=gone.safetensors"])
    run = Run(trained / "distilled", recipe, "student")
    assert [each.name for each in networks_of(run, None)] == ["baseline", "distilled"]
    assert "the teacher is left out: its weights are not there" in caplog.messages


def test_a_baseline_of_other_classes_is_left_out_and_refused_where_it_is_named(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("distilled", "baseline"):
        shutil.copytree(trained / name, tmp_path / name)
    recipe = config.load(tmp_path / "baseline/recipe.yaml", ["data.classes=[sky, road]"])
    write_text(tmp_path / "baseline/recipe.yaml", config.dump(recipe))
    run = Run(tmp_path / "distilled", config.load(tmp_path / "distilled/recipe.yaml"), "student")
    caplog.set_level("WARNING")
    assert [each.name for each in networks_of(run, None)] == ["teacher", "distilled"]
    said = f"{tmp_path}/baseline and {tmp_path}/distilled have different classes"
    assert f"the baseline is left out: {said}" in caplog.messages
    with pytest.raises(AcamkdError, match=f"^{said}$"):
        networks_of(run, tmp_path / "baseline")


def test_a_baseline_stands_alone(trained: Path) -> None:
    run = Run(trained / "baseline", config.load(trained / "baseline/recipe.yaml"), "student")
    assert [each.name for each in networks_of(run, None)] == ["baseline"]
    with pytest.raises(AcamkdError, match="is no distillation"):
        networks_of(run, trained / "distilled")


def test_a_distilled_run_is_no_baseline(trained: Path) -> None:
    run = Run(trained / "distilled", config.load(trained / "distilled/recipe.yaml"), "student")
    with pytest.raises(AcamkdError, match="distilled is no run of a baseline"):
        networks_of(run, trained / "distilled")


def test_an_export_serves_if_it_is_of_the_same_weights_and_size(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(trained / "distilled", tmp_path / "run")
    run = Run(tmp_path / "run", config.load(tmp_path / "run/recipe.yaml"), "student")
    assert files_of_run(run) == ()
    export = tmp_path / "run/export"
    export.mkdir()
    shutil.copy(run.weights, export)
    for name in ("student.int8.onnx", "student.onnx"):
        write_segmenter(export / name, resize=(64, 64))
    (export / "fixed.onnx").write_bytes(b"made of the export, for another runtime")
    assert [file.name for file in files_of_run(run)] == ["student.onnx", "student.int8.onnx"]
    write_segmenter(export / "student.onnx", resize=(32, 64))
    assert files_of_run(run) == ()
    assert "at another data.resize" in caplog.text
    models.save_weights(models.build(config.Model(**MODELS["segmentation"]), "segmentation", 3, None).net, run.weights)
    assert files_of_run(run) == ()
    assert "of other weights" in caplog.text
