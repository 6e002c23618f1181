"""Training steps at full resolution by the package's own Distiller: time, memory and every loss term of each step.

    python benchmarks/full_resolution.py detection IMAGES [--steps 20] [--quick]
    python benchmarks/full_resolution.py segmentation IMAGES [--steps 20] [--quick]

RetinaNet R101 -> R50 at 800 x 1344, one image a step, and DeepLabV3-R101 -> DeepLabV3-MobileNetV2 at 512 x 1024, two;
networks with random weights, targets drawn at random, IMAGES a folder of real images that are enlarged as a recipe
would. ACAM with kv_stride: auto and detached masks.
"""

from __future__ import annotations

import argparse
import logging
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from harness import arguments, cost, save
from matplotlib.figure import Figure
from PIL import Image
from step_cost import LOGITS, NETWORKS, PYRAMID, loss, settle, targets_of
from torchvision.transforms.v2.functional import pil_to_tensor

from acamkd import models
from acamkd.distillation.build import build_distiller

SIZES = {"detection": (800, 1344), "segmentation": (512, 1024)}
LOSSES = {
    "detection": loss("acam", PYRAMID, masks="both", kv_stride="auto", mask_grad="detached", imitation="squared"),
    "segmentation": loss(
        "acam", LOGITS, num_masks=19, masks="both", kv_stride="auto", mask_grad="detached", imitation="squared"
    ),
}


def main() -> None:
    """Train, log, plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=list(SIZES))
    parser.add_argument("images", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    given = arguments(parser)
    logging.getLogger("acamkd").setLevel(logging.ERROR)
    name, (task, theirs, ours, classes) = next(each for each in NETWORKS.items() if each[1][0] == given.task)
    name = name.partition(",")[0]
    size = (128, 224) if given.quick else SIZES[given.task]
    torch.manual_seed(0)
    student, teacher = models.build(ours, task, classes, size), models.build(theirs, task, classes, size, teacher=True)
    settle(teacher)
    distiller = build_distiller(student, teacher, [LOSSES[task]]).train()
    optimizer = torch.optim.SGD([p for p in distiller.parameters() if p.requires_grad], lr=1e-4, momentum=0.9)
    files = sorted(path for path in given.images.iterdir() if path.suffix in (".jpg", ".png"))
    count, rows = (1 if task == "detection" else 2), list[dict[str, Any]]()
    endless = cycle(files)
    for step in range(2 if given.quick else given.steps):
        images = [pil_to_tensor(Image.open(file).convert("RGB")) for file in islice(endless, count)]
        batch = student.prepare(images, targets_of(student, [tuple(image.shape[1:]) for image in images]))
        terms: dict[str, float] = {}

        def train() -> None:
            losses = distiller(batch, step)  # noqa: B023
            torch.stack(list(losses.values())).sum().backward()
            torch.nn.utils.clip_grad_norm_(distiller.parameters(), 1.0)  # an untrained teacher's maps are anything
            optimizer.step()
            optimizer.zero_grad()
            terms.update({name: value.item() for name, value in losses.items()})  # noqa: B023

        rows.append({**cost(train)._asdict(), "frame": batch.input_size, "terms": terms})
        print(step, *(f"{rows[-1][key]:.1f}" for key in ("seconds", "cpu_seconds", "peak_mib")), terms, flush=True)
        figure = Figure(figsize=(6, 4))
        axes = figure.subplots()
        for kind in ("task/", ""):
            sums = [sum(v for k, v in row["terms"].items() if k.startswith("task/") == bool(kind)) for row in rows]
            axes.plot(sums, "o-", label="task" if kind else "distillation")
        axes.set(xlabel="step", title=name, yscale="log")
        axes.legend()
        save(f"full_resolution_{task}", {"networks": name, "steps": rows}, figure, quick=given.quick)


if __name__ == "__main__":
    main()
