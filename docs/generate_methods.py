"""Write docs/methods/*.md and DESCRIPTIONS from the methods' docstrings: python docs/generate_methods.py.

A docstring's section `Code:` says which function computes which equation. What is argued at length about a method is
written by hand in methods/notes.yaml, markdown by the method's name.
"""

from __future__ import annotations

import inspect
import json
import logging
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import yaml

from acamkd.distillation.methods import METHODS, describe

HERE = Path(__file__).parent
GOLDEN = HERE.parent / "tests/golden/golden.json"
SOURCE = "../../src/acamkd/losses"
DESCRIPTIONS = HERE.parent / "src/acamkd/cli/methods.json"
"""What `acamkd methods` prints, so that it need not load torch."""

DEVIATIONS = ("Deviations", "The official")
"""How the paragraphs begin that say where a method differs from its paper or its official code."""


def pages() -> dict[str, str]:
    """Every page by file name."""
    logging.getLogger("acamkd").setLevel(logging.ERROR)  # describing builds losses without their tokens
    notes: dict[str, str] = yaml.safe_load((HERE / "methods/notes.yaml").read_text(encoding="utf-8"))
    cases = Counter(case["method"] for case in json.loads(GOLDEN.read_text(encoding="utf-8"))["cases"])
    descriptions = [describe(name) for name in METHODS]
    rendered = {
        f"{each['name']}.md": _page(each, notes.get(each["name"], ""), cases[METHODS[each["name"]].__name__])
        for each in descriptions
    }
    return {"index.md": _index(descriptions, cases.total() - cases["DiffKD"]), **rendered}


def _index(descriptions: Iterable[dict[str, Any]], cases: int) -> str:
    rows = []
    for each in descriptions:
        method = f"[{METHODS[each['name']].__name__}]({each['name']}.md)"
        needs, terms = ", ".join(each["needs"]), ", ".join(each["terms"]).replace("_", " ")
        rows.append([method, f"{each['authors']}, {each['venue']}", needs, f"{each['parameters']:,}", terms])
    header = ["method", "paper", "needs", "parameters", "terms"]
    return "\n".join(
        [
            "# Methods",
            "",
            "Any of them is one word of a recipe: `--set losses.0.name=NAME`. [Which one?]"
            "(../guides/choose.md#which-method) Several together: [combinations](combinations.md). One more: "
            "[how to add a method](../guides/add-a-method.md).",
            "",
            *_table(header, rows),
            "",
            "Needs: what a `Distiller` hands over, and a loop of your own in a `DistillationContext`. "
            "Parameters: learnable ones of one level at 256 channels on both sides; none of them stays in the student. "
            "Each page has the options and presets. "
            f"{cases} values and gradients of official code are what ours are held against, at 1e-9 in float64.",
            "",
        ]
    )


def _page(description: dict[str, Any], notes: str, cases: int) -> str:
    method = METHODS[description["name"]]
    text, sections = _sections(inspect.getdoc(method) or "")
    first, _, *paragraphs = _paragraphs(text)
    deviating = [index for index, each in enumerate(paragraphs) if each.startswith(DEVIATIONS)]
    # A list or a block of equations belongs to the paragraph that announces it.
    deviating += [index + 1 for index in deviating if paragraphs[index].endswith(":")]
    options = [[_code(o["name"]), _text(o["type"]), _code(_yaml(o["default"])), _text(o["help"])]
               for o in description["options"]]  # fmt: skip
    code = f"; official code: <{description['code']}>" if description["code"] else "; no official code is public"
    lines = [f"# {method.__name__}", "", _text(first), ""]
    lines += [f"Paper: {_text(description['paper'])}, <{description['link']}>{code}.", "", "## Method", ""]
    for index, paragraph in enumerate(paragraphs):
        if index not in deviating:
            lines += [*_block(paragraph), ""]
    if notes:
        lines += [notes.rstrip(), ""]
    lines += ["## Example", "", "```python", *_unprompted(sections["Example"]), "```", ""]
    lines += ["## Where it stands in the code", "", *_table(["equation", "code"], anchors(method)), ""]
    lines += ["## Options", "", *_table(["option", "type", "default", "meaning"], options), ""]
    if description["presets"]:
        presets = [[_code(name), _code(_yaml(values))] for name, values in description["presets"].items()]
        lines += ["Presets (`preset: NAME`):", "", *_table(["preset", "options"], presets), ""]
    if deviating:
        lines += ["## Declared deviations", ""]
        for index in deviating:
            lines += [*_block(paragraphs[index]), ""]
    agreement = (
        f"{cases} golden cases of official code agree in value and gradient (float64)."
        if cases
        else "No official code was run. Own tests check the formulas."
    )
    return "\n".join([*lines, "## Agreement with official code", "", agreement, ""])


def _sections(docstring: str) -> tuple[str, dict[str, list[str]]]:
    """The running text of a docstring, and the lines of its sections by title."""
    text, *rest = re.split(r"^(Code|Example|Args):\n", docstring, flags=re.MULTILINE)
    bodies = (textwrap.dedent(body).strip().splitlines() for body in rest[1::2])
    return text, dict(zip(rest[0::2], bodies, strict=True))


def _unprompted(lines: Iterable[str]) -> list[str]:
    """Code without the prompts of a session; what it printed is a comment."""
    return [line.removeprefix(">>> ") if line.startswith(">>> ") else f"# {line}" for line in lines]


def anchors(method: type) -> list[list[str]]:
    """Rows of a method's section `Code:`, each an equation and a link to the function that computes it.

    Raises:
        AttributeError: The function is neither in the method's module nor imported there.
    """
    rows = []
    for line in _sections(inspect.getdoc(method) or "")[1]["Code"]:
        equation, _, name = line.removeprefix("- ").rpartition(": ")
        function = attrgetter(name)(inspect.getmodule(method))
        file = inspect.getmodule(function).__name__.removeprefix("acamkd.losses.").replace(".", "/")  # type: ignore[union-attr]
        rows.append([_code(equation), f"[`{name}`]({SOURCE}/{file}.py)"])
    return rows


def _paragraphs(text: str) -> list[str]:
    """Split at blank lines, and where an indented block follows its announcement without one."""
    text = re.sub(r":\n(?= {4})", ":\n\n", text)
    return [paragraph.rstrip() for paragraph in text.split("\n\n") if paragraph.strip()]


def _block(paragraph: str) -> list[str]:
    """Indented lists become lists; equations and other indented blocks keep their lines; the rest is running text."""
    body = textwrap.dedent(paragraph)
    if paragraph.startswith(" ") and body.startswith("- "):
        return [_text(body)]
    lines = body.splitlines()
    if paragraph.startswith(" ") or any(map(_is_equation, lines)):
        return ["```text", *lines, "```"]
    return [_text(body)]


def _is_equation(line: str) -> bool:
    """Whether a line defines a symbol, `M_t(p) = ...`, rather than telling something, `beta = gamma = 1 are ...`."""
    symbol, _, rest = line.partition(" = ")
    return bool(rest) and (len(symbol) == 1 or not symbol.replace(" ", "").isalpha()) and len(symbol.split()) < 4


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]


def _code(text: str) -> str:
    return "`" + text.replace("|", "\\|") + "`"


def _text(text: str) -> str:
    """Running text that markdown leaves alone."""
    return text.replace("<", "&lt;").replace("*", "\\*").replace("|", "\\|")


def _yaml(value: Any) -> str:
    """A value as one writes it in a recipe."""
    return (
        value
        if isinstance(value, str)
        else yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1000).removesuffix("\n...\n").strip()
    )


def descriptions() -> str:
    """The content of DESCRIPTIONS."""
    logging.getLogger("acamkd").setLevel(logging.ERROR)
    lines = [f"{json.dumps(name)}: {json.dumps(describe(name))}" for name in METHODS]
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    for file, content in pages().items():
        (HERE / "methods" / file).write_text(content, encoding="utf-8")
    DESCRIPTIONS.write_text(descriptions(), encoding="utf-8")
