"""Write docs/methods/*.md from the methods' docstrings and signatures: python docs/generate_methods.py.

The one thing written by hand is equations.yaml beside this file: which function holds which equation.
"""

from __future__ import annotations

import inspect
import json
import logging
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from acamkd.distillation.methods import METHODS, describe

HERE = Path(__file__).parent
GOLDEN = HERE.parent / "tests/golden/golden.json"
SOURCE = "../../src/acamkd/losses"

DEVIATIONS = ("Deviations", "The paper leaves open", "The official")
"""How the paragraphs begin that say where a method differs from its paper or its official code."""


def pages() -> dict[str, str]:
    """Every page by file name."""
    logging.getLogger("acamkd").setLevel(logging.ERROR)  # describing builds losses without their tokens
    tables: dict[str, dict[str, Any]] = yaml.safe_load((HERE / "equations.yaml").read_text(encoding="utf-8"))
    cases = Counter(case["method"] for case in json.loads(GOLDEN.read_text(encoding="utf-8"))["cases"])
    descriptions = [describe(name) for name in METHODS]
    golden = {
        name: tables[name].get("golden")
        or f"{cases[method.__name__]} golden cases of official code agree in value and gradient (float64)."
        for name, method in METHODS.items()
    }
    rendered = {f"{each['name']}.md": _page(each, tables[each["name"]], golden[each["name"]]) for each in descriptions}
    return {"index.md": _index(descriptions, cases), **rendered}


def _index(descriptions: Iterable[dict[str, Any]], cases: Counter[str]) -> str:
    rows = []
    for each in descriptions:
        name, method = each["name"], METHODS[each["name"]].__name__
        rows.append(
            [f"[{method}]({name}.md)", f"{each['authors']}, {each['venue']}", ", ".join(each["terms"]),
             f"{each['parameters']:,}", ", ".join(each["needs"]), ", ".join(each["presets"]), str(cases[method] or "")]
        )  # fmt: skip
    header = ["method", "paper", "terms", "parameters", "needs", "presets", "golden cases"]
    return "\n".join(
        [
            "# Methods",
            "",
            "Any of them is one word of a recipe: `--set losses.0.name=NAME`. Several together: "
            "[combinations](combinations.md). One more: [how to add a method](../guides/add-a-method.md).",
            "",
            *_table(header, rows),
            "",
            "Needs: what a `Distiller` hands over, and a loop of your own in a `DistillationContext`. "
            "Parameters: learnable ones of one level at 256 channels on both sides; none of them stays in the student. "
            f"Golden cases: {cases.total() - cases['DiffKD']} values and gradients of official code that ours are held "
            "against at 1e-9, in float64. One more, DiffKD's, is not run: no method here, as its public code is for "
            "classification only.",
            "",
        ]
    )


def _page(description: dict[str, Any], table: dict[str, Any], golden: str) -> str:
    method = METHODS[description["name"]]
    text = (inspect.getdoc(method) or "").partition("\nArgs:\n")[0]
    first, paper, *paragraphs = _paragraphs(text)
    deviating = [index for index, each in enumerate(paragraphs) if each.startswith(DEVIATIONS)]
    # A list or a block of equations belongs to the paragraph that announces it.
    deviating += [index + 1 for index in deviating if paragraphs[index].endswith(":")]
    anchors = [
        [_code(equation), f"[`{anchor.partition('.')[2]}`]({SOURCE}/{anchor.partition('.')[0]}.py)"]
        for equation, anchor in table["equations"]
    ]
    options = [[_code(o["name"]), _text(o["type"]), _code(_yaml(o["default"])), _text(o["help"])]
               for o in description["options"]]  # fmt: skip
    lines = [f"# {method.__name__}", "", _text(first), "", _text(paper), "", "## Method", ""]
    for index, paragraph in enumerate(paragraphs):
        if index not in deviating:
            lines += [*_block(paragraph), ""]
    lines += ["## Where it stands in the code", "", *_table(["equation", "code"], anchors), ""]
    lines += ["## Options", "", *_table(["option", "type", "default", "meaning"], options), ""]
    if description["presets"]:
        presets = [[_code(name), _code(_yaml(values))] for name, values in description["presets"].items()]
        lines += ["Presets (`preset: NAME`):", "", *_table(["preset", "options"], presets), ""]
    if deviating:
        lines += ["## Declared deviations", ""]
        for index in deviating:
            lines += [*_block(paragraphs[index]), ""]
    lines += ["## Agreement with official code", "", _text(golden), ""]
    return "\n".join(lines)


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


if __name__ == "__main__":
    for file, content in pages().items():
        (HERE / "methods" / file).write_text(content, encoding="utf-8")
