"""Schema of a recipe's `train`: optimizer, schedule, loggers and all else of a training run. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_serializer, model_validator

from acamkd.config.data import Fraction, Positive, Section


class Optimizer(Section):
    """The optimizer; the losses' own parameters form a separate group."""

    READ_BY: ClassVar = {"momentum": "sgd"}

    name: Literal["sgd", "adamw"] = "adamw"
    lr: Annotated[float, Field(gt=0)] = 1e-3
    """Learning rate of the network; the peak where the schedule has one."""
    losses_lr: Annotated[float, Field(gt=0)] | None = None
    """Learning rate of the losses' own parameters; nothing = the network's."""
    backbone_lr: Annotated[float, Field(gt=0)] | None = None
    """Learning rate of the network's backbone; nothing = the network's."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    norm_decay: bool = True
    """Whether `weight_decay` acts on the network's biases and normalization layers, too."""
    momentum: Fraction = 0.9
    """SGD only."""


class Schedule(Section):
    """Schedule of the learning rate, per optimization step."""

    READ_BY: ClassVar = {"milestones": "step", "gamma": "step", "power": "polynomial", "pct_start": "one_cycle"}

    name: Literal["constant", "step", "polynomial", "one_cycle"] = "one_cycle"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Linear warm-up; one_cycle has one of its own (`pct_start`)."""
    milestones: tuple[Positive, ...] = ()
    """step: epochs, before the last one, at whose end the rate is multiplied by `gamma`."""
    gamma: Fraction = 0.1
    power: Annotated[float, Field(gt=0)] = 0.9
    """polynomial: exponent."""
    pct_start: Fraction = 0.3
    """one_cycle: share of the steps in which the rate rises."""

    @model_validator(mode="after")
    def _check(self) -> Schedule:
        if self.name == "one_cycle" and self.warmup_steps:
            raise ValueError("one_cycle brings its own warm-up: set pct_start, and leave warmup_steps out")
        if self.name == "step" and not self.milestones:
            raise ValueError("step needs milestones, such as [16, 22]")
        return self


class Logger(Section):
    """What a training's values are logged to. The name alone says the same as `{name: NAME}`."""

    READ_BY: ClassVar = {
        "project": "wandb", "entity": "wandb", "mode": "wandb", "tracking_uri": "mlflow", "experiment": "mlflow",
    }  # fmt: skip

    name: Literal["csv", "tensorboard", "wandb", "mlflow"]
    """`csv`: `logs/metrics.csv` in the run folder. `tensorboard`: event files in `logs/tensorboard` there. `wandb`:
    Weights & Biases. `mlflow`: an MLflow server or database. All but csv need `pip install 'acamkd[NAME]'`."""
    project: str | None = None
    """wandb: nothing = WANDB_PROJECT, or the recipe's name."""
    entity: str | None = None
    """wandb: user or team; nothing = your own default."""
    mode: Literal["online", "offline"] | None = None
    """wandb: nothing = WANDB_MODE, or online. An offline run lies in `logs/wandb`; `wandb sync` uploads it."""
    tracking_uri: str | None = None
    """mlflow: nothing = MLFLOW_TRACKING_URI, or MLflow's local database."""
    experiment: str | None = None
    """mlflow: nothing = MLFLOW_EXPERIMENT_NAME, or the recipe's name."""

    @model_serializer
    def _shortest(self) -> str | dict[str, str]:
        given = {key: value for key, value in self if value is not None}
        return given if len(given) > 1 else self.name


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
    """Precision of the networks in training. Losses, weights and every evaluation always use 32 bits."""
    channels_last: bool = False
    """Keep weights and feature maps of student, teacher and losses channels last. Rounding differs, and hardware with
    suitable convolutions is faster, most of all with bf16-mixed (docs/reference/performance.md)."""
    compile: bool = False
    """Compile student, teacher and losses by torch.compile, which takes minutes at first. A second size of images
    compiles once more, for every size. What cannot be compiled runs as it is (docs/reference/performance.md)."""
    accumulate: Positive = 1
    """Batches per optimization step."""
    clip: Annotated[float, Field(gt=0)] | None = None
    """Largest norm of the whole gradient; a larger gradient is scaled down."""
    sync_batchnorm: bool = False
    """Batch norm computes its statistics over the images of all devices, not only of its own."""
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    """Seed of initial weights, image order, augmentation and every other random draw."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay per step of a moving average of the weights, such as 0.9998; it rises to that over the first few thousand
    steps. The average is then what is evaluated and saved."""
    multiscale: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] | None = None
    """Range of a factor for the input size of each training batch, drawn uniformly, such as [0.75, 1.25]. Sides become
    multiples of what the networks take, mostly 32."""
    eval_every: Positive = 1
    """Epochs between two evaluations; must divide `epochs`, so that the last one is evaluated."""
    patience: Positive | None = None
    """The training ends early after this many evaluations in a row that do not beat the best one."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A step whose loss or gradient is NaN or infinite ends the run (stop), or is skipped, up to 10 in a row (skip).
    Its images are saved in the run's folder `nonfinite`."""
    checkpoint_every: Positive | None = None
    """Optimization steps between two checkpoints within an epoch; nothing = only at the ends of epochs."""
    quantize: Literal["int8"] | None = None
    """`int8`: the student computes with the rounding of its INT8 file, in training and evaluation, so that it loses
    less by it; for the last epochs of a trained student (docs/guides/export.md). Needs torchao."""
    accelerator: str = "auto"
    """Type of device by Lightning's name, such as `cpu`, `gpu` or `mps`; `auto` takes what is available."""
    devices: int | Literal["auto"] = "auto"
    """Number of devices per node; each takes batches of `batch_size`."""
    num_nodes: Positive = 1
    strategy: str = "auto"
    """How devices work together, by Lightning's name."""
    loggers: tuple[Logger, ...] = (Logger(name="csv"),)
    """Where every step's values go: `[csv, tensorboard, wandb, mlflow]`, or entries with settings, such as `{name:
    wandb, project: cracks, mode: offline}`. They do not affect the training (docs/guides/trackers.md)."""

    @field_validator("loggers", mode="before")
    @classmethod
    def _by_name(cls, loggers: Any) -> Any:
        if not isinstance(loggers, (list, tuple)):
            return loggers
        return tuple({"name": entry} if isinstance(entry, str) else entry for entry in loggers)

    @field_validator("loggers")
    @classmethod
    def _once(cls, loggers: tuple[Logger, ...]) -> tuple[Logger, ...]:
        names = [logger.name for logger in loggers]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{', '.join(twice)} stands there twice")
        return loggers

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
        if self.multiscale is not None and self.multiscale[0] > self.multiscale[1]:
            raise ValueError(f"multiscale must be a range of factors, such as [0.75, 1.25], not {[*self.multiscale]}")
        return self
