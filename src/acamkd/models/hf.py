"""Networks of transformers, by model type, folder or name on the Hub; `pip install 'acamkd[hf]'`."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from acamkd.config import Model, ShortLong
from acamkd.config.schema import is_place
from acamkd.errors import AcamkdError, nearest, refuse_unknown
from acamkd.models.base import Family, PixelSize, Task
from acamkd.models.hf_base import HFModel, read_processor
from acamkd.models.hf_detection import HFDetector
from acamkd.models.hf_kinds import KINDS, PREFIX, Kind
from acamkd.models.hf_segmentation import HFQuerySegmenter, HFSegmenter
from acamkd.models.weights import hub_errors

log = logging.getLogger(__name__)

OLDEST = (5, 13)
"""Version of transformers, the first that is known to have every model type."""

CLASSES: dict[str, type[HFModel]] = {"boxes": HFDetector, "map": HFSegmenter, "queries": HFQuerySegmenter}
"""By a kind's output."""


def transformers() -> Any:
    """The package; raises AcamkdError where it is absent or too old."""
    advice = "pip install 'acamkd[hf]'"
    try:
        package = importlib.import_module("transformers")
    except ImportError as error:
        raise AcamkdError(f"networks of transformers (arch: {PREFIX}...) need a package more: {advice}") from error
    if tuple(int(part) for part in package.__version__.split(".")[:2]) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise AcamkdError(f"transformers {package.__version__} is too old, {oldest} or newer is needed: {advice}")
    return package


@dataclass(frozen=True)
class HFFamily(Family):
    """A recipe's `hf/MODEL_TYPE`, `hf/FOLDER` or `hf/HUB-ID` of one task."""

    def holds(self, arch: str) -> bool:
        """Whether it is one of these; a folder's or a Hub name's configuration is read for it."""
        return arch.startswith(PREFIX) and _kind(_type_of(arch.removeprefix(PREFIX))).task == self.task


def _names(task: Task) -> Collection[str]:
    return [PREFIX + name for name, kind in KINDS.items() if kind.task == task] + [PREFIX]


def _type_of(name: str) -> str:
    """Model type of a folder or of a name on the Hub, or the type itself."""
    if name in KINDS:
        return name
    if not is_place(name):
        raise AcamkdError(f"{PREFIX}{name} is no folder with a config.json and no model type; {nearest(name, KINDS)}")
    with _loading(name):
        model_type: str = transformers().AutoConfig.from_pretrained(name).model_type
    return model_type


def _kind(model_type: str) -> Kind:
    if model_type not in KINDS:
        raise AcamkdError(f"the model type {model_type} is not supported; {nearest(model_type, KINDS)}")
    return KINDS[model_type]


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """Advice for what goes wrong with a folder or on the Hub."""
    if Path(name).is_dir():
        try:
            yield
        except AcamkdError:
            raise
        except (OSError, ValueError) as error:
            raise AcamkdError(f"transformers cannot read {name}: {error}") from error
    else:
        advice = f"give a folder that holds them (arch: {PREFIX}FOLDER), or a model type, which starts at random"
        with hub_errors(name, "arch", advice):
            yield


def build_hf(model: Model, num_classes: int, resize: PixelSize | ShortLong | None) -> HFModel:
    """Build a network of transformers.

    `hf/MODEL_TYPE` starts at random, with `model.options` as its configuration. A folder or a name on the Hub brings
    its weights, and its head where the number of classes is the same; `options` then change its configuration. With
    `model.weights` nothing but the configuration is read, from beside that file where it lies there.

    Raises:
        AcamkdError: transformers is missing, or something named in the recipe does not exist.
    """
    package = transformers()
    source = name = model.arch.removeprefix(PREFIX)
    if model.weights is not None and name not in KINDS:
        folder = Path(model.weights).parent
        source = str(folder) if (folder / "config.json").is_file() else name
    kind = _kind(_type_of(source))
    options = dict(model.options)
    if name in KINDS:
        refuse_unknown(model.arch, model.options, package.AutoConfig.for_model(name).to_dict())
        if kind.is_fixed and isinstance(resize, tuple) and resize[0] == resize[1]:
            options = {"image_size": resize[0], **options}
        with _fitting(model):
            config = package.AutoConfig.for_model(name, **options)
    else:
        with _loading(source):
            refuse_unknown(model.arch, model.options, package.AutoConfig.from_pretrained(source).to_dict())
            with _fitting(model):
                config = package.AutoConfig.from_pretrained(source, **options)
    if config.num_labels != num_classes:
        config.num_labels = num_classes
    if kind.is_fixed:
        resize = _fixed_size(model, config.image_size, resize)
    processor = _processor(package, kind, None if name in KINDS else source)
    preprocessing = read_processor(processor.to_dict(), resize)
    auto = getattr(package, kind.auto_class)
    with _fitting(model):
        net = auto.from_config(config)
    if name not in KINDS and model.weights is None:
        with _loading(source):
            _take_over(net, auto.from_pretrained(source), source)
    preprocessing = replace(preprocessing, mean=model.mean or preprocessing.mean, std=model.std or preprocessing.std)
    return CLASSES[kind.output](net, kind, num_classes, processor, preprocessing)


@contextmanager
def _fitting(model: Model) -> Iterator[None]:
    """Name the options where transformers cannot use them; it has exceptions of many kinds for that."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())
        raise AcamkdError(f"{model.arch} cannot be built: {reason}; its options are {model.options}") from error


def _fixed_size(model: Model, side: int | list[int], resize: PixelSize | ShortLong | None) -> PixelSize:
    """The one size that a network takes; raises AcamkdError where the recipe asks for another."""
    fixed = (side, side) if isinstance(side, int) else (side[0], side[1])
    if resize not in (None, fixed):
        raise AcamkdError(f"{model.arch} takes images of one size alone: set data.resize to {list(fixed)}")
    return fixed


def _processor(package: Any, kind: Kind, source: str | None) -> Any:
    """The image processor of a folder or a name on the Hub, or the model type's own."""
    if source is not None and not (Path(source).is_dir() and not (Path(source) / "preprocessor_config.json").is_file()):
        with _loading(source):
            return package.AutoImageProcessor.from_pretrained(source)
    return getattr(package, kind.processor)()


def _take_over(net: nn.Module, trained: nn.Module, source: str) -> None:
    """Give a network what it shares with a trained one; the head of other classes has other shapes.

    In this way rather than by `ignore_mismatched_sizes`, which fails on heads that share their tensors.
    """
    own = net.state_dict()
    shared = {
        key: tensor for key, tensor in trained.state_dict().items() if key in own and tensor.shape == own[key].shape
    }
    net.load_state_dict(shared, strict=False)
    if fresh := [key for key in own if key not in shared]:
        log.warning(
            "%s: %d of %d tensors are not there in this shape and start at random: %s%s",
            source, len(fresh), len(own), ", ".join(fresh[:3]), ", ..." if len(fresh) > 3 else "",
        )  # fmt: skip


TASKS: tuple[Task, ...] = ("detection", "segmentation")

FAMILIES = tuple(HFFamily(task, partial(_names, task), build_hf) for task in TASKS)
"""One for each task."""
