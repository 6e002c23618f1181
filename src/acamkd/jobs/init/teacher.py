"""What an existing checkpoint is: its architecture, backbone and number of classes, read off its tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from acamkd import config, models
from acamkd.engine.runs import RECIPE
from acamkd.errors import AcamkdError
from acamkd.jobs.inspect_layers import model_of_name
from acamkd.models.base import Task
from acamkd.models.convert import convention_of, to_torchvision
from acamkd.models.weights import is_further_part, read_tensors

TIMM = (
    "mobilenetv3_small_050", "mobilenetv3_small_100", "mobilenetv3_large_100", "mobilenetv2_100",
    "tf_efficientnet_lite0", "tf_efficientnet_lite1", "tf_efficientnet_lite2", "tf_efficientnet_lite3",
    "tf_efficientnet_lite4", "efficientnet_b0", "efficientnet_b1", "efficientnet_b2", "efficientnet_b3",
    "convnext_tiny", "convnext_small",
)  # fmt: skip
"""timm backbones without stages called layer1, layer2, ... that are tried."""

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")

SMP = ("mobilenet_v2", "efficientnet-b0", "efficientnet-b1", "efficientnet-b2", "efficientnet-b3", "resnext50_32x4d")
"""Further encoders of segmentation_models_pytorch that are tried."""

ARCHITECTURES = {
    "deeplabv3plus": "aspp.0.", "deeplabv3": "aspp.convs.", "fpn": "p5.", "manet": "center.top_conv.",
    "unet": "blocks.0.conv1.", "unetplusplus": "blocks.x_0_0.", "pspnet": "psp.", "linknet": "blocks.0.block.",
    "pan": "fpa.",
}  # fmt: skip
"""Its architectures that are known, with their own options, and how a name in each one's decoder begins.

Without these names every architecture would be built over every encoder."""


@dataclass(frozen=True)
class Teacher:
    """A checkpoint that is known.

    Attributes:
        section: A recipe's `teacher`, with `weights`.
        num_classes: Classes that it was trained on.
        text: What it is, in words.
    """

    section: config.Model
    num_classes: int
    text: str


def identify(file: Path, task: Task, network: str | None = None) -> Teacher:
    """Say what a checkpoint is: by the recipe of the run that it lies in, or by names and shapes of its tensors.

    Args:
        file: A .safetensors, .pth or .pt file.
        task: What the network is for.
        network: ARCH/BACKBONE or torchvision/NAME, where it is known.

    Raises:
        AcamkdError: The file cannot be read, or is of no network that is tried.
    """
    tensors = read_tensors(str(file))
    if (file.parent / RECIPE).is_file() and (known := _of_run(file, task)):
        return known
    convention = convention_of(tensors)
    if convention != "torchvision":
        tensors = to_torchvision(tensors, convention)
    shapes = _shapes(_without_prefix(tensors))
    count = _count_classes(shapes, task)
    sections = [model_of_name(network)] if network else _candidates(shapes, task)
    for section in sections if count else ():
        if convention not in ("torchvision", section.convention):
            section = section.model_copy(update={"options": {"convention": convention}})
        with suppress(AcamkdError), torch.device("meta"):
            blank = section.model_copy(update={"weights": None, "backbone_weights": None})
            net = models.build(blank, task, count).net
            own = _shapes(net.state_dict())
            fits = all(shapes.get(name) == shape for name, shape in own.items())
            if fits and not any(is_further_part(net, name) for name in shapes):  # as ResNet-101 has of ResNet-50
                found = section.model_copy(update={"weights": str(file.resolve()), "backbone_weights": None})
                words = "" if convention == "torchvision" else f" of {convention}'s"
                return Teacher(found, count, f"{section.title}{words} with {_classes(count)}, all {len(own)} tensors")
    first = ", ".join(f"{name} {list(shape)}" for name, shape in list(shapes.items())[:3])
    asked = f"it is not {network}" if network else "say what it is with --teacher-network ARCH/BACKBONE"
    raise AcamkdError(
        f"{file}: no {'detector' if task == 'detection' else 'segmenter'} that is known has these {len(shapes)} "
        f"tensors ({first}, ...): {asked}, or write the teacher's section by hand"
    )


def _of_run(file: Path, task: Task) -> Teacher | None:
    recipe = config.load(file.parent / RECIPE)
    section = recipe.teacher if file.stem == "teacher" else recipe.student
    if section is None or recipe.task != task or recipe.data.classes is None:
        return None
    if ":" in section.arch:
        raise AcamkdError(
            f"{file.parent / RECIPE} names code that would run, {section.arch}: where you trust it, write the "
            "teacher's section by hand"
        )
    kept = section.model_copy(update={"weights": str(file.resolve()), "backbone_weights": None, "inherit": ()})
    count = len(recipe.data.classes)
    return Teacher(kept, count, f"{section.title} with {_classes(count)}, of the run {file.parent}")


def _classes(count: int) -> str:
    return f"{count} class{'es' if count != 1 else ''}"


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(x.shape) for name, x in tensors.items() if not name.endswith("num_batches_tracked")}


def _without_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without `module.` and the like, which wrappers put before every name."""
    names = {name.partition(".")[0] for name in tensors}
    if len(names) == 1:
        return {name.partition(".")[2]: x for name, x in tensors.items()}
    return dict(tensors)


def _count_classes(shapes: Mapping[str, tuple[int, ...]], task: Task) -> int:
    """Classes of the task, without a detector's background; 0 where no head is known."""
    if task == "segmentation":
        head = next((name for name in ("segmentation_head.0.weight", "classifier.4.weight") if name in shapes), "")
        return shapes[head][0] if head else 0
    if boxes := shapes.get("roi_heads.box_predictor.cls_score.weight"):
        return boxes[0] - 1
    logits, sides = (shapes.get(f"head.{head}.weight") for head in (
        "classification_head.cls_logits", "regression_head.bbox_reg"))  # fmt: skip
    return logits[0] // (sides[0] // 4 if sides else 1) - 1 if logits else 0  # RepPoints has no such layer


def _candidates(shapes: Mapping[str, tuple[int, ...]], task: Task) -> Iterator[config.Model]:
    is_resnet = any(".layer1." in name for name in shapes)
    if task == "detection":
        arch = (
            "faster_rcnn" if "roi_heads.box_predictor.cls_score.weight" in shapes
            else "reppoints" if "head.regression_head.moment_transfer" in shapes
            else "fcos" if any("bbox_ctrness" in name for name in shapes)
            else "retinanet"
        )  # fmt: skip
        width = shapes.get("backbone.fpn.layer_blocks.0.0.weight", (256,))[0]
        resnets = (*RESNETS, *(f"torchvision/{name}" for name in RESNETS))
        for backbone in resnets if is_resnet else TIMM:
            yield config.Model(arch=arch, backbone=backbone, fpn_channels=width)
    elif "classifier.4.weight" in shapes:
        for name in ("deeplabv3_resnet50", "deeplabv3_resnet101", "deeplabv3_mobilenet_v3_large", "fcn_resnet50",
                     "fcn_resnet101"):  # fmt: skip
            yield config.Model(arch=f"torchvision/{name}", options={"aux_loss": "aux_classifier.4.weight" in shapes})
    else:
        from_timm = any(name.startswith("encoder.model.") for name in shapes)
        encoders = [f"tu-{name}" for name in (RESNETS if is_resnet else TIMM)] if from_timm else [*RESNETS, *SMP]
        decoder = {name.removeprefix("decoder.") for name in shapes if name.startswith("decoder.")}
        archs = [arch for arch, begin in ARCHITECTURES.items() if any(name.startswith(begin) for name in decoder)]
        for arch, encoder in product(archs, encoders):
            yield config.Model(arch=arch, backbone=encoder)
