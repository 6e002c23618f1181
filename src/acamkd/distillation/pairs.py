"""Layers of a teacher and a student that can be tapped, and which of them to compare: `pairs: auto`."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import groupby
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from acamkd.config import Loss
from acamkd.distillation.methods import find
from acamkd.distillation.taps import entries_of, layer_of, probe
from acamkd.errors import AcamkdError
from acamkd.losses.base import HeadLoss
from acamkd.models.base import Batch, FeatureModel, TaskModel, keeping_modes

log = logging.getLogger(__name__)

GivenPair: TypeAlias = str | tuple[str, str]
"""As in a recipe: one name for both networks, or the student's and the teacher's."""

SIDE = 256
"""Pixels of the blank square image that the networks are run on."""
DEPTH = 2
"""Depth of the listed layers, which are stages rather than single convolutions."""
UNPADDED = 0.85
"""Least share of a padded map's side that a map has whose network does not pad; what is smaller was pooled."""
AUXILIARY = ("aux_classifier", "auxiliary_head")
"""How the names of heads begin that predict nothing."""


@dataclass(frozen=True)
class Layer:
    """A layer output that can be tapped.

    Attributes:
        name: Name in the grammar of `pairs`.
        channels: Number of channels.
        stride: Image pixels per location of the feature map.
    """

    name: str
    channels: int
    stride: int


class NoPairsError(AcamkdError):
    """Two networks have no layers in common."""


def resolve_pairs(student: TaskModel, teacher: FeatureModel, entries: Sequence[Loss]) -> tuple[Loss, ...]:
    """Put the layers of `propose` in the place of `pairs: auto`; a method that compares heads needs none.

    Raises:
        AcamkdError: The two networks have no layers in common; the entry is named.
    """
    proposal = cache(partial(propose, teacher, student))  # it runs both networks
    return tuple(
        _resolved(f"losses.{index} ({entry.name})", entry, proposal) if entry.pairs == "auto" else entry
        for index, entry in enumerate(entries)
    )


def _resolved(where: str, entry: Loss, proposal: Callable[[], Sequence[GivenPair]]) -> Loss:
    try:
        if issubclass(find(entry.name), HeadLoss):
            return entry.model_copy(update={"pairs": ()})
        pairs = tuple(proposal())
    except NoPairsError as error:
        raise AcamkdError(
            f"{where}: `pairs: auto`: {error}: name the layers yourself, acamkd inspect RECIPE lists those of both"
        ) from error
    except AcamkdError as error:
        raise AcamkdError(f"{where}: {error}") from error
    log.info(
        "%s: pairs: auto stands for %s",
        entry.name, ", ".join(pair if isinstance(pair, str) else " <- ".join(pair) for pair in pairs),
    )  # fmt: skip
    return entry.model_copy(update={"pairs": pairs})


def blank_batch(student: TaskModel) -> Batch:
    """A black square image, as the student prepares it for both networks."""
    return student.prepare([torch.zeros(3, SIDE, SIDE, device=student.mean.device)])


@torch.no_grad()
def layers(model: FeatureModel, batch: Batch) -> list[Layer]:
    """What of a network can be tapped, in the order in which it runs; of equal maps in a row the last.

    The layers that the network itself calls comparable are all among them.
    """
    found: list[Layer] = []
    named = model.comparable_layers()
    calls: dict[str, int] = {}

    def record(name: str, module: nn.Module, output: Any) -> None:
        call = calls[name] = calls.get(name, -1) + 1
        for key, x in entries_of(output).items():
            if x.ndim == 4 and x.shape[1] and min(x.shape[-2:]) > 1:
                layer = _layer(name + (f":{key}" if key else "") + (f"@{call}" if call else ""), x, batch)
                padded = [-(-side // layer.stride) for side in batch.input_size]
                if any(not UNPADDED * of <= own <= of for own, of in zip(x.shape[-2:], padded, strict=True)):
                    continue  # not in the shape of the image: queries
                last = found[-1] if found else None
                if last and (last.channels, last.stride) == (layer.channels, layer.stride) and last.name not in named:
                    found.pop()
                found.append(layer)

    handles = [
        module.register_forward_hook(lambda module, _inputs, output, name=name: record(name, module, output))
        for name, module in model.net.named_modules()
        if name in named or (name and name.count(".") < DEPTH)
    ]
    try:
        with keeping_modes(model):
            model.eval()(batch)
    finally:
        for handle in handles:
            handle.remove()
    return [*found, *(layer for layer in _comparable(model, batch) if layer not in found)]


def _comparable(model: FeatureModel, batch: Batch) -> list[Layer]:
    """The layers that a network itself calls comparable."""
    return [_layer(name, x, batch) for name, x in probe(model, model.comparable_layers(), batch).items()]


def _layer(name: str, x: Tensor, batch: Batch) -> Layer:
    """A layer with its stride: a power of two that is little below, where a network does not pad its maps."""
    ratio = max(side / own for side, own in zip(batch.input_size, x.shape[-2:], strict=True))
    power = 2 ** int(math.log2(max(ratio, 1)))
    return Layer(name, x.shape[1], power if ratio <= 4 / 3 * power else int(ratio))


def propose(teacher: FeatureModel, student: TaskModel) -> list[GivenPair]:
    """The layers that the methods were published for: every level of a detector's pyramid, a segmenter's logits.

    Segmenters without logits (a class and a mask per query), or of other classes, are paired by levels, as detectors
    are. Where a network names no layers for this, the last of each stride stands in. A teacher without a head that has
    no stride in common, such as a ViT with patches of 14 pixels, meets the student's level of the nearest stride.

    Raises:
        NoPairsError: The networks have no such layers in common.
    """
    batch = blank_batch(student)
    if student.task == "segmentation" and isinstance(teacher, TaskModel) and teacher.num_classes == student.num_classes:
        ours, theirs = (_logits(layers(model, batch), model) for model in (student, teacher))
        if ours and theirs:
            return [_pair(ours, theirs)]
    levels = [{layer.stride: layer for layer in _features(model, batch)} for model in (student, teacher)]
    shared = [stride for stride in levels[0] if stride in levels[1]]
    if not shared and levels[0] and levels[1] and not isinstance(teacher, TaskModel):
        near = {min(levels[0], key=lambda own: abs(math.log(own / each))): each for each in levels[1]}
        return [_pair(levels[0][own], levels[1][each]) for own, each in near.items()]
    if not shared:
        own, other = (f"{x.net_name} {sorted(each)}" for x, each in zip((student, teacher), levels, strict=True))
        raise NoPairsError(f"the feature maps have no stride in common: the student {own}, the teacher {other}")
    names = student.comparable_layers()
    if names and names == teacher.comparable_layers() and len(shared) == len(levels[0]) == len(levels[1]) > 1:
        return list(names)
    return [_pair(levels[0][stride], levels[1][stride]) for stride in shared]


def _features(model: FeatureModel, batch: Batch) -> list[Layer]:
    """The layers that a network calls comparable, or else all of them; neither logits nor the image itself."""
    named = _comparable(model, batch)
    found = named or layers(model, batch)
    if not isinstance(model, TaskModel) or (named and model.task == "detection"):
        return found
    left_out = [*_class_maps(found, model), *(layer for layer in found if layer.name.startswith(AUXILIARY))]
    return [layer for layer in found if (layer.channels, layer.stride) != (3, 1) and layer not in left_out]


def _logits(found: Sequence[Layer], model: TaskModel) -> Layer | None:
    """The last of the class maps before it is brought to the image's size, where it is."""
    logits = _class_maps(found, model)
    return next((layer for layer in reversed(logits) if layer.stride > 1), logits[-1] if logits else None)


def _class_maps(found: Sequence[Layer], model: TaskModel) -> list[Layer]:
    """The last maps in a row with one channel per class; an earlier map may have as many channels by chance."""
    ours = [layer for layer in found if not layer.name.startswith(AUXILIARY)]
    runs = [list(run) for fits, run in groupby(ours, lambda layer: layer.channels == model.num_classes) if fits]
    return runs[-1] if runs else []


def class_parts(model: TaskModel, batch: Batch) -> set[str]:
    """The parts of a segmenter, by their names in it, that give one channel per class."""
    return {layer_of(layer.name).split(".")[0] for layer in _class_maps(layers(model, batch), model)}


def _pair(ours: Layer, theirs: Layer) -> GivenPair:
    return ours.name if ours.name == theirs.name else (ours.name, theirs.name)
