from __future__ import annotations

from acamkd.mask_health import collapse


def test_a_collapse_is_low_high_or_flat() -> None:
    assert collapse(0.05, 0.1) == "their mean is 0.05, below 0.1: hardly anything is distilled any more"
    assert collapse(0.95, 0.1).startswith("their mean is 0.95, above 0.9: everything is distilled alike")
    assert collapse(0.5, 0.1) == ""
    assert collapse(0.5, 0.01) == "they vary by 0.010 only, less than 0.02: they choose nothing"
