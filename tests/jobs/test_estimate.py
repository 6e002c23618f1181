from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import tiny
from acamkd import config, models
from acamkd.distillation.build import build_distiller
from acamkd.engine.cost import cost
from acamkd.errors import AcamkdError
from acamkd.jobs import estimate as module
from acamkd.jobs.estimate import LiveMemory, estimate
from acamkd.jobs.fit import count_parameters
from acamkd.jobs.setup import build_network, build_teacher


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_data(tmp_path_factory.mktemp("data"))


def test_live_memory_counts_what_operators_give_while_it_lives() -> None:
    given = torch.ones(256)  # 1 KiB each
    with LiveMemory() as memory:
        given.mul_(2).view(16, 16).t()  # nothing new
        assert memory.peak == 0
        doubled = given * 2
        del doubled
        first, second = given[:128], given[128:]
        assert memory.peak == 1024
        kept = [first + second, given + 1]  # 512 + 1024
        assert memory.peak == 1536
        del kept
        x = given.clone().requires_grad_()  # 1024, and more of the same in the next line, saved for the backward
        y = x.exp()
        assert memory.peak == 2048
        y.sum().backward()  # type: ignore[no-untyped-call]
    assert memory.peak == 2048 + 4 + 4 + 1024  # the sum, its gradient (expanded, not copied), and that of x


def test_the_parts_of_a_recipe(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny.recipe(root)
    monkeypatch.setattr(module, "free_memory", lambda device: 2**30)
    found = estimate(recipe)
    teacher, student, losses, attention = found.parts
    assert [part.name for part in found.parts] == ["teacher", "student", "losses", "attention"]
    assert found.frame == (64, 64)

    classes = tuple(recipe.data.classes or ())
    network = build_network(recipe, recipe.student, classes)
    assert teacher.parameters == student.parameters == count_parameters(network.net)
    built = build_distiller(network, build_teacher(recipe, recipe.student, classes), recipe.losses)
    learned = sum(parameter.numel() for parameter in built.losses.parameters())
    assert losses.parameters == learned
    with FlopCounterMode(display=False) as counter:
        network.eval().predict([torch.rand(3, 64, 64)])
    assert teacher.gflops == pytest.approx(counter.get_total_flops() / 1e9)  # no operation stands behind the logits
    assert 2.5 * teacher.gflops < student.gflops
    assert 0 < attention.gflops < losses.gflops < student.gflops
    assert 0 < attention.memory < student.memory
    assert teacher.inference == pytest.approx(teacher.gflops)
    assert student.inference == pytest.approx(teacher.inference)  # the same network, though it trains
    assert (losses.inference, attention.inference) == (None, None)
    assert found.steps == 2 * 2  # epochs, batches of 4 of the 8 images
    assert found.hours == pytest.approx(found.seconds * 4 / 3600)
    assert 0 < found.seconds < 60
    assert "the recipe's 4 steps about 1 minute, without reading images" in " ".join(str(found).split())
    fusion = (value for name, value in built.losses.named_parameters() if ".fusion." in name)
    assert attention.parameters == sum(value.numel() for value in fusion)

    assert 0 < teacher.memory < student.memory
    assert found.image == pytest.approx(student.memory + losses.memory)
    trained = student.parameters + losses.parameters
    assert found.fixed == 4 * (teacher.parameters + trained) + 4 * 3 * trained  # AdamW
    assert found.largest_batch == (2**30 - 4 * 3 * trained) // (4 / 3 * found.image)
    monkeypatch.setattr(module, "free_memory", lambda device: 0)
    assert estimate(recipe).largest_batch == 0


def test_a_step_has_the_images_of_all_its_batches(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "seconds_of", lambda *_, **__: 0.25)  # of two images
    found = estimate(config.override(tiny.recipe(root), ["train.accumulate=2", "train.batch_size=4"]))
    assert (found.batch_size, found.step_images, found.seconds) == (4, 8, 1.0)
    words = " ".join(str(found).split())
    assert "a step of 8 images takes about 1 s on this machine" in words
    assert re.search(r"the largest batch is about \d+, the recipe's 4 ", words)


def test_a_prediction_of_two_stages_has_both() -> None:
    section = config.Model(
        arch="faster_rcnn", backbone="test_efficientnet", backbone_weights=None, fpn_channels=16,
        options={"anchor_sizes": [8, 16, 32, 48, 64]},
    )  # fmt: skip
    model, image = models.build(section, "detection", 3, (64, 64)), torch.rand(3, 64, 64)
    found = module._inference(model, model.prepare([image]))
    assert model.net.training  # as it was
    assert found == pytest.approx(cost(model.eval(), image).gflops)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(model.prepare([image]))
    assert found > 1.2 * counter.get_total_flops() / 1e9


def test_memory_is_by_image(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_two = estimate(tiny.recipe(root))
    monkeypatch.setattr(module, "IMAGES", 4)
    by_four = estimate(tiny.recipe(root))
    for part, same in zip(by_two.parts, by_four.parts, strict=True):
        assert part.gflops == pytest.approx(same.gflops, rel=0.01)
    assert by_two.image == pytest.approx(by_four.image, rel=0.05)


def test_a_fusion_that_runs_twice_counts_twice(root: Path) -> None:
    once, twice = (
        estimate(config.override(tiny.recipe(root), [f"losses.0.mask_grad={value}"])).parts[-1]
        for value in ("detached", "task")
    )
    assert once.name == twice.name == "attention"
    assert twice.parameters == once.parameters
    assert twice.gflops == pytest.approx(2 * once.gflops)
    assert once.memory < twice.memory < 2 * once.memory  # both wait for the backward, and work one after the other


def test_unlabeled_images_are_counted(root: Path) -> None:
    recipe = tiny.recipe(root)
    without, with_them = (
        estimate(recipe.model_copy(update={"data": recipe.data.model_copy(update={"unlabeled": folder})}))
        for folder in (None, "images/val")
    )
    assert [part.gflops for part in with_them.parts[:2]] == [part.gflops for part in without.parts[:2]]
    teacher, student = without.parts[:2]
    more = with_them.parts[2].gflops - without.parts[2].gflops
    # Both networks run once more, and the loss: at the segmenter's logits nothing is left out but the task loss.
    assert more == pytest.approx(teacher.gflops + student.gflops + without.parts[2].gflops, rel=0.05)
    assert 1.5 * without.image < with_them.image < 2 * without.image


def test_a_system_that_does_not_say_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: (_ for _ in ()).throw(FileNotFoundError("/proc/meminfo")))
    with pytest.raises(AcamkdError, match="free memory can be read only on Linux or from a GPU: /proc"):
        module.free_memory(torch.device("cpu"))


def test_the_teacher_is_needed_but_not_its_weights(root: Path) -> None:
    raw = tiny.recipe(root)
    assert raw.teacher is not None
    without = raw.model_copy(update={"teacher": raw.teacher.model_copy(update={"weights": None})})
    assert [part.gflops for part in estimate(without).parts] == [part.gflops for part in estimate(raw).parts]
    with pytest.raises(AcamkdError, match="needs a `teacher` section and `losses` to distill"):
        estimate(raw.model_copy(update={"losses": ()}))
