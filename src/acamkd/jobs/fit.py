"""What every training does in its run folder: start or resume, follow, end, and write down what came out."""

from __future__ import annotations

import hashlib
import logging
import platform
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor, distributed, nn

from acamkd import __version__, data
from acamkd.distillation.distiller import Distiller
from acamkd.engine.averaging import EMA
from acamkd.engine.checkpoint import find_checkpoint
from acamkd.engine.devices import device_of
from acamkd.engine.mask_history import MaskHistory, compared_pairs
from acamkd.engine.module import TrainingModule
from acamkd.engine.runs import LOG, TERMINATED, Run
from acamkd.engine.step_profile import StepProfiler
from acamkd.engine.threads import ThreadChoice
from acamkd.engine.trackers import build_trackers
from acamkd.engine.trainer import Recorder, build_trainer
from acamkd.engine.unreached import Unreached
from acamkd.errors import AcamkdError
from acamkd.jobs.setup import Loaders, describe_lead
from acamkd.jobs.shared import SharedWork
from acamkd.processes import is_distributed
from acamkd.progress import is_first_process, shows_progress
from acamkd.report.run import REPORT, write_report

log = logging.getLogger(__name__)

LIBRARIES = ("torch", "torchvision", "lightning", "timm", "segmentation-models-pytorch")


class ScoredTeacher(NamedTuple):
    """A teacher's hash, and what scores it on the validation images."""

    sha256: str
    score: Callable[[], dict[str, float]]


def fit(
    run: Run,
    distiller: Distiller,
    batches: Loaders,
    *,
    resume: bool,
    overwrite: bool,
    profile: bool = False,
    report: bool = True,
    inherited: str | None = None,
    teacher: ScoredTeacher | None = None,
    module_of: type[TrainingModule] = TrainingModule,
    shared: SharedWork | None = None,
) -> Run:
    """Train into the run folder.

    Args:
        run: The folder, with the recipe as it is to be written there.
        distiller: What is trained.
        batches: What is read; the images have been checked.
        resume: Continue the run that the folder holds.
        overwrite: Replace it.
        profile: Measure where the time of the steps goes.
        report: Write the run's report at the end; a backbone has none.
        inherited: Hash of a teacher that only initializes the student.
        teacher: The teacher that the losses compare with.
        module_of: What trains it.
        shared: Where the teacher's feature maps are kept for other trainings.
    """
    recipe, metric = run.recipe, batches.validator.metric
    predicts = run.role != "backbone"
    report = report and predicts
    ema = None if recipe.train.ema is None else EMA(recipe.train.ema)
    recorder = Recorder(run.folder, run.weights.name, metric, patience=recipe.train.patience, ema=ema)
    compares_maps = predicts and any(compared_pairs(distiller))
    watching = [MaskHistory(run.folder, batches.splits["val"])] if compares_maps else []
    chosen = ThreadChoice()
    trackers = build_trackers(recipe, run.folder)
    origin = {f"the {name} images": content for name, content in batches.fingerprint.items()}
    if teacher is not None:
        origin["the teacher's weights"] = teacher.sha256
    profiler = StepProfiler(run.folder, device_of(recipe.train)) if profile and is_first_process() else None
    trainer = build_trainer(
        recipe.train, recorder, progress=shows_progress(sys.stdout), callbacks=[*watching, chosen, Unreached()],
        trackers=trackers, skips_parameters=distiller.student.skips_parameters, profiler=profiler, origin=origin,
    )  # fmt: skip
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
            if is_first and report and not (run.folder / REPORT).is_file():
                write_report(run)
            return run
        if resume and not goes_on:
            log.warning("%s has no finished epoch to resume from: the training starts anew", run.folder)
        checkpoint = find_checkpoint(run.folder) if goes_on else None
        taught_by: dict[str, Any] = {"inherited_sha256": inherited} if inherited else {}
        if teacher is not None:
            distiller.teacher.to(trainer.strategy.root_device)
            taught_by = _taught_by(run, distiller, batches, teacher)
            if shared is not None:
                shared.share_maps(distiller, batches, teacher.sha256)
        torch.manual_seed(recipe.train.seed)
        module = module_of(distiller, recipe.train, batches.validator)
        measured = profiler.measuring() if profiler else nullcontext()
        with measured, data.reading(batches.mixed, batches.val), _stopping(run.folder, recorder, recipe.train.epochs):
            trainer.fit(module, batches.mixed, batches.val, ckpt_path=checkpoint)
        if teacher is not None and hash_of(distiller.teacher.net) != teacher.sha256:
            raise RuntimeError("the teacher changed during training")
        if is_distributed():
            distributed.destroy_process_group()  # the rest runs in the first process only
        if not is_first:
            return run
        run.write_metrics(_metrics(run, distiller, batches, recorder, trainer, chosen.threads, taught_by))
        log.info("%s: best %s %.2f at epoch %d, in %s%s", run.folder, metric, recorder.best[metric],
                 recorder.best_epoch, run.weights.name, " (EMA of the weights)" if ema else "")  # fmt: skip
        if report:
            write_report(run)
        return run


def _taught_by(run: Run, distiller: Distiller, batches: Loaders, teacher: ScoredTeacher) -> dict[str, Any]:
    """What metrics.json says of the teacher; the log warns of one that is not ahead of the baseline."""
    with data.reading(batches.val):
        scores = teacher.score()
    if run.role != "backbone":
        behind = describe_lead(run.recipe, scores[batches.validator.metric], run.folder.parent / "baseline")
        if behind is not None:
            log.warning("%s", behind)
    found: dict[str, Any] = {"teacher": scores, "teacher_sha256": teacher.sha256}
    if distiller.teacher.license is not None:
        found["teacher_license"] = distiller.teacher.license
    return found


def _metrics(
    run: Run,
    distiller: Distiller,
    batches: Loaders,
    recorder: Recorder,
    trainer: L.Trainer,
    threads: int | None,
    taught_by: Mapping[str, Any],
) -> dict[str, Any]:
    """What metrics.json says of a training."""
    return {
        "task": run.recipe.task,
        "metric": batches.validator.metric,
        "best_epoch": recorder.best_epoch,
        "epochs": len(recorder.history),
        run.role: recorder.best,
        **taught_by,
        "parameters": count_parameters(distiller.student.net),
        "seconds": round(recorder.seconds, 1),
        "cpu_seconds": round(recorder.cpu_seconds, 1),
        "seed": run.recipe.train.seed,
        "data": batches.fingerprint,
        "device": str(trainer.strategy.root_device),  # the network is back on the CPU
        "processes": trainer.world_size,
        "machine": _machine(threads or torch.get_num_threads()),
        "versions": {"acamkd": __version__, **{name: version(name) for name in LIBRARIES}},
    }


@contextmanager
def _log_file(file: Path, is_first: bool) -> Iterator[None]:
    """Write the package's log into a file too; of several processes only the first one logs."""
    handler = (
        logging.FileHandler(file, encoding="utf-8", errors="backslashreplace") if is_first else logging.NullHandler()
    )
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
        text = str(error).rstrip() or type(error).__name__
        reason = text.splitlines()[-1]  # a loading process sends a complete traceback
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


def hash_of(net: nn.Module) -> str:
    """sha256 of every tensor of a network, buffers included."""
    digest = hashlib.sha256()
    tensors: dict[str, Tensor] = net.state_dict()
    for name, tensor in tensors.items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
