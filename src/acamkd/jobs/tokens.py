"""Learn receptive tokens on a frozen teacher: the first stage of MasKD, of FreeKD and of ACAM with fixed masks."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from acamkd import config
from acamkd.data import reading
from acamkd.data.dataset import seed_of
from acamkd.distillation.auto_weight import uncalibrated
from acamkd.distillation.build import SPEAKING, build_distiller
from acamkd.distillation.distiller import Distiller
from acamkd.distillation.taps import FeatureTap
from acamkd.engine.devices import device_of
from acamkd.engine.metrics import METRICS, score
from acamkd.engine.runs import default_folder
from acamkd.errors import AcamkdError
from acamkd.files import check_writable_file
from acamkd.jobs.setup import Batches, build_network, build_teacher, teacher_section
from acamkd.losses.base import TokenModule
from acamkd.models.base import TaskModel, head_of, to_device
from acamkd.models.weights import save_tensors
from acamkd.progress import muted, progress

log = logging.getLogger(__name__)

WEIGHT_DECAY = 1e-3
LAST_LR = 1e-6
REPORTS = 10


def learn_tokens(
    recipe: config.Recipe,
    *,
    out: Path | None = None,
    iterations: int = 2000,
    lr: float = 0.01,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Learn the tokens of a recipe's losses: maskd, freekd, and acam with mask_source: fixed.

    At every tapped layer, the teacher continues with its masked feature maps. The tokens minimize the teacher's own
    loss, which keeps the features that it needs, plus the Dice overlap of the masks, summed over the layers. The
    teacher is frozen and in eval mode. The optimizer is Adam with weight decay 1e-3 and a cosine schedule to 1e-6, as
    in MasKD's detection settings.

    Args:
        recipe: Its losses name the teacher's layers in `pairs`, and the number and kind of tokens in their options.
        out: File to write, for `losses.N.tokens`; by default `runs/NAME/tokens.safetensors`.
        iterations: Number of batches.
        lr: Initial learning rate.
        overwrite: Replace the file.

    Returns:
        `task` and `dice`, the two parts of the objective by iteration; `teacher` and `masked_teacher`, the scores on
        the validation images without and with the masks. Tokens are good if both scores are close.

    Raises:
        AcamkdError: An argument or a part of the recipe cannot be used, or the objective is not finite. Nothing is
            written.
    """
    path = out.expanduser() if out else default_folder(recipe, "tokens.safetensors")
    _check_file(path, overwrite)
    if recipe.teacher is None:
        raise AcamkdError(f"the recipe {recipe.name} has no `teacher` section")
    batches = Batches(recipe)
    teacher = build_teacher(recipe, teacher_section(recipe), batches.classes)
    if not isinstance(teacher, TaskModel):
        raise AcamkdError("tokens learn from the teacher's own loss, which a teacher without a head does not have")
    if teacher.num_classes != len(batches.classes):
        raise AcamkdError("tokens learn from the teacher's own loss, which a teacher with other classes does not have")
    # The student only determines the shapes of batches and pairs here.
    blank = recipe.student.model_copy(update={"weights": None, "backbone_weights": None})
    student = build_network(recipe, blank, batches.classes)
    entries = [
        entry.model_copy(update={"tokens": None}) if "tokens" in entry.options else entry
        for entry in map(uncalibrated, recipe.losses)
    ]
    torch.manual_seed(recipe.train.seed)
    with muted(*SPEAKING):
        distiller = build_distiller(student, teacher, entries)
    modules = _token_modules(distiller, recipe.name)
    batches.check()
    distiller.to(device_of(recipe.train))
    with reading(batches.train):
        curves = _learn(distiller, modules, batches, iterations, lr)
    with reading(batches.val):
        scores = {
            "teacher": score(teacher, batches.val, batches.scorer),
            "masked_teacher": _score_masked(teacher, modules, batches),
        }
    metric = METRICS[recipe.task]
    log.info("%s of the teacher: %.2f, with masked features: %.2f",
             metric, scores["teacher"][metric], scores["masked_teacher"][metric])  # fmt: skip
    _save(modules, path)
    log.info("%s: tokens of %s; distill with --set losses.N.tokens=%s", path, ", ".join(modules), path)
    return {**curves, **scores}


def _check_file(path: Path, overwrite: bool) -> None:
    """Raise AcamkdError, before anything is learned, if the file cannot be written."""
    if path.suffix != ".safetensors":
        raise AcamkdError(f"tokens are written as safetensors: name a file .safetensors, not {path}")
    if path.exists() and not overwrite:
        raise AcamkdError(f"{path} exists: --overwrite replaces it, --out FILE writes elsewhere")
    check_writable_file(path)


def _token_modules(distiller: Distiller, name: str) -> dict[str, TokenModule]:
    """Token modules to train, by the teacher's layer."""
    modules: dict[str, TokenModule] = {}
    for pair, loss in distiller.levels:
        if pair is None or loss.tokens is None:
            continue
        if pair[1] in modules:
            raise AcamkdError(f"two losses learn tokens at the teacher's layer {pair[1]}: keep one of them at a time")
        modules[pair[1]] = loss.tokens.requires_grad_(True)
    if not modules:
        raise AcamkdError(
            f"no loss of the recipe {name} learns tokens: give it maskd, freekd, or acam with mask_source: fixed"
        )
    return modules


def _learn(
    distiller: Distiller, modules: Mapping[str, TokenModule], batches: Batches, iterations: int, lr: float
) -> dict[str, list[float]]:
    """Train the tokens; returns both parts of the objective by iteration."""
    student, teacher, seed = distiller.student, head_of(distiller.teacher), batches.resolved.train.seed
    optimizer = torch.optim.Adam(
        [parameter for module in modules.values() for parameter in module.parameters()],
        lr=lr,
        weight_decay=WEIGHT_DECAY,
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=iterations, eta_min=LAST_LR)
    curves: dict[str, list[float]] = {"task": [], "dice": []}
    started = time.monotonic()
    needed = progress(islice(_endless(batches), iterations), "learning tokens", total=iterations, unit=" batches")
    for done, (images, targets) in enumerate(needed, start=1):
        torch.manual_seed(seed_of(seed, "tokens", done))  # Faster R-CNN draws samples within its loss
        batch = student.prepare(*to_device(images, targets, student.mean.device))
        with _masked(teacher, modules) as overlaps:
            task = torch.stack(list(teacher.loss(teacher(batch), batch).values())).sum()
        dice = torch.stack(overlaps).sum()
        for name, term in (("task", task), ("dice", dice)):
            if not term.isfinite():
                raise AcamkdError(f"iteration {done}: the {name} loss of the tokens is {term.item()}: lower --lr")
            curves[name].append(term.item())
        optimizer.zero_grad()
        (task + dice).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        window = max(1, iterations // REPORTS)
        if done % window == 0 or done == iterations:
            means = [sum(curve[-window:]) / len(curve[-window:]) for curve in curves.values()]
            left = timedelta(seconds=round((time.monotonic() - started) / done * (iterations - done)))
            log.info("iteration %d/%d, task loss %.3f, dice %.3f, %s left", done, iterations, *means, left)
    return curves


def _endless(batches: Batches) -> Iterator[Any]:
    """Training batches, epoch after epoch."""
    sampler: Any = batches.train.sampler
    for epoch in count():
        sampler.set_epoch(epoch)
        yield from batches.train


@contextmanager
def _masked(teacher: TaskModel, modules: Mapping[str, TokenModule]) -> Iterator[list[Tensor]]:
    """Mask the teacher's feature maps within the context, for one forward pass; yields the masks' overlaps."""
    overlaps: list[Tensor] = []

    def edit(name: str, x: Tensor) -> Tensor:
        masked, overlap = modules[name].masked(x)
        overlaps.append(overlap)
        return masked

    with FeatureTap(teacher.net, list(modules), edit=edit):
        yield overlaps


@torch.no_grad()
def _score_masked(teacher: TaskModel, modules: Mapping[str, TokenModule], batches: Batches) -> dict[str, float]:
    device = teacher.mean.device
    for images, targets in progress(batches.val, "evaluating", unit=" batches"):
        inputs, truths = to_device(images, targets, device)
        for indices, batch in teacher.prepare_alike(inputs):
            with _masked(teacher, modules):
                predictions = teacher.decode(teacher(batch), batch)
            batches.scorer.update(predictions, [truths[index] for index in indices])
    return batches.scorer.compute()


def _save(modules: Mapping[str, TokenModule], path: Path) -> None:
    """Write `LAYER/NAME` tensors; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    named = ((layer, module.state_dict()) for layer, module in modules.items())
    save_tensors({f"{layer}/{name}": tensor for layer, state in named for name, tensor in state.items()}, path)
