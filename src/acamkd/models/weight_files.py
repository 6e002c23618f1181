"""Weights files: reading without running code, and selection of the state dict that fits a network."""

from __future__ import annotations

import logging
import pickle
import re
import types
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy._core import multiarray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from acamkd.errors import AcamkdError
from acamkd.models.convert import convention_of

log = logging.getLogger(__name__)

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]

Located: TypeAlias = tuple[tuple[str, ...], dict[str, Tensor]]
"""A state dict, with the keys or names that lead to it."""

WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Name parts that torch's compiler and wrappers insert."""

DEPTH = 3
"""Keys that may contain a state dict, and name prefixes within one, that are searched."""

_HARMLESS: list[Any] = [
    np.ndarray, np.dtype, (multiarray._reconstruct, "numpy.core.multiarray._reconstruct"), multiarray._reconstruct,
    (multiarray.scalar, "numpy.core.multiarray.scalar"), multiarray.scalar,
    *{type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"},
]  # fmt: skip
"""NumPy's scalars and arrays, which trainings save beside the weights."""


class DamagedFileError(AcamkdError):
    """A file that is truncated, or not of the type of its suffix."""


def read_tensors_file(path: Path, own: Shapes | None) -> dict[str, Tensor]:
    """The state dict in a .safetensors, .pth or .pt file that fits a network with tensors of these shapes best."""
    if path.suffix != ".safetensors":
        return choose(read_file(path), path, own)
    _check_readable(path)
    try:
        return choose(load_file(path), path, own)
    except SafetensorError as error:
        raise AcamkdError(f"weights {path}: the file is damaged ({error}); copy it again") from error


def read_file(path: Path) -> Any:
    """Read a file of torch.save to the CPU, without running any code that it may name.

    Raises:
        DamagedFileError: It cannot be read.
        AcamkdError: It may not be read, or holds more than tensors and plain values.
    """
    _check_readable(path)
    if _is_torchscript(path):
        raise AcamkdError(
            f"{path} is a TorchScript archive, whose code would run: where you trust it, take the weights out once: "
            f"torch.save(torch.jit.load({str(path)!r}, map_location='cpu').state_dict(), 'NEW.pth')"
        )
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file may raise any error
        if blocked := re.search(r"unsupported GLOBAL ([\w.]+) whose module \w+ is blocked", str(error)):
            raise AcamkdError(
                f"{path}: the file would call {blocked[1]}; no file of weights does: delete it"
            ) from error
        found = re.search(r"Unsupported (?:global|class)\W+(?:GLOBAL )?([\w.]*)", str(error))
        if not found:
            raise DamagedFileError(f"{path}: the file is damaged, or no PyTorch file; copy it again") from error
        raise AcamkdError(
            f"{path}: the file holds Python objects beside tensors ({found[1]}), and reading those can run any code. "
            f"{_conversion(path, found[1])}"
        ) from error


def _check_readable(path: Path) -> None:
    """Raise AcamkdError if the file cannot be opened, which what reads it would take for something else."""
    try:
        path.open("rb").close()
    except OSError as error:
        raise AcamkdError(f"cannot read {path}: {error.strerror}") from error


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _is_zip(path: Path) -> bool:
    """Whether torch reads a file as an archive: by its first bytes, where zipfile looks at the last ones."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _conversion(path: Path, first: str) -> str:
    """Advice for extracting the weights from a file with Python objects, of which torch named the first."""
    if not _is_zip(path):  # the older format, whose outline takes several steps
        return (
            "Where you trust it, write it in today's format, of which acamkd then says what to take: "
            f"torch.save(torch.load({str(path)!r}, map_location='cpu', weights_only=False), 'NEW.pth')"
        )
    content = _outline(path)
    names = [name for name in torch.serialization.get_unsafe_globals_in_checkpoint(path) or [first]
             if not name.startswith("numpy.")]  # fmt: skip
    if isinstance(content, _Stub):
        return (
            f"It is a whole {content.name}. Where you trust it and its package is installed, convert it once: "
            f"torch.save(torch.load({str(path)!r}, map_location='cpu', weights_only=False).state_dict(), 'NEW.pth')"
        )
    modules = [key for key, value in content.items() if isinstance(value, _Stub) and value.is_module]
    dicts = [keys for keys, _ in state_dicts(content)]
    held = f"its keys are {', '.join(map(str, content))}" if content else "no key is readable"
    if dicts and not modules:
        classes = ", ".join(names)
        return (
            f"Where you know the class to be harmless, convert it once ({held}): with torch.serialization.safe_globals("
            f"[{classes}]): torch.save(torch.load({str(path)!r}, weights_only=True){_subscripts(dicts[0])}, 'NEW.pth')"
        )
    if modules:
        preferred = next((key for key in modules if _is_average(str(key))), modules[0])
        return (
            f"{', '.join(map(str, modules))} of its keys ({', '.join(map(str, content))}) are whole modules. Where you "
            "trust it and its package is installed, convert it once: torch.save(torch.load("
            f"{str(path)!r}, map_location='cpu', weights_only=False)[{preferred!r}].state_dict(), 'NEW.pth')"
        )
    return f"No state dict is in it ({held}): save one by torch.save(net.state_dict(), FILE)"


class _Stub:
    """Placeholder for an object of a class that must not run."""

    name = ""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        self.is_module = isinstance(state, Mapping) and "_parameters" in state

    def __call__(self, *_: Any, **__: Any) -> _Stub:
        return self

    is_module = False


class _Outliner(pickle.Unpickler):
    """Reads the outline of a pickle: tensors as torch rebuilds them, a stub for everything else."""

    def find_class(self, module: str, name: str) -> Any:
        """Torch's own rebuilding of tensors, or a stub."""
        if (module, name) == ("collections", "OrderedDict") or (
            module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_parameter")
        ) or (module in ("torch", "torch.storage") and name.endswith("Storage")):  # fmt: skip
            return super().find_class(module, name)
        return type(name, (_Stub,), {"name": f"{module}.{name}"})


def _refuse(*_: Any, **__: Any) -> Any:
    raise pickle.UnpicklingError("the outline alone is read")


def _outline(path: Path) -> Any:
    """Content of an archive, with stubs for its Python objects; an empty mapping if it cannot be read."""
    shim = types.SimpleNamespace(
        Unpickler=_Outliner, load=_refuse, loads=_refuse, UnpicklingError=pickle.UnpicklingError, __name__="outline",
    )  # fmt: skip
    try:
        content = torch.load(path, map_location="cpu", pickle_module=shim, weights_only=False)
    except Exception:  # the result only improves a message
        return {}
    return content if isinstance(content, (Mapping, _Stub)) else {}


def state_dicts(content: Any, keys: tuple[str, ...] = ()) -> Iterator[Located]:
    """Every mapping from names to tensors that a file holds, with the keys that lead to it."""
    if not isinstance(content, Mapping):
        return
    arrays = {k: torch.as_tensor(v) if _is_array(v) else v for k, v in content.items() if isinstance(k, str)}
    if tensors := {name: value for name, value in arrays.items() if isinstance(value, Tensor)}:
        yield keys, tensors
    if len(keys) < DEPTH:
        for key, value in content.items():
            if isinstance(key, str):
                yield from state_dicts(value, (*keys, key))


def choose(content: Any, path: Path, own: Shapes | None = None) -> dict[str, Tensor]:
    """Select the state dict that fits best; if an average of the weights (EMA) fits equally well, the average.

    Wrappers' names are removed, and so are normalization statistics, which are no part of a network here.

    Args:
        content: Content of the file.
        path: The file, for messages.
        own: Shapes of the network's tensors by name; None = the largest state dict is taken as it is.

    Raises:
        AcamkdError: There is none.
    """
    found = [(keys, _cleaned(tensors, path)) for keys, tensors in state_dicts(content)]
    found = [(keys, tensors) for keys, tensors in found if tensors]
    if not found:
        held = f"its keys are {', '.join(map(str, content))}; " if isinstance(content, Mapping) and content else ""
        raise AcamkdError(f"weights {path}: no state dict in it; {held}save one by torch.save(net.state_dict(), FILE)")
    if own is None:
        return _largest(found)
    flat = {name.replace(".", "_"): tuple(shape) for name, shape in own.items()}
    ranked = [
        (_fitting(part, flat), _is_average(where), -index, where, part)
        for index, (where, part) in enumerate(
            (".".join((*keys, *names)), part) for keys, tensors in found for names, part in _parts(tensors)
        )
    ]
    best, _, _, taken, tensors = max(ranked, key=lambda each: each[:3])
    if not best:
        return _largest(found)
    others = [where for fits, _, _, where, _ in ranked if 2 * fits > best and where != taken]
    if others:
        log.warning(
            "%s holds several sets of weights that fit: %s is taken, not %s; save another one alone to take it",
            path, taken or "the outermost", ", ".join(other or "the outermost" for other in others),
        )  # fmt: skip
    return tensors


def _largest(found: Sequence[Located]) -> dict[str, Tensor]:
    return max((tensors for _, tensors in found), key=len)


def _parts(tensors: dict[str, Tensor], above: tuple[str, ...] = ()) -> Iterator[Located]:
    """A state dict, and the nested ones below its name prefixes."""
    yield above, tensors
    if len(above) < DEPTH:
        groups: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            first, _, rest = name.partition(".")
            if rest:
                groups.setdefault(first, {})[rest] = tensor
        for first, group in groups.items():
            yield from _parts(group, (*above, first))


def _fitting(tensors: Mapping[str, Tensor], own: Shapes) -> int:
    """Number of matching tensors; for another framework's detector, of all that will be renamed."""
    if convention_of(tensors) != "torchvision":
        return len(tensors)
    return sum(own.get(name.replace(".", "_")) == tuple(tensor.shape) for name, tensor in tensors.items())


def _cleaned(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    cleaned = {}
    for name, tensor in tensors.items():
        *_, last = parts = [part for part in name.split(".") if part not in WRAPPERS]
        if last in ("mean", "std", "pixel_mean", "pixel_std") and tensor.numel() == 3:
            log.info("%s: %s is %s: compare it with `mean` and `std`, in [0, 1] here", path, name,
                     [round(value, 4) for value in tensor.flatten().tolist()])  # fmt: skip
        else:
            cleaned[".".join(parts)] = tensor
    return cleaned


def _is_average(where: str) -> bool:
    return re.search(r"(?:^|[^a-z])ema(?:[^a-z]|$)", where) is not None


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.ndim > 0 and value.dtype.kind in "fiub"


def _subscripts(keys: tuple[str, ...]) -> str:
    return "".join(f"[{key!r}]" for key in keys)
