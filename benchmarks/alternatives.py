"""Other forms of the parts of a step, each beside the one that is used: the frozen teacher's forward, and the loss.

    python benchmarks/alternatives.py [--quick]

The teacher is a RetinaNet R101 whose forward ends at the pyramid: as it is, with channels last, with batch norm folded
into the convolutions before it, and with bfloat16 autocast. The loss is ACAM on one level of 256 channels, as it is and
compiled by inductor, whose compilation is not counted.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from matplotlib.figure import Figure
from measuring import cost, interleaved, medians, quick, ratios, save
from step_cost import DETECTION, PYRAMID, batch_of, loss, networks
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from acamkd.losses import ACAM
from acamkd.methods import build_distiller

ROUNDS = 3


def folded(net: nn.Module) -> nn.Module:
    """A copy of a torchvision ResNet detector with every batch norm of its body folded into its convolution."""
    net = copy.deepcopy(net)
    for block in net.modules():
        pairs = [("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"), ("0", "1")]
        for conv, norm in pairs:
            children = dict(block.named_children())
            if isinstance(children.get(conv), nn.Conv2d) and isinstance(children.get(norm), nn.BatchNorm2d):
                setattr(block, conv, fuse_conv_bn_eval(children[conv], children[norm]))
                setattr(block, norm, nn.Identity())
    return net


def teacher_forms(size: tuple[int, int]) -> dict[str, Callable[[], object]]:
    """The teacher's forward in each form."""
    student, teacher = networks(DETECTION, size)
    batch = batch_of(student, size)
    distiller = build_distiller(student, teacher, [loss("fitnet", PYRAMID)])
    original = teacher.net

    def run(net: nn.Module, bfloat16: bool = False) -> None:
        teacher.net = net
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
            distiller.teacher_maps(batch)

    return {
        "teacher": partial(run, original),
        "teacher, channels last": partial(run, copy.deepcopy(original).to(memory_format=torch.channels_last)),  # type: ignore[call-overload]
        "teacher, folded": partial(run, folded(original)),
        "teacher, bfloat16": partial(run, original, True),
    }


def loss_forms(size: tuple[int, int]) -> dict[str, Callable[[], object]]:
    """Forward and backward of the loss in each form."""
    student, teacher = torch.randn(1, 256, *size, requires_grad=True), torch.randn(1, 256, *size)

    def run(call: Callable[..., dict[str, Tensor]]) -> None:
        torch.stack(list(call(student, teacher).values())).sum().backward()

    forms = {
        "acam, exact": ACAM(256, 256, masks="both", mask_grad="joint", imitation="squared"),
        "acam, auto": ACAM(256, 256, masks="both", mask_grad="joint", imitation="squared", kv_stride="auto"),
    }
    return {name: partial(run, module) for name, module in forms.items()} | {
        f"{name}, compiled": partial(run, torch.compile(module)) for name, module in forms.items()
    }


def main() -> None:
    """Measure, print and plot."""
    is_quick = quick(__doc__)
    rows = {}
    groups = {
        "teacher": teacher_forms((128, 224) if is_quick else (400, 672)),
        "acam": loss_forms((8, 12) if is_quick else (50, 84)),
    }
    for forms in groups.values():
        for form in forms.values():  # warms up, and compiles
            form()
        *_, costs = interleaved({name: partial(cost, form) for name, form in forms.items()}, 1 if is_quick else ROUNDS)
        for name, each in costs.items():
            reference = costs["teacher" if "teacher" in name else name.removesuffix(", compiled")]
            rows[name] = {**medians(each)._asdict(), **ratios(each, reference)}
            print(f"| {name} | {rows[name]['cpu_seconds']:.3f} | {rows[name]['cpu_ratio']:.3f} |")
    figure = Figure(figsize=(6, 3))
    figure.subplots().barh(list(rows), [row["cpu_ratio"] for row in rows.values()])
    figure.axes[0].set(xlabel="processor time, against the form that is used")
    save("alternatives", {"rows": rows}, figure, quick=is_quick)


if __name__ == "__main__":
    main()
