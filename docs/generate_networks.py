"""Write the table of model types into docs/guides/huggingface.md: python docs/generate_networks.py.

Its rows are those of acamkd.models.hf_kinds, by which tests/models/test_hf.py and
tests/jobs/export/test_hf_export.py are parametrized.
"""

from __future__ import annotations

from pathlib import Path

from acamkd.models.hf_kinds import KINDS, Kind

PAGE = Path(__file__).parent / "guides/huggingface.md"

BEGIN, END = "<!-- begin of the table -->\n", "<!-- end of the table -->"


def page() -> str:
    """The page with its table as it should be."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    lines = ["| task | `arch` | layers to compare | input |", "|---|---|---|---|"]
    lines += [
        f"| {kind.task} | `hf/{name}` | {', '.join(f'`{layer}`' for layer in kind.layers)} | {_input(kind)} |"
        for name, kind in KINDS.items()
    ]
    return f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n\n{END}{after}"


def _input(kind: Kind) -> str:
    return "one size" if kind.is_fixed else "padding is masked" if kind.is_masked else ""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
