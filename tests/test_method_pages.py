"""The pages under docs/methods and the example of docs/guides/add-a-method.md."""

from __future__ import annotations

import doctest
import importlib
import re
import runpy
from pathlib import Path

import pytest
import yaml

from acamkd import config
from acamkd.distillation import methods
from acamkd.distillation.methods import METHODS, describe
from acamkd.jobs.train import distill
from tiny_recipes import write_recipe

DOCS = Path(__file__).parents[1] / "docs"


def test_pages_are_up_to_date() -> None:
    generator = runpy.run_path(str(DOCS / "generate_methods.py"))
    pages: dict[str, str] = generator["pages"]()
    assert set(pages) == {"index.md", *(f"{name}.md" for name in METHODS)}
    stale = [file for file, text in pages.items() if (DOCS / "methods" / file).read_text(encoding="utf-8") != text]
    if generator["DESCRIPTIONS"].read_text(encoding="utf-8") != generator["descriptions"]():
        stale.append(generator["DESCRIPTIONS"].name)
    assert not stale, "write them anew: python docs/generate_methods.py"


@pytest.mark.parametrize("name", METHODS)
def test_every_equation_links_to_a_file_that_exists(name: str) -> None:
    anchors: list[list[str]] = runpy.run_path(str(DOCS / "generate_methods.py"))["anchors"](METHODS[name])
    assert anchors
    for _, link in anchors:
        assert (DOCS / "methods" / link.partition("(")[2].rstrip(")")).is_file()


def test_notes_are_of_methods() -> None:
    assert yaml.safe_load((DOCS / "methods/notes.yaml").read_text(encoding="utf-8")).keys() <= METHODS.keys()


def test_the_example_method_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(
        r"```python\n(.*?)```", (DOCS / "guides/add-a-method.md").read_text(encoding="utf-8"), re.DOTALL
    )
    (tmp_path / "charbonnier.py").write_text(blocks[0], encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    assert blocks[1].strip() == "from acamkd.losses.charbonnier import Charbonnier as Charbonnier"
    method = importlib.import_module("charbonnier").Charbonnier
    monkeypatch.setattr(methods, "METHODS", {**METHODS, "charbonnier": method})
    failed, run = doctest.testmod(importlib.import_module("charbonnier"))
    assert (failed, run) == (0, 3)

    description = describe("charbonnier")
    assert description["authors"] == "Charbonnier et al."
    assert description["venue"] == "ICIP 1994"
    assert description["link"].startswith("https://")
    assert [option["name"] for option in description["options"]] == ["weight", "epsilon"]

    path = write_recipe(tmp_path, "segmentation")
    recipe = config.load(path, ["losses.0.name=charbonnier", "losses.0.preset=soft", "losses.0.weight=2"])
    distill(recipe, out=tmp_path / "run")
    history = (tmp_path / "run/history.csv").read_text(encoding="utf-8")
    assert "loss/segmentation_head.0/charbonnier/feature" in history.splitlines()[0].split(",")
