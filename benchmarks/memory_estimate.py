"""How near the memory that `acamkd distill --dry-run` counts comes to what a step really takes.

    python benchmarks/memory_estimate.py [--quick]

One forward and backward of the networks of step_cost.py with ACAM (kv_stride: auto), counted, and measured as the
growth of the process's resident memory in that very step, without the parameters' gradients.
"""

from __future__ import annotations

import logging

import torch
from matplotlib.figure import Figure
from measuring import cost, in_own_process, quick, save
from step_cost import LOGITS, NETWORKS, PYRAMID, SIZES, batch_of, loss, networks

from acamkd.distillation.build import build_distiller
from acamkd.jobs.profile import step_of


def measure(name: str, size: tuple[int, int]) -> tuple[float, float]:
    """Counted and measured peak, in MiB."""
    torch.set_num_threads(2)
    logging.getLogger("acamkd").setLevel(logging.ERROR)
    student, teacher = networks(name, size)
    entry = loss("acam", PYRAMID if student.task == "detection" else LOGITS, kv_stride="auto")
    distiller = build_distiller(student, teacher, [entry]).eval()
    distiller.student.train()
    batch = batch_of(student, size)
    counted: list[float] = []
    measured = cost(lambda: counted.append(step_of(distiller, batch)[1] / 2**20))
    return counted[0], measured.peak_mib


def main() -> None:
    """Measure, print and plot."""
    is_quick = quick(__doc__)
    rows = {}
    for name in NETWORKS:
        counted, measured = in_own_process(measure, name, (128, 256) if is_quick else SIZES[name])
        rows[name] = {"counted_mib": counted, "measured_mib": measured, "error": counted / measured - 1}
        print(f"| {name} | {counted:.0f} | {measured:.0f} | {100 * (counted / measured - 1):+.1f} % |", flush=True)
    figure = Figure(figsize=(5, 3))
    axes = figure.subplots()
    axes.bar([f"{name}\n{kind}" for name in rows for kind in ("counted", "measured")],
             [row[f"{kind}_mib"] for row in rows.values() for kind in ("counted", "measured")])  # fmt: skip
    axes.tick_params(axis="x", labelsize=5)
    axes.set(ylabel="MiB")
    save("memory_estimate", {"rows": rows}, figure, quick=is_quick)


if __name__ == "__main__":
    main()
