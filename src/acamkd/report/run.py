"""The report of a run: one self-contained HTML file."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from acamkd import config, data
from acamkd.data import ImageDataset
from acamkd.engine.cost import costs, threads
from acamkd.engine.mask_history import REPLAY
from acamkd.engine.metrics import METRICS
from acamkd.engine.runs import RECIPE, Run, open_run, shortened
from acamkd.errors import AcamkdError
from acamkd.files import check_writable, write_text
from acamkd.models.base import TaskModel
from acamkd.report.answers import BASELINE, DISTILLED, TEACHER, Network, answers_of
from acamkd.report.benchmark import read_benchmark
from acamkd.report.charts import Chart, curve, draw, loss_charts, read_history
from acamkd.report.gain import Example, Gain, compare, rows, sample
from acamkd.report.masks import load_replay
from acamkd.report.templates import environment
from acamkd.report.visualize import embed, hex_color, is_background

log = logging.getLogger(__name__)

REPORT = "report.html"
BESIDE = ("baseline", "alone")
"""Folders beside a distilled run that may hold the baseline; the second name is of earlier versions."""


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
    if run.role == "backbone":
        raise AcamkdError(f"{run.folder} holds a backbone, of which there is nothing to show but its history.csv")
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
    if before and before.scores.get(metric) is None:  # a teacher without a head, or with classes of its own
        before = None
    if before and before.name == BASELINE and (after.scores[metric] or 0) < (before.scores[metric] or 0):
        log.warning("the distilled student is below the baseline: %s %.2f against %.2f; acamkd doctor RECIPE looks "
                    "for reasons", metric, after.scores[metric] or 0, before.scores[metric])  # fmt: skip
    gain, examples, objects = _image_by_image(run, images, before, after)
    interval = gain.interval if gain and before and before.name == BASELINE else None
    unlike = run.unlike(baseline) if baseline else []
    if baseline and unlike:
        log.warning("%s was trained otherwise than %s (%s): not all of the difference is the distillation's",
                    baseline.folder, run.folder, shortened(unlike, "; "))  # fmt: skip
    history = read_history(run.folder / "history.csv")
    replay = load_replay(run.folder / REPLAY) if (run.folder / REPLAY).is_file() else None
    page = environment().get_template("report.html.jinja").render(
        run=run,
        recipe=recipe,
        recipe_text=(run.folder / RECIPE).read_text(encoding="utf-8"),
        metrics=metrics,
        metric=metric,
        epochs=metrics.get("epochs", recipe.train.epochs),
        networks=networks,
        own=own,
        before=before,
        after=after,
        answers=answers_of(run, own, networks, interval, len(images), unlike),
        interval=interval,
        threads=threads(),
        metric_chart=_metric_chart(metric, own, history, baseline, networks),
        loss_charts=loss_charts(history),
        benchmark=read_benchmark(run.folder),
        rows=rows(before.scores if before else {}, after.scores, objects),
        gain=gain,
        examples=examples,
        count=len(images),
        replay=replay,
        viewer=_viewer(replay.data, replay.images, images) if replay else None,
        legend=[(name, hex_color(k + (recipe.task == "detection"))) for k, name in enumerate(images.classes)
                if not is_background(name)],
    )  # fmt: skip
    file = run.folder / REPORT
    write_text(file, page)
    size = file.stat().st_size
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
    metrics, recipe = run.metrics, run.recipe
    networks = {}
    if own == DISTILLED:
        assert recipe.teacher is not None
        networks[TEACHER] = Network(TEACHER, recipe.teacher.title, metrics["teacher"], _teacher(run), None, None)
    if baseline is not None:
        scores, seconds = baseline.metrics["student"], baseline.metrics["seconds"]
        networks[BASELINE] = Network(BASELINE, baseline.recipe.student.title, scores, baseline.load(), None, seconds)
    section = recipe.teacher if run.role == "teacher" else recipe.student
    assert section is not None
    networks[own] = Network(own, section.title, metrics[run.role], run.load(), None, metrics["seconds"])
    models = {name: network.model for name, network in networks.items() if network.model is not None}
    spent = dict(zip(models, costs(list(models.values()), images[0][0]), strict=True))
    return {name: replace(network, cost=spent.get(name)) for name, network in networks.items()}


def _teacher(run: Run) -> TaskModel | None:
    try:
        teacher = run.load_teacher()
        if isinstance(teacher, TaskModel):
            return teacher
        log.info("the report omits the teacher's score and cost: it has no head, and predicts nothing")
        return None
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


def _image_by_image(
    run: Run, images: ImageDataset, before: Network | None, after: Network
) -> tuple[Gain | None, list[Example], Mapping[str, int]]:
    """Comparison of two networks of the same classes; otherwise examples of the run's own; and counts of objects."""
    log.info("looking at %d validation images one by one", len(images))
    assert after.model is not None
    own = (after.name, after.model)
    if before and before.model and before.model.num_classes == after.model.num_classes:
        gain, objects = compare(images, run.recipe, (before.name, before.model), own)
        return gain, [], objects
    examples, objects = sample(images, run.recipe, own)
    return None, examples, objects


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
