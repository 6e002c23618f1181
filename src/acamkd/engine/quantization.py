"""Quantization-aware training: the student computes with the rounding that its INT8 file will bring."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from acamkd.distillation.taps import probe_batch
from acamkd.errors import AcamkdError
from acamkd.models.base import TaskModel, keeping_modes

SMOOTH = (nn.SiLU, nn.Hardswish, nn.GELU, nn.Mish, nn.Sigmoid, nn.Hardsigmoid)
"""Activations whose inputs are rounded too."""

WEIGHT_LIMIT = 64
"""Largest magnitude of a rounded weight: the 7 bits of processors without VNNI, which 8 bits only refine."""


def require_torchao() -> None:
    """Raise AcamkdError unless torchao is installed."""
    if find_spec("torchao") is None:
        raise AcamkdError("train.quantize needs torchao: pip install 'acamkd[int8]'")


class FakeQuantization(nn.Module):
    """Rounds what a network computes to 8 bits where its INT8 file will, by torchao's fake quantization.

    Rounded are the weights of convolutions and linear layers, with a scale per output channel, and feature maps, with a
    scale and a zero point each: the inputs of these layers and of SMOOTH activations, and the outputs that no batch
    norm or ReLU takes. onnxruntime merges those with the layer. A batch norm scales whole channels, so that it changes
    nothing about the rounding of their weights. A layer that runs several times, such as a head on each level, has
    ranges for each.

    Gradients pass the rounding unchanged within the range (Bengio et al., https://arxiv.org/abs/1308.3432). The range
    of a feature map is a moving average of its extremes over the training batches (Jacob et al.,
    https://arxiv.org/abs/1712.05877). In eval mode the ranges stay.

    It acts by hooks: the network's modules, their names and its state dict stay as they are. Its own state dict holds
    the ranges.

    Args:
        model: The network, on the device where it will be run.

    Raises:
        AcamkdError: torchao is missing.
    """

    def __init__(self, model: TaskModel) -> None:
        super().__init__()
        of_weight, of_map = _roundings()
        self.weights, self.maps = nn.ModuleDict(), nn.ModuleDict()
        self._calls: dict[str, int] = {}
        self._observing: bool | None = None
        self._observed: set[nn.Module] = set()
        """What is known to have a range."""
        modules = dict(model.net.named_modules())
        layers = {
            name: x
            for name, x in modules.items()
            if isinstance(x, nn.Conv2d | nn.ConvTranspose2d | nn.Linear) and "weight" in x._parameters
        }
        smooth = {name: x for name, x in modules.items() if isinstance(x, SMOOTH)}
        rounding_at: dict[str, nn.Module] = {**layers, **smooth}
        counts, merged = _probe(model, rounding_at)
        for name, layer in layers.items():
            self.weights[_key(name)] = rounding = of_weight(ch_axis=int(isinstance(layer, nn.ConvTranspose2d)))
            rounding(layer.weight.detach().cpu())  # gives its buffers their size
        for name in rounding_at:
            for end in ["input", "output"] if name in layers and name not in merged else ["input"]:
                self.maps[f"{_key(name)}:{end}"] = nn.ModuleList(of_map() for _ in range(max(1, counts[name])))
        model.register_forward_pre_hook(self._begin)
        for name, module in rounding_at.items():
            self._attach(name, module, has_weight=name in layers)
        self.to(model.mean.device)

    def _begin(self, model: nn.Module, _: object) -> None:
        """Before a forward of the network: count calls from 0, and observe ranges in its training mode only."""
        self._calls.clear()
        if self._observing != model.training:
            self._observing = model.training
            ranges: Any = self.maps.values()
            for rounding in chain.from_iterable(ranges):
                rounding.enable_observer(model.training)

    def _attach(self, name: str, module: nn.Module, *, has_weight: bool) -> None:
        key = _key(name)

        def before(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            if has_weight:
                # An attribute hides the parameter of that name, which stays what is trained and saved.
                vars(module)["weight"] = _rounded(self.weights[key], module._parameters["weight"])
            return (*(self._round_map(f"{key}:input", x) for x in inputs[:1]), *inputs[1:])

        def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
            vars(module).pop("weight", None)
            return self._round_map(f"{key}:output", output)

        module.register_forward_pre_hook(before)
        if has_weight:
            module.register_forward_hook(after, always_call=True)

    def _round_map(self, key: str, x: Any) -> Any:
        """A feature map in the rounding of this call of its layer."""
        if key not in self.maps or not isinstance(x, Tensor) or not x.is_floating_point() or not x.numel():
            return x
        ranges: Any = self.maps[key]
        call = self._calls[key] = self._calls.get(key, -1) + 1
        rounding = ranges[min(call, len(ranges) - 1)]
        if rounding not in self._observed:
            if not (self._observing or rounding.activation_post_process.min_val.isfinite()):
                return x  # without a range it would clip everything
            self._observed.add(rounding)
        return _rounded(rounding, x)


def _rounded(rounding: nn.Module, x: Any) -> Tensor:
    """Rounded in 32 bits, whatever the precision of the training."""
    with torch.autocast(x.device.type, enabled=False):
        found: Tensor = rounding(x.float())
        return found.to(x.dtype)


def _key(name: str) -> str:
    """A layer's name where none with dots is allowed."""
    return name.replace(".", "/") or "net"


def _roundings() -> tuple[Callable[..., nn.Module], Callable[..., nn.Module]]:
    """What makes torchao's rounding of a weight and of a feature map.

    The range of a weight is that of its present values, whatever the mode. torchao's fused form scales positive and
    negative extremes differently, onnxruntime does not.
    """
    require_torchao()
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # torch warns of how torchao registers its types
    try:
        from torchao.quantization.pt2e import (
            FakeQuantize,
            FusedMovingAvgObsFakeQuantize,
            MovingAverageMinMaxObserver,
            MovingAveragePerChannelMinMaxObserver,
        )
    except ImportError as error:
        raise AcamkdError(f"train.quantize needs torchao 0.18 or newer: {error}") from error
    finally:
        logging.disable(disabled)
    of_weight = partial(
        FakeQuantize, MovingAveragePerChannelMinMaxObserver, -WEIGHT_LIMIT, WEIGHT_LIMIT, dtype=torch.int8,
        qscheme=torch.per_channel_symmetric, averaging_constant=1.0,
    )  # fmt: skip
    return of_weight, partial(FusedMovingAvgObsFakeQuantize, MovingAverageMinMaxObserver, 0, 255, dtype=torch.uint8)


@torch.no_grad()
def _probe(model: TaskModel, modules: Mapping[str, nn.Module]) -> tuple[dict[str, int], set[str]]:
    """How often each of some modules runs in one forward, and whose output goes straight to a ReLU or batch norm."""
    counts, merged = dict.fromkeys(modules, 0), set[str]()
    outputs: dict[int, tuple[str, Any]] = {}  # by identity, kept so that none is given twice

    def note(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            counts[name] += 1
            outputs[id(output)] = (name, output)

        return hook

    def merge(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs and id(inputs[0]) in outputs:
            merged.add(outputs[id(inputs[0])][0])

    with ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_hook(note(name)).remove)
        for module in model.net.modules():
            if isinstance(module, nn.ReLU | nn.ReLU6) or "running_var" in dict(module.named_buffers(recurse=False)):
                stack.callback(module.register_forward_pre_hook(merge).remove)
        stack.enter_context(keeping_modes(model))
        stack.enter_context(torch.random.fork_rng(devices=[]))
        model.eval()
        model(probe_batch(model))
    return counts, merged
