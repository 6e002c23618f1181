"""One command for the evening: teacher, baseline, distilled student, scores on the test split, and what came of it."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from rich.console import Group
from rich.table import Table
from rich.text import Text

from acamkd import config, data
from acamkd.data.packed import stamp_of
from acamkd.distillation.auto_weight import dry_build
from acamkd.engine.evidence import ImageInterval, compare_command, signed
from acamkd.engine.image_statistics import collect, image_interval
from acamkd.engine.metrics import METRICS
from acamkd.engine.printing import Printable
from acamkd.engine.runs import WITHOUT_EFFECT, OtherRunError, Run, default_folder, open_run
from acamkd.errors import AcamkdError
from acamkd.files import write_json, write_text
from acamkd.jobs.apart import carry_out, device_count
from acamkd.jobs.doctor import examine
from acamkd.jobs.evaluate import evaluate
from acamkd.jobs.examine_data import examine_data
from acamkd.jobs.inspect_layers import of_recipe
from acamkd.jobs.setup import describe_lead, score_of_run, teacher_section
from acamkd.jobs.train import distill, train
from acamkd.models.weights import TORCHVISION
from acamkd.progress import is_first_process, muted
from acamkd.report.run import REPORT, write_report

log = logging.getLogger(__name__)

NOTES = "run.json"
"""In runs/NAME: what has ended with which recipe, the scores on the test split, and the gain's interval."""

NETWORKS = {"teacher": "teacher", "baseline": "baseline", "distilled": "distilled student"}
"""In words, by the name of their run's folder."""


COMMANDS = {"teacher": ("train", "--role", "teacher"), "baseline": ("train",), "distilled": ("distill",)}
"""What trains each of them alone: the command, and its options."""

RESOLVED = "run.yaml"
"""In runs/NAME: the recipe with its overrides, for trainings in a process of their own."""


@dataclass(frozen=True)
class RunAll(Printable):
    """What an evening's trainings came to.

    Attributes:
        distilled: The distilled student's run.
        metric: Name of the deciding metric.
        scores: By network (`teacher`, `baseline`, `distilled`) its best validation score in percent; a teacher that
            cannot be scored is missing.
        test: Likewise on the test split; empty where the recipe has none.
        report: The page.
        interval: Of the gain, from the images that it is measured on; None with a single image.
        more_seeds: The command that trains both with more seeds.
    """

    distilled: Run
    metric: str
    scores: dict[str, float]
    test: dict[str, float]
    report: Path
    interval: ImageInterval | None
    more_seeds: str

    @property
    def gain(self) -> float:
        """Points of the distilled student over the baseline: on the test split if there is one, else in validation."""
        judged = self.test or self.scores
        return judged["distilled"] - judged["baseline"]

    @property
    def verdict(self) -> str:
        """The last line: the gain, what can be said of it after one seed, and what comes next."""
        where = "test" if self.test else "validation"
        head = f"gain {signed(self.gain)} {self.metric} on the {where} images, one seed"
        teacher, baseline = self.scores.get("teacher"), self.scores["baseline"]
        more = (
            f"a better teacher is needed first: {teacher:.2f} is not ahead of the baseline's {baseline:.2f}"
            if teacher is not None and teacher <= baseline
            else f"more seeds are needed: {self.more_seeds}"
        )
        if self.interval is None:
            return f"{head}: too few seeds; {more}"
        what = "may be" if self.interval.verdict == "no evidence" else "is not"
        return f"{head}: {self.interval.verdict}; it {what} the choice of images ({self.interval}); {more}"

    def __rich__(self) -> Group:
        table = Table("network", f"{self.metric}, validation", *([f"{self.metric}, test"] if self.test else []))
        for name in NETWORKS:
            if name in self.scores:
                tested = [f"{self.test[name]:.2f}" if name in self.test else ""] if self.test else []
                table.add_row(name, f"{self.scores[name]:.2f}", *tested)
        return Group(table, Text(f"the report: {self.report}"), Text(self.verdict, "bold"))


def run(recipe: config.Recipe | Path | str, *, overrides: Sequence[str] = (), anyway: bool = False) -> RunAll:
    """Examine a recipe, train teacher, baseline and distilled student, score them on the test split, and report.

    Everything goes to runs/NAME. What has ended with the same recipe is skipped and what has begun is resumed, so that
    the same command goes on after any interruption.

    Args:
        recipe: As `distill` takes it, or its file. Its teacher is trained first where it has no weights.
        overrides: `key=value` assignments, as `--set` takes them.
        anyway: Distill although the doctor finds that it would be worthless, or the teacher is behind the baseline.

    Returns:
        The runs with their scores, the report, and the verdict.

    Raises:
        AcamkdError: The recipe or its images cannot be used, or there is a reason not to distill.
    """
    file = "RECIPE" if isinstance(recipe, config.Recipe) else recipe
    recipe = config.as_recipe(recipe, overrides)
    if recipe.teacher is None or not recipe.losses:
        raise AcamkdError(f"the recipe {recipe.name} needs a `teacher` section and `losses` to distill")
    if not is_first_process():
        raise AcamkdError("`acamkd run` starts the processes of its trainings itself: start it once")
    notes = _Notes(recipe)
    if not all(notes.has_ended(name) for name in ("baseline", "distilled")):
        _check_data(recipe)
        _check_networks(recipe)
    trains_teacher = recipe.teacher.weights is None and not (":" in recipe.teacher.arch or recipe.teacher.is_headless)
    if recipe.teacher.is_headless:
        log.info("the teacher has no head: there is nothing to train of it and no score to compare with")
    if trains_teacher:
        notes.carry_out("teacher")
    if not notes.has_ended("distilled"):
        _examine(recipe, anyway)
    baseline = notes.carry_out("baseline")
    if not (notes.has_ended("distilled") or anyway):
        _check_lead(recipe, baseline)
    distilled = notes.carry_out("distilled")
    runs = {"baseline": baseline, "distilled": distilled}
    if trains_teacher:
        runs = {"teacher": open_run(notes.folder / "teacher"), **runs}
    metric = METRICS[recipe.task]
    scores = {"teacher": distilled.metrics["teacher"].get(metric)} | {
        name: each.metrics["student"][metric] for name, each in runs.items() if name != "teacher"
    }
    test = notes.test_scores(runs, metric) if recipe.data.test is not None else {}
    report = distilled.folder / REPORT
    if not report.is_file() or report.stat().st_mtime < baseline.weights.stat().st_mtime:
        report = write_report(distilled, baseline)
    known, tested = _defined(scores), _defined(test)
    for split, missing in (("val", {"baseline", "distilled"} - known.keys()), ("test", test.keys() - tested.keys())):
        if missing:
            raise AcamkdError(f"{metric} of {' and '.join(sorted(missing))} has no basis: check data.{split}")
    more_seeds = compare_command(recipe, file, overrides)
    return RunAll(distilled, metric, known, tested, report, notes.interval(baseline, distilled), more_seeds)


def _defined(scores: Mapping[str, float | None]) -> dict[str, float]:
    return {name: float(score) for name, score in scores.items() if score is not None and not math.isnan(score)}


def _check_data(recipe: config.Recipe) -> None:
    """Raise AcamkdError that counts and shows what is wrong with the images, before anything is trained."""
    found = examine_data(recipe)
    for name, split in found.splits.items():
        if split.problems:
            raise AcamkdError(
                f"the {name} images cannot be used, problems: {len(split.problems)}, such as {split.problems[0]}; "
                "acamkd doctor RECIPE --data lists them"
            )
    for warning in found.splits["test"].warnings if "test" in found.splits else ():  # trainings say those of the others
        log.warning("test data: %s", warning)


def _check_networks(recipe: config.Recipe) -> None:
    """Raise AcamkdError if a network or a loss cannot be built, before the teacher is trained."""
    for section in filter(None, (recipe.teacher, recipe.student)):
        for file in (section.weights, section.backbone_weights):
            if file in (None, "imagenet") or TORCHVISION.fullmatch(file):
                continue
            if not Path(file).is_file():
                raise AcamkdError(f"{section.title}: there is no file of weights {file}")
    with muted("acamkd.models"):
        teacher, student = of_recipe(recipe)
        dry_build(student, teacher, recipe.losses)


def _check_lead(recipe: config.Recipe, baseline: Run) -> None:
    """Raise AcamkdError if the teacher's own run is not ahead of the baseline."""
    section = teacher_section(recipe)
    if behind := describe_lead(recipe, score_of_run(recipe, section), baseline.folder):
        raise AcamkdError(f"{behind}: train the teacher longer or take a better one; --anyway distills from this one")


def _examine(recipe: config.Recipe, anyway: bool) -> None:
    """Say what the doctor finds; raise AcamkdError if the distillation would be worthless."""
    failed = []
    for finding in examine(recipe):
        log.log(logging.INFO if finding.status == "pass" else logging.WARNING, "doctor: %s: %s", finding.check,
                finding.text + (f" -> {finding.advice}" if finding.advice else ""))  # fmt: skip
        if finding.status == "fail":
            failed.append(f"{finding.check}: {finding.text}")
    if failed and not anyway:
        raise AcamkdError(
            f"the doctor found that distilling would be worthless: {failed[0]}; mend it and run the same command, "
            "or add --anyway; with other settings of the trainings also --set name=OTHER"
        )


class _Notes:
    """What has ended: a run is skipped where it ended with the recipe that is run now."""

    def __init__(self, recipe: config.Recipe) -> None:
        self.recipe = recipe
        self.folder = default_folder(recipe, NOTES).parent
        self._file = self.folder / NOTES
        content = json.loads(self._file.read_text(encoding="utf-8")) if self._file.is_file() else {}
        self._ended: dict[str, Any] = content.get("ended", {})
        self._test: dict[str, Any] = content.get("test", {})
        self._interval: dict[str, Any] = content.get("interval", {})
        # Without defaults, so that a key added by a later version repeats nothing.
        self._recipe = recipe.model_dump(mode="json", exclude=WITHOUT_EFFECT, exclude_defaults=True)

    def has_ended(self, name: str) -> bool:
        """Whether this run ended with this recipe, and its files are there."""
        folder = self.folder / name
        return self._ended.get(name) == self._recipe and _has_ended(folder, self.recipe, name)

    def carry_out(self, name: str) -> Run:
        """Do a training, or go on with it; skip it where it has ended.

        Raises:
            AcamkdError: The folder holds a run of another recipe, or one of other images that is still needed.
        """
        folder = self.folder / name
        if self.has_ended(name):
            found = open_run(folder)
            if not all(map(self.has_ended, ("baseline", "distilled"))):
                self._check_images(found)
            log.info("%s: it has ended, and is not repeated", folder)
            return found
        begun = Run(folder, self.recipe, "student").has_begun
        log.info("%s: %s", folder, "going on" if begun else f"training the {NETWORKS[name]}")
        try:
            done = self._train(name, begun)
        except OtherRunError as error:
            raise AcamkdError(f"{error.what}: --set name=OTHER runs everything in a folder of its own") from error
        self._ended[name] = self._recipe
        self._write()
        return done

    def _train(self, name: str, resume: bool) -> Run:
        if device_count(self.recipe.train) > 1:
            file = self.folder / RESOLVED
            write_text(file, config.dump(self.recipe))
            command, *options = COMMANDS[name]
            carry_out([command, str(file), *options, *(["--resume"] if resume else [])])
            return open_run(self.folder / name)
        if name == "distilled":
            return distill(self.recipe, resume=resume)
        return train(self.recipe, "teacher" if name == "teacher" else "student", resume=resume)

    @cached_property
    def _fingerprints(self) -> dict[str, str]:
        """Of the training and validation images as they are now."""
        source = data.resolve(self.recipe.data, self.recipe.task)
        splits: tuple[Literal["train"], Literal["val"]] = ("train", "val")
        images = {split: data.build(source, self.recipe.task, split, seed=0, augment=False) for split in splits}
        return {split: each.fingerprint() for split, each in images.items()}

    def _check_images(self, run: Run) -> None:
        """Raise AcamkdError if a run's images have changed, so that what is trained now could not be compared."""
        for split, content in self._fingerprints.items():
            if content != run.metrics["data"][split]:
                raise AcamkdError(
                    f"the {split} images, or their annotations, have changed since {run.folder} was trained: "
                    "--set name=OTHER trains everything on them, in a folder of its own"
                )

    def test_scores(self, runs: dict[str, Run], metric: str) -> dict[str, float | None]:
        """Scores on the test split, each measured once; None or NaN where it is undefined."""
        assert self.recipe.data.test is not None
        for name, each in runs.items():
            noted, of = self._test.get(name, {}), _basis(self.recipe.data.test, each)
            if noted.get("of") != of or noted["score"] is None:
                log.info("%s: scoring on the test images", each.folder)
                tested = each.recipe.data.model_copy(update={"test": self.recipe.data.test})
                seen = Run(each.folder, each.recipe.model_copy(update={"data": tested}), each.role)
                self._test[name] = {"of": of, "score": evaluate(seen, split="test")[metric]}
                self._write()
        return {name: self._test[name]["score"] for name in runs}

    def interval(self, baseline: Run, distilled: Run) -> ImageInterval | None:
        """Interval of the gain from the test images, or from the validation images without them; measured once."""
        source = self.recipe.data.test or self.recipe.data.val
        of = _basis(source, baseline, distilled)
        if self._interval.get("of") != of:
            seen = distilled.recipe.data.model_copy(update={"val": source})
            images = data.build(seen, self.recipe.task, "val", seed=0, augment=False)
            log.info("%s: comparing with the baseline, image by image", distilled.folder)
            found = image_interval(*collect([baseline.load(), distilled.load()], images, self.recipe))
            self._interval = {"of": of, "found": found and asdict(found)}
            self._write()
        noted = self._interval["found"]
        return ImageInterval(**noted) if noted else None

    def _write(self) -> None:
        write_json(self._file, {"ended": self._ended, "test": self._test, "interval": self._interval})


def _basis(split: config.Split, *runs: Run) -> dict[str, Any]:
    """What a score depends on: the images, and each network's weights by their file's size and time."""
    return {"split": split.model_dump(mode="json"), "weights": [list(stamp_of(run.weights)) for run in runs]}


def _has_ended(folder: Path, recipe: config.Recipe, name: str) -> bool:
    found = Run(folder, recipe, "teacher" if name == "teacher" else "student")
    return found.has_ended and found.weights.is_file()
