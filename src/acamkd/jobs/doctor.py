"""Examine a recipe before a long training: data, teacher, layers and gradients."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, overload

import torch
from rich.console import Group
from rich.text import Text
from torch import Tensor, nn

from acamkd import config, data, models
from acamkd.data import ImageDataset
from acamkd.distillation.auto_weight import gradient_norms, prepared, probe_distiller, total_norms, with_objects
from acamkd.distillation.taps import probe
from acamkd.engine.devices import device_of, moved_to
from acamkd.engine.metrics import METRICS, score, scorer_of, why_unscored
from acamkd.engine.printing import Printable
from acamkd.engine.quantization import require_torchao
from acamkd.engine.runs import default_folder
from acamkd.errors import AcamkdError
from acamkd.jobs.examine_data import DataReport, examine_data
from acamkd.jobs.setup import (
    ALL_LABELED,
    build_network,
    build_teacher,
    describe_data,
    describe_lead,
    score_of_run,
    teacher_section,
)
from acamkd.losses.base import HeadLoss
from acamkd.models.base import VOID, Batch, FeatureModel, Target, TaskModel, head_of

Status: TypeAlias = Literal["pass", "warn", "fail"]

COLORS: Mapping[Status, str] = {"pass": "green", "warn": "yellow", "fail": "bold red"}

SLICE = 64
"""The teacher is scored on at most this many validation images."""
SECONDS = 20
"""The scoring stops after about this many seconds."""
IMAGES = 4
"""Number of training images on which gradients are measured."""
MARGIN = 1.0
"""A teacher less than this many points above a constant prediction was not trained on these images."""
STRONG, WEAK = 2.0, 0.02
"""Gradient-norm ratios (distillation to task) beyond which a weight is suspicious."""


@dataclass(frozen=True)
class Finding(Printable):
    """One line of the examination.

    Attributes:
        check: Name of the check.
        status: `fail`: the distillation would be worthless; `warn`: worth checking.
        text: The result.
        advice: What to do; empty if there is nothing to do.
    """

    check: str
    status: Status
    text: str
    advice: str = ""

    def __rich__(self) -> Text:
        line = Text.assemble((self.status, COLORS[self.status]), f"  {self.check}: {self.text}")
        return line.append(f"\n      -> {self.advice}") if self.advice else line


@dataclass(frozen=True)
class Diagnosis(Printable):
    """All findings of an examination, in the order of the checks."""

    findings: tuple[Finding, ...]

    @property
    def failed(self) -> bool:
        """Whether any finding makes the distillation worthless."""
        return any(finding.status == "fail" for finding in self.findings)

    def __rich__(self) -> Group:
        return Group(*self.findings)


@overload
def doctor(
    recipe: config.Recipe | Path | str, *, overrides: Sequence[str] = (), only_data: Literal[False] = False
) -> Diagnosis: ...
@overload
def doctor(
    recipe: config.Recipe | Path | str, *, overrides: Sequence[str] = (), only_data: Literal[True]
) -> DataReport: ...
def doctor(
    recipe: config.Recipe | Path | str, *, overrides: Sequence[str] = (), only_data: bool = False
) -> Diagnosis | DataReport:
    """Examine a recipe in less than a minute: is the teacher good, does its gradient reach the student?

    Args:
        recipe: A recipe for `distill`, or its file.
        overrides: `key=value` assignments, as `--set` takes them.
        only_data: Examine only the images, and count what they hold.

    Returns:
        The findings, each with its advice; with `only_data` what the splits hold.

    Raises:
        AcamkdError: The recipe cannot be read. Every other problem is a finding.
    """
    recipe = config.as_recipe(recipe, overrides)
    return examine_data(recipe) if only_data else Diagnosis(tuple(examine(recipe)))


def examine(recipe: config.Recipe) -> Iterator[Finding]:
    """Examine data, networks and losses of a distillation in less than a minute; nothing is written.

    Args:
        recipe: As `distill` takes it.

    Yields:
        Findings as they are made. An error that prevents further checks is the last one.
    """
    stage = "data"
    try:
        source = data.resolve(recipe.data, recipe.task)
        train, val = (
            data.build(source, recipe.task, split, seed=recipe.train.seed, augment=split == "train")
            for split in ("train", "val")
        )
        data.check_same_classes(train, val)
        for split in (train, val):
            data.refuse(split.problems)
        yield Finding(stage, "pass", describe_data(train, val))
        more = None if source.unlabeled is None else data.build_unlabeled(source, recipe.task, seed=recipe.train.seed)
        for warning in data.compare_splits(train, val, source, more):
            yield Finding(stage, "warn", warning)
        if source.test is not None:
            seen = source.model_copy(update={"classes": train.classes})
            test = data.build(seen, recipe.task, "test", seed=recipe.train.seed, augment=False)
            data.check_same_classes(train, test, "test")
            data.refuse(test.problems)
            for warning in data.compare_test(test, train, val, more):
                yield Finding(stage, "warn", warning)
        if more is None:
            yield Finding(stage, "pass", ALL_LABELED)
        stage = "teacher's weights"
        if recipe.teacher is None or not recipe.losses:
            raise AcamkdError("the recipe needs a `teacher` section and `losses` to distill")
        section = teacher_section(recipe)
        teacher = build_teacher(recipe, section, train.classes)
        yield _weights(stage, teacher, section)
        stage = "student's weights"
        student = build_network(recipe, recipe.student, train.classes)
        yield _weights(stage, student, recipe.student)
        models.inherit(student, teacher, recipe.student.inherit)
        stage = "colors"
        yield _colors(student, teacher)
        stage = "batch norm"
        yield from _batch_norm(student, teacher, recipe.train.batch_size)
        if recipe.train.quantize:
            stage = "INT8"
            require_torchao()
            yield _quantization(stage, recipe.student)
        stage = "teacher's score"
        yield _score(teacher, val, recipe)
        behind = describe_lead(recipe, score_of_run(recipe, section), default_folder(recipe, "baseline"))
        if behind is not None:
            yield Finding(stage, "warn", behind, "train a stronger teacher, or find labels for more images")
        stage = "distillation"
        yield from _distillation(student, teacher, train, recipe)
    except AcamkdError as error:
        yield Finding(stage, "fail", str(error))


def _weights(check: str, model: FeatureModel, section: config.Model) -> Finding:
    """Report the source of a network's weights. They have loaded once already, so no error can occur here."""
    if section.weights is not None:
        report = models.load_weights(
            model.net, section.weights, strict=False, what=section.arch, convention=section.convention
        )
    elif section.backbone_weights not in (None, "imagenet"):
        what = section.arch if section.is_headless else section.backbone
        report = models.load_weights(model.backbone, section.backbone_weights, strict=False, what=what)
    elif section.brings_weights:
        return Finding(check, "pass", f"as {section.arch} provides them")
    elif section.is_headless and section.backbone_weights is not None:
        return Finding(check, "pass", f"{section.arch} as timm provides it, license {model.license}")
    elif section.backbone_weights == "imagenet" and not section.arch.startswith("hf/"):
        return Finding(check, "pass", f"{section.backbone} pretrained on ImageNet, the rest starts from random weights")
    else:
        return Finding(check, "warn", "nothing is pretrained", "give weights or backbone_weights, if there are any")
    advice = "" if len(report.matched) == report.total else "the rest starts from random weights"
    if section.weights is not None and report.deeper:
        advice = f"the file is of a network with further parts, {report.deeper[0]} among them: check the backbone"
    return Finding(check, "warn" if advice else "pass", str(report), advice)


def _colors(student: TaskModel, teacher: FeatureModel) -> Finding:
    """Compare the normalization statistics (mean, standard deviation) that the networks expect."""
    described = [
        f"{who} {' '.join(f'{x:.3f}' for x in model.mean.flatten().tolist())} / "
        f"{' '.join(f'{x:.3f}' for x in model.std.flatten().tolist())}"
        for who, model in (("student", student), ("teacher", teacher))
    ]
    if torch.allclose(student.mean, teacher.mean) and torch.allclose(student.std, teacher.std):
        return Finding("colors", "pass", f"both networks: {described[0].removeprefix('student ')}")
    return Finding(
        "colors", "warn", "; ".join(described),
        "each network normalizes its input itself; if one was trained with other values, set its mean and std",
    )  # fmt: skip


def _batch_norm(student: TaskModel, teacher: FeatureModel, batch_size: int) -> Iterator[Finding]:
    layers = {who: _norms(model.net) for who, model in (("student", student), ("teacher", teacher))}
    blank = [name for name, layer in layers["teacher"].items() if _is_blank(layer)]
    if blank:
        yield Finding(
            "batch norm", "fail", f"{len(blank)} of the teacher's {len(layers['teacher'])} layers hold the statistics "
            f"of an untrained network ({', '.join(blank[:3])}{', ...' if len(blank) > 3 else ''})",
            "give the teacher its trained weights",
        )  # fmt: skip
    learning = sum(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in layers["student"].values())
    text = f"student {len(layers['student'])} layers ({learning} learn), teacher {len(layers['teacher'])} (frozen)"
    if learning and batch_size < 4:
        text = f"{text}; the student's statistics come from {batch_size} images at a time"
        yield Finding("batch norm", "warn", text, "raise train.batch_size, or freeze the student's batch norm")
    else:
        yield Finding("batch norm", "pass", text)


def _quantization(check: str, student: config.Model) -> Finding:
    """Whether the student that is to get used to INT8 has been trained before."""
    text = "train.quantize: the student is trained and scored with the rounding of INT8"
    if student.weights is None:
        advice = "train the student first, and give its file as student.weights for some more epochs"
        return Finding(check, "warn", f"{text} from its start", advice)
    if student.inherit:
        advice = "set student.inherit=[]"
        parts = ", ".join(student.inherit)
        return Finding(check, "warn", f"student.inherit puts the teacher's {parts} over student.weights", advice)
    return Finding(check, "pass", text)


def _norms(net: nn.Module) -> dict[str, Any]:
    """Layers with running statistics by name, including frozen ones."""
    return {name: module for name, module in net.named_modules() if hasattr(module, "running_var")}


def _is_blank(layer: Any) -> bool:
    mean, variance = layer.running_mean, layer.running_var
    return mean is not None and bool((mean == 0).all() and (variance == 1).all())


def _score(model: FeatureModel, val: ImageDataset, recipe: config.Recipe) -> Finding:
    """Score the teacher on images drawn with a fixed seed, and compare with a constant prediction."""
    metric = METRICS[recipe.task]
    if why := why_unscored(model, len(val.classes)):
        return Finding("teacher's score", "pass", f"not scored: {why}")
    teacher = head_of(model)
    seen: list[Target] = []
    deadline = time.monotonic() + SECONDS
    # Not the first ones, which may all show the same, and in an order that a slow teacher may break off.
    drawn = random.Random(0).sample(range(len(val)), min(SLICE, len(val)))

    def images() -> Iterator[tuple[Sequence[Tensor], Sequence[Target]]]:
        for index in drawn:
            if time.monotonic() > deadline:
                return
            image, target = val[index]
            seen.append(target)
            yield [image], [target]

    device = teacher.mean.device
    teacher.to(device_of(recipe.train))
    reached = score(teacher, images(), scorer_of(recipe, val.classes))[metric]
    teacher.to(device)  # the student's device, whose batches both networks get
    chance = ignorance(seen, len(val.classes)) if recipe.task == "segmentation" else 0.0
    text = f"{metric} {reached:.2f} on {len(seen)} validation images; a constant prediction has {chance:.2f}"
    if math.isnan(reached) or chance + MARGIN > 100:
        text = f"{text}: they show too little to judge it by"
        return Finding("teacher's score", "warn", text, "look at its score on all validation images")
    if not reached >= chance + MARGIN:
        advice = (
            "its weights were not trained on these classes in this order, or hardly trained, or its mean, std or "
            "resize are others"
        )
        return Finding("teacher's score", "fail", text, advice)
    return Finding("teacher's score", "pass", text)


def ignorance(targets: Sequence[Target], classes: int) -> float:
    """The mIoU in percent of the best network that gives the same class to every pixel."""
    counts = torch.zeros(classes)
    for target in targets:
        counts += target["mask"][target["mask"] != VOID].bincount(minlength=classes)
    return 100 * float(counts.max() / counts.sum()) / max(1, int(counts.count_nonzero()))


def _distillation(
    student: TaskModel, teacher: FeatureModel, train: ImageDataset, recipe: config.Recipe
) -> Iterator[Finding]:
    size = min(IMAGES, recipe.train.batch_size, len(train))
    images = data.loader(train, size, 0, shuffle=True, seed=recipe.train.seed)
    networks = (student, teacher)
    with moved_to(device_of(recipe.train), *networks), probe_distiller(*networks, recipe.losses) as distiller:
        if recipe.data.unlabeled is not None:
            distiller.check_unlabeled()
        batch = next(prepared(student, with_objects(images)))
        for pair, loss in distiller.levels:
            name = type(loss).__name__
            if pair is not None:
                yield _tap(name, pair, student, teacher, batch)
            elif isinstance(loss, HeadLoss):
                names, _ = loss.layers(student, head_of(teacher))
                yield Finding("tap", "pass", f"{name}: {len(names)} layers of the heads")
        norms = gradient_norms(distiller, batch)
    groups: dict[str, dict[str, tuple[float, float]]] = {}
    for name, of_both in norms.items():
        groups.setdefault(".".join(name.split(".")[:2]), {})[name] = of_both
    for group, members in groups.items():
        yield Finding(f"gradient at {group}", "pass", "distillation {:.3g}, task {:.3g}".format(*total_norms(members)))
    yield _total(norms, recipe)


def _tap(method: str, pair: tuple[str, str], student: TaskModel, teacher: FeatureModel, batch: Batch) -> Finding:
    """Check one pair of layers on real images."""
    networks: tuple[tuple[FeatureModel, str], ...] = ((student, pair[0]), (teacher, pair[1]))
    maps = [probe(model, [name], batch)[name] for model, name in networks]
    shapes = [list(x.shape[1:]) for x in maps]
    text = f"{method}: {pair[0]} {shapes[0]} <- {pair[1]} {shapes[1]}"
    constant = [who for who, x in zip(("student", "teacher"), maps, strict=True) if x.std() == 0]
    if constant:
        return Finding("tap", "fail", f"{text}; the {constant[0]}'s feature map is constant", "tap another layer")
    if shapes[0][1:] != shapes[1][1:]:
        return Finding("tap", "warn", f"{text}; the student's feature map is resampled", "pair layers of equal stride")
    return Finding("tap", "pass", text)


def _total(norms: dict[str, tuple[float, float]], recipe: config.Recipe) -> Finding:
    distillation, task = total_norms(norms)
    text = f"distillation {distillation:.3g}, task {task:.3g}"
    if not math.isfinite(distillation + task):
        return Finding("gradient", "fail", f"{text}: not finite", "check the layers and the loaded weights")
    if distillation == 0:
        problem = f"{text}: no gradient of the distillation reaches the student"
        return Finding("gradient", "fail", problem, "check pairs and weights")
    ratio = distillation / task if task else math.inf
    text = f"{text}: gradient-norm ratio {ratio:.2g}"
    if automatic := [entry.name for entry in recipe.losses if entry.is_auto]:
        return Finding("gradient", "pass", f"{text}, before `weight: auto` sets {', '.join(automatic)}")
    if WEAK <= ratio <= STRONG:
        return Finding("gradient", "pass", text)
    return Finding("gradient", "warn", text, "set weight: auto, which measures on more images, or set a weight")
