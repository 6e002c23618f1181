"""What large models need: activation checkpoints around tapped layers, and students that are compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from acamkd.distillation.distiller import Distiller
from acamkd.distillation.taps import FeatureTap
from acamkd.errors import AcamkdError
from acamkd.losses import ACAM, FitNet
from acamkd.losses.base import FeatureLoss
from acamkd.models import Batch, Target, TaskModel


class Net(nn.Module):
    """stem -> body -> head; one of them, or the whole, runs again in the backward."""

    def __init__(self, channels: int, again: str = "", *, reentrant: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.ReLU(), nn.Conv2d(channels, channels, 1))
        self.head = nn.Conv2d(channels, 2, 1)
        self.again, self.reentrant = again, reentrant
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.again == "whole":
            return checkpoint(self._run, x, use_reentrant=self.reentrant)
        return self._run(x)

    def _run(self, x: Tensor) -> Tensor:
        self.runs += 1
        for name in ("stem", "body", "head"):
            layer = getattr(self, name)
            x = checkpoint(layer, x, use_reentrant=self.reentrant) if name == self.again else layer(x)
        return x


class Tiny(TaskModel):
    """Segments noise."""

    task = "segmentation"

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net, 2, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

    def prepare(self, images: Sequence[Tensor], targets: Sequence[Target] | None = None) -> Batch:
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        return Batch(torch.stack(list(images)), sizes, sizes, None if targets is None else list(targets))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return {"out": self.net(self.normalize(batch))}

    def loss(self, outputs: Mapping[str, Any], batch: Batch) -> dict[str, Tensor]:
        return {"size": outputs["out"].square().mean(), "level": outputs["out"].mean().abs()}

    def decode(self, outputs: Mapping[str, Any], batch: Batch) -> list[dict[str, Tensor]]:
        return [{"mask": logits.argmax(dim=0)} for logits in outputs["out"]]


def _fitnet() -> FeatureLoss:
    return FitNet(4, 6)


def _look_ahead() -> FeatureLoss:
    return ACAM(4, 6, num_masks=2)


def _trained(net: nn.Module, layer: str, loss: Callable[[], FeatureLoss], steps: int = 3) -> tuple[list[float], Tensor]:
    """Losses of some steps, and the weights behind them."""
    torch.manual_seed(0)
    start, teacher = Net(4), Tiny(Net(6))
    net.load_state_dict(start.state_dict())
    student = Tiny(net)
    distiller = Distiller(student, teacher, [(layer, layer)], [loss()]).train()
    optimizer = torch.optim.SGD([p for p in distiller.parameters() if p.requires_grad], lr=0.01)
    batch = student.prepare([torch.rand(3, 6, 5) for _ in range(2)])
    losses = []
    for step in range(steps):
        torch.manual_seed(1)
        total = torch.stack(list(distiller(batch, step).values())).sum()
        optimizer.zero_grad()
        total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(total.item())
    return losses, torch.cat([parameter.detach().flatten() for parameter in net.parameters()])


@pytest.mark.parametrize("loss", [_fitnet, _look_ahead])
@pytest.mark.parametrize("layer", ["body", "body.0"])
@pytest.mark.parametrize("again", ["stem", "body", "head", "whole"])
def test_a_checkpoint_changes_nothing(again: str, layer: str, loss: Callable[[], FeatureLoss]) -> None:
    plain, checkpointed = Net(4), Net(4, again)
    expected, found = _trained(plain, layer, loss), _trained(checkpointed, layer, loss)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert (checkpointed.runs > plain.runs) == (again == "whole")  # it did run again, within and behind the taps


@pytest.mark.parametrize(("again", "layer"), [("body", "body"), ("body", "body.0"), ("head", "body")])
def test_a_checkpoint_without_a_graph_is_named(again: str, layer: str) -> None:
    with pytest.raises(AcamkdError, match="use_reentrant=False"):
        _trained(Net(4, again, reentrant=True), layer, _look_ahead)


@pytest.fixture
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh")
@pytest.mark.parametrize("loss", [_fitnet, _look_ahead])
@pytest.mark.parametrize(("layer", "again"), [("body", ""), ("body.0", ""), ("body", "whole")])
def test_a_compiled_student_learns_the_same(layer: str, again: str, loss: Callable[[], FeatureLoss]) -> None:
    expected = _trained(Net(4), layer, loss)
    compiled = Net(4, again)
    compiled.compile(backend="aot_eager")
    with torch.no_grad():
        compiled(torch.rand(2, 3, 6, 5))  # compiled before anybody taps it
    torch.testing.assert_close(_trained(compiled, layer, loss), expected)
    graphs = counters["stats"]["unique_graphs"]
    torch.testing.assert_close(_trained(compiled, layer, loss, steps=12)[0][:3], expected[0])
    assert counters["stats"]["unique_graphs"] == graphs  # no step compiles anew


@pytest.mark.usefixtures("_fresh")
def test_a_tap_of_a_compiled_network_records_while_it_is_open() -> None:
    net = Net(4)
    net.compile(backend="aot_eager")
    images = torch.rand(1, 3, 6, 5)
    assert net.head.bias is not None
    stem = net.stem(images)
    for layer, expected in (("body", net.body(stem)), ("stem", stem)):
        with FeatureTap(net, [layer]) as tap:
            out = net(images)
            torch.testing.assert_close(tap[layer], expected)
    with FeatureTap(net, ["body"], edit=lambda _, x: 0 * x), FeatureTap(net, ["head"]) as tap:
        torch.testing.assert_close(net(images), torch.zeros_like(out) + net.head.bias.detach()[:, None, None])
        assert tap["head"].shape == out.shape
    torch.testing.assert_close(net(images), out)  # and nothing outside
    with FeatureTap(net, ["stem"]) as tap, tap.early_stop():
        net(images)
        pytest.fail("the forward has gone on")
