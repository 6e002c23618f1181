"""What tells active masks from collapsed ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from acamkd.errors import AcamkdError
from acamkd.losses.acam.acam import ACAM
from acamkd.losses.acam.statistics import WATCH_EVERY, mask_statistics, mask_weights
from acamkd.losses.base import DistillationContext
from acamkd.losses.functional import masked_error
from tiny_maps import joint, maps


def test_statistics_tell_an_active_mask_from_a_collapsed_one() -> None:
    error = torch.arange(6.0).expand(2, 6)
    rising = torch.stack([error / 5, 1 - error / 5], dim=1)  # (2, 2, 6)
    statistics = mask_statistics(rising, error)
    torch.testing.assert_close(statistics["mask"], torch.tensor(0.5))
    torch.testing.assert_close(statistics["mask_std"], (error[0] / 5).std(correction=0))
    torch.testing.assert_close(statistics["mask_correlation"], torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(mask_statistics(rising[:, :1], error)["mask_correlation"], torch.tensor(1.0))
    torch.testing.assert_close(statistics["mask_overlap"], torch.tensor(20 / 55))  # 2 (1 4 + 2 3) / (1 + 4 + ... + 25)
    halves = torch.tensor([[[1.0, 0, 1, 0], [0, 1, 0, 1]], [[1, 0, 1, 0], [1, 0, 1, 0]]])  # they cancel, and they agree
    for masks, spread in zip(halves, (0.0, 1.0), strict=True):
        weights = mask_statistics(masks[None], error[:1, :4])["mask_weight_std"]
        torch.testing.assert_close(weights, torch.tensor(spread))
    torch.testing.assert_close((mask_weights(rising) * error).sum(dim=1), masked_error(error, rising).mean(dim=1))
    collapsed = mask_statistics(torch.full((2, 2, 6), 0.5), error)
    assert collapsed["mask_std"] == collapsed["mask_correlation"] == 0
    assert collapsed["mask_overlap"] == 1
    assert collapsed["mask_entropy"] == 1
    closed = mask_statistics(1e-25 * rising[:, :1], error)  # its squares are no numbers of float32 any more
    torch.testing.assert_close(closed["mask_correlation"], torch.tensor(0.0))


@pytest.mark.parametrize("numbered", [True, False])  # a loop of one's own may pass no step
def test_a_collapse_is_said_once_or_stops(numbered: bool, caplog: pytest.LogCaptureFixture) -> None:
    student, teacher = maps(2, 3, 4, 6, 5)

    def train(**options: Any) -> None:
        loss = joint(3, 4, masks="spatial", **options).double()
        assert loss.selection.spatial is not None
        torch.nn.init.normal_(loss.fusion.key.weight, std=20)  # sharp attention, and so masks that vary
        torch.nn.init.normal_(loss.selection.spatial, std=5)
        for step in range(3 * WATCH_EVERY):
            if step == WATCH_EVERY:
                torch.nn.init.zeros_(loss.selection.spatial)
            loss(student, teacher, DistillationContext(step=step) if numbered else None)

    said = "the spatial masks have collapsed by step 200: they vary by 0.000 only, less than 0.02: they choose nothing"
    train()
    assert caplog.messages == [f"ACAM: {said}"]
    with pytest.raises(AcamkdError) as stopped:
        train(on_mask_collapse="stop")
    assert str(stopped.value) == f"{said} (on_mask_collapse: stop)"
    train(mask_source="random")  # never meant to live
    assert len(caplog.messages) == 1


def test_masks_of_a_single_location_have_not_collapsed() -> None:
    """The last level of a pyramid over small images: nothing to choose, and no reason to stop."""
    loss = ACAM(3, 4, masks="spatial", mask_grad="detached", on_mask_collapse="stop").double()
    loss(*maps(2, 3, 4, 1, 1), DistillationContext(step=WATCH_EVERY - 1))
    assert loss.statistics["spatial_mask_std"] == 0
    assert 0.1 < loss.statistics["spatial_mask"] < 0.9


def test_the_masks_of_the_last_forward_are_measured() -> None:
    student, teacher = maps(2, 3, 4, 6, 5)
    loss = joint(3, 4).double()
    loss(student, teacher)
    for kind, mask in loss.masks(student, teacher).items():
        torch.testing.assert_close(loss.statistics[f"{kind}_mask"], mask.mean())
