"""Mask history for the report page, with verdicts on mask collapse."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from acamkd.mask_health import CLOSED, FLAT, LEARNED, OPEN, collapse
from acamkd.report.charts import Chart, Points, draw


@dataclass(frozen=True)
class Verdict:
    """Verdict on one layer's masks of one kind, at the last snapshot."""

    layer: str
    kind: str
    collapsed: bool
    words: str


def judge(layer: str, kind: str, epochs: Sequence[int], figures: npt.NDArray[Any]) -> Verdict:
    """Judge masks by their statistics (E, 3), mean, standard deviation and overlap, at these epochs."""
    reasons = [collapse(mean, spread) for mean, spread, _ in figures.tolist()]
    if reasons[-1]:
        sound = [index for index, why in enumerate(reasons) if not why]
        since = f"since epoch {epochs[sound[-1] + 1]}" if sound else "from the start"
        return Verdict(layer, kind, True, f"collapsed {since}: {reasons[-1]}")
    mean, spread, overlap = figures[-1]
    words = f"active: mean {mean:.2f}, standard deviation {spread:.3f}, diversity {1 - overlap:.2f}"
    bad = [str(epoch) for epoch, why in zip(epochs, reasons, strict=True) if why]
    return Verdict(layer, kind, False, words + (f"; had collapsed at epoch {', '.join(bad)}" if bad else ""))


@dataclass(frozen=True)
class MaskReplay:
    """Content of a run's replay.npz.

    Attributes:
        data: Data for the page's script: epochs, and per layer and method the feature maps and masks, base64 of uint8.
        images: Indices of the images in the validation set.
        verdicts: Verdicts on all learned masks.
        charts: Mean, variation (standard deviation) and diversity over the epochs.
    """

    data: dict[str, Any]
    images: list[int]
    verdicts: list[Verdict]
    charts: list[Chart]


def load_replay(file: Path) -> MaskReplay:
    """Read the snapshots that the training has recorded."""
    with np.load(file) as stored:
        arrays = {name: stored[name] for name in stored.files}
    epochs = arrays["epoch"].tolist()
    levels: dict[str, dict[str, Any]] = {}
    verdicts: list[Verdict] = []
    curves: dict[str, dict[str, Points]] = {}
    for name, array in arrays.items():
        if name.count("/") != 2:  # epoch, images, figures
            continue
        layer, method, what = name.split("/")
        level = levels.setdefault(f"{layer}/{method}", {"layer": layer, "method": method, "maps": {}, "masks": {}})
        packed: dict[str, Any] = {"shape": array.shape[1:], "bytes": base64.b64encode(array.tobytes()).decode("ascii")}
        if what in ("student", "teacher"):
            level["maps"][what] = packed
            continue
        level["masks"][what] = packed
        if what in LEARNED and math.prod(array.shape[3:]) > 1:  # a single location cannot vary
            figures = arrays[f"{name}/figures"]
            verdicts.append(judge(layer, what, epochs, figures))
            packed["collapsed"] = [bool(collapse(mean, spread)) for mean, spread, _ in figures.tolist()]
            packed["figures"] = figures.round(4).tolist()
            for title, values in (("mean", figures[:, 0]), ("variation", figures[:, 1]),
                                  ("diversity", 1 - figures[:, 2])):  # fmt: skip
                curves.setdefault(f"{what} masks: {title}", {})[layer] = list(zip(epochs, values.tolist(), strict=True))
    data = {"epochs": epochs, "levels": list(levels.values())}
    return MaskReplay(data, arrays["images"].tolist(), verdicts, mask_charts(curves))


def mask_charts(curves: Mapping[str, Mapping[str, Points]]) -> list[Chart]:
    """Charts titled `KIND masks: STATISTIC`, with the same scale on every page; ranges of collapse are shaded."""
    ranges: dict[str, dict[str, Any]] = {
        "mean": {"limits": (0, 1), "bands": ((0, CLOSED), (OPEN, 1))},
        "variation": {"limits": (0, 0.5), "bands": ((0, FLAT),)},  # the largest standard deviation of values in (0, 1)
        "diversity": {"limits": (0, 1)},
    }
    return [draw(title, lines, **ranges[title.rpartition(" ")[2]]) for title, lines in curves.items()]
