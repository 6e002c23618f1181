"""Everything that a first machine with a GPU should tell, in under eight minutes and without a download.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --parts steps --minutes 30
    python benchmarks/gpu.py --quick --device cpu --out FOLDER

`tests`: the test suite's numerical core on the device, and its small trainings.
`steps`: time and peak memory of a whole training step, of networks of full size with random weights: every method, and
ACAM exact, with `auto` and as a textbook has it, in several precisions, eager and compiled.
`studies`: the demo's tasks on drawn scenes. A short training in each precision, then baseline and ACAM with some seeds.

Each part is a process of its own, which ends after its share of the minutes. Results are written after every row, to
gpu.json and gpu.md in the folder. The same command goes on where it stopped. What the machine lacks is named.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

if absent := [
    name
    for name in (
        "torch",
        "torchvision",
        "lightning",
        "timm",
        "torchmetrics",
        "pydantic",
        "matplotlib",
        "docstring_parser",
        "faster_coco_eval",
        "segmentation_models_pytorch",
        "rich",
        "typer",
        "yaml",
        "jinja2",
        "tqdm",
        "filelock",
        "safetensors",
        "scipy",
        "acamkd",
    )
    if importlib.util.find_spec(name) is None
]:
    sys.exit(f"missing: {', '.join(absent)}. Install them: pip install -e . (or, for acamkd, PYTHONPATH=src)")

import step_cost
import torch
from harness import RESULTS, cost, machine, medians

from acamkd import config
from acamkd.config import Loss, Model
from acamkd.data.scenes import write_scenes
from acamkd.distillation.build import build_distiller
from acamkd.distillation.compiled import can_compile
from acamkd.distillation.distiller import Distiller
from acamkd.distillation.methods import METHODS
from acamkd.engine import metrics
from acamkd.engine.module import mend_convolutions
from acamkd.files import write_json, write_text
from acamkd.jobs.compare.trials import plan
from acamkd.jobs.demo.layout import SIZE
from acamkd.jobs.demo.one_task import FIRST_SEED, read_recipe
from acamkd.jobs.train import distill, train
from acamkd.losses.base import HeadLoss
from acamkd.models.base import Batch, Task, TaskModel

ROOT = Path(__file__).parents[1]

SHARES = {"tests": 0.3, "steps": 0.45, "studies": 0.25}
"""Of the minutes, by part."""

ON_DEVICE, TRAINED_THERE = "ACAMKD_TEST_DEVICE", "ACAMKD_TEST_ACCELERATOR"
"""What tells the tests the device: for every tensor, or for trainings alone."""
TESTS: Mapping[str, tuple[str, list[str]]] = {
    "ACAM": (ON_DEVICE, ["tests/losses/acam"]),
    "losses": (ON_DEVICE, ["tests/losses", "--ignore=tests/losses/acam"]),
    "distiller": (
        ON_DEVICE,
        [f"tests/distillation/test_{each}.py" for each in ("distiller", "split_backward", "taps", "task_masks")],
    ),
    "trainings": (
        TRAINED_THERE,
        ["tests/engine/test_precision.py", "tests/engine/test_training.py", "tests/distillation/test_every_method.py"],
    ),
}  # fmt: skip
"""Groups: how the device is told, and pytest's files."""
QUICK_TESTS = ["tests/losses/acam/test_objective.py"]

QUERIES = "RT-DETRv2 R101 -> R18, 640 x 640"
_RESNET = {"model_type": "rt_detr_resnet", "out_indices": [2, 3, 4]}
PAIRS: Mapping[str, tuple[Task, Model, Model, int]] = {
    **step_cost.NETWORKS,
    QUERIES: (
        "detection",
        Model(arch="hf/rt_detr_v2", options={
            "backbone_config": {**_RESNET, "depths": [3, 4, 23, 3]}, "encoder_hidden_dim": 384,
            "encoder_ffn_dim": 2048, "decoder_in_channels": [384] * 3, "freeze_backbone_batch_norms": False,
        }),
        Model(arch="hf/rt_detr_v2", options={
            "backbone_config": {
                **_RESNET, "layer_type": "basic", "hidden_sizes": [64, 128, 256, 512], "depths": [2] * 4,
            },
            "encoder_in_channels": [128, 256, 512], "hidden_expansion": 0.5, "decoder_layers": 3,
            "freeze_backbone_batch_norms": False,
        }),
        80,
    ),
}  # fmt: skip
SIZES = {**step_cost.SIZES, QUERIES: (640, 640)}
IMAGES = 4
"""Per step."""

BASELINE, TEACHER = "baseline", "teacher's forward"


class Mode(NamedTuple):
    """How a step is computed: what a recipe's train.precision, channels_last and compile, and teacher.precision say."""

    name: str
    tf32: bool = True
    is_half: bool = False
    teacher: Any = None
    compiled: bool = False


MODES = (
    Mode("bf16, channels last", is_half=True),
    Mode("TF32"),
    Mode("float32", tf32=False),
    Mode("bf16, channels last, teacher auto", is_half=True, teacher="auto"),
    Mode("TF32, compiled", compiled=True),
    Mode("bf16, channels last, teacher auto, compiled", is_half=True, teacher="auto", compiled=True),
)
COMPILED_FIRST = (BASELINE, TEACHER, "acam, auto", "fitnet")
"""A compilation takes up to a minute: these rows come before the others."""

WARM_UP, STEPS, SECONDS = 3, 10, 0.5
"""Steps before those that count, steps that count, and seconds after which no further one begins."""

EPOCHS, SEEDS, IMAGES_DRAWN = 12, 2, {"train": 32, "val": 64, "unlabeled": 128}
STUDY_PRECISIONS: Mapping[str, list[str]] = {
    "32": [],
    "bf16-mixed": ["train.precision=bf16-mixed"],
    "bf16-mixed, channels last": ["train.precision=bf16-mixed", "train.channels_last=true"],
    "16-mixed": ["train.precision=16-mixed"],
    "teacher auto": ["teacher.precision=auto"],
    "compiled": ["train.compile=true"],
}

log = logging.getLogger("acamkd")


class Given(NamedTuple):
    """The command line, and when this part has to end."""

    device: str
    out: Path
    quick: bool
    end: float

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()


class Notes:
    """The results so far, on disk after every row."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "gpu.json"
        self.content: dict[str, Any] = json.loads(self.file.read_text()) if self.file.is_file() else {}

    def begin(self, of_machine: Mapping[str, Any], missing: Sequence[str]) -> None:
        """Keep the rows of this very machine, torch and sizes; refuse those of another."""
        told = self.content.get("machine", {})
        kept = ("processor", "torch", "device", "quick")
        if told and any(told.get(name) != of_machine.get(name) for name in kept):
            raise SystemExit(
                f"{self.file} was measured elsewhere or at other sizes: move it away, or give --out FOLDER"
            )
        self.content |= {"machine": dict(of_machine), "missing": list(missing)}
        write_json(self.file, self.content)

    def rows(self, part: str) -> dict[str, Any]:
        """By name."""
        rows: dict[str, Any] = self.content.setdefault(part, {})
        return rows

    def add(self, part: str, name: str, row: Mapping[str, Any]) -> None:
        """Write a row, and the table of all."""
        self.rows(part)[name] = dict(row)
        write_json(self.file, self.content)
        write_text(self.file.with_suffix(".md"), table(self.content))
        print(f"{part}: {name}: " + ", ".join(f"{key} {value}" for key, value in row.items()), flush=True)

    def due(self, part: str, names: Sequence[str], given: Given) -> Iterator[str]:
        """Rows that are not there yet, as long as there is time."""
        for name in names:
            if name in self.rows(part):
                continue
            if given.left <= 0:
                print(f"{part}: no time left: the same command goes on with {name}", flush=True)
                return
            yield name


def lacking(device: str, *, quick: bool) -> list[str]:
    """What is not on this machine, and what is left out for it."""
    found = []
    if device == "cuda" and not torch.cuda.is_available():
        built = "was built without CUDA" if torch.version.cuda is None else "finds no usable GPU or driver"
        raise SystemExit(f"torch {torch.__version__} {built}: install a build of torch for this GPU, or --device cpu")
    for package, needed in (("pytest", "the tests"), ("transformers", QUERIES)):
        if importlib.util.find_spec(package) is None:
            found.append(f"{package}, so that {needed} are left out")
    if not quick and not can_compile(torch.device(device)):
        found.append("a compiler for torch.compile, so that nothing is compiled")
    return found


def run_tests(given: Given, notes: Notes) -> None:
    """Each group by pytest, with the failures' names."""
    groups = {"ACAM": (ON_DEVICE, QUICK_TESTS)} if given.quick else TESTS
    workers = ["-n", "8"] if not given.quick and importlib.util.find_spec("xdist") else []
    for name in notes.due("tests", list(groups), given):
        variable, files = groups[name]
        report = given.out / "gpu-tests.xml"
        command = [
            sys.executable, "-m", "pytest", "-q", "-o", "addopts=--import-mode=importlib", "-m", "not slow",
            f"--junitxml={report}", "-p", "no:cacheprovider", *workers, *files,
        ]  # fmt: skip
        try:
            done = subprocess.run(
                command, cwd=ROOT, env={**os.environ, variable: given.device}, capture_output=True, text=True,
                timeout=given.left, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            notes.add("tests", name, {"error": "did not end in time"})
            return
        if not report.is_file():
            notes.add("tests", name, {"error": (done.stderr or done.stdout).strip().splitlines()[-1]})
            continue
        cases = list(ET.parse(report).iter("testcase"))
        report.unlink()
        bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
        failed = {f"{case.get('classname')}::{case.get('name')}": _why(case) for case in bad}
        skipped = sum(case.find("skipped") is not None for case in cases)
        notes.add("tests", name, {"passed": len(cases) - len(bad) - skipped, "skipped": skipped, "failed": failed})


def _why(case: ET.Element) -> str:
    found = next(found for kind in ("failure", "error") if (found := case.find(kind)) is not None)
    return (found.get("message") or "no message").splitlines()[0][:200]


def losses_of(name: str, student: TaskModel) -> dict[str, Loss]:
    """Every method at the layers that it is for, and the forms of ACAM."""
    on_logits = name == step_cost.SEGMENTATION
    layers = (step_cost.LOGITS,) if on_logits else student.comparable_layers()
    number = {"num_masks": 19} if on_logits else {}
    methods = {method: (() if issubclass(kind, HeadLoss) else layers) for method, kind in METHODS.items()}
    entries = {method: Loss(name=method, pairs=pairs) for method, pairs in methods.items() if method != "acam"}
    forms: dict[str, tuple[str, dict[str, Any]]] = {
        "acam, auto": ("acam", {"kv_stride": "auto"}),
        "acam, exact": ("acam", {}),
        "acam, paper, exact": ("acam", {"preset": "paper"}),
        "acam, paper, auto": ("acam", {"preset": "paper", "kv_stride": "auto"}),
        "acam, textbook": ("loss_cost:Textbook", {"masks": "both", "mask_grad": "joint", "imitation": "squared"}),
    }
    return {
        form: Loss(name=method, pairs=layers, **number, **options) for form, (method, options) in forms.items()
    } | entries


@contextmanager
def computing(mode: Mode, device: str) -> Iterator[None]:
    """TF32 or not, and autocast."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = mode.tf32
    try:
        with torch.autocast(device, torch.bfloat16, enabled=mode.is_half):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def call_of(
    row: str, mode: Mode, losses: Mapping[str, Loss], networks: Sequence[TaskModel], batch: Batch, backend: str
) -> Callable[[], object]:
    """One step, or the teacher's forward."""
    student, teacher = networks
    entry = losses.get(row, losses["acam, auto"])
    alone = row == BASELINE
    distiller = Distiller(student) if alone else build_distiller(student, teacher, [entry], mode.teacher)
    distiller.to(batch.pixels.device)
    distiller.to(memory_format=torch.channels_last if mode.is_half else torch.contiguous_format)  # type: ignore[call-overload]
    if mode.compiled:
        distiller.compile_parts(backend)
    if row == TEACHER:
        distiller.train(mode.compiled)

        def forward() -> None:
            with ExitStack() as stack:
                for part in distiller._compiled:
                    stack.enter_context(part.running())
                distiller.teacher_maps(batch)

        return forward
    run = step_cost.step(distiller, batch)
    if mode.compiled:
        distiller.train()  # which also checks, until every parameter was reached
    return run


def measure(call: Callable[[], object], mode: Mode, device: str, *, quick: bool) -> dict[str, Any]:
    """Median seconds and peak of some steps."""
    with computing(mode, device):
        for _ in range(1 if quick else WARM_UP):
            call()
        costs = []
        while len(costs) < (1 if quick else STEPS) and sum(each.seconds for each in costs) < SECONDS:
            costs.append(cost(call, device))
    median = medians(costs)
    return {"seconds": round(median.seconds, 5), "peak_mib": round(median.peak_mib), "steps": len(costs)}


def run_steps(given: Given, notes: Notes) -> None:
    """Row by row: the same networks for all rows of a pair."""
    missing = " ".join(notes.content["missing"])
    pairs = [name for name in PAIRS if name != QUERIES or "transformers" not in missing]
    modes = [mode for mode in MODES if not (mode.compiled and "torch.compile" in missing)]
    backend = "eager" if given.quick else "inductor"
    if given.quick:
        compiled = Mode("TF32, teacher auto, compiled", teacher="auto", compiled=True)
        pairs, modes = pairs[-1:], [Mode("TF32"), compiled]  # in bfloat16 many processors take minutes
    for wanted, name in product(("eager", "compiled", "compiled, the others"), pairs):
        if given.left <= 0:
            return
        size = (128, 128) if given.quick else SIZES[name]
        networks = [each.to(given.device) for each in step_cost.networks(PAIRS[name], size)]
        if given.device == "cpu":
            mend_convolutions(networks[0].net)
        with torch.device(given.device):
            batch = step_cost.batch_of(networks[0], size, 2 if given.quick else IMAGES)
        losses = losses_of(name, networks[0])
        rows = [BASELINE, TEACHER, *losses]
        if given.quick:
            rows = rows[:3]
        if wanted != "eager":
            rows = [row for row in rows if (row in COMPILED_FIRST) == (wanted == "compiled")]
        chosen = [mode for mode in modes if mode.compiled == (wanted != "eager")]
        keys = {f"{name} | {mode.name} | {row}": (mode, row) for mode in chosen for row in rows}
        for key in notes.due("steps", list(keys), given):
            mode, row = keys[key]
            try:
                notes.add("steps", key, measure(
                    call_of(row, mode, losses, networks, batch, backend), mode, given.device, quick=given.quick
                ))  # fmt: skip
            except Exception as error:  # one row must not end the others
                notes.add("steps", key, {"error": (str(error).splitlines() or [type(error).__name__])[0][:200]})
            if given.device == "cuda":
                torch.cuda.empty_cache()


def run_studies(given: Given, notes: Notes) -> None:
    """Trainings of the demo's recipes, one after another."""
    tasks: tuple[Task, ...] = ("segmentation", "detection")
    folder, runs = given.out / "gpu-studies", {}
    drawn = dict.fromkeys(IMAGES_DRAWN, 8) if given.quick else IMAGES_DRAWN
    for task in tasks[:1] if given.quick else tasks:
        recipe = read_recipe(task, folder, 0)
        write_scenes(recipe.data.root, **drawn, size=SIZE, seed=FIRST_SEED, task=task)
        on_device = [f"train.accelerator={'cpu' if given.device == 'cpu' else 'gpu'}"]
        epochs = 1 if given.quick else 2
        short = config.override(recipe, [*on_device, f"train.epochs={epochs}", f"train.eval_every={epochs}"])
        if not given.quick:
            for name, overrides in STUDY_PRECISIONS.items():
                if not (name == "compiled" and "torch.compile" in " ".join(notes.content["missing"])):
                    runs[f"{task} | {name} | short"] = config.override(short, overrides)
        many = [f"train.epochs={EPOCHS}", f"train.eval_every={EPOCHS}"]
        whole = short if given.quick else config.override(recipe, [*on_device, *many])
        for trial in plan(whole, ["acam"], 1 if given.quick else SEEDS, folder):
            runs[f"{task} | {trial.method} | seed {trial.seed}"] = trial.recipe
    for name in notes.due("studies", list(runs), given):
        recipe, out = runs[name], folder / name.replace(" | ", "-").replace(" ", "_")
        try:
            run = (distill if recipe.losses else train)(recipe, out=out, overwrite=True)
            score = metrics.METRICS[recipe.task]
            found = run.metrics["student"][score]
            notes.add("studies", name, {"metric": score, "score": found, "seconds": round(run.metrics["seconds"], 1)})
        except Exception as error:  # one training must not end the others
            notes.add("studies", name, {"error": (str(error).splitlines() or [type(error).__name__])[0][:200]})


PARTS: Mapping[str, Callable[[Given, Notes], None]] = {"tests": run_tests, "steps": run_steps, "studies": run_studies}


def table(content: Mapping[str, Any]) -> str:
    """All results in Markdown."""
    lines = [", ".join(f"{name}: {value}" for name, value in content["machine"].items()), ""]
    lines += [f"Missing: {what}." for what in content["missing"]]
    if tests := content.get("tests"):
        lines += ["", "| tests | passed | skipped | failed |", "|---|---:|---:|---|"]
        for name, row in tests.items():
            failed = row.get("error") or ", ".join(row["failed"])
            lines.append(f"| {name} | {row.get('passed', '')} | {row.get('skipped', '')} | {failed} |")
    steps = {tuple(key.split(" | ")): row for key, row in content.get("steps", {}).items()}
    for pair in dict.fromkeys(pair for pair, _, _ in steps):
        modes = list(dict.fromkeys(mode for name, mode, _ in steps if name == pair))
        lines += ["", f"{pair}: milliseconds (over baseline and teacher's forward), and peak MiB", ""]
        lines += [f"| | {' | '.join(modes)} |", "|---|" + "---:|" * len(modes)]
        for row in dict.fromkeys(row for name, _, row in steps if name == pair):
            lines.append(f"| {row} | " + " | ".join(_cell(steps, pair, mode, row) for mode in modes) + " |")
    if studies := content.get("studies"):
        lines += ["", "| training | score | seconds |", "|---|---:|---:|"]
        lines += [f"| {key.replace(' | ', ' / ')} | {_score(row)} |" for key, row in studies.items()]
        groups: dict[str, list[float]] = {}
        for key, row in studies.items():
            if "score" in row and key.rpartition(" | ")[2] != "short":
                groups.setdefault(key.rpartition(" | ")[0], []).append(row["score"])
        lines += [
            f"| {' / '.join(key.split(' | '))}, mean of {len(x)} | {mean(x):.2f} | |" for key, x in groups.items()
        ]
    return "\n".join(lines) + "\n"


def _cell(steps: Mapping[tuple[str, ...], Any], pair: str, mode: str, row: str) -> str:
    found = steps.get((pair, mode, row), {})
    if "seconds" not in found:
        return str(found.get("error", ""))
    parts = [steps.get((pair, mode, part), {}).get("seconds") for part in (BASELINE, TEACHER)]
    ratio = "" if None in parts or row in (BASELINE, TEACHER) else f" ({found['seconds'] / sum(parts):.3f})"
    return f"{1e3 * found['seconds']:.1f}{ratio}, {found['peak_mib']}"


def _score(row: Mapping[str, Any]) -> str:
    return str(row["error"]) + " | " if "error" in row else f"{row['metric']} {row['score']:.2f} | {row['seconds']}"


def main() -> None:
    """Start one process for each part, or be one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=7.5, help="for the parts together, 7.5 by default")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (benchmarks/results)")
    parser.add_argument("--quick", action="store_true", help="small sizes, once: does it run? Needs --out")
    parser.add_argument("--only", choices=list(PARTS), help=argparse.SUPPRESS)
    read = parser.parse_args()
    if read.quick and read.out == RESULTS:
        parser.error("--quick needs --out FOLDER: nothing is kept of a quick run here")
    seconds = 60 * read.minutes
    if read.only:
        given = Given(read.device, read.out, read.quick, time.monotonic() + seconds)
        log.setLevel(logging.ERROR)
        PARTS[read.only](given, Notes(read.out))
        return
    missing = lacking(read.device, quick=read.quick)
    for what in missing:
        print(f"missing: {what}")
    read.out.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name() if read.device == "cuda" else "cpu"
    Notes(read.out).begin({**machine(), "device": name, "quick": read.quick}, missing)
    whole = sum(SHARES[part] for part in read.parts)
    failed = False
    for part in read.parts:
        if part == "tests" and any(what.startswith("pytest") for what in missing):
            continue
        share = seconds * SHARES[part] / whole
        words = ["--device", read.device, "--out", str(read.out), "--minutes", str(share / 60), "--only", part]
        try:
            command = [sys.executable, __file__, *words, *(["--quick"] if read.quick else [])]
            code = subprocess.run(command, timeout=share + 15, check=False).returncode
            if code:
                failed = True
                print(f"{part}: ended with exit code {code}")
        except subprocess.TimeoutExpired:
            print(f"{part}: ended after its share of the minutes; the same command goes on")
    print(table(Notes(read.out).content))
    sys.exit(failed)


if __name__ == "__main__":
    main()
