"""A score does not depend on how many images are predicted together, nor by how many processes."""

from __future__ import annotations

import json
import os
import traceback
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

from acamkd.config import Model, ShortLong
from acamkd.data.samplers import rank_and_world_size
from acamkd.engine.metrics import Scorer, score
from acamkd.models import build
from acamkd.models.base import Prediction, Target, Task, TaskModel

CLASSES = ("ant", "bee", "cat")

NETWORKS: dict[str, tuple[Task, dict[str, Any]]] = {
    "segmenter": ("segmentation", {"arch": "fpn", "backbone": "tu-mobilenetv3_small_050"}),
    "fcos": ("detection", {"arch": "fcos", "fpn_channels": 64}),
    "retinanet": ("detection", {"arch": "retinanet", "fpn_channels": 16}),
    "faster_rcnn": ("detection", {"arch": "faster_rcnn", "fpn_channels": 16}),
}

LAST = ("classification_head.cls_logits", "box_predictor.cls_score")


def _network(name: str, resize: tuple[int, int] | ShortLong | None = None) -> TaskModel:
    """Random weights, with scores far enough apart not to change places by rounding."""
    task, section = NETWORKS[name]
    torch.manual_seed(0)
    section = {"backbone": "mobilenetv3_small_050", "backbone_weights": None, **section}
    model = build(Model(**section), task, len(CLASSES), resize).eval()
    if task == "detection":
        [last] = [module for end, module in model.net.named_modules() if end.endswith(LAST)]
        logits: list[Tensor] = []
        handle = last.register_forward_hook(lambda _module, _inputs, output: logits.append(output))
        model.predict(_images(1))
        handle.remove()
        last.weight.data *= 3 / torch.cat([each.flatten() for each in logits]).std()
        last.bias.data.zero_()
    return model


def _images(count: int = 10) -> list[Tensor]:
    """Sizes of 40 to 140 pixels, some of them twice."""
    generator = torch.Generator().manual_seed(1)
    sides = (40, 64, 64, 100, 140)
    sizes = [(sides[index % 5], sides[3 * index % 5]) for index in range(count)]
    return [torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator) for size in sizes]


def _truth(found: Prediction) -> Target:
    """What would be a score of 100, were some of it not lost or moved."""
    if "mask" in found:
        mask = found["mask"].clone()
        mask[::3] = (mask[::3] + 1) % len(CLASSES)
        return {"mask": mask}
    boxes = found["boxes"][:8]
    boxes = boxes + (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2) * torch.linspace(0, 0.3, len(boxes))[:, None]
    return {"boxes": boxes, "labels": found["labels"][:8], "iscrowd": torch.zeros(len(boxes), dtype=torch.int64)}


@cache
def _scored(name: str, resize: tuple[int, int] | ShortLong | None) -> tuple[TaskModel, list[Tensor], list[Target]]:
    model, images = _network(name, resize), _images()
    return model, images, [_truth(model.predict([image])[0]) for image in images]


def _scores(name: str, resize: tuple[int, int] | ShortLong | None, size: int) -> dict[str, float]:
    """Of this process's share of the images."""
    model, images, truths = _scored(name, resize)
    rank, processes = rank_and_world_size()
    images, truths = images[rank::processes], truths[rank::processes]
    batches = [(images[i : i + size], truths[i : i + size]) for i in range(0, len(images), size)]
    return score(model, batches, Scorer(model.task, CLASSES))


@pytest.mark.parametrize("resize", [None, ShortLong(short=70, long=110), (64, 96)])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_score_is_the_same_at_every_batch_size(name: str, resize: tuple[int, int] | ShortLong | None) -> None:
    found = [_scores(name, resize, size) for size in (1, 2, 5, 16)]
    rounded = [{key: f"{value:.2f}" for key, value in scores.items()} for scores in found]
    assert rounded[1:] == rounded[:1] * 3
    assert 5 < next(iter(found[0].values())) < 99


@pytest.mark.parametrize("name", ["segmenter", "fcos", "faster_rcnn"])
def test_the_score_is_the_same_for_two_processes(name: str, tmp_path: Path) -> None:
    children = []
    for rank in (0, 1):
        child = os.fork()
        if child:
            children.append(child)
            continue
        code = 1
        try:
            torch.set_num_threads(1)
            distributed.init_process_group(
                "gloo", init_method=f"file://{tmp_path}/meeting", rank=rank, world_size=2, timeout=timedelta(minutes=2)
            )
            (tmp_path / f"{rank}.json").write_text(json.dumps(_scores(name, None, 5)))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    alone = {key: f"{value:.2f}" for key, value in _scores(name, None, 1).items()}
    for rank in (0, 1):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert {key: f"{value:.2f}" for key, value in found.items()} == alone


@pytest.mark.parametrize("name", NETWORKS)
def test_a_prediction_does_not_depend_on_its_neighbors(name: str) -> None:
    model, images = _network(name), _images(5)
    for image, together in zip(images, model.predict(images), strict=True):
        [alone] = model.predict([image])
        for key, value in alone.items():
            torch.testing.assert_close(together[key], value, rtol=1e-4, atol=1e-3)


def test_images_of_one_size_are_predicted_together() -> None:
    model = _network("segmenter", (64, 96))
    seen: list[int] = []
    model.net.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    model.predict(_images(7))
    assert seen == [7]


def test_prediction_is_in_float32_within_a_trainings_lower_precision() -> None:
    model, images = _network("segmenter"), _images(3)
    plain = model.predict(images)
    with torch.autocast("cpu", torch.bfloat16):
        within = model.predict(images)
    assert all(torch.equal(one["mask"], other["mask"]) for one, other in zip(plain, within, strict=True))
