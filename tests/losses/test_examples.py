"""Every method's docstring: its example runs, and its paper has a link."""

from __future__ import annotations

import doctest

import pytest
import torch

from acamkd import losses
from acamkd.config import Model
from acamkd.distillation.distiller import Distiller
from acamkd.distillation.methods import METHODS, describe
from acamkd.models import build

NAMES = {"torch": torch, "Distiller": Distiller, "Model": Model, "build": build, **vars(losses)}


@pytest.mark.parametrize("name", METHODS)
def test_the_example_runs(name: str) -> None:
    method = METHODS[name]
    (found,) = doctest.DocTestFinder(recurse=False).find(method, method.__name__)
    assert len(found.examples) == 3
    found.globs.update({**NAMES, **found.globs})
    assert doctest.DocTestRunner(optionflags=doctest.REPORT_NDIFF).run(found).failed == 0


@pytest.mark.parametrize("name", METHODS)
def test_the_paper_and_its_code_are_linked(name: str) -> None:
    description = describe(name)
    assert description["link"].startswith("https://arxiv.org/abs/")
    assert description["code"].startswith("https://github.com/") or name == "acam"  # of which no code is public
