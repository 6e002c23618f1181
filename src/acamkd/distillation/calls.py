"""Arguments that named modules are called with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn

from acamkd.models.base import Call


@contextmanager
def recorded_calls(net: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Call]]:
    """Within, the first call of each named module is put into the mapping that is given."""
    calls: dict[str, Call] = {}

    def note(name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.setdefault(name, Call(args, kwargs))  # a method may run the module again

    with ExitStack() as stack:
        for name in names:
            module = net.get_submodule(name)
            stack.callback(module.register_forward_pre_hook(partial(note, name), with_kwargs=True).remove)
        yield calls
