"""Common parts of the command line: the application, shared arguments, and error handling."""

from __future__ import annotations

import logging
import sys
import time
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.text import Text

from acamkd import __version__
from acamkd.errors import AcamkdError

if TYPE_CHECKING:
    from acamkd.config import Recipe
    from acamkd.engine.runs import Run

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Distill object detectors and semantic segmenters: ACAM-KD and its competing methods behind one interface.",
    epilog="Start with [bold]acamkd demo[/bold]; on your own images: [bold]acamkd init FOLDER[/bold] writes a "
    "recipe, and [bold]acamkd run RECIPE[/bold] trains and compares.",
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
Profile = Annotated[
    bool, typer.Option("--profile", help="Measure where the time of the steps goes, and print it at the end.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")]


# A command reads its recipe or run before it imports its job: an error is then shown before torch is loaded.
def recipe_of(file: Path, assignments: list[str] | None) -> Recipe:
    """Read a recipe with the assignments of --set."""
    from acamkd.config import load

    return load(file, assignments or ())


def run_of(folder: Path, assignments: list[str] | None = None) -> Run:
    """Open a run folder, its recipe changed by the assignments of --set."""
    from acamkd.engine.runs import open_run

    return open_run(folder, assignments or ())


def overrides_of(losses: Path | None, assignments: list[str] | None) -> list[str]:
    """Combine --losses and --set into assignments; the losses come first, so that --set can change them."""
    from acamkd.config import read_text, read_yaml

    if losses is None:
        return assignments or []
    text = read_text(losses, "losses")
    read_yaml(text, str(losses))  # so that an error names the file
    return [f"losses={text}", *(assignments or [])]


def examples(*lines: str) -> str:
    """Text below a command's help."""
    return "Examples:\n\n" + "\n\n".join(lines)


def show(result: Any) -> None:
    """Print a result; a terminal wraps long lines, a file gets them whole."""
    Console().print(result, soft_wrap=not sys.stdout.isatty())


def show_json(content: Any) -> None:
    """Print JSON."""
    from acamkd.files import as_json

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
    from acamkd.progress import is_first_process

    logging.getLogger("acamkd").setLevel(logging.INFO if is_first_process() else logging.ERROR)
    # On the root, since libraries that find no handler there add one, which would print every line again.
    root = logging.getLogger()
    if not any(isinstance(handler, _Lines) for handler in root.handlers):
        root.addHandler(_Lines())


class _Lines(logging.Handler):
    """Prints one line per message to stderr, above a progress bar if there is one; of other packages, warnings."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.name.startswith("acamkd") or record.levelno >= logging.WARNING

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        warning = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        tqdm.write(f"{time.strftime('%H:%M:%S')} {warning}{self.format(record)}", file=sys.stderr)


def main() -> None:
    """Run the command line; an AcamkdError becomes one message and exit code 1, as does a file that is not ours."""
    if isinstance(sys.stdout, TextIOWrapper):  # to a file or pipe, it may know fewer letters than a name or a minus has
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app()
    except AcamkdError as error:
        _fail(str(error))
    except PermissionError as error:
        if error.filename is None:
            raise
        _fail(f"{error.filename}: {error.strerror}; let this user read and write it, or name another place")


def _fail(message: str) -> NoReturn:
    Console(stderr=True).print(Text.assemble(("error:", "bold red"), f" {message}"), soft_wrap=True)
    sys.exit(1)
