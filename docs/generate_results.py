"""Write the tables and figures in the pages anew from the cells in benchmarks/results: python docs/generate_results.py.

A page says where: what stands between `<!-- cells: NAME -->` and `<!-- end -->` is of benchmarks/results/NAME.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from acamkd.compare import tables
from acamkd.compare.cells import TUNING_SEED
from acamkd.compare.statistics import summarize

HERE = Path(__file__).parent
CELLS = HERE.parent / "benchmarks/results"
BLOCK = re.compile(r"(<!-- cells: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def pages() -> dict[str, str]:
    """Every page with such blocks, by file name."""
    texts = {file.name: file.read_text(encoding="utf-8") for file in sorted(HERE.glob("*.md"))}
    return {name: BLOCK.sub(_block, text) for name, text in texts.items() if BLOCK.search(text)}


def cells_of(name: str) -> list[Mapping[str, Any]]:
    """The finished cells of one comparison, without those that served the tuning."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted((CELLS / name).glob("*-seed*.json"))]
    return [cell for cell in found if cell["seed"] < TUNING_SEED]


def _block(match: re.Match[str]) -> str:
    begin, name, end = match.groups()
    cells = cells_of(name)
    text = tables.markdown(summarize(cells), cells).replace("\n## ", "\n### ")
    return f"{begin}\n{text}\n![Differences and curves](results-{name}.png)\n\n{end}"


def main() -> None:
    """Write pages and figures."""
    for name, text in pages().items():
        (HERE / name).write_text(text, encoding="utf-8")
        for _, comparison, _ in BLOCK.findall(text):
            cells = cells_of(comparison)
            tables.figure(HERE / f"results-{comparison}.png", summarize(cells), cells, cells[0]["metric"])


if __name__ == "__main__":
    main()
