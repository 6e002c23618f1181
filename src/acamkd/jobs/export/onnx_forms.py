"""The forms of a network, each in a process of its own.

Every export contains a copy of this file. Beside an exported network it needs onnxruntime and NumPy, not acamkd.
"""

from __future__ import annotations

import os
import pickle
import statistics
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, ClassVar

import numpy as np

if __package__:
    from acamkd.jobs.export import onnx_model
else:  # beside an exported network
    import onnx_model  # type: ignore[import-not-found,no-redef]


class FormError(onnx_model.AcamkdError):
    """A form fails on this machine."""


class Form(ABC):
    """One network in one runtime; each subclass is one runtime.

    It is pickled before `load`, so that it can run in a process of its own.

    Args:
        network: Name of the network.
        file: File of its weights.
        threads: Threads of the processor.
    """

    runtime: ClassVar[str]
    """Name of the runtime."""

    def __init__(self, network: str, file: Path, threads: int) -> None:
        self.network = network
        self.file = file
        self.threads = threads

    @property
    def name(self) -> str:
        """Name of the form, which is unique among those of a network with one number of threads."""
        return self.runtime

    @property
    def takes_batches(self) -> bool:
        """Whether several images can be given at once; known after `load`."""
        return True

    @abstractmethod
    def load(self) -> None:
        """Load the runtime and the network; may raise any error where this machine cannot run it."""

    @abstractmethod
    def prepare(self, images: Sequence[onnx_model.Pixels]) -> Any:
        """Turn images of one size into the network's input."""

    @abstractmethod
    def run(self, inputs: Any) -> Any:
        """The network's outputs, which are complete on return."""

    @abstractmethod
    def decode(self, outputs: Any, inputs: Any) -> list[onnx_model.Prediction]:
        """Turn outputs into one prediction per image."""

    def predict(self, images: Sequence[onnx_model.Pixels]) -> list[onnx_model.Prediction]:
        """Predictions of images of one size."""
        inputs = self.prepare(images)
        return self.decode(self.run(inputs), inputs)


class ExportedForm(Form):
    """An exported file in the runtime that `open` chooses."""

    model: onnx_model.ExportedModel

    @property
    def name(self) -> str:
        """The runtime, and what distinguishes the file, such as `int8` of student.int8.onnx."""
        return " ".join([self.runtime, *self.file.name.split(".")[1:-1]])

    @abstractmethod
    def open(self) -> onnx_model.ExportedModel:
        """Open the file."""

    def load(self) -> None:
        """See the base class."""
        self.model = self.open()

    @property
    def takes_batches(self) -> bool:
        """See ExportedModel."""
        return self.model.takes_batches

    def prepare(self, images: Sequence[onnx_model.Pixels]) -> Any:
        """The graph's input, and each image's size in it and outside."""
        prepared = [self.model.prepare(image) for image in images]
        pixels = prepared[0][0] if len(images) == 1 else np.concatenate([frame for frame, _ in prepared])
        return pixels, [size for _, size in prepared], [image.shape[:2] for image in images]

    def run(self, inputs: Any) -> Any:
        """See the base class."""
        return self.model.run(inputs[0])

    def decode(self, outputs: Any, inputs: Any) -> list[onnx_model.Prediction]:
        """See the base class."""
        _, sizes, originals = inputs
        return [
            self.model.decode(outputs, size, original, index)
            for index, (size, original) in enumerate(zip(sizes, originals, strict=True))
        ]


class OnnxForm(ExportedForm):
    """An exported file in onnxruntime.

    Args:
        network: Name of the network.
        file: The ONNX file.
        threads: Threads of the processor.
        provider: onnxruntime's execution provider.
    """

    runtime = "onnxruntime"

    def __init__(self, network: str, file: Path, threads: int, provider: str = "CPUExecutionProvider") -> None:
        super().__init__(network, file, threads)
        self.provider = provider

    @property
    def name(self) -> str:
        """With the provider, unless it is the processor."""
        provider = self.provider.removesuffix("ExecutionProvider")
        return super().name + (f", {provider}" if provider != "CPU" else "")

    def open(self) -> onnx_model.ExportedModel:
        """See the base class."""
        return onnx_model.OnnxModel(self.file, threads=self.threads, provider=self.provider)


def providers() -> list[str]:
    """Execution providers of onnxruntime on this machine; raises AcamkdError without it."""
    try:
        import onnxruntime
    except ImportError as error:
        raise onnx_model.AcamkdError(onnx_model.MISSING) from error
    return [name for name in onnxruntime.get_available_providers() if name != "AzureExecutionProvider"]  # runs remotely


class Worker:
    """One form in a process of its own, so that its memory and its first call are its own.

    The process starts with the first call.

    Args:
        form: A form that is not loaded.
        images: What its functions get.
    """

    def __init__(self, form: Form, images: Sequence[onnx_model.Pixels]) -> None:
        self.form = form
        self.title = f"{form.network}, {form.name}"
        self._images = list(images)
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] = TemporaryFile()  # noqa: SIM115 - closed with the process

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        self._errors.close()

    def end(self) -> None:
        """End the process; the next call starts another, in which the form is not loaded."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()  # closes the pipes, too
            self._process = None

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What `function(form, images, *arguments)` returns in the process.

        Raises:
            FormError: It fails, or the process ends.
        """
        try:
            if self._process is None:
                self._process = self._start()
                self._send((self.form, self._images))
            self._send((function, arguments))
            assert self._process.stdout is not None
            is_answer, content = pickle.load(self._process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError):  # the latter within an answer
            self._errors.seek(0)
            said = self._errors.read().decode(errors="replace").strip().splitlines()
            raise FormError(f"{self.title}: its process ended ({said[-1] if said else '-'})") from None
        if not is_answer:
            raise FormError(f"{self.title}: {content}")
        return content

    def _start(self) -> subprocess.Popen[bytes]:
        module = ["-m", "acamkd.jobs.export.onnx_forms"] if __package__ else [__file__]
        paths = os.pathsep.join(path for path in sys.path if path)
        environment = {"PYTHONPATH": paths, "OMP_NUM_THREADS": str(self.form.threads)}
        return subprocess.Popen(
            [sys.executable, *module, "--worker"], env={**os.environ, **environment},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
        )  # fmt: skip

    def _send(self, content: Any) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        pickle.dump(content, self._process.stdin)
        self._process.stdin.flush()


def serve() -> None:
    """Answer the calls of a Worker until its end."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not come between the answers
    form, images = pickle.load(sys.stdin.buffer)
    while True:
        try:
            function, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = True, function(form, images, *arguments)
        except Exception as error:  # a runtime may raise any error
            answer = False, (str(error).strip().splitlines() or [type(error).__name__])[0]
        pickle.dump(answer, answers)
        answers.flush()


def begin(form: Form, images: Sequence[onnx_model.Pixels]) -> float:
    """Load a form; seconds of its first prediction."""
    form.load()
    start = time.perf_counter()
    form.predict(images[:1])
    return time.perf_counter() - start


def time_calls(form: Form, images: Sequence[onnx_model.Pixels], count: int) -> list[tuple[float, float, float]]:
    """Seconds of preparing, running and decoding in each of some calls, after an untimed one; the images take turns."""
    form.predict(images[:1])
    times = []
    for index in range(count):
        image = [images[index % len(images)]]
        start = time.perf_counter()
        inputs = form.prepare(image)
        prepared = time.perf_counter()
        outputs = form.run(inputs)
        done = time.perf_counter()
        form.decode(outputs, inputs)
        times.append((prepared - start, done - prepared, time.perf_counter() - done))
    return times


def images_per_second(form: Form, images: Sequence[onnx_model.Pixels], batch: int, seconds: float) -> float | None:
    """The rate at one batch size, everything counted; None if the form takes single images alone."""
    if batch > 1 and not form.takes_batches:
        return None
    given = [images[0]] * batch
    form.predict(given)
    times: list[float] = []
    while not times or sum(times) < seconds:
        start = time.perf_counter()
        form.predict(given)
        times.append(time.perf_counter() - start)
    return batch / statistics.median(times)


def predict_one(form: Form, _: Sequence[onnx_model.Pixels], image: onnx_model.Pixels) -> onnx_model.Prediction:
    """Prediction of another image."""
    return form.predict([image])[0]


def peak_mib(_: Form, __: Sequence[onnx_model.Pixels]) -> float | None:
    """Largest resident memory of this process so far, in MiB; None where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        lines = []
    if said := next((line.split()[1] for line in lines if line.startswith("VmHWM")), None):  # not in every container
        return int(said) / 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


if __name__ == "__main__" and sys.argv[1:] == ["--worker"]:
    serve()
