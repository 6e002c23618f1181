from __future__ import annotations

import torch

from acamkd.models.base import VOID, Batch
from acamkd.models.resize import rescale


def test_a_batch_is_resampled_with_its_boxes() -> None:
    boxes = torch.tensor([[0.0, 32.0, 64.0, 64.0]])
    batch = Batch(torch.rand(2, 3, 64, 128), [(64, 100), (30, 128)], [(10, 20), (3, 7)], [{"boxes": boxes}] * 2)
    found = rescale(batch, 1.6, 32)
    assert found.input_size == (96, 192)  # 102.4 and 204.8 in multiples of 32
    assert (found.sizes, found.original_sizes) == ([(96, 150), (45, 192)], batch.original_sizes)
    assert found.targets is not None
    assert found.targets[0]["boxes"].tolist() == [[0, 48, 96, 96]]
    torch.testing.assert_close(found.pixels.mean(), batch.pixels.mean(), rtol=0.01, atol=0)
    assert rescale(batch, 1.1, 32) is batch
    assert rescale(batch, 0.1, 32).input_size == (32, 32)


def test_masks_are_resampled_to_the_nearest() -> None:
    mask = torch.full((32, 32), VOID)
    mask[:16, :16] = 3
    batch = Batch(torch.zeros(1, 3, 32, 32), [(16, 16)], [(8, 8)], [{"mask": mask}])
    found = rescale(batch, 2, 32)
    assert found.sizes == [(32, 32)]
    assert found.targets is not None
    assert torch.equal(found.targets[0]["mask"], mask.repeat_interleave(2, 0).repeat_interleave(2, 1))
