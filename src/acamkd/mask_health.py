"""When masks have collapsed: the thresholds. Needs no torch, so that reports and tables can judge without it."""

from __future__ import annotations

CLOSED, OPEN, FLAT = 0.1, 0.9, 0.02
"""Masks have collapsed below or above these means, or below this standard deviation over channels or locations."""

LEARNED = ("spatial", "channel")
"""Kinds of learned masks with values in (0, 1), which may collapse; other masks are fixed, such as FGD's box masks."""

MASK_STATISTICS = {
    "mask": "mean", "mask_std": "std", "mask_entropy": "entropy", "mask_overlap": "overlap",
    "mask_correlation": "correlation", "mask_weight_std": "weight_std",
}  # fmt: skip
"""Name by which a loss records a statistic of its masks, after KIND_ -> what tables call it, in their order."""


def mask_statistic(name: str) -> tuple[str, str] | None:
    """Take a recorded name, `spatial_mask_std`, apart: kind of masks and statistic; None if it tells of no masks."""
    for ending, statistic in MASK_STATISTICS.items():
        if name.endswith(f"_{ending}"):
            return name.removesuffix(f"_{ending}"), statistic
    return None


def collapse(mean: float, spread: float) -> str:
    """Why masks of this mean and standard deviation have collapsed; nothing if they have not."""
    if mean < CLOSED:
        return f"their mean is {mean:.2f}, below {CLOSED}: hardly anything is distilled any more"
    if mean > OPEN:
        return f"their mean is {mean:.2f}, above {OPEN}: everything is distilled alike, as if there were no masks"
    if spread < FLAT:
        return f"they vary by {spread:.3f} only, less than {FLAT}: they choose nothing"
    return ""
