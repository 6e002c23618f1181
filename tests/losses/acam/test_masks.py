"""The masks: what a feature map is under them, and the units that make them."""

from __future__ import annotations

import pytest
import torch

from acamkd.losses.acam.masks import ASCM, Masks, apply_masks, mask_overlap
from acamkd.losses.functional import dice_overlap


def test_a_feature_map_under_its_masks_is_their_mean_times_itself() -> None:
    x, channel, spatial = torch.randn(2, 3, 4, 5), torch.rand(2, 6, 3), torch.rand(2, 6, 4, 5)
    by_channel, by_position = channel[..., None, None] * x.unsqueeze(1), spatial.unsqueeze(2) * x.unsqueeze(1)
    torch.testing.assert_close(apply_masks(Masks(channel, None), x), by_channel.mean(dim=1))
    torch.testing.assert_close(apply_masks(Masks(None, spatial), x), by_position.mean(dim=1))
    both = (spatial.unsqueeze(2) * by_channel).mean(dim=1)
    torch.testing.assert_close(apply_masks(Masks(channel, spatial), x), both)
    expected = dice_overlap(channel, "literal") + dice_overlap(spatial.flatten(2), "literal")
    torch.testing.assert_close(mask_overlap(Masks(channel, spatial), "literal"), expected)


@pytest.mark.parametrize("kinds", [("channel", "spatial"), ("channel",), ("spatial",)])
def test_the_token_stage_masks_the_map_and_measures_the_overlap(kinds: tuple[str, ...]) -> None:
    units, x = ASCM(3, 4, kinds), torch.randn(2, 3, 5, 4)
    rebuilt, measured = units.masked(x)
    masks = units(x)
    torch.testing.assert_close(rebuilt, apply_masks(masks, x))
    torch.testing.assert_close(measured, mask_overlap(masks))
    (rebuilt.sum() + measured).backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in units.parameters())
