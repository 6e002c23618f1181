"""Imports point down only.

Every module of the package stands in one layer of LAYERS. It may import from layers below its own and, within its own
package (`models`, `data`, `engine`, `losses`), from its neighbors; nothing else of its own layer, but for the few
edges of SAME_LAYER. Imports inside functions count; those under TYPE_CHECKING count but for UNSEEN.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src/acamkd"

LAYERS = {
    "cli": 6, "__main__": 6,
    "jobs": 5, "report": 5,
    "engine": 4,
    "distillation": 3,
    "models": 2, "data": 2,
    "losses": 1,
    "config": 0, "errors": 0, "mask_health": 0, "files": 0, "processes": 0, "progress": 0, "stopwatch": 0,
}  # fmt: skip

SAME_LAYER = {
    ("config", "errors"),
    ("files", "errors"),
    ("data", "models"),  # an image's target is a part of TaskModel's contract
    ("__main__", "cli"),
    ("jobs", "report"),  # a job ends with its page
}
"""(importer, imported): no other part knows one of its own layer."""

UNSEEN = {("losses", "models")}
"""Under TYPE_CHECKING: a HeadLoss knows TaskModel's contract, which its annotations name."""

CONTRACTS = {"acamkd.models.base"}
"""All that `data` and `losses` may know of `models`."""

Import = tuple[str, bool]
"""Dotted name, and whether it stands under TYPE_CHECKING."""


def imports(tree: ast.AST, typing_only: bool = False) -> Iterator[Import]:
    """Every import of a file; `from acamkd.data import checks` is given as acamkd.data.checks."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, typing_only) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where a name comes from"
            assert node.module is not None
            if (SOURCE.parent / node.module.replace(".", "/")).is_dir():  # of a package, each name may be a module
                yield from ((f"{node.module}.{alias.name}", typing_only) for alias in node.names)
            else:
                yield node.module, typing_only
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            yield from imports(node, typing_only=True)
        else:
            yield from imports(node, typing_only)


def part_of(dotted: str) -> str:
    """`acamkd.losses.base` -> `losses`."""
    return dotted.split(".")[1]


FILES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")
NAMES = [str(path.relative_to(SOURCE)) for path in FILES]


def read(path: Path) -> list[Import]:
    return list(imports(ast.parse(path.read_text(encoding="utf-8"))))


def own_part(path: Path) -> str:
    return path.relative_to(SOURCE).with_suffix("").parts[0]


def test_every_file_has_a_layer() -> None:
    assert {own_part(path) for path in FILES} <= set(LAYERS)


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_imports_point_down(path: Path) -> None:
    own = own_part(path)
    for dotted, typing_only in read(path):
        if not dotted.startswith("acamkd.") or dotted == "acamkd.__version__":
            continue
        other = part_of(dotted)
        edge = (own, other)
        below = LAYERS[other] < LAYERS[own]
        assert own == other or below or edge in SAME_LAYER or (typing_only and edge in UNSEEN), (
            f"{own} (layer {LAYERS[own]}) imports {dotted} (layer {LAYERS[other]})"
        )
        if own in ("data", "losses") and other == "models":
            assert dotted in CONTRACTS


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    modules = {"acamkd." + ".".join(path.relative_to(SOURCE).with_suffix("").parts): path for path in FILES}
    edges = {
        name: {dotted for dotted, typing_only in read(path) if dotted in modules and not typing_only} - {name}
        for name, path in modules.items()
    }
    done: set[str] = set()
    while remaining := set(edges) - done:
        free = {name for name in remaining if not edges[name] & remaining}
        assert free, f"{sorted(remaining)} import each other"
        done |= free


@pytest.mark.parametrize("path", [each for each in FILES if own_part(each) == "losses"], ids=lambda path: path.name)
def test_losses_need_torch_alone(path: Path) -> None:
    standard = {
        "abc", "collections", "contextlib", "dataclasses", "functools", "itertools", "logging", "math", "types",
        "typing", "__future__",
    }  # fmt: skip
    allowed = standard | {"torch", "acamkd"} | ({"torchvision"} if path.name == "crosskd.py" else set())
    assert {dotted.partition(".")[0] for dotted, _ in read(path)} <= allowed


def test_the_rule_sees_what_it_should() -> None:
    source = (
        "if TYPE_CHECKING:\n    from acamkd.models.base import Batch\n"
        "def f():\n    from acamkd import config\n    import acamkd.engine.module"
    )
    assert list(imports(ast.parse(source))) == [
        ("acamkd.models.base", True), ("acamkd.config", False), ("acamkd.engine.module", False),
    ]  # fmt: skip
