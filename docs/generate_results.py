"""Regenerate the tables and figures of the pages from the trials in studies/: python docs/generate_results.py.

The text between `<!-- trials: NAME METHOD ... -->` and `<!-- end -->` is replaced by the table of these methods, or of
all methods if none is named. NAME is a comparison in one of studies/*/trials.csv; `cells` means the same as `trials`.
`<!-- ablations: NAME NAME -->` puts the paper's ablations beside those of the comparisons. `controls` lists ACAM's
controls, seed by seed, and `summary` the main result of each comparison. Figures lie beside their page.
`<!-- generality: NAME -->` is a table of studies/generality/tables.py, which draws its figure.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any, TypeAlias

from PIL import Image

from acamkd.jobs.compare import tables, trials_csv
from acamkd.jobs.compare.statistics import Paired, Row, paired, scores_of, summarize
from acamkd.jobs.compare.trials import NONE, TUNING_SEED

HERE = Path(__file__).parent
STUDIES = HERE.parent / "studies"
BLOCK = re.compile(r"(<!-- (?:trials|cells): (\w+)(.*?) -->\n).*?(<!-- end -->)", re.DOTALL)
AGAINST_DEFAULT = re.compile(r"(<!-- (ablations|controls|summary): (.*?) -->\n).*?(<!-- end -->)", re.DOTALL)

GENERALITY = re.compile(r"(<!-- generality: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

COLORS = 64
"""Of a figure's palette."""

DEFAULT = "acam"
ABLATIONS = (
    ("masks", "spatial, the default", "acam", 40.9),
    ("", "channel", "acam-channel", 40.4),
    ("", "both, the paper's choice", "acam-both", 41.2),
    ("query", "the teacher, the default", "acam", 41.2),
    ("", "the student", "acam-student", 41.0),
    ("masks made by", "none: masks of ones, in the paper the baseline", "acam-uniform", 37.4),
    ("", "the teacher, fixed before training", "acam-fixed", 39.8),
    ("", "the teacher, adaptive", "acam-teacher", 39.9),
    ("", "student and teacher, the default", "acam", 41.2),
)
"""Varied part, variant, method name in the recipes, and mAP of a RetinaNet on COCO in the paper's tables 8 to 10."""

CONTROLS = (
    ("no masks: the same distance", "pkd"),
    ("... twice as strong", "pkd-16"),
    ("masks of ones, of both kinds", "acam-uniform"),
    ("masks fixed before training, nearly constant in an image", "acam-fixed"),
    ("untrained masks, soft", "acam-random"),
    ("untrained masks, as saturated as learned ones", "acam-hard-random"),
    ("... twice as strong", "acam-hard-random-16"),
    ("learned masks, shifted by half the image's height", "acam-shifted"),
    ("learned masks whose strength stays constant as they saturate", "acam-strength-normalized"),
    ("learned masks, each applied to another image", "acam-shuffled"),
    ("masks that see the teacher alone; the student's task loss still trains them", "acam-teacher"),
    ("learned masks without the diversity term", "acam-no-diversity"),
    ("learned masks with the difference to the teacher as input", "acam-difference"),
    ("masks trained as published, by the distillation loss itself", "acam-joint"),
)
"""Replacement of ACAM's masks, and method name in the recipes."""

Trials: TypeAlias = list[Mapping[str, Any]]


def pages() -> dict[str, str]:
    """Text of every page with such blocks, by its path from this folder."""
    kinds = BLOCK, AGAINST_DEFAULT, GENERALITY
    found = {page: text for page, text in _texts() if any(kind.search(text) for kind in kinds)}
    return {
        Path(os.path.relpath(page, HERE)).as_posix(): GENERALITY.sub(
            _of_generality, AGAINST_DEFAULT.sub(_against, BLOCK.sub(_block(page), text))
        )
        for page, text in found.items()
    }


def figures() -> Iterator[tuple[Path, list[Row], Trials]]:
    """Files of the figures, with the rows and trials that they show."""
    for page, text in _texts():
        for match in BLOCK.finditer(text):
            trials, _ = _trials(match[2])
            yield _figure(page, match), _rows(trials, match[3]), trials


def _texts() -> Iterator[tuple[Path, str]]:
    pages = HERE.parent / "README.md", *sorted(HERE.rglob("*.md"))
    return ((page, page.read_text(encoding="utf-8")) for page in pages)


def _trials(name: str) -> tuple[Trials, Trials]:
    """The finished trials of a comparison, and its tuning trials."""
    found = [trial for _, trial in sorted(_comparisons()[name].items())]
    return (
        [trial for trial in found if trial["seed"] < TUNING_SEED],
        [trial for trial in found if trial["seed"] >= TUNING_SEED],
    )


@cache
def _comparisons() -> dict[str, dict[str, dict[str, Any]]]:
    """Comparison -> trial -> content, for all studies."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for file in sorted(STUDIES.glob(f"*/{trials_csv.FILE}")):
        of_study = dict(trials_csv.comparisons(file))
        if twice := found.keys() & of_study.keys():
            raise SystemExit(f"{file}: another study has a comparison of the name {', '.join(sorted(twice))}, too")
        found |= of_study
    return found


def _rows(trials: Trials, methods: str) -> list[Row]:
    """Rows of some methods; p and the best competing method refer to the whole comparison."""
    rows = summarize(trials)
    wanted = set(methods.split()) or {row.method for row in rows}
    if missing := wanted - {row.method for row in rows}:
        raise SystemExit(f"there is no trial of {', '.join(sorted(missing))}")
    return [row for row in rows if row.method in wanted]


def _figure(page: Path, block: re.Match[str]) -> Path:
    """File of a block's figure; the second block of the same comparison on a page gets NAME-2, and so on."""
    name = block[2]
    number = sum(other[2] == name for other in BLOCK.finditer(block.string, endpos=block.end()))
    return page.with_name(f"{page.stem}-{name}{f'-{number}' if number > 1 else ''}.png")


def _block(page: Path) -> Callable[[re.Match[str]], str]:
    def write(match: re.Match[str]) -> str:
        begin, name, methods, end = match.groups()
        trials, tuning = _trials(name)
        rows = _rows(trials, methods)
        if methods:  # otherwise show all tuned methods, also those not in the table
            tuning = [trial for trial in tuning if trial["method"] in {row.method for row in rows}]
        text = tables.markdown(rows, trials, tuning)
        text = text.replace("\n## ", "\n#### ")
        return f"{begin}\n{text}\n![Differences and curves]({_figure(page, match).name})\n\n{end}"

    return write


def _of_generality(match: re.Match[str]) -> str:
    """The table without its heading."""
    begin, name, end = match.groups()
    _, _, table = _generality()[name].partition("\n\n")
    return f"{begin}\n{table}\n\n{end}"


@cache
def _generality() -> dict[str, str]:
    """The tables of the generality study."""
    sys.path.insert(0, str(HERE.parent))
    from studies.generality import tables as of_generality

    return of_generality.sections(of_generality.current())


def _against(match: re.Match[str]) -> str:
    """Table of comparisons with the default, on the seeds that both have."""
    begin, kind, names, end = match.groups()
    comparisons = {name: _trials(name)[0] for name in names.split()}
    heads = [f"`{name}`, {trials[0]['metric']}" for name, trials in comparisons.items()]
    if kind == "ablations":
        lines = [f"| | | the paper, mAP | {' | '.join(heads)} |", "|---" * (3 + len(heads)) + "|"]
        for what, how, method, published in ABLATIONS:
            figures = " | ".join(_against_default(trials, method) for trials in comparisons.values())
            lines.append(f"| {what} | {how} (`{method}`) | {published} | {figures} |")
    elif kind == "summary":
        lines = [
            "| | baseline | ACAM-KD | gain | best competing method | ACAM-KD over it | teacher |",
            "|---" * 7 + "|",
        ]
        lines += [f"| {head} | {_summary(trials)} |" for head, trials in zip(heads, comparisons.values(), strict=True)]
    else:
        lines = [f"| against `{DEFAULT}` | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
        for what, method in CONTROLS:
            figures = " | ".join(_seed_by_seed(trials, method) for trials in comparisons.values())
            lines.append(f"| {what} (`{method}`) | {figures} |")
    return "\n".join([begin, *lines, "", end])


def _summary(trials: Trials) -> str:
    """Main result of one comparison; competing methods have at least three seeds and are no variants."""
    rows = {row.method: row for row in summarize(trials)}
    ours, alone = rows[DEFAULT], rows[NONE]
    others = [row for name, row in rows.items() if "-" not in name and name not in (DEFAULT, NONE) and row.n > 2]
    best_other = max(others, key=lambda row: row.mean)
    scores = scores_of(trials)
    over_best_other = paired(scores[DEFAULT], scores[best_other.method], best_other.method)
    assert ours.gain is not None
    return " | ".join([
        f"{alone.mean:.2f}", f"{ours.mean:.2f}, n {ours.n}", f"{_difference(ours.gain)}, p {ours.p_text}",
        f"`{best_other.method}` {best_other.mean:.2f}, n {best_other.n}", _difference(over_best_other),
        f"{trials[0]['teacher'][trials[0]['metric']]:.2f}",
    ])  # fmt: skip


def _difference(found: Paired) -> str:
    return f"{found.mean:+.2f}" + (f" [{found.low:+.2f}, {found.high:+.2f}]" if found.n > 2 else "")


def _seed_by_seed(trials: Trials, method: str) -> str:
    scores, usual = (scores_of(trials).get(each, {}) for each in (method, DEFAULT))
    each = [f"{scores[seed] - usual[seed]:+.1f}" for seed in sorted(scores.keys() & usual.keys())]
    if len(each) < 2:
        return ", ".join(each) or tables.DASH
    difference = paired(scores, usual, DEFAULT)
    p = "<0.01" if difference.p < 0.005 else f"{difference.p:.2f}"
    return f"{', '.join(each)}: {difference.mean:+.1f}, p {p}"


def _against_default(trials: Trials, method: str) -> str:
    scores, usual = (scores_of(trials).get(each, {}) for each in (method, DEFAULT))
    if method == DEFAULT:
        return f"{mean(scores.values()):.2f}, n {len(scores)}"
    difference = paired(scores, usual, DEFAULT)
    return f"{_difference(difference)}, n {difference.n}"


def main() -> None:
    """Write pages and figures."""
    for page, text in pages().items():
        (HERE / page).write_text(text, encoding="utf-8")
    for file, rows, trials in figures():
        tables.figure(file, rows, trials, trials[0]["metric"])
        with Image.open(file) as drawn:  # a palette is a third of the size, and looks the same
            palette = drawn.convert("RGB").quantize(COLORS, dither=Image.Dither.NONE)
        palette.save(file, optimize=True)


if __name__ == "__main__":
    main()
