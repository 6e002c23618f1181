"""The guide to networks of transformers, run on tiny ones."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from acamkd import cli
from acamkd.data.scenes import write_scenes
from acamkd.engine.runs import load_student
from acamkd.models.base import head_of
from tiny_hf import OPTIONS

transformers: Any = pytest.importorskip("transformers")

GUIDE = (Path(__file__).parents[2] / "docs/guides/huggingface.md").read_text(encoding="utf-8")


def test_the_guide_runs_and_transformers_loads_what_it_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_scenes(tmp_path / "photos", train=4, val=2, size=(64, 64), seed=0, task="detection")
    (recipe,) = re.findall(r"^```yaml\n(.*?)^```", GUIDE, re.DOTALL | re.MULTILINE)
    (tmp_path / "rtdetr.yaml").write_text(recipe, encoding="utf-8")
    options = json.dumps(OPTIONS["rt_detr_v2"])
    overrides = [
        "data.workers=0", "data.resize=[64, 64]", "train.epochs=1", "train.batch_size=2", "train.accelerator=cpu",
        *(f"{role}.{setting}" for role in ("teacher", "student") for setting in (
            "arch=hf/rt_detr_v2", f"options={options}",
        )),
    ]  # fmt: skip
    commands = [shlex.split(line)[1:] for line in re.findall(r"^acamkd .*", GUIDE, re.MULTILINE)]
    assert [command[0] for command in commands] == ["train", "train", "distill"]
    for words in commands:
        result = CliRunner().invoke(cli.app, [*words, *(each for pair in overrides for each in ("--set", pair))])
        assert result.exit_code == 0, (result.output, result.exception)
    folder = tmp_path / "runs/rtdetr/distilled"
    assert "model.encoder.fpn_blocks.1/acam/spatial" in (folder / "history.csv").read_text().partition("\n")[0]
    student = load_student(folder)
    net = transformers.AutoModelForObjectDetection.from_pretrained(folder)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        outputs = net(**processor(images=image, return_tensors="pt"))
    (theirs,) = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=[(64, 64)])
    (ours,) = student.predict([image])
    assert torch.allclose(theirs["scores"], ours["scores"], atol=1e-5)
    assert net.config.id2label[0] != "LABEL_0"


def test_pairs_are_proposed_across_families() -> None:
    from acamkd.jobs.inspect_layers import of_names, propose

    levels = [f"model.encoder.{name}" for name in ("fpn_blocks.1", "pan_blocks.0", "pan_blocks.1")]
    teacher, student = of_names("hf/rt_detr_v2", "retinanet/mobilenetv3_small_050")
    keys = [f"backbone:{level}" for level in range(3)]
    assert propose(teacher, student) == [list(pair) for pair in zip(keys, levels, strict=True)]
    assert propose(teacher, head_of(teacher)) == levels
