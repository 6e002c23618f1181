from __future__ import annotations

import math

import pytest
import torch

from acamkd.losses.cwd import CWD
from tiny_maps import vanishing_terms


def test_value_by_hand() -> None:
    student = torch.zeros(1, 1, 1, 2)  # phi = (1/2, 1/2)
    teacher = torch.tensor([math.log(3.0), 0.0]).view(1, 1, 1, 2)  # phi = (3/4, 1/4)
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert CWD(1, 1, weight=2.0)(student, teacher)["channel"].item() == pytest.approx(2 * kl)
    mse = CWD(1, 1, weight=2.0, divergence="mse")(student, teacher)["channel"]
    assert mse.item() == pytest.approx(2 * 2 * 0.25**2)


def test_temperature_squared_keeps_the_size_of_the_loss() -> None:
    student, teacher = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    base = CWD(3, 3)(student, teacher)["channel"]
    hot = CWD(3, 3, temperature=4.0)(4 * student, 4 * teacher)["channel"]
    torch.testing.assert_close(hot, 16 * base)


@pytest.mark.parametrize("normalization", ["channel", "spatial"])
@pytest.mark.parametrize("divergence", ["kl", "mse"])
def test_zero_where_the_distributions_agree(normalization: str, divergence: str) -> None:
    teacher = torch.randn(2, 3, 4, 5)
    cwd = CWD(3, 3, normalization=normalization, divergence=divergence)  # type: ignore[arg-type]
    # A softmax does not see an offset that all its entries share.
    offset = torch.randn(2, 3, 1, 1) if normalization == "channel" else torch.randn(2, 1, 4, 5)
    assert cwd(teacher + offset, teacher)[normalization].item() == pytest.approx(0, abs=1e-5)
    assert cwd(torch.randn(2, 3, 4, 5), teacher)[normalization] > 0.01


def test_spatial_softmax_is_the_channel_one_of_the_transposed_map() -> None:
    student, teacher = torch.randn(2, 3, 1, 5), torch.randn(2, 3, 1, 5)
    spatial = CWD(3, 3, normalization="spatial")(student, teacher)["spatial"]
    channel = CWD(5, 5)(student.transpose(1, 3), teacher.transpose(1, 3))["channel"]
    torch.testing.assert_close(spatial, channel)


def test_presets_are_finite_and_scale_with_their_weights() -> None:
    student, teacher = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4)
    for preset in CWD.PRESETS.values():
        assert CWD(3, 5, **preset)(student, teacher)["channel"].isfinite()
    assert CWD.PRESETS["segmentation_logits"] == {"weight": 3.0, "temperature": 4.0}
    assert CWD(3, 3).weight == CWD.PRESETS["detection"]["weight"] == 5.0


def test_unknown_options() -> None:
    with pytest.raises(ValueError, match="'channel', 'spatial', not 'batch'"):
        CWD(2, 2, normalization="batch")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'kl', 'mse', not 'js'"):
        CWD(2, 2, divergence="js")  # type: ignore[arg-type]


def test_equal_feature_maps_cost_nothing() -> None:
    assert vanishing_terms(CWD(8, 8)) == {"channel"}
