"""Two processes on the CPU, with the environment that torchrun gives them, against one."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, distributed, nn

import leaving
import tiny
from acamkd import config, models
from acamkd.data.loading import Images
from acamkd.data.scenes import CLASSES, write_scenes
from acamkd.distillation import auto_weight
from acamkd.engine.module import TrainingModule
from acamkd.engine.runs import TERMINATED, open_run
from acamkd.errors import AcamkdError
from acamkd.jobs.compare.compare import run_trial
from acamkd.jobs.compare.trials import plan
from acamkd.jobs.evaluate import evaluate
from acamkd.jobs.pretrain import pretrain
from acamkd.jobs.setup import build_network
from acamkd.jobs.train import distill, train
from acamkd.losses.acam.masks import Masks
from acamkd.losses.acam.statistics import WATCH_EVERY, CollapseWatch
from acamkd.models.base import Task
from tiny_hf import OPTIONS

PAIRS = {"detection": "backbone:*", "segmentation": "segmentation_head.0"}


@pytest.fixture(scope="module", autouse=True)
def _comparable() -> Iterator[None]:
    """Batch norm's statistics are the only part of these networks that couples the images of a batch."""
    norm = nn.modules.batchnorm._BatchNorm
    initialize = norm.__init__

    def frozen(self: Any, *args: Any, **options: Any) -> None:
        initialize(self, *args, **options)
        self.training = False

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(norm, "__init__", frozen)
        patch.setattr(norm, "train", lambda self, mode=True: nn.Module.train(self, False))
        yield


@pytest.fixture(scope="module", params=["detection", pytest.param("segmentation", marks=pytest.mark.slow)])
def raw(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A recipe of 4 steps over 8 images, 4 at a time; 3 validation images are no equal shares of 2."""
    task: Task = request.param
    root = tmp_path_factory.mktemp(task)
    write_scenes(root, train=8, val=3, size=(64, 64), seed=0, task=task)
    optimizer = {"name": "sgd", "lr": 0.01}
    raw = tiny.raw_recipe(root, task, batch_size=4, optimizer=optimizer, schedule={"name": "constant"})
    if task == "segmentation":
        raw["student"]["options"]["decoder_dropout"] = 0.0
    torch.manual_seed(1)
    teacher = models.build(config.Model(**raw["student"]), task, len(CLASSES) + (task == "segmentation"))
    models.save_weights(teacher.net, root / "teacher.safetensors")
    raw["teacher"] = {**raw["student"], "weights": str(root / "teacher.safetensors")}
    # Standardized channels would couple the images of a batch, too.
    raw["losses"] = [{"name": "acam", "pairs": [PAIRS[task]], "num_masks": 2, "imitation": "squared"}]
    return raw


def _slurm(rank: int, port: int) -> dict[str, Any]:
    return {"SLURM_NTASKS": 2, "SLURM_NTASKS_PER_NODE": 2, "SLURM_JOB_NAME": "test", "SLURM_JOB_ID": 1,
            "SLURM_PROCID": rank, "SLURM_NODEID": 0, "SLURM_LOCALID": rank, "SLURM_NODELIST": "localhost",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip


def _shared(raw: dict[str, Any], **train: Any) -> config.Recipe:
    """The recipe for two processes with the same images in each step."""
    return config.parse({**raw, "train": {**raw["train"], "batch_size": 2, "devices": 2, **train}})


def test_two_processes_do_what_one_does(raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when they are ended in the middle of an epoch, and go on."""
    distill(config.parse(raw), out=tmp_path / "one")
    recipe = _shared(raw)
    original = TrainingModule.training_step

    def ended(self: TrainingModule, batch: Images, batch_idx: int) -> Tensor:
        if self.global_rank == 1 and self.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(TrainingModule, "training_step", ended)
    assert leaving.together(lambda rank: distill(recipe, out=tmp_path / "two")) == [TERMINATED, TERMINATED]
    assert torch.load(tmp_path / "two/last.ckpt", weights_only=True)["global_step"] == 3  # of 2 in each epoch
    monkeypatch.undo()
    assert leaving.together(lambda rank: distill(recipe, out=tmp_path / "two", resume=True)) == [0, 0]
    one, two = (load_file(tmp_path / name / "student.safetensors") for name in ("one", "two"))
    classes = config.load(tmp_path / "one/recipe.yaml").data.classes
    start = build_network(recipe, recipe.student, classes or ()).net.state_dict()
    assert max((one[name] - start[name]).abs().max() for name in one) > 1e-3
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-5)
    histories = [tiny.rows(tmp_path / name / "history.csv") for name in ("one", "two")]
    for alone, together in zip(*histories, strict=True):
        for name in alone:
            if name.startswith(("loss", "step")) or name.endswith("_mask"):  # means over all processes
                assert float(together[name]) == pytest.approx(float(alone[name]), abs=1e-4, rel=1e-4), name
    metrics = json.loads((tmp_path / "two/metrics.json").read_text())
    assert metrics["processes"] == 2
    scores = evaluate(open_run(tmp_path / "two", ["train.devices=1"]))  # in this process alone
    assert {k: v for k, v in metrics["student"].items() if v is not None} == {k: v for k, v in scores.items() if v == v}


@pytest.mark.slow
@pytest.mark.parametrize("labeled", [True, False])
@pytest.mark.parametrize("raw", ["detection"], indirect=True)
def test_two_processes_pretrain_as_one_does(raw: dict[str, Any], tmp_path: Path, labeled: bool) -> None:
    """Judged by nearest neighbors of objects, and without labels by the loss."""
    data = {"format": "images", "root": raw["data"]["root"], "workers": 0, "train": {"images": "images/train"}}
    data |= {"val": {"images": "images/val"}}
    cosine = {"name": "cosine", "pairs": [["backbone.body:3", "levels:0"]]}
    changed = {**raw, "teacher": tiny.VIT, "losses": [cosine], "data": raw["data"] if labeled else data}
    pretrain(config.parse(changed), out=tmp_path / "one")
    assert leaving.together(lambda rank: pretrain(_shared(changed), out=tmp_path / "two")) == [0, 0]
    one, two = (load_file(tmp_path / name / "backbone.safetensors") for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-5)
    alone, together = (open_run(tmp_path / name) for name in ("one", "two"))
    assert together.metrics["processes"] == 2
    scores = {name: value for name, value in alone.metrics["backbone"].items() if value is not None}
    assert scores == pytest.approx({name: together.metrics["backbone"][name] for name in scores}, abs=1e-3)
    assert ("kNN" if labeled else "alignment") in scores


@pytest.mark.slow
@pytest.mark.parametrize("raw", ["detection"], indirect=True)
def test_parameters_that_a_batch_does_not_reach_stop_no_process(raw: dict[str, Any], tmp_path: Path) -> None:
    """An image without boxes leaves RT-DETR's embedding of classes without a gradient, in one process or in both."""
    pytest.importorskip("transformers")
    network = {"arch": "hf/rt_detr_v2", "options": OPTIONS["rt_detr_v2"]}
    changed = {**raw, "losses": [], "student": network, "data": {**raw["data"], "resize": [64, 64]}}
    recipe = _shared(changed, optimizer={"name": "adamw", "lr": 1e-4}, clip=0.1)
    file = Path(raw["data"]["root"]) / "annotations/instances_train.json"
    content = json.loads(file.read_text())
    kept = {image["id"] for image in content["images"][:3]}
    content["annotations"] = [each for each in content["annotations"] if each["image_id"] in kept]
    (tmp_path / "few.json").write_text(json.dumps(content))
    recipe = config.override(recipe, [f"data.train.annotations={tmp_path / 'few.json'}"])
    assert leaving.together(lambda rank: train(recipe, out=tmp_path / "run")) == [0, 0]
    assert open_run(tmp_path / "run").metrics["processes"] == 2


def test_processes_agree(raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On `weight: auto`, on a loss that stops, and where one of them is asked to end, which alone has bad images."""
    raw = {**raw, "losses": [{**raw["losses"][0], "weight": "auto", "stop_epoch": 1}]}
    recipe = _shared(raw, epochs=3, on_nonfinite="skip")
    original = TrainingModule.training_step

    def disturbed(self: TrainingModule, batch: Images, batch_idx: int) -> Tensor:
        loss = original(self, batch, batch_idx)
        if self.global_step == 0:
            (tmp_path / f"weight-{self.global_rank}").write_text(str(self.distiller.losses[0].weight))
        if self.global_rank == 1 and self.global_step == 3:
            self.faults.append("test")
            return loss * torch.nan
        if self.global_rank == 1 and self.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    monkeypatch.setattr(TrainingModule, "training_step", disturbed)
    assert leaving.together(lambda rank: distill(recipe, out=tmp_path / "run")) == [TERMINATED, TERMINATED]
    assert (tmp_path / "weight-0").read_text() == (tmp_path / "weight-1").read_text() != "1.0"
    checkpoint = torch.load(tmp_path / "run/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 5
    assert all(tensor.isfinite().all() for tensor in checkpoint["state_dict"].values())
    assert {file.name for file in (tmp_path / "run/nonfinite").iterdir()} == {
        "step-3-process-0.pt", "step-3-process-1.pt",
    }  # fmt: skip
    log = (tmp_path / "run/log.txt").read_text()
    assert log.count("the step is skipped, 1 so far") == log.count("terminated; --resume goes on at step 5") == 1
    monkeypatch.undo()
    assert leaving.together(lambda rank: distill(recipe, out=tmp_path / "run", resume=True)) == [0, 0]
    history = tiny.rows(tmp_path / "run/history.csv")
    assert [row["step"] for row in history] == ["2", "4", "6"]
    spatial = next(name for name in history[0] if name.endswith("/acam/spatial"))
    assert [bool(row[spatial]) for row in history] == [True, False, False]  # an epoch is 2 steps of each process


def test_a_run_goes_on_with_as_many_processes_only(raw: dict[str, Any], tmp_path: Path) -> None:
    """Where the recipe says `devices: auto`, which another machine understands in another way."""
    automatic = {"train": {**raw["train"], "batch_size": 2, "devices": "auto", "accelerator": "cpu"}}
    with pytest.MonkeyPatch.context() as patch:  # Lightning's CPUs are one device unless a number is given
        patch.setattr("lightning.pytorch.accelerators.cpu.CPUAccelerator.auto_device_count", lambda *_: 2)
        recipe = config.parse({**raw, **automatic})
        original = TrainingModule.training_step

        def ended(self: TrainingModule, batch: Images, batch_idx: int) -> Tensor:
            if self.global_step == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(self, batch, batch_idx)

        patch.setattr(TrainingModule, "training_step", ended)
        assert leaving.together(lambda rank: distill(recipe, out=tmp_path / "run")) == [TERMINATED, TERMINATED]
    with pytest.raises(AcamkdError, match=r"run was trained by 2 processes, and now there is 1, .* resume with 2 "):
        distill(recipe, out=tmp_path / "run", resume=True)
    assert torch.load(tmp_path / "run/last.ckpt", weights_only=True)["global_step"] == 2


def test_processes_take_the_weight_that_the_first_one_measured(
    raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another device may round in another way."""
    raw = {**raw, "losses": [{**raw["losses"][0], "weight": "auto"}]}
    measure: Callable[..., tuple[config.Loss, ...]] = auto_weight.calibrate

    def calibrate(*given: Any) -> tuple[config.Loss, ...]:
        (entry,) = measure(*given)
        weight = entry.options["weight"] + 0.25 * int(os.environ["RANK"])
        return (config.Loss(**{**entry.model_dump(), "weight": weight}),)

    original = TrainingModule.training_step

    def noting(self: TrainingModule, batch: Images, batch_idx: int) -> Tensor:
        (tmp_path / f"weight-{self.global_rank}").write_text(str(self.distiller.losses[0].weight))
        return original(self, batch, batch_idx)

    monkeypatch.setattr("acamkd.jobs.train.calibrate", calibrate)
    monkeypatch.setattr(TrainingModule, "training_step", noting)
    assert leaving.together(lambda rank: distill(_shared(raw, epochs=1), out=tmp_path / "run")) == [0, 0]
    (loss,) = config.load(tmp_path / "run/recipe.yaml").losses
    assert {(tmp_path / f"weight-{rank}").read_text() for rank in (0, 1)} == {str(loss.model_dump()["weight"])}


@pytest.mark.parametrize(("means", "collapsed"), [((0.5, 0.0), False), ((0.12, 0.0), True)])
def test_processes_judge_together_whether_masks_have_collapsed(means: tuple[float, float], collapsed: bool) -> None:
    def look(rank: int) -> None:
        distributed.init_process_group("gloo", rank=rank, world_size=2)
        masks = Masks(channel=None, spatial=torch.rand(1, 2, 4, 4))
        figures = {"spatial_mask": torch.tensor(means[rank]), "spatial_mask_std": torch.tensor(0.3)}
        expected = pytest.raises(AcamkdError, match=r"their mean is 0\.06") if collapsed else nullcontext()
        with expected:
            CollapseWatch(stop=True).look(masks, figures, WATCH_EVERY - 1, "ACAM")

    assert leaving.together(look) == [0, 0]


def test_fewer_validation_images_than_processes_are_one_message(raw: dict[str, Any], tmp_path: Path) -> None:
    write_scenes(tmp_path / "data", train=8, val=1, size=(64, 64), seed=0, task=raw["task"])
    recipe = _shared({**raw, "data": {**raw["data"], "root": str(tmp_path / "data")}}, epochs=1)

    def refused(rank: int) -> None:
        with pytest.raises(AcamkdError, match=r"validation images for 2 processes: 1; lower"):
            distill(recipe, out=tmp_path / "run")

    assert leaving.together(refused) == [0, 0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp_notebook", "ddp_spawn"])
def test_processes_that_would_be_forks_are_refused_before_the_training(
    strategy: str, raw: dict[str, Any], tmp_path: Path
) -> None:
    recipe = _shared(raw, strategy=strategy)
    with pytest.raises(AcamkdError, match=f"train.strategy {strategy} with 2 devices would train in forks"):
        distill(recipe, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_notebook_with_several_devices_is_refused_before_the_training(
    raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning.pytorch.trainer.connectors.accelerator_connector._IS_INTERACTIVE", True)
    with pytest.raises(
        AcamkdError, match=r"train.strategy auto with 2 devices .* set train.devices to 1, as notebooks"
    ):
        distill(_shared(raw), out=tmp_path / "run")


def test_too_few_images_for_so_many_processes_are_one_message(raw: dict[str, Any], tmp_path: Path) -> None:
    recipe = _shared(raw, epochs=1, batch_size=5)

    def refused(rank: int) -> None:
        with pytest.raises(AcamkdError, match="do not make one batch of 5 for each of 2 processes: lower"):
            distill(recipe, out=tmp_path / "run")

    assert leaving.together(refused) == [0, 0]


def test_slurm_is_recognized(raw: dict[str, Any], tmp_path: Path) -> None:
    recipe = _shared(raw, epochs=1)
    assert leaving.together(lambda rank: distill(recipe, out=tmp_path / "run"), _slurm) == [0, 0]
    assert open_run(tmp_path / "run").metrics["processes"] == 2


def test_a_cell_of_two_processes_is_one(raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trials = plan(_shared(raw, epochs=1), ["acam"], 1, tmp_path / "results")
    assert leaving.together(lambda rank: run_trial(trials, 1, tmp_path / "results")) == [0, 0]
    assert trials[1].read(tmp_path / "results") is not None


def test_devices_that_are_not_there_are_one_message(raw: dict[str, Any], tmp_path: Path) -> None:
    train = {**raw["train"], "accelerator": "gpu", "devices": 64}
    with pytest.raises(AcamkdError, match=r"train: this machine, or what launched it, cannot run accelerator"):
        distill(config.parse({**raw, "train": train}), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
