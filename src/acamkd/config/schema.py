"""What a recipe may say: one class per section, every key with its meaning. Imports no torch."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

Size: TypeAlias = tuple[Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)]]
"""(height, width) in pixels."""

Positive: TypeAlias = Annotated[int, Field(gt=0, lt=2**31)]
Fraction: TypeAlias = Annotated[float, Field(ge=0, le=1)]
Deviation: TypeAlias = Annotated[float, Field(gt=0)]


def _check_file_name(name: str) -> str:
    if re.fullmatch(r"[\w.-]*[\w-][\w.-]*", name):
        return name
    fitting = re.sub(r"[^\w.-]+", "-", name).strip("-.")
    raise ValueError(
        f"{name!r} cannot name files: use letters, digits and `_.-`, without blanks and not dots alone"
        + (f", such as {fitting}" if fitting else "")
    )


FileName: TypeAlias = Annotated[str, AfterValidator(_check_file_name)]
"""What files and folders can be called."""


def _written_path(path: Path) -> Path:
    """With the home folder for `~`, and the slashes of this system."""
    text = str(path)
    try:
        return Path(text if os.name == "nt" else text.replace("\\", "/")).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{error}: write the path without ~") from error


DataPath: TypeAlias = Annotated[Path, AfterValidator(_written_path)]
"""Of images and annotations: `~` is the home folder, and back-slashes are slashes."""


def parse_mask_value(text: str) -> int | tuple[int, int, int]:
    """A gray level or index, `7`, or a color, `#ff8000` or `255, 128, 0`; ValueError if it is neither."""
    plain = text.strip(" []()")
    if found := re.fullmatch(r"#([0-9a-fA-F]{2})([0-9a-fA-F]{2})([0-9a-fA-F]{2})", plain):
        red, green, blue = (int(part, 16) for part in found.groups())
        return red, green, blue
    parts = [int(part) for part in plain.split(",")] if re.fullmatch(r"\d{1,3}(\s*,\s*\d{1,3})*", plain) else []
    if len(parts) not in (1, 3) or max(parts) > 255:
        raise ValueError(
            f'{text} is no value of a mask: give a number from 0 to 255, or a color as "#ff8000" or "255, 128, 0", in '
            "quotes"
        )
    return parts[0] if len(parts) == 1 else (parts[0], parts[1], parts[2])


class Section(BaseModel):
    """A mapping in a recipe; unknown keys and infinite numbers are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class Split(Section):
    """Where one split lies: by `name`, in the format's own layout, or by `images`, with paths below `data.root`.

    Validation can also be a `share` of the training images.
    """

    name: str | None = None
    """Such as `val`, `trainval` (VOC) or `train2017` (COCO)."""
    images: DataPath | None = None
    """Folder of images; those of the folders in it count, too. Format yolo: or a text file that lists images."""
    masks: DataPath | None = None
    """Format masks: folder of masks, one per image, of the same name."""
    annotations: DataPath | None = None
    """Format coco: the JSON, if it is not the one of this `name`. Formats yolo and voc: folder of text or XML files, if
    it is not beside `images`."""
    share: Annotated[float, Field(gt=0, lt=1)] | None = None
    """`data.val` only: this share of the training images validates and does not train. Drawn by the images' names and
    `seed`, so that every run draws the same ones; no file is moved."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the drawing."""

    @model_validator(mode="after")
    def _check(self) -> Split:
        if sum(each is not None for each in (self.name, self.images, self.share)) != 1:
            raise ValueError("give either the split's `name` in the format's own layout, or its `images`")
        if self.share is not None and (self.masks or self.annotations):
            raise ValueError("a `share` of the training images takes their masks and annotations: leave both out")
        return self


class Augmentation(Section):
    """Random changes of the training images, in the images' own pixels, before `data.resize`."""

    scale: tuple[float, float] | None = None
    """Range of a random factor on both sides, drawn evenly."""
    crop: Size | None = None
    """(height, width) of a random crop; smaller images are padded."""
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
    """Images and targets."""

    format: str = "auto"
    """`coco`: images and a COCO JSON. `yolo`: images and text files. `voc`: Pascal VOC, boxes or masks. `masks`:
    images and 8-bit masks. `cityscapes`. `package.module:Class`: a reader of your own. `auto`: by what lies in
    `root`."""
    root: DataPath = Path()
    """Folder of the data; the splits' paths are relative to it."""
    train: Split = Split(name="train")
    val: Split = Split(name="val")
    classes: tuple[str, ...] | None = None
    """Class names in the order of their ids. Needed for masks; the other formats bring their own."""
    ignore_index: Annotated[int, Field(ge=0, le=255)] = 255
    """Format masks: mask value that neither trains nor counts."""
    mask_values: dict[str, str | int | None] | None = None
    """Formats masks and voc: class, by name or number, of each value of the masks, where value k is not class k:
    `{0: background, 255: crack}`. Or of each color: `{"#ff0000": road, "0, 0, 255": car}`. `void` is what neither
    trains nor counts."""
    unlabelled: DataPath | None = None
    """Folder of further images, relative to `root`, that only the distillation sees: each batch brings as many of
    them as it has labeled ones. Used by `distill` alone."""
    resize: Size | ShortLong | None = None
    """What the networks see: (height, width), or {short, long}; nothing = the images' own size."""
    augment: Augmentation = Augmentation()
    workers: Annotated[int, Field(ge=0)] = 2
    """Processes that load images."""
    check: Literal["full", "headers"] = "full"
    """Before training, decode every image (full) or only read its header (headers)."""

    @field_validator("mask_values", mode="before")
    @classmethod
    def _text_keys(cls, given: Any) -> Any:
        return {str(key): value for key, value in given.items()} if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _check(self) -> Data:
        if self.train.share is not None:
            raise ValueError("train.share: only `val` can be a share, of the training images")
        kinds = {type(parse_mask_value(value)) for value in self.mask_values or ()}
        if len(kinds) > 1:
            raise ValueError("mask_values: give values or colors, not both")
        return self


class Model(Section):
    """One network."""

    arch: str
    """Detection: retinanet, fcos, faster_rcnn. Segmentation: an architecture of segmentation_models_pytorch
    (deeplabv3plus, fpn, unet, ...) or `torchvision/NAME`. Both: a network of transformers, `hf/FOLDER` or `hf/HUB-ID`
    with its weights, or `hf/MODEL_TYPE` from a random start. Anything: `package.module:factory`."""
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
    """Mean color; nothing = what the backbone was pretrained with."""
    std: tuple[Deviation, Deviation, Deviation] | None = None
    """Standard deviation of the colors, likewise."""

    @field_validator("weights", "backbone_weights")
    @classmethod
    def _check_none(cls, given: str | None) -> str | None:
        if given is not None and given.lower() == "none":
            raise ValueError("YAML writes nothing as null")
        return str(_written_path(Path(given))) if given is not None and given.startswith("~") else given

    @property
    def title(self) -> str:
        """The architecture, with its backbone where the recipe chooses one."""
        is_whole = ":" in self.arch or self.arch.startswith(("torchvision/", "hf/"))
        return self.arch if is_whole else f"{self.arch} on {self.backbone}"

    @property
    def brings_weights(self) -> bool:
        """Whether the architecture itself may come trained: from a factory, a folder or the Hub."""
        name = self.arch.removeprefix("hf/")
        is_place = "/" in name or (Path(name) / "config.json").is_file()
        return ":" in self.arch or (name != self.arch and is_place)

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
    weight: int | float | Literal["auto"] | None = None
    """Factor of the loss, from 0. `auto`: set before the first step, see `gradient_ratio`. Without it the preset's
    weight, or the method's own."""
    ramp_epochs: Annotated[float, Field(ge=0)] = 0
    """The weight rises linearly from 0 to its value over this many epochs."""
    stop_epoch: Annotated[float, Field(gt=0)] | None = None
    """The loss is switched off from this epoch on."""
    gradient_ratio: Annotated[float, Field(gt=0)] = 0.5
    """`weight: auto` sets the weight, before the first step, so that the norm of this loss's gradient is this many
    times the norm of the task's gradient."""

    @field_validator("weight", mode="before")
    @classmethod
    def _check_weight(cls, weight: Any) -> Any:
        is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if weight is None or weight == "auto" or (is_number and 0 <= weight < math.inf):
            return weight
        raise ValueError(f"must be a number from 0, or auto, not {weight!r}; leave it out for the method's own weight")

    @property
    def is_auto(self) -> bool:
        """Whether the weight is still to be set by gradients; the recipe in a run folder holds the number."""
        return self.weight == "auto"

    @property
    def options(self) -> dict[str, Any]:
        """The method's own options, as written in the recipe; `weight` among them where it is given."""
        return ({} if self.weight is None else {"weight": self.weight}) | (self.model_extra or {})


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
    """How the learning rate moves, per optimization step."""

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
    """Optimization steps that count as one epoch; nothing = one pass over the training images. What is published by
    iterations is written so: 40,000 of them, evaluated every 4,000, are 10 epochs of 4,000 steps."""
    batch_size: Positive = 8
    """Images per device and batch."""
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    precision: Literal["32", "bf16-mixed", "16-mixed"] = "32"
    """What the networks compute in while they train; losses, weights and every evaluation are of 32 bits with each."""
    channels_last: bool = False
    """Student, teacher and losses keep weights and maps channels last: other rounding, and less time where convolutions
    are made for it, most of all with bf16-mixed (docs/reference/performance.md)."""
    accumulate: Positive = 1
    """Batches per optimization step."""
    clip: Annotated[float, Field(gt=0)] | None = None
    """Largest norm of the whole gradient."""
    sync_batchnorm: bool = False
    """Batch norm takes its statistics over the images of all devices, rather than over those of its own."""
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    """Of first weights, order of the images, augmentation and everything else that is drawn."""
    eval_every: Positive = 1
    """Epochs between two evaluations; must divide `epochs`, so that the last one is evaluated."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A step whose loss or gradient is NaN or infinite ends the run (stop) or is left out, up to 10 in a row (skip);
    its images are kept in the run's folder `nonfinite`."""
    checkpoint_every: Positive | None = None
    """Optimization steps between two checkpoints within an epoch; nothing = only at the ends of epochs."""
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
    """The same small search for every method of a comparison, on the validation images and on seeds of its own."""

    option: str = "gradient_ratio"
    """Option of each entry of `losses`."""
    values: Annotated[tuple[float, ...], Field(min_length=2)] = (0.25, 0.5, 1.0)
    """What it is set to."""
    seeds: Positive = 1
    """Trainings per value."""


class Comparison(Section):
    """What `acamkd compare` runs beside the baseline."""

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
        if self.student.num_classes is not None:
            raise ValueError("student.num_classes: the student has the data's classes; only a teacher may have others")
        if self.teacher is not None and self.teacher.inherit:
            raise ValueError("teacher.inherit: only a student inherits, from the teacher")
        if self.student.inherit and self.teacher is None:
            raise ValueError("student.inherit needs a `teacher` section to inherit from")
        return self
