"""Recipes: what a YAML file may say. Imports no torch, so that the command line answers at once."""

from __future__ import annotations

import importlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from acamkd.errors import AcamkdError, nearest

log = logging.getLogger(__name__)

Size: TypeAlias = tuple[Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)]]
"""(height, width) in pixels."""

Positive: TypeAlias = Annotated[int, Field(gt=0)]
Fraction: TypeAlias = Annotated[float, Field(ge=0, le=1)]
Deviation: TypeAlias = Annotated[float, Field(gt=0)]
FileName: TypeAlias = Annotated[str, Field(pattern=r"^[\w.-]+$")]
"""What files and folders can be called."""


class Section(BaseModel):
    """A mapping in a recipe; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


FORMATS: dict[str, tuple[str, ...]] = {
    "coco": ("detection",),
    "yolo": ("detection",),
    "voc": ("detection", "segmentation"),
    "masks": ("segmentation",),
    "cityscapes": ("segmentation",),
}
"""`data.format` -> tasks that it is for."""


class Split(Section):
    """Where one split lies: by `name`, in the format's own layout, or by `images`, with paths below `data.root`."""

    name: str | None = None
    """Such as `val`, `trainval` (VOC) or `train2017` (COCO)."""
    images: Path | None = None
    """Folder of pictures."""
    masks: Path | None = None
    """Format masks: folder of PNG masks, one per picture, of the same name."""
    annotations: Path | None = None
    """Format coco: the JSON, if it is not the one of this `name`. Format yolo: folder of labels, if it is not beside
    `images`."""

    @model_validator(mode="after")
    def _check(self) -> Split:
        if (self.name is None) == (self.images is None):
            raise ValueError("give either the split's `name` in the format's own layout, or its `images`")
        return self


class Augmentation(Section):
    """Random changes of the training pictures, in the pictures' own pixels, before `data.resize`."""

    scale: tuple[float, float] | None = None
    """Range of a random factor on both sides, drawn evenly."""
    crop: Size | None = None
    """(height, width) of a random crop; smaller pictures are padded."""
    flip: Fraction = 0.5
    """Probability of a horizontal flip."""
    photometric: bool = False
    """Random brightness, contrast, saturation and hue."""

    @model_validator(mode="after")
    def _check(self) -> Augmentation:
        if self.scale is not None and not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale must be a range of factors above 0, such as [0.5, 2], not {list(self.scale)}")
        return self


class ShortLong(Section):
    """Resize so that the short side has `short` pixels, unless the long side would pass `long`."""

    short: Positive
    long: Positive


class Data(Section):
    """Pictures and targets."""

    format: Literal["auto", "coco", "yolo", "voc", "masks", "cityscapes"] = "auto"
    """`coco`: pictures and a COCO JSON. `yolo`: pictures and text files. `voc`: Pascal VOC, boxes or masks. `masks`:
    pictures and 8-bit masks. `cityscapes`. `auto`: by what lies in `root`."""
    root: Path = Path()
    """Folder of the data; the splits' paths are relative to it."""
    train: Split = Split(name="train")
    val: Split = Split(name="val")
    classes: tuple[str, ...] | None = None
    """Class names in the order of their ids. Needed for masks; the other formats bring their own."""
    ignore_index: Annotated[int, Field(ge=0, le=255)] = 255
    """Format masks: mask value that neither trains nor counts."""
    unlabelled: Path | None = None
    """Folder of further pictures, relative to `root`, that only the distillation sees: each batch brings as many of
    them as it has labelled ones. Used by `distill` alone."""
    resize: Size | ShortLong | None = None
    """What the networks see: (height, width), or {short, long}; nothing = the pictures' own size."""
    augment: Augmentation = Augmentation()
    workers: Annotated[int, Field(ge=0)] = 2
    """Processes that load pictures."""
    check: Literal["full", "headers"] = "full"
    """Before training, decode every picture (full) or only read its header (headers)."""


class Model(Section):
    """One network."""

    arch: str
    """Detection: retinanet, fcos, faster_rcnn. Segmentation: an architecture of segmentation_models_pytorch
    (deeplabv3plus, fpn, unet, ...) or `torchvision/NAME`. Anything: `package.module:factory`."""
    backbone: str = "resnet50"
    """A timm name, or `torchvision/NAME`; for segmentation architectures any smp encoder name (`tu-NAME`: timm)."""
    weights: str | None = None
    """The whole network: a .safetensors, .pth or .pt file (of a detector also MMDetection's or detectron2's), or a
    torchvision weights name (`..._Weights.COCO_V1`)."""
    backbone_weights: str | None = "imagenet"
    """The backbone alone: `imagenet` (the framework's own), a file, or nothing."""
    fpn_channels: Positive = 256
    """Detection: width of the feature pyramid and of the heads."""
    options: dict[str, Any] = {}
    """Further arguments of the architecture's constructor."""
    num_classes: Positive | None = None
    """Teacher only: number of its own classes, where it was trained on others than the data's. It is not scored then,
    and losses may compare features, but no heads and no logits."""
    inherit: tuple[str, ...] = ()
    """Student only: parts (such as `head` or `backbone.fpn`) that start from the teacher's tensors."""
    mean: tuple[float, float, float] | None = None
    """Mean colour; nothing = what the backbone was pretrained with."""
    std: tuple[Deviation, Deviation, Deviation] | None = None
    """Standard deviation of the colours, likewise."""

    @field_validator("weights", "backbone_weights")
    @classmethod
    def _check_none(cls, given: str | None) -> str | None:
        if given is not None and given.lower() == "none":
            raise ValueError("YAML writes nothing as null")
        return given

    @property
    def title(self) -> str:
        """The architecture, with its backbone where the recipe chooses one."""
        is_whole = ":" in self.arch or self.arch.startswith("torchvision/")
        return self.arch if is_whole else f"{self.arch} on {self.backbone}"

    @property
    def convention(self) -> Any:
        """Whose conventions a detector follows: the option of that name, torchvision's where there is none."""
        return self.options.get("convention", "torchvision")


class Loss(BaseModel):
    """One method at one or more pairs of layers; every other key is an option of the method itself."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)

    name: str
    """See `acamkd methods`; or a class of your own, `package.module:Class`."""
    pairs: tuple[str | tuple[str, str], ...] = ()
    """Layers: `student_layer`, the same in both, or [student_layer, teacher_layer]. Grammar: `layer`, `layer:key` for
    one entry of a dict or tuple output, `layer:*` for all of them, `layer@2` for the third call."""
    preset: str | None = None
    """A published setting by name; options given here win over it."""
    ramp_epochs: Annotated[float, Field(ge=0)] = 0
    """The weight rises linearly from 0 to its value over this many epochs."""
    stop_epoch: Annotated[float, Field(gt=0)] | None = None
    """The loss is switched off from this epoch on."""
    gradient_ratio: Annotated[float, Field(gt=0)] = 0.5
    """`weight: auto` sets the weight, before the first step, so that the norm of this loss's gradient is this many
    times the norm of the task's gradient."""

    @property
    def is_auto(self) -> bool:
        """Whether the weight is still to be set by gradients; the recipe in a run folder holds the number."""
        return self.options.get("weight") == "auto"

    @property
    def options(self) -> dict[str, Any]:
        """The method's own options, as written in the recipe."""
        return dict(self.model_extra or {})


class Optimizer(Section):
    """The optimizer; the losses' own parameters form a group of their own."""

    name: Literal["sgd", "adamw"] = "adamw"
    lr: Annotated[float, Field(gt=0)] = 1e-3
    """Learning rate of the network; the peak where the schedule has one."""
    losses_lr: Annotated[float, Field(gt=0)] | None = None
    """Learning rate of the losses' own parameters; nothing = the network's."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    momentum: Fraction = 0.9
    """SGD only."""


class Schedule(Section):
    """How the learning rate moves, per optimisation step."""

    name: Literal["constant", "step", "polynomial", "one_cycle"] = "one_cycle"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Linear warm-up; one_cycle has one of its own (`pct_start`)."""
    milestones: tuple[Positive, ...] = ()
    """step: epochs at whose end the rate is multiplied by `gamma`."""
    gamma: Fraction = 0.1
    power: Annotated[float, Field(gt=0)] = 0.9
    """polynomial: exponent."""
    pct_start: Fraction = 0.3
    """one_cycle: share of the steps that rise."""

    @model_validator(mode="after")
    def _check(self) -> Schedule:
        if self.name == "one_cycle" and self.warmup_steps:
            raise ValueError("one_cycle brings its own warm-up: set pct_start, and leave warmup_steps out")
        if self.name == "step" and not self.milestones:
            raise ValueError("step needs milestones, such as [16, 22]")
        return self


class Train(Section):
    """One training run."""

    epochs: Positive
    steps_per_epoch: Positive | None = None
    """Optimisation steps that count as one epoch; nothing = one pass over the training pictures. What is published by
    iterations is written so: 40,000 of them, evaluated every 4,000, are 10 epochs of 4,000 steps."""
    batch_size: Positive = 8
    """Pictures per device and batch."""
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    precision: Literal["32", "bf16-mixed", "16-mixed"] = "32"
    """What the networks compute in; losses and weights are of 32 bits with each."""
    channels_last: bool = False
    """Student, teacher and losses keep weights and maps channels last: other rounding, and less time where convolutions
    are made for it, most of all with bf16-mixed (docs/performance.md)."""
    accumulate: Positive = 1
    """Batches per optimisation step."""
    clip: Annotated[float, Field(gt=0)] | None = None
    """Largest norm of the whole gradient."""
    sync_batchnorm: bool = False
    """Batch norm takes its statistics over the pictures of all devices, rather than over those of its own."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of first weights, order of the pictures, augmentation and everything else that is drawn."""
    eval_every: Positive = 1
    """Epochs between two evaluations; must divide `epochs`, so that the last one is evaluated."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A step whose loss or gradient is NaN or infinite ends the run (stop) or is left out, up to 10 in a row (skip);
    its pictures are kept in the run's folder `nonfinite`."""
    checkpoint_every: Positive | None = None
    """Optimisation steps between two checkpoints within an epoch; nothing = only at the ends of epochs."""
    accelerator: str = "auto"
    """Such as `cpu`, `gpu` or `mps`, by Lightning's names; `auto` takes what is there."""
    devices: int | Literal["auto"] = "auto"
    """Of each node, one or more; each takes batches of `batch_size`."""
    num_nodes: Positive = 1
    strategy: str = "auto"
    """How devices work together, by Lightning's names."""

    @field_validator("precision", mode="before")
    @classmethod
    def _name(cls, precision: Any) -> Any:
        return str(precision) if isinstance(precision, int) else precision  # YAML reads 32 as a number

    @field_validator("devices")
    @classmethod
    def _count(cls, devices: int | str) -> int | str:
        if isinstance(devices, int) and devices < 1:
            raise ValueError("give their number, or auto for all of them")
        return devices

    @model_validator(mode="after")
    def _check(self) -> Train:
        if self.epochs % self.eval_every:
            raise ValueError(f"eval_every {self.eval_every} does not divide epochs {self.epochs}")
        return self


class Search(Section):
    """The same small search for every method of a comparison, on the validation pictures and on seeds of its own."""

    option: str = "gradient_ratio"
    """Option of each entry of `losses`."""
    values: Annotated[tuple[float, ...], Field(min_length=2)] = (0.25, 0.5, 1.0)
    """What it is set to."""
    seeds: Positive = 1
    """Trainings per value."""


class Comparison(Section):
    """What `acamkd compare` runs beside the student alone."""

    methods: dict[FileName, dict[str, Any]] = {}
    """By name, which files get too, keys of this recipe to override: `{losses.0.weight: 3}`, or `{losses: [...]}`."""
    tune: Search | None = None
    """Nothing = every method runs with the weights that it is written with."""


class Recipe(Section):
    """Everything that a run depends on."""

    name: FileName
    """Letters, digits and `_.-`; runs go to `runs/NAME/`. In a file it may be left out, and is the file's name then."""
    task: Literal["detection", "segmentation"]
    data: Data
    teacher: Model | None = None
    student: Model
    losses: tuple[Loss, ...] = ()
    train: Train
    compare: Comparison = Comparison()

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        if self.data.format != "auto":
            check_data(self.data, self.task)
        if self.student.num_classes is not None:
            raise ValueError("student.num_classes: the student has the data's classes; only a teacher may have others")
        if self.teacher is not None and self.teacher.inherit:
            raise ValueError("teacher.inherit: only a student inherits, from the teacher")
        if self.student.inherit and self.teacher is None:
            raise ValueError("student.inherit needs a `teacher` section to inherit from")
        return self


def check_data(data: Data, task: str) -> None:
    """Raise AcamkdError if a format, now that it is known, does not fit the task or lacks something."""
    if task not in FORMATS[data.format]:
        fitting = [name for name, tasks in FORMATS.items() if task in tasks]
        raise AcamkdError(f"task {task} needs data.format: {', '.join(fitting)}, not {data.format}")
    source = {"coco": "annotations", "yolo": "annotations", "masks": "masks"}.get(data.format)
    for name in ("train", "val"):
        split: Split = getattr(data, name)
        for key in ("masks", "annotations"):
            if getattr(split, key) is not None and key != source:
                raise AcamkdError(f"data.{name}.{key}: data.format {data.format} does not read it")
        if source and data.format != "yolo" and split.images is not None and getattr(split, source) is None:
            raise AcamkdError(f"data.{name}.{source} is missing: data.format {data.format} needs it beside `images`")
        if data.format in ("voc", "cityscapes") and split.images is not None:
            raise AcamkdError(
                f"data.{name}.images: data.format {data.format} has folders of its own: give the split's `name` instead"
            )
    if data.format == "masks" and not data.classes:
        raise AcamkdError("data.classes is missing: masks hold ids only, so the recipe lists the class names")


def read_text(path: Path, what: str) -> str:
    """Read a text file of the user's; an AcamkdError calls it `what`."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise AcamkdError(f"cannot read the {what} {path}: {getattr(error, 'strerror', None) or error}") from error


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        path: YAML file.
        overrides: `key=value` assignments, such as `losses.0.weight=2`; values are YAML. Another `losses.N.name`
            also drops the options of the method that stood there, since they are not the new one's.

    Raises:
        AcamkdError: The file cannot be read, or does not fit; the message names every bad key.
    """
    try:
        raw = yaml.load(read_text(path, "recipe"), Loader=_Loader)
    except yaml.YAMLError as error:
        raise AcamkdError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise AcamkdError(f"{path} must hold a mapping with the keys {', '.join(Recipe.model_fields)}")
    raw.setdefault("name", path.stem)
    for assignment in overrides:
        _assign(raw, assignment)
    return parse(raw, source=str(path))


def parse(raw: Mapping[str, Any], source: str = "recipe") -> Recipe:
    """Validate a mapping as a recipe; raises AcamkdError that names every bad key."""
    try:
        # JSON mode is strict about types and still takes lists for tuples and strings for paths.
        return Recipe.model_validate_json(json.dumps(raw), strict=True)
    except ValidationError as error:
        lines = [_explain(entry) for entry in error.errors()]
        raise AcamkdError("\n  ".join([f"{source} does not fit:", *lines])) from error
    except TypeError as error:  # a YAML date, say
        raise AcamkdError(f"{source}: {error}; write it in quotes if it is meant as text") from error


def override(recipe: Recipe, assignments: Sequence[str]) -> Recipe:
    """A recipe with some keys changed, as `load` takes them; raises AcamkdError that names every bad key."""
    raw = recipe.model_dump(mode="json")
    for assignment in assignments:
        _assign(raw, assignment)
    return parse(raw, source=f"the recipe {recipe.name} with {', '.join(assignments)}")


def dump(recipe: Recipe) -> str:
    """Write a recipe as YAML, every default spelled out; `load` reads it back to an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def imported(reference: str, key: str) -> Any:
    """What `package.module:name` stands for; the log says what is imported.

    Raises:
        AcamkdError: There is no such thing; the recipe's `key` is named.
    """
    module, _, name = reference.partition(":")
    log.info("importing %s", reference)
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise AcamkdError(
            f"{key} {reference}: {error}; the module must be installed or lie on PYTHONPATH, and have {name}"
        ) from error


class _Loader(yaml.SafeLoader):
    """SafeLoader that also reads 1e-3 as a number, as YAML 1.2 and every user do, and refuses a key given twice."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if (key.tag, key.value) in seen:
                raise yaml.composer.ComposerError(None, None, f"{key.value} is given a second time", key.start_mark)
            seen.add((key.tag, key.value))
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def _assign(raw: dict[str, Any], assignment: str) -> None:
    """Carry out one `key=value` in the raw mapping."""
    key, separator, text = assignment.partition("=")
    if not separator or not key:
        raise AcamkdError(f"--set {assignment}: write key=value, such as train.epochs=20")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise AcamkdError(f"--set {assignment}: the value is not valid YAML: {error}") from error
    node: Any = raw
    *parents, last = key.split(".")
    for name in parents:
        node = _child(node, name, key)
    if isinstance(node, list):
        _child(node, last, key)
        node[int(last)] = value
        return
    if not isinstance(node, dict):
        raise AcamkdError(f"--set {key}: {'.'.join(parents)} is a single value and has no key {last}")
    if parents[:1] == ["losses"] and last == "name" and node.get("name") != value:
        for option in set(node) - set(Loss.model_fields) | ({"preset"} & set(node)):
            del node[option]
    node[last] = value


def _child(node: Any, name: str, key: str) -> Any:
    """The entry of a list, or of a mapping (where it is made if need be), on the way to `key`."""
    if isinstance(node, list):
        if not name.isdecimal() or int(name) >= len(node):
            raise AcamkdError(f"--set {key}: there is no entry {name}, the list has {len(node)} (counted from 0)")
        return node[int(name)]
    if not isinstance(node, dict):
        raise AcamkdError(f"--set {key}: {name} would lie below a single value")
    if node.get(name) is None:
        node[name] = {}
    return node[name]


def _explain(entry: Mapping[str, Any]) -> str:
    """One line for one validation error."""
    location = [str(part) for part in entry["loc"]]
    key = ".".join(part for part in location if part not in ("ShortLong", "Model"))
    if entry["type"] == "extra_forbidden":
        return f"{key}: unknown key; {nearest(location[-1], _fields_at(location[:-1]))}"
    if entry["type"] == "missing":
        return f"{key}: missing"
    message = entry["msg"].removeprefix("Value error, ")
    given = "" if entry["type"] == "value_error" else f" (given: {entry['input']!r})"
    return f"{key}: {message}{given}" if key else message


def _fields_at(location: Sequence[str]) -> list[str]:
    """Legal keys of the section at a location of the recipe."""
    section: type[BaseModel] = Recipe
    for part in location:
        field = section.model_fields.get(part)
        if field is None:
            continue
        candidates = [field.annotation, *get_args(field.annotation)]
        for candidate in candidates:
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                section = candidate
    return list(section.model_fields)
