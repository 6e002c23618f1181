"""Size and cost of the networks in recipes/paper, and of their trainings, computed on no device at all.

    python benchmarks/networks.py
    python benchmarks/networks.py memory [--quick]

Everything is built on PyTorch's meta device: shapes without numbers. Operations are those that
torch.utils.flop_counter counts (convolutions and matrix products), two per multiplication with addition.

`memory` measures how near the memory that `acamkd distill --dry-run` counts comes to what a step really takes: one
forward and backward of the networks of step_cost.py with ACAM (kv_stride: auto), counted, and measured as the growth of
the process's resident memory in that very step, without the parameters' gradients.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import step_cost
import torch
from harness import arguments, cost, in_own_process, save
from matplotlib.figure import Figure
from torch import Tensor
from torch.fx.experimental import _config

from acamkd import config, models
from acamkd.distillation.build import build_distiller
from acamkd.distillation.methods import find, options
from acamkd.distillation.taps import FeatureTap
from acamkd.engine.cost import flop_counter
from acamkd.jobs.estimate import step_of
from acamkd.losses.base import DistillationContext, FeatureLoss
from acamkd.models.base import Task, TaskModel

RECIPES = Path(__file__).parents[1] / "recipes/paper"
CLASSES = {"detection": 80, "segmentation": 19}
TESTED = {"detection": (800, 1280), "segmentation": (1024, 2048)}
"""(height, width) that the literature counts at."""
TRAINED = {"detection": (800, 1280), "segmentation": (512, 1024)}
PROPOSALS = {"tested": 1000, "trained": 512}
"""That Faster R-CNN's box head sees of one image."""
COCO = 118_287
"""Images of its training set."""
RATE = 40e12
"""Operations per second and GPU behind the hours: a quarter of an A100's TF32 peak. An assumption."""


def recipes() -> dict[str, config.Recipe]:
    """The paper's experiments by name."""
    return {file.stem: config.load(file) for file in sorted(RECIPES.glob("*.yaml"))}


def networks() -> dict[str, tuple[Task, config.Model]]:
    """Every network that they have, once."""
    found: dict[str, tuple[Task, config.Model]] = {}
    for recipe in recipes().values():
        assert recipe.teacher is not None
        for section in (recipe.teacher, recipe.student):
            found[f"{section.arch}, {section.backbone}"] = recipe.task, section
    return dict(sorted(found.items()))


def build(section: config.Model, task: Task) -> TaskModel:
    """A network on the meta device, without the weights that the recipe starts from but frozen as they would be."""
    with torch.device("meta"):
        model = models.build(section.model_copy(update={"backbone_weights": None}), task, CLASSES[task])
    if section.backbone.startswith("torchvision/"):
        body: Any = model.backbone
        for part in (body.conv1, body.layer1):
            part.requires_grad_(False)
    return model


def parameters(model: TaskModel) -> str:
    """All of them, those of batch norm too, in millions."""
    return f"{sum(parameter.numel() for parameter in model.net.parameters()) / 1e6:.2f}"


def run(model: TaskModel, pixels: Tensor, proposals: int) -> list[Tensor]:
    """Everything that a network says of images before boxes are made of it."""
    net: Any = model.net
    if model.task == "segmentation":
        return [net(pixels)]
    levels = list(net.backbone(pixels).values())
    if not hasattr(net, "rpn"):
        return list(net.head(levels).values())
    objectness, deltas = net.rpn.head(levels)
    pooled = pixels.new_empty(len(pixels) * proposals, levels[0].shape[1], 7, 7)
    return [*objectness, *deltas, *net.roi_heads.box_predictor(net.roi_heads.box_head(pooled))]


def forward_cost(model: TaskModel, size: Sequence[int], proposals: int = 0) -> float:
    """Operations of one image."""
    with flop_counter() as counter, torch.no_grad():
        run(model.eval(), torch.empty(1, 3, *size, device="meta"), proposals)
    return float(counter.get_total_flops())


def training_cost(recipe: config.Recipe) -> dict[str, float]:
    """Operations of one training image: of the student, the teacher up to the tapped layers, and the losses.

    Backward passes included, and what they compute anew.
    """
    assert recipe.teacher is not None
    pixels = torch.empty(2, 3, *TRAINED[recipe.task], device="meta")  # batch norm refuses one
    student, teacher = build(recipe.student, recipe.task), build(recipe.teacher, recipe.task)
    entry = recipe.losses[0]
    with flop_counter() as counted, FeatureTap(student.net, list(map(str, entry.pairs))) as tap:
        outputs = run(student.train(), pixels, PROPOSALS["trained"])
        maps = tap.features()
        torch.stack([output.sum() for output in outputs]).sum().backward()  # type: ignore[no-untyped-call]
    of_student = counted.get_total_flops()
    with flop_counter() as counted, FeatureTap(teacher.net, list(map(str, entry.pairs))) as tap:
        with torch.no_grad(), tap.early_stop():
            run(teacher.eval(), pixels, PROPOSALS["trained"])
        teacher_maps = tap.features()
    of_teacher = counted.get_total_flops()
    # ACAM picks pairs of masks by a mask, after everything that counts.
    assume_all = patch.object(_config, "meta_nonzero_assume_all_nonzero", True)
    with assume_all, flop_counter() as counted:
        for ours, theirs in zip(maps.values(), teacher_maps.values(), strict=True):
            with torch.device("meta"):
                loss = find(entry.name)(
                    ours.shape[1], theirs.shape[1], **options(entry.name, entry.preset, entry.options)
                )
            assert isinstance(loss, FeatureLoss)
            leaf = ours.detach().requires_grad_()
            terms = loss.eval().terms(leaf, theirs, DistillationContext())
            torch.stack(list(terms.values())).sum().backward()  # type: ignore[no-untyped-call]
    return {"student": of_student / 2, "teacher": of_teacher / 2, "losses": counted.get_total_flops() / 2}


def images(recipe: config.Recipe) -> int:
    """That a training sees, over all epochs."""
    train = recipe.train
    if train.steps_per_epoch is None:
        return train.epochs * COCO
    assert isinstance(train.devices, int)
    return train.epochs * train.steps_per_epoch * train.batch_size * train.devices


def measured_memory(name: str, size: tuple[int, int]) -> tuple[float, float]:
    """Counted and measured peak of a step, in MiB."""
    torch.set_num_threads(2)
    logging.getLogger("acamkd").setLevel(logging.ERROR)
    student, teacher = step_cost.networks(step_cost.NETWORKS[name], size)
    layers = step_cost.PYRAMID if student.task == "detection" else step_cost.LOGITS
    distiller = build_distiller(student, teacher, [step_cost.loss("acam", layers, kv_stride="auto")]).eval()
    distiller.student.train()
    batch = step_cost.batch_of(student, size)
    counted: list[float] = []
    measured = cost(lambda: counted.append(step_of(distiller, batch)[1] / 2**20))
    return counted[0], measured.peak_mib


def compare_memory(*, quick: bool) -> None:
    """Measure, print and plot the memory."""
    rows = {}
    for name in step_cost.NETWORKS:
        counted, measured = in_own_process(measured_memory, name, (128, 256) if quick else step_cost.SIZES[name])
        rows[name] = {"counted_mib": counted, "measured_mib": measured, "error": counted / measured - 1}
        print(f"| {name} | {counted:.0f} | {measured:.0f} | {100 * (counted / measured - 1):+.1f} % |", flush=True)
    figure = Figure(figsize=(5, 3))
    axes = figure.subplots()
    axes.bar([f"{name}\n{kind}" for name in rows for kind in ("counted", "measured")],
             [row[f"{kind}_mib"] for row in rows.values() for kind in ("counted", "measured")])  # fmt: skip
    axes.tick_params(axis="x", labelsize=5)
    axes.set(ylabel="MiB")
    save("memory_estimate", {"rows": rows}, figure, quick=quick)


def print_tables() -> None:
    """Of the networks, and of the recipes."""
    print("| network | million parameters | GMAC |\n|---|---|---|")
    for name, (task, section) in networks().items():
        model = build(section, task)
        operations = forward_cost(model, TESTED[task], PROPOSALS["tested"])
        print(f"| {name} | {parameters(model)} | {operations / 2e9:.0f} |", flush=True)
    print("\n| recipe | student | teacher | losses | hours |\n|---|---|---|---|---|")
    for name, recipe in recipes().items():
        parts = training_cost(recipe)
        assert isinstance(recipe.train.devices, int)
        hours = images(recipe) * sum(parts.values()) / RATE / recipe.train.devices / 3600
        print(
            f"| {name} | " + " | ".join(f"{each / 1e12:.2f}" for each in parts.values()) + f" | {hours:.1f} |",
            flush=True,
        )


def main() -> None:
    """Print both tables, or compare the memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="?", choices=["tables", "memory"], default="tables")
    given = arguments(parser)
    if given.what == "memory":
        compare_memory(quick=given.quick)
    else:
        print_tables()


if __name__ == "__main__":
    main()
