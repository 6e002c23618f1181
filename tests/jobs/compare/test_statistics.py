from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from scipy import stats

from acamkd.jobs.compare.statistics import Row, holm, on_test, paired, summarize
from acamkd.jobs.compare.tables import markdown


def trial(method: str, seed: int, score: float, losses: tuple[str, ...] = (), **more: Any) -> dict[str, Any]:
    return {
        "method": method, "seed": seed, "setting": None, "history": [1.0, score], "metric": "mIoU",
        "losses": [{"name": name} for name in losses], "wall_time": 60.0 + seed, "masks": {},
        "final": {"mIoU": score, "IoU/sky": score / 2},
        "teacher": {"sha256": "ab" * 32, "mIoU": 50.0} if losses else None,
        **more,
    }  # fmt: skip


def table(scores: Mapping[str, list[float]], losses: Mapping[str, tuple[str, ...]]) -> dict[str, Row]:
    trials = [
        trial(method, seed, score, losses.get(method, (method,) if method != "none" else ()))
        for method, values in scores.items()
        for seed, score in enumerate(values)
    ]
    return {row.method: row for row in summarize(trials)}


def test_a_paired_difference_uses_the_seeds_that_both_have() -> None:
    found = paired({0: 41.0, 1: 42.0, 2: 44.0, 7: 99.0}, {0: 40.0, 1: 40.0, 2: 41.0, 5: 0.0}, "none")
    assert found.n == 3
    assert found.mean == pytest.approx(2)
    test = stats.ttest_rel([41, 42, 44], [40, 40, 41])
    assert (found.p, found.low, found.high) == pytest.approx((test.pvalue, *test.confidence_interval()))


def test_few_or_equal_differences_have_no_interval_to_speak_of() -> None:
    one = paired({0: 3.0}, {0: 1.0}, "none")
    assert (one.mean, one.low, one.p, one.n) == (2.0, None, None, 1)
    two = paired({0: 3.0, 1: 5.0}, {0: 1.0, 1: 2.0}, "none")
    assert (two.mean, two.low, two.p) == (2.5, None, pytest.approx(stats.ttest_1samp([2, 3], 0).pvalue))
    same = paired({0: 3.0, 1: 5.0, 2: 4.0}, {0: 1.0, 1: 3.0, 2: 2.0}, "none")
    assert (same.mean, same.low, same.high, same.p) == (2.0, 2.0, 2.0, 0.0)
    assert paired({0: 1.0, 1: 1.0}, {0: 1.0, 1: 1.0}, "none").p == 1.0


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_test_images_have_a_table_of_their_own() -> None:
    trials = [
        trial(method, seed, 50.0, losses, test={"mIoU": 30.0 + gain + seed}, test_of_best_epoch=31.0 + seed)
        for method, losses, gain in (("none", (), 0.0), ("acam", ("acam",), 2.0))
        for seed in range(2)
    ]
    last, best = ({row.method: row for row in summarize(on_test(trials, best_epoch=x))} for x in (False, True))
    assert (last["none"].mean, last["acam"].mean, best["acam"].mean) == (30.5, 32.5, 31.5)
    assert last["acam"].gain is not None
    assert (last["acam"].gain.mean, last["acam"].gain.n) == (2.0, 2)
    assert "| `acam` | 2 | 32.50 ± 0.71 | +2.00 |" in markdown(summarize(trials), trials)
    untested = [trial("none", 0, 50.0), trial("acam", 0, 51.0, ("acam",), test={}, test_of_best_epoch=None)]
    assert on_test(untested) == []
    assert "## Test images" not in markdown(summarize(untested), untested)


def test_verdicts() -> None:
    alone = [40.0, 41.0, 39.5, 40.5, 40.2]
    rows = table(
        {
            "none": alone,
            "good": [score + gain for score, gain in zip(alone, (2, 2.1, 1.9, 2.2, 2), strict=True)],
            "bad": [score - loss for score, loss in zip(alone, (2, 2.1, 1.9, 2.2, 2), strict=True)],
            "same": [score + gain for score, gain in zip(alone, (1, -1, 0.5, -0.5, 0.1), strict=True)],
            "young": [44.0, 45.0],
        },
        {},
    )
    assert {name: row.verdict for name, row in rows.items()} == {
        "none": None, "good": "gain", "bad": "harm", "same": "no evidence", "young": "too few seeds",
    }  # fmt: skip
    assert list(rows) == ["young", "good", "same", "none", "bad"]  # by the mean
    assert rows["good"].std == pytest.approx(np.std([42, 43.1, 41.4, 42.7, 42.2], ddof=1))
    assert rows["good"].p_corrected is not None
    assert rows["good"].gain is not None
    assert rows["good"].gain.p is not None
    assert rows["good"].p_corrected == pytest.approx(min(1, 3 * rows["good"].gain.p), rel=0.7)
    assert (rows["good"].p_text, rows["none"].p_text) == ("<0.001", "")
    assert rows["same"].p_text == f"{rows['same'].p_corrected:.3f}"
    assert rows["none"].minutes == pytest.approx(62 / 60)


def test_the_correction_can_take_a_verdict_back() -> None:
    alone = [40.0, 41.0, 39.5, 40.5]
    gains = (0.2, 1.4, 0.9, 1.1)
    scores = {"none": alone, "good": [score + gain for score, gain in zip(alone, gains, strict=True)]}
    assert table(scores, {})["good"].verdict == "gain"
    noise = {f"other{i}": [score + (-1) ** (seed + i) for seed, score in enumerate(alone)] for i in range(3)}
    assert table(scores | noise, {})["good"].verdict == "no evidence"


def test_the_best_competing_method_is_of_another_class() -> None:
    rows = table(
        {"none": [1.0, 1.0], "acam": [5.0, 6.0], "acam-uniform": [7.0, 7.0], "cwd": [4.0, 4.0], "pkd": [3.0, 3.0]},
        {"acam-uniform": ("acam",)},
    )
    assert rows["acam"].over_best_other is not None
    assert (rows["acam"].over_best_other.other, rows["acam"].over_best_other.mean) == ("cwd", 1.5)
    assert rows["cwd"].over_best_other is not None
    assert rows["cwd"].over_best_other.other == "acam-uniform"
    assert rows["none"].over_best_other is None
    of_my_own = {"acam": [5.0, 6.0], "acam-mine": [7.0, 7.0], "cwd": [4.0, 4.0]}
    best_other = table(of_my_own, {"acam-mine": ("package.module:Mine",)})["acam"].over_best_other
    assert best_other is not None
    assert best_other.other == "cwd"  # a variant by its name


def test_a_competing_method_of_a_single_seed_is_the_best_only_where_all_are() -> None:
    scores = {"none": [1.0, 1.0, 1.0], "acam": [5.0, 6.0, 6.0], "cwd": [4.0, 4.0, 4.0], "pkd": [9.0]}
    best_other = table(scores, {})["acam"].over_best_other
    assert best_other is not None
    assert best_other.other == "cwd"
    best_other = table({name: values[:1] for name, values in scores.items()}, {})["acam"].over_best_other
    assert best_other is not None
    assert best_other.other == "pkd"


def test_methods_without_a_common_seed_are_not_compared() -> None:
    trials = [trial("none", 0, 1.0), trial("cwd", 1, 4.0), trial("pkd", 0, 2.0)]
    rows = {row.method: row for row in summarize(trials)}
    assert (rows["cwd"].gain, rows["cwd"].over_best_other, rows["cwd"].verdict) == (None, None, None)
    assert rows["pkd"].over_best_other is None
    assert "nan" not in markdown(summarize(trials), trials)


def test_the_page_shows_what_was_measured() -> None:
    trials = [trial("none", seed, 40.0 + seed) for seed in range(3)]
    trials += [trial("cwd", seed, 42.0 + seed * 1.5, ("cwd",), setting=0.5) for seed in range(3)]
    page = markdown(summarize(trials), trials)
    assert "Teacher: 50.00 (SHA-256 abababababab)" in page
    assert "| `cwd` | 0.5 | 3 | 43.50 ± 1.50 | +2.50 [" in page
    assert "| `none` | - | 3 | 41.00 ± 1.00 | - | - | - | - | 1.0 |" in page
    assert "| IoU/sky | 21.8 | 20.5 |" in page


def test_the_page_shows_how_masks_moved() -> None:
    curve = {"0/acam/spatial_mask": [0.5, 0.4, 0.3], "1/acam/spatial_mask": [0.5, 0.2, 0.1]}
    dead = {"0/acam/spatial_mask_std": [0.1, None, 0.0]}
    trials = [trial("none", 0, 40.0), trial("acam", 0, 42.0, ("acam",), masks=curve | dead)]
    trials.append(trial("acam", 1, 42.0, ("acam",), masks={name: [0.5, 0.3, 0.2] for name in curve}))
    trials.append(trial("acam-b", 1, 41.0, ("acam",), masks={"0/acam/spatial_mask_weight_std": [0.1, 0.2, 0.3]}))
    page = markdown(summarize(trials), trials)
    assert "| method | masks | mean | std | weight std |" in page  # of what no trial has there is no column
    assert "| `acam` | spatial | 0.5, 0.3, 0.2 | 0.1, nan, 0 | - |" in page
    assert "| `acam-b` | spatial | - | - | 0.1, 0.2, 0.3 |" in page
    assert "## Masks" not in markdown(summarize(trials[:1]), trials[:1])
