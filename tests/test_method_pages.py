"""The pages under docs/methods and the example of docs/guides/add-a-method.md."""

from __future__ import annotations

import importlib
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml

from acamkd import config
from acamkd.distillation import methods
from acamkd.distillation.methods import METHODS, describe
from acamkd.jobs.train import distill
from tiny_recipes import write_recipe

DOCS = Path(__file__).parents[1] / "docs"


def test_pages_are_up_to_date() -> None:
    pages: dict[str, str] = runpy.run_path(str(DOCS / "generate_methods.py"))["pages"]()
    assert set(pages) == {"index.md", *(f"{name}.md" for name in METHODS)}
    stale = [file for file, text in pages.items() if (DOCS / "methods" / file).read_text(encoding="utf-8") != text]
    assert not stale, "write them anew: python docs/generate_methods.py"


def test_equations_name_code_that_exists() -> None:
    tables: dict[str, dict[str, Any]] = yaml.safe_load((DOCS / "equations.yaml").read_text(encoding="utf-8"))
    assert list(tables) == list(METHODS)
    for table in tables.values():
        for _, anchor in table["equations"]:
            module, *names = anchor.split(".")
            found: Any = importlib.import_module(f"acamkd.losses.{module}")
            for name in names:
                found = getattr(found, name)
            assert callable(found)


def test_the_example_method_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(
        r"```python\n(.*?)```", (DOCS / "guides/add-a-method.md").read_text(encoding="utf-8"), re.DOTALL
    )
    (tmp_path / "charbonnier.py").write_text(blocks[0], encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    name, _, class_name = blocks[1].strip(" ,\n").partition(": ")
    method = getattr(importlib.import_module("charbonnier"), class_name)
    monkeypatch.setattr(methods, "METHODS", {**METHODS, name.strip('"'): method})

    description = describe("charbonnier")
    assert description["authors"] == "Charbonnier et al."
    assert description["venue"] == "ICIP 1994"
    assert [option["name"] for option in description["options"]] == ["weight", "epsilon"]

    path = write_recipe(tmp_path, "segmentation")
    recipe = config.load(path, ["losses.0.name=charbonnier", "losses.0.preset=soft", "losses.0.weight=2"])
    distill(recipe, out=tmp_path / "run")
    history = (tmp_path / "run/history.csv").read_text(encoding="utf-8")
    assert "loss/segmentation_head.0/charbonnier/feature" in history.splitlines()[0].split(",")
