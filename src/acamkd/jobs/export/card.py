"""Model card of an exported network: description, training, scores and usage."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined

from acamkd import __version__, config
from acamkd.models import call_factory
from acamkd.models.backbones import timm_options
from acamkd.models.base import TaskModel
from acamkd.models.detection import ARCHITECTURES
from acamkd.models.timm_features import license_of

if TYPE_CHECKING:
    from acamkd.engine.runs import Run
    from acamkd.jobs.export.export import Export
    from acamkd.jobs.export.onnx_model import OnnxModel


def write_card(
    file: Path, run: Run, model: TaskModel, exported: OnnxModel, figures: Export, license: str | None = None
) -> None:
    """Write a model card in Markdown, with the Hub's metadata on top.

    Args:
        file: `README.md`, which the Hub shows.
        run: The exported run.
        model: Its network.
        exported: The ONNX file.
        figures: Measurements of the export.
        license: License of the weights, by the Hub's name; without it the card asks for one.
    """
    recipe = run.recipe
    section = recipe.teacher if run.role == "teacher" else recipe.student
    assert section is not None
    text = _environment().get_template("card.md.jinja").render(
        recipe=recipe,
        role=run.role,
        ended=run.has_ended,
        epochs=run.metrics.get("epochs", recipe.train.epochs) if run.has_ended else None,
        section=section,
        origin=_origin(section),
        of_task_model=":" in section.arch and isinstance(call_factory(section, len(exported.classes)), TaskModel),
        distilled=run.role == "student" and bool(recipe.losses),
        losses=[_describe(loss) for loss in recipe.losses],
        data_folder=recipe.data.root.resolve().name,
        model=model,
        detectors={name: kind.__name__ for name, kind in ARCHITECTURES.items()},
        timm_options=timm_options(section.backbone),
        exported=exported,
        shape=exported.session.get_inputs()[0].shape,
        figures=figures,
        metrics=[name for name in figures.measured[-1].scores if "/" not in name],  # without single classes
        license=license,
        teacher_license=license_of_teacher(recipe),
        version=__version__,
    )  # fmt: skip
    file.write_text(text.lstrip(), encoding="utf-8")  # the Hub reads its metadata from the first line on


def license_of_teacher(recipe: config.Recipe) -> str | None:
    """License of the weights of a teacher without a head, as timm names it."""
    teacher = recipe.teacher
    if teacher is None or not teacher.is_headless or teacher.backbone_weights is None:
        return None
    return license_of(teacher.arch.removeprefix("timm/"))


def _origin(section: config.Model) -> str:
    """What the training started from."""
    if section.weights is not None:
        return section.weights
    if section.backbone_weights not in (None, "imagenet"):
        return f"{section.backbone_weights}, which is the backbone alone"
    if section.brings_weights:
        return f"{section.arch}, as it is provided"
    if section.backbone_weights is None or section.arch.startswith("hf/"):
        return "random weights"
    backbone = "its backbone" if section.arch.startswith("torchvision/") else section.backbone
    return f"{backbone} pretrained on ImageNet, all else from random weights"


def _describe(loss: config.Loss) -> str:
    pairs = ", ".join(pair if isinstance(pair, str) else " <- ".join(pair) for pair in loss.pairs)
    settings = {**({"preset": loss.preset} if loss.preset else {}), **loss.options}
    options = ", ".join(f"{name}: {value}" for name, value in settings.items())
    return f"{loss.name} at {pairs or 'the heads'}" + (f" ({options})" if options else "")


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("acamkd.jobs.export", "."), undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["python"] = repr
    environment.filters["percent"] = lambda value: "-" if value is None or value != value else f"{value:.2f}"
    return environment
