"""Estimate of a distillation's cost: parameters, operations, memory, and the largest batch that fits."""

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
from acamkd.engine.quantization import FakeQuantization
from acamkd.errors import AcamkdError
from acamkd.jobs.setup import build_network, build_teacher
from acamkd.models.base import Batch, FeatureModel, TaskModel, keeping_modes
from acamkd.models.resize import rescale

IMAGES = 2
"""Number of training images to run; batch norm may refuse a single one."""
WORKSPACE = 4 / 3
"""Largest ratio of a process's real memory to the counted one: operators need workspace (see performance.md)."""
TIMED, TIMED_SECONDS = 3, 4.0
"""Number of timed steps, and seconds after which no further one begins."""
STATES = {"sgd": 1, "adamw": 2}
"""Values that an optimizer keeps per parameter."""


@dataclass(frozen=True)
class Part:
    """Cost of one part of a training step.

    Attributes:
        name: `teacher`: forward up to the last tapped layer. `student`: forward and backward of its own task. `losses`:
            what they add, with the teacher's feature maps and both networks on unlabeled images, if there are any.
            `attention`: the losses' `attention_module`, such as ACAM's fusion, on labeled images; it is also counted in
            `losses`.
        parameters: Number of parameters.
        gflops: 1e9 floating-point operations per image of a training step, counted as in `acamkd.engine.cost`.
        inference: The same for one prediction; None for parts that predict nothing.
        memory: Peak bytes per image, without the parameters.
    """

    name: str
    parameters: int
    gflops: float
    memory: float
    inference: float | None = None


@dataclass(frozen=True)
class Estimate(Printable):
    """Cost of a distillation in float32; mixed precision needs less memory.

    Attributes:
        parts: Teacher, student, losses, and the attention within the losses.
        frame: (height, width) of the padded input that was run.
        image: Bytes per image of a whole step. It is not the sum of the parts, since the teacher ends before the
            student starts.
        fixed: Bytes of all weights, of the gradients and optimizer states of trained ones, and of their average.
        free: Free bytes of the device, with the weights loaded.
        batch_size: Batch size of the recipe.
        with_unlabeled: Whether the losses run on unlabeled images too.
        step_images: Images of an optimization step: batch size times `train.accumulate`.
        seconds: Of such a step on this machine, without reading images and without the optimizer.
        steps: Optimization steps of the recipe's training.
        largest_batch: Number of images that fit into `free`, with a margin of a third; 0 if not even one fits.
    """

    parts: tuple[Part, ...]
    frame: tuple[int, int]
    image: float
    fixed: int
    free: int
    batch_size: int
    with_unlabeled: bool
    largest_batch: int
    step_images: int
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
            f"a step of {self.step_images} images takes about {self.seconds:.2g} s on this machine, and the recipe's "
            f"{self.steps:,} steps about {_duration(self.hours)}, without reading images and evaluations"
        )
        return Group(table, Text(words), Text(time_words))


def _duration(hours: float) -> str:
    minutes = max(1, round(60 * hours))
    return f"{hours:.1f} hours" if hours >= 1 else f"{minutes} minute{'s' if minutes > 1 else ''}"


def estimate(recipe: config.Recipe) -> Estimate:
    """Run forward and backward on the first training images and measure; nothing is trained or written.

    Memory is counted from the live output tensors of the operators. Workspace of the operators and losses of the
    allocator come on top; the largest batch leaves room for them.

    Args:
        recipe: A recipe for `distill`; the teacher's weights may be missing.

    Raises:
        AcamkdError: The recipe cannot be distilled.
    """
    if recipe.teacher is None or not recipe.losses:
        raise AcamkdError(f"the recipe {recipe.name} needs a `teacher` section and `losses` to distill")
    images = data.build(recipe.data, recipe.task, "train", seed=recipe.train.seed, augment=True)
    student = build_network(recipe, recipe.student, images.classes)
    teacher = build_teacher(recipe, recipe.teacher, images.classes)
    loader = data.loader(images, min(IMAGES, len(images)), 0, shuffle=True, seed=recipe.train.seed)
    with probe_distiller(student, teacher, recipe.losses) as distiller:
        plain = batch = next(prepared(student, loader))
        if recipe.train.multiscale is not None:  # memory has to do for the largest
            batch = rescale(batch, recipe.train.multiscale[1], distiller.multiple)
        if recipe.train.quantize:
            FakeQuantization(student)
        free = free_memory(batch.pixels.device)
        looked = measured(lambda: distiller.teacher_maps(batch))
        alone = step_of(Distiller(distiller.student), batch)
        unlabeled = recipe.data.unlabeled is not None
        whole = step_of(distiller, batch, unlabeled=unlabeled)
        seconds = seconds_of(distiller, plain, unlabeled=unlabeled)
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
    if recipe.train.ema is not None:
        trained += 4 * sizes[1]
    step_images = recipe.train.batch_size * recipe.train.accumulate
    return Estimate(
        parts=tuple(
            Part(name, size, flops / count, bytes_ / count, predicted) for name, size, flops, bytes_, predicted in rows
        ),
        frame=batch.input_size,
        image=whole[1] / count,
        fixed=4 * sum(sizes) + trained,
        free=free,
        batch_size=recipe.train.batch_size,
        with_unlabeled=recipe.data.unlabeled is not None,
        largest_batch=max(0, int((free - trained) // (WORKSPACE * whole[1] / count))),
        step_images=step_images,
        seconds=seconds * step_images / count,
        steps=recipe.train.epochs * _steps_per_epoch(recipe.train, len(images)),
    )


def _steps_per_epoch(train: config.Train, images: int) -> int:
    """As the loader and the trainer count them: an incomplete last batch is left out, of accumulated ones it is not."""
    return train.steps_per_epoch or -(-max(1, images // train.batch_size) // train.accumulate)


def _inference(model: FeatureModel, batch: Batch) -> float:
    """GFLOPs of one image's prediction."""
    with keeping_modes(model.net), torch.no_grad(), flop_counter() as counter:
        model.eval()
        outputs = model(batch)
        if isinstance(model, TaskModel):  # the second stage of a detector runs there
            model.decode(outputs, batch)
    return float(counter.get_total_flops()) / 1e9 / len(batch.sizes)


def step_of(distiller: Distiller, batch: Batch, *, unlabeled: bool = False) -> tuple[float, int]:
    """GFLOPs and peak bytes of forward and backward, without parameter gradients, which are freed at once.

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
    """GFLOPs and peak bytes of one step's fusions alone, forward and backward."""
    calls: list[tuple[nn.Module, list[Tensor]]] = []  # a fusion may run twice, if masks learn from the teacher

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
    """Sum the bytes of live operator outputs within the context; `peak` is the largest sum."""

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
    """Free bytes of a device; for the CPU including what the system can reclaim.

    Raises:
        AcamkdError: The system does not report it.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError as error:
        raise AcamkdError(f"free memory can be read only on Linux or from a GPU: {error}") from error
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
