"""Build a TaskModel from a recipe's section."""

from __future__ import annotations

import logging
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from acamkd.config import Model, ShortLong, imported
from acamkd.errors import AcamkdError, nearest
from acamkd.models import detection, hf, reppoints, segmentation
from acamkd.models.base import Family, FeatureModel, PixelSize, Task, TaskModel
from acamkd.models.detection import WRAPPERS, wrap_detector
from acamkd.models.segmentation import Segmenter
from acamkd.models.timm_features import build_features
from acamkd.models.weights import LoadReport, load_weights

log = logging.getLogger(__name__)


FAMILIES = (detection.FAMILY, reppoints.FAMILY, segmentation.FAMILY, *hf.FAMILIES)
"""The only table of networks that have a name."""


def family_of(arch: str, task: Task | None = None) -> Family:
    """Find the family of a recipe's `arch`, for one task or any; raises AcamkdError that lists the nearest names."""
    families = [family for family in FAMILIES if task in (None, family.task)]
    found = next((family for family in (*families, *FAMILIES) if family.holds(arch)), None)
    if found is not None and task in (None, found.task):
        return found
    known = [name + "NAME" if name.endswith("/") else name for family in families for name in family.names()]
    what = {"detection": "detector", "segmentation": "segmenter", None: "network"}[task]
    why = f"unknown {what} {arch}" if found is None else f"{arch} is for {found.task}, and the recipe for {task}"
    raise AcamkdError(f"{why}; {nearest(arch, known)} Or package.module:factory")


def build(
    model: Model,
    task: Task,
    num_classes: int,
    resize: PixelSize | ShortLong | None = None,
    *,
    teacher: bool = False,
) -> TaskModel:
    """Build the network that a recipe describes and load its weights.

    Args:
        model: The recipe's section. `arch: package.module:factory` calls `factory(num_classes=num_classes,
            **options)`, in which an option `num_classes` wins (torchvision's detectors count the background too); it
            returns a TaskModel, a torchvision RetinaNet, FCOS or FasterRCNN, or any segmentation module.
        task: Task of the network.
        num_classes: Classes of the task, background and void not counted; the section's own number wins.
        resize: The recipe's `data.resize`.
        teacher: Every tensor must be in the weights file; a student may start from a part of them.

    Raises:
        AcamkdError: Something named in the recipe does not exist or does not fit; the message says what is allowed.
    """
    built = _build(model, task, num_classes, resize, teacher)
    if not isinstance(built, TaskModel):
        raise AcamkdError(f"{model.title} has no head, and only a teacher can do without")
    return built


def build_teacher(
    model: Model, task: Task, num_classes: int, resize: PixelSize | ShortLong | None = None
) -> FeatureModel:
    """Build a recipe's teacher: as `build` does, or a network without a head.

    That is `arch: timm/NAME`, or what a factory returns that is a FeatureModel and no TaskModel.
    """
    return _build(model, task, num_classes, resize, teacher=True)


def _build(
    model: Model, task: Task, num_classes: int, resize: PixelSize | ShortLong | None, teacher: bool
) -> FeatureModel:
    num_classes = model.num_classes or num_classes
    if model.weights is not None:  # they include the backbone: a download would be overwritten
        model = model.model_copy(update={"backbone_weights": None})
    if ":" in model.arch:
        built = _from_factory(model, task, num_classes, resize)
    elif model.is_headless:
        built = build_features(model)
    else:
        built = family_of(model.arch, task).build(model, num_classes, resize)
    who = model.title
    if model.weights is not None:
        _say(load_weights(built.net, model.weights, strict=teacher, what=who, convention=model.convention))
    elif model.backbone_weights not in (None, "imagenet"):
        _say(load_weights(built.backbone, model.backbone_weights, strict=False, what=f"{who}, backbone"))
    elif teacher and not (model.brings_weights or (model.is_headless and model.backbone_weights is not None)):
        log.warning("the teacher, %s, has no `weights`: nothing was trained but, at most, its backbone", who)
    if built.license is not None:
        log.info("%s: the license of its weights is %s", who, built.license)
    return built


def _say(report: LoadReport) -> None:
    log.log(logging.INFO if len(report.matched) == report.total else logging.WARNING, "%s", report)


def call_factory(model: Model, num_classes: int) -> Any:
    """Call the factory that a recipe's section names."""
    return imported(model.arch, "arch")(**{"num_classes": num_classes, **model.options})


def _from_factory(model: Model, task: Task, num_classes: int, resize: PixelSize | ShortLong | None) -> FeatureModel:
    net = call_factory(model, num_classes)
    if isinstance(net, TaskModel) and net.task != task:
        raise AcamkdError(f"{model.arch} gives a network for {net.task}, but the recipe's task is {task}")
    if isinstance(net, FeatureModel):
        for key, given, own in (("mean", model.mean, net.mean), ("std", model.std, net.std)):
            if given is not None and not torch.equal(own.flatten(), own.new_tensor(given)):
                raise AcamkdError(
                    f"{key}: {model.arch} returns a {type(net).__name__}, which has its own {key}, "
                    f"{own.flatten().tolist()}: leave {key} out, or hand it to the factory in `options`"
                )
        if isinstance(net, TaskModel) and resize is not None:
            log.warning("data.resize has no effect on %s: its own `prepare` decides the size of its input", model.arch)
        return net
    if task == "segmentation" and isinstance(net, nn.Module):
        mean, std = model.mean or IMAGENET_DEFAULT_MEAN, model.std or IMAGENET_DEFAULT_STD
        return Segmenter(net, num_classes, mean, std, resize)
    if task == "detection" and isinstance(net, tuple(WRAPPERS)):
        return wrap_detector(net, num_classes, resize, model.mean, model.std)
    raise AcamkdError(
        f"{model.arch} returned {type(net).__name__}; allowed: an acamkd TaskModel, "
        + ("any module" if task == "segmentation" else "torchvision's RetinaNet, FCOS or FasterRCNN")
    )
