"""`train.compile`: student, teacher and losses by torch.compile, in parts between the taps."""

from __future__ import annotations

import logging
import time
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.nn.modules.batchnorm import _BatchNorm

from acamkd.distillation.taps import keep_saved_tensors, layer_of
from acamkd.losses.base import FeatureLoss

log = logging.getLogger(__name__)

_Call: TypeAlias = Callable[..., Any]

_NUMBERS = count()

COMPILER = ("torch._dynamo", "torch._inductor")
"""Where the errors of torch's compiler come from; those of what it compiled come from elsewhere."""


def can_compile(device: torch.device) -> bool:
    """Whether torch compiles for a device here, tried on one sum; the log says what is missing."""
    factor = time.time()  # a constant of its own, so that nothing comes from a cache
    try:
        torch.compile(lambda x: x * factor)(torch.ones(2, device=device))
    except RuntimeError as error:
        log.warning(
            "train.compile: torch cannot compile for %s here, so that the training is not compiled: %s",
            device.type, _reason(error),
        )  # fmt: skip
        return False
    return True


class _Part:
    """A method of a module, compiled; once the compiler refuses it, it runs as it is.

    Args:
        method: Bound to its module.
        title: Of the module, for messages.
        backend: Of torch.compile.
        whole: It is to be one graph, and is refused otherwise.
    """

    def __init__(self, method: _Call, title: str, backend: str, *, whole: bool) -> None:
        self.title = title
        self._plain = method
        self._compiled: _Call | None = torch.compile(_own_code(self._plain), backend=backend, fullgraph=whole)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._compiled is not None:
            try:
                return self._compiled(*args, **kwargs)
            except Exception as error:
                if not type(error).__module__.startswith(COMPILER):
                    raise
                self._compiled = None
                self.refused(_reason(error))
        return self._plain(*args, **kwargs)

    def refused(self, reason: str) -> None:
        """What follows when the compiler refuses it."""
        log.info("train.compile: %s is not compiled: %s", self.title, reason)


class CompiledLoss(_Part):
    """The terms of a loss, compiled in one or several graphs."""

    def __init__(self, loss: FeatureLoss, backend: str) -> None:
        super().__init__(loss.terms, loss.title, backend, whole=False)
        self._loss = loss

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within, the loss is compiled."""
        vars(self._loss)["terms"] = self
        try:
            yield
        finally:
            del vars(self._loss)["terms"]


class CompiledNetwork:
    """A network that runs in compiled parts within `running`, and as it is outside.

    A part is the largest module that is called and has no tapped layer inside. It is a single graph. So taps record
    between the graphs, and whatever works on their feature maps, the split backward and the early stop among them, is
    the same as without a compiler. The hooks of a tap inside a graph would be part of it: its backward would be one
    step, which cannot be parted at a map.

    The first forward runs as it is: it shows what is called. A module that is no single graph gives way to its own
    parts, which the log says once. What runs in an activation checkpoint is not compiled: it runs again in the
    backward, outside of `running`, where it must save the same tensors.

    Args:
        net: The network.
        layers: What will be tapped, in FeatureTap's grammar.
        who: `student` or `teacher`, for messages.
        backend: Of torch.compile.
    """

    def __init__(self, net: nn.Module, layers: Iterable[str], who: str, backend: str) -> None:
        keep_saved_tensors()
        self._net, self._who, self._backend = net, who, backend
        self._titles = {module: name for name, module in net.named_modules()}
        self._tapped = {net.get_submodule(layer_of(name)) for name in layers}
        self._called: set[nn.Module] = set()
        self._repeated: set[nn.Module] = set()
        self._parts: dict[nn.Module, _Part] = {}
        self._is_known = False
        self._depth = 0  # of calls within calls, in the first forward
        self._has_gradients = False

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within, forwards are compiled, but for the first."""
        if not self._is_known:
            with ExitStack() as stack:
                for module in self._titles:
                    stack.callback(module.register_forward_pre_hook(self._note).remove)
                    # A tap may end the forward by an exception.
                    stack.callback(module.register_forward_hook(self._leave, always_call=True).remove)
                yield
            self._parts, self._is_known = dict(self._parts_of([self._net])), True
            if self._repeated:
                log.info(
                    "train.compile: %d of the %s's modules run in activation checkpoints and are not compiled",
                    len(self._repeated), self._who,
                )  # fmt: skip
            return
        self._install(self._parts)
        try:
            yield
        finally:
            for module in self._parts:
                del vars(module)["forward"]

    def _note(self, module: nn.Module, _: Any) -> None:
        if not self._depth:  # the network, or one of the parts that a detector calls one by one
            self._has_gradients = torch.is_grad_enabled()
        self._depth += 1
        # A reentrant checkpoint runs its forward without gradients.
        runs_again = _is_in_checkpoint() or torch.is_grad_enabled() != self._has_gradients
        (self._repeated if runs_again else self._called).add(module)

    def _leave(self, _module: nn.Module, _inputs: Any, _output: Any) -> None:
        self._depth -= 1

    def _install(self, parts: dict[nn.Module, _Part]) -> None:
        # An attribute hides the method. Hooks run around it, and neither names nor tensors of the state change.
        for module, part in parts.items():
            vars(module)["forward"] = part

    def _parts_of(self, modules: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, _Part]]:
        alone = self._called - self._repeated
        for module in modules:
            inner = list(module.modules())[1:]
            learns = inner and next(module.parameters(), None) is not None  # a single layer gains nothing
            is_free = self._tapped.isdisjoint(inner) and self._repeated.isdisjoint(inner)
            if learns and module in alone and is_free and "forward" not in vars(module):
                yield module, _NetworkPart(module, self._titles[module], self)
            else:
                yield from self._parts_of(module.children())


class _NetworkPart(_Part):
    """One part of a network, a single graph; its own parts take its place where it is none."""

    def __init__(self, module: nn.Module, name: str, network: CompiledNetwork) -> None:
        title = f"the {network._who}'s {name or 'network'}"
        super().__init__(module.forward, title, network._backend, whole=True)
        self._module, self._network = module, network
        norms = (each for each in module.modules() if isinstance(each, _BatchNorm))
        self._running_statistics = tuple(x for norm in norms for x in norm.buffers())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Images without labels make a second forward before the backward. It updates the running statistics again,
        # which the backward of a training never reads. Without a compiler, torch does not count that as a change.
        with _unsafe_preserve_version_counter(self._running_statistics):
            return super().__call__(*args, **kwargs)

    def refused(self, reason: str) -> None:
        parts = dict(self._network._parts_of(self._module.children()))
        self._network._parts |= parts
        self._network._install(parts)
        instead = "compiled in parts" if parts else "not compiled"
        log.info("train.compile: %s is %s, since it is no single graph: %s", self.title, instead, reason)


def _own_code(call: _Call) -> _Call:
    """The same call with a code of its own: torch's compiler remembers sizes and graphs by the code."""

    def part(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    code = part.__code__.replace(co_name=f"part_{next(_NUMBERS)}")
    return types.FunctionType(code, part.__globals__, code.co_name, None, part.__closure__)


def _is_in_checkpoint() -> bool:
    """Whether saved tensors go through hooks here, as within an activation checkpoint that is not reentrant."""
    try:
        with disable_saved_tensors_hooks("in use"):
            return False
    except RuntimeError:
        return True


def _reason(error: BaseException) -> str:
    """The first line of an error that says something."""
    lines: Sequence[str] = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
