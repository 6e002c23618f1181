"""The Lightning module: one training step, one validation step, one optimizer."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeAlias

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import lr_scheduler

from acamkd.config import Train
from acamkd.data.dataset import seed_of
from acamkd.data.loading import Images
from acamkd.data.transforms import batch_scale
from acamkd.distillation.compiled import can_compile
from acamkd.distillation.distiller import Distiller, describe_nonfinite
from acamkd.distillation.schedule import WeightSchedule
from acamkd.engine.metrics import Validator
from acamkd.engine.quantization import FakeQuantization
from acamkd.errors import AcamkdError
from acamkd.models.base import Batch, Target
from acamkd.models.resize import rescale
from acamkd.models.weights import save_weights
from acamkd.stopwatch import counted, timed

log = logging.getLogger(__name__)

Options: TypeAlias = dict[str, float]
"""What an optimizer's group has for itself."""


class TrainingModule(L.LightningModule):
    """Trains a Distiller's student, with or without distillation.

    The recorder reads the loss terms of the last step from `values`, and the metrics of the last validation from
    `scores`.

    Args:
        distiller: The student with its teacher and losses. It is converted to the memory format that `config` asks for.
        config: The recipe's `train`.
        validator: Judges the student after an epoch.
    """

    def __init__(self, distiller: Distiller, config: Train, validator: Validator) -> None:
        super().__init__()
        self.distiller = distiller
        if config.channels_last:  # feature maps take the memory format of the weights
            distiller.to(memory_format=torch.channels_last)
        self.config = config
        self.validator = validator
        self.scores: dict[str, float] = {}
        """Metrics of the last validation."""
        self._values: dict[str, float] = {}
        self._pending: tuple[int, list[str], Tensor] | None = None
        """Step, names and values of the last batch, while they are on its device only."""
        self.quantization = FakeQuantization(distiller.student) if config.quantize else None
        self.faults: list[str] = []
        """What was not finite in the batches of the current step."""
        self._scale: float | None = None
        """Factor of the current batch's size, by `multiscale`."""
        self.group_names: list[str] = []
        """What the optimizer's groups of parameters are called in the log; two may share a name and learning rate."""

    @property
    def values(self) -> dict[str, float]:
        """Loss, its terms and the losses' statistics in the last batch; empty where a term was not finite."""
        self.fetch()
        return self._values

    def fetch(self, flag: Tensor | None = None) -> bool:
        """Read the last batch's values and a flag from the device at once: a step waits for it nowhere else.

        Returns:
            The flag; True without one.
        """
        if self._pending is None:
            return flag is None or bool(flag)
        step, names, numbers = self._pending
        self._pending = None
        if flag is not None:
            numbers = torch.cat([numbers, flag.float().view(1)])
        with timed("waiting for the GPU") if numbers.is_cuda else nullcontext():
            read = numbers.tolist()
        self._values = dict(zip(names, read, strict=False))
        terms = {name.removeprefix("loss/"): x for name, x in self._values.items() if name.startswith("loss/")}
        if fault := describe_nonfinite(terms, step):
            self.faults.append(fault)
            self._values = {}
        return flag is None or bool(read[-1])

    def on_fit_start(self) -> None:
        """Work around a torch error in bfloat16 on the CPU, compile, and give all processes the same loss weights.

        Each process has measured `weight: auto` itself, and devices may round differently.
        """
        weights = [loss.factors for _, loss in self.distiller.levels]
        for loss, of_first in zip(self.distiller.losses, self.trainer.strategy.broadcast(weights), strict=True):
            vars(loss).update(of_first)
        if self.trainer.precision == "bf16-mixed" and self.trainer.strategy.root_device.type == "cpu":
            mend_convolutions(self.distiller.student.net)
        if self.config.compile and self.quantization is not None:
            log.warning("train.compile: the training is not compiled, since train.quantize acts by hooks")
        elif self.config.compile and can_compile(self.device):
            self.distiller.compile_parts()

    def on_train_start(self) -> None:
        """Convert the loss schedules from epochs to steps: the number of processes is known only now."""
        for schedule in self.distiller.schedules:
            if isinstance(schedule, WeightSchedule):
                schedule.steps_per_epoch = -(-int(self.trainer.num_training_batches) // self.config.accumulate)

    def training_step(self, batch: tuple[Any, ...], batch_idx: int) -> Tensor:
        """Return the training loss of one batch.

        Args:
            batch: Images, targets and, if the recipe has them, as many unlabeled images. A term computed on both is
                their mean, so that its weight keeps its meaning.
            batch_idx: Index of the batch in the epoch.
        """
        # Every random draw in a step (dropout, random masks, sampled boxes) depends only on seed, position and rank.
        batches = int(self.trainer.num_training_batches)
        position = self.current_epoch * batches + batch_idx
        torch.manual_seed(seed_of(self.config.seed, position, self.global_rank))
        if self.config.multiscale is not None:
            self._scale = batch_scale(self.config.multiscale, self.config.seed, self.current_epoch, batch_idx)
        terms, statistics = self._terms(*batch)
        total = torch.stack(list(terms.values())).sum()
        found = {f"loss/{name}": term for name, term in terms.items()} | statistics | {"loss": total}
        numbers = torch.stack([value.detach().float() for value in found.values()])
        self._pending = (self.global_step, list(found), numbers)
        if self.trainer.world_size > 1:  # DDP waits for every gradient, also for that of a loss that has stopped
            total = total + 0 * sum(p.sum() for p in self.distiller.losses.parameters() if p.requires_grad)
        # A loss that is not finite makes gradients NaN, by which all processes learn of it before the optimizer's step.
        total = total * torch.where(total.detach().isfinite(), 1.0, torch.nan)
        # Lightning divides by `accumulate`, and an epoch may end with fewer batches than that.
        accumulate = self.config.accumulate
        return total * (accumulate / min(accumulate, batches - batch_idx // accumulate * accumulate))

    def _terms(
        self, images: list[Tensor], targets: list[Target], unlabeled: list[Tensor] | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the loss terms and the losses' statistics."""
        student = self.distiller.student
        counted("images", len(images) + len(unlabeled or ()))
        with timed("collation"):
            batch = student.prepare(images, targets)
        terms = self.run_losses(batch, labeled=True)
        statistics = self.distiller.statistics()
        if unlabeled:
            with timed("collation"):
                batch = student.prepare(unlabeled)
            more = self.run_losses(batch, labeled=False)
            terms |= {name: (terms[name] + term) / 2 for name, term in more.items()}
        return terms, statistics

    def run_losses(self, batch: Batch, *, labeled: bool) -> dict[str, Tensor]:
        """Return the loss terms of one batch, whether they are finite or not."""
        if self._scale is not None:
            batch = rescale(batch, self._scale, self.distiller.multiple)
        return self.distiller(batch, self.global_step, labeled=labeled, check=False)  # type: ignore[no-any-return]

    def save_best(self, file: Path) -> None:
        """Write the student's network, and what its framework needs to load it."""
        student = self.distiller.student
        save_weights(student.net, file)
        student.write_config(file, self.validator.classes)

    def validation_step(self, batch: Images, batch_idx: int) -> None:
        """Judge the student on one batch, computed in 32 bits whatever the training's precision is."""
        images, targets = batch
        with torch.autocast(self.device.type, enabled=False):
            self.validator.see(self.distiller, images, targets)

    def on_validation_epoch_end(self) -> None:
        """Keep the metrics."""
        self.scores = self.validator.compute()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Put student and loss parameters into separate groups; the schedule advances once per optimization step."""
        config, student = self.config.optimizer, self.distiller.student
        apart = {id(p) for p in student.backbone.parameters()} if config.backbone_lr is not None else set()
        parts = [
            ("student", [p for p in student.parameters() if id(p) not in apart], config.lr),
            ("backbone", [p for p in student.parameters() if id(p) in apart], config.backbone_lr),
            ("losses", self.distiller.losses.parameters(), config.losses_lr or config.lr),
        ]
        named = [
            (name, {"params": part, "lr": lr, **spared})
            for name, parameters, lr in parts
            for part, spared in self._by_decay(name, parameters)
            if part
        ]
        self.group_names = [name for name, _ in named]
        groups = [group for _, group in named]
        optimizer: torch.optim.Optimizer
        if config.name == "sgd":
            optimizer = torch.optim.SGD(groups, momentum=config.momentum, weight_decay=config.weight_decay)
        else:
            optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
        scheduler = self._schedule(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _by_decay(self, name: str, parameters: Iterable[nn.Parameter]) -> list[tuple[list[nn.Parameter], Options]]:
        """Parameters that train, and apart those that are spared from weight decay."""
        trained = [p for p in parameters if p.requires_grad]
        if name == "losses" or self.config.optimizer.norm_decay:
            return [(trained, {})]
        # Biases and the parameters of normalization layers have one dimension.
        return [([p for p in trained if p.ndim > 1], {}), ([p for p in trained if p.ndim <= 1], {"weight_decay": 0.0})]

    def _schedule(self, optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
        config = self.config.schedule
        total_steps = int(self.trainer.estimated_stepping_batches)
        if not total_steps:
            raise AcamkdError(
                f"the training images do not make one batch of {self.config.batch_size} for each of "
                f"{self.trainer.world_size} processes: lower train.batch_size or train.devices"
            )
        if config.name == "one_cycle":
            return self._one_cycle(optimizer, max(total_steps, 2))
        self._warn_of_what_never_comes(total_steps)
        steps_per_epoch = total_steps // self.config.epochs
        parts: list[lr_scheduler.LRScheduler] = []
        if config.warmup_steps:
            parts.append(lr_scheduler.LinearLR(optimizer, start_factor=1e-3, total_iters=config.warmup_steps))
        if config.name == "step":
            milestones = [epoch * steps_per_epoch for epoch in config.milestones]
            parts.append(lr_scheduler.MultiStepLR(optimizer, milestones, gamma=config.gamma))
        elif config.name == "polynomial":
            parts.append(lr_scheduler.PolynomialLR(optimizer, total_iters=total_steps, power=config.power))
        return lr_scheduler.ChainedScheduler(parts or [lr_scheduler.ConstantLR(optimizer, factor=1.0)], optimizer)

    def _one_cycle(self, optimizer: torch.optim.Optimizer, total_steps: int) -> lr_scheduler.LRScheduler:
        # torch divides by zero if the learning rate rises for exactly one step, or never falls.
        pct_start = min(max(self.config.schedule.pct_start, 1.5 / total_steps), 1 - 0.5 / total_steps)
        return lr_scheduler.OneCycleLR(
            optimizer, max_lr=[group["lr"] for group in optimizer.param_groups], total_steps=total_steps,
            pct_start=pct_start,
            cycle_momentum=self.config.optimizer.name != "sgd",  # with sgd the recipe sets the momentum
        )  # fmt: skip

    def _warn_of_what_never_comes(self, total_steps: int) -> None:
        """No error: a recipe's first trial is often of one epoch."""
        config, epochs = self.config.schedule, self.config.epochs
        if config.warmup_steps >= total_steps:
            log.warning(
                "train.schedule: the rate rises for warmup_steps %d, and the training has %d steps: it never reaches "
                "lr; lower warmup_steps", config.warmup_steps, total_steps,
            )  # fmt: skip
        if late := [epoch for epoch in config.milestones if epoch >= epochs]:
            log.warning(
                "train.schedule.milestones: the training ends with epoch %d, so that %s change nothing", epochs, late,
            )  # fmt: skip


def mend_convolutions(net: nn.Module) -> None:
    """Keep the dilated depthwise convolutions of a network in the contiguous memory format.

    In bfloat16 on a CPU, torch 2.14 (oneDNN) computes a wrong weight gradient for such a convolution. The error occurs
    if the weights or the input are channels last, which permutations within a network can also cause.
    """
    for layer in net.modules():
        if (
            isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)
            and layer.groups == layer.in_channels
            and max(layer.dilation) > 1
        ):
            # `contiguous` copies nothing here: weights of (C, 1, H, W) count as contiguous in both formats.
            layer.weight.data = layer.weight.data.clone(memory_format=torch.contiguous_format)
            layer.register_forward_pre_hook(_contiguous)


def _contiguous(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.contiguous() for x in inputs)
