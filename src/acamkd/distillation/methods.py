"""METHODS: name -> class; and what is known of a method by its name."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import docstring_parser
import torch
from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from acamkd import config, losses
from acamkd.errors import AcamkdError, nearest
from acamkd.losses.base import DistillationContext, FeatureLoss, HeadLoss

METHODS: Mapping[str, type[FeatureLoss] | type[HeadLoss]] = {
    name.lower(): loss
    for name, loss in vars(losses).items()
    if isinstance(loss, type) and issubclass(loss, (FeatureLoss, HeadLoss)) and not inspect.isabstract(loss)
}
"""Every loss that `acamkd.losses` lists, by its class's name in small letters."""


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


def all_options(name: str, preset: str | None = None, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """`options`, and the defaults of all others."""
    defaults = {option: field.default for option, field in options_of(name).model_fields.items()}
    return defaults | options(name, preset, given)


def describe(name: str) -> dict[str, Any]:
    """What the documentation of a method says, read off its class.

    Returns:
        `name`, `summary`, `paper`, `authors`, `venue`, `link`, `code`, `presets`, `options` (name, type, default, help)
        and `needs`. `link` and `code`, of the paper and of its official code, are empty where there is none. `terms`
        and the number of learnable `parameters` are those of one level with 256 channels on both sides.
    """
    method = find(name)
    text = inspect.getdoc(method) or ""
    cited = re.search(r"^Paper: (?P<paper>.+?)\.(\s+(?P<link>https://\S+))?$", text, flags=re.MULTILINE | re.DOTALL)
    paper, link = (" ".join((cited[group] or "").split()) if cited else "" for group in ("paper", "link"))
    code = re.search(r"^Official code: (\S+)$", text, flags=re.MULTILINE)
    helps = {entry.arg_name: entry.description or "" for entry in docstring_parser.parse(text).params}
    signature = inspect.signature(method)
    description: dict[str, Any] = {
        "name": name,
        "summary": text.partition("\n")[0],
        "paper": paper,
        "authors": paper.partition(",")[0],
        "venue": paper.rpartition(", ")[2],
        "link": link,
        "code": code[1] if code else "",
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
        loss: FeatureLoss | HeadLoss = method()
        terms = list(method.TERMS)
    else:
        loss = method(256, 256)
        boxes = [torch.tensor([[8.0, 8.0, 40.0, 40.0]])]
        student, teacher, gradient = torch.randn(3, 1, 256, 8, 8)
        context = DistillationContext(input_size=(64, 64), boxes=boxes, task_gradient=gradient)
        terms = sorted(loss(student, teacher, context))
    needs = [*sorted(loss.needs), *(["learned tokens"] if loss.tokens is not None else []), *method.REQUIREMENTS]
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
