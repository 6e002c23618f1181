"""What the classes are called, and what the values of masks mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from acamkd.errors import AcamkdError
from acamkd.jobs.init.layout import Layout
from acamkd.models.base import VOID

Ask: TypeAlias = Callable[[str], str]
"""Puts a question and gives the answer."""

SHOWN = 12
"""Number of values that a message lists."""


@dataclass(frozen=True)
class Classes:
    """What the recipe's `data` says of the classes.

    Attributes:
        keys: `classes`, `ignore_index` and `mask_values`, as far as it needs them.
        reasons: Why, in words, by key.
        warnings: What else the masks may mean.
    """

    keys: Mapping[str, Any] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def name_classes(layout: Layout, given: Sequence[str] | None, ask: Ask | None) -> Classes:
    """Names of the classes, where the recipe needs them, and the meaning of the masks' values, where k is not class k.

    Args:
        layout: How the folder is read.
        given: Names that the user gives.
        ask: Puts a question where names are missing; without it that is an error.

    Raises:
        AcamkdError: Names are missing, or do not fit the masks' values.
    """
    names = tuple(given or layout.classes or ())
    if not names and layout.needs_names:
        names = _asked(layout, ask)
    if not names:
        return Classes()
    source = layout.names_from if layout.names_from and not given else ""
    reason = f"names from {source}" if source else "names as they were given"
    named = Classes({"classes": list(names)}, {"classes": reason})
    return _with_values(named, layout.values, names, source) if layout.values else named


def _asked(layout: Layout, ask: Ask | None) -> tuple[str, ...]:
    if layout.task == "detection":
        question = "The classes have numbers. Names of the classes from 0 on, with commas?"
        missing = "nothing says what the numbers of the classes mean: give the names, --classes cat,dog,..."
    else:
        held, order, more = COLORS, "from 0 on", BY_COLOR
        if layout.values:
            held, order = f"the values {_listed(layout.values)}", "in the order of the values"
            more = "one name less than there are values from 0 on makes the last value void"
        question = f"The masks hold {held}. Names of the classes {order}, with commas?"
        missing = (
            f"the masks hold {held}, and nothing says what they mean: give the names {order}, --classes "
            f"sky,road,...; {more}"
        )
    answer = ask(question) if ask is not None else ""
    names = tuple(name.strip() for name in answer.split(",") if name.strip())
    if not names:
        raise AcamkdError(missing)
    return names


COLORS = "colors, or 16 bits, which are not read"
BY_COLOR = "then say in the recipe which color is which class, data.mask_values: {'#ff0000': road, ...}"


def _with_values(named: Classes, held: Sequence[int], names: Sequence[str], source: str) -> Classes:
    """Add what the values of masks mean: by default value k is class k, and 255 void."""
    last, ids = len(names), [value for value in held if value != VOID]
    if list(held) == list(range(last + 1)):
        reason = "a value more in the masks than there are names: void"
        return Classes({**named.keys, "ignore_index": last}, {**named.reasons, "ignore_index": reason})
    if all(value < last for value in ids) and not _one_is_left(held, ids, names):
        absent = [(value, name) for value, name in enumerate(names) if value not in ids]
        if VOID not in held or len(absent) != 1:
            return named
        ((value, name),) = absent
        doubt = (
            f"no mask that was looked at holds {value}, which is {name}, and {VOID} is read as void: if it is a "
            f"class, write data.mask_values: {_written(held, names)}"
        )
        return Classes(named.keys, named.reasons, (doubt,))
    for values in (ids, held):  # 255 is void as long as there are names enough without it
        if len(values) == last:
            reason = "the masks hold no 0, 1, 2, ...: a name for each value, in their order"
            void = "; 255 is void" if values is ids and VOID in held else ""
            return Classes(
                {**named.keys, "mask_values": dict(zip(values, names, strict=True))},
                {**named.reasons, "mask_values": reason + void},
            )
    raise AcamkdError(
        f"the masks hold the values {_listed(held)}, but there {'is' if last == 1 else 'are'} {last} "
        f"name{'s' if last > 1 else ''}{f' in {source}' if source else ''} ({', '.join(names[:SHOWN])}): give "
        "--classes one name for each value, in their order; for values from 0 on, one name less makes the last void"
    )


def _one_is_left(held: Sequence[int], ids: Sequence[int], names: Sequence[str]) -> bool:
    """Whether all but one class would be void, as of masks that hold 0 and 255: nothing could be learned."""
    return VOID in held and len(ids) < 2 <= len(names)


def _written(values: Sequence[int], names: Sequence[str]) -> str:
    return "{" + ", ".join(f"{value}: {name}" for value, name in zip(values, names, strict=True)) + "}"


def _listed(values: Sequence[int]) -> str:
    """`0 to 5 and 255`, or one by one."""
    ids = [value for value in values if value != VOID]
    if len(ids) > 2 and list(ids) == list(range(len(ids))):
        return f"0 to {ids[-1]}" + (f" and {VOID}" if VOID in values else "")
    listed = ", ".join(map(str, values[:SHOWN]))
    return f"{listed} and {len(values) - SHOWN} more" if len(values) > SHOWN else listed
