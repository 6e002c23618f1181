"""The forms of a network in PyTorch.

A form changes the network's forward alone. That of Faster R-CNN ends with the proposals: its RoI pooling and box head
run within `decode`, in float32 and uncompiled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from acamkd.jobs.export.onnx_forms import Form
from acamkd.jobs.export.onnx_model import Pixels, Prediction
from acamkd.models.base import Batch, Outputs, TaskModel


class TorchForm(Form):
    """A network in PyTorch, in the precision of its weights.

    Args:
        network: Name of the network.
        file: File of its weights.
        threads: Threads of the processor.
        build: Builds the network in eval mode; it can be pickled.
        device: `cpu` or `cuda`.
    """

    runtime = "PyTorch"

    def __init__(
        self, network: str, file: Path, threads: int, build: Callable[[], TaskModel], device: str = "cpu"
    ) -> None:
        super().__init__(network, file, threads)
        self.build = build
        self.device = device

    @property
    def name(self) -> str:
        """With the device, unless it is the processor."""
        return self.runtime + (f", {self.device}" if self.device != "cpu" else "")

    def load(self) -> None:
        """See the base class."""
        torch.set_num_threads(self.threads)
        self.model = self.build().to(self.device)

    def precision(self) -> AbstractContextManager[Any]:
        """Context of the forward; here autocast stays off."""
        return nullcontext()

    def forward(self, batch: Batch) -> Outputs:
        """The raw outputs."""
        outputs: Outputs = self.model(batch)
        return outputs

    def prepare(self, images: Sequence[Pixels]) -> Batch:
        """See the base class."""
        return self.model.prepare([torch.from_numpy(image).permute(2, 0, 1).to(self.device) for image in images])

    @torch.no_grad()
    def run(self, inputs: Batch) -> Outputs:
        """See the base class."""
        with self.precision():
            outputs = self.forward(inputs)
        if self.device == "cuda":
            torch.cuda.synchronize()
        return outputs

    @torch.no_grad()
    def decode(self, outputs: Outputs, inputs: Batch) -> list[Prediction]:
        """See the base class."""
        found = self.model.decode(outputs, inputs)
        return [{name: values.cpu().numpy() for name, values in each.items()} for each in found]


class Bfloat16Form(TorchForm):
    """The same under autocast to bfloat16, as `train.precision: bf16-mixed` trains, all but what `decode` runs."""

    runtime = "PyTorch bf16"

    def precision(self) -> AbstractContextManager[Any]:
        """See the base class."""
        return torch.autocast(self.device, torch.bfloat16)


class CompiledForm(TorchForm):
    """The same by `torch.compile`, all but what `decode` runs; its first call compiles."""

    runtime = "PyTorch compiled"

    @property
    def takes_batches(self) -> bool:
        """Not here, since each size would be compiled anew, in minutes."""
        return False

    def load(self) -> None:
        """See the base class."""
        super().load()
        self.compiled = torch.compile(self.model)

    def forward(self, batch: Batch) -> Outputs:
        """See the base class."""
        outputs: Outputs = self.compiled(batch)
        return outputs
