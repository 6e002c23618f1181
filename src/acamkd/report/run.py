"""The report of a run: one self-contained HTML file."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from acamkd import config, data
from acamkd.data import ImageDataset
from acamkd.engine.cost import Cost, cost, threads
from acamkd.engine.devices import device_of
from acamkd.engine.mask_history import REPLAY, spread
from acamkd.engine.metrics import METRICS
from acamkd.engine.runs import RECIPE, Run, open_run, write_text
from acamkd.errors import AcamkdError
from acamkd.files import check_writable
from acamkd.models.base import TaskModel
from acamkd.report.benchmark import read_benchmark
from acamkd.report.charts import Chart, curve, draw, loss_charts, read_history
from acamkd.report.gain import IMAGES, Gain, compare, rows
from acamkd.report.masks import load_replay
from acamkd.report.templates import environment
from acamkd.report.visualize import embed, hex_color

log = logging.getLogger(__name__)

REPORT = "report.html"
TEACHER, BASELINE, DISTILLED = "teacher", "baseline", "distilled"

BESIDE = ("baseline", "alone")
"""Folders beside a distilled run that may hold the baseline; the second name is of earlier versions."""


@dataclass(frozen=True)
class Network:
    """One network of the report.

    Attributes:
        name: TEACHER, BASELINE or DISTILLED.
        architecture: Description of the network, from its section of the recipe.
        scores: Every metric by name, in percent.
        model: The network in eval mode on the CPU; None if its weights are missing.
        cost: Cost of one prediction; None if the weights are missing.
    """

    name: str
    architecture: str
    scores: dict[str, Any]
    model: TaskModel | None
    cost: Cost | None


def write_report(run: Run, baseline: Run | None = None) -> Path:
    """Write a run's report.html.

    Args:
        run: A finished run.
        baseline: A run of the same student without distillation; by default the folder `baseline` beside the run.

    Returns:
        The file.

    Raises:
        AcamkdError: A run is not finished, its weights or images are missing, or the runs have different validation
            images.
    """
    check_writable(run.folder, "the report to", "copy the run to a folder that can be written")
    recipe, metrics = run.recipe, run.metrics
    trained = config.load(run.folder / RECIPE).data.resize
    if recipe.data.resize != trained:
        raise AcamkdError(
            f"data.resize is {recipe.data.resize}, but the scores in {run.folder} are of {trained}: leave it as it is"
        )
    metric = METRICS[recipe.task]
    images = data.build(recipe.data, recipe.task, "val", seed=recipe.train.seed, augment=False)
    if images.fingerprint() != metrics["data"]["val"]:
        raise AcamkdError(
            f"the validation images in {recipe.data.root} are not those that {run.folder} was scored on: "
            "point data.root to them (--set data.root=FOLDER)"
        )
    baseline = _baseline(run, metrics, baseline)
    own = _own_name(run)
    networks = _networks(run, baseline, images, own)
    after = networks[own]
    before = networks.get(BASELINE, networks.get(TEACHER)) if own == DISTILLED else None
    if before and before.name == BASELINE and (after.scores[metric] or 0) < (before.scores[metric] or 0):
        log.warning("the distilled student is below the baseline: %s %.2f against %.2f; acamkd doctor RECIPE looks "
                    "for reasons", metric, after.scores[metric] or 0, before.scores[metric])  # fmt: skip
    history = read_history(run.folder / "history.csv")
    replay = load_replay(run.folder / REPLAY) if (run.folder / REPLAY).is_file() else None
    page = environment().get_template("report.html.jinja").render(
        run=run,
        recipe=recipe,
        recipe_text=(run.folder / RECIPE).read_text(encoding="utf-8"),
        metrics=metrics,
        metric=metric,
        networks=networks,
        own=own,
        before=before,
        after=after,
        threads=threads(),
        metric_chart=_metric_chart(metric, own, history, baseline, networks),
        loss_charts=loss_charts(history),
        benchmark=read_benchmark(run.folder),
        rows=rows(before.scores if before else {}, after.scores),
        gain=_compare(images, before, after, device_of(recipe.train)) if before else None,
        compared_all=len(images) <= IMAGES,
        count=len(images),
        replay=replay,
        viewer=_viewer(replay.data, replay.images, images) if replay else None,
        legend=[(name, hex_color(k + (recipe.task == "detection"))) for k, name in enumerate(images.classes)
                if name != "background"],
    )  # fmt: skip
    file = run.folder / REPORT
    write_text(file, page)
    size = len(page.encode())
    log.info("%s: the report, %s", file, f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB")
    return file


def _own_name(run: Run) -> str:
    if run.role == "teacher":
        return TEACHER
    return DISTILLED if run.recipe.losses else BASELINE


def _baseline(run: Run, metrics: dict[str, Any], given: Run | None) -> Run | None:
    """The baseline, if it is known and was scored on the same images."""
    if _own_name(run) != DISTILLED:
        if given is not None:
            raise AcamkdError(f"{run.folder} is no distillation: there is nothing to compare with {given.folder}")
        return None
    beside = [folder for name in BESIDE if (folder := run.folder.parent / name).exists()]
    if given is None and not beside:
        return None
    try:
        baseline = given or open_run(beside[0])
        if _own_name(baseline) != BASELINE:
            raise AcamkdError(f"{baseline.folder} is no run of a baseline")
        if baseline.metrics["data"]["val"] != metrics["data"]["val"]:
            raise AcamkdError(f"{baseline.folder} and {run.folder} were scored on different validation images")
    except AcamkdError as error:
        if given is not None:
            raise
        log.warning("the report compares only with the teacher: %s", error)
        return None
    return baseline


def _networks(run: Run, baseline: Run | None, images: ImageDataset, own: str) -> dict[str, Network]:
    """Teacher, baseline and distilled student, as far as known, in this order."""
    image, metrics, recipe = images[0][0], run.metrics, run.recipe

    def network(name: str, section: config.Model, scores: dict[str, Any], model: TaskModel | None) -> Network:
        spent = cost(model, image) if model else None
        return Network(name, section.title, scores, model, spent)

    networks = {}
    if own == DISTILLED:
        assert recipe.teacher is not None
        networks[TEACHER] = network(TEACHER, recipe.teacher, metrics["teacher"], _teacher(run))
    if baseline is not None:
        networks[BASELINE] = network(BASELINE, baseline.recipe.student, baseline.metrics["student"], baseline.load())
    section = recipe.teacher if run.role == "teacher" else recipe.student
    assert section is not None
    networks[own] = network(own, section, metrics[run.role], run.load())
    return networks


def _teacher(run: Run) -> TaskModel | None:
    try:
        return run.load_teacher()
    except AcamkdError as error:
        log.warning("the report omits the teacher's cost: %s", error)
        return None


def _metric_chart(
    metric: str, own: str, history: list[dict[str, float]], baseline: Run | None, networks: dict[str, Network]
) -> Chart:
    curves = {own: curve(history, metric)}
    if baseline is not None:
        curves[BASELINE] = curve(read_history(baseline.folder / "history.csv"), metric)
    reached = networks[TEACHER].scores[metric] if own == DISTILLED else None
    level = (TEACHER, reached) if reached is not None else None
    return draw(f"{metric} on the validation images, percent", curves, level=level)


def _compare(images: ImageDataset, before: Network, after: Network, device: torch.device) -> Gain | None:
    """Comparison of both networks image by image, if both are available and have the same classes."""
    if before.model is None or after.model is None or before.model.num_classes != after.model.num_classes:
        return None
    log.info("comparing %d images one by one", min(IMAGES, len(images)))
    sides = (before.name, before.model.to(device)), (after.name, after.model.to(device))
    return compare(images, spread(len(images), IMAGES), *sides)


def _viewer(replay: dict[str, Any], indices: list[int], images: ImageDataset) -> dict[str, Any]:
    """The mask history with its images."""
    shown = [images[index][0] for index in indices]
    return {
        **replay,
        "images": [
            {"name": images.files[index].name, "source": embed(image.permute(1, 2, 0).numpy()),
             "width": image.shape[-1], "height": image.shape[-2]}
            for index, image in zip(indices, shown, strict=True)
        ],
    }  # fmt: skip
