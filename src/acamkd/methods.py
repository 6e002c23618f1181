"""METHODS: name -> class, the only table; and what builds a Distiller from a recipe's losses."""

from __future__ import annotations

import inspect
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import docstring_parser
import torch
from pydantic import BaseModel, ConfigDict, ValidationError, create_model
from torch import Tensor

from acamkd import config, losses
from acamkd.distiller import Distiller, Pair, WeightSchedule
from acamkd.errors import AcamkdError, nearest
from acamkd.features import FeatureTap
from acamkd.losses.base import DistillationContext, FeatureLoss, HeadLoss
from acamkd.models.base import Batch, TaskModel, keeping_modes
from acamkd.models.weights import read_tensors

log = logging.getLogger(__name__)

METHODS: Mapping[str, type[FeatureLoss] | type[HeadLoss]] = {
    "acam": losses.ACAM,
    "at": losses.AT,
    "cankd": losses.CanKD,
    "crosskd": losses.CrossKD,
    "cwd": losses.CWD,
    "dist": losses.DIST,
    "fgd": losses.FGD,
    "fitnet": losses.FitNet,
    "freekd": losses.FreeKD,
    "maskd": losses.MasKD,
    "mgd": losses.MGD,
    "pkd": losses.PKD,
}

PROBE_SIZE = (128, 128)
"""(height, width) of the random picture that channels are read from."""


def find(name: str) -> type[FeatureLoss] | type[HeadLoss]:
    """The class of a method by its name in recipes; raises AcamkdError that lists the nearest names.

    `package.module:Class` names a method outside this package.
    """
    if ":" in name:
        method = config.imported(name, "name")
        if not (isinstance(method, type) and issubclass(method, (FeatureLoss, HeadLoss))):
            raise AcamkdError(f"{name} is no method: it must be a subclass of FeatureLoss or HeadLoss")
        return method
    if name not in METHODS:
        raise AcamkdError(f"there is no method {name!r}; {nearest(name, METHODS)}")
    return METHODS[name]


def options_of(name: str) -> type[BaseModel]:
    """A model of a method's options, read off its constructor."""
    method = find(name)
    hints = get_type_hints(method.__init__)
    hints["tokens"] = str | None  # the constructor takes tensors, a recipe names the file that holds them
    own = {
        option: parameter.default
        for option, parameter in inspect.signature(method).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    if missing := [option for option in own if option not in hints]:
        raise AcamkdError(f"{name}: {method.__name__}.__init__ gives no type for {', '.join(missing)}: annotate it")
    fields: dict[str, Any] = {option: (hints[option], default) for option, default in own.items()}
    return create_model(method.__name__, __config__=ConfigDict(extra="forbid"), **fields)


def options(name: str, preset: str | None = None, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A method's options from a preset and from what was given beside it, checked against the constructor.

    Raises:
        AcamkdError: An unknown method, preset or option (nearest names are listed), or a value of a wrong type.
    """
    method, model = find(name), options_of(name)
    if preset is not None and preset not in method.PRESETS:
        known = nearest(preset, method.PRESETS) if method.PRESETS else "it has none"
        raise AcamkdError(f"{name} has no preset {preset!r}; {known}")
    merged = {**(method.PRESETS[preset] if preset is not None else {}), **(given or {})}
    try:
        checked = model.model_validate_json(json.dumps(merged), strict=True)
    except ValidationError as error:
        raise AcamkdError("; ".join(_explain(name, model, entry) for entry in error.errors())) from error
    return {option: getattr(checked, option) for option in merged}


@contextmanager
def quietly() -> Iterator[None]:
    """Within, nothing is said of layers and untrained tokens: it is when the losses are built for good."""
    loggers = [logging.getLogger(name) for name in ("acamkd.methods", "acamkd.losses")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def build_distiller(student: TaskModel, teacher: TaskModel, entries: Sequence[config.Loss]) -> Distiller:
    """Build every loss that a recipe lists, with the channels that both networks turn out to have.

    Args:
        student: The network to train.
        teacher: The network to imitate.
        entries: The recipe's `losses`.

    Raises:
        AcamkdError: A method, option or layer does not exist, or a pair does not match; the entry is named.
    """
    batch = student.prepare([torch.rand(3, *PROBE_SIZE)])
    pairs: list[Pair | None] = []
    modules: list[FeatureLoss | HeadLoss] = []
    schedules: list[WeightSchedule] = []
    for index, entry in enumerate(entries):
        try:
            built = _build(entry, student, teacher, batch)
        except ValueError as error:
            raise AcamkdError(f"losses.{index} ({entry.name}): {error}") from error
        pairs += [pair for pair, _ in built]
        modules += [module for _, module in built]
        schedules += [WeightSchedule(entry.ramp_epochs, entry.stop_epoch)] * len(built)
    return Distiller(student, teacher, pairs, modules, schedules)


def _build(
    entry: config.Loss, student: TaskModel, teacher: TaskModel, batch: Batch
) -> list[tuple[Pair | None, FeatureLoss | HeadLoss]]:
    method = find(entry.name)
    if entry.is_auto:
        raise AcamkdError("`weight: auto` needs pictures: acamkd.calibrate gives it a number")
    checked = options(entry.name, entry.preset, entry.options)
    tokens = read_tensors(checked["tokens"]) if checked.get("tokens") else None
    if issubclass(method, HeadLoss):
        if entry.pairs:
            log.warning("%s works on the heads and names its layers itself: `pairs` is not used", entry.name)
        _require_same_classes("it compares heads", student, teacher)
        loss = method(**checked)
        loss.layers(student, teacher)  # refuses networks that it cannot work on
        return [(None, loss)]
    if "boxes" in method.needs and student.task != "detection":
        raise AcamkdError(f"this method needs boxes, and {student.task} has none")
    if not entry.pairs:
        raise AcamkdError(
            "`pairs` is missing: name the layers to compare, such as [backbone:*] or [segmentation_head.0]"
        )
    built: list[tuple[Pair | None, FeatureLoss | HeadLoss]] = []
    for given in entry.pairs:
        student_name, teacher_name = (given, given) if isinstance(given, str) else given
        student_maps = _maps_of("student", student, student_name, batch)
        teacher_maps = _maps_of("teacher", teacher, teacher_name, batch)
        if len(student_maps) != len(teacher_maps):
            raise AcamkdError(
                f"{student_name} stands for {len(student_maps)} outputs of the student, "
                f"{teacher_name} for {len(teacher_maps)} of the teacher: name them one by one"
            )
        for (s_name, s_map), (t_name, t_map) in zip(student_maps.items(), teacher_maps.items(), strict=True):
            log.info("%s: %s %s <- %s %s", entry.name, s_name, list(s_map.shape[1:]), t_name, list(t_map.shape[1:]))
            if tokens is not None:
                checked["tokens"] = _level_tokens(tokens, t_name)
            if _holds_classes(s_name, s_map, student) and _holds_classes(t_name, t_map, teacher):
                _require_same_classes(f"the channels of {s_name} and {t_name} are classes", student, teacher)
            level = method(s_map.shape[1], t_map.shape[1], **checked)
            if level.teacher_task:
                _require_same_classes("its masks learn from the teacher's own loss", student, teacher)
            built.append(((s_name, t_name), level))
    return built


def _holds_classes(name: str, x: Tensor, model: TaskModel) -> bool:
    """Whether a map is a network's logits."""
    return "cls_logits" in name if model.task == "detection" else x.shape[1] == model.num_classes


def _require_same_classes(why: str, student: TaskModel, teacher: TaskModel) -> None:
    if student.num_classes != teacher.num_classes:
        raise AcamkdError(
            f"{why}, but the teacher has {teacher.num_classes} classes of its own and the student "
            f"{student.num_classes}: compare features instead, such as [backbone:*] or [encoder:4]"
        )


def _maps_of(who: str, model: TaskModel, name: str, batch: Batch) -> dict[str, Tensor]:
    """What one name stands for in one of the networks, if it is maps."""
    try:
        maps = probe(model, [name], batch)
    except AcamkdError as error:
        raise AcamkdError(f"{who}: {error}") from error
    for tapped, tensor in maps.items():
        if tensor.ndim != 4:
            raise AcamkdError(f"{who}: {tapped} is {tuple(tensor.shape)}, not a map (N, C, H, W)")
    return maps


@torch.no_grad()
def probe(model: TaskModel, names: Sequence[str], batch: Batch) -> dict[str, Tensor]:
    """The outputs that some names stand for, `*` expanded, from one forward in eval mode."""
    with keeping_modes(model), FeatureTap(model.eval().net, names) as tap:
        model(batch)
        return tap.features()


def _level_tokens(tokens: Mapping[str, Tensor], layer: str) -> dict[str, Tensor]:
    """The entries of one level, `LAYER/NAME` in the file that `acamkd tokens` wrote."""
    found = {name.removeprefix(f"{layer}/"): tensor for name, tensor in tokens.items() if name.startswith(f"{layer}/")}
    if not found:
        layers = sorted({name.rpartition("/")[0] for name in tokens})
        only = f"only for {', '.join(layers)}" if any(layers) else "nor for another: `acamkd tokens` did not write it"
        raise AcamkdError(f"the tokens file has none for the teacher's layer {layer}, {only}")
    return found


def describe(name: str) -> dict[str, Any]:
    """What the documentation of a method says, read off its class.

    Returns:
        `name`, `summary`, `paper`, `authors`, `venue`, `presets`, `options` (name, type, default, help), `needs`, and,
        measured on one level with 256 channels on both sides, `terms` and the number of learnable `parameters`.
    """
    method = find(name)
    text = inspect.getdoc(method) or ""
    paper = " ".join("".join(re.findall(r"^Paper: (.+?)\.\n\n", text, flags=re.MULTILINE | re.DOTALL)[:1]).split())
    helps = {entry.arg_name: entry.description or "" for entry in docstring_parser.parse(text).params}
    signature = inspect.signature(method)
    description: dict[str, Any] = {
        "name": name,
        "summary": text.partition("\n")[0],
        "paper": paper,
        "authors": paper.partition(",")[0],
        "venue": paper.rpartition(", ")[2],
        "presets": {preset: dict(values) for preset, values in method.PRESETS.items()},
        "options": [
            {
                "name": option,
                "type": _type_name(field.annotation),
                "default": signature.parameters[option].default,
                "help": " ".join(helps.get(option, "").split()),
            }
            for option, field in options_of(name).model_fields.items()
        ],
    }
    if issubclass(method, HeadLoss):
        needs, terms, parameters = ["RetinaNet or FCOS on both sides"], list(method.TERMS), 0
    else:
        loss = method(256, 256)
        boxes = [torch.tensor([[8.0, 8.0, 40.0, 40.0]])]
        student, teacher, gradient = torch.randn(3, 1, 256, 8, 8)
        context = DistillationContext(input_size=(64, 64), boxes=boxes, task_gradient=gradient)
        terms = sorted(loss(student, teacher, context))
        needs = sorted(loss.needs) + (["learnt tokens"] if hasattr(loss, "token_module") else [])
        parameters = sum(parameter.numel() for parameter in loss.parameters() if parameter.requires_grad)
    return {**description, "needs": needs, "terms": terms, "parameters": parameters}


def _type_name(annotation: Any) -> str:
    """A type as users write it: `one of a, b` for a Literal."""
    if get_origin(annotation) is Literal:
        return " | ".join(map(str, get_args(annotation)))
    if get_origin(annotation) in (Union, UnionType):
        return " | ".join(_type_name(each) for each in get_args(annotation))
    if annotation is NoneType:
        return "none"
    return getattr(annotation, "__name__", str(annotation)) if not get_args(annotation) else "list"


def _explain(name: str, model: type[BaseModel], entry: Mapping[str, Any]) -> str:
    option = str(entry["loc"][0])
    if entry["type"] == "extra_forbidden":
        return f"{name} has no option {option!r}; {nearest(option, model.model_fields)}"
    return f"{name}.{option}: {entry['msg']} (given: {entry['input']!r})"
