from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import Tensor, nn
from typer.testing import CliRunner

import tiny
import tiny_recipes
from acamkd import cli, config
from acamkd.distillation.pairs import Layer, blank_batch, layers, propose
from acamkd.errors import AcamkdError
from acamkd.jobs.inspect_layers import as_losses, inspect, of_names, of_recipe
from acamkd.jobs.train import distill
from acamkd.models.base import Batch, FeatureModel, Task
from tiny_hf import OPTIONS

SMALL = "mobilenetv3_small_050"


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_the_proposal_trains(task: Task, tmp_path: Path) -> None:
    recipe = tiny_recipes.write_recipe(tmp_path, task)
    result = CliRunner().invoke(cli.app, ["inspect", str(recipe)])
    assert result.exit_code == 0, result.output
    proposed: dict[str, Any] = yaml.safe_load(result.stdout.partition("# for the recipe")[2])
    assert proposed["losses"][0]["pairs"] == [tiny_recipes.PAIRS[task]]
    losses = json.dumps([{**proposed["losses"][0], "pairs": "auto"}])
    run = distill(config.load(recipe, [f"losses={losses}"]), out=tmp_path / "run")
    assert run.recipe.losses[0].pairs == (tiny_recipes.PAIRS[task],)
    terms = (tmp_path / "run/history.csv").read_text().partition("\n")[0]
    assert ("backbone:p7/acam/spatial" if task == "detection" else "segmentation_head.0/acam/spatial") in terms


def test_layers_are_named_with_channels_and_stride() -> None:
    _, student = of_names(f"retinanet/{SMALL}", f"retinanet/{SMALL}")
    found = layers(student, blank_batch(student))
    assert found[0] == Layer("backbone.body:0", 16, 2)
    assert found[-5:] == [
        Layer(f"backbone:{key}", 256, 8 * 2**level) for level, key in enumerate(["0", "1", "2", "p6", "p7"])
    ]
    assert all(not module._forward_hooks for module in student.net.modules())


class Unpadded(FeatureModel):
    """Four convolutions of stride 2 that lose locations at the borders, and a pooled map."""

    def __init__(self) -> None:
        stages = [nn.Conv2d(3, 3, 3, stride=2) for _ in range(4)]
        super().__init__(nn.Sequential(*stages, nn.AdaptiveAvgPool2d(6)), (0.5,) * 3, (0.5,) * 3)

    def forward(self, batch: Batch) -> Tensor:
        out: Tensor = self.net(self.normalize(batch))
        return out


def test_layers_of_a_network_that_does_not_pad_are_listed() -> None:
    _, student = of_names(f"retinanet/{SMALL}", f"retinanet/{SMALL}")
    found = layers(Unpadded(), blank_batch(student))
    assert found == [Layer(f"{stage}", 3, 2 ** (1 + stage)) for stage in range(4)]


@pytest.mark.parametrize(
    ("teacher", "student", "pairs"),
    [
        (f"retinanet/{SMALL}", "fcos/torchvision/resnet18", ["backbone:*"]),
        (
            f"faster_rcnn/{SMALL}", f"retinanet/{SMALL}",
            [("backbone:0", "backbone:1"), ("backbone:1", "backbone:2"), ("backbone:2", "backbone:3"),
             ("backbone:p6", "backbone:pool")],
        ),
        ("torchvision/lraspp_mobilenet_v3_large", f"fpn/tu-{SMALL}", [("segmentation_head.0", "classifier")]),
        (f"unet/tu-{SMALL}", f"fpn/tu-{SMALL}", [("segmentation_head.0", "segmentation_head")]),
    ],
)  # fmt: skip
def test_pairs_are_of_one_stride_or_the_logits(teacher: str, student: str, pairs: list[Any]) -> None:
    networks = of_names(teacher, student)
    assert propose(*networks) == pairs
    (loss,) = as_losses(pairs, networks[1], all_labeled=False)
    assert loss.get("num_masks") == (None if networks[1].task == "detection" else 19)
    assert loss["gradient_ratio"] == {"detection": 4, "segmentation": 8}[networks[1].task]
    assert loss.get("level_decay") == (0.5 if pairs == ["backbone:*"] else None)
    assert as_losses(pairs, networks[1], all_labeled=True) == [{**loss, "gradient_ratio": 0.5}]


def test_a_teacher_needs_no_more_than_a_forward(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path)
    stripes = config.Model(arch="models.test_timm_features:Stripes")
    found = inspect(recipe.model_copy(update={"teacher": stripes}))
    assert found.networks == ("Conv2d", "FPN")


def test_the_classes_are_those_of_the_format_that_is_found(tmp_path: Path) -> None:
    for folder in ("SegmentationClass", "ImageSets/Segmentation"):
        (tmp_path / folder).mkdir(parents=True)
    network = {"arch": "fpn", "backbone": f"tu-{SMALL}"}
    raw: dict[str, Any] = {"name": "x", "task": "segmentation", "data": {"root": str(tmp_path)}, "train": {"epochs": 1}}
    raw |= {"teacher": network, "student": network}
    voc = [network.num_classes for network in of_recipe(config.parse(raw))]
    assert voc == [21, 21]  # with the background
    (tmp_path / "SegmentationClass").rmdir()
    assert [network.num_classes for network in of_recipe(config.parse(raw))] == [19, 19]  # nothing is known
    raw["data"]["classes"] = ["a", "b"]
    assert [network.num_classes for network in of_recipe(config.parse(raw))] == [2, 2]


def test_layers_are_listed_where_no_pairs_are_proposed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("transformers")
    teacher, student = ({"arch": f"hf/{name}", "options": OPTIONS[name]} for name in ("detr", "yolos"))
    raw = {"name": "x", "task": "detection", "data": {"root": str(tmp_path)}, "train": {"epochs": 1}}
    found = inspect(config.parse({**raw, "teacher": teacher, "student": student}))
    assert found.student[-1] == Layer("vit.encoder.layer.3#16+1", 32, 16)
    assert found.losses == []
    assert "no pairs are proposed: the feature maps have no stride in common: the student Yolos" in caplog.text


def test_what_cannot_be_paired_is_said() -> None:
    with pytest.raises(AcamkdError, match="retinanet is for detection and fpn for segmentation"):
        of_names("retinanet", "fpn")
    with pytest.raises(AcamkdError, match="unknown network retinanett"):
        of_names("retinanett", "fpn")
    result = CliRunner().invoke(cli.app, ["inspect", "a", "b", "c"])
    assert isinstance(result.exception, AcamkdError)
    assert "give one recipe, or a teacher and a student, not 3 names" in str(result.exception)
    result = CliRunner().invoke(cli.app, ["inspect", "retinanet", "fcos", "--set", "data.resize=64"])
    assert "--set data.resize=64 changes a recipe, and two networks have none" in str(result.exception)
    result = CliRunner().invoke(cli.app, ["inspect", "retinanet"])
    assert str(result.exception) == (
        "there is no recipe retinanet; of networks name two: acamkd inspect TEACHER STUDENT"
    )
    with pytest.raises(AcamkdError, match=r"^the recipe tiny has no `teacher` section$"):
        inspect(tiny.recipe(Path("data"), "detection"))
