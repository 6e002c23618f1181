"""The page docs/reference/recipe.md."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from acamkd import config
from acamkd.config.data import Section

DOCS = Path(__file__).parents[1] / "docs"
TEXT = (DOCS / "reference/recipe.md").read_text(encoding="utf-8")


def test_the_page_is_up_to_date() -> None:
    page = runpy.run_path(str(DOCS / "generate_recipe.py"))["page"]
    assert page() == TEXT, "write it anew: python docs/generate_recipe.py"


@pytest.mark.parametrize("section", [each for each in vars(config).values() if getattr(each, "model_fields", None)])
def test_every_key_of_every_section_is_there(section: type[Section]) -> None:
    tables = [re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) for table in TEXT.split("\n## ")]
    assert list(section.model_fields) in tables
