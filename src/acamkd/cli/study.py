"""Commands that examine and compare: init, compare, doctor, inspect, methods, demo."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from acamkd.cli.app import (
    AsJson,
    Losses,
    Overrides,
    RecipeFile,
    app,
    examples,
    overrides_of,
    recipe_of,
    show,
    show_json,
)
from acamkd.errors import AcamkdError, nearest

if TYPE_CHECKING:
    from acamkd.jobs.compare.trials import Trial


@app.command(
    epilog=examples(
        "acamkd init photos",
        "acamkd init photos --task segmentation --classes background,road,car --unlabeled images/more",
        "acamkd init photos --teacher teacher.pth --teacher-network retinanet/resnet101 --out cells.yaml",
    )
)
def init(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Images and annotations, in any known layout.")],
    task: Annotated[
        Literal["detection", "segmentation"] | None, typer.Option(help="Needed where there are boxes and masks.")
    ] = None,
    classes: Annotated[
        str | None, typer.Option(help="Names from 0 on, separated by commas, where the folder does not say them.")
    ] = None,
    teacher: Annotated[Path | None, typer.Option(help="Checkpoint of a teacher; otherwise one is trained.")] = None,
    teacher_network: Annotated[
        str | None, typer.Option(metavar="ARCH/BACKBONE", help="What that is, where its tensors do not tell.")
    ] = None,
    unlabeled: Annotated[
        Path | None, typer.Option(help="Folder of images that have no labels, in FOLDER or the current folder.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The recipe, instead of FOLDER's name .yaml.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the recipe that is there.")] = False,
) -> None:
    """Look at a folder of images and write a recipe for it, each choice with its reason."""
    from acamkd.jobs.init.init import init as job

    asking = typer.prompt if sys.stdin.isatty() else None
    names = [name.strip() for name in classes.split(",")] if classes else None
    show(
        job(
            folder, task=task, classes=names, teacher=teacher, teacher_network=teacher_network, unlabeled=unlabeled,
            out=out, overwrite=overwrite, ask=asking,
        )
    )  # fmt: skip


@app.command(
    epilog=examples(
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
        int | None, typer.Option("--trial", help="Run this trial of the plan alone, in this process.")
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
    """Compare methods on one recipe over several seeds: gains over the baseline, with their significance."""
    asked = {"--plan": plan, "--trial": trial is not None, "--tables": tables}
    given = [name for name, is_given in asked.items() if is_given]
    if len(given) > 1:
        raise AcamkdError(f"{' and '.join(given)}: give one of them")
    if as_csv and (plan or trial is not None):
        raise AcamkdError(f"--csv gathers the finished trials of a comparison or of --tables, not of {given[0]}")
    loaded = recipe_of(recipe, set_)
    from acamkd.engine.runs import default_folder
    from acamkd.jobs.compare import compare as comparison
    from acamkd.jobs.compare import trials_csv

    names = comparison.methods_of(loaded, [name.strip() for name in methods.split(",")] if methods else None)
    folder = results.expanduser() if results else default_folder(loaded, "compare")
    trials = comparison.plan(loaded, names, seeds, folder)
    if as_csv:
        trials_csv.check_exportable(folder)
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
        show(found)
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
        f"{missing / 3600:.1f} hours to do, one trial at a time, by the times of the finished ones" if known
        else "the hours are known once one trial has ended"
    )  # fmt: skip
    return table


@app.command(
    epilog=examples(
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
        typer.Option("--data", help="Examine only the images, and count what they hold; --json lists every problem."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Examine a recipe in less than a minute: is the teacher good, does its gradient reach the student?"""
    from dataclasses import asdict

    loaded = recipe_of(recipe, overrides_of(losses, set_))
    if only_data:
        from acamkd.jobs.examine_data import examine_data

        report = examine_data(loaded)
        if as_json:
            show_json({name: asdict(split) for name, split in report.splits.items()})
        else:
            show(report)
        raise typer.Exit(int(report.failed))
    from acamkd.jobs.doctor import Diagnosis, examine

    logging.getLogger("acamkd").setLevel(logging.ERROR)  # the output consists of findings only
    findings = []
    for finding in examine(loaded):
        findings.append(finding)
        if not as_json:
            show(finding)  # printed at once, since the next one may take a while
    if as_json:
        show_json([asdict(finding) for finding in findings])
    raise typer.Exit(int(Diagnosis(tuple(findings)).failed))


@app.command(
    epilog=examples(
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
            help="A recipe, or two networks: ARCH/BACKBONE, torchvision/NAME for torchvision's segmenters, hf/NAME, or "
            "timm/NAME for a teacher without a head.",
        ),
    ],
    set_: Overrides = None,
) -> None:
    """List the layers of a teacher and a student that can be tapped, and propose a recipe's `losses`."""
    if len(what) > 2:
        raise AcamkdError(f"give one recipe, or a teacher and a student, not {len(what)} names")
    if len(what) == 2 and set_:
        raise AcamkdError(f"--set {set_[0]} changes a recipe, and two networks have none: give a recipe")
    if len(what) == 1 and not Path(what[0]).suffix and not Path(what[0]).exists():
        raise AcamkdError(f"there is no recipe {what[0]}; of networks name two: acamkd inspect TEACHER STUDENT")
    first = recipe_of(Path(what[0]), set_) if len(what) == 1 else what[0]
    from acamkd.jobs.inspect_layers import inspect as job

    show(job(first, *what[1:]))


@app.command(epilog=examples("acamkd methods", "acamkd methods acam", "acamkd methods --json"))
def methods(
    name: Annotated[str | None, typer.Argument(metavar="[METHOD]", help="Show all options of one method.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the distillation methods, or the options of one."""
    known = json.loads(resources.files("acamkd.cli").joinpath("methods.json").read_text(encoding="utf-8"))
    if name is not None and name not in known:
        if ":" not in name:
            raise AcamkdError(f"there is no method {name!r}; {nearest(name, known)}")
        from acamkd.distillation.methods import describe

        logging.getLogger("acamkd").setLevel(logging.ERROR)  # the description builds losses without their tokens
        known[name] = describe(name)
    if as_json:
        show_json(known[name] if name else known)
        return
    console = Console()
    if name is None:
        table = Table("name", "paper", "terms", "parameters", "needs")
        for each, row in known.items():
            table.add_row(
                each, f"{row['authors']}, {row['venue']}", ", ".join(row["terms"]), f"{row['parameters']:,}",
                ", ".join(row["needs"]),
            )  # fmt: skip
        console.print(table)
        console.print("parameters: learnable parameters of one level with 256 channels in student and teacher")
        return
    description = known[name]
    console.print(f"[bold]{name}[/bold]: {escape(description['summary'])}\n{escape(description['paper'])}\n")
    table = Table("option", "type", "default", "meaning")
    for option in description["options"]:
        table.add_row(*(escape(str(option[column])) for column in ("name", "type", "default", "help")))
    console.print(table)
    for preset, values in description["presets"].items():
        console.print(f"preset [bold]{preset}[/bold]: {escape(str(values))}")


@app.command(epilog=examples("acamkd demo", "acamkd demo --task segmentation --seed 1 --out /tmp/demo"))
def demo(
    task: Annotated[
        Literal["both", "detection", "segmentation"], typer.Option(help="Which of the two networks.")
    ] = "both",
    out: Annotated[Path, typer.Option(help="Output folder.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of the scenes and of the trainings.")] = 0,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep what an earlier demo finished, and resume what it began.")
    ] = False,
) -> None:
    """Distill a small detector and a small segmenter from built-in teachers on built-in images, in minutes."""
    from acamkd.jobs.demo.demo import demo as job

    show(job(out, task=task, seed=seed, keep=keep))
