"""The programs of benchmarks/ and studies/ that need nothing from outside still run."""

from __future__ import annotations

import importlib
import json
import math
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torch import Tensor

import tiny_recipes
from acamkd import config
from acamkd.data.scenes import CLASSES
from acamkd.jobs.compare import trials_csv
from acamkd.jobs.compare.trials import plan
from acamkd.jobs.train import distill
from acamkd.losses.acam.distances import distillation_distances
from acamkd.losses.base import DistillationContext
from acamkd.losses.functional import masked_error
from acamkd.models.base import VOID, Task

ROOT = Path(__file__).parents[1]
STUDIES = sorted(file.parent.name for file in (ROOT / "studies").glob("*/trials.csv"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "program", ["loss_cost.py", "loss_cost.py scaling", "step_cost.py", "networks.py memory", "precision_variants.py"]
)
def test_quick_runs(program: str) -> None:
    script, *mode = program.split()
    command = [sys.executable, f"benchmarks/{script}", *mode, "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert any(name in done.stdout for name in ("acam, exact", "acam, paper, exact", "RetinaNet"))


@pytest.mark.slow
def test_the_gpu_script_runs_on_a_cpu_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/gpu.py", "--quick", "--device", "cpu", "--out", str(tmp_path)]
    for parts in (["studies"], ["tests", "steps", "studies"]):
        done = subprocess.run([*command, "--parts", *parts], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found = json.loads((tmp_path / "gpu.json").read_text())
        assert list(found["studies"]) == [f"segmentation | {method} | seed 0" for method in ("none", "acam")]
        assert ("studies: " in done.stdout) == (parts == ["studies"])
    assert found["tests"]["ACAM"]["passed"] > 5
    assert not found["tests"]["ACAM"]["failed"]
    rows = ("baseline", "teacher's forward", "acam, auto")
    modes = ("TF32", "TF32, teacher auto, compiled")
    assert list(found["steps"]) == [
        f"RT-DETRv2 R101 -> R18, 640 x 640 | {mode} | {row}" for mode in modes for row in rows
    ]
    for row in [*found["steps"].values(), *found["studies"].values()]:
        assert row["seconds"] > 0, row
    table = (tmp_path / "gpu.md").read_text()
    assert table.count("| acam, auto |") == 1
    assert "| segmentation / acam, mean of 1 |" in table


def test_the_page_has_every_program_and_no_other() -> None:
    page = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
    programs = {file.name for file in (ROOT / "benchmarks").glob("*.py")} - {"harness.py"}
    assert len(programs) <= 6
    assert set(re.findall(r"python benchmarks/(\w+\.py)", page)) == programs
    written = {Path(name).stem for name in re.findall(r"`results/(\w+)`", page)}
    kept = {file.stem for file in (ROOT / "benchmarks/results").glob("*.json")}
    assert all(any(stem == name or stem.startswith(f"{name}_") for name in written) for stem in kept)


@pytest.mark.parametrize("study", STUDIES)
def test_a_study_says_what_it_asked_and_holds_its_trials(study: str) -> None:
    folder = ROOT / "studies" / study
    page = (folder / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (.*)$", page, re.MULTILINE) == ["Question", "Data", "Reproduce", "Outcome"]
    found = trials_csv.comparisons(folder / "trials.csv")
    assert all(f"`{name}`" in page for name in found)
    for trials in found.values():
        assert {trial["metric"] for trial in trials.values()} <= {"mIoU", "mAP"}
        assert all(re.fullmatch("[0-9a-f]{12}", trial["recipe"]) for trial in trials.values())


@pytest.mark.parametrize(("study", "comparison", "methods", "seeds", "overrides"), [
    ("camvid_few", "camvid_few_all", "acam,acam-no-diversity,acam-shifted,acam-strength-normalized", 3, []),
    ("camvid_few", "camvid_few_all", "acam-hard-random,acam-hard-random-16,acam-difference,acam-shuffled", 3, []),
    ("camvid_few", "camvid_few", "acam,pkd,dist,acam-random", 3, []),
    ("bccd_few", "bccd_few", "acam,fitnet,pkd,cwd,fgd,mgd,maskd", 5, []),
    ("masks", "camvid", "acam,joint,detached,task,shuffled,adversarial,degree-zero", 1,
     ["teacher.backbone_weights=lite2.safetensors"]),
])  # fmt: skip
def test_a_study_is_finished_by_its_recipe(
    study: str, comparison: str, methods: str, seeds: int, overrides: list[str]
) -> None:
    """So that `acamkd compare` runs nothing of it anew."""
    folder = ROOT / "studies" / study
    overrides = [*overrides, "student.backbone_weights=lite0.safetensors"]
    trials = plan(config.load(folder / "recipe.yaml", overrides), methods.split(","), seeds, folder / comparison)
    assert [trial.name for trial in trials if trial.read(folder / comparison) is None] == []


def test_ratios_are_of_medians_within_a_round_and_of_the_fastest() -> None:
    harness = runpy.run_path(str(ROOT / "benchmarks/harness.py"))
    these, those = ([harness["Cost"](2 * x, x, 0.0) for x in seconds] for seconds in ((3.0, 2.0, 9.0), (2.0, 4.0, 3.0)))
    assert harness["ratios"](these, those) == {"ratio": 1.5, "cpu_ratio": 1.5, "fastest_ratio": 1.0}


def test_a_report_split_shares_no_photo_and_no_neighbor_with_training() -> None:
    module = runpy.run_path(str(ROOT / "studies/generality/prepare.py"))
    names = [f"photo{photo}_scaled_{crop}" for photo in range(100) for crop in range(2)]
    found = module["split"](names, module["SOURCES"]["facade11"])
    assert sorted(found["report"] + found["train"]) == sorted(names)
    assert 40 <= len(found["report"]) < 40 + 16
    blocks = {split: {int(name[5:].split("_")[0]) // 8 for name in found[split]} for split in ("report", "train")}
    assert not blocks["report"] & blocks["train"]
    assert (len(found["few"]), sorted(found["few"] + found["rest"])) == (
        -(-len(found["train"]) // 8),
        sorted(found["train"]),
    )
    drives = module["split"](["0006R0_1", "0016E5_2", "0016E5_10"], module["SOURCES"]["camvid"])
    assert (drives["report"], drives["train"]) == (["0006R0_1"], ["0016E5_2", "0016E5_10"])


def test_the_generality_study_searches_every_method_alike() -> None:
    module = runpy.run_path(str(ROOT / "studies/generality/plan.py"))
    item = module["Item"]
    search = item("voc07mini", "search", ("pkd", "acam-paper")).trials()
    assert [(trial.name, trial.recipe.losses[0].gradient_ratio) for trial in search] == [
        (f"{method}-{ratio:g}-seed1000", ratio) for method in ("pkd", "acam-paper") for ratio in (0.5, 2, 4, 8)
    ]
    none, at_eight = item("voc07mini", "few", ("pkd-8",), [3]).trials()
    assert none.seed == 3
    assert (none.recipe.losses, at_eight.recipe.losses[0].name, at_eight.key) == ((), "pkd", search[3].key)
    assert none.recipe.data.test is not None
    own, everything = (item("camvid", regime, ("acam",)).trials()[1].recipe for regime in ("own", "all"))
    assert (own.name, own.data.unlabeled is None) == ("generality-camvid-own", False)
    assert (str(everything.data.train.images), everything.data.unlabeled) == ("images/train", None)


def test_the_generality_study_combines_methods_and_prolongs_them() -> None:
    module = runpy.run_path(str(ROOT / "studies/generality/plan.py"))
    item = module["Item"]("bccd", "few", ("pkd-8_with_crosskd", "acam-0.5_for_80"), [0, 2])
    trials = item.trials()
    assert [trial.name for trial in trials] == item.names
    search = module["Item"]("bccd", "search", ("pkd",))
    assert [trial.name for trial in search.trials()] == search.names
    none, both, longer = (trial.recipe for trial in trials[:3])
    assert [(loss.name, loss.gradient_ratio) for loss in both.losses] == [("pkd", 8), ("crosskd", 2)]
    assert both.data.unlabeled == none.data.unlabeled is not None  # PKD uses what CrossKD cannot
    assert (longer.train.epochs, longer.train.eval_every, longer.losses[0].gradient_ratio) == (80, 20, 0.5)
    for kind, task in module["CHEAP"].items():
        ideas = module["Item"](task, "few", module["IDEAS"][kind], [3]).trials()
        assert {trial.recipe.losses[0].name.partition(":")[0] for trial in ideas[1:]} == {"studies.generality.ideas"}


FILES = {
    "HERE": "", "TABLE": "trials.csv", "FAILURES": "failed.csv", "COSTS": "costs.csv", "TEACHERS": "teachers.csv",
    "BY_IMAGE": "by_image.csv", "PULLS": "levels.csv",
}  # fmt: skip
"""Of the generality study."""


@pytest.fixture
def committed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The generality study's tables.py."""
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("studies.generality.tables")


@pytest.fixture
def answers(committed: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The same with a table of trials of its own."""
    for name, file in FILES.items():
        monkeypatch.setattr(committed.plan, name, tmp_path / file)
    monkeypatch.setattr(committed, "FIGURE", tmp_path / "figure.svg")
    return committed


def test_the_generality_studys_page_is_that_of_its_trials(committed: Any) -> None:
    page = (ROOT / "studies/generality/README.md").read_text(encoding="utf-8")
    assert committed.page(committed.current()) == page, "write it anew: python -m studies.generality.tables"


def _trial(method: str, seed: int, validation: float, report: float) -> dict[str, Any]:
    return {
        "method": method, "seed": seed, "recipe": "0" * 12, "metric": "mIoU", "history": [validation], "losses": [],
        "setting": None, "option": None, "final": {}, "test": {"mIoU": report}, "test_of_best_epoch": report,
        "masks": {}, "wall_time": 60.0, "cpu_time": 60.0, "teacher": None, "inherited": None,
    }  # fmt: skip


def test_the_generality_study_answers_from_whatever_trials_there_are(
    answers: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "README.md"
    page.write_text("# Study\n<!-- tables -->\nold\n<!-- end -->\n")
    answers.write()
    assert "old" not in page.read_text()
    scores = {"none": (40, 40), "acam": (44, 42), "fitnet": (43, 39), "pkd": (42, 41)}
    found = {
        f"{method}-seed{seed}": _trial(method, seed, validation + seed, report + 0.1 * seed * (method != "none"))
        for method, (validation, report) in scores.items()
        for seed in range(3)
    }
    found["cwd-seed0"] = _trial("cwd", 0, 41, 43)
    trials_csv.write(tmp_path / "trials.csv", {"generality_camvid_few": found})
    row = "generality_camvid_few,cwd-seed1,0,now,step 3: the loss is not finite\n"
    (tmp_path / "failed.csv").write_text(f"comparison,trial,recipe,time,why\n{row}")
    answers.write()
    text = page.read_text()
    assert "| Does distillation help? | `acam` - `none` | 3 | +2.10 [" in text
    assert "| yes (so far 1 of 6 tasks) |" in text
    assert "No trial yet of: Do they help more where" in text
    # FitNet validates best of the others, and is the worst on the report split.
    assert "| `acam` - best other (`fitnet` camvid) | 3 | +3.00 [" in text
    assert "1 attempts failed, 1 of them by a loss that was not finite. 1 of these trials have not ended since." in text
    assert "| `cwd` | 1 | +3.00 | 1 of 1 | +1.00 | -1.00 | - |" in text
    assert "1 few, one ratio | 108 | 13 | 95 |" in text
    # On the report split; CWD is ahead, on one seed.
    assert "| `camvid`, mIoU | - | 40.00 | 3 | -0.90 | +1.10 | **+3.00** (n 1) | +2.10 | - |" in text
    assert "does distillation help?" in (tmp_path / "figure.svg").read_text().lower()
    answers.show("does acam")
    assert capsys.readouterr().out.splitlines()[1].split() == ["camvid", "+3.00", "=", "+3.00", "+3.00", "+3.00"]
    with pytest.raises(SystemExit, match="Does ACAM lead"):
        answers.show("Is it fast?")
    found["acam-seed1"]["teacher"], found["pkd-seed1"]["teacher"] = {"sha256": "a"}, {"sha256": "b"}
    trials_csv.write(tmp_path / "trials.csv", {"generality_camvid_few": found})
    with pytest.raises(ValueError, match=r"generality_camvid_few: trials of the seeds \[1\] have different teachers"):
        answers.current()


def test_an_estimate_over_tasks_is_that_of_welch(answers: Any) -> None:
    differences = {"camvid": np.array([1.0, 3.0, 2.0]), "bccd": np.array([-1.0, 0.0, 1.0, 2.0, 3.0])}
    found = answers.estimate(differences)
    assert (found.mean, found.tasks, found.pairs, found.ahead, found.answer[:3]) == (1.5, 2, 8, 2, "yes")
    against = answers.estimate(differences, [1, -1])
    welch = stats.ttest_ind(*differences.values(), equal_var=False).confidence_interval()
    assert (against.mean, against.low, against.high) == pytest.approx((1, welch.low, welch.high))
    assert against.answer == "not enough; about 54 seeds a task"
    alone = answers.estimate({"bccd": differences["bccd"]})
    one = stats.ttest_1samp(differences["bccd"], 0).confidence_interval()
    assert (alone.low, alone.high) == pytest.approx((one.low, one.high))
    answer = {
        "no, the opposite": [-1.0, -1.1, -1.2], "no": [0.1, -0.1, 0.0], "yes, but less than 0.5": [0.2, 0.22, 0.21],
        "not enough: a task has one seed": [2.0],
    }  # fmt: skip
    assert {answers.estimate({"camvid": np.array(each)}).answer: each for each in answer.values()} == answer


def test_the_generality_study_gives_up_what_fails_twice(answers: Any, tmp_path: Path) -> None:
    plan, file = answers.plan, tmp_path / "failed.csv"
    scores = {0.5: 40.0, 2: 42.0, 4: 44.0}
    found = {
        f"{method}-levels-{ratio:g}-seed1000": {
            **_trial(f"{method}-levels", 1000, min(score, most), 0),
            "setting": ratio,
        }
        for method, most in (("pkd", 44.0), ("cwd", 42.9))
        for ratio, score in scores.items()
    }
    found["cwd-levels-8-seed1000"] = {**_trial("cwd-levels", 1000, 41.0, 0), "setting": 8.0}
    trials_csv.write(tmp_path / "trials.csv", {"generality_animals7_boxes_search": found})
    row = "generality_animals7_boxes_search,pkd-levels-8-seed1000,0,now,step 3: the loss is not finite\n"
    file.write_text(f"comparison,trial,recipe,time,why\n{row}")
    assert not plan.is_searched(["pkd"], "detection")
    file.write_text(file.read_text() + row)
    assert plan.is_searched(["pkd"], "detection")
    # PKD is 2 points better at the ratio 4, CWD 0.9, which is within the noise.
    assert plan.chosen("voc07mini", ["pkd", "cwd"]) == ("pkd-levels-4", "cwd-levels")


def test_the_share_of_foreground_is_that_of_boxes_or_of_classes(answers: Any, tmp_path: Path) -> None:
    module = importlib.import_module("studies.generality.by_image")
    boxes = torch.tensor([[0.0, 0, 4, 4], [2, 2, 6, 6], [7, 7, 8, 8]])
    assert module.share_of_foreground({"boxes": boxes}, (8, 10), None) == pytest.approx((16 + 16 - 4 + 1) / 80)
    mask = torch.tensor([[0, 0, 1, 2], [VOID, VOID, 0, 2]])
    assert module.share_of_foreground({"mask": mask}, (2, 4), 0) == 0.5
    row = ["camvid", "acam", "none", "3", "101", "+0.10", "0.300", "+1.00", "+2.00", "+3.00"]
    for rho in ("+0.10", "+0.20"):
        module.add(tmp_path / "by_image.csv", [*row[:5], rho, *row[6:]])
    assert answers._by_image().endswith("| camvid | acam | none | 3 | 101 | +0.20 | 0.300 | +1.00 | +2.00 | +3.00 |")
    assert answers._by_image().count("camvid") == 1


def test_halving_keeps_few_labels(tmp_path: Path) -> None:
    source, half = tmp_path / "source", tmp_path / "half"
    for folder in ("images/train", "masks/train", "annotations"):
        (source / folder).mkdir(parents=True)
    for k in range(5):
        Image.new("RGB", (8, 6)).save(source / f"images/train/{k}.jpg")
        Image.new("L", (8, 6)).save(source / f"masks/train/{k}.png")
    images = [{"id": 10 + k, "file_name": f"{k}.jpg", "width": 8, "height": 6} for k in range(5)]
    boxes = [{"id": k, "image_id": 10 + k, "category_id": 1, "bbox": [2, 0, 4, 6], "area": 24} for k in range(5)]
    content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "cell"}]}
    (source / "annotations/instances_train.json").write_text(json.dumps(content))

    command = [sys.executable, str(ROOT / "studies/downscale_dataset.py"), str(source), str(half), "--few", "2"]
    subprocess.run(command, capture_output=True, check=True)

    def names(folder: str) -> list[str]:
        return sorted(file.stem for file in (half / folder).iterdir())

    assert names("images/few") == names("masks/few") == ["0", "2", "4"]
    assert names("images/rest") == ["1", "3"]
    assert Image.open(half / "images/rest/1.jpg").size == (4, 3)
    few = json.loads((half / "annotations/instances_few.json").read_text())
    assert [image["file_name"] for image in few["images"]] == ["0.jpg", "2.jpg", "4.jpg"]
    assert [entry["bbox"] for entry in few["annotations"]] == [[1, 0, 2, 3]] * 3


def test_controls_differ_from_acam_in_what_they_are_named_after() -> None:
    study = runpy.run_path(str(ROOT / "studies/masks/variants.py"))
    torch.manual_seed(0)
    student, teacher = 3 * torch.randn(2, 5, 12, 16), 3 * torch.randn(2, 5, 12, 16)
    for control, shift in (("Shuffled", (1, 0)), ("ShiftedMasks", (0, 6))):
        loss = study[control](5, 5)
        term = loss.terms(student, teacher, DistillationContext())["spatial"]
        masks = loss.masks(student, teacher)["spatial"].roll(shift, dims=(0, 2)).flatten(2)
        errors = distillation_distances(student, teacher, ("spatial",), "standardized")["spatial"]
        torch.testing.assert_close(term, masked_error(errors, masks).mean())
    with pytest.raises(ValueError, match="only spatial masks can be moved"):
        study["ShiftedMasks"](5, 5, masks="both").terms(student, teacher, DistillationContext())
    steady = study["StrengthNormalized"](5, 5)
    term = steady.terms(student, teacher, DistillationContext())["spatial"]
    squares = steady.masks(student, teacher)["spatial"].flatten(2).square()
    torch.testing.assert_close(term, (torch.einsum("nmk,nk->nm", squares, errors) / squares.sum(dim=2)).mean())
    loss, scales = study["Scaled"](5, 5, weight=2), torch.tensor([1.0, 10, 100, 1, 1]).view(1, 5, 1, 1)
    term = loss.terms(scales * student, scales * teacher, DistillationContext())["spatial"]
    deviation = teacher.std(dim=(0, 2, 3), correction=0, keepdim=True)
    errors = ((student - teacher) / deviation).square().mean(dim=1).flatten(1)
    masks = loss.masks(scales * student, scales * teacher)["spatial"].flatten(2)
    torch.testing.assert_close(term, 2 * masked_error(errors, masks).mean())
    control = study["HardRandomMasks"](5, 5, mask_source="random", mask_grad="detached")
    masks = control.masks(student, teacher)["spatial"]
    assert masks.mean().item() == pytest.approx(0.5, abs=0.03)
    assert masks.flatten(2).std(dim=2).mean().item() == pytest.approx(0.46, abs=0.02)


def test_ideas_differ_from_acam_in_what_they_are_named_after(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    ideas = runpy.run_path(str(ROOT / "studies/generality/ideas.py"))
    torch.manual_seed(0)
    student, teacher, gradient = 3 * torch.randn(3, 2, 5, 6, 8)
    errors = distillation_distances(student, teacher, ("spatial",), "standardized")["spatial"]
    found = {name: ideas[name](5, 5) for name in ("LateMasks", "AgreeingTeacher", "CertainTeacher", "EqualLevels")}

    def term(name: str, step: int = 0, *, labeled: bool = True) -> Tensor:
        context = DistillationContext(step, (48, 64), None, gradient if labeled else None, labeled)
        terms: dict[str, Tensor] = found[name](student.requires_grad_(), teacher, context)
        assert ("spatial_selection" in terms) == labeled
        return terms["spatial"]

    def expected(name: str, error: Tensor) -> Tensor:
        return masked_error(error, found[name].masks(student, teacher)["spatial"].flatten(2)).mean()

    mean = found["LateMasks"].masks(student, teacher)["spatial"].mean(dim=(2, 3))
    torch.testing.assert_close(term("LateMasks", 99), (mean * errors.mean(dim=1, keepdim=True)).mean())
    torch.testing.assert_close(term("LateMasks", 100), expected("LateMasks", errors))
    torch.testing.assert_close(term("AgreeingTeacher", labeled=False), expected("AgreeingTeacher", errors))
    distances = distillation_distances(student, teacher, ("spatial",), "standardized")["spatial"]
    (direction,) = torch.autograd.grad(distances.sum(), student, retain_graph=True)
    agrees = (direction * gradient).sum(dim=1).flatten(1) >= 0
    torch.testing.assert_close(term("AgreeingTeacher"), expected("AgreeingTeacher", errors * agrees))
    scores = teacher.softmax(dim=1).flatten(2)
    certainty = 1 + (scores * scores.log()).sum(dim=1) / math.log(5)
    torch.testing.assert_close(term("CertainTeacher"), expected("CertainTeacher", errors * certainty))
    torch.testing.assert_close(term("EqualLevels"), expected("EqualLevels", errors))  # of stride 8
    level = ideas["EqualLevels"](5, 5)
    whole, half = (level(student, teacher, DistillationContext(0, (48 * k, 64), None, gradient)) for k in (1, 4))
    torch.testing.assert_close(half["spatial"], whole["spatial"] / 2)
    smooth = ideas["SmoothReward"](5, 5)
    context = DistillationContext(task_gradient=gradient)
    plain = (direction * gradient).sum(dim=1)
    (reward,) = smooth._rewards({"spatial": distances}, student, context).values()
    around = plain[:, 1:4, 2:5].mean(dim=(1, 2)) / plain[:, :2, :2].mean(dim=(1, 2))
    torch.testing.assert_close(reward.view(2, 6, 8)[:, 2, 3] / reward.view(2, 6, 8)[:, 0, 0], around)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_where_masks_point_is_told_for_every_class(task: Task, tmp_path: Path) -> None:
    losses = [{"name": "acam", "pairs": [tiny_recipes.PAIRS[task]]}]
    run = distill(tiny_recipes.write_recipe(tmp_path, task, losses=losses), out=tmp_path / "run")
    command = [sys.executable, "-m", "studies.masks.mask_by_class", str(run.folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if line[:1] == "|"]
    figures = {row[0]: (float(row[1].removesuffix(" %")), float(row[2])) for row in rows[2:]}
    thirds = [figures.pop(name) for name in ("top", "middle", "bottom")]
    assert sum(share * weight for share, weight in thirds) == pytest.approx(100, abs=2)
    assert {"background"} < figures.keys() <= {"background", *CLASSES}
