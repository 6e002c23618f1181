"""The Lightning module: one training step, one validation step, one optimizer."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import lr_scheduler

from acamkd.config import Train
from acamkd.data.dataset import seed_of
from acamkd.data.loading import Images
from acamkd.distillation.distiller import Distiller, NonFiniteError, WeightSchedule
from acamkd.engine.metrics import Scorer
from acamkd.errors import AcamkdError
from acamkd.models.base import Batch, Target


class TrainingModule(L.LightningModule):
    """Trains a Distiller's student, with or without distillation.

    What a step found is in `values`, and what a validation found in `scores`, for the recorder.

    Args:
        distiller: The student and whatever it learns from; brought into the memory format that `config` asks for.
        config: The recipe's `train`.
        scorer: Collects the validation metric.
    """

    def __init__(self, distiller: Distiller, config: Train, scorer: Scorer) -> None:
        super().__init__()
        self.distiller = distiller
        if config.channels_last:  # the maps follow their convolutions' weights
            distiller.to(memory_format=torch.channels_last)
        self.config = config
        self.scorer = scorer
        self.scores: dict[str, float] = {}
        """Figures of the last validation."""
        self.values: dict[str, float] = {}
        """Loss, its terms and the losses' statistics in the last step; empty where a term was not finite."""
        self.faults: list[str] = []
        """What was not finite in the batches of the current step."""

    def on_fit_start(self) -> None:
        """Mend what torch gets wrong in the training's precision on its device, and agree on the losses' weights.

        Each process has measured `weight: auto` for itself, and other devices may round in another way.
        """
        weights = [
            {name: value for name, value in vars(loss).items() if name.endswith("weight") and isinstance(value, float)}
            for loss in self.distiller.losses
        ]
        for loss, of_first in zip(self.distiller.losses, self.trainer.strategy.broadcast(weights), strict=True):
            vars(loss).update(of_first)
        if self.trainer.precision == "bf16-mixed" and self.trainer.strategy.root_device.type == "cpu":
            mend_convolutions(self.distiller.student.net)

    def on_train_start(self) -> None:
        """Turn the epochs of the losses' schedules into steps: only now is it known how many processes there are."""
        for schedule in self.distiller.schedules:
            if isinstance(schedule, WeightSchedule):
                schedule.steps_per_epoch = -(-int(self.trainer.num_training_batches) // self.config.accumulate)

    def training_step(self, batch: tuple[Any, ...], batch_idx: int) -> Tensor:
        """Return the training loss of one batch.

        Args:
            batch: Images and targets and, if there are any, as many unlabeled images. A term that sees both is
                the mean of the two, so that its weight means the same as without.
            batch_idx: Its place in the epoch.
        """
        # Every draw inside a step (dropout, a random mask, sampled boxes) is a function of the seed and the position.
        batches = int(self.trainer.num_training_batches)
        position = self.current_epoch * batches + batch_idx
        torch.manual_seed(seed_of(self.config.seed, position, self.global_rank))
        terms, statistics, faults = self._terms(*batch)
        total = torch.stack(list(terms.values())).sum()
        if faults:  # dealt with where all processes are behind their backward pass, each part of which others wait for
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
        """Loss terms, the losses' statistics, and what was not finite."""
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
        """Collect the predictions of one batch, in 32 bits whatever the training's precision, as every score is."""
        images, targets = batch
        with torch.autocast(self.device.type, enabled=False):
            self.scorer.update(self.distiller.student.predict(images), targets)

    def on_validation_epoch_end(self) -> None:
        """Keep the metrics."""
        self.scores = self.scorer.compute()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Student and loss parameters in groups of their own; the schedule moves by step."""
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
            # torch divides by zero where exactly one step rises, or none falls.
            pct_start = min(max(config.pct_start, 1.5 / total_steps), 1 - 0.5 / total_steps)
            return lr_scheduler.OneCycleLR(
                optimizer, max_lr=peaks, total_steps=total_steps, pct_start=pct_start,
                cycle_momentum=self.config.optimizer.name != "sgd",  # whose momentum is the recipe's
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
    """Keep a network's dilated depthwise convolutions from channels last, and leave the rest of it as it is.

    In bfloat16 on a CPU torch (2.14, by oneDNN) gives the weights of such a convolution a wrong gradient as soon as
    they or its input are channels last, which a network's own permutations can bring about too.
    """
    for layer in net.modules():
        if (
            isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)
            and layer.groups == layer.in_channels
            and max(layer.dilation) > 1
        ):
            # `contiguous` would leave weights of (C, 1, H, W) as they are, in either format.
            layer.weight.data = layer.weight.data.clone(memory_format=torch.contiguous_format)
            layer.register_forward_pre_hook(_contiguous)


def _contiguous(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.contiguous() for x in inputs)
