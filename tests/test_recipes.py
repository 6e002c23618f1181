"""Every recipe under recipes/ is accepted and trains; those of the paper at their networks' real size."""

from __future__ import annotations

import re
import runpy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from PIL import Image

from acamkd import config, models
from acamkd.data.scenes import write_scenes
from acamkd.distillation.build import build_distiller
from acamkd.distillation.methods import options
from acamkd.engine.module import TrainingModule
from acamkd.jobs.setup import Batches, build_network

ROOT = Path(__file__).parents[1]
few_labels = runpy.run_path(str(ROOT / "studies/downscale_dataset.py"))["few_labels"]
ONLINE = ("rtdetr.yaml",)
"""Recipes whose networks are on the Hub alone; their guide's runs in tests/jobs/test_hf_runs.py."""
FILES = {
    **{str(file.relative_to(ROOT / "recipes").with_suffix("")): file
       for file in sorted((ROOT / "recipes").rglob("*.yaml"))
       if file.parent.name not in ("combinations", "foundation") and file.name not in ONLINE},
    **{f"studies/{file.parent.name}": file for file in sorted((ROOT / "studies").glob("*/recipe.yaml"))},
}  # fmt: skip
PAPER = {name.removeprefix("paper/"): file for name, file in FILES.items() if name.startswith("paper/")}
PAGE = (ROOT / "docs/research/paper.md").read_text(encoding="utf-8")


def rows(page: str, first: str) -> list[dict[str, str]]:
    """The table of a page whose first column has this title."""
    (table,) = re.findall(rf"^\| {first} \|.*\n\|[-|]+\n((?:\|.*\n)+)", page, re.MULTILINE)
    (header,) = re.findall(rf"^(\| {first} \|.*)\n", page, re.MULTILINE)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in [header, *table.splitlines()]]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[1:]]


@pytest.mark.parametrize("name", PAPER)
def test_a_recipe_of_the_paper_says_what_it_costs_and_aims_at(name: str) -> None:
    text = PAPER[name].read_text(encoding="utf-8")
    (row,) = (row for row in rows(PAGE, "recipe") if row["recipe"] == f"`{name}`")
    assert len(text.splitlines()) <= 35
    assert set(re.findall(r"recipes/\S+", text)) == {f"recipes/paper/{name}.yaml"}
    assert re.findall(r"target: the paper's (\S+)", text) == [row["target"]]
    assert re.findall(r"the baseline; target: (\S+)", text) == [row["baseline"]]
    assert re.findall(r"; (\S+) hours at", text) == [row["hours"]]


@pytest.mark.parametrize("name", PAPER)
def test_the_settings_are_the_papers(name: str) -> None:
    recipe = config.load(PAPER[name])
    train, (loss,) = recipe.train, recipe.losses
    assert isinstance(train.devices, int)
    assert train.devices * train.batch_size * train.accumulate == 16
    assert train.optimizer.name == "sgd"
    literal = {"weight": 1.0, "diversity_weight": 1.0, "mask_grad": "joint", "query": "teacher", "masks": "both"}
    assert options(loss.name, loss.preset, loss.options).items() >= literal.items()
    masks = options(loss.name, loss.preset, loss.options)["num_masks"]
    if recipe.task == "detection":
        assert (masks, train.epochs, train.schedule.milestones) == (6, 24, (16, 22))
        assert (train.optimizer.momentum, train.optimizer.weight_decay) == (0.9, 1e-4)
        assert recipe.student.inherit
    else:
        assert (masks, train.epochs * (train.steps_per_epoch or 0)) == (19, 40_000)
        assert (train.optimizer.lr, train.optimizer.weight_decay, train.schedule.power) == (0.02, 5e-4, 0.9)
        assert recipe.data.augment.crop == (512, 1024)


COMPETITORS = [
    (recipe, row["competing method"].strip("`"), preset.strip("`"))
    for row in rows(PAGE, "competing method")
    for title, preset in row.items()
    for recipe in PAPER
    if title != "competing method" and preset and recipe.startswith(tuple(re.findall(r"`(\w+)`", title)))
]


@pytest.mark.parametrize(("recipe", "method", "preset"), COMPETITORS)
def test_a_competing_method_is_two_overrides(recipe: str, method: str, preset: str) -> None:
    changed = config.load(PAPER[recipe], [f"losses.0.name={method}", f"losses.0.preset={preset}"])
    own = config.load(PAPER[recipe])
    (loss,) = changed.losses
    assert (loss.name, loss.preset, loss.options, loss.pairs) == (method, preset, {}, own.losses[0].pairs)
    assert options(loss.name, loss.preset, loss.options)
    assert changed.model_copy(update={"losses": own.losses}) == own


def test_every_recipe_has_its_competing_methods() -> None:
    assert {recipe for recipe, _, _ in COMPETITORS} == set(PAPER)
    assert len(COMPETITORS) > 30


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Four training images by format, in the layout that the recipes name."""
    folder = tmp_path_factory.mktemp("images")
    for task in ("detection", "segmentation"):
        write_scenes(folder / task, train=4, val=2, size=(64, 128), seed=0, task=task)
        few_labels(folder / task, 2)
    for split in ("train", "val"):  # the layouts of the archives
        shutil.copytree(folder / f"detection/images/{split}", folder / f"coco/{split}2017")
        for image in (folder / f"segmentation/images/{split}").iterdir():
            for kind, suffix in (("leftImg8bit", "leftImg8bit"), ("gtFine", "gtFine_labelTrainIds")):
                target = folder / f"cityscapes/{kind}/{split}/city/{image.stem}_{suffix}.png"
                target.parent.mkdir(parents=True, exist_ok=True)
                source = image if kind == "leftImg8bit" else folder / f"segmentation/masks/{split}/{image.stem}.png"
                Image.open(source).save(target)
    (folder / "coco/annotations").mkdir()
    for split in ("train", "val"):
        annotations = f"annotations/instances_{split}"
        shutil.copy(folder / f"detection/{annotations}.json", folder / f"coco/{annotations}2017.json")
    yield {"detection": folder / "detection", "segmentation": folder / "segmentation",
           "coco": folder / "coco", "cityscapes": folder / "cityscapes"}  # fmt: skip
    shutil.rmtree(folder)


def miniature(file: Path, roots: dict[str, Path]) -> config.Recipe:
    """The recipe on four small images, in this process, without a download."""
    recipe = config.load(file)
    root = roots[str(recipe.data.root)] if file.parent.name == "paper" else roots[recipe.task]
    small = {
        "data.root": root, "data.workers": 0, "train.devices": 1, "train.accelerator": "cpu", "train.batch_size": 2,
        "train.epochs": 1, "train.steps_per_epoch": 2, "train.eval_every": 1, "train.schedule.warmup_steps": 0,
        "data.resize": "{short: 64, long: 107}" if recipe.task == "detection" else "null",
        "data.augment.crop": "[64, 128]" if recipe.task == "segmentation" else "null",
        "teacher.backbone_weights": "null", "student.backbone_weights": "null", "losses.0.weight": 1.0,
    }  # fmt: skip
    return config.load(file, [f"{key}={value}" for key, value in small.items()])


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if "faster_rcnn" in name else [])
        for name in FILES
        if "x101" not in name
    ],
)
def test_a_recipe_trains(name: str, roots: dict[str, Path]) -> None:
    recipe = miniature(FILES[name], roots)
    batches = Batches(recipe)
    assert recipe.teacher is not None
    teacher = build_network(recipe, recipe.teacher, batches.classes)
    student = build_network(recipe, recipe.student, batches.classes)
    models.inherit(student, teacher, recipe.student.inherit)
    distiller = build_distiller(student, teacher, recipe.losses)
    module = TrainingModule(distiller, recipe.train, batches.scorer)
    before = {name: tensor.clone() for name, tensor in student.net.state_dict().items()}
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_epochs=recipe.train.epochs, gradient_clip_val=recipe.train.clip,
        limit_val_batches=0, num_sanity_val_steps=0, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, batches.train)
    assert trainer.global_step == 2
    values: dict[str, Any] = module.values
    assert all(torch.isfinite(torch.as_tensor(value)) for value in values.values())
    levels = 5 if recipe.task == "detection" else 1
    found = {key for key in values if re.search(r"loss/.*/acam/(channel|spatial|diversity)(_step)?$", key)}
    terms = 2 if recipe.losses[0].options.get("masks") == "spatial" else 3
    assert len({key.removesuffix("_step") for key in found}) == terms * levels
    moved = {name for name, tensor in student.net.state_dict().items() if not torch.equal(tensor, before[name])}
    trained = {name for name, parameter in student.net.named_parameters() if parameter.requires_grad}
    assert len(moved & trained) > 0.9 * len(trained)


@pytest.mark.parametrize("name", [name for name in FILES if "x101" in name])
def test_the_largest_are_built(name: str) -> None:
    recipe = config.load(FILES[name])
    assert recipe.teacher is not None
    with torch.device("meta"):
        teacher, student = (
            models.build(section.model_copy(update={"backbone_weights": None}), recipe.task, 80, recipe.data.resize)
            for section in (recipe.teacher, recipe.student)
        )
    own = student.net.state_dict()
    inherited = [key for key in own if key.startswith(recipe.student.inherit)]
    assert len(inherited) > 10
    assert all(own[key].shape == teacher.net.state_dict()[key].shape for key in inherited)


@pytest.mark.parametrize("name", ONLINE)
def test_detectors_with_queries_have_what_makes_their_baseline_fair(name: str) -> None:
    train = config.load(ROOT / "recipes" / name).train
    assert (train.optimizer.lr, train.optimizer.norm_decay, train.clip) == (1e-4, False, 0.1)
    assert (train.ema, train.schedule.warmup_steps, train.epochs) == (0.9999, 2000, 120)
