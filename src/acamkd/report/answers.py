"""What the first screen of a run's page answers: is the student better, is it luck, what did it cost, what next."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from acamkd.engine.cost import Cost, threads
from acamkd.engine.evidence import ImageInterval, Verdict, compare_command, signed
from acamkd.engine.metrics import METRICS
from acamkd.engine.runs import RECIPE, Run, shortened
from acamkd.models.base import TaskModel
from acamkd.report.units import digits, duration, percent

TEACHER, BASELINE, DISTILLED = "teacher", "baseline", "distilled"

UNKNOWN_SEEDS = "What another seed would change is unknown from one run."


@dataclass(frozen=True)
class Network:
    """One network of the report.

    Attributes:
        name: TEACHER, BASELINE or DISTILLED.
        architecture: Description of the network, from its section of the recipe.
        scores: Every metric by name, in percent.
        model: The network in eval mode on the CPU; None if its weights are missing.
        cost: Cost of one prediction; None if the weights are missing.
        seconds: What its training took; None if another run trained it.
    """

    name: str
    architecture: str
    scores: dict[str, Any]
    model: TaskModel | None
    cost: Cost | None
    seconds: float | None


@dataclass(frozen=True)
class Answer:
    """A question with its answer.

    Attributes:
        question: The question.
        text: The answer.
        verdict: The word that sums it up, if there is one.
        commands: What to type next.
    """

    question: str
    text: str
    verdict: Verdict | None = None
    commands: tuple[str, ...] = ()


def answers_of(
    run: Run,
    own: str,
    networks: Mapping[str, Network],
    interval: ImageInterval | None,
    images: int,
    unlike: Sequence[str] = (),
) -> list[Answer]:
    """The first screen's answers.

    Args:
        run: The run of the page.
        own: Name of its network.
        networks: Teacher, baseline and the run's own network, as far as known.
        interval: Of the difference to the baseline.
        images: Number of validation images.
        unlike: How the baseline was trained otherwise.
    """
    metric = METRICS[run.recipe.task]
    scores = {name: network.scores[metric] for name, network in networks.items()}
    what_it_cost = Answer("What did it cost?", _cost(own, networks))
    if own != DISTILLED:
        best = f"{percent(scores[own])} {metric} on {images} validation images."
        next_step = "Distill a student with it, or from it:" if own == TEACHER else "Distill the same student:"
        more = Answer("What next?", next_step, None, ("acamkd distill RECIPE",))
        return [Answer("How good is it?", best), what_it_cost, more]
    before, after = scores.get(BASELINE), scores[own]
    if before is None or after is None:
        teacher = scores[TEACHER]
        reached = f"The student reaches {percent(after)} {metric}"
        return [
            Answer(
                "Is the student better?",
                f"Unknown: no baseline was scored on these images. {reached}"
                f"{'' if teacher is None else f', the teacher {percent(teacher)}'}.",
            ),
            what_it_cost,
            Answer("What next?", "Train the baseline, and write this page again:", None, _train_baseline(run)),
        ]
    return [
        Answer("Is the student better?", _better(metric, before, after, scores[TEACHER], images) + _otherwise(unlike)),
        Answer("Is it luck?", _luck(interval), interval.verdict if interval else "too few seeds"),
        what_it_cost,
        _next_step(run, after < before),
    ]


def _better(metric: str, before: float, after: float, teacher: float | None, images: int) -> str:
    gained = after - before
    word = "Not to the hundredth" if abs(gained) < 0.005 else "Yes" if gained > 0 else "No"
    text = (
        f"{word}, on these {images} images: {percent(after)} {metric} against the baseline's {percent(before)}, "
        f"{signed(gained)} points."
    )
    if teacher is not None and teacher > before and 0 < gained <= teacher - before:
        return f"{text} That is {100 * gained / (teacher - before):.0f} % of the way to the teacher."
    if teacher is not None and teacher <= before:
        return f"{text} The teacher, {percent(teacher)}, is not ahead of the baseline."
    return text


def _otherwise(unlike: Sequence[str]) -> str:
    if not unlike:
        return ""
    return (
        f" The baseline was trained otherwise ({shortened(unlike, '; ')}): not all of the difference is the "
        "distillation's."
    )


def _train_baseline(run: Run) -> tuple[str, ...]:
    """The commands that train a missing baseline, and write the page with it."""
    out, number = run.folder.parent / BASELINE, 1
    while out.exists():  # it holds one that does not fit
        number += 1
        out = out.with_name(f"{BASELINE}-{number}")
    named = [] if number == 1 else ["--baseline", str(out)]
    train = ["acamkd", "train", str(run.folder / RECIPE), "--out", str(out)]
    return shlex.join(train), shlex.join(["acamkd", "report", str(run.folder), *named])


def _luck(interval: ImageInterval | None) -> str:
    if interval is None:
        return f"There are too few images for an interval. {UNKNOWN_SEEDS}"
    if interval.verdict == "no evidence":
        return f"It may be: other images of this kind could turn the sign ({interval}). {UNKNOWN_SEEDS}"
    return f"Not of these images ({interval}). {UNKNOWN_SEEDS}"


def _cost(own: str, networks: Mapping[str, Network]) -> str:
    network, said = networks[own], []
    if network.seconds is not None:
        taken = f"Training took {duration(network.seconds)} on the clock"
        alone = networks[BASELINE].seconds if own == DISTILLED and BASELINE in networks else None
        said.append(f"{taken}, the baseline's {duration(alone)}." if alone is not None else f"{taken}.")
    if network.cost is None:
        return " ".join(said)
    cost = network.cost
    speed = f"{digits(cost.milliseconds)} ms, {digits(1000 / cost.milliseconds)} images per second on {_threads()}"
    size = (cost.parameters, cost.gflops)
    baseline = networks[BASELINE].cost if own == DISTILLED and BASELINE in networks else None
    if baseline is not None and (baseline.parameters, baseline.gflops) == size:
        said.append(f"Inference costs what the baseline's does: {speed}, {digits(cost.megabytes)} MB.")
    else:
        said.append(f"Inference takes {speed}, and {digits(cost.megabytes)} MB.")
    teacher = networks[TEACHER].cost if own == DISTILLED else None
    if teacher is not None and (teacher.parameters, teacher.gflops) == size:
        said.append("The teacher's costs the same.")
    elif teacher is not None:
        said.append(
            f"The teacher takes {digits(teacher.milliseconds / cost.milliseconds)} times as long and has "
            f"{digits(teacher.parameters / cost.parameters)} times the parameters."
        )
    return " ".join(said)


def _next_step(run: Run, is_worse: bool) -> Answer:
    file = run.folder / RECIPE
    compare = compare_command(run.recipe)
    if is_worse:
        return Answer(
            "What next?", "Let the doctor look for reasons; seeds show whether it stays so:", None,
            (f"acamkd doctor {_quoted(file)}", compare),
        )  # fmt: skip
    return Answer(
        "What next?", "Train both with more seeds to know; export the student to use it:", None,
        (compare, f"acamkd export {_quoted(run.folder)}"),
    )  # fmt: skip


def _threads() -> str:
    return f"{threads()} CPU thread{'s' if threads() > 1 else ''}"


def _quoted(path: object) -> str:
    return shlex.quote(str(path))
