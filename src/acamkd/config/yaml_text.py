"""YAML of recipes: a reader, and a writer whose output it reads back. Imports no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, TypeAlias

import yaml

from acamkd.errors import AcamkdError

Location: TypeAlias = tuple[str | int, ...]
"""Keys and list indices that lead to an entry."""

LONGEST = 1024
"""Bits of a whole number; a float holds none that is larger."""

_FLOAT = ("tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+0123456789."))


_TEXT, _WHOLE, _MERGE, _VALUE = (f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "merge", "value"))


class Loader(yaml.SafeLoader):
    """SafeLoader that also reads 1e-3 as a number, as YAML 1.2 and every user do, and refuses a key given twice.

    A key that is a whole number is text, and so are `=` and `<<` as values.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Read a mapping; raises ComposerError for a repeated key."""
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.tag == _WHOLE:
                key.tag = _TEXT
            if (key.tag, key.value) in seen:
                raise yaml.composer.ComposerError(None, None, f"{key.value} is given a second time", key.start_mark)
            seen.add((key.tag, key.value))
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Read an entry; raises ConstructorError for numbers of thousands of digits and for invalid dates."""
        try:
            return super().construct_object(node, deep)
        except ValueError as error:
            reason = "the number has too many digits" if node.tag == _WHOLE else str(error)
            raise yaml.constructor.ConstructorError(None, None, reason, node.start_mark) from error


class Dumper(yaml.SafeDumper):
    """SafeDumper that quotes the text `1e-3`, which `Loader` would read as a number, and escapes rare line breaks."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        """Write a text; in single quotes, PyYAML would indent after these line breaks."""
        style = '"' if set(data) & set("\x85\u2028\u2029") else None
        return self.represent_scalar(_TEXT, data, style=style)


Dumper.add_representer(str, Dumper.represent_str)
Loader.add_implicit_resolver(*_FLOAT)
for tag in (_MERGE, _VALUE):
    Loader.add_constructor(tag, Loader.construct_yaml_str)  # type: ignore[type-var]
Dumper.add_implicit_resolver(*_FLOAT)


def read_yaml(text: str, what: str) -> Any:
    """Read YAML into mappings with text as keys, lists and plain values.

    Args:
        text: The YAML.
        what: Name of the text in errors.

    Raises:
        AcamkdError: It is not valid YAML, refers to itself, or holds a key or value that JSON lacks.
    """
    try:
        content = yaml.load(text, Loader=Loader)
        _check(content, (), [], text, what)
        # A copy: what an anchor stands for several times is one object, and a change of one must leave the others.
        return json.loads(json.dumps(content))
    except yaml.YAMLError as error:
        advice = "; indent with blanks, not with tabs" if r"'\t'" in str(error) else ""
        reason = str(error).replace('in "<unicode string>", ', "in ")
        raise AcamkdError(f"{what} is not valid YAML: {reason}{advice}") from error
    except RecursionError as error:
        raise AcamkdError(f"{what} is nested too deeply") from error


def write_yaml(content: Any, *, flow: bool | None = False) -> str:
    """Write YAML that `read_yaml` reads back unchanged; `flow` is PyYAML's `default_flow_style`."""
    return yaml.dump(content, Dumper=Dumper, sort_keys=False, allow_unicode=True, default_flow_style=flow)


def spelling(text: str, location: Location) -> str | None:
    """Spelling of a plain entry in the YAML, such as `no` for False; None if it is not found."""
    try:
        node = yaml.compose(text, Loader=Loader)
    except yaml.YAMLError:
        return None
    for step in location:
        if isinstance(node, yaml.MappingNode):
            node = next((value for key, value in node.value if key.value == step), None)
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            node = node.value[step]
        else:
            return None
    return node.value if isinstance(node, yaml.ScalarNode) else None


def quoted(found: str) -> str:
    """Quote a value so that YAML reads it as text."""
    return write_yaml([found], flow=True).strip()[1:-1] if "'" in found else f"'{found}'"


def joined(location: Sequence[str | int]) -> str:
    """A location in the form of `--set`."""
    return ".".join(map(str, location))


def _check(content: Any, location: Location, above: list[int], text: str, what: str) -> None:
    """Raise AcamkdError for values that JSON lacks."""
    if isinstance(content, (dict, list)):
        if id(content) in above:
            raise AcamkdError(f"{what}: {joined(location) or 'an anchor'} refers to itself: leave the anchor out")
        above.append(id(content))
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            if isinstance(content, dict) and not isinstance(key, str):
                where = f" in {joined(location)}" if location else ""
                raise AcamkdError(
                    f"{what}: the key {_spelled_key(text, location, key)}{where} is read as {key!r}, and keys are "
                    "text: write it in quotes"
                )
            _check(value, (*location, key), above, text, what)
        above.pop()
    elif isinstance(content, int) and content.bit_length() > LONGEST:
        raise AcamkdError(f"{what}: {joined(location) or 'the number'} is too large")
    elif not (content is None or isinstance(content, (str, bool, int, float))):
        found = spelling(text, location) or str(content)
        raise AcamkdError(
            f"{what}: {joined(location) or found} is read as a {type(content).__name__}; "
            f"write it in quotes if it is meant as text: {quoted(found)}"
        )


def _spelled_key(text: str, location: Location, key: Any) -> str:
    """Spelling of a key that is not text; the key itself if it is not found."""
    node: Any = yaml.compose(text, Loader=Loader)
    for step in location:
        if isinstance(node, yaml.MappingNode):
            node = next((value for name, value in node.value if name.value == step), None)
        else:
            node = node.value[step] if isinstance(node, yaml.SequenceNode) and isinstance(step, int) else None
    names = [name for name, _ in node.value] if isinstance(node, yaml.MappingNode) else []
    return next((name.value for name in names if name.tag != _TEXT), str(key))
