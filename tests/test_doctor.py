from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import tiny_recipes
from acamkd import cli, config, doctor
from acamkd.doctor import Finding, examine, ignorance
from acamkd.models.base import VOID


@pytest.fixture(scope="module")
def detection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_recipes.write_recipe(tmp_path_factory.mktemp("detection"), "detection")


@pytest.fixture(scope="module")
def segmentation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_recipes.write_recipe(tmp_path_factory.mktemp("segmentation"), "segmentation")


@pytest.fixture
def trained(segmentation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An override with a teacher that passes for trained: its batch norm has seen pictures, its score is good."""
    state = load_file(segmentation.parent / "teacher.safetensors")
    state = {name: x + 0.1 if name.endswith("running_var") else x for name, x in state.items()}
    save_file(state, tmp_path / "trained.safetensors")
    monkeypatch.setattr(doctor, "score", lambda _net, pictures, _scorer: {"mIoU": 60.0 * bool(list(pictures))})
    return f"teacher.weights={tmp_path / 'trained.safetensors'}"


def found(path: Path, *overrides: str) -> dict[str, list[Finding]]:
    """Findings by what was looked at."""
    result: dict[str, list[Finding]] = {}
    for finding in examine(config.load(path, overrides)):
        result.setdefault(finding.check, []).append(finding)
    return result


def test_a_sound_recipe_passes(segmentation: Path, trained: str) -> None:
    findings = found(segmentation, trained, "losses.0.weight=auto")
    assert {finding.status for group in findings.values() for finding in group} <= {"pass", "warn"}
    assert [finding.text for finding in findings["tap"]] == [
        "FitNet: segmentation_head.0 [6, 16, 16] <- segmentation_head.0 [6, 16, 16]"
    ]
    (weights,) = findings["teacher's weights"]
    assert "tensors matched" in weights.text
    (total,) = findings["gradient"]
    assert total.text.endswith("times as strong, before `weight: auto` sets fitnet")
    assert {"gradient at encoder.model", "gradient at segmentation_head.0"} <= set(findings)
    assert found(segmentation, trained)["gradient"][0].text.partition(":")[0] == total.text.partition(":")[0]


def test_a_random_teacher_fails(detection: Path, segmentation: Path) -> None:
    for path in (detection, segmentation):
        findings = found(path)
        assert findings["teacher's score"][0].status == "fail"
        assert "weights were not trained on these classes" in findings["teacher's score"][0].advice
        assert findings["batch norm"][0].status == "fail"
        assert "statistics of an untrained network (" in findings["batch norm"][0].text
        assert findings["gradient"]  # goes on, so that all is mended in one go


def test_every_level_is_shown(detection: Path) -> None:
    taps = [finding.text for finding in found(detection)["tap"]]
    assert taps[0] == "FitNet: backbone:0 [16, 8, 8] <- backbone:0 [16, 8, 8]"
    assert len(taps) == 5
    heads = found(detection, "losses.0.name=crosskd", "losses.0.pairs=[]")["tap"]
    assert [finding.text for finding in heads] == ["CrossKD: 10 layers of the heads"]


@pytest.mark.parametrize(
    ("overrides", "check", "status", "text"),
    [
        (["losses.0.weight=1000"], "gradient", "warn", "times as strong"),
        (["losses.0.weight=0"], "gradient", "fail", "nothing of the distillation arrives"),
        (["losses.0.pairs=[[segmentation_head.0, decoder.blocks]]"], "distillation", "fail", "there is no layer"),
        (["losses.0.pairs=[[segmentation_head.0, 'encoder:4']]"], "tap", "warn", "the student's map is resampled"),
        (["losses.0.name=fgd"], "distillation", "fail", "needs boxes"),
        (["student.mean=[0, 0, 0]"], "colours", "warn", "student 0.000 0.000 0.000 / "),
        (["train.batch_size=2"], "batch norm", "warn", "from 2 pictures at a time"),
        (["student.inherit=[neck]"], "student's weights", "fail", "no such part"),
        (["teacher.weights=null"], "teacher's weights", "fail", "the teacher has no weights"),
        (["teacher.options.decoder_pyramid_channels=16"], "teacher's weights", "fail", "every tensor is needed"),
        (["losses=[]"], "teacher's weights", "fail", "needs a `teacher` section and `losses`"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)  # fmt: skip
def test_what_is_wrong_is_found(
    segmentation: Path, trained: str, overrides: list[str], check: str, status: str, text: str
) -> None:
    finding = found(segmentation, trained, *overrides)[check][-1]
    assert finding.status == status
    assert text in finding.text
    assert finding.advice or status == "fail"


def test_a_students_own_weights_are_counted(segmentation: Path, trained: str, tmp_path: Path) -> None:
    state = load_file(segmentation.parent / "teacher.safetensors")
    save_file({name: x for name, x in state.items() if "segmentation_head" not in name}, tmp_path / "part.safetensors")
    (finding,) = found(segmentation, trained, f"student.weights={tmp_path / 'part.safetensors'}")["student's weights"]
    assert finding.status == "warn"
    assert "2 missing (segmentation_head.0.weight, segmentation_head.0.bias)" in finding.text


def test_knowing_nothing() -> None:
    mask = torch.tensor([[0, 0, 1, VOID]])
    assert ignorance([{"mask": mask}, {"mask": mask}], 5) == pytest.approx(100 * 2 / 3 / 2)


def test_the_score_ends_in_time(segmentation: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SECONDS", -1.0)
    started = time.monotonic()
    (finding,) = found(segmentation)["teacher's score"]
    assert "on 0 validation pictures" in finding.text
    assert finding.status == "fail"
    assert time.monotonic() - started < 20


def test_the_command_says_it_in_lines_and_in_its_exit_code(segmentation: Path, trained: str) -> None:
    run = CliRunner()
    result = run.invoke(cli.app, ["doctor", str(segmentation), "--set", trained])
    assert result.exit_code == 0, result.output
    assert "pass  teacher's score: mIoU 60.00" in result.stdout
    result = run.invoke(cli.app, ["doctor", str(segmentation), "--set", "losses.0.weight=0", "--json"])
    assert result.exit_code == 1
    findings: list[dict[str, Any]] = json.loads(result.stdout)
    assert {"check", "status", "text", "advice"} == set(findings[0])
    assert findings[-1]["status"] == "fail"
