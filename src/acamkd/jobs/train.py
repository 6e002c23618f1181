"""The main jobs: training without distillation, and distillation of a student from a teacher."""

from __future__ import annotations

import hashlib
import logging
import math
import platform
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor, distributed, nn

from acamkd import __version__, config, data, models
from acamkd.distillation.auto_weight import calibrate, dry_build, reuse_weights
from acamkd.distillation.build import build_distiller
from acamkd.distillation.distiller import Distiller
from acamkd.engine.checkpoint import find_checkpoint
from acamkd.engine.devices import device_of, moved_to
from acamkd.engine.mask_history import MaskHistory
from acamkd.engine.metrics import METRICS, score
from acamkd.engine.module import TrainingModule
from acamkd.engine.quantization import require_torchao
from acamkd.engine.runs import LOG, RECIPE, TERMINATED, Role, Run, default_folder
from acamkd.engine.threads import ThreadChoice
from acamkd.engine.trackers import build_trackers, check_installed
from acamkd.engine.trainer import Recorder, build_trainer
from acamkd.errors import AcamkdError
from acamkd.jobs.profile import Estimate, estimate
from acamkd.jobs.setup import Batches, build_network, describe_lead, teacher_section, with_normalization
from acamkd.models.base import TaskModel
from acamkd.progress import is_first_process, shows_progress
from acamkd.report.run import REPORT, write_report

log = logging.getLogger(__name__)

LIBRARIES = ("torch", "torchvision", "lightning", "timm", "segmentation-models-pytorch")


def train(
    recipe: config.Recipe | Path | str,
    role: Role = "student",
    *,
    overrides: Sequence[str] = (),
    out: Path | str | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> Run:
    """Train one network of a recipe without distillation.

    Args:
        recipe: The recipe, or its YAML file.
        role: `student`, or `teacher` for the network that `distill` then uses.
        overrides: `key=value` assignments, as `--set` takes them.
        out: Run folder; `runs/NAME/baseline` or `runs/NAME/teacher` where not given.
        resume: Continue the run that the folder holds.
        overwrite: Replace it.

    Returns:
        The run, with its `metrics` and `load()`.

    Raises:
        AcamkdError: Something that was given cannot be used; nothing is written then.
    """
    recipe = config.as_recipe(recipe, overrides)
    check_installed(recipe)
    section = recipe.teacher if role == "teacher" else recipe.student
    if section is None:
        raise AcamkdError(f"the recipe {recipe.name} has no `teacher` section")
    if section.num_classes is not None:
        raise AcamkdError("teacher.num_classes: a teacher with classes of its own cannot be trained on these images")
    folder = Path(out).expanduser() if out else default_folder(recipe, "teacher" if role == "teacher" else "baseline")
    if is_first_process():  # before the images are checked, which can take minutes
        Run(folder, recipe, role).check_free(resume=resume, overwrite=overwrite)
    if role == "student" and recipe.train.quantize:
        require_torchao()
    batches = Batches(recipe)
    if recipe.data.unlabelled is not None:
        log.info("data.unlabelled is not used: only a distillation learns from unlabeled images")
    model = build_network(recipe, section, batches.classes)
    # Only the sections that the run depends on, so that --resume can tell it from a distillation.
    used: dict[str, Any] = {"losses": ()}
    inherited = None
    if role == "student" and recipe.student.inherit:  # as for the distilled student, so that both start alike
        used["teacher"] = teacher_section(recipe)
        teacher = build_network(recipe, used["teacher"], batches.classes, teacher=True)
        models.inherit(model, teacher, recipe.student.inherit)
        inherited = _hash(teacher.net)
    elif role == "student":
        used["teacher"] = None
    else:  # only a student is meant to run in INT8
        used["train"] = recipe.train.model_copy(update={"quantize": None})
    used[role] = with_normalization(section, model)
    batches.check()
    run = Run(folder, batches.resolved.model_copy(update=used), role)
    return _fit(run, Distiller(model), batches, resume=resume, overwrite=overwrite, inherited=inherited)


@overload
def distill(
    recipe: config.Recipe | Path | str,
    *,
    overrides: Sequence[str] = (),
    out: Path | str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: Literal[False] = False,
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
    folder, losses = Path(out) if out else default_folder(recipe, "distilled"), recipe.losses
    if is_first_process():
        Run(folder, recipe, "student").check_free(resume=resume, overwrite=overwrite)
    if recipe.train.quantize:
        require_torchao()
    batches = Batches(recipe, with_unlabeled=True)
    section = teacher_section(recipe)
    teacher = build_network(recipe, section, batches.classes, teacher=True)
    student = build_network(recipe, recipe.student, batches.classes)
    if recipe.student.inherit:
        models.inherit(student, teacher, recipe.student.inherit)
    built = dry_build(student, teacher, losses)
    if batches.unlabeled is not None:
        built.distiller.check_unlabeled()
    batches.check()
    if resume and (folder / RECIPE).is_file():
        losses = reuse_weights(losses, config.load(folder / RECIPE).losses)
    with data.reading(batches.train), moved_to(device_of(recipe.train), student, teacher):
        losses = calibrate(built, losses, batches.train)
    distiller = build_distiller(student, teacher, losses, section.precision)
    used = {"teacher": section, "student": with_normalization(recipe.student, student), "losses": losses}
    run = Run(folder, batches.resolved.model_copy(update=used), "student")
    return _fit(run, distiller, batches, resume=resume, overwrite=overwrite)


def _score_teacher(teacher: TaskModel, batches: Batches) -> dict[str, float]:
    metric = METRICS[batches.resolved.task]
    if teacher.num_classes != len(batches.classes):
        log.info("the teacher has %d classes of its own, the data %d: it is not scored, and only features are compared",
                 teacher.num_classes, len(batches.classes))  # fmt: skip
        return {metric: math.nan}
    log.info("scoring the teacher on the validation images")
    scores = score(teacher, batches.val, batches.scorer)
    log.info("teacher: %s %.2f", metric, scores[metric])
    # A constant prediction scores no more than this; for a detector, below one point is as good as nothing.
    if scores[metric] <= (1.0 if teacher.task == "detection" else 100 / teacher.num_classes):
        log.warning("this teacher scores almost nothing, so distillation cannot help: acamkd doctor RECIPE examines it")
    return scores


def _fit(
    run: Run, distiller: Distiller, batches: Batches, *, resume: bool, overwrite: bool, inherited: str | None = None
) -> Run:
    """Train into the run folder; `inherited` is the hash of a teacher that only initializes the student."""
    recipe, metric = run.recipe, METRICS[run.recipe.task]
    recorder = Recorder(run.folder, run.weights.name, metric)
    watching = [MaskHistory(run.folder, batches.splits["val"])] if distiller.losses else []
    chosen = ThreadChoice()
    trackers = build_trackers(recipe, run.folder)
    trainer = build_trainer(
        recipe.train, recorder, progress=shows_progress(sys.stdout), callbacks=[*watching, chosen], trackers=trackers
    )
    if len(batches.splits["val"]) < trainer.world_size:
        raise AcamkdError(
            f"data.val has too few validation images for {trainer.world_size} processes: "
            f"{len(batches.splits['val'])}; lower train.devices, or add validation images"
        )
    is_first = trainer.is_global_zero  # only the first process writes and logs
    others = nullcontext(resume and run.has_checkpoint)
    entered = run.entered(resume=resume, overwrite=overwrite) if is_first else others
    with entered as goes_on, _log_file(run.folder / LOG, is_first), _explaining(run.folder):
        if resume and run.has_ended and (goes_on or run.weights.is_file()):
            log.info("%s: all epochs are done already", run.folder)
            if is_first and not (run.folder / REPORT).is_file():
                write_report(run)
            return run
        if resume and not goes_on:
            log.warning("%s has no finished epoch to resume from: the training starts anew", run.folder)
        checkpoint = find_checkpoint(run.folder) if goes_on else None
        taught_by: dict[str, Any] = {"inherited_sha256": inherited} if inherited else {}
        if distiller.losses:
            with data.reading(batches.val):
                scores = _score_teacher(distiller.teacher.to(trainer.strategy.root_device), batches)
            if warning := describe_lead(recipe, scores[metric], run.folder.parent / "baseline"):
                log.warning("%s", warning)
            taught_by = {"teacher": scores, "teacher_sha256": _hash(distiller.teacher.net)}
        torch.manual_seed(recipe.train.seed)
        module = TrainingModule(distiller, recipe.train, batches.scorer)
        with data.reading(batches.mixed, batches.val), _stopping(run.folder, recorder, recipe.train.epochs):
            trainer.fit(module, batches.mixed, batches.val, ckpt_path=checkpoint)
        if distiller.losses and _hash(distiller.teacher.net) != taught_by["teacher_sha256"]:
            raise RuntimeError("the teacher changed during training")
        if distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()  # the rest runs in the first process only
        if not is_first:
            return run
        metrics = {
            "task": recipe.task,
            "metric": metric,
            "best_epoch": recorder.best_epoch,
            run.role: recorder.best,
            **taught_by,
            "parameters": count_parameters(distiller.student.net),
            "seconds": round(recorder.seconds, 1),
            "cpu_seconds": round(recorder.cpu_seconds, 1),
            "seed": recipe.train.seed,
            "data": batches.fingerprint,
            "device": str(trainer.strategy.root_device),  # the network is back on the CPU
            "processes": trainer.world_size,
            "machine": _machine(chosen.threads or torch.get_num_threads()),
            "versions": {"acamkd": __version__, **{name: version(name) for name in LIBRARIES}},
        }
        run.write_metrics(metrics)
        log.info("%s: best %s %.2f at epoch %d, in %s",
                 run.folder, metric, recorder.best[metric], recorder.best_epoch, run.weights.name)  # fmt: skip
        write_report(run)
        return run


@contextmanager
def _log_file(file: Path, is_first: bool) -> Iterator[None]:
    """Write the package's log into a file too; of several processes only the first one logs."""
    handler = logging.FileHandler(file, encoding="utf-8") if is_first else logging.NullHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    package = logging.getLogger("acamkd")
    level = package.level
    # The file gets every message, whatever level the calling program shows on its screen.
    package.setLevel(logging.INFO if is_first else logging.ERROR)
    package.addHandler(handler)
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(level)
        handler.close()


@contextmanager
def _explaining(folder: Path) -> Iterator[None]:
    """Explain a full disk or missing images, and say what to do."""
    try:
        yield
    except OSError as error:
        reason = str(error).rstrip().splitlines()[-1]  # a loading process sends a complete traceback
        raise AcamkdError(
            f"{folder}: the training stopped: {reason}; once that is fixed, --resume continues from the last checkpoint"
        ) from error


@contextmanager
def _stopping(folder: Path, recorder: Recorder, epochs: int) -> Iterator[None]:
    """Log where `--resume` continues when a signal ends the training."""
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as end:
        if end.code == TERMINATED:
            log.warning("%s: terminated; --resume goes on at step %d", folder, recorder.step)
            raise
        # Lightning handles Ctrl-C with SystemExit, and ignores further ones.
        signal.signal(signal.SIGINT, on_interrupt)
        done = len(recorder.history)
        log.warning(
            "%s: interrupted after epoch %d of %d; --resume goes on at the last checkpoint", folder, done, epochs
        )
        raise KeyboardInterrupt from None


def count_parameters(net: nn.Module) -> int:
    """Number of parameters of a network."""
    return sum(parameter.numel() for parameter in net.parameters())


def _machine(threads: int) -> str:
    """Properties that affect a CPU's rounding: its type, the instruction set that torch uses, the number of threads."""
    kind, instructions = platform.processor() or platform.machine(), torch.backends.cpu.get_cpu_capability()
    return f"{kind}, {instructions}, {threads} thread{'s' if threads > 1 else ''}"


def _hash(net: nn.Module) -> str:
    """sha256 of every tensor of a network, buffers included."""
    digest = hashlib.sha256()
    tensors: dict[str, Tensor] = net.state_dict()
    for name, tensor in tensors.items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
