"""What a recipe chooses for the images that were found and for this machine, each with its reason."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from acamkd import config
from acamkd.data.checks import refuse
from acamkd.data.statistics import Statistics
from acamkd.models.base import PixelSize, Task

SIDE = 48
"""Pixels that the networks shall see of the median object: six cells of a detector's finest map, of stride 8."""

SHORTEST = 160
"""Pixels below which a short side is not reduced."""

STEP = 32
"""Sides are multiples of this, the stride of the coarsest maps."""

UNIFORM = 0.95
"""From this share of images of one size on, all of them get one frame."""

LEARNING_RATES: Mapping[Task, float] = {"detection": 1e-3, "segmentation": 3e-3}
"""Of AdamW, those of docs/research/results.md."""


@dataclass(frozen=True)
class Machine:
    """What this machine can do in an evening.

    Attributes:
        name: In words.
        longest: Largest short side of a frame in pixels, by task.
        batch_size: Images.
        steps: Optimization steps of a training.
        networks: Teacher and student by task, as sections of a recipe.
        networks_reason: In words.
    """

    name: str
    longest: Mapping[Task, int]
    batch_size: int
    steps: int
    networks: Mapping[Task, tuple[dict[str, Any], dict[str, Any]]]
    networks_reason: str


CPU = Machine(
    name="a processor without an accelerator",
    longest={"detection": 256, "segmentation": 160},
    batch_size=8,
    steps=1500,
    networks={
        "detection": (
            {"arch": "fcos", "backbone": "tf_efficientnet_lite2", "fpn_channels": 64},
            {"arch": "fcos", "backbone": "tf_efficientnet_lite0", "fpn_channels": 64},
        ),
        "segmentation": (
            {"arch": "deeplabv3plus", "backbone": "tu-tf_efficientnet_lite2"},
            {"arch": "fpn", "backbone": "tu-tf_efficientnet_lite0",
             "options": {"decoder_pyramid_channels": 64, "decoder_segmentation_channels": 32}},
        ),
    },
    networks_reason="the networks of docs/research/results.md",
)  # fmt: skip

GPU = Machine(
    name="a GPU",
    longest={"detection": 640, "segmentation": 512},
    batch_size=16,
    steps=6000,
    networks={
        "detection": (
            {"arch": "fcos", "backbone": "resnet101", "fpn_channels": 128},
            {"arch": "fcos", "backbone": "resnet18", "fpn_channels": 128},
        ),
        "segmentation": (
            {"arch": "deeplabv3plus", "backbone": "resnet101"},
            {"arch": "deeplabv3plus", "backbone": "mobilenet_v2"},
        ),
    },
    networks_reason="larger ones than we measured, which a GPU trains in an evening",
)


def this_machine() -> Machine:
    """By whether torch finds a GPU."""
    return GPU if torch.cuda.is_available() else CPU


@dataclass(frozen=True)
class Frame:
    """What the networks see.

    Attributes:
        resize: As in `data.resize`.
        augment: As in `data.augment`.
        reason: Why this size.
        augment_reason: Why these changes.
    """

    resize: list[int] | dict[str, int]
    augment: dict[str, Any]
    reason: str
    augment_reason: str


def choose_frame(found: Statistics, task: Task, machine: Machine) -> Frame:
    """Size and augmentation by the sizes of images and objects."""
    sizes = {_parse(text): number for text, number in found.sizes.items()}
    if not sizes:
        refuse(found.problems)  # of images that cannot be read, each of them
    own = max(sizes, key=sizes.__getitem__)
    largest = machine.longest[task]
    if median := found.sides.get("median"):
        scale = max(SIDE / median, SHORTEST / min(own))
        why = f"half of the boxes' sides are below {median:.0f} px in the files"
    else:
        scale, why = 1.0, "masks need all that is there"
    limited = largest / min(own) < min(scale, 1.0)
    scale = min(scale, 1.0, largest / min(own))
    said = f"files: {own[1]} x {own[0]}; {why}" + ("; larger images take long here" if limited else "")
    if sizes[own] >= UNIFORM * found.images:
        height, width = (_rounded(scale * side) for side in own)
        scales = [0.75, 1.5] if task == "segmentation" else [0.8, 1.25]
        return Frame(
            [height, width],
            {"scale": scales, "crop": list(own), "flip": 0.5, "photometric": True},
            f"height, width; {said}", "crop is a file's size: training and validation see objects as large",
        )  # fmt: skip
    short, long = _rounded(scale * min(own)), _rounded(scale * max(max(size) for size in sizes))
    return Frame(
        {"short": short, "long": long},
        {"flip": 0.5, "photometric": True},
        f"{len(sizes)} sizes in the files, mostly {own[1]} x {own[0]}; {why}", "no crop, since sizes differ",
    )  # fmt: skip


def choose_batch(images: int, machine: Machine, largest: int | None) -> int:
    """Images of a batch: a power of 2 that fits into memory and gives an epoch at least four steps."""
    fitting = min(machine.batch_size, max(2, images // 4), machine.batch_size if largest is None else max(2, largest))
    return int(2 ** math.floor(math.log2(fitting)))


def choose_epochs(images: int, batch_size: int, machine: Machine) -> tuple[int, int]:
    """Epochs, a multiple of 8 from 16 to 128, and how many of them lie between two evaluations."""
    steps = max(1, images // batch_size)
    epochs = min(128, max(16, 8 * math.ceil(machine.steps / steps / 8)))
    return epochs, epochs // 8


def inherited(teacher: config.Model, student: config.Model, same_classes: bool) -> list[str]:
    """Parts of the student that can start from the teacher's: those of dense detectors of one kind and width."""
    same = (teacher.arch, teacher.fpn_channels, teacher.options) == (
        student.arch, student.fpn_channels, student.options,
    )  # fmt: skip
    return ["head", "backbone.fpn.layer_blocks"] if same and same_classes and student.arch in DENSE else []


DENSE = ("fcos", "reppoints", "retinanet")
"""Detectors whose head runs over each level of the pyramid."""


def _rounded(side: float) -> int:
    return max(STEP, STEP * round(side / STEP))


def _parse(text: str) -> PixelSize:
    """`640 x 480 pixels` as (height, width)."""
    width, _, rest = text.partition(" x ")
    return int(rest.split()[0]), int(width)
