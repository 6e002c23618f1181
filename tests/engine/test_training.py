from __future__ import annotations

import logging
import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import timm
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from acamkd import config
from acamkd.data.transforms import batch_scale
from acamkd.distillation.build import build_distiller
from acamkd.distillation.distiller import Distiller
from acamkd.engine.averaging import EMA
from acamkd.engine.metrics import Scorer
from acamkd.engine.module import TrainingModule
from acamkd.engine.trainer import Recorder, SyncBatchNorm, build_trainer
from acamkd.errors import AcamkdError
from acamkd.models.base import Target
from acamkd.models.segmentation import Segmenter
from tiny import rows

Batch = tuple[list[Tensor], list[Target]]


def _model(seed: int = 0) -> Segmenter:
    torch.manual_seed(seed)
    return Segmenter(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)), 2, (0.5,) * 3, (0.2,) * 3, None)


def _batches(count: int, seed: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            [torch.rand(3, 8, 8, generator=generator)],
            [{"mask": torch.randint(0, 2, (8, 8), generator=generator)}],
        )
        for _ in range(count)
    ]


def _loader(batches: list[Batch]) -> DataLoader[Batch]:
    return DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch)  # type: ignore[arg-type]


class _Scripted(Scorer):
    """Gives the figures that a test wants."""

    def __init__(self, *figures: float) -> None:
        super().__init__("segmentation", ("a", "b"))
        self.figures = list(figures)

    def compute(self) -> dict[str, float]:
        return {"mIoU": self.figures.pop(0)}


class _Watch(Callback):
    """Learning rates before every step and weights after every epoch."""

    def __init__(self) -> None:
        self.rates: list[list[float]] = []
        self.weights: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, TrainingModule)
        self.weights.append({k: v.clone() for k, v in pl_module.distiller.student.net.state_dict().items()})


def _fit(
    folder: Path,
    batches: list[Batch],
    distiller: Distiller | None = None,
    scorer: Scorer | None = None,
    progress: bool = False,
    checkpoint: Path | None = None,
    **train: Any,
) -> tuple[L.Trainer, TrainingModule, _Watch]:
    section = config.Train(**{"accelerator": "cpu", "epochs": 1, "schedule": config.Schedule(name="constant"), **train})
    ema = None if section.ema is None else EMA(section.ema)
    recorder = Recorder(folder, "student.safetensors", "mIoU", patience=section.patience, ema=ema)
    trainer = build_trainer(section, recorder, progress=progress)
    watch = _Watch()
    trainer.callbacks.insert(0, watch)  # type: ignore[attr-defined]
    module = TrainingModule(distiller or Distiller(_model()), section, scorer or Scorer("segmentation", ("a", "b")))
    trainer.fit(module, _loader(batches), _loader(_batches(1, seed=9)), ckpt_path=checkpoint)
    return trainer, module, watch


def _rates(folder: Path, epochs: int, steps: int, schedule: config.Schedule, **train: Any) -> list[float]:
    optimizer = config.Optimizer(lr=0.5)
    _, _, watch = _fit(folder, _batches(steps), epochs=epochs, schedule=schedule, optimizer=optimizer, **train)
    return [rates[0] for rates in watch.rates]


def test_the_bar_shows_the_last_metric_and_the_time_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _fit(tmp_path, _batches(2), scorer=_Scripted(12.5, 50), progress=True, epochs=2)
    shown = capsys.readouterr().out
    assert "epoch 2/2" in shown
    assert "mIoU=12.50" in shown
    assert "left=0:00:0" in shown


def test_constant_with_warm_up(tmp_path: Path) -> None:
    found = _rates(tmp_path, 2, 4, config.Schedule(name="constant", warmup_steps=4))
    assert found == pytest.approx([0.5 * (1e-3 + (1 - 1e-3) * min(step / 4, 1)) for step in range(8)])


@pytest.mark.parametrize(("warmup_steps", "milestone", "said"), [(2, 1, False), (6, 2, True)])
def test_a_schedule_that_outlasts_the_training_is_said(
    warmup_steps: int, milestone: int, said: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _rates(tmp_path, 2, 3, config.Schedule(name="step", warmup_steps=warmup_steps, milestones=(1, milestone)))
    messages = (
        "warmup_steps 6, and the training has 6 steps: it never reaches lr; lower warmup_steps",
        "the training ends with epoch 2, so that [2] change nothing",
    )
    assert [message in caplog.text for message in messages] == [said, said]


def test_step_falls_at_the_end_of_its_epochs(tmp_path: Path) -> None:
    schedule = config.Schedule(name="step", milestones=(1, 3), gamma=0.1, warmup_steps=1)
    found = _rates(tmp_path, 4, 2, schedule)
    assert found == pytest.approx([0.0005, 0.5, 0.05, 0.05, 0.05, 0.05, 0.005, 0.005])


def test_polynomial(tmp_path: Path) -> None:
    found = _rates(tmp_path, 2, 4, config.Schedule(name="polynomial", power=0.9))
    assert found == pytest.approx([0.5 * (1 - step / 8) ** 0.9 for step in range(8)])


def test_one_cycle(tmp_path: Path) -> None:
    found = _rates(tmp_path, 2, 5, config.Schedule(name="one_cycle", pct_start=0.3))
    low, end = 0.5 / 25, 0.5 / 25 / 1e4
    rise = [low + (0.5 - low) * (1 - math.cos(math.pi * step / 2)) / 2 for step in range(3)]
    fall = [end + (0.5 - end) * (1 + math.cos(math.pi * step / 7)) / 2 for step in range(1, 8)]
    assert found == pytest.approx(rise + fall)


def test_one_cycle_leaves_the_recipes_momentum_alone(tmp_path: Path) -> None:
    optimizer = config.Optimizer(name="sgd", lr=0.5, momentum=0.7)
    schedule = config.Schedule(name="one_cycle")
    trainer, *_ = _fit(tmp_path, _batches(4), schedule=schedule, optimizer=optimizer)
    assert [group["momentum"] for group in trainer.optimizers[0].param_groups] == [0.7]


def test_the_schedule_counts_steps_rather_than_batches(tmp_path: Path) -> None:
    found = _rates(tmp_path, 2, 5, config.Schedule(name="polynomial", power=1), accumulate=2)
    per_step = [0.5 * (1 - step / 6) for step in range(6)]  # 5 batches are 3 steps
    assert found == pytest.approx([per_step[step] for step in (0, 0, 1, 1, 2, 3, 3, 4, 4, 5)])


def test_student_and_losses_have_groups_of_their_own(tmp_path: Path) -> None:
    student = _model()
    student.net[0].requires_grad_(False)
    entry = config.Loss(name="acam", pairs=("1",), num_masks=2, masks="both")
    distiller = build_distiller(student, _model(1), [entry])
    optimizer = config.Optimizer(lr=0.1, losses_lr=0.2, weight_decay=0.3)
    trainer, _, _ = _fit(tmp_path, _batches(1), distiller, optimizer=optimizer)
    groups = trainer.optimizers[0].param_groups
    assert isinstance(trainer.optimizers[0], torch.optim.AdamW)
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(0.1, 0.3), (0.2, 0.3)]
    wanted = [student.net[1].parameters(), distiller.losses.parameters()]
    for group, parameters in zip(groups, wanted, strict=True):
        assert {id(p) for p in group["params"]} == {id(p) for p in parameters}


def test_backbone_and_norms_have_groups_of_their_own(tmp_path: Path) -> None:
    parts = OrderedDict(backbone=nn.Conv2d(3, 4, 1), norm=nn.BatchNorm2d(4), head=nn.Conv2d(4, 2, 1))
    student = Segmenter(nn.Sequential(parts), 2, (0.5,) * 3, (0.2,) * 3, None)
    entry = config.Loss(name="acam", pairs=(("backbone", "0"),), num_masks=2, masks="both")
    distiller = build_distiller(student, _model(1), [entry])
    optimizer = config.Optimizer(lr=0.2, backbone_lr=0.1, weight_decay=0.3, norm_decay=False)
    trainer, module, _ = _fit(tmp_path, _batches(1), distiller, optimizer=optimizer)
    found = {
        name: (group["lr"], group["weight_decay"], title)
        for title, group in zip(module.group_names, trainer.optimizers[0].param_groups, strict=True)
        for name, parameter in distiller.named_parameters()
        if any(parameter is each for each in group["params"])
    }
    own = {name.removeprefix("student.net."): value for name, value in found.items() if name.startswith("student")}
    head, backbone = (0.2, 0.3, "student"), (0.1, 0.3, "backbone")
    assert own == {
        "head.weight": head, "backbone.weight": backbone, "head.bias": (0.2, 0, "student"),
        "norm.weight": (0.2, 0, "student"), "norm.bias": (0.2, 0, "student"), "backbone.bias": (0.1, 0, "backbone"),
    }  # fmt: skip
    assert {value for name, value in found.items() if name.startswith("losses")} == {(0.2, 0.3, "losses")}


def test_accumulation_steps_with_the_mean_gradient_and_never_drops_the_last_batch(tmp_path: Path) -> None:
    optimizer = config.Optimizer(name="sgd", lr=0.1, momentum=0, weight_decay=0)
    model, batches = _model(), _batches(2)
    total = torch.stack([model.loss(model(b), b)["cross_entropy"] for b in (model.prepare(*x) for x in batches)]).mean()
    gradients = torch.autograd.grad(total, list(model.net.parameters()))
    expected = [p - 0.1 * g for p, g in zip(model.net.parameters(), gradients, strict=True)]
    trainer, module, _ = _fit(tmp_path, batches, Distiller(model), optimizer=optimizer, accumulate=2)
    assert trainer.global_step == 1
    for found, wanted in zip(module.distiller.student.net.parameters(), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    assert _fit(tmp_path, _batches(3), optimizer=optimizer, accumulate=2)[0].global_step == 2


def test_an_epochs_last_short_window_has_the_mean_of_its_own_batches(tmp_path: Path) -> None:
    optimizer = config.Optimizer(name="sgd", lr=0.1, momentum=0, weight_decay=0)
    steps = []
    for accumulate, batches in ((1, _batches(1)), (3, _batches(1)), (3, _batches(2)), (2, _batches(2))):
        model = _model()
        before = torch.cat([p.detach().clone().flatten() for p in model.net.parameters()])
        _fit(tmp_path, batches, Distiller(model), optimizer=optimizer, accumulate=accumulate)
        steps.append(torch.cat([p.detach().flatten() for p in model.net.parameters()]) - before)
    torch.testing.assert_close(steps[0], steps[1])
    torch.testing.assert_close(steps[2], steps[3])


def test_a_batch_too_small_for_batch_norm_is_named(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    model = Segmenter(net, 2, (0.5,) * 3, (0.2,) * 3, None)
    with pytest.raises(AcamkdError, match=r"raise train\.batch_size, or give .*\[1, 4, 1, 1\]"):
        _fit(tmp_path, _batches(1), Distiller(model), batch_size=1)


def test_a_term_that_also_sees_unlabeled_images_is_the_mean_of_both(tmp_path: Path) -> None:
    entries = [
        config.Loss(name="fitnet", pairs=("1",)),
        config.Loss(name="acam", pairs=("0",), masks="both", imitation="squared"),
    ]
    distiller = build_distiller(_model(), _model(1), entries)
    student = distiller.student
    ((images, targets),), ((more, _),) = _batches(1), _batches(1, seed=5)
    task, both = distiller(student.prepare(images, targets)), distiller(student.prepare(images + more, targets * 2))
    optimizer = config.Optimizer(name="sgd", lr=0.1, momentum=0, weight_decay=0)
    _fit(tmp_path, [(images, targets, more)], distiller, optimizer=optimizer)  # type: ignore[list-item]
    (row,) = rows(tmp_path / "history.csv")
    seen = ("1/fitnet/feature", "0/acam/channel", "0/acam/spatial", "0/acam/diversity")  # the selection needs targets
    expected = {name: term.item() for name, term in (task | {name: both[name] for name in seen}).items()}
    assert {name: float(row[f"loss/{name}"]) for name in expected} == pytest.approx(expected, rel=1e-5)
    assert float(row["loss"]) == pytest.approx(sum(expected.values()), rel=1e-5)


def test_clipping_bounds_the_whole_gradient(tmp_path: Path) -> None:
    model = _model()
    before = torch.cat([p.detach().clone().flatten() for p in model.net.parameters()])
    optimizer = config.Optimizer(name="sgd", lr=10.0, momentum=0, weight_decay=0)
    _fit(tmp_path, _batches(1), Distiller(model), optimizer=optimizer, clip=1e-3)
    after = torch.cat([p.detach().flatten() for p in model.net.parameters()])
    assert (after - before).norm().item() == pytest.approx(10 * 1e-3, rel=1e-3)


def test_bf16_runs_the_network_in_bf16_and_keeps_float32_weights(tmp_path: Path) -> None:
    model, seen = _model(), []
    model.net.register_forward_hook(lambda net, _, output: seen.append(output.dtype) if net.training else None)
    distiller = build_distiller(model, _model(1), [config.Loss(name="acam", pairs=("1",), num_masks=2, masks="both")])
    seen.clear()
    _fit(tmp_path, _batches(2), distiller, precision="bf16-mixed")
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in distiller.parameters()} == {torch.float32}
    assert math.isfinite(float(rows(tmp_path / "history.csv")[0]["loss/1/acam/channel"]))


def test_channels_last_is_the_format_of_both_networks_and_changes_rounding_alone(tmp_path: Path) -> None:
    weights = {}
    for wanted in (False, True):
        torch.manual_seed(0)
        nets = [nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1)) for _ in range(2)]
        student, teacher = (Segmenter(net, 2, (0.5,) * 3, (0.2,) * 3, None) for net in nets)
        distiller = build_distiller(student, teacher, [config.Loss(name="acam", pairs=("0",), num_masks=2)])
        seen: list[bool] = []
        for net in nets:
            net[0].register_forward_hook(
                lambda _module, _inputs, x, seen=seen: seen.append(x.is_contiguous(memory_format=torch.channels_last))
            )
        folder = tmp_path / str(wanted)
        _fit(folder, _batches(3), distiller, optimizer=config.Optimizer(name="sgd", lr=0.1), channels_last=wanted)
        assert set(seen) == {wanted}
        weights[wanted] = load_file(folder / "student.safetensors")
    for name, tensor in weights[True].items():
        assert tensor.is_contiguous()
        torch.testing.assert_close(tensor, weights[False][name])


def test_what_cannot_be_compiled_here_is_trained_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def compile_nothing(*_: Any, **__: Any) -> None:
        raise RuntimeError("No working C++ compiler found\nPlease install one")

    monkeypatch.setattr("torch.compile", compile_nothing)
    trainer, module, _ = _fit(tmp_path, _batches(3), compile=True)
    (message,) = [record.getMessage() for record in caplog.records if "compile" in record.getMessage()]
    assert message == (
        "train.compile: torch cannot compile for cpu here, so that the training is not compiled: "
        "No working C++ compiler found"
    )
    assert trainer.global_step == 3
    assert not module.distiller._compiled


@pytest.mark.parametrize("convolution", [nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.parametrize("channels_last", [False, True])
def test_bf16_gradients_of_dilated_depthwise_convolutions_are_right(
    tmp_path: Path, convolution: type[nn.Conv2d | nn.ConvTranspose2d], channels_last: bool
) -> None:
    gradients = []
    for precision in ("32", "bf16-mixed"):
        torch.manual_seed(0)
        depthwise = convolution(64, 64, 3, padding=2, dilation=2, groups=64)
        net = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), depthwise, nn.Conv2d(64, 2, 3, padding=1))
        depthwise.weight.register_hook(lambda x: gradients.append(x.float().flatten()))  # type: ignore[no-untyped-call]
        # Maps that are channels last by themselves, as a network's own permutations leave them.
        net[0].register_forward_hook(lambda _module, _inputs, x: x.contiguous(memory_format=torch.channels_last))
        batch: Batch = [torch.rand(3, 32, 48)], [{"mask": torch.ones(32, 48, dtype=torch.long)}]
        distiller = Distiller(Segmenter(net, 2, (0.5,) * 3, (0.2,) * 3, None))
        _fit(tmp_path / precision, [batch], distiller, precision=precision, channels_last=channels_last)
    plain, mixed = gradients
    assert (mixed - plain).norm() < 0.02 * plain.norm()


def test_every_term_and_mask_mean_is_in_both_tables_from_the_first_step(tmp_path: Path) -> None:
    acam = config.Loss(name="acam", pairs=("0", "1"), num_masks=2, masks="both", mask_grad="joint")
    entries = [acam, config.Loss(name="fitnet", pairs=("1",))]
    distiller = build_distiller(_model(), _model(1), entries)
    _fit(tmp_path, _batches(3), distiller, epochs=2)
    terms = [f"loss/{layer}/acam/{term}" for layer in (0, 1) for term in ("channel", "spatial", "diversity")]
    terms += ["loss/1/fitnet/feature", "loss/task/cross_entropy"]
    means = [f"{layer}/acam/{kind}_mask" for layer in (0, 1) for kind in ("channel", "spatial")]
    figures = ("std", "entropy", "overlap", "correlation", "weight_std")
    masks = means + [f"{mean}_{figure}" for mean in means for figure in figures]
    history = rows(tmp_path / "history.csv")
    assert [(row["epoch"], row["step"]) for row in history] == [("1", "3"), ("2", "6")]
    assert set(history[0]) == {"epoch", "step", "mIoU", "IoU/a", "IoU/b", "loss", *terms, *masks}
    steps = [row for row in rows(tmp_path / "logs" / "metrics.csv") if row["loss_step"]]
    assert [row["step"] for row in steps] == ["0", "1", "2", "3", "4", "5"]
    assert all(float(row[f"{name}_step"]) > 0 for row in steps for name in [*terms, *means])
    assert all(-1 <= float(row[f"{name}_correlation_step"]) <= 1 for row in steps for name in means)
    for row in steps:
        assert float(row["loss_step"]) == pytest.approx(sum(float(row[f"{name}_step"]) for name in terms))
    for name in [*terms, *masks, "loss"]:  # history has the mean over the epoch's steps
        mean = sum(float(row[f"{name}_step"]) for row in steps[:3]) / 3
        assert float(history[0][name]) == pytest.approx(mean, rel=1e-5)


def test_a_weight_rises_over_its_epochs_and_stops(tmp_path: Path) -> None:
    entry = config.Loss(name="acam", pairs=("1",), num_masks=2, masks="both", ramp_epochs=2, stop_epoch=3)
    distiller = build_distiller(_model(), _model(1), [entry])
    still = config.Optimizer(lr=1e-12, weight_decay=0)
    _fit(tmp_path, _batches(1) * 2, distiller, epochs=4, optimizer=still)
    steps = [row for row in rows(tmp_path / "logs" / "metrics.csv") if row["loss_step"]]
    found = [float(row["loss/1/acam/channel_step"] or 0) for row in steps]
    full = found[3]
    assert [value / full for value in found] == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 0, 0], abs=1e-5)
    history = rows(tmp_path / "history.csv")
    assert float(history[1]["loss/1/acam/channel"]) == pytest.approx(0.875 * full, rel=1e-5)
    assert [history[3][name] for name in ("loss/1/acam/channel", "1/acam/channel_mask")] == ["", ""]  # no stale figures
    assert history[3]["loss"] == history[3]["loss/task/cross_entropy"]


def test_the_best_network_is_kept_rather_than_the_last(tmp_path: Path) -> None:
    _, _, watch = _fit(tmp_path, _batches(2), scorer=_Scripted(10.0, 30.0, 20.0), epochs=3)
    kept = load_file(tmp_path / "student.safetensors")
    assert all(torch.equal(kept[name], tensor) for name, tensor in watch.weights[1].items())
    assert not torch.equal(kept["0.weight"], watch.weights[2]["0.weight"])


def test_evaluation_only_where_it_is_due(tmp_path: Path) -> None:
    _, _, watch = _fit(tmp_path, _batches(2), scorer=_Scripted(10.0, 5.0), epochs=4, eval_every=2)
    assert [row["mIoU"] for row in rows(tmp_path / "history.csv")] == ["", "10.0", "", "5.0"]
    kept = load_file(tmp_path / "student.safetensors")
    assert torch.equal(kept["0.weight"], watch.weights[1]["0.weight"])


def test_the_average_of_the_weights_is_what_is_scored_and_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("acamkd.engine.averaging.WARMUP", 2)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    distiller, scored = Distiller(Segmenter(net, 2, (0.5,) * 3, (0.2,) * 3, None)), []
    net.register_forward_pre_hook(lambda net, _: None if net.training else scored.append(net[0].weight.clone()))
    folder, scores = tmp_path, _Scripted(10, 20, 5, 30)
    _, module, watch = _fit(
        folder, _batches(1), distiller, scores, epochs=4, ema=0.8, optimizer=config.Optimizer(lr=0.1)
    )
    average, averages, decays = dict(watch.weights[0]), [], [0.8 * (1 - math.exp(-step / 2)) for step in range(1, 5)]
    for step, weights in enumerate(watch.weights):
        if step:
            decay = decays[step - 1]
            average = {
                name: decay * average[name] + (1 - decay) * x if x.is_floating_point() else x
                for name, x in weights.items()
            }
        averages.append(average)
    torch.testing.assert_close(load_file(folder / "student.safetensors"), averages[3])
    torch.testing.assert_close(scored, [each["0.weight"] for each in averages])
    checkpoint = torch.load(folder / "last.ckpt", weights_only=True)
    for part, wanted in (("state_dict", averages[3]), ("current_model_state", watch.weights[3])):
        torch.testing.assert_close({name: checkpoint[part][f"distiller.student.net.{name}"] for name in wanted}, wanted)
    assert [float(row["ema"]) for row in rows(folder / "history.csv")] == pytest.approx(decays)
    torch.testing.assert_close(dict(module.distiller.student.net.state_dict()), averages[3])


def test_patience_ends_a_training_whose_metric_rises_no_more(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "acamkd")
    given: dict[str, Any] = {"epochs": 12, "eval_every": 2, "patience": 2}
    _, _, watch = _fit(tmp_path, _batches(2), scorer=_Scripted(10, 30, 30, 29), **given)
    assert [row["mIoU"] for row in rows(tmp_path / "history.csv")] == ["", "10", "", "30", "", "30", "", "29"]
    assert "mIoU has not risen above that of epoch 4 in 2 evaluations" in caplog.text
    kept = load_file(tmp_path / "student.safetensors")
    assert torch.equal(kept["0.weight"], watch.weights[3]["0.weight"])
    # Killed after its last checkpoint, it trains no further.
    resumed = _fit(tmp_path, _batches(2), scorer=_Scripted(), checkpoint=tmp_path / "last.ckpt", **given)
    assert not resumed[2].weights


def test_a_batchs_size_is_drawn_by_its_place_in_the_training(tmp_path: Path) -> None:
    def sizes(folder: Path, **train: Any) -> list[tuple[int, int]]:
        model, seen = _model(), []
        model.net.register_forward_pre_hook(lambda net, x: seen.append(x[0].shape[-2:]) if net.training else None)
        _fit(
            folder, _batches(4), build_distiller(model, _model(1), [config.Loss(name="fitnet", pairs=("1",))]), **train
        )
        return [(height, width) for height, width in seen if (height, width) != (128, 128)]  # of the probe

    factors = (1.0, 3.4)
    drawn = sizes(tmp_path / "one", epochs=2, multiscale=factors, seed=3)
    sides = [32 * round(batch_scale(factors, 3, epoch, batch)) for epoch in range(2) for batch in range(4)]
    assert drawn == [(side, side) for side in sides]
    assert len(set(sides)) > 1
    assert set(sizes(tmp_path / "off")) == {(32, 32)}


def test_a_figure_without_basis_still_leaves_a_network(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _fit(tmp_path, _batches(1), scorer=_Scripted(math.nan, math.nan), epochs=2)
    assert (tmp_path / "student.safetensors").is_file()
    assert sum("is undefined" in message for message in caplog.messages) == 2


def test_nothing_is_printed_by_the_framework(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    _fit(tmp_path, _batches(1))
    assert capfd.readouterr() == ("", "")


def test_batch_norm_over_all_processes(tmp_path: Path) -> None:
    for wanted in (False, True):
        section = config.Train(epochs=1, accelerator="cpu", devices=2, sync_batchnorm=wanted)
        trainer = build_trainer(section, Recorder(tmp_path, "student.safetensors", "mIoU"), progress=False)
        assert isinstance(trainer.strategy, DDPStrategy)
        assert isinstance(trainer.strategy._layer_sync, SyncBatchNorm) == wanted
    net = timm.create_model("mobilenetv3_small_050", features_only=True).eval()
    image = torch.rand(1, 3, 64, 64)
    before, names = net(image)[-1], list(net.state_dict())
    plugin = SyncBatchNorm()
    synced = plugin.apply(net)
    assert any(isinstance(layer, nn.SyncBatchNorm) for layer in synced.modules())
    torch.testing.assert_close(synced(image)[-1], before, rtol=0, atol=0)  # the activations are there
    torch.testing.assert_close(plugin.revert(synced)(image)[-1], before, rtol=0, atol=0)
    assert list(synced.state_dict()) == names
