"""Reading the autograd graph, and a backward in two parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from acamkd.distillation.split_backward import split_backward, upstream_leaves
from acamkd.errors import AcamkdError

Terms: TypeAlias = dict[str, Tensor]
Edges: TypeAlias = dict[str, GradientEdge]


def total(terms: Terms) -> Tensor:
    return torch.stack(list(terms.values())).sum()


class Counted(nn.Linear):
    """Counts the backwards that reach its weight."""

    def __init__(self) -> None:
        super().__init__(4, 4, bias=False)
        self.backwards = 0

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if y.requires_grad:
            y.register_hook(self._count)  # type: ignore[no-untyped-call]
        return y

    def _count(self, _: Tensor) -> None:
        self.backwards += 1


class Net(nn.Module):
    """stem -> neck -> head.

    Args:
        around: The head also reads the stem itself, not its copy.
        inner: The neck reads the stem itself rather than its copy, and so the head both copies, as with P5 and P6.
        in_place: What follows the neck works on its copy.
        unread: Nobody reads the stem's copy.
    """

    def __init__(
        self, *, around: bool = False, inner: bool = False, in_place: bool = False, unread: bool = False
    ) -> None:
        super().__init__()
        self.stem, self.neck, self.head = Counted(), Counted(), Counted()
        self.around, self.inner, self.in_place, self.unread = around, inner, in_place, unread

    def forward(self, x: Tensor) -> tuple[Terms, Terms, Edges]:
        """Terms, maps and their copies."""
        stem = self.stem(x).tanh()
        stem_copy = stem.clone()
        neck = self.neck(stem if self.inner or self.unread else stem_copy).tanh()
        neck_copy = neck.clone()
        copies = {"stem": get_gradient_edge(stem_copy), "neck": get_gradient_edge(neck_copy)}
        if self.in_place:
            neck_copy.relu_()
        more = stem if self.around else stem_copy if self.inner else 0.0
        out = self.head(neck_copy + more)
        terms = {"square": out.square().mean(), "level": out.mean().abs()}
        return terms, {"stem": stem, "neck": neck}, copies


def trained(net: Net, step: Callable[[Net], Tensor]) -> list[Tensor]:
    net.zero_grad()
    step(net).backward()  # type: ignore[no-untyped-call]
    return [parameter.grad.clone() for parameter in net.parameters() if parameter.grad is not None]


@pytest.mark.parametrize(
    ("options", "layers", "head_backwards"),
    [
        ({}, ["neck"], 1),
        ({}, ["stem"], 1),
        ({}, ["stem", "neck"], 2),
        ({"around": True}, ["neck"], 2),
        ({"inner": True}, ["neck"], 2),
        ({"inner": True}, ["stem", "neck"], 1),
        ({"in_place": True}, ["neck"], 1),
        ({"unread": True}, ["stem", "neck"], 1),
    ],
)
def test_split_backward_changes_no_gradient_and_repeats_work_only_where_it_must(
    options: dict[str, bool], layers: list[str], head_backwards: int
) -> None:
    net, x = Net(**options).double(), torch.randn(3, 4).double()
    found: list[Tensor] = []

    def plain(net: Net) -> Tensor:
        terms, maps, _ = net(x)
        found.extend(torch.autograd.grad(total(terms), [maps[layer] for layer in layers], retain_graph=True))
        return torch.add(total(terms), maps["neck"].sum())

    def split(net: Net) -> Tensor:
        terms, maps, copies = net(x)
        values = {name: term.item() for name, term in terms.items()}
        gradients, terms = split_backward(terms, [maps[layer] for layer in layers], [copies[layer] for layer in layers])
        assert {name: term.item() for name, term in terms.items()} == values
        torch.testing.assert_close(gradients, found)
        return torch.add(total(terms), maps["neck"].sum())

    expected = trained(net, plain)
    net.head.backwards = 0
    torch.testing.assert_close(trained(net, split), expected)
    assert net.head.backwards == head_backwards


def test_split_backward_follows_a_common_factor_and_refuses_unequal_ones() -> None:
    net, x = Net(), torch.randn(3, 4)
    gradients = {}
    for factor in (1.0, 0.25):
        terms, maps, copies = net(x)
        _, terms = split_backward(terms, [maps["neck"]], [copies["neck"]])
        gradients[factor] = torch.autograd.grad(factor * total(terms), list(net.parameters()))
    torch.testing.assert_close([4 * g for g in gradients[0.25]], list(gradients[1.0]))
    terms, maps, copies = net(x)
    _, terms = split_backward(terms, [maps["neck"]], [copies["neck"]])
    with pytest.raises(AcamkdError, match=r"the task's terms have unequal factors.*give all terms .* the same factor"):
        (terms["square"] + 2 * terms["level"]).backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(("dtype", "head_backwards"), [(torch.float16, 2), (torch.bfloat16, 1)])
def test_split_backward_leaves_float16_to_its_loss_scale(dtype: torch.dtype, head_backwards: int) -> None:
    net = Net()
    with torch.autocast(torch.get_default_device().type, dtype=dtype):
        terms, maps, copies = net(torch.randn(3, 4))
        _, terms = split_backward(terms, [maps["neck"]], [copies["neck"]])
    total(terms).backward()  # type: ignore[no-untyped-call]
    assert net.head.backwards == head_backwards
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_split_backward_sees_a_pixels_share_of_a_large_mean_in_float16() -> None:
    features = torch.ones(8, dtype=torch.float16, requires_grad=True) * 1
    copy = features.clone()
    (gradient,), _ = split_backward({"mean": copy.float().sum() / 1e8}, [features], [get_gradient_edge(copy)])
    assert torch.tensor(1e-8).half() == 0  # what it would be without a factor
    torch.testing.assert_close(gradient, torch.full((8,), 1e-8), rtol=0.01, atol=0)


def test_split_backward_keeps_the_precision_that_the_forward_had() -> None:
    weight, x = torch.randn(4, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    found = []
    for split in (False, True):
        with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
            features = x * 2
            copy = features.clone()
            edge = get_gradient_edge(copy)
            with torch.autocast(torch.get_default_device().type, enabled=False):  # as detectors compute their boxes
                terms = {"square": (copy @ weight).square().mean()}
            if split:
                _, terms = split_backward(terms, [features], [edge])
        found.append(torch.autograd.grad(total(terms), [weight, x]))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_split_backward_lets_hooks_on_parameters_run_once() -> None:
    gradients = []
    net, x = Net(), torch.randn(3, 4)
    net.head.weight.register_hook(lambda gradient: 0.1 * gradient)  # type: ignore[no-untyped-call]
    for split in (False, True):
        terms, maps, copies = net(x)
        if split:
            _, terms = split_backward(terms, [maps["neck"]], [copies["neck"]])
        gradients.append(trained(net, lambda _, terms=terms: total(terms)))  # type: ignore[misc]
    torch.testing.assert_close(gradients[1], gradients[0])


def test_split_backward_gives_terms_that_may_be_changed_in_place() -> None:
    terms, maps, copies = Net()(torch.randn(3, 4))
    _, terms = split_backward(terms, [maps["neck"]], [copies["neck"]])
    loss = terms["square"]
    value = loss.item()
    loss *= 2
    assert loss.item() == pytest.approx(2 * value)


def test_leaves_below_tells_the_outputs_of_one_node_apart() -> None:
    a, b = torch.ones(4, requires_grad=True), torch.ones(4, requires_grad=True)
    first, second = (a * b).split(2)  # type: ignore[no-untyped-call]
    assert {id(x) for x in upstream_leaves([first.grad_fn])[0]} == {id(a), id(b)}
    leaves, met = upstream_leaves([(first * second).sum().grad_fn], stop=[get_gradient_edge(first)])
    assert met
    assert {id(x) for x in leaves} == {id(a), id(b)}  # around the first, through the second
    assert upstream_leaves([(2 * first).sum().grad_fn], stop=[get_gradient_edge(first)]) == ([], True)
