"""Common setup of the jobs: data and networks of a recipe."""

from __future__ import annotations

import logging
import math
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch

from acamkd import config, data, models
from acamkd.data import ImageDataset
from acamkd.data.disk_cache import DiskCache, MemoryCache, Shelf
from acamkd.engine.devices import device_of
from acamkd.engine.metrics import METRICS, Validator, scorer_of
from acamkd.engine.runs import RECIPE, Run, default_folder
from acamkd.errors import AcamkdError
from acamkd.models.base import FeatureModel, TaskModel
from acamkd.models.resize import frame_size

log = logging.getLogger(__name__)


def teacher_section(recipe: config.Recipe) -> config.Model:
    """The recipe's teacher section, with the weights to load.

    Raises:
        AcamkdError: There are no weights, or their training has not ended.
    """
    if recipe.teacher is None:
        raise AcamkdError(f"the recipe {recipe.name} needs a `teacher` section")
    if recipe.teacher.is_headless:
        return recipe.teacher
    trained = Run(default_folder(recipe, "teacher"), recipe, "teacher")
    if recipe.teacher.weights is not None:
        return with_normalization_of_run(recipe, recipe.teacher)
    if trained.weights.is_file():
        if trained.has_begun and not trained.has_ended:
            raise AcamkdError(
                f"{trained.folder}: the teacher's training has not ended: acamkd train RECIPE --role teacher --resume "
                f"goes on with it; to use it as it is, set teacher.weights={trained.weights}"
            )
        return with_normalization_of_run(recipe, recipe.teacher.model_copy(update={"weights": str(trained.weights)}))
    if recipe.teacher.brings_weights:
        return recipe.teacher
    raise AcamkdError(
        f"the teacher has no weights: set teacher.weights, or train it first (acamkd train RECIPE --role teacher "
        f"writes {trained.weights})"
    )


def with_normalization(section: config.Model, model: TaskModel) -> config.Model:
    """Add the normalization statistics of a downloaded backbone to a network's section.

    A later load of the trained weights downloads nothing and could not know them.
    """
    if section.weights is not None or section.backbone_weights != "imagenet":
        return section
    mean, std = ([float(f"{value:.9g}") for value in x.flatten().tolist()] for x in (model.mean, model.std))  # exact
    return section.model_copy(update={"mean": section.mean or tuple(mean), "std": section.std or tuple(std)})


def with_normalization_of_run(recipe: config.Recipe, section: config.Model) -> config.Model:
    """Add the normalization statistics that a run has kept to a teacher's section, if its weights are from a run."""
    assert section.weights is not None
    file = Path(section.weights)
    if not Run(file.parent, recipe, "teacher").has_begun:
        return section
    trained = config.load(file.parent / RECIPE)
    own = trained.teacher if file.stem == "teacher" else trained.student
    assert own is not None
    return section.model_copy(update={"mean": section.mean or own.mean, "std": section.std or own.std})


def describe_data(train: ImageDataset, val: ImageDataset) -> str:
    """How many images and classes there are."""
    classes = len(train.classes)
    return f"{len(train)} training and {len(val)} validation images, {classes} class{'es' if classes != 1 else ''}"


ALL_LABELED = (
    "there are no unlabeled images (data.unlabeled): our clearest gains were measured with them and with few labels; "
    "with all labels FCOS and FPN gained nothing, and D-FINE less in a longer training (docs/research/results.md)"
)
"""What is said once where a recipe has labeled images alone."""


def describe_lead(recipe: config.Recipe, teacher: float | None, folder: Path) -> str | None:
    """What is to be said of a teacher's score, in percent, that is not above a baseline's.

    Args:
        recipe: Of the distillation.
        teacher: The teacher's score on the validation images; None or NaN = unknown.
        folder: Of the baseline's run; nothing is said where it has not ended.
    """
    baseline = Run(folder, recipe, "student")
    if teacher is None or math.isnan(teacher) or not baseline.has_ended:
        return None
    metric = METRICS[recipe.task]
    reached = baseline.metrics.get("student", {}).get(metric)
    if reached is None or teacher > reached:
        return None
    return (
        f"the teacher, {metric} {teacher:.2f}, is not ahead of the baseline, {reached:.2f} ({folder}): there is "
        "little to learn from it"
    )


def score_of_run(recipe: config.Recipe, section: config.Model) -> float | None:
    """The score in percent that a network's own run left beside its weights; None where there is none."""
    if section.weights is None:
        return None
    file = Path(section.weights)
    run = Run(file.parent, recipe, "teacher")
    scores = run.metrics.get(file.stem) if run.has_ended else None
    return scores.get(METRICS[recipe.task]) if isinstance(scores, dict) else None


class Loaders:
    """What a training reads: `mixed` to learn from, `val` to be judged by `validator`."""

    splits: dict[str, ImageDataset]
    mixed: data.ImageLoader
    val: data.ImageLoader
    validator: Validator
    resolved: config.Recipe
    """The recipe, with what was found out about its data."""
    fingerprint: dict[str, str]
    """Fingerprint of each split; known after the images were checked."""
    unlabeled: ImageDataset | None = None

    @property
    def training_images(self) -> dict[str, ImageDataset]:
        """The data sets that trainings augment, by their names in `fingerprint`."""
        images = {"train": self.splits["train"], "unlabeled": self.unlabeled}
        return {name: each for name, each in images.items() if each is not None}

    def identity(self, name: str) -> str:
        """What decides the images and targets of an entry of `fingerprint`, their augmentation included."""
        used = self.resolved.data.model_dump_json(include=set(DATA_KEYS))
        return f"{name} {self.fingerprint[name]} {self.resolved.task} {used}"

    def _reduce_decoding(self, source: config.Data) -> None:
        if source.decode == "reduced":
            for images in self.training_images.values():
                images.least_size = partial(frame_size, resize=source.resize, whole=math.ceil)

    def _keep_decoded(self) -> None:
        recipe = self.resolved
        for name, images in self.training_images.items():
            if recipe.data.cache is not None:
                folder = default_folder(recipe, "cache")
                cache = MemoryCache() if recipe.data.cache == "ram" else DiskCache(folder)
                images.cache = Shelf(cache, "decoded images", (self.identity(name), version("pillow")))


class Batches(Loaders):
    """Data loaders of a recipe, for use after `check`; `mixed` is `train` with unlabeled images, if there are any."""

    def __init__(self, recipe: config.Recipe, *, with_unlabeled: bool = False) -> None:
        seed, size, workers = recipe.train.seed, recipe.train.batch_size, recipe.data.workers
        steps, accumulate = recipe.train.steps_per_epoch, recipe.train.accumulate
        source = data.resolve(recipe.data, recipe.task)
        self.splits = splits = {
            split: data.build(source, recipe.task, split, seed=seed, augment=split == "train")
            for split in ("train", "val")
        }
        for split in splits.values():
            if split.problems:
                data.check(split, recipe.data.check)  # which reports them together with problems of the images
        data.check_same_classes(splits["train"], splits["val"])
        self.classes = splits["train"].classes
        pin = device_of(recipe.train).type == "cuda"
        shuffled = partial(
            data.loader, batch_size=size, workers=workers, shuffle=True, seed=seed, pin=pin,
            batches=steps and steps * accumulate,
        )  # fmt: skip
        self.train = self.mixed = shuffled(splits["train"])
        self.unlabeled, self.distills = None, with_unlabeled
        if with_unlabeled and source.unlabeled is not None:
            # It now serves only the calibration; loading processes of its own would idle afterwards.
            self.train = shuffled(splits["train"], workers=0)
            self.unlabeled = data.build_unlabeled(source, recipe.task, seed=seed)
            self.mixed = shuffled(data.WithUnlabeled(splits["train"], self.unlabeled))
        self._reduce_decoding(source)
        self.val = data.loader(splits["val"], size, workers, shuffle=False, seed=seed, pin=pin)
        self.validator = self.scorer = scorer_of(recipe, self.classes)
        self.resolved = recipe.model_copy(update={"data": source.model_copy(update={"classes": self.classes})})

    def check(self) -> None:
        """Check every image, and compute a fingerprint of each split.

        This can take minutes, so networks and losses should be checked first.
        """
        how, source = self.resolved.data.check, self.resolved.data
        for name, split in self.splits.items():
            for warning in data.check(split, how):
                log.warning("%s data: %s", name, warning)
        for warning in data.compare_splits(self.splits["train"], self.splits["val"], source, self.unlabeled):
            log.warning("%s", warning)
        self.fingerprint = {name: split.fingerprint() for name, split in self.splits.items()}
        if self.unlabeled is not None:
            data.check(self.unlabeled, how)
            self.fingerprint["unlabeled"] = self.unlabeled.fingerprint()
            log.info("%d unlabeled images, which only the distillation uses", len(self.unlabeled))
        elif self.distills:
            log.info("%s", ALL_LABELED)
        log.info("%s", describe_data(self.splits["train"], self.splits["val"]))
        self._keep_decoded()


DATA_KEYS = frozenset({
    "format", "train", "val", "classes", "ignore_index", "mask_values", "uncovered", "columns", "box_format", "resize",
    "augment", "decode",
})  # fmt: skip
"""Keys of a recipe's `data` that decide images, targets and inputs."""


def build_network(recipe: config.Recipe, section: config.Model, classes: tuple[str, ...]) -> TaskModel:
    """Build a network that is to be trained from its section, which names the weights to load."""
    # Seeded for each network, so that a student starts the same with and without a teacher.
    torch.manual_seed(recipe.train.seed)
    model = models.build(section, recipe.task, len(classes), recipe.data.resize)
    _check_sizes(recipe, section, model)
    if recipe.train.optimizer.backbone_lr is not None:
        try:
            next(model.backbone.parameters(), None)
        except (NotImplementedError, AcamkdError) as error:
            raise AcamkdError(f"train.optimizer.backbone_lr: {error}; leave backbone_lr out") from error
    return model


def build_teacher(recipe: config.Recipe, section: config.Model, classes: tuple[str, ...]) -> FeatureModel:
    """Build the network to learn from, with or without a head; every tensor of its head must be in the weights."""
    torch.manual_seed(recipe.train.seed)
    model = models.build_teacher(section, recipe.task, len(classes), recipe.data.resize)
    _check_sizes(recipe, section, model)
    return model


def _check_sizes(recipe: config.Recipe, section: config.Model, model: FeatureModel) -> None:
    if recipe.train.multiscale is not None and model.takes_one_size:
        raise AcamkdError(f"train.multiscale: {section.title} takes inputs of one size alone: leave multiscale out")
