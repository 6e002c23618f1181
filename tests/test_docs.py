"""Every block of the documentation runs, and the site builds without a warning."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
import yaml
from torch import Tensor, nn

import acamkd
import acamkd.losses
from acamkd import cli, config, data, models
from acamkd.config.yaml_text import Loader
from acamkd.data.scenes import write_scenes
from acamkd.jobs.export.onnx_model import OnnxModel
from acamkd.jobs.inspect_layers import RATIO_ALL_LABELED, RATIOS
from acamkd.models.base import Task
from tiny_onnx import write_segmenter
from tiny_recipes import write_recipe

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]

ELSEWHERE = (
    "pip ", "mkdocs ", "pytest", "python docs/", "python benchmarks/", "python studies/", "python -m studies.",
    "#SBATCH", "#!/bin/bash", "sbatch ", "cd ", "torchrun ", "srun ",
)  # fmt: skip
"""How lines of the shell begin that are not this package's command."""

TINY = [
    "data.workers=0", "train.epochs=1", "train.batch_size=2", "train.accelerator=cpu",
    *(f"{role}.{key}={value}" for role in ("teacher", "student") for key, value in {
        "backbone_weights": "null", "backbone": "tu-test_efficientnet",
    }.items()),
]  # fmt: skip
TINY_OF: dict[Task, list[str]] = {
    "detection": [
        "data.resize=[64, 64]", "teacher.backbone=test_efficientnet", "student.backbone=test_efficientnet",
        *(f"{role}.{key}={value}" for role in ("teacher", "student") for key, value in {
            "fpn_channels": 64,
        }.items()),
    ],
    "segmentation": ["data.resize=[64, 64]", "data.augment={}"],
}  # fmt: skip
TINY_PAGE = {"foundation": ["teacher.backbone_weights=null", "teacher.options={depth: 3, embed_dim: 16, num_heads: 2}"]}
"""What one page needs beside."""


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[list[str]]:
    """Every line of the page that calls acamkd, as words."""
    found = []
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.split("&&"):
                words = shlex.split(part, comments=True)
                if words and words[0] == "acamkd":
                    found.append(words[1:])
                else:
                    assert not words or part.strip().startswith((*ELSEWHERE, "#")), f"{page.name}: what is `{part}`?"
    return found


def test_the_results_are_those_of_the_committed_trials() -> None:
    pages: dict[str, str] = runpy.run_path(str(DOCS / "generate_results.py"))["pages"]()
    assert {"research/results.md", "research/log.md"} <= set(pages)
    stale = [page for page, text in pages.items() if (DOCS / page).read_text(encoding="utf-8") != text]
    assert not stale, "write them anew: python docs/generate_results.py"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_blocks_are_of_the_kinds_that_these_tests_run(page: Path) -> None:
    fences = re.findall(r"^```(.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(fences[::2]) <= {"python", "sh", "yaml", "text"}
    assert set(fences[1::2]) <= {""}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert link.startswith("https://") or (page.parent / link).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_anchors_are_headings(page: Path) -> None:
    for link, anchor in re.findall(r"\]\((?!https:)([^)#\s]*)#([^)\s]+)\)", page.read_text(encoding="utf-8")):
        target = page.parent / link if link else page
        text = target.read_text(encoding="utf-8")
        if target.suffix == ".html":
            assert f'id="{anchor}"' in text
            continue
        headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        assert anchor in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}, anchor


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_have_the_arguments_and_options_that_are_shown(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    group: Any = typer.main.get_command(cli.app)
    for name, *words in commands(page):
        words = ["0" if word.startswith("$") else word for word in words]
        group.commands[name].make_context(name, words)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_recipes_and_their_parts_are_accepted(page: Path, tmp_path: Path) -> None:
    for block in blocks(page, "yaml"):
        content = yaml.load(block, Loader=Loader)
        if isinstance(content, list):
            content = {"losses": content}
        task = content.get("task", "segmentation")
        base = yaml.safe_load(write_recipe(tmp_path / task, task).read_text())
        config.parse({"name": "page", **base, **content}, source=str(page))


def test_the_proposed_ratios_are_written_down() -> None:
    text = (DOCS / "concepts/gradient-ratio.md").read_text(encoding="utf-8")
    assert f"write {RATIOS['detection']} for detectors and {RATIOS['segmentation']} for segmenters" in text
    assert re.search(rf"without unlabeled images\s+they write {RATIO_ALL_LABELED}", text)


def test_pairs_within_a_sentence_are_accepted() -> None:
    text = (DOCS / "concepts/pairs.md").read_text(encoding="utf-8")
    spans = re.findall(r"(?<!`)`(\[[^`]+|\{[^`]+|pairs:[^`]+)`(?!`)", text)
    given = [yaml.load(span, Loader=Loader) for span in spans]
    pairs = [each["pairs"] if isinstance(each, dict) and "pairs" in each else [each] for each in given]
    assert [config.Loss(name="pkd", pairs=each).pairs for each in pairs] == [(("backbone:*", "backbone:*"),), "auto"]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], None]:
    def call(words: list[str]) -> None:
        """The doctor may find what it looks for: a teacher of one epoch is none."""
        monkeypatch.setattr(sys, "argv", ["acamkd", *words])
        with pytest.raises(SystemExit) as end:
            cli.main()
        error = capsys.readouterr().err
        assert not end.value.code or (words[0] == "doctor" and "error:" not in error), error

    return call


@pytest.mark.usefixtures("reports")
@pytest.mark.parametrize(
    ("page", "task"),
    [("detector", "detection"), ("segmenter", "segmentation"),
     pytest.param("foundation", "detection", marks=pytest.mark.slow)],
)  # fmt: skip
def test_a_guide_runs_from_images_to_predictions(
    page: str, task: Task, run: Callable[[list[str]], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    write_scenes(tmp_path / "photos", train=4, val=2, size=(64, 64), seed=0, task=task)
    shutil.copytree("photos/images/val", "photos/images/unlabeled")
    guide = DOCS / f"guides/{page}.md"
    recipe, *_ = blocks(guide, "yaml")
    file = tmp_path / recipe.splitlines()[0].removeprefix("# ")
    file.write_text(recipe, encoding="utf-8")
    overrides = [word for override in (*TINY, *TINY_OF[task], *TINY_PAGE.get(page, ())) for word in ("--set", override)]
    for name, *words in commands(guide):
        with_recipe = any(word.endswith(".yaml") for word in words)
        own = list(words[:1]) + (overrides if with_recipe else []) + list(words[1:])  # the page's own come last
        run([name, *own])
    for block in blocks(guide, "python"):
        exec(compile(block, guide.name, "exec"), {})
    assert "torch.Size([" in capsys.readouterr().out


class Neck(nn.Module):
    """As MMDetection's FPN: `out_channels`, `num_outs`, a tuple of maps."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.out_channels, self.num_outs = channels, 2
        self.convs = nn.ModuleList(nn.Conv2d(3, channels, 3, stride=8 * (level + 1)) for level in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(conv(x) for conv in self.convs)


class Detector(nn.Module):
    """What the page uses of MMDetection's BaseDetector."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.neck = Neck(channels)

    def data_preprocessor(self, data: dict[str, Any], training: bool) -> dict[str, Any]:
        return {**data, "inputs": data["inputs"] / 255}

    def forward(self, inputs: Tensor, data_samples: list[Any], mode: str) -> dict[str, Any]:
        assert mode == "loss"
        return {"loss_cls": [x.square().mean() for x in self.neck(inputs)], "acc": torch.tensor(1.0)}


def test_the_loops_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plain, distiller, trainer, mmdetection = blocks(DOCS / "guides/own-loop.md", "python")
    scope: dict[str, Any] = {"loader": [(torch.rand(2, 3, 64, 64), torch.randint(4, (2, 64, 64)))] * 2}
    for block in (plain, distiller):
        exec(block, scope)
    assert set(scope["terms"]) == {
        "task/cross_entropy", "classifier.0/pkd/correlation", "classifier.4/cwd/channel",
    }  # fmt: skip
    exec(trainer, {"__name__": "page"})
    assert (tmp_path / "runs/segformer/student/model.safetensors").is_file()
    student, teacher = Detector(4), Detector(6)
    before = student.neck.convs[0].weight.clone()  # type: ignore[operator]
    data = {"inputs": torch.randint(255, (2, 3, 32, 32)).float(), "data_samples": [None, None]}
    exec(mmdetection, {"student": student, "teacher": teacher, "loader": [data]})
    assert not torch.equal(before, student.neck.convs[0].weight)  # type: ignore[arg-type]
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_saved_student_needs_nothing_of_acamkd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = blocks(DOCS / "guides/export.md", "python")[0]
    assert "acamkd" not in block
    recipe = config.load(ROOT / "recipes/camvid.yaml")
    trained = models.build(recipe.student.model_copy(update={"backbone_weights": None}), recipe.task, 11)
    folder = tmp_path / "runs/camvid/distilled"
    folder.mkdir(parents=True)
    models.save_weights(trained.net, folder / "student.safetensors")
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    exec(block, scope)
    loaded = scope["student"].state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in trained.net.state_dict().items())


def test_a_graph_of_one_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = (each for each in blocks(DOCS / "guides/export.md", "python") if "dimension_override" in each)
    write_segmenter(tmp_path / "student.onnx", shape=("batch", 3, 96, 128))
    monkeypatch.chdir(tmp_path)
    exec(block, {})
    fixed = OnnxModel("fixed.onnx")
    assert fixed.session.get_inputs()[0].shape == [1, 3, 96, 128]
    assert fixed.task == "segmentation"


def test_a_sections_pages_stand_in_the_home_pages_order(tmp_path: Path) -> None:
    for page in ("b", "a", "c", "index"):
        (tmp_path / "guides").mkdir(exist_ok=True)
        (tmp_path / f"guides/{page}.md").touch()
    (tmp_path / "index.md").write_text("[B](guides/b.md), [gone](guides/gone.md), [A](guides/a.md#first)")
    pages = runpy.run_path(str(DOCS / "hooks.py"))["pages_of"](tmp_path, "guides")
    assert pages == ["guides/index.md", "guides/b.md", "guides/a.md", "guides/c.md"]


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(
        words, cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    home = (tmp_path / "site/index.html").read_text(encoding="utf-8")
    assert 'href="scenes-report.html#viewer"' in home
    assert 'src="replay.html"' in home
    for page in ("scenes-report", "replay"):
        assert 'id="viewer"' in (tmp_path / f"site/{page}.html").read_text(encoding="utf-8")
    assert "display: none" in (tmp_path / "site/replay.html").read_text(encoding="utf-8").partition("</head>")[0]
    gallery = (tmp_path / "site/start/gallery/index.html").read_text(encoding="utf-8")
    for report in re.findall(r'href="\.\./\.\./(reports/\w+\.html)"', gallery):
        assert "mean over the seeds" in (tmp_path / "site" / report).read_text(encoding="utf-8")
    functions, losses, packages = (
        set(re.findall(r'id="([\w.]+)"', (tmp_path / f"site/reference/{page}/index.html").read_text(encoding="utf-8")))
        for page in ("api", "api-losses", "api-packages")
    )
    assert {f"acamkd.{name}" for name in set(dir(acamkd)) - set(vars(acamkd.losses))} <= functions
    bases = {"acamkd.losses.base.FeatureLoss", "acamkd.models.base.TaskModel", "acamkd.data.dataset.ImageDataset"}
    assert bases <= functions
    classes = [each for each in vars(acamkd.losses).values() if isinstance(each, type)]
    assert {f"{each.__module__}.{each.__name__}" for each in classes} <= functions | losses
    for package in (config, data, models):
        assert {f"{package.__name__}.{name}" for name in package.__all__} <= packages, package.__name__
    for name in acamkd.METHODS:
        page = (tmp_path / "site/methods" / name / "index.html").read_text(encoding="utf-8")
        linked = set(re.findall(r'href="\.\./\.\./reference/api-losses/#([\w.]+)"', page))
        assert linked, name
        assert linked <= losses
    listed = {path.relative_to(DOCS).with_suffix("") for path in DOCS.rglob("*.md")}
    pages = {path.parent.relative_to(tmp_path / "site") for path in (tmp_path / "site").rglob("index.html")}
    assert {Path(*path.parts[:-1]) if path.name == "index" else path for path in listed} == pages
    navigation = home[home.index('class="md-nav md-nav--primary') : home.index('class="md-content"')]
    linked_pages = {Path(link) for link in re.findall(r'href="([\w/.-]+)/?"', navigation)}
    assert pages <= linked_pages
