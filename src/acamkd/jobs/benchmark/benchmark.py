"""Benchmark of networks: latency, throughput, memory, size and metric of each form that this machine can run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from acamkd import config, data
from acamkd.data import ImageDataset
from acamkd.engine import machine
from acamkd.engine.mask_history import spread
from acamkd.engine.metrics import METRICS, Scorer, scorer_of
from acamkd.engine.runs import RECIPE, Run, as_run
from acamkd.errors import AcamkdError, nearest
from acamkd.files import check_writable_file, write_json
from acamkd.jobs.benchmark.networks import Network, files_of_run, networks_of, write_file
from acamkd.jobs.benchmark.openvino_form import OpenVinoForm
from acamkd.jobs.benchmark.result import Benchmark, Row, front
from acamkd.jobs.benchmark.torch_forms import Bfloat16Form, CompiledForm, TorchForm
from acamkd.jobs.export.onnx_benchmark import BATCHES, SECONDS, Timing, measure, ranks
from acamkd.jobs.export.onnx_forms import Form, FormError, OnnxForm, Worker, predict_one, providers
from acamkd.jobs.export.onnx_model import OnnxModel, Pixels
from acamkd.progress import progress
from acamkd.report.benchmark import BENCHMARK

log = logging.getLogger(__name__)

TIMED_IMAGES = 8

TORCH: dict[str, type[TorchForm]] = {"pytorch": TorchForm, "bf16": Bfloat16Form, "compiled": CompiledForm}
"""Runtimes of a network, by the name that `runtimes` takes."""

EXPORTED = ("onnxruntime", "openvino")
"""Runtimes of an exported file, likewise; also the names of their packages."""

RUNTIMES = (*TORCH, *EXPORTED)


def benchmark(
    model: Run | Path | str,
    *,
    overrides: Sequence[str] = (),
    recipe: config.Recipe | Path | str | None = None,
    baseline: Run | Path | str | None = None,
    runtimes: Sequence[str] = RUNTIMES,
    threads: Sequence[int] = (),
    batches: Sequence[int] = BATCHES,
    images: int | None = None,
    seconds: float = SECONDS,
    out: Path | str | None = None,
) -> Benchmark:
    """Measure each form of a run's networks, or of an exported file, in turn.

    Every form runs in a process of its own. The metric is computed from the predictions of that same process.

    Args:
        model: A run, its folder, or a file that `acamkd export` wrote. A distilled run brings its teacher, and its
            baseline from the folder `baseline` beside it. Its networks are written as ONNX for the time of the
            benchmark, unless RUN/export holds them.
        overrides: `key=value` assignments that change the recipe, such as `data.root=FOLDER`.
        recipe: Whose validation images to take, for a file outside the run that it was made of.
        baseline: Run of the baseline, instead of the folder beside the run.
        runtimes: Names of RUNTIMES.
        threads: Numbers of threads of the processor; by default one per core.
        batches: Batch sizes of the throughput.
        images: Number of validation images of the metric, evenly spaced; by default all.
        seconds: Timed seconds of each form.
        out: JSON file to write; by default `benchmark.json` in the run folder, or FILE with the ending
            `.benchmark.json`.

    Returns:
        A row for each form of a network: its score, size, latency and throughput.

    Raises:
        AcamkdError: The model or its images cannot be read, or no form can be run.
    """
    for name in runtimes:
        if name not in RUNTIMES:
            raise AcamkdError(f"there is no runtime {name!r}; {nearest(name, RUNTIMES)}")
    run = None
    if isinstance(model, Run) or Path(model).suffix != ".onnx":
        if recipe is not None:
            raise AcamkdError("--recipe is for a file; a run has a recipe of its own, which --set changes")
        run = as_run(model, overrides)
        read, default = run.recipe, run.folder / BENCHMARK
        networks = networks_of(run, baseline)
    else:
        if baseline is not None:
            raise AcamkdError("--baseline is for a run: give its folder instead of a file")
        if not set(runtimes) & set(EXPORTED):
            raise AcamkdError(f"an ONNX file runs in {' and '.join(EXPORTED)}, not in {', '.join(runtimes)}")
        file = Path(model).expanduser()
        read, default = _recipe_of(file, recipe, overrides), file.with_suffix(".benchmark.json")
        networks = [Network(file.name.partition(".")[0], file, None, (file,))]
    out = Path(out).expanduser() if out else default
    check_writable_file(out)
    shown = data.build(read.data, read.task, "val", seed=read.train.seed, augment=False)
    for warning in data.check(shown, "headers"):
        log.warning("%s", warning)
    counts = tuple(threads) or (machine.cores(),)
    with TemporaryDirectory() as folder, ExitStack() as stack:
        left_out: list[str] = []
        if run is None:
            _check_classes(networks[0].weights, shown)
        else:
            networks = [_with_files(each, run, runtimes, Path(folder), left_out) for each in networks]
        timed = [_pixels(shown, index) for index in spread(len(shown), TIMED_IMAGES)]
        workers = [stack.enter_context(Worker(form, timed)) for form in forms_of(networks, runtimes, counts, left_out)]
        described = _machine()  # its load is that before the measurement
        timings, failed = measure(workers, seconds=seconds, batches=batches, note=log.info)
        indices = spread(len(shown), images or len(shown))
        scores: dict[Worker, float] = {}
        for worker in timings:
            try:
                scores[worker] = _score(worker, shown, indices, scorer_of(read, shown.classes))
            except FormError as error:  # the other forms keep their figures
                failed.append(str(error))
        if not scores:
            raise AcamkdError(f"no form can be run on this machine: {'; '.join([*left_out, *failed])}")
        rows = _rows([worker.form for worker in scores], [timings[worker] for worker in scores], list(scores.values()))
    found = Benchmark(METRICS[read.task], tuple(rows), (*left_out, *failed), len(indices), len(timed), described, out)
    write_json(out, found.as_dict())
    return found


def forms_of(
    networks: Sequence[Network], runtimes: Sequence[str], threads: Sequence[int], left_out: list[str]
) -> list[Form]:
    """Every form of some networks; a missing package adds a line to `left_out`."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    missing = [name for name in EXPORTED if name in runtimes and find_spec(name) is None]
    left_out += [f"{name}: it is not installed" for name in missing]
    forms: list[Form] = []
    for network in networks:
        for count in threads:
            for name in runtimes:
                if name in TORCH and network.build is not None:
                    forms += [TORCH[name](network.name, network.weights, count, network.build, d) for d in devices]
                elif name == "onnxruntime" and name not in missing:
                    forms += [OnnxForm(network.name, file, count, p) for file in network.files for p in providers()]
                elif name == "openvino" and name not in missing:
                    forms += [OpenVinoForm(network.name, file, count) for file in network.files]
    return forms


def _with_files(network: Network, run: Run, runtimes: Sequence[str], folder: Path, left_out: list[str]) -> Network:
    """The network with its exported files, which are written if the run's own export does not hold them."""
    if not any(name in runtimes and find_spec(name) for name in EXPORTED):
        return network
    own = files_of_run(run) if network.weights == run.weights else ()
    try:
        files = own or (write_file(network, folder, run.recipe),)
    except AcamkdError as error:
        left_out.append(f"{network.name}, ONNX: {error}")
        files = ()
    return Network(network.name, network.weights, network.build, files)


def _check_classes(file: Path, images: ImageDataset) -> None:
    """Raise AcamkdError if an exported file has other classes than the images."""
    classes = OnnxModel(file).classes
    if classes != images.classes:
        raise AcamkdError(
            f"{file} was made for the classes {', '.join(classes)}, and the images have {', '.join(images.classes)}"
        )


def _recipe_of(file: Path, recipe: config.Recipe | Path | str | None, overrides: Sequence[str]) -> config.Recipe:
    """The given recipe, or that of the run whose export holds the file."""
    beside = file.absolute().parent.parent / RECIPE
    if recipe is None and not beside.is_file():
        raise AcamkdError(f"{file} does not lie in a run's export: name a recipe with its validation images, --recipe")
    return config.as_recipe(recipe if recipe is not None else beside, overrides)


def _pixels(images: ImageDataset, index: int) -> Pixels:
    pixels: Pixels = images[index][0].permute(1, 2, 0).contiguous().numpy()
    return pixels


def _score(worker: Worker, images: ImageDataset, indices: Sequence[int], scorer: Scorer) -> float:
    """The deciding metric, from predictions of the form's own process."""
    log.info("%s: %s on %d images", worker.title, METRICS[scorer.task], len(indices))
    for index in progress(indices, "evaluating"):
        found = worker(predict_one, _pixels(images, index))
        scorer.update([{name: torch.from_numpy(values) for name, values in found.items()}], [images[index][1]])
    return scorer.compute()[METRICS[scorer.task]]


def _rows(forms: Sequence[Form], timings: Sequence[Timing], scores: Sequence[float]) -> list[Row]:
    rows = []
    references: dict[tuple[str, int], Timing] = {}
    places = zip(forms, timings, scores, ranks(timings), front(scores, timings), strict=True)
    for form, timing, score, rank, on_front in places:
        reference = references.setdefault((form.network, form.threads), timing)
        against = None if reference is timing else timing.against(reference)
        size = form.file.stat().st_size / 2**20
        rows.append(Row(form.network, form.name, form.threads, score, timing, size, rank, on_front, against))
    return rows


def _machine() -> dict[str, Any]:
    packages = ("torch", *(name for name in EXPORTED if find_spec(name)))
    return {
        "processor": machine.processor(), "cores": machine.cores(), "int8": machine.int8_instructions(),
        "load": machine.load(), "versions": {name: _version(name) for name in packages},
    }  # fmt: skip


def _version(package: str) -> str | None:
    """Of the distribution that brings a package, since onnxruntime may come with onnxruntime-gpu."""
    with suppress(PackageNotFoundError):
        return version(package)
    return next(map(version, packages_distributions().get(package, ())), None)
