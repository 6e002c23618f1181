from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from acamkd.distillation.taps import FeatureTap
from acamkd.errors import AcamkdError


class Double(nn.Module):
    """2 x, in place if asked; counts its calls."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.inplace = inplace
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x.mul_(2) if self.inplace else 2 * x


class Levels(NamedTuple):
    fine: Tensor
    coarse: Tensor


class Spread(nn.Module):
    """x and x + 1 in a container of some kind, beside something that is no tensor."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        match self.kind:
            case "dict":
                return {"0": x, "1": x + 1, "name": "levels"}
            case "ordered":
                return OrderedDict([(0, x), (1, x + 1)])
            case "list":
                return [x, x + 1]
            case "tuple":
                return (x, x + 1, None)
        return Levels(x, x + 1)


class Chain(nn.Module):
    """first, middle and last in a row."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 1, 1)
        self.middle = middle
        self.last = Double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x)))  # type: ignore[no-any-return]


class Gather(nn.Module):
    """Sums the entries of a container, by its own way of access."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.spread = Spread(kind)
        self.container: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.container = self.spread(x)
        if self.spread.kind == "namedtuple":
            return self.container.fine + 10 * self.container.coarse  # type: ignore[no-any-return]
        first, second = {"dict": ("0", "1")}.get(self.spread.kind, (0, 1))
        return self.container[first] + 10 * self.container[second]  # type: ignore[no-any-return]


class Shared(nn.Module):
    """One head on three levels."""

    def __init__(self) -> None:
        super().__init__()
        self.head = Double()
        self.unused = Double()

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.head(x + level) for level in range(3)]).sum(dim=0)


X = torch.ones(1, 1, 2, 2)


def hooks(net: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in net.modules())


def test_a_tap_records_the_output_and_leaves_the_network_alone() -> None:
    net = Chain(nn.ReLU())
    plain, first = net(X), net.first(X)
    with FeatureTap(net, ["last", "first"]) as tap:
        output = net(X)
        assert list(tap.features()) == ["last", "first"]
        assert torch.equal(tap["last"], plain)
        assert torch.equal(tap["first"], first)
    assert torch.equal(output, plain)


def test_the_whole_network_has_the_empty_name() -> None:
    net = nn.Conv2d(1, 2, 1)
    with FeatureTap(net, [""]) as tap:
        assert torch.equal(net(X), tap[""])


@pytest.mark.parametrize("inplace", [nn.ReLU(inplace=True), Double(inplace=True)])
def test_an_in_place_layer_behind_the_tap_cannot_reach_it(inplace: nn.Module) -> None:
    net = Chain(inplace)
    nn.init.constant_(net.first.weight, -3.0)
    assert net.first.bias is not None
    nn.init.constant_(net.first.bias, 1.0)
    with FeatureTap(net, ["first"]) as tap:
        output = net(X)
        kept = tap["first"]
    torch.testing.assert_close(kept, torch.full_like(X, -2.0))
    assert (output >= 0).all() == isinstance(inplace, nn.ReLU)
    kept.square().sum().backward()  # type: ignore[no-untyped-call]
    assert net.first.bias.grad is not None
    assert net.first.bias.grad.item() == pytest.approx(4 * 2 * -2)


def test_gradient_flows_from_the_tap_and_from_the_output() -> None:
    net, x = Chain(nn.Identity()), X.clone().requires_grad_()
    with FeatureTap(net, ["middle"]) as tap:
        output = net(x)
        (tap["middle"].sum() + output.sum()).backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, 3 * net.first.weight.detach().expand_as(X))


@pytest.mark.parametrize(("kind", "keys"), [
    ("dict", ["0", "1"]), ("ordered", ["0", "1"]), ("list", ["0", "1"]), ("tuple", ["0", "1"]),
    ("namedtuple", ["0", "1"]),
])  # fmt: skip
def test_entries_of_containers(kind: str, keys: list[str]) -> None:
    net = Gather(kind)
    with FeatureTap(net, ["spread:*"]) as tap:
        net(X)
        assert list(tap.features()) == [f"spread:{key}" for key in keys]
        assert torch.equal(tap["spread:1"], X + 1)
        tapped = type(net.container)
    with FeatureTap(net, ["spread:1"]) as tap:
        net(X)
        assert list(tap.features()) == ["spread:1"]
    net(X)
    assert tapped is type(net.container)


@pytest.mark.parametrize("kind", ["dict", "ordered", "list", "tuple", "namedtuple"])
def test_edit_replaces_what_goes_on_and_the_tap_keeps_what_was(kind: str) -> None:
    net = Gather(kind)
    with FeatureTap(net, ["spread:1"], edit=lambda name, x: x * 0 + len(name)) as tap:
        output = net(X)
        assert torch.equal(tap["spread:1"], X + 1)
    assert torch.equal(output, X + 10 * len("spread:1"))
    if kind == "dict":
        assert net.container["name"] == "levels"


def test_edit_sees_every_name_and_passes_gradient() -> None:
    net, seen = Shared(), []
    scale = torch.tensor(3.0, requires_grad=True)

    def edit(name: str, x: Tensor) -> Tensor:
        seen.append(name)
        return scale * x

    with FeatureTap(net, ["head@*"], edit=edit):
        output = net(X)
    assert seen == ["head@0", "head@1", "head@2"]
    assert torch.equal(output, 3 * (2 + 4 + 6) * X)
    output.sum().backward()
    assert scale.grad is not None
    assert scale.grad.item() == 4 * 12


def test_several_calls_of_one_layer() -> None:
    net = Shared()
    with FeatureTap(net, ["head@2", "head@0"]) as tap:
        net(X)
        assert list(tap.features()) == ["head@2", "head@0"]
        assert torch.equal(tap["head@2"], 6 * X)
        assert torch.equal(tap["head@0"], 2 * X)
    with FeatureTap(net, ["head@*"]) as tap:
        net(X)
        assert list(tap.features()) == ["head@0", "head@1", "head@2"]
        assert torch.equal(tap["head@1"], 4 * X)


def test_entries_and_calls_together() -> None:
    net = nn.Sequential(Gather("dict"))
    with FeatureTap(net, ["0.spread:1@*", "0.spread:*@1"]) as tap:
        net(X)
        net(X + 1)
        assert list(tap.features()) == ["0.spread:1@0", "0.spread:1@1", "0.spread:0@1"]
        assert torch.equal(tap["0.spread:0@1"], X + 1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("haed", "there is no layer 'haed' to tap .*did you mean head"),
        ("quite.other", "there is no layer 'quite.other' to tap .*known: head, unused"),
        ("head:", "'head:' is not a tap: write layer, layer:key, layer:\\* or, for tokens, layer#PATCH or "),
        ("head#0", "'head#0' is not a tap"),
        ("head#+1", "'head#\\+1' is not a tap"),
        ("head@x", "'head@x' is not a tap"),
        ("head@1:0", "'head@1:0' is not a tap"),
    ],
)
def test_wrong_names_are_refused_at_once(name: str, message: str) -> None:
    with pytest.raises(AcamkdError, match=message):
        FeatureTap(Shared(), [name])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("unused", "the tap unused did not fire: the forward did not run this layer"),
        ("head@3", r"the tap head@3 did not fire: the layer ran 3 times \(calls count from 0\)"),
        ("head", r"the layer head ran 3 times in one forward: name one call \(head@0 ... head@2\) or all \(head@\*\)"),
        ("head:0@1", r"no such entry; a plain tensor is tapped by 'head' alone"),
        ("head:*@1", r"no such entry; a plain tensor is tapped by 'head' alone"),
    ],
)
def test_a_tap_that_did_not_fire_is_an_error(name: str, message: str) -> None:
    net = Shared()
    with pytest.raises(AcamkdError, match=message), FeatureTap(net, [name]):
        net(X)
    assert hooks(net) == 0
    with FeatureTap(net, ["head@0", "head@1"]) as tap:
        net(X)
        with pytest.raises(AcamkdError, match=r"head@2 is not among the tapped outputs; did you mean head@"):
            tap["head@2"]


@pytest.mark.parametrize("name", ["spread", "spread:2", "spread:name"])
def test_entries_that_are_no_tensors_cannot_be_tapped(name: str) -> None:
    net = Gather("dict")
    with pytest.raises(AcamkdError, match=r"no such entry; .* the entries of a dict, list or tuple by 'spread:\*'"):  # noqa: SIM117
        with FeatureTap(net, [name]):
            net(X)


def test_hooks_and_tensors_are_gone_on_leaving() -> None:
    net = Shared()
    tap = FeatureTap(net, ["head@*"])
    assert hooks(net) == 0
    with tap:
        net(X)
        assert hooks(net) == 1
    assert hooks(net) == 0
    with pytest.raises(AcamkdError, match="did not fire"):
        tap["head@0"]
    with tap:  # and a tap can be used again
        net(X)
        assert len(tap.features()) == 3


def test_an_exception_within_is_passed_on_and_leaves_no_hook() -> None:
    net = Shared()
    with pytest.raises(ZeroDivisionError), FeatureTap(net, ["unused"]):
        raise ZeroDivisionError
    assert hooks(net) == 0


def test_a_forward_before_the_context_is_not_recorded() -> None:
    net = Chain(nn.ReLU())
    net(X)
    with pytest.raises(AcamkdError, match="the tap middle did not fire"), FeatureTap(net, ["middle"]):
        pass


def test_early_stop_ends_the_forward_at_the_last_tapped_layer() -> None:
    net = Chain(Double())
    with FeatureTap(net, ["first", "middle"]) as tap:
        with tap.early_stop():
            net(X)
        maps = tap.features()
        assert list(maps) == ["first", "middle"]
        assert net.last.calls == 0
        torch.testing.assert_close(maps["middle"], 2 * maps["first"])
    with FeatureTap(net, ["middle"]):
        net(X)  # only within early_stop
    assert net.last.calls == 1


def test_early_stop_waits_for_the_call_asked_for() -> None:
    net = Shared()
    with FeatureTap(net, ["head@1"]) as tap, tap.early_stop():
        net(X)
        pytest.fail("the forward has gone on")
    assert net.head.calls == 2
    with FeatureTap(net, ["head@*"]) as tap, tap.early_stop():
        net(X)  # nobody can say which call is the last one
    assert net.head.calls == 5


def test_early_stop_lets_errors_through() -> None:
    net = Chain(Double())
    with pytest.raises(RuntimeError), FeatureTap(net, ["last"]) as tap, tap.early_stop():
        net(torch.ones(1, 5, 2, 2))
    assert hooks(net) == 0


class Patches(nn.Module):
    """A transformer's skeleton: a class token, patches of 4 x 4 pixels and two tokens behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 5, 4, stride=4)
        self.tokens = nn.Identity()
        self.head = nn.Linear(5, 2)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.embed(pixels).flatten(2).transpose(1, 2)
        rest = torch.arange(3.0)[None, :, None].expand(len(patches), 3, 5)
        tokens = self.tokens(torch.cat([rest[:, :1], patches, rest[:, 1:]], dim=1))
        return self.head(tokens)  # type: ignore[no-any-return]


@pytest.mark.parametrize("size", [(8, 12), (20, 8)])
def test_tokens_are_a_map_of_the_images_form(size: tuple[int, int]) -> None:
    net, pixels = Patches(), torch.rand(2, 3, *size)
    plain = net(pixels)
    with FeatureTap(net, ["tokens#4+1"]) as tap:
        assert torch.equal(net(pixels), plain)
        assert torch.equal(tap["tokens#4+1"], net.embed(pixels))
    with FeatureTap(net, ["tokens#4+1"]) as tap, tap.early_stop():
        net(pixels)
    assert not net._forward_pre_hooks


def test_what_an_edit_makes_of_the_map_goes_on_as_tokens() -> None:
    net, pixels = Patches(), torch.rand(1, 3, 8, 12)
    plain = net(pixels)
    with FeatureTap(net, ["tokens#4+1@0"], edit=lambda _, x: 2 * x) as tap:
        edited = net(pixels)
        assert tap["tokens#4+1@0"].shape == (1, 5, 2, 3)
    assert torch.equal(edited[:, [0, 7, 8]], plain[:, [0, 7, 8]])  # not the tokens around the patches
    assert torch.allclose(edited[:, 1:7], net.head(2 * net.embed(pixels).flatten(2).transpose(1, 2)))


def test_tokens_before_the_patches_need_no_number() -> None:
    net = nn.Sequential(nn.Conv2d(3, 5, 4, stride=4), nn.Flatten(2))
    message = r"gives \(1, 5, 6\), which are not the tokens \(N, L, C\) of 1 images"
    with pytest.raises(AcamkdError, match=message), FeatureTap(net, ["1#4"]):
        net(torch.rand(1, 3, 8, 12))  # (N, C, L)
    tokens = nn.Identity()
    whole = nn.ModuleDict({"tokens": tokens})
    whole.forward = lambda pixels: tokens(torch.arange(8.0)[None, :, None])
    with FeatureTap(whole, ["tokens#4"]) as tap:
        whole(torch.rand(1, 3, 8, 12))
        assert tap["tokens#4"].flatten().tolist() == [2, 3, 4, 5, 6, 7]


def test_tokens_that_are_no_such_patches_are_refused() -> None:
    net = Patches()
    cases = [
        ("tokens#3", (8, 12), "images of 8 x 12 are not made of patches of 3 pixels"),
        ("tokens#2", (8, 12), r"gives \(1, 9, 5\), which are not .* 4 x 6 patches of 2 pixels"),
        ("tokens#4+4", (8, 12), "2 x 3 patches of 4 pixels and 4 before them"),
        ("tokens#16", (32, 32), "63 of 67 tokens are no patches of 16 pixels: .* as in tokens#16\\+1"),
    ]
    for name, size, message in cases:
        with pytest.raises(AcamkdError, match=message), FeatureTap(net, [name]):
            net(torch.rand(1, 3, *size))
    with pytest.raises(AcamkdError, match="tapped in two forms at once"):
        FeatureTap(net, ["tokens", "tokens#4"])
    message = "needs the size of the images, and the network itself was given none"
    with pytest.raises(AcamkdError, match=message), FeatureTap(net, ["head#4"]):
        net.head(torch.rand(1, 6, 5))
