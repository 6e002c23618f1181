"""The main jobs: training without distillation, and distillation of a student from a teacher."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, overload

from acamkd import config, data, models
from acamkd.distillation.auto_weight import calibrate, dry_build, reuse_weights
from acamkd.distillation.build import build_distiller
from acamkd.distillation.distiller import Distiller
from acamkd.distillation.pairs import resolve_pairs
from acamkd.engine.devices import device_of, moved_to
from acamkd.engine.metrics import METRICS, score, why_unscored
from acamkd.engine.quantization import require_torchao
from acamkd.engine.runs import RECIPE, Run, default_folder
from acamkd.engine.trackers import check_installed
from acamkd.errors import AcamkdError, check_word
from acamkd.jobs.estimate import Estimate, estimate
from acamkd.jobs.fit import ScoredTeacher, fit, hash_of
from acamkd.jobs.setup import (
    Batches,
    build_network,
    build_teacher,
    teacher_section,
    with_normalization,
)
from acamkd.jobs.shared import SharedWork
from acamkd.models.base import head_of
from acamkd.progress import is_first_process

log = logging.getLogger(__name__)


def train(
    recipe: config.Recipe | Path | str,
    role: Literal["student", "teacher"] = "student",
    *,
    overrides: Sequence[str] = (),
    out: Path | str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    profile: bool = False,
    report: bool = True,
    shared: SharedWork | None = None,
) -> Run:
    """Train one network of a recipe without distillation.

    Args:
        recipe: The recipe, or its YAML file.
        role: `student`, or `teacher` for the network that `distill` then uses.
        overrides: `key=value` assignments, as `--set` takes them.
        out: Run folder; `runs/NAME/baseline` or `runs/NAME/teacher` where not given.
        resume: Continue the run that the folder holds.
        overwrite: Replace it.
        profile: Measure where the time of the steps goes; `acamkd.engine.step_profile.StepProfile.read` gives it.
        report: Write `report.html` at the end, which takes seconds on a CPU; `acamkd report` does so later.
        shared: What this training shares with others of a comparison.

    Returns:
        The run, with its `metrics` and `load()`.

    Raises:
        AcamkdError: Something that was given cannot be used; nothing is written then.
    """
    check_word("role", role, ("student", "teacher"))
    recipe = config.as_recipe(recipe, overrides)
    check_installed(recipe)
    section = recipe.teacher if role == "teacher" else recipe.student
    if section is None:
        raise AcamkdError(f"the recipe {recipe.name} has no `teacher` section")
    if section.is_headless:
        raise AcamkdError(f"{section.arch} has no head to train, and needs no training: distill from it as it is")
    if section.num_classes is not None:
        raise AcamkdError("teacher.num_classes: a teacher with classes of its own cannot be trained on these images")
    folder = Path(out).expanduser() if out else default_folder(recipe, "teacher" if role == "teacher" else "baseline")
    if is_first_process():  # before the images are checked, which can take minutes
        Run(folder, recipe, role).check_free(resume=resume, overwrite=overwrite)
    if role == "student" and recipe.train.quantize:
        require_torchao()
    batches = Batches(recipe)
    if recipe.data.unlabeled is not None:
        log.info("data.unlabeled is not used: only a distillation learns from unlabeled images")
    model = build_network(recipe, section, batches.classes)
    # Only the sections that the run depends on, so that --resume can tell it from a distillation.
    used: dict[str, Any] = {"losses": ()}
    inherited = None
    if role == "student" and recipe.student.inherit:  # as for the distilled student, so that both start alike
        used["teacher"] = teacher_section(recipe)
        teacher = build_teacher(recipe, used["teacher"], batches.classes)
        models.inherit(model, teacher, recipe.student.inherit)
        inherited = hash_of(teacher.net)
    elif role == "student":
        used["teacher"] = None
    else:  # only a student is meant to run in INT8
        used["train"] = recipe.train.model_copy(update={"quantize": None})
    used[role] = with_normalization(recipe, section, model)
    batches.check()
    if shared is not None:
        shared.share_images(batches)
    run = Run(folder, batches.resolved.model_copy(update=used), role)
    return fit(
        run, Distiller(model), batches, resume=resume, overwrite=overwrite, profile=profile, report=report,
        inherited=inherited,
    )  # fmt: skip


@overload
def distill(
    recipe: config.Recipe | Path | str,
    *,
    overrides: Sequence[str] = (),
    out: Path | str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: Literal[False] = False,
    profile: bool = False,
    report: bool = True,
    shared: SharedWork | None = None,
) -> Run: ...
@overload
def distill(
    recipe: config.Recipe | Path | str, *, overrides: Sequence[str] = (), dry_run: Literal[True]
) -> Estimate: ...
def distill(
    recipe: config.Recipe | Path | str,
    *,
    overrides: Sequence[str] = (),
    out: Path | str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    profile: bool = False,
    report: bool = True,
    shared: SharedWork | None = None,
) -> Run | Estimate:
    """Train a recipe's student with its losses against its teacher.

    The teacher's weights are the recipe's `teacher.weights`, or those that `train(recipe, "teacher")` wrote. It is
    scored on the validation images before the first epoch.

    Args:
        recipe: What to train on what, or the YAML file that says it.
        overrides: `key=value` assignments, as `--set` takes them.
        out: Run folder; `runs/NAME/distilled` where not given.
        resume: Continue the run that the folder holds.
        overwrite: Replace it.
        dry_run: Do not train; estimate parameters, operations, memory and the largest batch.
        profile: Measure where the time of the steps goes; `acamkd.engine.step_profile.StepProfile.read` gives it.
        report: Write `report.html` at the end, which takes seconds on a CPU; `acamkd report` does so later.
        shared: What this training shares with others of a comparison.

    Returns:
        The run, with its `metrics` and `load()`; or the estimate.

    Raises:
        AcamkdError: Something that was given cannot be used; nothing is written then.
    """
    recipe = config.as_recipe(recipe, overrides)
    check_installed(recipe)
    if dry_run:
        return estimate(recipe)
    if recipe.teacher is None or not recipe.losses:
        raise AcamkdError(f"the recipe {recipe.name} needs a `teacher` section and `losses` to distill")
    folder = Path(out).expanduser() if out else default_folder(recipe, "distilled")
    if is_first_process():
        Run(folder, recipe, "student").check_free(resume=resume, overwrite=overwrite)
    if recipe.train.quantize:
        require_torchao()
    _warn_of_what_never_comes(recipe)
    batches = Batches(recipe, with_unlabeled=True)
    section = teacher_section(recipe)
    teacher = build_teacher(recipe, section, batches.classes)
    student = build_network(recipe, recipe.student, batches.classes)
    if recipe.student.inherit:
        models.inherit(student, teacher, recipe.student.inherit)
    losses = resolve_pairs(student, teacher, recipe.losses)
    built = dry_build(student, teacher, losses)
    if batches.unlabeled is not None:
        built.distiller.check_unlabeled()
    batches.check()
    teacher_sha256 = hash_of(teacher.net)
    if shared is not None:
        shared.share_images(batches)
        shared.share_maps(built.distiller, batches, teacher_sha256, calibrating=True)
    if resume and (folder / RECIPE).is_file():
        losses = reuse_weights(losses, config.load(folder / RECIPE).losses)
    with data.reading(batches.train), moved_to(device_of(recipe.train), student, teacher):
        losses = calibrate(built, losses, batches.train)
    del built  # or its losses would take as much memory of the device as those that train
    distiller = build_distiller(student, teacher, losses, section.precision)
    used = {"teacher": section, "student": with_normalization(recipe, recipe.student, student), "losses": losses}
    run = Run(folder, batches.resolved.model_copy(update=used), "student")
    return fit(
        run, distiller, batches, resume=resume, overwrite=overwrite, profile=profile, report=report, shared=shared,
        teacher=ScoredTeacher(teacher_sha256, partial(_score_teacher, distiller, batches, teacher_sha256, shared)),
    )  # fmt: skip


def _warn_of_what_never_comes(recipe: config.Recipe) -> None:
    """No error: a recipe's first trial is often of one epoch."""
    epochs = recipe.train.epochs
    for index, loss in enumerate(recipe.losses):
        if loss.ramp_epochs > epochs:
            log.warning(
                "losses.%d.ramp_epochs %g: the training ends with epoch %d, so that the loss never has its whole "
                "weight", index, loss.ramp_epochs, epochs,
            )  # fmt: skip
        if loss.stop_epoch is not None and loss.stop_epoch >= epochs:
            log.warning(
                "losses.%d.stop_epoch %g changes nothing: the training ends with epoch %d", index, loss.stop_epoch,
                epochs,
            )  # fmt: skip


def _score_teacher(
    distiller: Distiller, batches: Batches, teacher_sha256: str, shared: SharedWork | None
) -> dict[str, float]:
    """The teacher's scores on the validation images, or those that another training has found."""
    metric = METRICS[batches.resolved.task]
    if shared is not None and (known := shared.scores(distiller, batches, teacher_sha256)):
        log.info("teacher: %s %.2f, as another training has found", metric, known[metric])
        return known
    if why := why_unscored(distiller.teacher, len(batches.classes)):
        log.info("the teacher is not scored, and only features are compared: %s", why)
        return {metric: math.nan}
    teacher = head_of(distiller.teacher)
    log.info("scoring the teacher on the validation images")
    scores = score(teacher, batches.val, batches.scorer)
    log.info("teacher: %s %.2f", metric, scores[metric])
    # A constant prediction scores no more than this; for a detector, below one point is as good as nothing.
    if scores[metric] <= (1.0 if teacher.task == "detection" else 100 / teacher.num_classes):
        log.warning("this teacher scores almost nothing, so distillation cannot help: acamkd doctor RECIPE examines it")
    if shared is not None:
        shared.keep_scores(distiller, batches, teacher_sha256, scores)
    return scores
