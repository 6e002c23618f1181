"""Finished trials as one table, `trials.csv`: a row per training, small enough to be committed with a recipe.

A row holds a trial's scores, hashes and environment, as in its JSON. It omits what no table shows: it keeps the masks'
statistics at the first, middle and last epoch, the teacher's hash and metric, and the losses' non-default options.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from acamkd import config
from acamkd.engine.runs import read_json
from acamkd.errors import AcamkdError
from acamkd.files import check_writable, write_text

Content: TypeAlias = dict[str, Any]
"""Content of a finished trial, as in its JSON."""

Curve: TypeAlias = Sequence[float | None]
"""A value after every epoch; None where it was not measured."""

FILE = "trials.csv"
COMPARISON = "comparison"
TRIAL = "trial"
"""Column with the names of the trials' JSON files, without the suffix."""

TEXTS = ("method", "option", "recipe", "metric", "machine", "inherited")
NUMBERS = ("setting", "seed", "test_of_best_epoch", "wall_time", "cpu_time", "processes")
SECTIONS = ("data", "teacher", "final", "test", "versions", "masks")
"""Mappings; each entry has its own column, SECTION/KEY."""
ORDER = (
    "method", "setting", "option", "seed", "metric", "epochs", "history", "wall_time", "cpu_time", "recipe",
    "inherited", "data", "teacher", "final", "test", "test_of_best_epoch", "losses", "masks", "machine", "processes",
    "versions",
)  # fmt: skip


def stored(results: Path) -> dict[str, Content]:
    """Trials in a results folder's table, by name.

    The table is the folder's own trials.csv, or that of the parent folder. If it has a column `comparison`, the
    folder's trials are the rows with its name.
    """
    file = _file_of(results)
    return comparisons(file).get(results.resolve().name, {}) if file.is_file() else {}


def comparisons(file: Path) -> Mapping[str, dict[str, Content]]:
    """Comparison -> trial -> content. A table without the column `comparison` holds one, named after its folder.

    Raises:
        AcamkdError: The file is not a table of trials.
    """
    return _read(file.resolve(), file.stat().st_mtime_ns)


def check_exportable(results: Path) -> None:
    """Raise AcamkdError if `export` could not write its table."""
    check_writable(_file_of(results).parent, advice="--results DIR writes elsewhere")


def export(results: Path) -> Path:
    """Add every finished trial of a results folder to its table.

    Returns:
        Path of the table: the folder's own, or the parent folder's if it holds this comparison.

    Raises:
        AcamkdError: The folder holds no trial.
    """
    file, name = _file_of(results), results.resolve().name
    found = dict(comparisons(file)) if file.is_file() else {}
    single = {path.stem: read_json(path) for path in results.glob("*-seed*.json")}
    if not single and name not in found:
        raise AcamkdError(f"{results} holds no finished trial: run `acamkd compare` first")
    write(file, {**found, name: {**found.get(name, {}), **single}})
    return file


def write(file: Path, found: Mapping[str, Mapping[str, Content]]) -> None:
    """Write comparison -> trial -> content, rows sorted by both names."""
    apart = list(found) != [file.resolve().parent.name]
    rows = [
        {**({COMPARISON: comparison} if apart else {}), TRIAL: trial, **_to_row(found[comparison][trial])}
        for comparison in sorted(found)
        for trial in sorted(found[comparison])
    ]
    lines = io.StringIO()
    writer = csv.DictWriter(lines, _merged(map(list, rows)), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(file, lines.getvalue())


def _file_of(results: Path) -> Path:
    own, around = results / FILE, results.resolve().parent / FILE
    shared = not own.is_file() and around.is_file() and results.resolve().name in comparisons(around)
    return around if shared else own


@lru_cache
def _read(file: Path, _changed: int) -> Mapping[str, dict[str, Content]]:
    found: dict[str, dict[str, Content]] = {}
    with file.open(newline="", encoding="utf-8") as lines:
        reader = csv.DictReader(lines)
        missing = {TRIAL, "method", "seed", "recipe", "metric", "epochs", "history"} - set(reader.fieldnames or ())
        if missing:
            raise AcamkdError(
                f"{file} is no table of trials: it lacks the columns {', '.join(sorted(missing))}; "
                "`acamkd compare --csv` writes one"
            )
        for number, row in enumerate(reader, start=2):
            try:
                content = _of_row(row)
            # A row that is too short has None in it, one that is too long under it.
            except (ValueError, TypeError, AttributeError, IndexError, yaml.YAMLError) as error:
                raise AcamkdError(f"{file}, row {number} ({row[TRIAL]}) cannot be read: {error}") from error
            found.setdefault(row.get(COMPARISON) or file.parent.name, {})[row[TRIAL]] = content
    return found


def _to_row(trial: Content) -> dict[str, str]:
    """Cells of a row as text, with numbers as in JSON, so that reading restores every digit."""
    metric, cells = trial["metric"], dict[str, str]()
    for name in ORDER:
        value = trial.get(name)
        if name == "epochs":
            cells[name] = str(len(trial["history"]))
        elif name == "history":
            cells[name] = _curve_to_text(trial["history"])
        elif name == "losses":
            cells[name] = _losses_to_text(trial["losses"])
        elif name in SECTIONS:
            for key, entry in (value or {}).items():
                if name != "teacher" or key in ("sha256", metric):
                    cells[f"{name}/{key}"] = _to_text(name, key, entry)
        else:
            cells[name] = "" if value is None else value if name in TEXTS else json.dumps(value)
    return cells


def _of_row(row: Mapping[str, str]) -> Content:
    epochs = int(row["epochs"])
    trial: Content = {name: row.get(name) or None for name in TEXTS}
    trial |= {name: json.loads(row[name]) if row.get(name) else None for name in NUMBERS}
    trial["history"] = _curve_of(row["history"], epochs)
    trial["losses"] = yaml.safe_load(row.get("losses") or "[]")
    for section in SECTIONS:
        given = {column.partition("/")[2]: text for column, text in row.items() if column.startswith(f"{section}/")}
        trial[section] = {key: _of_text(section, key, text, epochs) for key, text in given.items() if text}
    trial["teacher"] = trial["teacher"] or None  # the baseline has no teacher
    return dict(config.respelled(trial))


def _to_text(section: str, key: str, value: Any) -> str:
    if section == "masks":
        return _curve_to_text(_snapshots(value))
    return str(value) if _is_text(section, key) else json.dumps(value)


def _of_text(section: str, key: str, text: str, epochs: int) -> Any:
    if section == "masks":
        return _curve_of(text, epochs)
    return text if _is_text(section, key) else json.loads(text)


def _is_text(section: str, key: str) -> bool:
    return section in ("data", "versions") or key == "sha256"


def _losses_to_text(losses: Sequence[Mapping[str, Any]]) -> str:
    """Losses in the form of a recipe, in one line."""
    defaults = {name: field.default for name, field in config.Loss.model_fields.items()}
    given = [{key: x for key, x in loss.items() if key not in defaults or x != defaults[key]} for loss in losses]
    text: str = yaml.safe_dump(given, default_flow_style=True, sort_keys=False, width=float("inf"))
    return text.strip() if given else ""


UNKNOWN = "null"
"""Text of a curve without any value, as opposed to a missing curve."""


def _curve_to_text(curve: Curve) -> str:
    """`16:33.2297 32:43.4427`: epochs, counted from 1, with the value after each."""
    known = (f"{epoch}:{json.dumps(value)}" for epoch, value in enumerate(curve, start=1) if value is not None)
    return " ".join(known) or UNKNOWN


def _curve_of(text: str, epochs: int) -> list[float | None]:
    curve: list[float | None] = [None] * epochs
    for point in text.split() if text != UNKNOWN else ():
        epoch, _, value = point.partition(":")
        curve[int(epoch) - 1] = json.loads(value)
    return curve


def _snapshots(curve: Curve) -> Curve:
    """The first, middle and last known value of a curve, which ends where the loss stopped."""
    known = [epoch for epoch, value in enumerate(curve) if value is not None and value == value]
    end = known[-1] + 1 if known else 0
    kept = {0, end // 2, end - 1}
    return [value if epoch in kept else None for epoch, value in enumerate(curve)]


def _merged(rows: Iterable[Sequence[str]]) -> list[str]:
    """Merge the rows' columns; each comes after those that precede it in its row."""
    columns: list[str] = []
    for row in rows:
        place = 0
        for column in row:
            if column not in columns:
                columns.insert(place, column)
            place = columns.index(column) + 1
    return columns
