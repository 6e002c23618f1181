"""Pretraining: the student's backbone learns a teacher's features on images alone, without any label."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from acamkd import config, data
from acamkd.distillation.auto_weight import dry_build, uncalibrated
from acamkd.distillation.build import build_distiller
from acamkd.distillation.distiller import Distiller
from acamkd.distillation.pairs import resolve_pairs
from acamkd.engine.pretraining import HeldOutLoss, NearestNeighbors, PretrainingModule, freeze_beyond
from acamkd.engine.runs import Run, default_folder
from acamkd.engine.trackers import check_installed
from acamkd.errors import AcamkdError
from acamkd.jobs.fit import ScoredTeacher, fit, hash_of
from acamkd.jobs.setup import Loaders, build_network, build_teacher, teacher_section, with_normalization
from acamkd.losses.base import HeadLoss
from acamkd.models.base import keeping_modes, to_device
from acamkd.progress import is_first_process, progress

log = logging.getLogger(__name__)

UNKNOWN_CLASSES = 2
"""Classes of the head that is never used, where the images have no labels."""


class ImagesAlone(Loaders):
    """Images to learn from and images to be judged on, for use after `check`.

    Those to learn from are `data.unlabeled` or, without it, the training images, whose labels are not looked at. The
    validation images' labels, if there are any, only judge: see NearestNeighbors.
    """

    def __init__(self, recipe: config.Recipe) -> None:
        seed, source = recipe.train.seed, data.resolve(recipe.data, recipe.task)
        learned = (
            data.build(source, recipe.task, "train", seed=seed, augment=True)
            if source.unlabeled is None
            else data.build_unlabeled(source, recipe.task, seed=seed)
        )
        super().__init__(recipe, source, learned)
        self.validator = NearestNeighbors(self.classes) if self.classes else HeldOutLoss()

    def check(self) -> None:
        """As of every training; then say what judges."""
        super().check()
        log.info(
            "%d images to learn from, without labels; judged on %d others by %s",
            *map(len, self.splits.values()),
            "nearest neighbors of their objects" if self.classes else "the loss: there are no labels",
        )


def pretrain(
    recipe: config.Recipe | Path | str,
    *,
    overrides: Sequence[str] = (),
    out: Path | str | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> Run:
    """Train the backbone of a recipe's student on images alone, against its teacher's features.

    The images are `data.unlabeled` or, without it, those of `data.train`; no label is read to learn from. After each
    epoch the student's features are judged on `data.val`: by nearest neighbors of labeled objects, or by the loss where
    `data.format` is `images`. The best epoch's backbone is `backbone.safetensors`, for `student.backbone_weights`.

    Args:
        recipe: With a teacher, usually one without a head, and losses at layers of the student. Or its file.
        overrides: `key=value` assignments, as `--set` takes them.
        out: Run folder; `runs/NAME/pretrained` where not given.
        resume: Continue the run that the folder holds.
        overwrite: Replace it.

    Returns:
        The run. It has no `load()`, since a backbone alone predicts nothing.

    Raises:
        AcamkdError: Something that was given cannot be used; nothing is written then.
    """
    recipe = config.as_recipe(recipe, overrides)
    check_installed(recipe)
    if recipe.teacher is None or not recipe.losses:
        raise AcamkdError(f"the recipe {recipe.name} needs a `teacher` section and `losses` to pretrain")
    if recipe.student.inherit or recipe.train.quantize:
        raise AcamkdError("student.inherit and train.quantize are for the training after it: set [] and null")
    folder = Path(out).expanduser() if out else default_folder(recipe, "pretrained")
    if is_first_process():
        Run(folder, recipe, "backbone").check_free(resume=resume, overwrite=overwrite)
    images = ImagesAlone(recipe)
    classes = images.classes or ("unknown",) * UNKNOWN_CLASSES
    section = teacher_section(recipe)
    teacher = build_teacher(recipe, section, classes)
    student = build_network(recipe, recipe.student, classes)
    if any(entry.is_auto for entry in recipe.losses):
        log.info("weight: auto: there is no task to compare with, so the method's own weight stays")
    losses = resolve_pairs(student, teacher, [uncalibrated(entry) for entry in recipe.losses])
    built = dry_build(student, teacher, losses).distiller
    _check_losses(built, losses)
    _freeze(built)
    del built
    images.check()
    distiller = build_distiller(student, teacher, losses, section.precision)
    used = {"teacher": section, "student": with_normalization(recipe, recipe.student, student), "losses": losses}
    run = Run(folder, images.resolved.model_copy(update=used), "backbone")
    done = fit(
        run, distiller, images, resume=resume, overwrite=overwrite, module_of=PretrainingModule,
        teacher=ScoredTeacher(hash_of(teacher.net), partial(_score, distiller, images)),
    )  # fmt: skip
    log.info("%s: train from it with --set student.backbone_weights=%s", done.folder, done.weights)
    return done


def _check_losses(distiller: Distiller, entries: Sequence[config.Loss]) -> None:
    """Raise AcamkdError for losses that learn nothing, or not what they should, without labels."""
    for _, loss in distiller.levels:
        name = type(loss).__name__.lower()
        if isinstance(loss, HeadLoss):
            raise AcamkdError(f"{name} compares heads, and pretraining has none: take cosine, pkd, fitnet or another")
        if loss.needs_targets:
            raise AcamkdError(f"{name} needs labels, and pretraining has none: take cosine, pkd, fitnet or another")
        if "task_gradient" in loss.needs or loss.masks_minimize:
            why = (
                "learn to make the loss itself small, and without a task nothing holds them up"
                if loss.masks_minimize
                else "learn from the task's loss, and pretraining has none"
            )
            raise AcamkdError(
                f"{name}: its masks {why}: set mask_source to uniform or mask_grad to detached, or take cosine, pkd, "
                "fitnet or another"
            )
    if any(entry.stop_epoch is not None for entry in entries):
        raise AcamkdError("stop_epoch: in pretraining nothing else is learned, so that no loss can stop before the end")


def _freeze(distiller: Distiller) -> None:
    """Leave only what the losses reach to be trained, and say what of it the file will not hold."""
    student = distiller.student
    kept = {id(parameter) for parameter in student.backbone.parameters()}
    trained = freeze_beyond(distiller)
    outside = [name for name in trained if id(student.net.get_parameter(name)) not in kept]
    if len(outside) == len(trained):
        raise AcamkdError(f"no loss reaches the student's backbone, only {outside[0]} and the like: tap other layers")
    if outside:
        log.warning(
            "%d of %d tensors that are trained lie outside of the backbone and are not in its file (%s): tap layers of "
            "the backbone, or train them again with the task", len(outside), len(trained), outside[0],
        )  # fmt: skip


@torch.no_grad()
def _score(distiller: Distiller, images: ImagesAlone) -> dict[str, float]:
    """The teacher's nearest neighbors; the log gets those of the student at its start, too."""
    validator, student = images.validator, distiller.student
    if not isinstance(validator, NearestNeighbors):
        return {validator.metric: math.nan}
    device = distiller.teacher.mean.device
    distiller.to(device)
    start = NearestNeighbors(validator.classes)
    with keeping_modes(student):
        student.eval()
        for pixels, given in progress(images.val, "looking at the teacher's features", unit=" batches"):
            inputs, targets = to_device(pixels, given, device)
            batch = student.prepare(inputs, targets)
            validator.add(batch, distiller.teacher_maps(batch))
            start.see(distiller, inputs, targets)
    scores = validator.compute()
    log.info("%s of the teacher's features %.2f, of the student's at its start %.2f",
             validator.metric, scores[validator.metric], start.compute()[validator.metric])  # fmt: skip
    return scores
