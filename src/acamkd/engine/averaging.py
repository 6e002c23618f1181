"""EMA: a moving average of the student's weights, which is evaluated and saved in their place."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from acamkd.engine.module import TrainingModule
from acamkd.engine.runs import NET

WARMUP = 2000
"""Steps in which the decay comes to 63 % of its value, as in the trainers of YOLOv5 and RT-DETR."""


class Average(AveragedModel):
    """A network's moving average. It counts its updates here: torch's class reads its count from the GPU in each step.

    Args:
        net: The network, which is copied.
        device: Of the copy.
        decay: As in EMA.
    """

    def __init__(self, net: nn.Module, device: torch.device, decay: float) -> None:
        super().__init__(net, device)
        self.count, self._decay = 0, decay

    @property
    def decay_now(self) -> float:
        """The decay of the next update."""
        return self._decay * (1 - math.exp(-self.count / WARMUP))

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Let a network's parameters and buffers enter."""
        by_dtype: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
        for average, weight in zip(_tensors(self.module), _tensors(model), strict=True):
            averages, weights = by_dtype[average.dtype]
            averages.append(average)
            weights.append(weight)
        for dtype, (averages, weights) in by_dtype.items():
            if self.count and dtype.is_floating_point:
                torch._foreach_lerp_(averages, weights, 1 - self.decay_now)
            else:
                torch._foreach_copy_(averages, weights)
        self.count += 1


class EMA(WeightAveraging):
    """Lightning's weight averaging, of the student's network alone: the teacher and the losses are not copied.

    After step t, counted from 0, each parameter and each floating-point buffer w of the network enters its average a by

        a <- d a + (1 - d) w,    d = decay (1 - exp(-t / 2000)),    a = w after the first step

    Whole-number buffers are copied. Within a validation the network has the averaged weights. A checkpoint holds them
    in `state_dict`, because they are what was scored, and the weights that go on training in `current_model_state`. At
    the end of the training the network keeps the averaged weights.

    Args:
        decay: The recipe's `train.ema`.
    """

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.decay = decay

    @property
    def decay_now(self) -> float:
        """The decay of the next step."""
        return self._average.decay_now

    @contextmanager
    def applied(self, net: nn.Module) -> Iterator[None]:
        """Within, the network has the averaged weights."""
        self._swap_models(net)  # type: ignore[arg-type]
        try:
            yield
        finally:
            self._swap_models(net)  # type: ignore[arg-type]

    @property
    def _average(self) -> Average:
        assert isinstance(self._average_model, Average)
        return self._average_model

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Copy the network; on its device, which Lightning moves it to later."""
        self._average_model = Average(_net(pl_module), trainer.strategy.root_device, self.decay)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the average after an optimization step."""
        super().on_train_batch_end(trainer, _net(pl_module), outputs, batch, batch_idx)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the averaged weights in the network."""
        super().on_train_end(trainer, _net(pl_module))

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the averaged weights in; of several processes all score the buffers of the first, which are saved."""
        for buffer in self._average.module.buffers() if trainer.world_size > 1 else ():
            torch.distributed.broadcast(buffer, 0)
        super().on_validation_epoch_start(trainer, _net(pl_module))

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the network's own weights back."""
        super().on_validation_epoch_end(trainer, _net(pl_module))

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Let the averaged weights take the place of the network's own, which are kept apart."""
        own = checkpoint["state_dict"]
        averages = {f"{NET}{name}": x for name, x in self._average.module.state_dict().items()}
        checkpoint["current_model_state"] = {name: own[name] for name in averages}
        checkpoint["state_dict"] = {**own, **averages}
        checkpoint["averaging_state"] = {"n_averaged": self._average.count}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore both from a checkpoint; the network has the averaged weights by now."""
        net = _net(pl_module)
        self._average.module.load_state_dict(net.state_dict())
        self._average.count = checkpoint["averaging_state"]["n_averaged"]
        own = checkpoint["current_model_state"]
        net.load_state_dict({name.removeprefix(NET): x for name, x in own.items()})


def _tensors(net: nn.Module) -> Iterator[Tensor]:
    yield from net.parameters()
    yield from net.buffers()


def _net(pl_module: L.LightningModule) -> Any:
    assert isinstance(pl_module, TrainingModule)
    return pl_module.distiller.student.net
