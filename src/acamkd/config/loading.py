"""Recipes from and to YAML, with overrides and errors that name the key. Imports no torch."""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from acamkd.config.schema import Loss, Recipe
from acamkd.config.yaml_text import Location, quoted, read_yaml, spelling, write_yaml
from acamkd.errors import AcamkdError, nearest

log = logging.getLogger(__name__)

OLD_KEYS = {"data.unlabelled": "data.unlabeled"}
"""Keys of recipes and results that are read by an older spelling, too."""


def read_text(path: Path, what: str) -> str:
    """Read a text file of the user; an AcamkdError names it as `what`."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise AcamkdError(f"cannot read the {what} {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise AcamkdError(f"cannot read the {what} {path}: it is no UTF-8 ({error}); save it as UTF-8") from error


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        path: YAML file.
        overrides: `key=value` assignments, such as `losses.0.weight=2`; values are YAML. A new `losses.N.name` also
            drops the options of the previous method.

    Raises:
        AcamkdError: The file cannot be read, or does not fit; the message names every bad key.
    """
    text = read_text(path, "recipe")
    raw = read_yaml(text, str(path))
    if not isinstance(raw, dict):
        raise AcamkdError(f"{path} must hold a mapping with the keys {', '.join(Recipe.model_fields)}")
    raw = {"name": path.stem, **respelled(raw)}
    return parse(raw, str(path), [((), text), *(_assign(raw, assignment) for assignment in overrides)])


def as_recipe(recipe: Recipe | Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Return a recipe, given itself or by its file, with keys overridden; raises AcamkdError as `load` does."""
    if isinstance(recipe, Recipe):
        return override(recipe, overrides) if overrides else recipe
    return load(Path(recipe).expanduser(), overrides)


def parse(raw: Mapping[str, Any], source: str = "recipe", texts: Sequence[tuple[Location, str]] = ()) -> Recipe:
    """Validate a mapping as a recipe; raises AcamkdError that names every bad key.

    Args:
        raw: The mapping.
        source: Origin of the mapping, for messages.
        texts: The YAML texts that it was read from, each with its location in the recipe, so that errors can quote
            them.
    """
    try:
        # JSON mode is strict about types but accepts lists for tuples and strings for paths.
        return Recipe.model_validate_json(json.dumps(respelled(raw)), strict=True)
    except ValidationError as error:
        lines = dict.fromkeys(_explain(entry, texts) for entry in _telling(error.errors()))  # of a union some are equal
        raise AcamkdError("\n  ".join([f"{source} does not fit:", *lines])) from error


def override(recipe: Recipe, assignments: Sequence[str]) -> Recipe:
    """Return a recipe with overrides, as in `load`; raises AcamkdError that names every bad key."""
    raw = recipe.model_dump(mode="json")
    texts = [_assign(raw, assignment) for assignment in assignments]
    return parse(raw, f"the recipe {recipe.name} with {', '.join(map(_short, assignments))}", texts)


def dump(recipe: Recipe) -> str:
    """Write a recipe as YAML, with all defaults; `load` reads it back as an equal recipe."""
    return write_yaml(recipe.model_dump(mode="json"))


def respelled(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same recipe, metrics.json or trial with today's keys; one that has both spellings stays as it is."""
    for before, now in OLD_KEYS.items():
        (section, old), (_, new) = before.split("."), now.split(".")
        given = raw.get(section)
        if isinstance(given, dict) and old in given and new not in given:
            raw = {**raw, section: {new if key == old else key: value for key, value in given.items()}}
    return raw


def imported(reference: str, key: str) -> Any:
    """Import the object `package.module:name`; the import is logged.

    Raises:
        AcamkdError: The object does not exist; the message names the recipe's `key`.
    """
    module, _, name = reference.partition(":")
    log.info("importing %s", reference)
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise AcamkdError(
            f"{key} {reference}: {error}; the module must be installed or lie on PYTHONPATH, and have {name}"
        ) from error


def _assign(raw: dict[str, Any], assignment: str) -> tuple[Location, str]:
    """Apply one `key=value` to the raw mapping; returns the location and the text of the value."""
    key, separator, text = assignment.partition("=")
    if not separator or not all(key.split(".")):
        raise AcamkdError(f"--set {assignment}: write key=value, such as train.epochs=20")
    value = read_yaml(text, f"--set {_short(assignment)}: the value")
    key = OLD_KEYS.get(key, key)
    place = tuple(int(part) if part.isdecimal() else part for part in key.split("."))
    node: Any = raw
    *parents, last = key.split(".")
    for name in parents:
        node = _child(node, name, key)
    if isinstance(node, list):
        _child(node, last, key)
        node[int(last)] = value
        return place, text
    if not isinstance(node, dict):
        raise AcamkdError(f"--set {key}: {'.'.join(parents)} is a single value and has no key {last}")
    if parents[:1] == ["losses"] and last == "name" and node.get("name") != value:
        for option in set(node) - (set(Loss.model_fields) - {"preset", "weight"}):
            del node[option]
    node[last] = value
    return place, text


def _child(node: Any, name: str, key: str) -> Any:
    """The entry of a list, or of a mapping (created if needed), on the way to `key`."""
    if isinstance(node, list):
        if not name.isdecimal() or int(name) >= len(node):
            raise AcamkdError(f"--set {key}: there is no entry {name}, the list has {len(node)} (counted from 0)")
        return node[int(name)]
    if not isinstance(node, dict):
        raise AcamkdError(f"--set {key}: {name} would lie below a single value")
    if node.get(name) is None:
        node[name] = {}
    return node[name]


def _explain(entry: Mapping[str, Any], texts: Sequence[tuple[Location, str]]) -> str:
    """One line for one validation error."""
    place = _place(entry)
    location = [str(part) for part in place]
    key = ".".join(location)
    if entry["type"] == "extra_forbidden":
        return f"{key}: unknown key; {nearest(location[-1], _fields_at(location[:-1]))}"
    if entry["type"] == "missing":
        return f"{key}: missing"
    if entry["type"] in ("string_type", "path_type") and isinstance(entry["input"], (bool, int, float, NoneType)):
        read = json.dumps(entry["input"])
        found = read if (spelled := _spelling(place, texts)) is None else spelled
        if not found:
            return f"{key}: nothing is given, and text is needed"
        as_what = "" if read == found else f" as {read}"
        return f"{key}: {found} is read{as_what}, and text is needed: write it in quotes, {quoted(found)}"
    if entry["type"] in ("tuple_type", "list_type"):
        return f"{key}: must be a list (given: {_short(repr(entry['input']))}); write it in brackets"
    if entry["type"] == "dict_type":
        return f"{key}: must hold keys (given: {_short(repr(entry['input']))}), such as {{key: value}}"
    if entry["type"] in ("byte_size", "byte_size_unit"):
        return f"{key}: {_short(repr(entry['input']))} is no size: write a number and its unit, such as 20GB"
    if entry["type"] == "model_type":
        keys = ", ".join(_fields_at(location))
        return f"{key}: must hold keys (given: {_short(repr(entry['input']))}); known: {keys}"
    message = entry["msg"].removeprefix("Value error, ")
    given = "" if entry["type"] == "value_error" else f" (given: {_short(repr(entry['input']))})"
    return f"{key}: {message}{given}" if key else message


def _telling(errors: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Without "is no list" and the like where another part of a union has more to say of the same entry."""
    kinds = ("tuple_type", "model_type", "literal_error")
    told = [_place(entry) for entry in errors if entry["type"] not in kinds]
    return [
        entry for entry in errors if entry["type"] not in kinds or not any(_says_more(place, entry) for place in told)
    ]


def _says_more(place: Location, entry: Mapping[str, Any]) -> bool:
    """Whether an error at a place makes an entry superfluous; a wrong word is one only where a part of it is wrong."""
    own = _place(entry)
    return place[: len(own)] == own and (entry["type"] != "literal_error" or place != own)


def _place(entry: Mapping[str, Any]) -> Location:
    """Where a validation error is, without what pydantic calls the parts of a union."""
    unions = ("ShortLong", "Model", "str", "int", "constrained-float")
    return tuple(part for part in entry["loc"] if part not in unions and "[" not in str(part))


def _spelling(location: Location, texts: Sequence[tuple[Location, str]]) -> str | None:
    """Text of a recipe's entry in the last source that set it."""
    for place, text in reversed(texts):
        if location[: len(place)] == place:
            return spelling(text, location[len(place) :])
    return None


def _short(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:60]} ... {text[-30:]}"


def _fields_at(location: Sequence[str]) -> list[str]:
    """Allowed keys of the section at a location of the recipe."""
    section: type[BaseModel] = Recipe
    for part in location:
        field = section.model_fields.get(part)
        if field is None:
            continue
        candidates = [field.annotation, *get_args(field.annotation)]
        for candidate in candidates:
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                section = candidate
    return list(section.model_fields)
