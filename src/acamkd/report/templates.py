"""Templates of the self-contained HTML pages."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined

from acamkd.engine.evidence import signed
from acamkd.report.units import digits, duration, percent, with_prefix


def environment() -> Environment:
    """Environment of the pages' templates, with their filters."""
    found = Environment(
        loader=PackageLoader("acamkd.report", "."), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    found.filters["signed"] = signed
    found.filters["digits"] = digits
    found.filters["duration"] = duration
    found.filters["percent"] = percent
    found.filters["si"] = with_prefix
    return found
