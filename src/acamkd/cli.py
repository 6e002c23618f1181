"""The command line: words to one call. Heavy imports stay inside the commands, so that help answers at once."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from acamkd import __version__
from acamkd.errors import AcamkdError

if TYPE_CHECKING:
    from acamkd.config import Recipe
    from acamkd.data.statistics import Statistics
    from acamkd.jobs.compare.statistics import Row
    from acamkd.jobs.compare.trials import Trial

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Distill object detectors and semantic segmenters: ACAM-KD and its competing methods behind one interface.",
    epilog="Start with [bold]acamkd demo[/bold]; on your own images: [bold]acamkd train R --model teacher[/bold], "
    "[bold]acamkd train R[/bold], [bold]acamkd distill R[/bold] with a recipe R.",
)

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file; see the folder recipes/.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override any key of the recipe; may be repeated."),
]
Losses = Annotated[
    Path | None,
    typer.Option(
        exists=True, dir_okay=False,
        help="YAML list of losses in the place of the recipe's; see the folder recipes/combinations/.",
    ),
]  # fmt: skip
Out = Annotated[Path | None, typer.Option(help="Run folder, instead of runs/NAME/JOB.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run that the folder holds.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the run that the folder holds.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def _overrides(losses: Path | None, assignments: list[str] | None) -> list[str]:
    """Both as assignments, the list of losses first, so that `--set losses.0.weight=2` can change it."""
    from acamkd.config import read_text

    return [*([f"losses={read_text(losses, 'losses')}"] if losses else []), *(assignments or [])]


def _examples(*lines: str) -> str:
    return "Examples:\n\n" + "\n\n".join(lines)


@app.command(
    epilog=_examples(
        "acamkd train recipes/camvid.yaml --model teacher --set data.root=/data/camvid",
        "acamkd train recipes/camvid.yaml --set train.seed=1 --out runs/camvid/alone-1",
    )
)
def train(
    recipe: RecipeFile,
    model: Annotated[Literal["teacher", "student"], typer.Option(help="Which of the recipe's networks.")] = "student",
    set_: Overrides = None,
    out: Out = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Train one network of a recipe without distillation: the teacher, or the baseline."""
    from acamkd import config
    from acamkd.jobs.train import train as job

    job(config.load(recipe, set_ or ()), model, out=out, resume=resume, overwrite=overwrite)


@app.command(
    epilog=_examples(
        "acamkd distill recipes/camvid.yaml --set data.root=/data/camvid",
        "acamkd distill recipes/camvid.yaml --set losses.0.name=fitnet --out runs/camvid/fitnet",
        "acamkd distill recipes/camvid.yaml --losses recipes/combinations/mgd_segmentation.yaml",
        "acamkd distill recipes/camvid.yaml --set teacher.weights=teacher.safetensors --resume",
        "acamkd distill recipes/camvid.yaml --dry-run",
    )
)
def distill(
    recipe: RecipeFile,
    losses: Losses = None,
    set_: Overrides = None,
    out: Out = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only print parameters, operations, memory and the largest batch.")
    ] = False,
) -> None:
    """Train a recipe's student with its losses against its teacher."""
    from acamkd import config
    from acamkd.jobs.train import distill as job

    loaded = config.load(recipe, _overrides(losses, set_))
    if dry_run:
        _print_estimate(loaded)
    else:
        job(loaded, out=out, resume=resume, overwrite=overwrite)


def _print_estimate(recipe: Recipe) -> None:
    from acamkd.jobs.profile import estimate

    found = estimate(recipe)
    table = Table("part", "parameters", "GFLOPs per image", "MiB per image")
    for part in found.parts:
        unlabeled = " and unlabeled images" if part.name == "losses" and recipe.data.unlabelled else ""
        table.add_row(part.name + unlabeled, f"{part.parameters:,}", f"{part.gflops:.2f}", f"{part.memory / 2**20:.1f}")
    console = Console()
    console.print(table)
    height, width = found.frame
    console.print(
        f"a training step in float32, images of {height} x {width}: {found.image / 2**20:.1f} MiB each, and "
        f"{found.fixed / 2**20:.1f} MiB for weights, gradients and optimizer; {found.free / 2**20:.0f} MiB are free: "
        f"the largest batch is about {found.largest_batch}, the recipe's {recipe.train.batch_size}",
        soft_wrap=True,
    )


@app.command(
    epilog=_examples(
        "acamkd tokens recipes/camvid.yaml --set losses.0.name=maskd --set losses.0.preset=segmentation",
        "acamkd distill recipes/camvid.yaml --set losses.0.name=maskd --set losses.0.preset=segmentation "
        "--set losses.0.tokens=runs/camvid/tokens.safetensors",
    )
)
def tokens(
    recipe: RecipeFile,
    losses: Losses = None,
    set_: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="File to write, instead of runs/NAME/tokens.safetensors.")] = None,
    iterations: Annotated[int, typer.Option(min=1, help="Number of batches.")] = 2000,
    lr: Annotated[float, typer.Option(min=0, help="Learning rate at the start; a cosine takes it to 1e-6.")] = 0.01,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
) -> None:
    """Learn the tokens of maskd, freekd or acam (mask_source: fixed) on a recipe's teacher, before distilling."""
    from acamkd import config
    from acamkd.jobs.tokens import learn_tokens

    learn_tokens(
        config.load(recipe, _overrides(losses, set_)), out=out, iterations=iterations, lr=lr, overwrite=overwrite
    )


@app.command(
    epilog=_examples(
        "acamkd evaluate runs/camvid/distilled",
        "acamkd evaluate runs/camvid/distilled --set data.root=/data/camvid --json",
        "acamkd evaluate runs/camvid/distilled --set data.val.images=images/test --set data.val.masks=masks/test",
    )
)
def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Score a run's best network on its validation images."""
    from acamkd.engine.runs import open_run
    from acamkd.jobs.evaluate import evaluate as job

    scores = job(open_run(run, set_ or ()))
    if as_json:
        _print_json(scores)
        return
    table = Table("metric", "percent")
    for name, value in scores.items():
        table.add_row(escape(name), f"{value:.2f}")
    Console().print(table)


@app.command(
    epilog=_examples(
        "acamkd export runs/camvid/distilled",
        "acamkd export runs/bccd/distilled --with-nms --out build/bccd",
        "acamkd export runs/camvid/distilled --license apache-2.0 --push-to-hub me/camvid-student",
    )
)
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    set_: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Where to, instead of RUN/export.")] = None,
    with_nms: Annotated[
        bool,
        typer.Option("--with-nms", help="Detection: the full graph with its suppression, for single images."),
    ] = False,
    license: Annotated[
        str | None, typer.Option("--license", "--license", help="Of the weights, for the model card.")
    ] = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="Upload to the Hugging Face Hub, to a private repository if new."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the export that the folder holds.")] = False,
) -> None:
    """Export a run's network to ONNX, checked against PyTorch, with weights and a model card."""
    from acamkd.engine.runs import open_run
    from acamkd.jobs.export import export as job

    if push_to_hub:
        job.check_repository(push_to_hub)
    figures = job.export(open_run(run, set_ or ()), out=out, overwrite=overwrite, with_nms=with_nms, license=license)
    metric = figures.metric
    table = Table("network", "runtime", metric, "ms", "parameters", "GFLOPs")
    for row in figures.measured:
        score = row.scores.get(metric)
        cost = (
            [f"{row.cost.milliseconds:.1f}", f"{row.cost.parameters:,}", f"{row.cost.gflops:.2f}"] if row.cost else []
        )
        table.add_row(row.network, row.runtime, "" if score is None else f"{score:.2f}", *cost)
    console = Console()
    console.print(table)
    console.print(
        f"largest difference of the outputs {figures.difference:.1e}, {figures.relative_difference:.1e} of their "
        f"largest value; times on {figures.threads} CPU thread{'s' if figures.threads > 1 else ''}"
    )
    if push_to_hub:
        console.print(job.push_to_hub(figures.folder, push_to_hub), markup=False)


@app.command(
    epilog=_examples(
        "acamkd predict runs/camvid/distilled street.jpg",
        "acamkd predict runs/bccd/distilled/export/student.onnx images/ --out found --score 0.5",
        "acamkd predict runs/camvid/distilled/export/student.onnx drive.mp4",
    )
)
def predict(
    model: Annotated[Path, typer.Argument(metavar="RUN|MODEL.onnx", help="Run folder, or an exported file.")],
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="An image, a folder of images, or a video.")],
    out: Annotated[Path | None, typer.Option(help="Output folder, instead of `predictions` beside the model.")] = None,
    score: Annotated[float, typer.Option(min=0, max=1, help="Detections below this score are left out.")] = 0.3,
) -> None:
    """Predict on images or a video: overlays, and boxes as JSON or masks as PNG."""
    from acamkd.jobs.predict import predict as job

    job(model, source, out=out, score=score)


@app.command(
    epilog=_examples(
        "acamkd report runs/camvid/distilled",
        "acamkd report runs/camvid/distilled --alone runs/camvid/alone-1 --set data.root=/data/camvid",
    )
)
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    alone: Annotated[
        Path | None, typer.Option(help="Run of the baseline, instead of the folder `alone` beside RUN.")
    ] = None,
    set_: Overrides = None,
) -> None:
    """Write a run's report.html anew: figures, masks over the epochs, and where the gain came from."""
    from acamkd.engine.runs import open_run
    from acamkd.report.run import write_report

    write_report(open_run(run, set_ or ()), open_run(alone) if alone else None)


@app.command(
    epilog=_examples(
        "acamkd compare recipes/camvid.yaml --methods none,fitnet,cwd,acam --seeds 5 --plan",
        "acamkd compare recipes/camvid.yaml --methods none,fitnet,cwd,acam --seeds 5 --time 6h --jobs 2",
        "acamkd compare recipes/camvid.yaml --methods none,cwd,acam --trial $SLURM_ARRAY_TASK_ID",
        "acamkd compare recipes/camvid.yaml --methods none,cwd,acam --tables --csv",
    )
)
def compare(
    recipe: RecipeFile,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Names, separated by commas: of the recipe's compare.methods (all of them if not given), or "
            "of `acamkd methods`."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings per method.")] = 5,
    set_: Overrides = None,
    results: Annotated[Path | None, typer.Option(help="Folder of the results, instead of runs/NAME/compare.")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Only print the trials and the hours that they take.")] = False,
    trial: Annotated[
        int | None, typer.Option("--trial", "--cell", help="Run this trial of the plan alone, in this process.")
    ] = None,
    limit: Annotated[
        str | None,
        typer.Option("--time", metavar="6h", help="Begin no trial that would end after this time (h, m, s)."),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Trials at the same time; they share the processor's cores.")] = 1,
    tables: Annotated[bool, typer.Option("--tables", help="Only write the tables of the finished trials.")] = False,
    as_csv: Annotated[
        bool,
        typer.Option(
            "--csv",
            help="Also gather the folder's finished trials in its trials.csv, a row each; from then on this file "
            "serves in the place of their JSON files.",
        ),
    ] = False,
) -> None:
    """Compare methods on one recipe over several seeds: who gains over the baseline, and is it more than luck?"""
    from acamkd import config
    from acamkd.engine.runs import default_folder
    from acamkd.jobs.compare import compare as comparison
    from acamkd.jobs.compare import trials_csv

    loaded = config.load(recipe, set_ or ())
    names = comparison.methods_of(loaded, methods.split(",") if methods else None)
    folder = results or default_folder(loaded, "compare")
    trials = comparison.plan(loaded, names, seeds, folder)
    if plan:
        Console().print(_plan_table(trials, folder))
    elif trial is not None:
        comparison.run_trial(trials, trial, folder)
    else:
        found = (
            comparison.tabulate(loaded, names, seeds, folder) if tables
            else comparison.compare(
                loaded, names, seeds=seeds, results=folder, seconds=_seconds(limit) if limit else None, jobs=jobs
            )
        )  # fmt: skip
        _print_comparison(found.rows, found.folder)
        if as_csv:
            Console().print(f"{trials_csv.export(folder)}: the finished trials", markup=False, soft_wrap=True)


def _seconds(text: str) -> float:
    """`6h`, `90m` or `30s` in seconds."""
    unit = {"h": 3600, "m": 60, "s": 1}.get(text[-1:])
    try:
        return float(text[:-1]) * unit if unit else float(text)
    except ValueError:
        raise AcamkdError(f"--time {text}: write a number and h, m or s, such as 6h") from None


def _plan_table(trials: Sequence[Trial], results: Path) -> Table:
    from acamkd.jobs.compare.compare import expected_seconds

    table = Table("trial", "method", "seed", "for", "state", "minutes")
    missing = 0.0
    for number, trial in enumerate(trials):
        done, seconds = trial.read(results), expected_seconds(trial, trials, results)
        missing += 0 if done or seconds is None else seconds
        minutes = f"{(done['wall_time'] if done else seconds or 0) / 60:.1f}" if done or seconds is not None else "?"
        purpose = "table" if not trial.tuning else f"tuning, {trial.setting:g}"
        table.add_row(str(number), escape(trial.method), str(trial.seed), purpose, "done" if done else "to do", minutes)
    known = any(trial.read(results) for trial in trials)
    table.caption = (
        f"{missing / 3600:.1f} hours to do, one trial at a time, by the finished ones" if known
        else "the hours are known once one trial has ended"
    )  # fmt: skip
    return table


def _print_comparison(rows: Sequence[Row], results: Path) -> None:
    table = Table("method", "n", "mean", "std", "against none", "95 %", "p", "verdict")
    for row in rows:
        gain = row.gain
        table.add_row(
            escape(row.method), str(row.n), f"{row.mean:.2f}", f"{row.std:.2f}" if row.std is not None else "",
            f"{gain.mean:+.2f}" if gain else "",
            f"{gain.low:+.2f} to {gain.high:+.2f}" if gain and gain.low is not None else "",
            row.p_text, row.verdict or "",
        )  # fmt: skip
    console = Console()
    console.print(table)
    console.print(
        f"{results}: comparison.html, comparison.md, comparison.json, comparison.png", markup=False, soft_wrap=True
    )


@app.command(
    epilog=_examples(
        "acamkd doctor recipes/camvid.yaml --set data.root=/data/camvid",
        "acamkd doctor recipes/camvid.yaml --set losses.0.name=cwd --json",
        "acamkd doctor recipes/camvid.yaml --data",
    )
)
def doctor(
    recipe: RecipeFile,
    losses: Losses = None,
    set_: Overrides = None,
    only_data: Annotated[
        bool,
        typer.Option("--data", help="Look at the images alone, and count what they hold; --json lists every problem."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Examine a recipe in less than a minute: is the teacher good, does its gradient reach the student?"""
    from dataclasses import asdict

    from acamkd import config
    from acamkd.jobs.doctor import examine, examine_data

    if only_data:
        splits = examine_data(config.load(recipe, set_ or ()))
        if as_json:
            _print_json({name: asdict(split) for name, split in splits.items()})
        else:
            _print_statistics(splits)
        raise typer.Exit(int(any(split.problems for split in splits.values())))
    logging.getLogger("acamkd").setLevel(logging.ERROR)  # every line here is a finding
    console, findings = Console(), []
    colors = {"pass": "green", "warn": "yellow", "fail": "bold red"}
    for finding in examine(config.load(recipe, _overrides(losses, set_))):
        findings.append(finding)
        if not as_json:
            line = Text.assemble((finding.status, colors[finding.status]), f"  {finding.check}: {finding.text}")
            console.print(line, soft_wrap=True)
            if finding.advice:
                console.print(f"      -> {finding.advice}", markup=False, soft_wrap=True)
    if as_json:
        _print_json([asdict(finding) for finding in findings])
    if any(finding.status == "fail" for finding in findings):
        raise typer.Exit(1)


def _print_statistics(splits: Mapping[str, Statistics]) -> None:
    from acamkd.data.checks import listed

    found = splits.values()
    table = Table("", *splits)
    table.add_row("images", *(f"{each.images:,}" for each in found))
    table.add_row("image sizes", *(_most_frequent(each.sizes) for each in found))
    boxes = any(each.boxes for each in found)
    table.add_row("without boxes" if boxes else "all void", *(f"{each.without:,}" for each in found))
    for key in ("small", "medium", "large", "ignored") if boxes else ():
        table.add_row(f"{key} boxes", *(f"{each.boxes.get(key, 0):,}" for each in found))
    for key in ("shortest", "median", "longest") if boxes else ():
        table.add_row(f"{key} side", *(f"{each.sides[key]:g}" if each.sides else "" for each in found))
    for name in dict.fromkeys(name for each in found for name in each.classes):
        numbers = (each.classes.get(name) for each in found)
        table.add_row(escape(name), *("" if n is None else f"{n:,}" if boxes else f"{n:.2f} %" for n in numbers))
    console = Console()
    console.print(table)
    for split, each in splits.items():
        for warning in each.warnings:
            console.print(Text.assemble(("warn", "yellow"), f"  {split}: {warning}"), soft_wrap=True)
        for problem in listed(each.problems):
            console.print(Text.assemble(("fail", "bold red"), f"  {split}: {problem}"), soft_wrap=True)


def _most_frequent(sizes: Mapping[str, int]) -> str:
    lines = [f"{size}: {number:,}" for size, number in list(sizes.items())[:3]]
    return "\n".join([*lines, *([f"{len(sizes) - 3} other sizes"] if len(sizes) > 3 else [])])


@app.command(
    epilog=_examples(
        "acamkd inspect recipes/camvid.yaml",
        "acamkd inspect retinanet/resnet101 retinanet/mobilenetv3_small_100",
        "acamkd inspect torchvision/deeplabv3_resnet101 pspnet/tu-mobilenetv2_100",
    )
)
def inspect(
    what: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE | TEACHER STUDENT",
            help="A recipe, or two networks: ARCH/BACKBONE, or torchvision/NAME for torchvision's segmenters.",
        ),
    ],
    set_: Overrides = None,
) -> None:
    """Show what can be tapped in a teacher and a student, and propose the `losses` of a recipe."""
    import yaml

    from acamkd import config
    from acamkd.jobs import inspect_layers as inspection

    if len(what) == 1:
        networks = inspection.of_recipe(config.load(Path(what[0]), set_ or ()))
    elif len(what) == 2:
        networks = inspection.of_names(*what)
    else:
        raise AcamkdError(f"give one recipe, or a teacher and a student, not {len(what)} names")
    for who, network in zip(("teacher", "student"), networks, strict=True):
        table = Table("layer", "channels", "stride", title=f"{who}: {type(network.net).__name__}", title_justify="left")
        for layer in inspection.layers(network):
            table.add_row(escape(layer.name), str(layer.channels), str(layer.stride))
        Console().print(table)
    losses = inspection.as_losses(inspection.propose(*networks), networks[1])
    typer.echo("# for the recipe\n" + yaml.safe_dump({"losses": losses}, sort_keys=False, default_flow_style=None))


@app.command(epilog=_examples("acamkd methods", "acamkd methods acam", "acamkd methods --json"))
def methods(
    name: Annotated[str | None, typer.Argument(metavar="[METHOD]", help="Show all options of one method.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the distillation methods, or the options of one."""
    from acamkd.distillation.methods import METHODS, describe

    logging.getLogger("acamkd").setLevel(logging.ERROR)  # describing builds losses without their tokens
    if as_json:
        _print_json(describe(name) if name else {each: describe(each) for each in METHODS})
        return
    console = Console()
    if name is None:
        table = Table("name", "paper", "terms", "parameters", "needs")
        for each in METHODS:
            row = describe(each)
            table.add_row(
                each, f"{row['authors']}, {row['venue']}", ", ".join(row["terms"]), f"{row['parameters']:,}",
                ", ".join(row["needs"]),
            )  # fmt: skip
        console.print(table)
        console.print("parameters: learnable ones of one level at 256 channels on both sides")
        return
    description = describe(name)
    console.print(f"[bold]{name}[/bold]: {escape(description['summary'])}\n{escape(description['paper'])}\n")
    table = Table("option", "type", "default", "meaning")
    for option in description["options"]:
        table.add_row(*(escape(str(option[column])) for column in ("name", "type", "default", "help")))
    console.print(table)
    for preset, values in description["presets"].items():
        console.print(f"preset [bold]{preset}[/bold]: {escape(str(values))}")


@app.command(epilog=_examples("acamkd demo", "acamkd demo --task segmentation --out /tmp/demo"))
def demo(
    task: Annotated[
        Literal["both", "detection", "segmentation"], typer.Option(help="Which of the two networks.")
    ] = "both",
    out: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("runs/demo"),
) -> None:
    """Train, distill and compare a small detector and a small segmenter on built-in images, in minutes."""
    from acamkd.jobs.demo import run

    run(out, ("detection", "segmentation") if task == "both" else (task,))


def _print_json(content: Any) -> None:
    from acamkd.engine.runs import as_json

    typer.echo(as_json(content))


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"acamkd {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    from acamkd.engine.runs import is_first_process

    logging.getLogger("acamkd").setLevel(logging.INFO if is_first_process() else logging.ERROR)
    logging.getLogger("acamkd").handlers = [_Lines()]


class _Lines(logging.Handler):
    """One line on stderr per message, above the progress bar where there is one; terminals wrap, files do not."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        warning = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        tqdm.write(f"{time.strftime('%H:%M:%S')} {warning}{self.format(record)}", file=sys.stderr)


def main() -> None:
    """Run the command line; what the user can mend is one message and exit code 1."""
    try:
        app()
    except AcamkdError as error:
        Console(stderr=True).print(Text.assemble(("error:", "bold red"), f" {error}"), soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
