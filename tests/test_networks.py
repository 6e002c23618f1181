"""docs/research/networks.md says what is built."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from test_recipes import PAGE as PAPERS_PAGE
from test_recipes import rows

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/research/networks.md").read_text(encoding="utf-8")
TABLE = {row["network"]: row for row in rows(PAGE, "network")}
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(ROOT / "benchmarks")  # as for a script, which imports what lies beside it
    networks: Any = SimpleNamespace(**runpy.run_path(str(ROOT / "benchmarks/networks.py")))


def test_every_network_of_the_recipes_is_in_the_table() -> None:
    assert list(TABLE) == list(networks.networks())


@pytest.mark.parametrize("name", TABLE)
def test_parameters(name: str) -> None:
    task, section = networks.networks()[name]
    model = networks.build(section, task)
    assert networks.parameters(model) == TABLE[name]["million parameters"]
    if reported := TABLE[name]["reported"]:
        # MMDetection counts no frozen parameter, and has no rows for background.
        frozen = [p for part in ("conv1", "bn1", "layer1") for p in getattr(model.backbone, part).parameters()]
        background = 9 * (9 * 256 + 1) if section.arch == "retinanet" else 4 * (1024 + 1)
        counted = sum(p.numel() for p in model.net.parameters()) - sum(p.numel() for p in frozen) - background
        assert f"{counted / 1e6:.1f}" == reported.split(",")[0]


def test_operations_of_the_smallest_network() -> None:
    """By hand: a convolution of K x K x C_in to C_out at H x W is K K C_in C_out H W multiplications."""
    task, section = networks.networks()["pspnet, tu-resnet18"]
    model = networks.build(section, task)
    seen: list[int] = []
    for module in model.net.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(
                lambda conv, _, output: seen.append(conv.weight[0].numel() * output[0].numel())
            )
    cost = networks.forward_cost(model, networks.TESTED[task])
    assert cost == 2 * sum(seen)
    assert f"{cost / 2e9:.0f}" == TABLE["pspnet, tu-resnet18"]["GMAC"]


def test_operations_of_a_training_image() -> None:
    [row] = [row for row in rows(PAGE, "recipe") if row["recipe"] == "deeplabv3_mbv2"]
    cost = networks.training_cost(networks.recipes()["deeplabv3_mbv2"])
    assert {part: f"{each / 1e12:.2f}" for part, each in cost.items()} == {part: row[part] for part in cost}
    # On logits of 65 x 129: scores and values of 19 masks, made twice, and the products with the gradients of them.
    size, queried, masks = 64 * 128, 19 // 2, 19
    assert cost["losses"] > 2 * size**2 * (4 * queried + 3 * masks)


def test_hours_are_operations_times_images() -> None:
    for row in rows(PAGE, "recipe"):
        recipe = networks.recipes()[row["recipe"]]
        operations = sum(float(row[part]) for part in ("student", "teacher", "losses")) * 1e12
        hours = networks.images(recipe) * operations / networks.RATE / 8 / 3600
        assert hours == pytest.approx(float(row["hours"]), abs=0.09)  # each figure is rounded


def test_the_papers_page_gives_the_same_hours() -> None:
    papers = {row["recipe"].strip("`"): row["hours"] for row in rows(PAPERS_PAGE, "recipe")}
    assert papers == {row["recipe"]: row["hours"] for row in rows(PAGE, "recipe")}
