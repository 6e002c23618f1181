"""What every job begins with: the data and the networks of a recipe."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

import torch

from acamkd import config, data, models
from acamkd.engine.metrics import scorer_of
from acamkd.engine.runs import RECIPE, Run, default_folder
from acamkd.errors import AcamkdError
from acamkd.models.base import TaskModel

log = logging.getLogger(__name__)


def teacher_section(recipe: config.Recipe) -> config.Model:
    """The recipe's teacher with the weights it is to be loaded from.

    Raises:
        AcamkdError: There are none, or their training has not ended.
    """
    if recipe.teacher is None:
        raise AcamkdError(f"the recipe {recipe.name} needs a `teacher` section")
    trained = Run(default_folder(recipe, "teacher"), recipe, "teacher")
    if recipe.teacher.weights is not None:
        return with_normalization_of_run(recipe, recipe.teacher)
    if trained.weights.is_file():
        if trained.has_begun and not trained.has_ended:
            raise AcamkdError(
                f"{trained.folder}: the teacher's training has not ended: acamkd train RECIPE --model teacher --resume "
                f"goes on with it; to use it as it is, set teacher.weights={trained.weights}"
            )
        return with_normalization_of_run(recipe, recipe.teacher.model_copy(update={"weights": str(trained.weights)}))
    if recipe.teacher.brings_weights:
        return recipe.teacher
    raise AcamkdError(
        f"the teacher has no weights: set teacher.weights, or train it first (acamkd train RECIPE --model teacher "
        f"writes {trained.weights})"
    )


def with_normalization(section: config.Model, model: TaskModel) -> config.Model:
    """A network's description with the mean and deviation of the colors that its downloaded backbone brought.

    Who loads the trained weights downloads nothing, and could not know them.
    """
    if section.weights is not None or section.backbone_weights != "imagenet":
        return section
    mean, std = ([float(f"{value:.9g}") for value in x.flatten().tolist()] for x in (model.mean, model.std))  # exact
    return section.model_copy(update={"mean": section.mean or tuple(mean), "std": section.std or tuple(std)})


def with_normalization_of_run(recipe: config.Recipe, section: config.Model) -> config.Model:
    """A teacher's description with the colors that a run kept, where its weights are a run's."""
    assert section.weights is not None
    file = Path(section.weights)
    if not Run(file.parent, recipe, "teacher").has_begun:
        return section
    trained = config.load(file.parent / RECIPE)
    own = trained.teacher if file.stem == "teacher" else trained.student
    assert own is not None
    return section.model_copy(update={"mean": section.mean or own.mean, "std": section.std or own.std})


class Batches:
    """A recipe's data, to be read once `check` has passed; `mixed` is `train` with unlabeled images, if any."""

    fingerprint: dict[str, str]
    """Of each split; known once `check` has passed."""

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
                data.check(split, recipe.data.check)  # which tells them beside those of the images
        data.check_same_classes(splits["train"], splits["val"])
        self.classes = splits["train"].classes
        shuffled = partial(
            data.loader, batch_size=size, workers=workers, shuffle=True, seed=seed, batches=steps and steps * accumulate
        )
        self.train = self.mixed = shuffled(splits["train"])
        self.unlabeled = None
        if with_unlabeled and source.unlabelled is not None:
            # It only feeds the calibration now: processes of its own would idle from then on.
            self.train = shuffled(splits["train"], workers=0)
            self.unlabeled = data.build_unlabeled(source, recipe.task, seed=seed)
            self.mixed = shuffled(data.WithUnlabeled(splits["train"], self.unlabeled))
        self.val = data.loader(splits["val"], size, workers, shuffle=False, seed=seed)
        self.scorer = scorer_of(recipe, self.classes)
        self.resolved = recipe.model_copy(update={"data": source.model_copy(update={"classes": self.classes})})

    def check(self) -> None:
        """Look at every image, and keep a fingerprint of each split.

        It can take minutes, so that what is wrong with networks and losses is better said before.
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
            self.fingerprint["unlabelled"] = self.unlabeled.fingerprint()
            log.info("%d unlabeled images, which only the distillation sees", len(self.unlabeled))
        log.info("%d training and %d validation images, %d classes",
                 len(self.splits["train"]), len(self.splits["val"]), len(self.classes))  # fmt: skip


def build_network(
    recipe: config.Recipe, section: config.Model, classes: tuple[str, ...], *, teacher: bool = False
) -> TaskModel:
    """Build one of a recipe's networks; `section` is its description, with the weights to load."""
    # Seeded anew for each network, so that a student starts the same with and without a teacher beside it.
    torch.manual_seed(recipe.train.seed)
    return models.build(section, recipe.task, len(classes), recipe.data.resize, teacher=teacher)
