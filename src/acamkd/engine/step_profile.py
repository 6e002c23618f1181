"""Where the time of a training's steps goes: a Lightning profiler with few parts, and the table of what it found."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from lightning.pytorch.profilers import Profiler
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from acamkd.engine.printing import Printable
from acamkd.errors import AcamkdError
from acamkd.files import write_json
from acamkd.stopwatch import Stopwatch, running

PROFILE = "profile.json"
"""File within the run folder."""

WARM_UP = 4
"""First steps of a training, which are not counted."""

SAMPLING = 1e-3
"""Seconds between two looks at whether the GPU is idle."""

REST, EVALUATION, CALLBACKS = "everything else", "evaluation", "callbacks"

ORDER = (
    "waiting for data", "decoding", "augmentation", "cache", "collation", "transfer", "student", "teacher", "losses",
    "backward", "optimizer", "waiting for the GPU", CALLBACKS, EVALUATION, REST,
)  # fmt: skip

ACTIONS = {
    "validation": EVALUATION,
    "val_next": EVALUATION,
    "[Callback]": CALLBACKS,
    "save_checkpoint": CALLBACKS,
    "train_dataloader_next": "waiting for data",
    "batch_to_device": "transfer",
    ".training_step": "losses",  # what is left of it: student and teacher measure themselves
    ".backward": "backward",
    "optimizer": "optimizer",
    "configure_gradient_clipping": "optimizer",
    "run_training_epoch": REST,
}
"""Part of the action whose name contains a text; the first one that fits."""


@dataclass(frozen=True)
class StepProfile(Printable):
    """Where the time of a training's steps went, without its first steps.

    Attributes:
        seconds: By part, each without the parts within it.
        beside: Seconds by part of the processes that load images, which work beside the training.
        steps: Batches.
        images: Images of all batches, unlabeled ones included.
        idle: Share of the time in which the GPU had nothing to do; None without one. A GPU works beside the program,
            whose own time the parts are: of a network it is the time to launch its layers.
    """

    seconds: Mapping[str, float]
    beside: Mapping[str, float]
    steps: int
    images: int
    idle: float | None = None

    @classmethod
    def read(cls, folder: Path) -> StepProfile:
        """Read the profile of a run folder; raises AcamkdError if there is none."""
        try:
            return cls(**json.loads((folder / PROFILE).read_text(encoding="utf-8")))
        except FileNotFoundError as error:
            raise AcamkdError(
                f"{folder} holds no {PROFILE}: the training ended before it, or had no more than {WARM_UP} steps"
            ) from error

    @property
    def images_per_second(self) -> float:
        """Images in a second of the steps, without evaluations."""
        return self.images / (sum(self.seconds.values()) - self.seconds.get(EVALUATION, 0.0))

    def __rich__(self) -> Group:
        table = Table("part", "share", "ms per step")
        total = sum(self.seconds.values())
        for part in sorted(self.seconds, key=ORDER.index):
            table.add_row(part, f"{self.seconds[part] / total:.1%}", f"{1e3 * self.seconds[part] / self.steps:.1f}")
        words = f"{self.steps} steps, {self.images} images, {self.images_per_second:.3g} images a second"
        if self.idle is not None:
            words += f"; the GPU had nothing to do in {self.idle:.0%} of the time"
        lines: list[RenderableType] = [table, Text(words)]
        if self.beside:
            each = ", ".join(f"{part} {1e3 * value / self.images:.1f} ms" for part, value in self.beside.items())
            lines.append(Text(f"the processes that load images took for each of them: {each}"))
        return Group(*lines)


class StepProfiler(Profiler):
    """Measures a training by Lightning's own actions and by `acamkd.stopwatch`, and writes profile.json.

    Args:
        folder: The run folder.
        device: Of the training.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        super().__init__()
        self.folder = folder
        self.watch = Stopwatch(whole=[EVALUATION])
        self._gpu = Idleness(torch.cuda.current_stream(device).query) if device.type == "cuda" else None
        self._steps = 0

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Within, a training is measured; whatever ends it, nothing looks at the GPU any more."""
        with running(self.watch):
            try:
                yield
            finally:
                if self._gpu is not None:
                    self._gpu.stop()

    def start(self, action_name: str) -> None:
        """Begin the part that an action of Lightning belongs to."""
        known = next((part for text, part in ACTIONS.items() if text in action_name), None)
        self.watch.begin(known or self.watch.current or REST)

    def stop(self, action_name: str) -> None:
        """End it."""
        self.watch.end()
        if action_name == "run_training_batch":
            self._steps += 1
            if self._steps == WARM_UP:
                self.watch.reset()
                if self._gpu is not None:
                    self._gpu.start()

    def describe(self) -> None:
        """Write what was found, at the end of the fit."""
        if self._gpu is not None:
            self._gpu.stop()
        if self._steps > WARM_UP:
            watch, idle = self.watch, None if self._gpu is None else self._gpu.share
            found = StepProfile(
                dict(watch.seconds), dict(watch.beside), self._steps - WARM_UP, watch.counts["images"], idle
            )
            write_json(self.folder / PROFILE, asdict(found))


class Idleness:
    """Looks every millisecond, in a thread of its own, at whether a GPU has nothing to do.

    Args:
        is_idle: Whether it has nothing to do.
    """

    def __init__(self, is_idle: Callable[[], bool]) -> None:
        self._is_idle = is_idle
        self._looks = self._found = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    @property
    def share(self) -> float | None:
        """Share of the looks at which it was idle; None before the first."""
        return self._found / self._looks if self._looks else None

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """End it; it may have ended, or never begun."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()

    def _look(self) -> None:
        while not self._end.wait(SAMPLING):
            self._looks += 1
            self._found += self._is_idle()
