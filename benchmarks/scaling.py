"""How ACAM's cost grows with the image: time of the loss, forward and backward, at four sizes, and the exponent.

    python benchmarks/scaling.py [--quick]

The maps are those of a pyramid of strides 8 to 128 with 256 channels; the exponent is the slope of a straight line
through log time over log pixels.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from loss_cost import measure, pyramid
from matplotlib.figure import Figure
from measuring import in_own_process, interleaved, medians, quick, save

from acamkd.losses import ACAM, FitNet

SIZES = ((400, 672), (560, 944), (800, 1344), (1120, 1888))
ROUNDS = 2
BUILDS = {
    "acam, exact": partial(ACAM, 256, 256, masks="both", mask_grad="joint", imitation="squared"),
    "acam, auto": partial(ACAM, 256, 256, masks="both", mask_grad="joint", imitation="squared", kv_stride="auto"),
    "fitnet": partial(FitNet, 256, 256),
}


def main() -> None:
    """Measure, print and plot."""
    is_quick = quick(__doc__)
    sizes = ((64, 96), (96, 128), (128, 192), (160, 256)) if is_quick else SIZES
    calls = {
        f"{name} {height} x {width}": partial(in_own_process, measure, build, 256, pyramid(height, width))
        for height, width in sizes
        for name, build in BUILDS.items()
    }
    *_, costs = interleaved(calls, 1 if is_quick else ROUNDS)
    pixels = [height * width for height, width in sizes]
    figure = Figure(figsize=(5, 4))
    axes = figure.subplots()
    rows = {}
    for name in BUILDS:
        times = [medians(costs[f"{name} {height} x {width}"]).cpu_seconds for height, width in sizes]
        exponent = float(np.polyfit(np.log(pixels), np.log(times), 1)[0])
        rows[name] = {"pixels": pixels, "cpu_seconds": times, "exponent": exponent}
        axes.loglog(pixels, times, "o-", label=f"{name}: exponent {exponent:.2f}")
        print(f"{name}: exponent {exponent:.2f}")
    axes.set(xlabel="pixels of the image", ylabel="processor seconds, forward and backward")
    axes.legend()
    save("scaling", {"rows": rows}, figure, quick=is_quick)


if __name__ == "__main__":
    main()
