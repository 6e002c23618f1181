"""What distillation adds to a whole training step.

    python benchmarks/step_cost.py [detection | segmentation] [--quick]
    python benchmarks/step_cost.py detection --methods 'acam, auto' cwd --rounds 9
    python benchmarks/step_cost.py --methods cwd --teacher 32 bf16 --size 320 512

RetinaNet R101 -> R50 on one image and DeepLabV3-R101 -> DeepLabV3-MobileNetV2 on two (batch norm after global pooling
needs two): forward, backward and SGD step by the package's own Distiller. The reference
is the step of the baseline plus the teacher's forward up to the last tapped layer, which every method needs.
Beside the time stands the arithmetic of a step, which no other program on the machine can disturb: torch's counter sees
convolutions, matrix products and what is made of them. Weights and images are random, which changes no cost.

With `--teacher` every method is measured again with the recipe's `teacher.precision`, against the same reference, and
the largest relative difference of the teacher's feature maps is printed by level.

On a machine whose speed drifts, choose few methods and many rounds: the less stands between a step and its reference,
the truer is their ratio.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from harness import Cost, arguments, cost, interleaved, medians, ratios, save
from matplotlib.figure import Figure
from torch import Tensor

from acamkd import models
from acamkd.config import Loss, Model
from acamkd.distillation.build import build_distiller
from acamkd.distillation.distiller import Distiller
from acamkd.distillation.fast_teacher import DTYPES, Precision, relative_differences
from acamkd.jobs.estimate import measured, step_of
from acamkd.models.base import Batch, Target, Task, TaskModel

ROUNDS = 3

DETECTION = "RetinaNet R101 -> R50, 800 x 1344"
SEGMENTATION = "DeepLabV3 R101 -> MobileNetV2, 512 x 1024"
SIZES = {DETECTION: (800, 1344), SEGMENTATION: (512, 1024)}
NETWORKS: Mapping[str, tuple[Task, Model, Model, int]] = {
    DETECTION: (
        "detection",
        Model(arch="retinanet", backbone="torchvision/resnet101", backbone_weights=None),
        Model(arch="retinanet", backbone="torchvision/resnet50", backbone_weights=None),
        80,
    ),
    SEGMENTATION: (
        "segmentation",
        Model(arch="torchvision/deeplabv3_resnet101", backbone_weights=None),
        Model(arch="deeplabv3", backbone="mobilenet_v2", backbone_weights=None),
        19,
    ),
}

PYRAMID, LOGITS, FEATURES = "backbone:*", ("segmentation_head.0", "classifier"), ("decoder", "classifier.3")


def loss(name: str, layers: Any, **options: Any) -> Loss:
    """One entry of a recipe's `losses`."""
    return Loss(name=name, pairs=[layers], **options)


LOSSES: Mapping[str, Mapping[str, Loss]] = {
    DETECTION: {
        "fitnet": loss("fitnet", PYRAMID),
        "fgd": loss("fgd", PYRAMID),
        "mgd": loss("mgd", PYRAMID),
        "maskd": loss("maskd", PYRAMID),
        "cwd": loss("cwd", PYRAMID),
        "freekd": loss("freekd", PYRAMID),
        "cankd": loss("cankd", PYRAMID),
        "acam, exact": loss("acam", PYRAMID),
        "acam, auto": loss("acam", PYRAMID, kv_stride="auto"),
        "acam, both kinds, auto": loss("acam", PYRAMID, masks="both", kv_stride="auto"),
        "acam, paper, auto": loss("acam", PYRAMID, preset="paper", kv_stride="auto"),
    },
    SEGMENTATION: {
        "fitnet, 256 channels": loss("fitnet", FEATURES),
        "mgd, 256 channels": loss("mgd", FEATURES),
        "maskd, logits": loss("maskd", LOGITS),
        "cwd, logits": loss("cwd", LOGITS),
        "freekd, 256 channels": loss("freekd", FEATURES),
        "cankd, 256 channels": loss("cankd", FEATURES),
        "acam, logits, exact": loss("acam", LOGITS, num_masks=19),
        "acam, logits, auto": loss("acam", LOGITS, num_masks=19, kv_stride="auto"),
        "acam, 256 channels, exact": loss("acam", FEATURES, num_masks=19),
        "acam, 256 channels, auto": loss("acam", FEATURES, num_masks=19, kv_stride="auto"),
        "acam, 256 channels, paper, auto": loss("acam", FEATURES, preset="paper", num_masks=19, kv_stride="auto"),
    },
}


def networks(pair: tuple[Task, Model, Model, int], size: tuple[int, int]) -> tuple[TaskModel, TaskModel]:
    """Student and teacher of an entry of NETWORKS."""
    task, teacher, student, classes = pair
    torch.manual_seed(0)
    built = models.build(student, task, classes, size), models.build(teacher, task, classes, size, teacher=True)
    settle(built[1])
    return built


@torch.no_grad()
def settle(teacher: TaskModel) -> None:
    """Give an untrained network's batch norm the statistics of one batch: in eval mode its maps overflow otherwise."""
    for module in teacher.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    teacher.train()(Batch(torch.rand(2, 3, 128, 256), [(128, 256)] * 2, [(128, 256)] * 2))
    teacher.eval()


def targets_of(student: TaskModel, sizes: Sequence[tuple[int, int]]) -> list[Target]:
    """A mask, or ten boxes, drawn at random for each image."""
    if student.task == "segmentation":
        return [{"mask": torch.randint(student.num_classes, size)} for size in sizes]
    targets: list[Target] = []
    for height, width in sizes:
        corners = torch.rand(10, 2) * torch.tensor([width / 2, height / 2])
        sides = 16 + torch.rand(10, 2) * torch.tensor([width / 3, height / 3])
        labels = torch.randint(1, student.num_classes + 1, (10,))
        targets.append({"boxes": torch.cat([corners, corners + sides], 1), "labels": labels})
    return targets


def batch_of(student: TaskModel, size: tuple[int, int], images: int | None = None) -> Batch:
    """Random images: one for a detector and two for a segmenter, if no number is given."""
    sizes = [size] * (images or (2 if student.task == "segmentation" else 1))
    return student.prepare([torch.rand(3, *size) for size in sizes], targets_of(student, sizes))


def step(distiller: Distiller, batch: Batch) -> Callable[[], None]:
    """A training step, without the Distiller's watch over the first ones, which costs a backward more."""
    distiller.eval()
    distiller.student.train()
    distiller.losses.train()
    optimizer = torch.optim.SGD([p for p in distiller.parameters() if p.requires_grad], lr=0.0, momentum=0.9)

    def run() -> None:
        torch.stack(list(distiller(batch).values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def measure(
    name: str, size: tuple[int, int], losses: Mapping[str, Loss], rounds: int, precisions: Sequence[Precision] = ()
) -> Iterator[dict[str, Any]]:
    """Cost of the parts and of a step with each loss, and the ratios to the reference, after every round."""
    student, teacher = networks(NETWORKS[name], size)
    batch = batch_of(student, size)
    alone = Distiller(student)
    calls: dict[str, Callable[[], object]] = {"baseline": step(alone, batch)}
    gflops = {"baseline": step_of(alone, batch)[0]}
    differences: dict[str, dict[str, float]] = {}
    plain: dict[str, Tensor] = {}
    for precision in (None, *precisions):
        suffix = "" if precision is None else f", {precision}"
        for method, entry in losses.items():
            distiller = build_distiller(student, teacher, [entry], precision)
            forward = "teacher's forward" + suffix
            if forward not in calls:
                calls[forward] = partial(distiller.teacher_maps, batch)
                gflops[forward] = measured(calls[forward])[0]
                maps = distiller.teacher_maps(batch)
                plain = plain or maps
                differences[forward] = relative_differences(plain, maps)
            calls[method + suffix] = step(distiller, batch)
            gflops[method + suffix] = step_of(distiller, batch)[0]
    calls[method + suffix]()  # memory and kernels as in every later step
    arithmetic = gflops["baseline"] + gflops["teacher's forward"]
    for costs in interleaved({method: partial(cost, call) for method, call in calls.items()}, rounds):
        reference = [
            Cost(a.seconds + b.seconds, a.cpu_seconds + b.cpu_seconds, max(a.peak_mib, b.peak_mib))
            for a, b in zip(costs["baseline"], costs["teacher's forward"], strict=True)
        ]
        yield {
            method: {
                **medians(each)._asdict(), **ratios(each, reference), "gflops": gflops[method],
                "gflops_ratio": gflops[method] / arithmetic, "differences": differences.get(method, {}), "all": each,
            }
            for method, each in costs.items()
        }  # fmt: skip


def main() -> None:
    """Measure, print and plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", nargs="?", choices=["detection", "segmentation"], help="one of the two alone")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="rows of one task's table, all by default")
    parser.add_argument("--teacher", nargs="+", metavar="PRECISION", default=(), choices=["auto", *DTYPES])
    parser.add_argument("--size", nargs=2, type=int, metavar=("HEIGHT", "WIDTH"), help="of the images")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"{ROUNDS} by default")
    given = arguments(parser, keep_heap=True)
    logging.getLogger("acamkd").setLevel(logging.ERROR)
    for name, (task, *_) in NETWORKS.items():
        if given.task in (None, task):
            size = (128, 256) if given.quick else tuple(given.size or SIZES[name])
            chosen = given.methods or list(LOSSES[name])
            if unknown := set(chosen) - set(LOSSES[name]):
                parser.error(f"{name} has no {', '.join(sorted(unknown))}; there are: {'; '.join(LOSSES[name])}")
            losses = {method: LOSSES[name][method] for method in chosen}
            is_own = given.methods or given.teacher or given.size
            for rows in measure(name, size, losses, 1 if given.quick else given.rounds, given.teacher):
                save(
                    f"step_cost_{task}" + ("_selected" if is_own else ""),
                    {"networks": name, "size": size, "rows": rows},
                    plot(name, rows),
                    quick=given.quick,
                )
            print(f"\n| {name} | seconds | CPU seconds | ratio | CPU ratio | of the fastest | GFLOPs | ratio |")
            print("|---|---:|---:|---:|---:|---:|---:|---:|")
            for method, row in rows.items():
                times = f"{row['seconds']:.2f} | {row['cpu_seconds']:.2f}"
                times += "".join(f" | {row[key]:.3f}" for key in ("ratio", "cpu_ratio", "fastest_ratio"))
                print(f"| {method} | {times} | {row['gflops']:.0f} | {row['gflops_ratio']:.3f} |")
            for method, row in rows.items():
                if any(row["differences"].values()):
                    print(f"{method}:", ", ".join(f"{name} {x:.1e}" for name, x in row["differences"].items()))


def plot(name: str, rows: Mapping[str, Any]) -> Figure:
    """Bars of the ratios, by processor time."""
    figure = Figure(figsize=(6, 3.5))
    axes = figure.subplots()
    methods = [method for method in rows if method not in ("baseline", "teacher's forward")]
    axes.barh(methods, [rows[method]["cpu_ratio"] for method in methods])
    axes.axvline(1, color="black")
    axes.axvline(1.05, color="black", linestyle=":")
    axes.set(title=name, xlim=(0.9, None), xlabel="step / (baseline + teacher's forward), processor time")
    axes.invert_yaxis()
    return figure


if __name__ == "__main__":
    main()
