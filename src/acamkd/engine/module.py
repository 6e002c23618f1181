"""The Lightning module: one training step, one validation step, one optimizer."""

from __future__ import annotations

import logging
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import lr_scheduler

from acamkd.config import Train
from acamkd.data.dataset import seed_of
from acamkd.data.loading import Images
from acamkd.distillation.compiled import can_compile
from acamkd.distillation.distiller import Distiller, NonFiniteError, WeightSchedule
from acamkd.engine.metrics import Scorer
from acamkd.engine.quantization import FakeQuantization
from acamkd.errors import AcamkdError
from acamkd.models.base import Batch, Target

log = logging.getLogger(__name__)


class TrainingModule(L.LightningModule):
    """Trains a Distiller's student, with or without distillation.

    The recorder reads the loss terms of the last step from `values`, and the metrics of the last validation from
    `scores`.

    Args:
        distiller: The student with its teacher and losses. It is converted to the memory format that `config` asks for.
        config: The recipe's `train`.
        scorer: Collects the validation metric.
    """

    def __init__(self, distiller: Distiller, config: Train, scorer: Scorer) -> None:
        super().__init__()
        self.distiller = distiller
        if config.channels_last:  # feature maps take the memory format of the weights
            distiller.to(memory_format=torch.channels_last)
        self.config = config
        self.scorer = scorer
        self.scores: dict[str, float] = {}
        """Metrics of the last validation."""
        self.values: dict[str, float] = {}
        """Loss, its terms and the losses' statistics in the last step; empty where a term was not finite."""
        self.quantization = FakeQuantization(distiller.student) if config.quantize else None
        self.faults: list[str] = []
        """What was not finite in the batches of the current step."""

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
        terms, statistics, faults = self._terms(*batch)
        total = torch.stack(list(terms.values())).sum()
        if faults:  # handled after the backward pass, which every process must complete for the others
            self.values = {}
            self.faults += faults
            return torch.nan * (total + torch.stack([p.sum() for p in self.parameters() if p.requires_grad]).sum())
        found = {f"loss/{name}": term for name, term in terms.items()} | statistics | {"loss": total}
        numbers = torch.stack([value.detach().float() for value in found.values()]).tolist()
        self.values = dict(zip(found, numbers, strict=True))
        if self.trainer.world_size > 1:  # DDP waits for every gradient, also for that of a loss that has stopped
            total = total + 0 * sum(p.sum() for p in self.distiller.losses.parameters() if p.requires_grad)
        # Lightning divides by `accumulate`, and an epoch may end with fewer batches than that.
        accumulate = self.config.accumulate
        return total * (accumulate / min(accumulate, batches - batch_idx // accumulate * accumulate))

    def _terms(
        self, images: list[Tensor], targets: list[Target], unlabeled: list[Tensor] | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
        """Return the loss terms, the losses' statistics, and descriptions of what was not finite."""
        student, faults = self.distiller.student, []

        def run(batch: Batch, *, labeled: bool) -> dict[str, Tensor]:
            try:
                return self.distiller(batch, self.global_step, labeled=labeled)  # type: ignore[no-any-return]
            except NonFiniteError as error:
                faults.append(str(error))
                return error.terms

        terms = run(student.prepare(images, targets), labeled=True)
        statistics = self.distiller.statistics()
        if unlabeled:
            more = run(student.prepare(unlabeled), labeled=False)
            terms |= {name: (terms[name] + term) / 2 for name, term in more.items()}
        return terms, statistics, faults

    def validation_step(self, batch: Images, batch_idx: int) -> None:
        """Collect one batch's predictions, computed in 32 bits whatever the training's precision is."""
        images, targets = batch
        with torch.autocast(self.device.type, enabled=False):
            self.scorer.update(self.distiller.student.predict(images), targets)

    def on_validation_epoch_end(self) -> None:
        """Keep the metrics."""
        self.scores = self.scorer.compute()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Put student and loss parameters into separate groups; the schedule advances once per optimization step."""
        config = self.config.optimizer
        groups = [
            {"params": [p for p in self.distiller.student.parameters() if p.requires_grad], "lr": config.lr},
            {"params": [p for p in self.distiller.losses.parameters() if p.requires_grad],
             "lr": config.losses_lr or config.lr},
        ]  # fmt: skip
        groups = [group for group in groups if group["params"]]
        optimizer: torch.optim.Optimizer
        if config.name == "sgd":
            optimizer = torch.optim.SGD(groups, momentum=config.momentum, weight_decay=config.weight_decay)
        else:
            optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
        scheduler = self._schedule(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _schedule(self, optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
        config = self.config.schedule
        total_steps = int(self.trainer.estimated_stepping_batches)
        if not total_steps:
            raise AcamkdError(
                f"the training images do not make one batch of {self.config.batch_size} for each of "
                f"{self.trainer.world_size} processes: lower train.batch_size or train.devices"
            )
        steps_per_epoch = total_steps // self.config.epochs
        if config.name == "one_cycle":
            peaks = [group["lr"] for group in optimizer.param_groups]
            total_steps = max(total_steps, 2)
            # torch divides by zero if the learning rate rises for exactly one step, or never falls.
            pct_start = min(max(config.pct_start, 1.5 / total_steps), 1 - 0.5 / total_steps)
            return lr_scheduler.OneCycleLR(
                optimizer, max_lr=peaks, total_steps=total_steps, pct_start=pct_start,
                cycle_momentum=self.config.optimizer.name != "sgd",  # with sgd the recipe sets the momentum
            )  # fmt: skip
        parts: list[lr_scheduler.LRScheduler] = []
        if config.warmup_steps:
            parts.append(lr_scheduler.LinearLR(optimizer, start_factor=1e-3, total_iters=config.warmup_steps))
        if config.name == "step":
            milestones = [epoch * steps_per_epoch for epoch in config.milestones]
            parts.append(lr_scheduler.MultiStepLR(optimizer, milestones, gamma=config.gamma))
        elif config.name == "polynomial":
            parts.append(lr_scheduler.PolynomialLR(optimizer, total_iters=total_steps, power=config.power))
        return lr_scheduler.ChainedScheduler(parts or [lr_scheduler.ConstantLR(optimizer, factor=1.0)], optimizer)


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
