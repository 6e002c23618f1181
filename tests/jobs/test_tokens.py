from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from acamkd import cli, config, models
from acamkd.distillation.build import build_distiller
from acamkd.engine.metrics import METRICS
from acamkd.errors import AcamkdError
from acamkd.jobs import tokens
from acamkd.jobs.setup import build_network
from acamkd.jobs.tokens import learn_tokens
from acamkd.jobs.train import distill
from acamkd.losses.maskd import TokenMasks
from acamkd.models.base import Task, TaskModel
from tiny_recipes import MODELS, PAIRS, write_recipe

MASKD = ["losses.0.name=maskd", "losses.0.weighted=false", "losses.0.num_tokens=4"]
LEVELS = [f"backbone:{level}" for level in ("0", "1", "2", "p6", "p7")]

CASES: dict[str, tuple[Task, list[str], set[str]]] = {
    "maskd": ("segmentation", MASKD, {"segmentation_head.0/tokens"}),
    "maskd_weighted": (
        "detection",
        ["losses.0.name=maskd", "losses.0.align=true"],
        {f"{level}/{name}" for level in LEVELS for name in (
            "tokens", "weighting.0.weight", "weighting.0.bias", "weighting.2.weight", "weighting.2.bias")},
    ),
    "freekd": ("detection", ["losses.0.name=freekd"], {f"{level}/tokens" for level in LEVELS}),
    "acam": (
        "segmentation",
        ["losses.0.name=acam", "losses.0.mask_source=fixed", "losses.0.num_masks=3"],
        {"segmentation_head.0/spatial"},
    ),
    "acam_both": (
        "segmentation",
        ["losses.0.name=acam", "losses.0.mask_source=fixed", "losses.0.masks=both", "losses.0.num_masks=3"],
        {"segmentation_head.0/channel", "segmentation_head.0/spatial"},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> dict[Task, Path]:
    tasks: tuple[Task, ...] = ("detection", "segmentation")
    return {task: write_recipe(tmp_path_factory.mktemp(task), task) for task in tasks}


@pytest.mark.parametrize("case", CASES)
def test_tokens_learn_the_teacher_stays_and_distillation_takes_them(
    case: str, recipes: dict[Task, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, overrides, names = CASES[case]
    recipe = config.load(recipes[task], overrides)
    first, last, run = tmp_path / "first.safetensors", tmp_path / "tokens.safetensors", tmp_path / "run"
    start = learn_tokens(recipe, out=first, iterations=1, lr=0.1)
    built = _record_networks(monkeypatch)
    course = learn_tokens(recipe, out=last, iterations=15, lr=0.1)

    assert (start["task"][0], start["dice"][0]) == (course["task"][0], course["dice"][0])
    assert len(course["dice"]) == 15
    assert course["dice"][-1] < course["dice"][0]
    assert all(map(math.isfinite, course["task"]))
    assert METRICS[task] in course["teacher"]
    assert course["masked_teacher"].keys() == course["teacher"].keys()

    teacher, before = built[0]
    after = teacher.net.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(parameter.grad is None for parameter in teacher.parameters())

    learned, earlier = load_file(last), load_file(first)
    assert set(learned) == names
    assert max(float((learned[name] - earlier[name]).abs().max()) for name in names) > 0.1

    given = config.load(recipes[task], [*overrides, f"losses.0.tokens={last}"])
    distill(given, out=run)
    state = torch.load(run / "last.ckpt", weights_only=False)["state_dict"]
    module = "selection" if case.startswith("acam") else "token_module"
    layers = sorted({name.partition("/")[0] for name in names})
    for index, layer in enumerate(layers):
        for name in (name for name in names if name.startswith(f"{layer}/")):
            kept = state[f"distiller.losses.{index}.{module}.{name.partition('/')[2]}"]
            assert torch.equal(kept, learned[name])  # loaded, and unmoved by two steps of training


def test_loaded_tokens_are_frozen(recipes: dict[Task, Path], tmp_path: Path) -> None:
    file = tmp_path / "tokens.safetensors"
    learn_tokens(config.load(recipes["segmentation"], MASKD), out=file, iterations=1)
    recipe = config.load(recipes["segmentation"], [*MASKD, f"losses.0.tokens={file}"])
    student, teacher = (build_network(recipe, recipe.student, recipe.data.classes or ()) for _ in range(2))
    loss: Any = build_distiller(student, teacher, recipe.losses).losses[0]
    assert torch.equal(loss.token_module.tokens, load_file(file)["segmentation_head.0/tokens"])
    assert not loss.token_module.tokens.requires_grad


def test_masks_that_sum_to_one_leave_the_teacher_as_it_is(recipes: dict[Task, Path]) -> None:
    recipe = config.load(recipes["segmentation"], MASKD)
    teacher = build_network(recipe, recipe.student, recipe.data.classes or ()).eval()
    module = TokenMasks(6, num_tokens=2, weighted=False)
    torch.nn.init.zeros_(module.tokens)  # each mask is 0.5 everywhere
    batch = teacher.prepare([torch.rand(3, 64, 64)])
    with tokens._masked(teacher, {PAIRS["segmentation"]: module}) as overlaps:
        masked = teacher(batch)["out"]
    torch.testing.assert_close(masked, teacher(batch)["out"])
    assert torch.stack(overlaps).tolist() == [pytest.approx(1.0)]


def test_the_command_refuses_to_replace_a_file(
    recipes: dict[Task, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "tokens.safetensors"
    command = ["acamkd", "tokens", str(recipes["segmentation"]), "--out", str(file), "--iterations", "2"]
    for assignment in MASKD:
        command += ["--set", assignment]
    for arguments, code in ((command, "0"), (command, "1"), ([*command, "--overwrite"], "0")):
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit, match=code):
            cli.main()
    said = capsys.readouterr().err
    assert "iteration 2/2, task loss" in said
    assert "with masked features" in said
    assert "--overwrite replaces it" in said
    assert [path.name for path in tmp_path.iterdir()] == ["tokens.safetensors"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "no loss of the recipe recipe learns tokens"),
        (["losses.0.name=acam"], "no loss of the recipe recipe learns tokens"),
        (
            ["losses=[{name: maskd, pairs: [segmentation_head.0]}, {name: freekd, pairs: [segmentation_head.0]}]"],
            "two losses learn tokens at the teacher's layer segmentation_head.0",
        ),
        (["teacher=null"], "has no `teacher` section"),
    ],
)
def test_what_cannot_learn_is_refused(
    overrides: list[str], message: str, recipes: dict[Task, Path], tmp_path: Path
) -> None:
    with pytest.raises(AcamkdError, match=message):
        learn_tokens(config.load(recipes["segmentation"], overrides), out=tmp_path / "tokens.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_teacher_of_other_classes_learns_none(recipes: dict[Task, Path], tmp_path: Path) -> None:
    weights = tmp_path / "teacher.safetensors"
    models.save_weights(models.build(config.Model(**MODELS["segmentation"]), "segmentation", 9).net, weights)
    recipe = config.load(recipes["segmentation"], [*MASKD, "teacher.num_classes=9", f"teacher.weights={weights}"])
    with pytest.raises(AcamkdError, match=r"^tokens learn from the teacher's own loss, which a teacher with other cla"):
        learn_tokens(recipe, out=tmp_path / "tokens.safetensors")


def test_tokens_that_diverge_are_not_written(recipes: dict[Task, Path], tmp_path: Path) -> None:
    recipe = config.load(recipes["segmentation"], MASKD)
    with pytest.raises(AcamkdError, match=r"^iteration \d: the (task|dice) loss of the tokens is nan: lower --lr$"):
        learn_tokens(recipe, out=tmp_path / "tokens.safetensors", iterations=9, lr=1e37)
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_is_said_first(recipes: dict[Task, Path], tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    file = tmp_path / "taken" / "tokens.safetensors"
    with pytest.raises(AcamkdError, match=rf"cannot write {file.parent}: File exists; --out"):
        learn_tokens(config.load(recipes["segmentation"], MASKD), out=file, iterations=10**9)


def test_the_file_must_be_safetensors(recipes: dict[Task, Path], tmp_path: Path) -> None:
    with pytest.raises(AcamkdError, match=r"name a file \.safetensors"):
        learn_tokens(config.load(recipes["segmentation"], MASKD), out=tmp_path / "tokens.pth")


def _record_networks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[TaskModel, dict[str, Tensor]]]:
    """The networks that the job builds from now on, with their tensors as they were; the teacher comes first."""
    built: list[tuple[TaskModel, dict[str, Tensor]]] = []

    def record(*args: Any, **kwargs: Any) -> TaskModel:
        model = build_network(*args, **kwargs)
        built.append((model, {name: tensor.clone() for name, tensor in model.net.state_dict().items()}))
        return model

    monkeypatch.setattr(tokens, "build_network", record)
    return built
