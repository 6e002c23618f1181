from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acamkd.engine.cost import cost, costs, flop_counter
from acamkd.models.base import Prediction
from acamkd.models.segmentation import Segmenter


def test_cost_counts_two_operations_per_multiply_add() -> None:
    model = Segmenter(nn.Conv2d(3, 4, 3, padding=1), 4)
    image: Tensor = torch.zeros(3, 32, 64, dtype=torch.uint8)
    spent = cost(model, image)
    assert spent.parameters == 3 * 4 * 9 + 4
    assert spent.gflops == pytest.approx(2 * 3 * 4 * 9 * 32 * 64 / 1e9)
    assert spent.milliseconds > 0
    assert spent.megabytes == pytest.approx(4 * spent.parameters / 1e6)


def test_one_architecture_is_timed_once_and_the_others_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[int] = []

    class _Noting(Segmenter):
        def predict(self, images: Any) -> list[Prediction]:
            order.append(len(self.net.weight))
            return super().predict(images)

    small, same, large = (_Noting(nn.Conv2d(3, count, 1), count) for count in (2, 2, 6))
    first, second, third = costs([small, same, large], torch.zeros(3, 8, 8, dtype=torch.uint8))
    assert first == second
    assert third.parameters == 24
    assert order == [2, 2, 6] + [2, 6] * 10


@pytest.mark.parametrize(
    ("layer", "forward"),
    [
        (nn.Conv2d(8, 4, 3, padding=1), 2 * 8 * 4 * 9 * 16 * 16),
        (nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8), 2 * 8 * 9 * 8 * 8),
        (nn.ConvTranspose2d(8, 8, 2, stride=2, groups=4), 2 * 8 * 2 * 4 * 16 * 16),
    ],
    ids=["dense", "depthwise", "transposed"],
)
def test_each_gradient_of_a_convolution_costs_what_its_forward_does(layer: nn.Module, forward: int) -> None:
    image = torch.zeros(1, 8, 16, 16)
    for x, passes in ((image, 2), (image.clone().requires_grad_(), 3)):
        with flop_counter() as counter:
            layer(x).sum().backward()
        assert counter.get_total_flops() == passes * forward
