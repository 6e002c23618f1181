"""Other forms of the parts of a step and of the whole, each beside the one that is used.

    python benchmarks/precision_variants.py [--quick]

The teacher is a RetinaNet R101 whose forward ends at the pyramid: as it is, with channels last, with bfloat16
autocast, and with both, and as `teacher.precision` has it in 32 bits and in bfloat16, with batch norms folded. The loss
is ACAM on one level of 256 channels, as it is and compiled by inductor, whose compilation is not counted. A whole step
is one of step_cost.py's, with kv_stride: auto, as it is and in the forms that a recipe's `channels_last` and
`precision: bf16-mixed` give.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

import torch
from harness import arguments, cost, interleaved, medians, ratios, save
from matplotlib.figure import Figure
from step_cost import DETECTION, LOSSES, PYRAMID, SEGMENTATION, SIZES, batch_of, loss, networks, step
from torch import Tensor, nn

from acamkd.distillation.build import build_distiller
from acamkd.distillation.distiller import Distiller
from acamkd.distillation.fast_teacher import Precision
from acamkd.engine.module import mend_convolutions
from acamkd.losses import ACAM

Forms: TypeAlias = Mapping[str, Callable[[], object]]
"""By name; the first one is what the others are compared with."""

ROUNDS = 3


def in_bfloat16(call: Callable[[], object]) -> None:
    """Under autocast, as Lightning's bf16-mixed does."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        call()


def teacher_forms(size: tuple[int, int]) -> Forms:
    """The teacher's forward."""
    student, teacher = networks(DETECTION, size)
    batch = batch_of(student, size)
    distiller = build_distiller(student, teacher, [loss("fitnet", PYRAMID)])
    original = teacher.net

    def run(net: nn.Module) -> None:
        teacher.net = net
        distiller.teacher_maps(batch)

    def fast(precision: Precision) -> Distiller:
        return build_distiller(student, teacher, [loss("fitnet", PYRAMID)], precision)

    plain = partial(run, original)
    channels_last = partial(run, copy.deepcopy(original).to(memory_format=torch.channels_last))
    return {
        "teacher": plain,
        "teacher, precision 32": partial(fast("32").teacher_maps, batch),
        "teacher, channels last": channels_last,
        "teacher, bfloat16": partial(in_bfloat16, plain),
        "teacher, bfloat16, channels last": partial(in_bfloat16, channels_last),
        "teacher, precision bf16": partial(fast("bf16").teacher_maps, batch),
    }


def loss_forms(name: str, size: tuple[int, int], **options: Any) -> Forms:
    """Forward and backward of ACAM as published."""
    student, teacher = torch.randn(1, 256, *size, requires_grad=True), torch.randn(1, 256, *size)
    module = ACAM(256, 256, masks="both", mask_grad="joint", imitation="squared", **options)

    def run(call: Callable[..., dict[str, Tensor]]) -> None:
        torch.stack(list(call(student, teacher).values())).sum().backward()  # type: ignore[no-untyped-call]

    return {name: partial(run, module), f"{name}, compiled": partial(run, torch.compile(module))}


def step_forms(name: str, networks_name: str, loss_name: str, size: tuple[int, int]) -> Forms:
    """A whole training step; what is trained stays float32."""
    forms: dict[str, Callable[[], object]] = {}
    for suffix, memory_format in (("", torch.contiguous_format), (", channels last", torch.channels_last)):
        for is_bfloat16 in (False, True):
            student, teacher = networks(networks_name, size)
            distiller = build_distiller(student, teacher, [LOSSES[networks_name][loss_name]])
            train = step(distiller.to(memory_format=memory_format), batch_of(student, size))
            if is_bfloat16:
                mend_convolutions(student.net)  # as the package's own trainer does
                forms[f"{name}, bfloat16{suffix}"] = partial(in_bfloat16, train)
            else:
                forms[name + suffix] = train
    return forms


def main() -> None:
    """Measure, print and plot."""
    is_quick = arguments(argparse.ArgumentParser(description=__doc__), keep_heap=True).quick
    detection, segmentation = [(128, 256)] * 2 if is_quick else (SIZES[DETECTION], SIZES[SEGMENTATION])
    level = (8, 12) if is_quick else (50, 84)
    groups = (
        partial(teacher_forms, (128, 224) if is_quick else (400, 672)),
        partial(loss_forms, "acam, exact", level),
        partial(loss_forms, "acam, auto", level, kv_stride="auto"),
        partial(step_forms, "RetinaNet's step", DETECTION, "acam, auto", detection),
        partial(step_forms, "DeepLabV3's step", SEGMENTATION, "acam, logits, auto", segmentation),
    )
    rows = {}
    for build in groups:
        forms = build()
        for form in forms.values():  # warms up, and compiles
            form()
        *_, costs = interleaved({name: partial(cost, form) for name, form in forms.items()}, 1 if is_quick else ROUNDS)
        for name, each in costs.items():
            rows[name] = {**medians(each)._asdict(), **ratios(each, next(iter(costs.values())))}
            print(f"| {name} | {rows[name]['cpu_seconds']:.3f} | {rows[name]['cpu_ratio']:.3f} |")
    figure = Figure(figsize=(6, 5))
    axes = figure.subplots()
    axes.barh(list(rows), [row["cpu_ratio"] for row in rows.values()])
    axes.invert_yaxis()
    axes.set(xlabel="processor time, against the form that is used")
    save("precision_variants", {"rows": rows}, figure, quick=is_quick)


if __name__ == "__main__":
    main()
