"""Schema of a recipe: one class per section, with the meaning of every key. Imports no torch."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from acamkd.config.data import Data, Deviation, Positive, Section, Size, written_path
from acamkd.config.train import Train


def _check_file_name(name: str) -> str:
    if re.fullmatch(r"[\w.-]*[\w-][\w.-]*", name):
        return name
    fitting = re.sub(r"[^\w.-]+", "-", name).strip("-.")
    raise ValueError(
        f"{name!r} cannot name files: use letters, digits and `_.-`, without blanks and not dots alone"
        + (f", such as {fitting}" if fitting else "")
    )


FileName: TypeAlias = Annotated[str, AfterValidator(_check_file_name)]
"""Allowed names of files and folders."""


class Model(Section):
    """One network."""

    arch: str
    """Detection: retinanet, fcos, faster_rcnn, reppoints. Segmentation: an architecture of segmentation_models_pytorch
    (deeplabv3plus, fpn, unet, ...) or `torchvision/NAME`. Both: a network of transformers, `hf/FOLDER` or `hf/HUB-ID`
    with its weights, or `hf/MODEL_TYPE` from a random start. Anything: `package.module:factory`. A teacher without a
    head: `timm/NAME`, any backbone of timm, of which features alone are compared."""
    backbone: str = "resnet50"
    """A timm name, or `torchvision/NAME`; for segmentation architectures any smp encoder name (`tu-NAME`: timm)."""
    weights: str | None = None
    """The whole network: a .safetensors, .pth or .pt file (of a detector also MMDetection's or detectron2's), or a
    torchvision weights name (`..._Weights.COCO_V1`)."""
    backbone_weights: str | None = "imagenet"
    """The backbone alone: `imagenet` or `pretrained` (the framework's own), a file, or nothing."""
    fpn_channels: Positive = 256
    """Detection: number of channels of the feature pyramid and of the heads."""
    options: dict[str, Any] = {}  # noqa: RUF012 - pydantic copies it
    """Further arguments of the architecture's constructor."""
    num_classes: Positive | None = None
    """Teacher only: number of its own classes, if it was trained on other classes than the data's. It is then not
    scored, and losses may compare features, but neither heads nor logits."""
    resize: Size | Annotated[float, Field(gt=0)] | None = None
    """Teacher without a head only: the student's padded input is brought to this (height, width), or multiplied by this
    factor. 0.5 lets patches of 16 pixels meet a student's stride 32."""
    inherit: tuple[str, ...] = ()
    """Student only: parts (such as `head` or `backbone.fpn`) that start from the teacher's tensors."""
    mean: tuple[float, float, float] | None = None
    """Mean color of the normalization; nothing = the value of the backbone's pretraining."""
    std: tuple[Deviation, Deviation, Deviation] | None = None
    """Standard deviation of the normalization; nothing = the value of the backbone's pretraining."""
    precision: Literal["auto", "32", "bf16", "16"] | None = None
    """Teacher only: feature maps come from a copy with folded batch norms, in this precision; `auto`: bf16 where the
    hardware is fast with it, otherwise 32. Nothing = as it is, in `train.precision` (docs/reference/performance.md)."""

    @field_validator("precision", mode="before")
    @classmethod
    def _precision_name(cls, precision: Any) -> Any:
        return str(precision) if isinstance(precision, int) else precision  # YAML reads 32 as a number

    @field_validator("weights", "backbone_weights")
    @classmethod
    def _check_none(cls, given: str | None) -> str | None:
        if given is not None and given.lower() == "none":
            raise ValueError("YAML writes nothing as null")
        if given == "pretrained":
            return "imagenet"
        return str(written_path(Path(given))) if given is not None and given.startswith("~") else given

    @property
    def is_headless(self) -> bool:
        """Whether it is a backbone alone."""
        return self.arch.startswith("timm/")

    @property
    def title(self) -> str:
        """The architecture, with its backbone where the recipe chooses one."""
        is_whole = ":" in self.arch or self.arch.startswith(("torchvision/", "hf/", "timm/"))
        return self.arch if is_whole else f"{self.arch} on {self.backbone}"

    @property
    def brings_weights(self) -> bool:
        """Whether the architecture itself may come trained: from a factory, a folder or the Hub."""
        name = self.arch.removeprefix("hf/")
        return ":" in self.arch or (name != self.arch and is_place(name))

    @property
    def convention(self) -> Any:
        """Conventions that a detector follows: the option of that name, by default torchvision's; RepPoints has one."""
        return self.options.get("convention", "mmdetection" if self.arch == "reppoints" else "torchvision")


def is_place(name: str) -> bool:
    """Whether what follows `hf/` is a folder or a name on the Hub, rather than a model type."""
    return "/" in name or (Path(name) / "config.json").is_file()


class Loss(BaseModel):
    """One method at one or more pairs of layers; every other key is an option of the method itself."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)

    name: str
    """See `acamkd methods`; or a class of your own, `package.module:Class`."""
    pairs: tuple[str | tuple[str, str], ...] | Literal["auto"] = ()
    """Layers: `student_layer`, the same in both, or [student_layer, teacher_layer]. Grammar: `layer`, `layer:key` for
    one entry of a dict or tuple output, `layer:*` for all of them, `layer#16` for tokens of patches of 16 x 16 pixels,
    `layer@2` for the third call. `auto`: the layers that `acamkd inspect` proposes; the run's own recipe names them."""
    preset: str | None = None
    """Name of a published setting; options given here override it."""
    weight: int | float | Literal["auto"] | None = None
    """Factor of the loss, from 0. `auto`: set before the first step, see `gradient_ratio`. Without it the preset's
    weight, or the method's own."""
    ramp_epochs: Annotated[float, Field(ge=0)] = 0
    """The weight rises linearly from 0 to its value over this many epochs."""
    stop_epoch: Annotated[float, Field(gt=0)] | None = None
    """The loss is off from this epoch on."""
    gradient_ratio: Annotated[float, Field(gt=0)] = 0.5
    """`weight: auto` sets the weight before the first step: the norm of this loss's gradient becomes this many times
    the norm of the task's gradient."""
    level_decay: Annotated[float, Field(gt=0, le=1)] = 1
    """Several pairs of different stride: the weight is multiplied by this for each doubling of the stride. 1: every
    level counts once, as published. 0.5: halved with each coarser level. 0.25: every location counts once."""

    @field_validator("pairs")
    @classmethod
    def _check_auto(cls, pairs: Any) -> Any:
        if pairs == ("auto",):
            raise ValueError("auto stands alone: write `pairs: auto`, without brackets")
        return pairs

    @field_validator("weight", mode="before")
    @classmethod
    def _check_weight(cls, weight: Any) -> Any:
        is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if weight is None or weight == "auto" or (is_number and 0 <= weight < math.inf):
            return weight
        raise ValueError(f"must be a number from 0, or auto, not {weight!r}; leave it out for the method's own weight")

    @property
    def is_auto(self) -> bool:
        """Whether the weight is still to be measured; the recipe in a run folder holds the number."""
        return self.weight == "auto"

    @property
    def options(self) -> dict[str, Any]:
        """The method's own options, as written in the recipe; `weight` among them where it is given."""
        return ({} if self.weight is None else {"weight": self.weight}) | (self.model_extra or {})


class Search(Section):
    """The same small search for every method of a comparison, on the validation images and on separate seeds."""

    option: str = "gradient_ratio"
    """Option to set in each entry of `losses`."""
    values: Annotated[tuple[float, ...], Field(min_length=2)] = (0.25, 0.5, 1.0)
    """Values of the option."""
    seeds: Positive = 1
    """Trainings per value."""


class Comparison(Section):
    """Methods that `acamkd compare` runs beside the baseline."""

    methods: dict[FileName, dict[str, Any]] = {}  # noqa: RUF012 - pydantic copies it
    """By name, which also names files: overrides of this recipe, `{losses.0.weight: 3}` or `{losses: [...]}`."""
    tune: Search | None = None
    """Nothing = no search: every method runs with its own weights."""
    cache: ByteSize | None = None
    """Size of a cache on disk, such as `20GB`, in which trials share augmented images, the teacher's feature maps and
    its scores; nothing = every trial computes its own (docs/guides/compare.md)."""
    cache_precision: Literal["exact", "float16"] = "exact"
    """Of the feature maps in it; `exact` changes no trial's result."""

    @field_validator("cache")
    @classmethod
    def _holds_something(cls, cache: ByteSize | None) -> ByteSize | None:
        if cache is not None and cache < 1e6:
            raise ValueError(f"{int(cache)} bytes hold no batch: write a number and its unit, such as 20GB, or null")
        return cache


class Recipe(Section):
    """Everything that a run depends on."""

    name: FileName
    """Letters, digits and `_.-`; runs go to `runs/NAME/`. By default the file's name."""
    task: Literal["detection", "segmentation"]
    data: Data
    teacher: Model | None = None
    student: Model
    losses: tuple[Loss, ...] = ()
    train: Train
    compare: Comparison = Comparison()

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        if self.student.num_classes is not None:
            raise ValueError("student.num_classes: the student has the data's classes; only a teacher may have others")
        if self.student.precision is not None:
            raise ValueError("student.precision: only the teacher has one of its own; use train.precision")
        if self.teacher is not None and self.teacher.inherit:
            raise ValueError("teacher.inherit: only a student inherits, from the teacher")
        if self.student.inherit and self.teacher is None:
            raise ValueError("student.inherit needs a `teacher` section to inherit from")
        self._check_headless()
        return self

    def _check_headless(self) -> None:
        if self.student.is_headless:
            raise ValueError(f"student.arch {self.student.arch} has no head: name a detector or a segmenter over it")
        if self.student.resize is not None:
            raise ValueError("student.resize: the student's input size is data.resize")
        if self.teacher is None:
            return
        if not self.teacher.is_headless and self.teacher.resize is not None:
            raise ValueError("teacher.resize: only a teacher without a head (arch: timm/NAME) has a size of its own")
        if self.teacher.is_headless and self.teacher.weights is not None:
            raise ValueError("teacher.weights: a teacher without a head is a backbone: give backbone_weights instead")
        if self.teacher.is_headless and self.teacher.num_classes is not None:
            raise ValueError("teacher.num_classes: a teacher without a head has no classes")
