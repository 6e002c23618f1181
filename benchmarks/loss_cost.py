"""Time and peak memory of every method's loss, forward and backward, each in a process of its own.

    python benchmarks/loss_cost.py [--quick]
    python benchmarks/loss_cost.py --shapes 'logits of 129 x 257' --methods 'acam, auto' fgd
    python benchmarks/loss_cost.py scaling [--quick]

The maps are random: an image's pyramid of strides 8 to 128 with 256 channels, the pyramid's finest level alone, or
logits of 19 classes. So are the task gradient that ACAM reads for its look-ahead masks and the tokens of MasKD and
FreeKD, which changes no cost. CrossKD compares heads and FGD needs boxes, so that the one is missing and the other is
not run on logits. ACAM has its defaults, or where the name says so the published form.

`scaling` is how ACAM's cost grows with the image: the time at four sizes, and the exponent, the slope of a straight
line through log time over log pixels.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from harness import Cost, arguments, cost, in_own_process, interleaved, medians, save
from matplotlib.figure import Figure
from torch import Tensor

from acamkd.distillation.methods import METHODS
from acamkd.losses import ACAM, FitNet
from acamkd.losses.acam.reference import acam as reference
from acamkd.losses.base import DistillationContext, FeatureLoss, HeadLoss

Level: TypeAlias = tuple[int, int]

STRIDES = (8, 16, 32, 64, 128)
ROUNDS = 2
LARGEST = 2**30
"""Bytes of the largest dense attention map that the textbook is run with."""


def pyramid(height: int, width: int) -> list[Level]:
    """Sizes of an image's feature maps."""
    return [(-(-height // stride), -(-width // stride)) for stride in STRIDES]


SHAPES: Mapping[str, tuple[int, list[Level]]] = {
    "pyramid of 400 x 672": (256, pyramid(400, 672)),
    "level of 100 x 168": (256, [(100, 168)]),
    "pyramid of 800 x 1344": (256, pyramid(800, 1344)),
    "logits of 65 x 129": (19, [(65, 129)]),
    "logits of 129 x 257": (19, [(129, 257)]),
}


SIZES = ((400, 672), (560, 944), (800, 1344), (1120, 1888))
"""Images whose pyramids `scaling` compares."""


class Textbook(ACAM):
    """ACAM as published, by the dense attention map and the masked differences (N, M, C, H, W) of the tests' oracle."""

    def terms(self, student: Tensor, teacher: Tensor, context: DistillationContext) -> dict[str, Tensor]:
        """Return `channel`, `spatial` and `diversity`."""
        return reference(dict(self.named_parameters()), student, teacher)


def losses(channels: int, levels: Sequence[Level]) -> dict[str, partial[FeatureLoss]]:
    """Every method that can be run on such maps."""
    number = {"num_masks": 6 if channels == 256 else channels}
    paper = {**number, "masks": "both", "mask_grad": "joint", "imitation": "squared"}
    found = {
        name: partial(method, channels, channels)
        for name, method in METHODS.items()
        if not issubclass(method, HeadLoss) and name != "acam" and (channels == 256 or "boxes" not in method.needs)
    }
    acam = METHODS["acam"]
    found["acam, auto"] = partial(acam, channels, channels, **number, kv_stride="auto")  # type: ignore[arg-type]
    found["acam, paper, exact"] = partial(acam, channels, channels, **paper)  # type: ignore[arg-type]
    found["acam, paper, auto"] = partial(acam, channels, channels, **paper, kv_stride="auto")  # type: ignore[arg-type]
    found["acam, uniform masks"] = partial(acam, channels, channels, **paper, mask_source="uniform")  # type: ignore[arg-type]
    if 4 * max(height * width for height, width in levels) ** 2 <= 1.1 * LARGEST:
        found["acam, textbook"] = partial(Textbook, channels, channels, **paper)
    return found


def measure(build: partial[FeatureLoss], channels: int, levels: Sequence[Level]) -> Cost:
    """Forward and backward at all levels together: time of a second step, memory of the first."""
    torch.set_num_threads(2)
    logging.getLogger("acamkd").setLevel(logging.ERROR)
    torch.manual_seed(0)
    modules = [build() for _ in levels]
    maps = [[torch.randn(1, channels, *level) for level in levels] for _ in range(2)]
    height, width = (8 * side for side in levels[0])
    boxes = torch.rand(10, 4) * torch.tensor([width / 2, height / 2, width / 2, height / 2])
    boxes[:, 2:] += boxes[:, :2]
    contexts = [
        DistillationContext(input_size=(height, width), boxes=[boxes], task_gradient=torch.randn_like(x))
        for x in maps[0]
    ]
    for student in maps[0]:
        student.requires_grad_()

    def step() -> None:
        calls = zip(modules, *maps, contexts, strict=True)
        terms = [term for module, *given in calls for term in module(*given).values()]
        torch.stack(terms).sum().backward()

    first = cost(step)  # before anything is kept for later
    return cost(step)._replace(peak_mib=first.peak_mib)


def compare_methods(names: Sequence[str] | None, methods: Sequence[str] | None, *, quick: bool) -> None:
    """Every method on every shape, or some of both."""
    shapes = (
        {"pyramid of 160 x 256": (256, pyramid(160, 256)), "logits of 9 x 17": (19, [(9, 17)])}
        if quick
        else {name: SHAPES[name] for name in names or SHAPES}
    )
    result = "loss_cost" + ("_selected" if names or methods else "")
    table: dict[str, dict[str, Any]] = {}
    for shape, (channels, levels) in shapes.items():
        print(shape)
        calls = {
            name: partial(in_own_process, measure, build, channels, levels)
            for name, build in losses(channels, levels).items()
            if not methods or name in methods
        }
        for costs in interleaved(calls, 1 if quick else ROUNDS):
            table[shape] = {name: medians(each)._asdict() for name, each in costs.items()}
            save(result, {"rows": table}, plot(table), quick=quick)
    for shape, rows in table.items():
        print(f"\n| {shape} | seconds | CPU seconds | peak MiB |\n|---|---:|---:|---:|")
        for name, row in sorted(rows.items(), key=lambda entry: entry[1]["cpu_seconds"]):
            print(f"| {name} | {row['seconds']:.3f} | {row['cpu_seconds']:.3f} | {row['peak_mib']:.0f} |")


def plot(table: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Time against memory, one panel per shape."""
    figure = Figure(figsize=(4 * len(table), 4))
    for axes, (shape, rows) in zip(figure.subplots(1, len(table), squeeze=False)[0], table.items(), strict=True):
        for name, row in rows.items():
            axes.loglog(row["cpu_seconds"], row["peak_mib"], "o", color="tab:red" if "acam" in name else "tab:blue")
            axes.annotate(
                name, (row["cpu_seconds"], row["peak_mib"]), fontsize=7, xytext=(3, 3), textcoords="offset points"
            )
        axes.set(title=shape, xlabel="processor seconds, forward and backward", ylabel="peak MiB")
    return figure


def scaling(*, quick: bool) -> None:
    """Cost over the size of the image."""
    sizes = ((64, 96), (96, 128), (128, 192), (160, 256)) if quick else SIZES
    published = partial(ACAM, 256, 256, masks="both", mask_grad="joint", imitation="squared")
    builds = {
        "acam, exact": published,
        "acam, auto": partial(published, kv_stride="auto"),
        "fitnet": partial(FitNet, 256, 256),
    }
    calls = {
        f"{name} {height} x {width}": partial(in_own_process, measure, build, 256, pyramid(height, width))
        for height, width in sizes
        for name, build in builds.items()
    }
    *_, costs = interleaved(calls, 1 if quick else ROUNDS)
    pixels = [height * width for height, width in sizes]
    figure = Figure(figsize=(5, 4))
    axes = figure.subplots()
    rows = {}
    for name in builds:
        times = [medians(costs[f"{name} {height} x {width}"]).cpu_seconds for height, width in sizes]
        exponent = float(np.polyfit(np.log(pixels), np.log(times), 1)[0])
        rows[name] = {"pixels": pixels, "cpu_seconds": times, "exponent": exponent}
        axes.loglog(pixels, times, "o-", label=f"{name}: exponent {exponent:.2f}")
        print(f"{name}: exponent {exponent:.2f}")
    axes.set(xlabel="pixels of the image", ylabel="processor seconds, forward and backward")
    axes.legend()
    save("scaling", {"rows": rows}, figure, quick=quick)


def main() -> None:
    """Measure, print and plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="?", choices=["methods", "scaling"], default="methods")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), help="all by default")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="rows, all by default")
    given = arguments(parser)
    if given.what == "scaling":
        scaling(quick=given.quick)
    else:
        compare_methods(given.shapes, given.methods, quick=given.quick)


if __name__ == "__main__":
    main()
