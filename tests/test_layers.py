"""Imports point down only.

Every module of the package stands in one layer of LAYERS. It may import from layers below its own and, within its own
package (`models`, `data`, `engine`, `losses`), from its neighbours; nothing else of its own layer, but for the few
edges of SAME_LAYER. Imports inside functions count; those under TYPE_CHECKING count but for UNSEEN.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src/acamkd"

LAYERS = {
    "cli": 5,
    "jobs": 4, "compare": 4, "doctor": 4, "inspection": 4, "calibrate": 4,
    "estimate": 4, "evaluate": 4, "export": 4, "predict": 4, "tokens": 4, "demo": 4, "pictures": 4, "report": 4,
    "engine": 3, "methods": 3, "runs": 3,
    "distiller": 2, "models": 2, "data": 2,
    "losses": 1, "features": 1, "graph": 1, "onnx_model": 1,
    "config": 0, "errors": 0, "collapse": 0, "files": 0,
}  # fmt: skip

SAME_LAYER = {
    ("config", "errors"),
    ("data", "models"),  # a picture's target is a part of TaskModel's contract
    ("distiller", "models"),  # TaskModel is what it distils
    ("engine", "runs"),  # the name of the checkpoint
}
"""(importer, imported): no other part knows one of its own layer, except that the jobs of layer 4 may call others."""

UNSEEN = {("losses", "models")}
"""Under TYPE_CHECKING: a HeadLoss knows TaskModel's contract, which its annotations name."""

CONTRACTS = {"acamkd.models.base"}
"""All that `data`, `distiller` and `losses` may know of `models`."""

Import = tuple[str, bool]
"""Dotted name, and whether it stands under TYPE_CHECKING."""


def imports(tree: ast.AST, typing_only: bool = False) -> Iterator[Import]:
    """Every import of a file, `from acamkd import config` given as acamkd.config."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, typing_only) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where a name comes from"
            assert node.module is not None
            if node.module == "acamkd":
                yield from ((f"acamkd.{alias.name}", typing_only) for alias in node.names)
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
        job = LAYERS[own] == LAYERS[other] == 4
        assert own == other or below or job or edge in SAME_LAYER or (typing_only and edge in UNSEEN), (
            f"{own} (layer {LAYERS[own]}) imports {dotted} (layer {LAYERS[other]})"
        )
        if own in ("data", "distiller", "losses") and other == "models":
            assert dotted in CONTRACTS


def test_jobs_do_not_import_each_other_in_a_circle() -> None:
    edges = {
        own_part(path): {part_of(name) for name, typing in read(path) if name.startswith("acamkd.") and not typing}
        for path in FILES
        if LAYERS[own_part(path)] == 4
    }
    done: set[str] = set()
    while remaining := set(edges) - done:
        free = {job for job in remaining if not (edges[job] - {job}) & remaining}
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
