"""What the command line does, Python does by the same word, as a notebook calls it."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main

import acamkd
import tiny
from acamkd import cli
from acamkd.engine.printing import Printable
from acamkd.errors import AcamkdError
from acamkd.losses.base import FeatureLoss, HeadLoss

FUNCTIONS = {"train", "distill", "evaluate", "predict", "export", "compare", "doctor", "inspect", "demo", "init", "run",
             "benchmark"}  # fmt: skip
OTHERS = {
    "TaskModel", "Detector", "Segmenter", "FeatureTap", "Distiller", "build_distiller", "load_student", "open_run",
    "METHODS",
}  # fmt: skip


def html(result: Printable) -> str:
    """What a notebook shows."""
    return tiny.in_notebook(result)["text/html"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("api")
    tiny.write_data(root)
    (root / "recipe.yaml").write_text(acamkd.config.dump(tiny.recipe(root, epochs=1)), encoding="utf-8")
    return root / "recipe.yaml"


@pytest.fixture(scope="module")
def run(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return acamkd.distill(recipe, out=tmp_path_factory.mktemp("run") / "distilled")


def test_every_name_is_listed_and_there() -> None:
    names = dir(acamkd)
    losses = {method.__name__ for method in acamkd.METHODS.values()}
    assert FUNCTIONS | OTHERS | losses <= set(names)
    for name in names:
        found = getattr(acamkd, name)
        assert found.__name__ == name if callable(found) else name == "METHODS"
    assert all(issubclass(getattr(acamkd, name), (FeatureLoss, HeadLoss)) for name in losses)
    with pytest.raises(AttributeError, match="has no attribute 'distil'"):
        acamkd.distil  # noqa: B018


def test_names_are_words_of_the_command_line_and_no_module_has_one() -> None:
    group: Any = typer.main.get_command(cli.app)
    assert set(group.commands) >= FUNCTIONS
    package = Path(acamkd.__file__).parent
    modules = {path.stem for path in package.iterdir()}
    assert not modules & set(dir(acamkd))


def test_the_import_does_not_wait_for_torch() -> None:
    code = "import sys, acamkd, acamkd.cli; acamkd.config.load; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_train_takes_overrides_and_a_role(recipe: Path, tmp_path: Path) -> None:
    trained = acamkd.train(recipe, "teacher", overrides=["train.seed=3", "teacher.weights=null"], out=tmp_path / "t")
    assert (trained.role, trained.metrics["seed"]) == ("teacher", 3)
    word: Any = "Teacher"
    with pytest.raises(AcamkdError, match="role: there is no 'Teacher'; did you mean teacher"):
        acamkd.train(recipe, word)
    with pytest.raises(AcamkdError, match="epoch: there is no 'lst'; did you mean last"):
        acamkd.evaluate(trained, epoch="lst")  # type: ignore[arg-type]
    assert "mIoU" in html(trained)


def test_distill_returns_a_run_or_an_estimate(recipe: Path, run: Any) -> None:
    assert "student" in html(run)
    estimate = acamkd.distill(recipe, dry_run=True)
    assert [part.name for part in estimate.parts][:3] == ["teacher", "student", "losses"]
    assert "the largest batch is about" in str(estimate)


def test_evaluate_takes_a_run_or_its_folder(run: Any) -> None:
    scores = acamkd.evaluate(run)
    assert scores == acamkd.evaluate(str(run.folder)) == acamkd.evaluate(run.folder)
    assert scores["mIoU"] == pytest.approx(run.metrics["student"]["mIoU"], abs=1e-6)
    assert f"{scores['mIoU']:.2f}" in html(scores)
    with pytest.raises(AcamkdError, match="no such folder"):
        acamkd.evaluate(run, overrides=["data.root=nowhere", "data.format=auto"])


def test_predict_and_load_student(run: Any, tmp_path: Path) -> None:
    image = sorted((run.recipe.data.root / "images/val").iterdir())[0]
    found = acamkd.predict(run, str(image), out=str(tmp_path / "found"))
    assert (found.count, found.unit, found.folder) == (1, "image", tmp_path / "found")
    assert (found.folder / "masks" / f"{image.stem}.png").is_file()
    assert "1 image, " in html(found)
    assert acamkd.load_student(run).num_classes == acamkd.load_student(str(run.folder)).num_classes


def test_doctor_gives_findings_or_counts(recipe: Path) -> None:
    diagnosis = acamkd.doctor(recipe)
    assert {finding.status for finding in diagnosis.findings} <= {"pass", "warn", "fail"}
    assert diagnosis.failed == any(finding.status == "fail" for finding in diagnosis.findings)
    assert "data" in html(diagnosis)
    report = acamkd.doctor(recipe, only_data=True)
    assert not report.failed
    assert "images" in html(report)


def test_inspect_takes_a_recipe_or_two_names(recipe: Path) -> None:
    assert acamkd.inspect(recipe).losses[0]["name"] == "acam"
    found = acamkd.inspect("retinanet/mobilenetv3_small_050", "fcos/mobilenetv3_small_050")
    assert found.losses[0]["pairs"] == ["backbone:*"]
    assert "backbone:*" in html(found)


@pytest.mark.parametrize(
    ("name", "module", "result"),
    [
        ("demo", "demo.demo", "Demo"),
        ("export", "export.export", "Export"),
        ("compare", "compare.compare", "ComparisonResult"),
    ],
)
def test_what_takes_long_is_the_commands_function(name: str, module: str, result: str) -> None:
    home = importlib.import_module(f"acamkd.jobs.{module}")  # its own tests run it
    assert getattr(acamkd, name) is getattr(home, name)
    assert issubclass(getattr(home, result), Printable)
