"""Recipes from and to YAML, with overrides, and errors that name the key. Imports no torch."""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from acamkd.config.schema import Loss, Recipe
from acamkd.config.yaml_text import Location, quoted, read_yaml, spelling, write_yaml
from acamkd.errors import AcamkdError, nearest

log = logging.getLogger(__name__)


def read_text(path: Path, what: str) -> str:
    """Read a text file of the user's; an AcamkdError calls it `what`."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise AcamkdError(f"cannot read the {what} {path}: {getattr(error, 'strerror', None) or error}") from error


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        path: YAML file.
        overrides: `key=value` assignments, such as `losses.0.weight=2`; values are YAML. Another `losses.N.name`
            also drops the options of the method that stood there, since they are not the new one's.

    Raises:
        AcamkdError: The file cannot be read, or does not fit; the message names every bad key.
    """
    text = read_text(path, "recipe")
    raw = read_yaml(text, str(path))
    if not isinstance(raw, dict):
        raise AcamkdError(f"{path} must hold a mapping with the keys {', '.join(Recipe.model_fields)}")
    raw.setdefault("name", path.stem)
    return parse(raw, str(path), [((), text), *(_assign(raw, assignment) for assignment in overrides)])


def as_recipe(recipe: Recipe | Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe, given as such or by its file, with some keys overridden; raises AcamkdError as `load` does."""
    if isinstance(recipe, Recipe):
        return override(recipe, overrides) if overrides else recipe
    return load(Path(recipe).expanduser(), overrides)


def parse(raw: Mapping[str, Any], source: str = "recipe", texts: Sequence[tuple[Location, str]] = ()) -> Recipe:
    """Validate a mapping as a recipe; raises AcamkdError that names every bad key.

    Args:
        raw: The mapping.
        source: Where it is from.
        texts: The YAML that it was read from, each with its place in the recipe, so that an error can quote it.
    """
    try:
        # JSON mode is strict about types and still takes lists for tuples and strings for paths.
        return Recipe.model_validate_json(json.dumps(raw), strict=True)
    except ValidationError as error:
        lines = dict.fromkeys(_explain(entry, texts) for entry in error.errors())  # parts of a union say the same
        raise AcamkdError("\n  ".join([f"{source} does not fit:", *lines])) from error


def override(recipe: Recipe, assignments: Sequence[str]) -> Recipe:
    """A recipe with some keys changed, as `load` takes them; raises AcamkdError that names every bad key."""
    raw = recipe.model_dump(mode="json")
    texts = [_assign(raw, assignment) for assignment in assignments]
    return parse(raw, f"the recipe {recipe.name} with {', '.join(map(_short, assignments))}", texts)


def dump(recipe: Recipe) -> str:
    """Write a recipe as YAML, every default spelled out; `load` reads it back to an equal recipe."""
    return write_yaml(recipe.model_dump(mode="json"))


def imported(reference: str, key: str) -> Any:
    """What `package.module:name` stands for; the log says what is imported.

    Raises:
        AcamkdError: There is no such thing; the recipe's `key` is named.
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
    """Carry out one `key=value` in the raw mapping; returns the place and the text of the value."""
    key, separator, text = assignment.partition("=")
    if not separator or not key:
        raise AcamkdError(f"--set {assignment}: write key=value, such as train.epochs=20")
    value = read_yaml(text, f"--set {_short(assignment)}: the value")
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
    """The entry of a list, or of a mapping (where it is made if need be), on the way to `key`."""
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
    # Without what pydantic calls the parts of a union.
    place = tuple(part for part in entry["loc"] if part not in ("ShortLong", "Model", "str") and "[" not in str(part))
    location = [str(part) for part in place]
    key = ".".join(location)
    if entry["type"] == "extra_forbidden":
        return f"{key}: unknown key; {nearest(location[-1], _fields_at(location[:-1]))}"
    if entry["type"] == "missing":
        return f"{key}: missing"
    if entry["type"] in ("string_type", "path_type") and isinstance(entry["input"], (bool, int, float)):
        found = _spelling(place, texts) or json.dumps(entry["input"])
        read = json.dumps(entry["input"])
        as_what = "" if read == found else f" as {read}"
        return f"{key}: {found} is read{as_what}, and text is needed: write it in quotes, {quoted(found)}"
    message = entry["msg"].removeprefix("Value error, ")
    given = "" if entry["type"] == "value_error" else f" (given: {_short(repr(entry['input']))})"
    return f"{key}: {message}{given}" if key else message


def _spelling(location: Location, texts: Sequence[tuple[Location, str]]) -> str | None:
    """How an entry of the recipe was written by the last text that gave it."""
    for place, text in reversed(texts):
        if location[: len(place)] == place:
            return spelling(text, location[len(place) :])
    return None


def _short(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:60]} ... {text[-30:]}"


def _fields_at(location: Sequence[str]) -> list[str]:
    """Legal keys of the section at a location of the recipe."""
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
