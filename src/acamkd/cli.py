"""The command line: words to one call. Heavy imports stay inside the commands, so that help answers at once."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from acamkd import __version__
from acamkd.errors import AcamkdError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Distil object detectors and semantic segmenters: ACAM-KD and its rivals behind one interface.",
    epilog="Start with [bold]acamkd demo[/bold]; on your own pictures: [bold]acamkd train R --model teacher[/bold], "
    "[bold]acamkd train R[/bold], [bold]acamkd distill R[/bold] with a recipe R.",
)

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file; see the folder recipes/.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override any key of the recipe; may be repeated."),
]
Out = Annotated[Path | None, typer.Option(help="Run folder, instead of runs/NAME/JOB.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run that the folder holds.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the run that the folder holds.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def _examples(*lines: str) -> str:
    return "Examples:\n\n" + "\n\n".join(lines)


@app.command(
    epilog=_examples(
        "acamkd train recipes/camvid.yaml --model teacher --set data.root=~/camvid",
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
    """Train one network of a recipe without distillation: the teacher, or the student alone."""
    from acamkd import config
    from acamkd.train import train as job

    job(config.load(recipe, set_ or ()), model, out=out, resume=resume, overwrite=overwrite)


@app.command(
    epilog=_examples(
        "acamkd distill recipes/camvid.yaml --set data.root=~/camvid",
        "acamkd distill recipes/camvid.yaml --set losses.0.name=fitnet --out runs/camvid/fitnet",
        "acamkd distill recipes/camvid.yaml --set teacher.weights=teacher.safetensors --resume",
    )
)
def distill(
    recipe: RecipeFile,
    set_: Overrides = None,
    out: Out = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Train a recipe's student with its losses against its teacher."""
    from acamkd import config
    from acamkd.train import distill as job

    job(config.load(recipe, set_ or ()), out=out, resume=resume, overwrite=overwrite)


@app.command(
    epilog=_examples(
        "acamkd evaluate runs/camvid/distilled", "acamkd evaluate runs/camvid/distilled --set data.root=~/camvid --json"
    )
)
def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Score a run's best network on its validation pictures."""
    from acamkd.evaluate import evaluate as job
    from acamkd.runs import open_run

    scores = job(open_run(run, set_ or ()))
    if as_json:
        _print_json(scores)
        return
    table = Table("metric", "percent")
    for name, value in scores.items():
        table.add_row(name, f"{value:.2f}")
    Console().print(table)


@app.command(epilog=_examples("acamkd methods", "acamkd methods acam", "acamkd methods --json"))
def methods(
    name: Annotated[str | None, typer.Argument(metavar="[METHOD]", help="Show all options of one method.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the distillation methods, or the options of one."""
    from acamkd.methods import METHODS, describe

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
    console.print(f"[bold]{name}[/bold]: {description['summary']}\n{description['paper']}\n")
    table = Table("option", "type", "default", "meaning")
    for option in description["options"]:
        table.add_row(option["name"], option["type"], str(option["default"]), option["help"])
    console.print(table)
    for preset, values in description["presets"].items():
        console.print(f"preset [bold]{preset}[/bold]: {values}")


@app.command(epilog=_examples("acamkd demo", "acamkd demo --task segmentation --out /tmp/demo"))
def demo(
    task: Annotated[
        Literal["both", "detection", "segmentation"], typer.Option(help="Which of the two networks.")
    ] = "both",
    out: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("runs/demo"),
) -> None:
    """Train, distil and compare a small detector and a small segmenter on built-in pictures, in minutes."""
    from acamkd.demo import run

    run(out, ("detection", "segmentation") if task == "both" else (task,))


def _print_json(content: Any) -> None:
    from acamkd.runs import as_json

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
    from rich.logging import RichHandler

    handler = RichHandler(console=Console(stderr=True), show_path=False, show_level=False, log_time_format="%H:%M:%S")
    logging.getLogger("acamkd").setLevel(logging.INFO)
    logging.getLogger("acamkd").handlers = [handler]


def main() -> None:
    """Run the command line; what the user can mend is one message and exit code 1."""
    try:
        app()
    except AcamkdError as error:
        Console(stderr=True).print(f"[bold red]error:[/bold red] {error}", highlight=False, soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
