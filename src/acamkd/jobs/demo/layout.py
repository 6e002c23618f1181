"""What the demo's processes share: the size of its images, and the names of files and networks. Without torch."""

from __future__ import annotations

SIZE = (96, 96)
"""(height, width) of a scene, in pixels."""

NOTES, SHEET = "metrics.json", "pictures.png"

TITLES = {"teacher": "teacher", "baseline": "baseline", "distilled": "distilled student"}
"""Network in metrics.json -> its name in table and sheet."""
