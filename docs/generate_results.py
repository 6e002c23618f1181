"""Write the tables and figures in the pages anew from the cells in benchmarks/results: python docs/generate_results.py.

A page says where: what stands between `<!-- cells: NAME METHOD ... -->` and `<!-- end -->` is of these methods, or of
all where none is named, in benchmarks/results/NAME.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from acamkd.compare import tables
from acamkd.compare.cells import TUNING_SEED
from acamkd.compare.statistics import summarize

HERE = Path(__file__).parent
CELLS = HERE.parent / "benchmarks/results"
BLOCK = re.compile(r"(<!-- cells: (\w+)(.*?) -->\n).*?(<!-- end -->)", re.DOTALL)

Cells: TypeAlias = list[Mapping[str, Any]]


def pages() -> dict[str, str]:
    """Every page with such blocks, by file name."""
    return {page.name: BLOCK.sub(_block(page), text) for page, text in _texts() if BLOCK.search(text)}


def figures() -> Iterator[tuple[Path, Cells]]:
    """Files of the figures, and the cells that they show."""
    for page, text in _texts():
        for _, name, methods, _ in BLOCK.findall(text):
            yield _figure(page, name), _cells(name, methods)


def _texts() -> Iterator[tuple[Path, str]]:
    return ((page, page.read_text(encoding="utf-8")) for page in sorted(HERE.glob("*.md")))


def _cells(name: str, methods: str) -> Cells:
    """The finished cells of a comparison, without those that served the tuning."""
    wanted = methods.split()
    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted((CELLS / name).glob("*-seed*.json"))]
    return [cell for cell in found if cell["seed"] < TUNING_SEED and (not wanted or cell["method"] in wanted)]


def _figure(page: Path, name: str) -> Path:
    return page.with_name(f"{page.stem}-{name}.png")


def _block(page: Path) -> Callable[[re.Match[str]], str]:
    def write(match: re.Match[str]) -> str:
        begin, name, methods, end = match.groups()
        cells = _cells(name, methods)
        text = tables.markdown(summarize(cells), cells).replace("\n## ", "\n### ")
        return f"{begin}\n{text}\n![Differences and curves]({_figure(page, name).name})\n\n{end}"

    return write


def main() -> None:
    """Write pages and figures."""
    for page, text in pages().items():
        (HERE / page).write_text(text, encoding="utf-8")
    for file, cells in figures():
        tables.figure(file, summarize(cells), cells, cells[0]["metric"])


if __name__ == "__main__":
    main()
