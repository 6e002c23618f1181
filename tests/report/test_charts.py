from __future__ import annotations

import pytest

from acamkd.report.charts import draw


@pytest.mark.parametrize("value", [31.5, 0.5, 0.0, -2.0])
def test_the_axis_around_a_single_value_has_labels_of_their_own(value: float) -> None:
    chart = draw("mIoU", {"baseline": [(8, value)]})
    labels = [tick.label for tick in chart.y_ticks]
    assert len(set(labels)) == len(labels) >= 3
    assert float(labels[0]) <= value <= float(labels[-1])
