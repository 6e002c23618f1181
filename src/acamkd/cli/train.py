"""Commands that train: run, train, distill, pretrain, tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from acamkd.cli.app import (
    Losses,
    Out,
    Overrides,
    Overwrite,
    Profile,
    RecipeFile,
    Resume,
    app,
    examples,
    overrides_of,
    recipe_of,
    show,
)
from acamkd.progress import is_first_process

if TYPE_CHECKING:
    from acamkd.engine.runs import Run


@app.command(
    epilog=examples(
        "acamkd train recipes/camvid.yaml --role teacher --set data.root=/data/camvid",
        "acamkd train recipes/camvid.yaml --set train.seed=1 --out runs/camvid/baseline-1",
    )
)
def train(
    recipe: RecipeFile,
    role: Annotated[
        Literal["teacher", "student"], typer.Option("--role", help="Which of the recipe's networks.")
    ] = "student",
    set_: Overrides = None,
    out: Out = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    profile: Profile = False,
) -> None:
    """Train one network of a recipe without distillation: the teacher, or the baseline."""
    loaded = recipe_of(recipe, set_)
    from acamkd.jobs.train import train as job

    _show_profile(job(loaded, role, out=out, resume=resume, overwrite=overwrite, profile=profile), profile)


@app.command(
    epilog=examples(
        "acamkd distill recipes/camvid.yaml --set data.root=/data/camvid",
        "acamkd distill recipes/camvid.yaml --set losses.0.name=fitnet --out runs/camvid/fitnet",
        "acamkd distill recipes/camvid.yaml --losses recipes/combinations/mgd_segmentation.yaml",
        "acamkd distill recipes/camvid.yaml --set teacher.weights=teacher.safetensors --resume",
        "acamkd distill recipes/camvid.yaml --dry-run",
        "acamkd distill recipes/camvid.yaml --profile",
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
    profile: Profile = False,
) -> None:
    """Train a recipe's student with its losses against its teacher."""
    loaded = recipe_of(recipe, overrides_of(losses, set_))
    from acamkd.jobs.train import distill as job

    if dry_run:
        show(job(loaded, dry_run=True))
    else:
        _show_profile(job(loaded, out=out, resume=resume, overwrite=overwrite, profile=profile), profile)


def _show_profile(trained: Run, asked: bool) -> None:
    if asked and is_first_process():
        from acamkd.engine.step_profile import StepProfile

        show(StepProfile.read(trained.folder))


@app.command(
    epilog=examples(
        "acamkd pretrain photos.yaml",
        "acamkd train photos.yaml --set student.backbone_weights=runs/photos/pretrained/backbone.safetensors",
    )
)
def pretrain(
    recipe: RecipeFile,
    losses: Losses = None,
    set_: Overrides = None,
    out: Out = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Train the backbone of a recipe's student on images without labels, against its teacher's features."""
    loaded = recipe_of(recipe, overrides_of(losses, set_))
    from acamkd.jobs.pretrain import pretrain as job

    job(loaded, out=out, resume=resume, overwrite=overwrite)


@app.command(
    epilog=examples(
        "acamkd run photos.yaml",
        "acamkd run recipes/camvid.yaml --set data.root=/data/camvid --set train.epochs=24",
    )
)
def run(
    recipe: RecipeFile,
    set_: Overrides = None,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Distill although the doctor finds that it would be worthless.")
    ] = False,
) -> None:
    """Train teacher, baseline and distilled student, and compare: one command, which goes on where it was stopped."""
    recipe_of(recipe, set_)  # what does not fit is said before torch is imported
    from acamkd.jobs.run_all import run as job

    show(job(recipe, overrides=set_ or (), anyway=anyway))


@app.command(
    epilog=examples(
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
    lr: Annotated[float, typer.Option(min=0, help="Initial learning rate; a cosine lowers it to 1e-6.")] = 0.01,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
) -> None:
    """Learn the tokens of maskd, freekd or acam (mask_source: fixed) on a recipe's teacher, before distilling."""
    loaded = recipe_of(recipe, overrides_of(losses, set_))
    from acamkd.jobs.tokens import learn_tokens

    learn_tokens(loaded, out=out, iterations=iterations, lr=lr, overwrite=overwrite)
