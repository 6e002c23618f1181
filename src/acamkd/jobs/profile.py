"""What a distillation takes, before it is run: parameters, operations, memory, and the largest batch that fits."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from acamkd import config, data
from acamkd.distillation.auto_weight import prepared, probe_distiller
from acamkd.distillation.distiller import Distiller
from acamkd.engine.cost import flop_counter
from acamkd.engine.printing import Printable
from acamkd.errors import AcamkdError
from acamkd.jobs.setup import build_network
from acamkd.models.base import Batch, TaskModel, keeping_modes

IMAGES = 2
"""Training images that are run; batch norm may refuse a single one."""
WORKSPACE = 4 / 3
"""What a process takes at most by what is counted: operators need memory of their own (see performance.md)."""
TIMED, TIMED_SECONDS = 3, 4.0
"""Steps that are timed, and seconds after which no further one is."""
STATES = {"sgd": 1, "adamw": 2}
"""Numbers that an optimizer keeps for each parameter."""


@dataclass(frozen=True)
class Part:
    """What one part of a training step takes.

    Attributes:
        name: `teacher`, whose forward ends at the last tapped layer; `student`, forward and backward of its own task;
            `losses`, what they add to both, with the teacher's maps that they keep, and both networks on as many
            unlabeled images, where there are some; `attention`, the losses' `attention_module`, such as ACAM's
            fusion: forward and backward, counted among the losses' too, and its memory by itself, of labeled images
            alone.
        parameters: Their number.
        gflops: 1e9 floating-point operations per image of a training step, counted as in `acamkd.engine.cost`.
        inference: The same of one prediction; None where nothing is predicted.
        memory: Largest number of bytes per image that are alive at a time, without the parameters.
    """

    name: str
    parameters: int
    gflops: float
    memory: float
    inference: float | None = None


@dataclass(frozen=True)
class Estimate(Printable):
    """What a distillation takes in float32; mixed precision takes less memory.

    Attributes:
        parts: Teacher, student, losses and, of these, attention.
        frame: (height, width) of the batch that was run.
        image: Bytes per image of a whole step. Not the sum of the parts: the teacher is done before the student's
            forward begins.
        fixed: Bytes of all weights, and of gradients and optimizer states of those that train.
        free: Bytes that the device can still give, with the weights loaded.
        batch_size: The recipe's.
        with_unlabeled: Whether the losses run on unlabeled images too.
        seconds: Of a step of the recipe's batch on this machine, without reading images and without the optimizer.
        steps: Optimization steps of the recipe's training.
        largest_batch: Images that fit into that, with a third on top of what is counted; 0 where not even one does.
    """

    parts: tuple[Part, ...]
    frame: tuple[int, int]
    image: float
    fixed: int
    free: int
    batch_size: int
    with_unlabeled: bool
    largest_batch: int
    seconds: float
    steps: int

    @property
    def hours(self) -> float:
        """Of all steps of the recipe, without its evaluations."""
        return self.seconds * self.steps / 3600

    def __rich__(self) -> Group:
        table = Table("part", "parameters", "GFLOPs, one prediction", "GFLOPs, training an image", "MiB per image")
        for part in self.parts:
            name = part.name + (" and unlabeled images" if part.name == "losses" and self.with_unlabeled else "")
            predicting = "" if part.inference is None else f"{part.inference:.2f}"
            table.add_row(name, f"{part.parameters:,}", predicting, f"{part.gflops:.2f}", f"{part.memory / 2**20:.1f}")
        height, width = self.frame
        words = (
            f"a training step in float32, images of {height} x {width}: {self.image / 2**20:.1f} MiB each, and "
            f"{self.fixed / 2**20:.1f} MiB for weights, gradients and optimizer; {self.free / 2**20:.0f} MiB are free: "
            f"the largest batch is about {self.largest_batch}, the recipe's {self.batch_size}"
        )
        time_words = (
            f"a step of {self.batch_size} images takes about {self.seconds:.2g} s on this machine, and the recipe's "
            f"{self.steps:,} steps about {_duration(self.hours)}, without reading images and evaluations"
        )
        return Group(table, Text(words), Text(time_words))


def _duration(hours: float) -> str:
    minutes = max(1, round(60 * hours))
    return f"{hours:.1f} hours" if hours >= 1 else f"{minutes} minute{'s' if minutes > 1 else ''}"


def estimate(recipe: config.Recipe) -> Estimate:
    """Run forward and backward on the first training images and count; nothing is trained and nothing written.

    Memory is counted from the tensors that operators give and that are still alive. What an operator needs within
    itself, and what the allocator loses, comes on top; the largest batch leaves room for it.

    Args:
        recipe: As `distill` takes it; the teacher's weights may be missing.

    Raises:
        AcamkdError: The recipe cannot be distilled.
    """
    if recipe.teacher is None or not recipe.losses:
        raise AcamkdError(f"the recipe {recipe.name} needs a `teacher` section and `losses` to distill")
    images = data.build(recipe.data, recipe.task, "train", seed=recipe.train.seed, augment=True)
    student = build_network(recipe, recipe.student, images.classes)
    teacher = build_network(recipe, recipe.teacher, images.classes, teacher=True)
    loader = data.loader(images, min(IMAGES, len(images)), 0, shuffle=True, seed=recipe.train.seed)
    with probe_distiller(student, teacher, recipe.losses) as distiller:
        batch = next(prepared(student, loader))
        free = free_memory(batch.pixels.device)
        looked = measured(lambda: distiller.teacher_maps(batch))
        alone = step_of(Distiller(distiller.student), batch)
        unlabeled = recipe.data.unlabelled is not None
        whole = step_of(distiller, batch, unlabeled=unlabeled)
        seconds = seconds_of(distiller, batch, unlabeled=unlabeled)
        parts = [loss.attention_module for _, loss in distiller.levels]
        fusions = nn.ModuleList(part for part in parts if part is not None)
        fusing = _fusing(fusions, distiller, batch) if fusions else (0.0, 0)
        predicting = [_inference(model, batch) for model in (distiller.teacher, distiller.student)]
    count = len(batch.sizes)
    sizes = [_size(module) for module in (teacher.net, student.net, distiller.losses)]
    rows = [
        ("teacher", sizes[0], *looked, predicting[0]),
        ("student", sizes[1], *alone, predicting[1]),
        ("losses", sizes[2], whole[0] - looked[0] - alone[0], whole[1] - alone[1], None),
    ]
    if fusions:
        rows.append(("attention", _size(fusions), *fusing, None))
    trained = 4 * (1 + STATES[recipe.train.optimizer.name]) * _size(distiller, trained=True)
    return Estimate(
        parts=tuple(
            Part(name, size, flops / count, bytes_ / count, predicted) for name, size, flops, bytes_, predicted in rows
        ),
        frame=batch.input_size,
        image=whole[1] / count,
        fixed=4 * sum(sizes) + trained,
        free=free,
        batch_size=recipe.train.batch_size,
        with_unlabeled=recipe.data.unlabelled is not None,
        largest_batch=max(0, int((free - trained) // (WORKSPACE * whole[1] / count))),
        seconds=seconds * recipe.train.batch_size * recipe.train.accumulate / count,
        steps=recipe.train.epochs * _steps_per_epoch(recipe.train, len(images)),
    )


def _steps_per_epoch(train: config.Train, images: int) -> int:
    """As the loader and the trainer count them: an incomplete last batch is left out, of accumulated ones it is not."""
    return train.steps_per_epoch or -(-max(1, images // train.batch_size) // train.accumulate)


def _inference(model: TaskModel, batch: Batch) -> float:
    """GFLOPs of one image's prediction."""
    with keeping_modes(model.net), torch.no_grad(), flop_counter() as counter:
        model.eval()
        model(batch)
    return float(counter.get_total_flops()) / 1e9 / len(batch.sizes)


def step_of(distiller: Distiller, batch: Batch, *, unlabeled: bool = False) -> tuple[float, int]:
    """GFLOPs and peak bytes of forward and backward, without the gradients, which are dropped as they come.

    With `unlabeled` the images are distilled once more without their targets, as many unlabeled ones would be.
    """
    with _steps(distiller, batch, unlabeled) as run:
        return measured(run)


def seconds_of(distiller: Distiller, batch: Batch, *, unlabeled: bool = False) -> float:
    """Seconds of such a step: the fastest of several, since a machine with other work does not become faster by it."""
    times: list[float] = []
    with _steps(distiller, batch, unlabeled) as run:
        while len(times) < TIMED and sum(times) < TIMED_SECONDS:
            begun = time.perf_counter()
            run()
            if batch.pixels.is_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begun)
    return min(times)


@contextmanager
def _steps(distiller: Distiller, batch: Batch, unlabeled: bool) -> Iterator[Callable[[], None]]:
    """Within, forward and backward of one step, to be called."""

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    def run() -> None:
        terms = list(distiller(batch).values())
        if unlabeled:
            terms += distiller(replace(batch, targets=None), labeled=False).values()
        torch.stack(terms).sum().backward()  # type: ignore[no-untyped-call]

    with ExitStack() as stack:
        for parameter in distiller.parameters():
            if parameter.requires_grad:
                stack.callback(parameter.register_post_accumulate_grad_hook(drop).remove)  # type: ignore[no-untyped-call]
        yield run


def _fusing(fusions: nn.ModuleList, distiller: Distiller, batch: Batch) -> tuple[float, int]:
    """GFLOPs and peak bytes of the fusions of one step, forward and backward, by themselves."""
    calls: list[tuple[nn.Module, list[Tensor]]] = []  # one fusion may be called twice: masks that learn by the teacher

    def note(fusion: nn.Module, maps: tuple[Tensor, ...]) -> None:
        calls.append((fusion, [x.detach().requires_grad_(x.requires_grad) for x in maps]))

    with ExitStack() as stack:
        for fusion in fusions:
            stack.callback(fusion.register_forward_pre_hook(note).remove)
        distiller(batch)

    def run() -> None:
        read = [x.sum() for fusion, maps in calls for x in fusion(*maps)]
        total = torch.stack(read).sum()
        if total.requires_grad:  # not where the masks are frozen
            total.backward()  # type: ignore[no-untyped-call]

    return measured(run)


def measured(call: Callable[[], object]) -> tuple[float, int]:
    """GFLOPs and peak bytes of a call."""
    with flop_counter() as counter, LiveMemory() as memory:
        call()
    return counter.get_total_flops() / 1e9, memory.peak


class LiveMemory(TorchDispatchMode):
    """Within, sums up the bytes of what operators give, for as long as they are alive; `peak` is the largest sum."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self._alive = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {storage.data_ptr() for storage in _storages((args, kwargs))}
        for storage in _storages(result):
            if storage.data_ptr() not in given:  # neither a view nor in place
                given.add(storage.data_ptr())
                self._change(storage.nbytes())
                weakref.finalize(storage, self._change, -storage.nbytes())
        return result

    def _change(self, bytes_: int) -> None:
        self._alive += bytes_
        self.peak = max(self.peak, self._alive)


def _storages(values: Any) -> Iterable[torch.UntypedStorage]:
    return [x.untyped_storage() for x in tree_leaves(values) if isinstance(x, Tensor)]


def _size(module: nn.Module, *, trained: bool = False) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad or not trained)


def free_memory(device: torch.device) -> int:
    """Bytes that a device can still give; of the CPU's memory also what the system could reclaim.

    Raises:
        AcamkdError: The system does not say.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError as error:
        raise AcamkdError(f"how much memory is free can be read on Linux alone, or of a GPU: {error}") from error
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
