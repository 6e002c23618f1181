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


def with_normalization(recipe: config.Recipe, section: config.Model, model: TaskModel) -> config.Model:
    """Add the normalization statistics of a downloaded backbone, or of the run that its weights are from, to a section.

    A later load of the trained weights reads neither and could not know them.
    """
    if section.weights is not None or section.backbone_weights != "imagenet":
        return with_normalization_of_run(recipe, section)
    mean, std = ([float(f"{value:.9g}") for value in x.flatten().tolist()] for x in (model.mean, model.std))  # exact
    return section.model_copy(update={"mean": section.mean or tuple(mean), "std": section.std or tuple(std)})


def with_normalization_of_run(recipe: config.Recipe, section: config.Model) -> config.Model:
    """Add the normalization statistics that a run has kept to a network's section, if its weights are from a run."""
    given = section.weights or section.backbone_weights
    if given is None or given == "imagenet":
        return section
    file = Path(given)
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
    """Data loaders of a training, for use after `check`.

    Args:
        recipe: Of the training.
        source: Its `data`, resolved.
        train: Images to learn from.
        unlabeled: More of them, each beside one of `train`.
    """

    mixed: data.ImageLoader
    """What is learned from: `train`, with the unlabeled images."""
    val: data.ImageLoader
    """What `validator` judges."""
    validator: Validator
    resolved: config.Recipe
    """The recipe, with what was found out about its data."""
    fingerprint: dict[str, str]
    """Fingerprint of each split; known after the images were checked."""

    def __init__(
        self, recipe: config.Recipe, source: config.Data, train: ImageDataset, unlabeled: ImageDataset | None = None
    ) -> None:
        seed, size, workers = recipe.train.seed, recipe.train.batch_size, source.workers
        steps, accumulate = recipe.train.steps_per_epoch, recipe.train.accumulate
        val = data.build(source, recipe.task, "val", seed=seed, augment=False)
        self.splits, self.unlabeled, self.classes = {"train": train, "val": val}, unlabeled, val.classes
        for split in self.splits.values():
            if split.problems:
                data.check(split, source.check)  # which reports them together with problems of the images
        pin = device_of(recipe.train).type == "cuda"
        self._shuffled = partial(
            data.loader, batch_size=size, workers=workers, shuffle=True, seed=seed, pin=pin,
            batches=steps and steps * accumulate,
        )  # fmt: skip
        self.mixed = self._shuffled(data.WithUnlabeled(train, unlabeled) if unlabeled is not None else train)
        self.val = data.loader(val, size, workers, shuffle=False, seed=seed, pin=pin)
        if source.decode == "reduced":
            for images in self.training_images.values():
                images.least_size = partial(frame_size, resize=source.resize, whole=math.ceil)
        self.resolved = recipe.model_copy(update={"data": source.model_copy(update={"classes": self.classes})})

    def check(self) -> None:
        """Check every image, and compute a fingerprint of each split.

        This can take minutes, so networks and losses should be checked first.
        """
        source, every = self.resolved.data, self.splits | self.training_images
        for name, images in every.items():
            for warning in data.check(images, source.check):
                log.warning("%s data: %s", name, warning)
        train, val, test = self.splits["train"], self.splits["val"], self.splits.get("test")
        for warning in data.compare_splits(train, val, source, self.unlabeled):
            log.warning("%s", warning)
        for warning in [] if test is None else data.compare_test(test, train, val, self.unlabeled):
            log.warning("%s", warning)
        self.fingerprint = {name: images.fingerprint() for name, images in every.items()}
        if source.cache is not None:
            folder = default_folder(self.resolved, "cache")
            cache = MemoryCache() if source.cache == "ram" else DiskCache(folder)
            for name, images in self.training_images.items():
                images.cache = Shelf(cache, "decoded images", (self.identity(name), version("pillow")))

    @property
    def training_images(self) -> dict[str, ImageDataset]:
        """The data sets that trainings augment, by their names in `fingerprint`."""
        images = {"train": self.splits["train"], "unlabeled": self.unlabeled}
        return {name: each for name, each in images.items() if each is not None}

    def identity(self, name: str) -> str:
        """What decides the images and targets of an entry of `fingerprint`, their augmentation included."""
        used = self.resolved.data.model_dump_json(include=set(DATA_KEYS))
        return f"{name} {self.fingerprint[name]} {self.resolved.task} {used}"


class Batches(Loaders):
    """Data loaders of a recipe; `mixed` is `train` with unlabeled images, if there are any and they are asked for.

    With `with_test`, the test images are opened and checked, too.
    """

    def __init__(self, recipe: config.Recipe, *, with_unlabeled: bool = False, with_test: bool = False) -> None:
        seed, source = recipe.train.seed, data.resolve(recipe.data, recipe.task)
        train = data.build(source, recipe.task, "train", seed=seed, augment=True)
        is_mixed, self.distills = with_unlabeled and source.unlabeled is not None, with_unlabeled
        unlabeled = data.build_unlabeled(source, recipe.task, seed=seed) if is_mixed else None
        super().__init__(recipe, source, train, unlabeled)
        data.check_same_classes(train, self.splits["val"])
        if with_test and source.test is not None:
            test = data.build(self.resolved.data, recipe.task, "test", seed=seed, augment=False)
            data.check_same_classes(train, test, "test")
            self.splits["test"] = test
        # Beside `mixed` it serves only the calibration; loading processes of its own would idle afterwards.
        self.train = self.mixed if unlabeled is None else self._shuffled(train, workers=0)
        self.validator = self.scorer = scorer_of(recipe, self.classes)

    def check(self) -> None:
        """As of every training; then say how many images there are."""
        super().check()
        if self.unlabeled is not None:
            log.info("%d unlabeled images, which only the distillation uses", len(self.unlabeled))
        elif self.distills:
            log.info("%s", ALL_LABELED)
        log.info("%s", describe_data(self.splits["train"], self.splits["val"]))


DATA_KEYS = frozenset({
    "format", "train", "val", "classes", "ignore_index", "mask_values", "uncovered", "columns", "box_format", "resize",
    "augment", "decode",
})  # fmt: skip
"""Keys of a recipe's `data` that decide images, targets and inputs."""


def build_network(recipe: config.Recipe, section: config.Model, classes: tuple[str, ...]) -> TaskModel:
    """Build a network that is to be trained from its section, which names the weights to load."""
    section = with_normalization_of_run(recipe, section)
    # Seeded for each network, so that a student starts the same with and without a teacher.
    torch.manual_seed(recipe.train.seed)
    model = models.build(section, recipe.task, len(classes), recipe.data.resize)
    _check_sizes(recipe, section, model)
    if recipe.train.optimizer.backbone_lr is not None:
        try:
            next(model.backbone.parameters(), None)
        except AcamkdError as error:
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
