"""Write the answers and tables of README.md, and their figure, from trials.csv; needs neither images nor weights.

    python -m studies.generality.tables
    python -m studies.generality.tables --show "Does ACAM lead?"    # print each task's differences, seed by seed

docs/generate_results.py puts some of these tables into the documentation.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from scipy import stats
from studies.generality import plan
from studies.generality.answers import SMALLEST, Answer, Estimate, Found, Results, answers, estimate
from studies.generality.plan import IDEAS, KINDS, OTHERS, PRIMARY, RATIOS, TASKS, TEACHER, comparison

from acamkd.files import write_text
from acamkd.jobs.compare.statistics import holm, on_test, scores_of
from acamkd.jobs.compare.trials import NONE

REGIMES = ("few", "own", "all", "gap")
FIGURE = plan.HERE.parents[1] / "docs/research/results-generality.svg"
"""In the documentation, which cannot show a file outside."""


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", metavar="QUESTION", help="a question of the plan, or its beginning")
    question = parser.parse_args().show
    if question is None:
        write()
    else:
        show(question)


def write() -> None:
    """Write README.md and its figure."""
    results = current()
    rows = list(answers(results))
    if any(row.estimate for row in rows):
        forest(rows, results)
    write_text(plan.HERE / "README.md", page(results))


def page(results: Results) -> str:
    """README.md, with what stands between its markers made anew."""
    text = "\n\n".join(part for name, part in sections(results).items() if part and name != "summary")
    old = (plan.HERE / "README.md").read_text(encoding="utf-8")
    return re.sub(r"(?<=<!-- tables -->\n).*?(?=<!-- end -->)", lambda _: f"\n{text}\n\n", old, flags=re.DOTALL)


def show(question: str) -> None:
    """Print the differences behind an answer, seed by seed.

    Raises:
        SystemExit: The plan has no such question.
    """
    known = list(answers(current()))
    found = [row for row in known if row.question.lower().startswith(question.lower())]
    if not found:
        raise SystemExit("\n".join([f"the plan does not ask {question!r}, but:", *(row.question for row in known)]))
    for row in found:
        each = row.estimate
        print(f"{row.question} {row.compared}: {f'{each.text}, ' if each else ''}{row.text}")
        for task, differences in each.differences.items() if each else ():
            print(f"  {task:15} {differences.mean():+.2f} =", *(f"{x:+.2f}" for x in differences))


def current() -> Results:
    """The committed trials, with each method at the ratio of its search once all that is primary has ended."""
    found = {name: list(trials.values()) for name, trials in plan.stored().items()}
    searched = all(plan.is_searched(PRIMARY, kind) for kind in KINDS)
    seeds = plan.LAST_OF_FIVE
    ready = searched and all(plan.standing(task, name, seeds) for task in TASKS for name in plan.chosen(task, PRIMARY))
    return Results(found, searched=ready)


def sections(results: Results) -> dict[str, str]:
    """Every table by its name, in the order of README.md, which needs no summary; empty where there is no trial."""
    common = Results(results.found, searched=False)
    return {
        "summary": _summary(results),
        "gains": _gains(results),
        "answers": _answers(list(answers(results)), results),
        "figure": f"![Differences with 95 % intervals](../../docs/research/{FIGURE.name})" if results.found else "",
        "common": _methods(common) if results.searched else "",
        "methods": _methods(results),
        **{regime: _table(results, regime) for regime in REGIMES},
        "ideas": _ideas(common),
        "alike": _alike(common),
        "levels": _levels(),
        "search": _search(results.found),
        "by_image": _by_image(),
        "repetitions": _repetitions(results),
        "trials": _state(results.found),
        "batches": _batches(results.found),
    }


def _markdown(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], note: str = "") -> str:
    """A section with a table; nothing without rows."""
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    return f"### {title}\n\n" + (f"{note}\n\n" if note else "") + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _ratio(results: Results) -> str:
    return "each at the ratio of its search" if results.searched else "all at the ratio 2"


def _answers(rows: Sequence[Answer], results: Results) -> str:
    lines = [
        [row.question, row.compared, str(row.estimate.pairs), row.estimate.text, row.text]
        for row in rows
        if row.estimate
    ]
    open_ones = [row.question for row in rows if row.estimate is None]
    note = "Report split, after the last epoch, in `few` where no regime is named."
    if open_ones:
        note += f" No trial yet of: {'; '.join(open_ones)}"
    head = ("question", "difference", "pairs", "mean over tasks, 95 %", "answer")
    return _markdown(f"Answers, {_ratio(results)}", head, lines, note)


def _gains(results: Results) -> str:
    """The primary table: what every method adds to the baseline, by task and over tasks."""
    others = {kind: plan.best_other(kind) for kind in KINDS} if results.searched else {}
    columns = {f"`{method}`": dict.fromkeys(KINDS, method) for method in PRIMARY}
    if any(others.values()):
        columns[" or ".join(f"`{other}`" for other in others.values() if other)] = others

    teachers: dict[str, list[str]] = {}
    for row in plan.rows_of(plan.TEACHERS):
        if row["regime"] == "few":
            teachers.setdefault(row["task"], []).append(row["report"])
    lines = []
    for task in TASKS:
        gains = [results.over_kinds([task], each, NONE) for each in columns.values()]
        if any(gains):
            alone = results.report[comparison(task, "few")][NONE]
            metric = results.found[comparison(task, "few")][0]["metric"]
            most = max(each.mean for each in gains if each)
            cells = [_points(each, most, len(alone)) for each in gains]
            taught = ", ".join(teachers.get(task, "-"))
            lines.append([f"`{task}`, {metric}", taught, f"{_mean(alone):.2f}", str(len(alone)), *cells])
    if lines:
        over = [results.over_kinds(TASKS, each, NONE) for each in columns.values()]
        means = [each.text if each and each.tasks == len(lines) else "-" for each in over]
        lines.append([f"mean of {len(lines)} tasks", "", "", "", *means])
    note = f"Points over the baseline on the report split in `few`, {_ratio(results)}. Bold: the most of a task."
    return _markdown("What each method adds", ("task", "teacher", "`none`", "n", *columns), lines, note)


def _alike(results: Results) -> str:
    """What the methods of pyramids add with their levels as published, and with all levels alike."""
    tasks = KINDS["detection"]
    methods = [method for method in plan.OF_LEVELS if results.over(tasks, method + plan.LEVELS, NONE)]
    endings = {"as published": "", "alike": plan.LEVELS}
    lines = []
    for place in ([task] for task in tasks):
        for title, ending in endings.items():
            gains = [results.over(place, method + ending, NONE) for method in methods]
            if any(gains):
                cells = [f"{each.mean:+.2f} (n {each.pairs})" if each else "-" for each in gains]
                lines.append([f"`{place[0]}`, {title}", *cells])
    for title, ending in endings.items():
        over = [results.over(tasks, method + ending, NONE) for method in methods]
        if any(over):
            texts = [each.text if each and each.tasks == len(tasks) else "-" for each in over]
            lines.append([f"mean of {len(tasks)} tasks, {title}", *texts])
    note = (
        "Points over the baseline on the report split in `few`, all at the ratio 2. As published, every level of the "
        "pyramid has the same weight. Alike: the weight is halved with each coarser level."
    )
    head = ("task, levels", *(f"`{method}`" for method in methods))
    return _markdown("Levels of a pyramid, as published and alike", head, lines if methods else [], note)


def _summary(results: Results) -> str:
    """ACAM, and the best other method by validation, on every task."""
    lines = []
    for task in TASKS:
        ours, other = results.over([task], "acam", NONE), results.best_other(task)
        if ours and other:
            theirs = results.over_named([task], lambda _, other=other: (other, NONE))
            trials = results.found[comparison(task, "few")]
            alone = _mean(results.report[comparison(task, "few")][NONE])
            best = f"`{other}` {theirs.mean:+.1f}" if theirs else "-"
            metric = f"`{task}`, {trials[0]['metric']}"
            lines.append([metric, f"{alone:.1f}", f"{ours.mean:+.1f}", best, str(ours.pairs)])
    return _markdown("Summary", ("task", "baseline", "ACAM-KD", "best other by validation", "seeds"), lines)


def _points(each: Estimate | None, most: float, seeds: int) -> str:
    if each is None:
        return "-"
    fewer = f" (n {each.pairs})" if each.pairs < seeds else ""
    return (f"**{each.mean:+.2f}**" if each.mean == most else f"{each.mean:+.2f}") + fewer


def _methods(results: Results) -> str:
    """Every method against the baseline, and ACAM against it."""
    lines, costs = [], plan.costs()
    for method in dict.fromkeys(method for kind in KINDS for method in results.methods(kind)):
        tasks = [task for task in TASKS if method in results.methods(plan.kind_of(task))]
        gain, lead = results.over(tasks, method, NONE), results.over(tasks, "acam", method)
        validation = results.over(tasks, method, NONE, validation=True)
        steps = [costs[task, method] / costs[task, "fitnet"] for task in tasks if (task, method) in costs]
        if gain and validation:
            ahead = f"{gain.ahead} of {gain.tasks}"
            acam = lead.text if lead and method != "acam" else "-"
            cost = f"{np.mean(steps):.2f}" if steps else "-"
            lines.append([f"`{method}`", str(gain.pairs), gain.text, ahead, f"{validation.mean:+.2f}", acam, cost])
    head = (
        "method", "pairs", "against `none`, 95 %", "ahead in", "on validation", "`acam` against it",
        "time of a step, `fitnet` = 1",
    )  # fmt: skip
    return _markdown(f"Methods over tasks in `few`, {_ratio(results)}", head, lines)


def _table(results: Results, regime: str) -> str:
    """Score and paired difference of every method and task, on both splits."""
    lines = []
    for task in TASKS:
        name = comparison(task, regime)
        best = scores_of(on_test(results.found.get(name, []), best_epoch=True))
        primary = [results.name(task, method) for method in results.singles(plan.kind_of(task))]
        known = {method: results.differences(task, method, NONE, regime) for method in primary}
        tested = {method: each for method, each in known.items() if each is not None and len(each) > 1}
        p = dict(zip(tested, holm([float(stats.ttest_1samp(x, 0).pvalue) for x in tested.values()]), strict=True))
        report, validation = results.report.get(name, {}), results.validation.get(name, {})
        for method, scores in sorted(report.items(), key=lambda item: -_mean(item[1])):
            against = [results.differences(task, method, NONE, regime, validation=which) for which in (False, True)]
            gain = estimate({task: against[0]}) if method != NONE and against[0] is not None else None
            lines.append([
                f"`{task}`", f"`{method}`", str(len(scores)), _score(scores), gain.text if gain else "-",
                _p(p.get(method)), f"{_mean(best[method]):.2f}", _score(validation[method]),
                f"{against[1].mean():+.2f}" if gain and against[1] is not None else "-",
            ])  # fmt: skip
    head = (
        "task", "method", "n", "report", "against `none`", "p", "report, best epoch", "validation", "against `none`",
    )  # fmt: skip
    note = (
        "Means over n seeds, after the last epoch where nothing else is said. p is of a paired t test, with Holm's "
        "correction over the methods of the primary table."
    )
    return _markdown(f"`{regime}`", head, lines, note)


def _p(p: float | None) -> str:
    return "-" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def _mean(scores: Mapping[int, float]) -> float:
    return float(np.mean(list(scores.values())))


def _score(scores: Mapping[int, float]) -> str:
    spread = f" ± {np.std(list(scores.values()), ddof=1):.2f}" if len(scores) > 1 else ""
    return f"{_mean(scores):.2f}{spread}"


def _ideas(results: Results) -> str:
    """Each idea against ACAM on the cheap tasks."""
    lines = []
    for kind, task in plan.CHEAP.items():
        for idea in IDEAS[kind]:
            report, validation = (results.over([task], idea, "acam", validation=which) for which in (False, True))
            if report and validation:
                lines.append([f"`{idea}`", f"`{task}`", str(report.pairs), validation.text, report.text])
    return _markdown("Ideas against `acam`", ("idea", "task", "n", "validation, 95 %", "report, 95 %"), lines)


def _levels() -> str:
    """How hard each level of a pyramid pulls, in units of the finest one."""
    norms: dict[tuple[str, str], list[float]] = {}
    for row in plan.rows_of(plan.PULLS):
        norms.setdefault((row["task"], row["method"]), []).append(float(row["norm"]))
    lines = [
        [f"`{task}`", f"`{method}`", ", ".join(f"{norm / each[0]:.2g}" for norm in each)]
        for (task, method), each in norms.items()
    ]
    note = (
        "Norm of each level's gradient at the student's start, from the finest level to the coarsest, divided by that "
        "of the finest. Every level has the weight 1."
    )
    return _markdown("How hard each level of a pyramid pulls", ("task", "method", "levels"), lines, note)


def _search(found: Found) -> str:
    """The mean regret of each ratio, by method, and the ratio with the best mean."""
    lines = []
    for kind, tasks in KINDS.items():
        every = []
        for method in (*PRIMARY, *OTHERS[kind]):
            whole = []
            for task in tasks:
                (form,) = plan.forms(task, [method])
                trials = [trial for trial in found.get(comparison(task, "search"), []) if trial["method"] == form]
                scores = {trial["setting"]: trial["history"][-1] for trial in trials}
                if set(RATIOS) <= set(scores):
                    whole.append([max(scores.values()) - scores[ratio] for ratio in RATIOS])
            every += whole
            lines += _regret(kind, f"`{method}`", whole)
        lines += _regret(kind, "all of them", every)
    head = ("kind", "method", "searches", *(f"{ratio:g}" for ratio in RATIOS), "least regret")
    return _markdown("Search: mean regret of each ratio, validation images, seed 1000", head, lines)


def _regret(kind: str, name: str, regrets: Sequence[Sequence[float]]) -> list[list[str]]:
    if not regrets:
        return []
    means = np.mean(regrets, axis=0)
    return [[kind, name, str(len(regrets)), *(f"{x:.2f}" for x in means), f"{RATIOS[int(means.argmin())]:g}"]]


def _by_image() -> str:
    rows = plan.rows_of(plan.BY_IMAGE)
    note = (
        "Differences of each image's own score, averaged over seeds, with the weights that validated best. "
        "rho is Spearman's. Thirds are those of the images with the smallest to the largest share of foreground."
    )
    head = list(rows[0]) if rows else []
    return _markdown("By the share of foreground of an image", head, [list(row.values()) for row in rows], note)


def _repetitions(results: Results) -> str:
    """The report split's score of each repeated trial, twice."""
    lines = []
    for task, method, seed in plan.REPEATED:
        scores = [results.report.get(comparison(task, regime), {}).get(method, {}) for regime in ("few", "again")]
        if all(seed in each for each in scores):
            first, second = (each[seed] for each in scores)
            lines.append(
                [f"`{task}`", f"`{method}`", str(seed), f"{first:.4f}", f"{second:.4f}", f"{second - first:+.4f}"]
            )
    note = "Trainings from the start, without the cache, with the same teacher on the same machine; report split."
    return _markdown("Repetitions", ("task", "method", "seed", "first", "again", "difference"), lines, note)


def _state(found: Found) -> str:
    """Numbers and costs of trials, and of those that failed."""
    failed = plan.rows_of(plan.FAILURES)
    names = sorted({*found, *(row["comparison"] for row in failed)})
    lines, totals = [], np.zeros(4)
    for name in names:
        trials = found.get(name, [])
        wall, own = (np.array([trial[key] or 0.0 for trial in trials]) / 60 for key in ("wall_time", "cpu_time"))
        failures = sum(row["comparison"] == name for row in failed)
        totals += (len(trials), failures, wall.sum(), own.sum())
        medians = [f"{np.median(each):.1f}" if len(each) else "-" for each in (wall, own)]
        lines.append([f"`{name}`", str(len(trials)), str(failures), *medians])
    if lines:
        lines.append(["all", *(f"{x:.0f}" for x in totals[:2]), *(f"{x:.0f} in sum" for x in totals[2:])])
    missing = {(row["comparison"], row["trial"]) for row in failed if row["trial"] != TEACHER} - {
        (name, trial) for name, trials in plan.stored().items() for trial in trials
    }
    diverged = sum("not finite" in row["why"] for row in failed)
    note = (
        f"Minutes are the median of a trial. {len(failed)} attempts failed, {diverged} of them by a loss that was not "
        f"finite. {len(missing)} of these trials have not ended since."
    )
    return _markdown("Trials", ("comparison", "trials", "failed", "wall minutes", "processor minutes"), lines, note)


def _batches(found: Found) -> str:
    """How much of the plan is done."""
    known = {name: set(trials) for name, trials in plan.stored().items()}
    lines = []
    for batch, items in plan.batches():
        planned = {(item.comparison, name) for item in items for name in item.names}
        done = sum(name in known.get(group, ()) for group, name in planned)
        lines.append([batch, str(len(planned)), str(done), str(len(planned) - done)])
    note = "Trials that batches share, such as those of `none`, count in each."
    if not all(plan.is_searched(PRIMARY, kind) for kind in KINDS):
        note += " Batches with 0 trials are planned once earlier ones have ended."
    return _markdown("Batches", ("batch", "trials", "done", "left out so far"), lines, note) if found else ""


def forest(rows: Sequence[Answer], results: Results) -> None:
    """Draw the answers, and each task's difference of ACAM to the baseline and to the best other method."""
    left = [(row.question, row.estimate) for row in rows if row.estimate]
    right: list[tuple[str, Estimate, str]] = []
    for task in TASKS:
        pairs = ((results.name(task, "acam"), NONE), "C0"), (results.against_best_other(task), "C1")
        for pair, color in pairs:
            each = results.over_named([task], lambda _, pair=pair: pair)
            if pair and each:
                right.append((f"{task}: {pair[0]} - {pair[1]} (n {each.pairs})", each, color))
    height = 1.0 + 0.3 * max(len(left), len(right))
    style = {"svg.fonttype": "none", "svg.hashsalt": "forest", "font.size": 8}
    with plt.rc_context(style):
        image, axes = plt.subplots(1, 2, figsize=(11, height), layout="constrained")
        _draw(axes[0], "over tasks", [(f"{name} ({each.pairs})", each, "black") for name, each in left])
        _draw(axes[1], "by task", right)
        image.savefig(FIGURE, metadata={"Date": None})
        plt.close(image)


def _draw(axis: Any, title: str, lines: Sequence[tuple[str, Estimate, str]]) -> None:
    axis.axvspan(-SMALLEST, SMALLEST, color="0.92")
    axis.axvline(0, color="gray", linewidth=1)
    for place, (_, each, color) in enumerate(reversed(lines)):
        if each.low is not None:
            axis.plot([each.low, each.high], [place, place], color=color, linewidth=1.5)
        axis.plot(each.mean, place, "s", color=color, markersize=4)
    axis.set_yticks(range(len(lines)), [name for name, _, _ in reversed(lines)])
    axis.set_title(title)
    axis.set_xlabel(f"points (gray: below {SMALLEST})")


if __name__ == "__main__":
    main()
