"""Figures as the pages write them. Needs no torch."""

from __future__ import annotations


def percent(score: float | None) -> str:
    """A score to the hundredth of a percent; a dash where it is undefined."""
    return "\N{EN DASH}" if score is None else f"{score:.2f} %"


def duration(seconds: float) -> str:
    """Hours, minutes or seconds, at least two of them."""
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.{0 if seconds >= 10 * size else 1}f} {unit}"
    return f"{seconds:.0f} second{'' if round(seconds) == 1 else 's'}"


def digits(value: float) -> str:
    """Three digits without an exponent, and thousands set apart."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def with_prefix(count: float) -> str:
    """A number with three digits and an SI prefix: 1.23 M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.3g}"
