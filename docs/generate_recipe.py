"""Write docs/reference/recipe.md, every key of a recipe, from acamkd.config: python docs/generate_recipe.py."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from acamkd.config import Recipe
from acamkd.config.yaml_text import read_yaml

PAGE = Path(__file__).parent / "reference/recipe.md"

INTRODUCTION = """# Every key of a recipe

A recipe is a YAML file; an unknown key or a value that does not fit is an error that names it. On the command line
`--set KEY=VALUE` overrides any of them: `--set train.epochs=24`, `--set losses.0.weight=3`, and a Python program calls
`acamkd.config.override`. `null` is YAML for nothing. The folder `recipes` has some to start from.

A recipe can name Python code (`package.module:NAME`), which acamkd imports and calls. So take recipes and run folders
of others as you would take a script.
"""

Schema: TypeAlias = Mapping[str, Any]

WORDS = {
    "integer": "whole number", "number": "number", "boolean": "true or false", "string": "text", "object": "mapping",
}  # fmt: skip


def page() -> str:
    """The whole page."""
    schema = Recipe.model_json_schema()
    lines = [INTRODUCTION.rstrip()]
    for where, section in _sections(schema, schema["$defs"]):
        lines += ["", f"## {where or 'At the top'}", "", " ".join(section["description"].split()), ""]
        lines += ["| key | takes | default | |", "|---|---|---|---|"]
        for key, value in section["properties"].items():
            default = "needed" if key in section.get("required", ()) else _default(value, schema["$defs"])
            text = re.sub(r"docs/(\w+/(\w+)\.md)", r"[\2](../\1)", " ".join(value.get("description", "").split()))
            cells = (cell.replace("|", "\\|") for cell in (f"`{key}`", _takes(value), default, text))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _sections(recipe: Schema, named: Schema) -> Iterator[tuple[str, Schema]]:
    """Each section once, by where it is met first, in the order of the keys."""
    met: dict[str, list[str]] = {}

    def walk(where: str, section: Schema) -> None:
        for key, value in section["properties"].items():
            for name, index in _references(value):
                place = f"{where}{key}{index}"
                is_new = name not in met
                met.setdefault(name, []).append(place)
                if is_new:
                    walk(f"{place}.", named[name])

    walk("", recipe)
    yield "", recipe
    for name, places in met.items():
        yield ", ".join(f"`{place}`" for place in places), named[name]


def _references(value: Schema) -> list[tuple[str, str]]:
    """Sections that a key may hold, and `.N` where it holds several."""
    if "$ref" in value:
        return [(value["$ref"].rpartition("/")[2], "")]
    if "items" in value:
        return [(name, ".N") for name, _ in _references(value["items"])]
    return [found for option in value.get("anyOf", ()) for found in _references(option)]


def _default(value: Schema, named: Schema) -> str:
    """Of a section, what its keys do not say themselves."""
    default = value.get("default")
    if "$ref" in value and isinstance(default, dict):
        own = named[value["$ref"].rpartition("/")[2]]["properties"]
        changed = {key: given for key, given in default.items() if given != own[key].get("default")}
        return _code(changed) if changed else ""
    return _code(default)


def _takes(value: Schema) -> str:
    if "$ref" in value:
        return "a section"
    if "anyOf" in value:
        return " or ".join(dict.fromkeys(_takes(option) for option in value["anyOf"]))
    if "const" in value or "enum" in value:
        return ", ".join(_code(choice) for choice in value.get("enum", [value.get("const")]))
    if "prefixItems" in value:
        return f"[{', '.join(_takes(item) for item in value['prefixItems'])}]"
    if value.get("type") == "array":
        least = f", at least {value['minItems']}" if "minItems" in value else ""
        return f"list: {_takes(value['items'])}{least}"
    if value.get("type") == "null":
        return "`null`"
    if value.get("format") == "path":
        return "path"
    bounds = [
        f"{words} {value[bound]:g}"
        for bound, words in (("exclusiveMinimum", "above"), ("minimum", "from"), ("maximum", "to"))
        if bound in value
    ]
    return " ".join([WORDS[value["type"]] if "type" in value else "anything", *bounds])


def _code(value: Any) -> str:
    """As YAML takes it: text only needs quotes where it would be something else without."""
    is_text = isinstance(value, str) and isinstance(read_yaml(value, "default"), str)
    return f"`{value}`" if is_text else f"`{json.dumps(value)}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
