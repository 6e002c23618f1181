"""Recipes from and to YAML, with overrides, and errors that name the key. Imports no torch."""

from __future__ import annotations

import importlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from acamkd.config.schema import Loss, Recipe
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
    try:
        raw = yaml.load(read_text(path, "recipe"), Loader=Loader)
    except yaml.YAMLError as error:
        raise AcamkdError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise AcamkdError(f"{path} must hold a mapping with the keys {', '.join(Recipe.model_fields)}")
    raw.setdefault("name", path.stem)
    for assignment in overrides:
        _assign(raw, assignment)
    return parse(raw, source=str(path))


def as_recipe(recipe: Recipe | Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe, given as such or by its file, with some keys overridden; raises AcamkdError as `load` does."""
    if isinstance(recipe, Recipe):
        return override(recipe, overrides) if overrides else recipe
    return load(Path(recipe), overrides)


def parse(raw: Mapping[str, Any], source: str = "recipe") -> Recipe:
    """Validate a mapping as a recipe; raises AcamkdError that names every bad key."""
    try:
        # JSON mode is strict about types and still takes lists for tuples and strings for paths.
        return Recipe.model_validate_json(json.dumps(raw), strict=True)
    except ValidationError as error:
        lines = [_explain(entry) for entry in error.errors()]
        raise AcamkdError("\n  ".join([f"{source} does not fit:", *lines])) from error
    except TypeError as error:  # a YAML date, say
        raise AcamkdError(f"{source}: {error}; write it in quotes if it is meant as text") from error


def override(recipe: Recipe, assignments: Sequence[str]) -> Recipe:
    """A recipe with some keys changed, as `load` takes them; raises AcamkdError that names every bad key."""
    raw = recipe.model_dump(mode="json")
    for assignment in assignments:
        _assign(raw, assignment)
    return parse(raw, source=f"the recipe {recipe.name} with {', '.join(assignments)}")


def dump(recipe: Recipe) -> str:
    """Write a recipe as YAML, every default spelled out; `load` reads it back to an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


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


class Loader(yaml.SafeLoader):
    """SafeLoader that also reads 1e-3 as a number, as YAML 1.2 and every user do, and refuses a key given twice."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Read a mapping; raises ComposerError where a key stands twice."""
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if (key.tag, key.value) in seen:
                raise yaml.composer.ComposerError(None, None, f"{key.value} is given a second time", key.start_mark)
            seen.add((key.tag, key.value))
        return node


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def _assign(raw: dict[str, Any], assignment: str) -> None:
    """Carry out one `key=value` in the raw mapping."""
    key, separator, text = assignment.partition("=")
    if not separator or not key:
        raise AcamkdError(f"--set {assignment}: write key=value, such as train.epochs=20")
    try:
        value = yaml.load(text, Loader=Loader)
    except yaml.YAMLError as error:
        raise AcamkdError(f"--set {assignment}: the value is not valid YAML: {error}") from error
    node: Any = raw
    *parents, last = key.split(".")
    for name in parents:
        node = _child(node, name, key)
    if isinstance(node, list):
        _child(node, last, key)
        node[int(last)] = value
        return
    if not isinstance(node, dict):
        raise AcamkdError(f"--set {key}: {'.'.join(parents)} is a single value and has no key {last}")
    if parents[:1] == ["losses"] and last == "name" and node.get("name") != value:
        for option in set(node) - (set(Loss.model_fields) - {"preset", "weight"}):
            del node[option]
    node[last] = value


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


def _explain(entry: Mapping[str, Any]) -> str:
    """One line for one validation error."""
    location = [str(part) for part in entry["loc"]]
    key = ".".join(part for part in location if part not in ("ShortLong", "Model"))
    if entry["type"] == "extra_forbidden":
        return f"{key}: unknown key; {nearest(location[-1], _fields_at(location[:-1]))}"
    if entry["type"] == "missing":
        return f"{key}: missing"
    message = entry["msg"].removeprefix("Value error, ")
    given = "" if entry["type"] == "value_error" else f" (given: {entry['input']!r})"
    return f"{key}: {message}{given}" if key else message


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
