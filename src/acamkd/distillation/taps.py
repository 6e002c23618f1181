"""FeatureTap: named intermediate outputs of any module."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from acamkd.errors import AcamkdError, nearest
from acamkd.models.base import Batch, FeatureModel, TaskModel, keeping_modes

_GRAMMAR = re.compile(
    r"(?P<layer>[^:@#]*)(:(?P<key>[^@#]+))?(#(?P<patch>[1-9]\d*)(\+(?P<prefix>\d+))?)?(@(?P<call>\d+|\*))?"
)

PROBE_SIZE = (128, 128)
"""(height, width) of the random image that `probe` is given where no real one is at hand."""

MAX_PREFIX = 16
"""Tokens before the patches that need not be counted in a name: a class token and a few registers."""


class _Request(NamedTuple):
    """One parsed name; `*` stands for all keys or all calls, `grid` for the form of tokens as it was written."""

    layer: str
    key: str | None
    call: str | None
    grid: str = ""


class TokenGrid(NamedTuple):
    """Where the patches of an image lie among the tokens (N, L, C) of a layer.

    Attributes:
        height: Patches from top to bottom.
        width: Patches from left to right.
        prefix: Tokens before the first patch; those behind the last are further ones, too.
    """

    height: int
    width: int
    prefix: int

    def map_of(self, tokens: Tensor) -> Tensor:
        """The patches as a feature map (N, C, height, width)."""
        patches = tokens[:, self.prefix : self.prefix + self.height * self.width]
        return patches.transpose(1, 2).reshape(len(tokens), -1, self.height, self.width)

    def tokens_of(self, feature_map: Tensor, tokens: Tensor) -> Tensor:
        """The tokens with a feature map in the place of the patches."""
        patches = feature_map.flatten(2).transpose(1, 2)
        return torch.cat(
            [tokens[:, : self.prefix], patches, tokens[:, self.prefix + self.height * self.width :]], dim=1
        )


class _Complete(Exception):  # noqa: N818 (no error, it only ends a forward)
    """Ends a forward whose remaining layers nobody needs."""


class FeatureTap:
    """Record what named layers put out, while the context lasts.

        with FeatureTap(net, ["layer3", "layer4"]) as tap:
            net(images)
            tap["layer4"]                   # (N, C, H, W), with its graph

    Names: `layer` is a module's dotted path. `layer:key` is one entry of its dict, list or tuple output (an FPN's
    levels), `layer:*` all of them. `layer@2` is the third call of a layer that runs several times in one forward (a
    detection head, once per level), `layer@*` all calls. `layer#16` are the tokens (N, L, C) of patches of 16 x 16
    pixels, as a feature map (N, C, H / 16, W / 16): tokens before the patches are left out, by `layer#16+1` one before
    them and all behind them. `layer:key#16@2` is all of it. On leaving, the hooks are removed and the tensors dropped.

    A layer that a backward runs again (activation checkpointing) is recorded once. In a network that is compiled, by
    `net.compile()` or `torch.compile`, the hooks stay and do nothing outside of a tap: another set of hooks would be
    compiled anew.

    Args:
        net: Any module.
        names: What to record.
        edit: Called with the name and the tensor of every recorded output. What it returns replaces the output in the
            rest of the network. The tap keeps what was there before.

    Raises:
        AcamkdError: There is no such layer (the nearest names are listed). Or, on leaving or on access, the forward did
            not produce an output that was asked for. Or, in the forward, tokens are not those of such patches.
    """

    def __init__(
        self, net: nn.Module, names: Sequence[str], edit: Callable[[str, Tensor], Tensor] | None = None
    ) -> None:
        self._requests = {name: _parse(name) for name in names}
        self._edit = edit
        modules = dict(net.named_modules())
        for name, request in self._requests.items():
            if request.layer not in modules:
                raise AcamkdError(f"there is no layer {request.layer!r} to tap ({name}); "
                                  f"{nearest(request.layer, filter(None, modules))}")  # fmt: skip
        forms = {(request.layer, request.grid) for request in self._requests.values()}
        if twice := [layer for layer, _ in forms if sum(layer == other for other, _ in forms) > 1]:
            raise AcamkdError(f"the layer {twice[0]} is tapped in two forms at once: tap it with # or without")
        self._net = net
        self._input: tuple[int, ...] | None = None  # shape of the pixels, where tokens are tapped
        self._modules = {request.layer: modules[request.layer] for request in self._requests.values()}
        self._is_compiled = _is_compiled(modules.values())
        self._handles: list[RemovableHandle] = []
        self._outputs: dict[str, list[dict[str, Tensor]]] = {}  # layer -> per call: key ("" for a tensor) -> output
        self._stop_when_complete = False

    def __enter__(self) -> FeatureTap:
        self._outputs = {layer: [] for layer in self._modules}
        for layer, module in self._modules.items():
            record = partial(self._record, layer)
            if self._is_compiled:
                _hooked_for_good(module).append(record)
            else:
                self._handles.append(
                    module.register_forward_hook(lambda _module, _inputs, output, to=record: to(output))
                )
        if any(request.grid for request in self._requests.values()):
            self._handles.append(self._net.register_forward_pre_hook(self._note_input, with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._is_compiled:
            for module in self._modules.values():
                _hooked_for_good(module).pop()
        try:
            if error is None:
                self.features()
        finally:
            self._outputs = {}

    def __getitem__(self, name: str) -> Tensor:
        """The output of one requested name, or of one that a requested `*` stands for."""
        features = self.features()
        if name not in features:
            raise AcamkdError(f"{name} is not among the tapped outputs; {nearest(name, features)}")
        return features[name]

    def features(self) -> dict[str, Tensor]:
        """Every recorded output by name, in the order of the request, `*` expanded."""
        return {name: output for request in self._requests.values() for name, output in self._resolve(request).items()}

    @contextmanager
    def early_stop(self) -> Iterator[None]:
        """Within, a forward ends as soon as everything asked for is there; it returns nothing then."""
        self._stop_when_complete = True
        try:
            yield
        except _Complete:
            pass
        finally:
            self._stop_when_complete = False

    def _record(self, layer: str, output: Any) -> Any:
        """Keep a layer's output and hand a copy on, so that an in-place operation behind the tap cannot reach it."""
        if torch._C._current_graph_task_id() != -1:
            return None  # a backward runs a checkpointed layer again, and nobody works on what that puts out
        call = len(self._outputs[layer])
        (form,) = {request.grid for request in self._requests.values() if request.layer == layer}
        kept: dict[str, Tensor] = {}
        replacements: dict[str, Tensor] = {}
        for key, tensor in entries_of(output).items():
            for request in self._requests.values():
                if request.layer == layer and _covers(request, key, call):
                    name = _name(layer, key, None if request.call is None else call, form)
                    grid = self._grid(name, form, tensor) if form else None
                    kept[key] = tensor if grid is None else grid.map_of(tensor)
                    edited = self._edit(name, kept[key]) if self._edit else kept[key].clone()
                    replacements[key] = edited if grid is None else grid.tokens_of(edited, tensor)
                    break
        self._outputs[layer].append(kept)
        if self._stop_when_complete and all(self._is_complete(request) for request in self._requests.values()):
            raise _Complete
        return _replaced(output, replacements)

    def _note_input(self, _: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        images = [x for x in (*inputs, *named.values()) if isinstance(x, Tensor) and x.ndim == 4]
        self._input = tuple(images[0].shape) if images else None

    def _grid(self, name: str, form: str, tokens: Tensor) -> TokenGrid:
        """Where the patches of the form `PATCH` or `PATCH+PREFIX` lie; raises AcamkdError where it cannot be."""
        shape, (patch, _, prefix) = tuple(tokens.shape), form.partition("+")
        if self._input is None:
            raise AcamkdError(f"the tap {name} needs the size of the images, and the network itself was given none")
        images, _, height, width = self._input
        side = int(patch)
        if height % side or width % side:
            raise AcamkdError(f"the tap {name}: images of {height} x {width} are not made of patches of {patch} pixels")
        h, w = height // side, width // side
        if len(shape) != 3 or shape[0] != images or shape[1] < h * w + int(prefix or 0):
            raise AcamkdError(
                f"the tap {name}: the layer gives {shape}, which are not the tokens (N, L, C) of {images} images with "
                f"{h} x {w} patches of {patch} pixels{f' and {prefix} before them' if prefix else ''}"
            )
        before = int(prefix) if prefix else shape[1] - h * w
        if not prefix and before > MAX_PREFIX:
            raise AcamkdError(
                f"the tap {name}: {before} of {shape[1]} tokens are no patches of {patch} pixels: give the side of a "
                f"patch, and how many tokens come before the first one, as in {name.partition('#')[0]}#{patch}+1"
            )
        return TokenGrid(h, w, before)

    def _is_complete(self, request: _Request) -> bool:
        return request.call != "*" and len(self._outputs[request.layer]) > int(request.call or 0)

    def _resolve(self, request: _Request) -> dict[str, Tensor]:
        calls = self._outputs.get(request.layer, [])
        shown = _name(request.layer, request.key or "", request.call, request.grid)
        if not calls:
            raise AcamkdError(f"the tap {shown} did not fire: the forward did not run this layer")
        if request.call is None and len(calls) > 1:
            raise AcamkdError(
                f"the layer {request.layer} ran {len(calls)} times in one forward: "
                f"name one call ({shown}@0 ... {shown}@{len(calls) - 1}) or all ({shown}@*)"
            )
        wanted = range(len(calls)) if request.call == "*" else [int(request.call or 0)]
        if max(wanted) >= len(calls):
            raise AcamkdError(f"the tap {shown} did not fire: the layer ran {len(calls)} times (calls count from 0)")
        found = {
            _name(request.layer, key, None if request.call is None else index, request.grid): output
            for index in wanted
            for key, output in calls[index].items()
            if _covers(request, key, index)
        }
        if not found:
            raise AcamkdError(
                f"the tap {shown} did not fire: the layer's output has no such entry; a plain tensor is tapped by "
                f"{request.layer!r} alone, the entries of a dict, list or tuple by {request.layer + ':*'!r}"
            )
        return found


def probe_batch(model: TaskModel) -> Batch:
    """An image that is always the same, and takes no random number of the run."""
    image = torch.rand(3, *PROBE_SIZE, generator=torch.Generator().manual_seed(0))
    return model.prepare([image.to(model.mean.device)])


@torch.no_grad()
def probe(model: FeatureModel, names: Sequence[str], batch: Batch) -> dict[str, Tensor]:
    """The outputs that some names stand for, `*` expanded, from one forward in eval mode."""
    with keeping_modes(model), FeatureTap(model.eval().net, names) as tap:
        model(batch)
        return tap.features()


def layer_of(name: str) -> str:
    """The module's path in a name; raises AcamkdError if it is none."""
    return _parse(name).layer


_Record = Callable[[Any], Any]

_RECORDS: WeakKeyDictionary[nn.Module, list[_Record]] = WeakKeyDictionary()
"""Of each layer of a compiled network that was ever tapped, what its hook is to call: one entry per open tap."""


def _is_compiled(modules: Iterable[nn.Module]) -> bool:
    dynamo = sys.modules.get("torch._dynamo")  # nothing is compiled without it, and its import takes seconds
    return dynamo is not None and any(
        module._compiled_call_impl is not None or isinstance(module, dynamo.OptimizedModule) for module in modules
    )


def _hooked_for_good(module: nn.Module) -> list[_Record]:
    """What the hook of a compiled network's layer is to call; its first tap gives it the hook."""
    if module not in _RECORDS:
        _RECORDS[module] = []
        module.register_forward_hook(torch.compiler.disable(_call_records))  # type: ignore[no-untyped-call]
        torch._dynamo.reset()  # what was compiled so far knows of no hook
        keep_saved_tensors()
    return _RECORDS[module]


def keep_saved_tensors() -> None:
    """Let compiled backwards overwrite nothing: look-ahead and the audit differentiate a graph that they keep."""
    from torch._functorch import config

    config.donated_buffer = False


def _call_records(module: nn.Module, _: Any, output: Any) -> Any:
    for record in _RECORDS.get(module, ()):
        changed = record(output)
        output = output if changed is None else changed
    return output


def _parse(name: str) -> _Request:
    match = _GRAMMAR.fullmatch(name)
    if match is None:
        raise AcamkdError(
            f"{name!r} is not a tap: write layer, layer:key, layer:* or, for tokens, layer#PATCH or "
            "layer#PATCH+PREFIX; each also with @call"
        )
    grid = "" if match["patch"] is None else name.partition("#")[2].partition("@")[0]
    return _Request(match["layer"], match["key"], match["call"], grid)


def _name(layer: str, key: str, call: int | str | None, grid: str = "") -> str:
    return layer + (f":{key}" if key else "") + (f"#{grid}" if grid else "") + (f"@{call}" if call is not None else "")


def _covers(request: _Request, key: str, call: int) -> bool:
    """Whether a request asks for this entry of this call."""
    key_fits = key != "" if request.key == "*" else key == (request.key or "")
    return key_fits and request.call in (None, "*", str(call))


def entries_of(output: Any) -> dict[str, Tensor]:
    """Tensors in a layer's output by key; a plain tensor has the empty key."""
    if isinstance(output, Tensor):
        return {"": output}
    if isinstance(output, Mapping):
        return {str(key): value for key, value in output.items() if isinstance(value, Tensor)}
    if isinstance(output, (list, tuple)):
        return {str(index): value for index, value in enumerate(output) if isinstance(value, Tensor)}
    return {}


def _replaced(output: Any, entries: Mapping[str, Tensor]) -> Any:
    """The same kind of output with some of its tensors replaced."""
    if not entries:
        return output
    if isinstance(output, Tensor):
        return entries[""]
    if isinstance(output, Mapping):
        result: Any = copy.copy(output)
        for key in output:
            if str(key) in entries:
                result[key] = entries[str(key)]
        return result
    items = [entries.get(str(index), value) for index, value in enumerate(output)]
    return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
