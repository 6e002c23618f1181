from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any, Literal

import pytest
import segmentation_models_pytorch as smp
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.models.detection import RetinaNet

import leaving
import tiny
from acamkd import cli, config, models
from acamkd.data.scenes import CLASSES
from acamkd.engine import runs
from acamkd.engine.module import TrainingModule
from acamkd.engine.runs import LOCK, OtherRunError
from acamkd.errors import AcamkdError
from acamkd.jobs.fit import hash_of
from acamkd.jobs.setup import Batches, teacher_section
from acamkd.jobs.train import distill, train
from acamkd.models.base import head_of
from acamkd.report.run import write_report


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_data(tmp_path_factory.mktemp("data") / "segmentation")


@pytest.fixture(scope="module")
def whole(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A distillation of three epochs that nothing disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    distill(tiny.recipe(root, epochs=3), out=folder)
    return folder


def test_an_epoch_may_be_a_number_of_steps(root: Path, tmp_path: Path) -> None:
    falling = config.Schedule(name="polynomial")  # needs the number of all steps
    run = train(tiny.recipe(root, steps_per_epoch=3, accumulate=2, schedule=falling.model_dump()), out=tmp_path / "run")
    assert [(row["epoch"], row["step"]) for row in tiny.rows(run.folder / "history.csv")] == [("1", "3"), ("2", "6")]


def test_a_run_folder_holds_all_that_is_promised(whole: Path, root: Path) -> None:
    assert {file.name for file in whole.iterdir()} >= {
        "recipe.yaml", "metrics.json", "history.csv", "log.txt", "logs", "last.ckpt", "student.safetensors",
    }  # fmt: skip
    metrics = json.loads((whole / "metrics.json").read_text())
    history = tiny.rows(whole / "history.csv")
    best = max(history, key=lambda row: float(row["mIoU"]))
    assert metrics["task"] == "segmentation"
    assert metrics["metric"] == "mIoU"
    assert metrics["best_epoch"] == int(best["epoch"])
    assert metrics["student"] == pytest.approx(
        {name: float(best[name]) for name in ("mIoU", *(f"IoU/{each}" for each in ("background", *CLASSES)))}
    )
    assert set(metrics["teacher"]) == set(metrics["student"])
    assert metrics["parameters"] == sum(p.numel() for p in _plain_fpn().parameters())
    assert metrics["seed"] == 0
    assert metrics["device"] == "cpu"
    assert set(metrics["versions"]) >= {"acamkd", "torch", "lightning", "timm"}
    assert re.fullmatch(r"\w+, \w+, \d+ threads?", metrics["machine"])
    assert set(metrics["data"]) == {"train", "val"}
    assert config.load(whole / "recipe.yaml") == tiny.recipe(root, epochs=3)
    log = (whole / "log.txt").read_text()
    assert log.count("WARNING") == log.count("WARNING this teacher scores almost nothing") == 1  # it is random
    assert f"teacher: mIoU {metrics['teacher']['mIoU']:.2f}" in log
    assert log.index("teacher: mIoU") < log.index("epoch 1/3")  # before the first epoch
    assert f"best mIoU {metrics['student']['mIoU']:.2f} at epoch {metrics['best_epoch']}" in log


def _plain_fpn() -> torch.nn.Module:
    net: torch.nn.Module = smp.create_model(
        "fpn", encoder_name=tiny.FPN["backbone"], encoder_weights=None, classes=6, **tiny.FPN["options"]
    )  # fmt: skip
    return net


def test_the_student_loads_without_acamkd(whole: Path) -> None:
    net = _plain_fpn()
    net.load_state_dict(load_file(whole / "student.safetensors"), strict=True)
    assert torch.equal(net.state_dict()["segmentation_head.0.weight"],
                       load_file(whole / "student.safetensors")["segmentation_head.0.weight"])  # fmt: skip


def test_a_detector_trains_and_loads_without_acamkd(tmp_path: Path) -> None:
    recipe = tiny.recipe(tiny.write_data(tmp_path / "data", "detection"), "detection", epochs=1)
    metrics = train(recipe, out=tmp_path / "run").metrics
    assert metrics["metric"] == "mAP"
    assert set(metrics["student"]) == {"mAP", "AP50", "AP75", "AP_s", "AP_m", "AP_l", *(f"AP/{c}" for c in CLASSES)}
    (row,) = tiny.rows(tmp_path / "run" / "history.csv")
    assert float(row["loss"]) == pytest.approx(
        float(row["loss/task/classification"]) + float(row["loss/task/bbox_regression"])
    )
    built: Any = models.build(config.Model(**tiny.RETINANET), "detection", 5).net
    net = RetinaNet(built.backbone, num_classes=6, anchor_generator=built.anchor_generator)
    net.load_state_dict(load_file(tmp_path / "run" / "student.safetensors"), strict=True)


def test_the_teacher_comes_out_as_it_went_in(whole: Path, root: Path) -> None:
    net = _plain_fpn()
    net.load_state_dict(load_file(root / "teacher.safetensors"))
    assert json.loads((whole / "metrics.json").read_text())["teacher_sha256"] == hash_of(net)


def test_a_teacher_that_changes_is_a_bug(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(self: TrainingModule) -> None:
        next(self.distiller.teacher.net.parameters()).data += 1

    monkeypatch.setattr(TrainingModule, "on_train_start", spoil)
    with pytest.raises(RuntimeError, match="the teacher changed"):
        distill(tiny.recipe(root, epochs=1), out=tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_one_seed_one_run_whatever_the_number_of_workers(whole: Path, root: Path, tmp_path: Path) -> None:
    raw = tiny.raw_recipe(root, epochs=3)
    raw["data"]["workers"] = 2
    distill(config.parse(raw), out=tmp_path / "run")
    tiny.assert_same(whole, tmp_path / "run")


def test_another_seed_another_run(whole: Path, root: Path, tmp_path: Path) -> None:
    distill(tiny.recipe(root, epochs=1, seed=1), out=tmp_path / "run")
    assert tiny.rows(tmp_path / "run" / "history.csv")[0]["loss"] != tiny.rows(whole / "history.csv")[0]["loss"]


def test_alone_and_distilled_start_from_the_same_weights_and_images(whole: Path, root: Path, tmp_path: Path) -> None:
    train(tiny.recipe(root, epochs=3), out=tmp_path / "alone")
    first = [tiny.rows(folder / "logs" / "metrics.csv")[0] for folder in (whole, tmp_path / "alone")]
    assert first[0]["loss/task/cross_entropy_step"] == first[1]["loss/task/cross_entropy_step"] != ""
    assert (
        float(first[0]["loss_step"]) > float(first[1]["loss_step"]) == float(first[1]["loss/task/cross_entropy_step"])
    )
    metrics = json.loads((tmp_path / "alone" / "metrics.json").read_text())
    assert "teacher" not in metrics
    kept = config.load(tmp_path / "alone" / "recipe.yaml")
    assert (kept.teacher, kept.losses) == (None, ())  # nothing that the run did not depend on


def test_distill_finds_the_teacher_that_was_trained_before(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    raw = tiny.raw_recipe(root, epochs=1)
    raw["teacher"]["weights"] = None
    with pytest.raises(AcamkdError, match=r"the teacher has no weights: set teacher.weights, or train it first .* "
                                          r"writes runs/tiny/teacher/teacher.safetensors"):  # fmt: skip
        distill(config.parse(raw))
    assert not (tmp_path / "runs").exists()
    trained = train(config.parse(raw), "teacher").metrics
    assert (tmp_path / "runs/tiny/teacher/teacher.safetensors").is_file()
    metrics = distill(config.parse(raw)).metrics
    assert metrics["teacher"] == pytest.approx(trained["teacher"])
    kept = config.load(tmp_path / "runs/tiny/distilled/recipe.yaml")
    assert kept.teacher is not None
    assert kept.teacher.weights == "runs/tiny/teacher/teacher.safetensors"
    # What an interrupted training has left so far is not taken for the teacher.
    (tmp_path / "runs/tiny/teacher/metrics.json").rename(tmp_path / "metrics.json")
    with pytest.raises(AcamkdError, match=r"runs/tiny/teacher: the teacher's training has not ended: .* --resume goes"):
        distill(config.parse(raw), overwrite=True)
    (tmp_path / "metrics.json").rename(tmp_path / "runs/tiny/teacher/metrics.json")
    # A factory may bring weights of its own, but what was trained is newer.
    factory = config.load(
        tmp_path / "runs/tiny/distilled/recipe.yaml", ["teacher.weights=null", "teacher.arch=own:net"]
    )
    assert teacher_section(factory).weights == kept.teacher.weights
    assert teacher_section(factory.model_copy(update={"name": "other"})).weights is None


def test_the_colors_of_a_downloaded_backbone_stay_with_the_run(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some of smp's encoders were pretrained with others than ImageNet's, which only the download tells."""
    create, half = smp.create_model, {"mean": [0.5, 0.5, 0.5], "std": [1 / 255, 0.5, 0.5]}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        smp, "create_model", lambda *args, **options: create(*args, **options | {"encoder_weights": None})
    )
    monkeypatch.setattr(smp.encoders, "get_preprocessing_params", lambda encoder: half)
    raw = tiny.raw_recipe(root, epochs=1)
    network = {"arch": "fpn", "backbone": "resnet18", "options": tiny.FPN["options"]}
    recipe = config.parse({**raw, "student": network, "teacher": network})
    for role in ("teacher", "student"):
        trained = train(recipe, role)
        monkeypatch.setattr(smp.encoders, "get_preprocessing_params", None)
        assert torch.equal(trained.load().mean.flatten(), torch.tensor(half["mean"]))
        assert torch.equal(trained.load().std.flatten(), torch.tensor(half["std"]))
        monkeypatch.setattr(smp.encoders, "get_preprocessing_params", lambda encoder: half)
    named = config.override(recipe, ["teacher.weights=runs/tiny/teacher/teacher.safetensors"])
    assert teacher_section(recipe).mean == teacher_section(named).mean == (0.5, 0.5, 0.5)


def test_an_interrupted_run_resumes_to_the_same_end(
    whole: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recipe, folder = tiny.recipe(root, epochs=3), tmp_path / "run"
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        tiny.interrupt_at(patch, epoch=1, batch=1)
        with pytest.raises(KeyboardInterrupt):
            distill(recipe, out=folder)
    assert caplog.messages[-1] == f"{folder}: interrupted after epoch 1 of 3; --resume goes on at the last checkpoint"
    assert signal.getsignal(signal.SIGINT) is before  # the next Ctrl-C works, too
    assert [row["epoch"] for row in tiny.rows(folder / "history.csv")] == ["1"]
    assert not (folder / "metrics.json").exists()
    metrics = distill(recipe, out=folder, resume=True).metrics
    tiny.assert_same(whole, folder)
    clocks = {"seconds": 0, "cpu_seconds": 0}
    assert metrics | clocks == json.loads((whole / "metrics.json").read_text()) | clocks


def test_a_ramp_and_a_stop_beyond_the_end_are_said(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("acamkd.jobs.train.fit", lambda run, *_, **__: run)
    assigned = (
        ["losses.0.ramp_epochs=1", "losses.0.stop_epoch=0.5"],
        ["losses.0.ramp_epochs=3", "losses.0.stop_epoch=2"],
    )
    for number, overrides in enumerate(assigned):
        distill(tiny.recipe(root, epochs=2), overrides=overrides, out=tmp_path / str(number))
    assert [message for message in caplog.messages if "_epoch" in message] == [
        "losses.0.ramp_epochs 3: the training ends with epoch 2, so that the loss never has its whole weight",
        "losses.0.stop_epoch 2 changes nothing: the training ends with epoch 2",
    ]


def test_a_run_resumes_with_the_images_and_the_teacher_that_it_was_begun_with(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, folder = shutil.copytree(root, tmp_path / "data"), tmp_path / "run"
    recipe, weights = tiny.recipe(own, epochs=2), own / "teacher.safetensors"
    with monkeypatch.context() as patch:
        tiny.interrupt_at(patch, epoch=1, batch=0)
        with pytest.raises(KeyboardInterrupt):
            distill(recipe, out=folder)
    mask = next((own / "masks/val").iterdir())
    labels, tensors = mask.read_bytes(), load_file(weights)
    Image.open(mask).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(mask)
    with pytest.raises(OtherRunError, match=r"begun with other contents of: the val images: put back .* --overwrite"):
        distill(recipe, out=folder, resume=True)
    mask.write_bytes(labels)
    save_file({name: tensor + tensor.is_floating_point() for name, tensor in tensors.items()}, weights)
    with pytest.raises(OtherRunError, match="begun with other contents of: the teacher's weights"):
        distill(recipe, out=folder, resume=True)
    save_file(tensors, weights)
    assert distill(recipe, out=folder, resume=True).has_ended


def test_resuming_a_finished_run_changes_nothing_and_writes_a_missing_report(
    whole: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []
    monkeypatch.setattr("acamkd.jobs.fit.write_report", lambda run: written.append(run.folder))
    before = (whole / "history.csv").read_bytes(), (whole / "student.safetensors").read_bytes()
    steps, metrics = tiny.rows(whole / "logs" / "metrics.csv"), json.loads((whole / "metrics.json").read_text())
    assert distill(tiny.recipe(root, epochs=3), out=whole, resume=True).metrics == metrics
    assert ((whole / "history.csv").read_bytes(), (whole / "student.safetensors").read_bytes()) == before
    assert tiny.rows(whole / "logs" / "metrics.csv") == steps
    assert written == [whole]


def test_a_finished_run_without_its_checkpoints_is_finished(
    whole: Path, root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, reports: None
) -> None:
    folder = shutil.copytree(whole, tmp_path / "run")
    (folder / "report.html").write_text("as it is", encoding="utf-8")
    for file in folder.glob("*.ckpt"):
        file.unlink()
    before = {file: file.read_bytes() for file in folder.rglob("*.*") if file.name != "log.txt"}
    run = distill(tiny.recipe(root, epochs=3), out=folder, resume=True)
    assert f"{folder}: all epochs are done already" in caplog.messages
    assert run.metrics["best_epoch"] >= 1
    assert {file: file.read_bytes() for file in before} == before


def test_a_run_without_a_finished_epoch_starts_anew(
    whole: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recipe, folder = tiny.recipe(root, epochs=3), tmp_path / "run"
    with monkeypatch.context() as patch:
        tiny.interrupt_at(patch, epoch=0, batch=1)
        with pytest.raises(KeyboardInterrupt):
            distill(recipe, out=folder)
    assert not (folder / "last.ckpt").exists()
    distill(recipe, out=folder, resume=True)
    assert f"{folder} has no finished epoch to resume from: the training starts anew" in caplog.messages
    tiny.assert_same(whole, folder)


def test_only_the_same_recipe_and_command_resume(whole: Path, root: Path) -> None:
    def state() -> list[tuple[str, int]]:
        return sorted((file.name, file.stat().st_mtime_ns) for file in whole.iterdir() if file.name != LOCK)

    before = state()
    with pytest.raises(AcamkdError, match=r"already holds a run: --resume continues it, --overwrite replaces it"):
        distill(tiny.recipe(root, epochs=3), out=whole)
    with pytest.raises(AcamkdError, match="was made by another recipe or command"):
        distill(tiny.recipe(root, epochs=4), out=whole, resume=True)
    roles: tuple[Literal["student", "teacher"], ...] = ("student", "teacher")
    for role in roles:
        with pytest.raises(AcamkdError, match="was made by another recipe or command"):
            train(tiny.recipe(root, epochs=3), role, out=whole, resume=True)
    assert state() == before
    (root / "images").rename(root / "moved")
    try:
        with pytest.raises(AcamkdError, match="already holds a run"):  # before any image is looked at
            distill(tiny.recipe(root, epochs=3), out=whole)
    finally:
        (root / "moved").rename(root / "images")


def test_a_launchers_other_processes_find_the_folder_begun(
    whole: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr("acamkd.jobs.train.Batches", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    for job in (train, distill):
        with pytest.raises(KeyboardInterrupt):  # rather than that the folder holds a run already
            job(tiny.recipe(root, epochs=3), out=whole)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [("student.backbone=tu-resnet_of_nobody", "resnet_of_nobody"), ("losses.0.pairs=[nowhere]", "nowhere")],
)
def test_what_a_recipe_misspells_is_said_before_the_images_are_looked_at(
    wrong: str, said: str, whole: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Batches, "check", lambda _: pytest.fail("it looked at the images"))
    with pytest.raises(AcamkdError, match=said):
        distill(config.override(tiny.recipe(root), [wrong]), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_overwriting_leaves_nothing_of_the_old_run(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(tiny.recipe(root, epochs=1), "teacher", out=folder)
    train(tiny.recipe(root, epochs=2), out=folder, overwrite=True)
    assert not (folder / "teacher.safetensors").exists()
    assert len(tiny.rows(folder / "history.csv")) == 2
    assert {row["epoch"] for row in tiny.rows(folder / "logs" / "metrics.csv")} == {"0", "1"}


def test_a_loss_that_explodes_names_the_term_and_the_step(root: Path, tmp_path: Path) -> None:
    raw = tiny.raw_recipe(root)
    raw["losses"] = [{"name": "fitnet", "pairs": ["segmentation_head.0"], "weight": 1e39}]
    with pytest.raises(AcamkdError, match=r"step 0: the loss is not finite, segmentation_head.0/fitnet/feature is inf"):
        distill(config.parse(raw), out=tmp_path / "run")


def test_ctrl_c_is_one_line_and_exit_code_130(root: Path, tmp_path: Path) -> None:
    raw = tiny.raw_recipe(root, epochs=500)
    raw["data"]["workers"] = 1
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw))

    def job() -> None:
        os.setpgid(0, 0)
        # A suite that was started in the background hands an ignored SIGINT down to its children.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(tmp_path)
        sys.argv = ["acamkd", "train", "recipe.yaml", "--out", "run"]
        sys.stderr = Path("errors.txt").open("w", encoding="utf-8", buffering=1)  # noqa: SIM115 - read after the end
        os.dup2(sys.stderr.fileno(), 2)
        try:
            cli.main()
        except KeyboardInterrupt:  # which `begin` would take for the exit code
            traceback.print_exc()
            raise SystemExit(1) from None

    child, deadline = leaving.begin(job), time.monotonic() + 90
    while not (tmp_path / "run" / runs.CHECKPOINT).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(child, signal.SIGINT)  # as a terminal does: the loading process gets it, too
    code, errors = leaving.exit_code(child), (tmp_path / "errors.txt").read_text(encoding="utf-8")
    assert code == 130, errors
    assert "Traceback" not in errors
    assert errors.rstrip().rpartition("\n")[2].partition(" ")[2].startswith("warning: run: interrupted after epoch")
    assert (tmp_path / "run" / "student.safetensors").is_file()


@pytest.fixture(scope="module")
def with_unlabeled(root: Path) -> dict[str, Any]:
    """A raw recipe whose validation images are the unlabeled ones."""
    raw = tiny.raw_recipe(root, epochs=2)
    raw["data"]["unlabeled"] = "images/val"
    return raw


def test_unlabeled_images_change_the_distillation_alone(
    with_unlabeled: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    raw = {**with_unlabeled, "data": {**with_unlabeled["data"], "unlabeled": None}}
    distill(config.parse(raw), out=tmp_path / "without")
    run = distill(config.parse(with_unlabeled), out=tmp_path / "with")
    assert set(run.metrics["data"]) == {"train", "val", "unlabeled"}
    loading = Batches(config.parse({**with_unlabeled, "data": {**with_unlabeled["data"], "workers": 2}}),
                      with_unlabeled=True)  # fmt: skip
    assert (loading.train.num_workers, loading.mixed.num_workers) == (0, 2)  # the former only feeds a calibration
    assert "4 unlabeled images, which only the distillation uses" in caplog.messages
    before, after = (tiny.rows(tmp_path / name / "logs/metrics.csv") for name in ("without", "with"))
    task, feature = "loss/task/cross_entropy_step", "loss/segmentation_head.0/acam/spatial_step"
    assert float(after[0][task]) == pytest.approx(float(before[0][task]), rel=1e-6)
    assert float(after[0][feature]) != pytest.approx(float(before[0][feature]), rel=1e-3)
    assert float(after[1][task]) != pytest.approx(float(before[1][task]), rel=1e-6)  # their gradient has moved it


def test_a_run_with_unlabeled_images_resumes_to_the_same_end(
    with_unlabeled: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = config.parse(with_unlabeled)
    distill(recipe, out=tmp_path / "whole")
    tiny.assert_same(tmp_path / "whole", tiny.resumed(monkeypatch, distill, recipe, tmp_path / "run").folder)


def test_only_a_distillation_uses_unlabeled_images(
    with_unlabeled: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    raw = {**with_unlabeled, "train": {**with_unlabeled["train"], "epochs": 1}}
    run = train(config.parse(raw), out=tmp_path / "alone")
    assert "data.unlabeled is not used: only a distillation learns from unlabeled images" in caplog.messages
    assert set(run.metrics["data"]) == {"train", "val"}
    raw["losses"] = [{**raw["losses"][0], "mask_grad": "task"}]
    with pytest.raises(AcamkdError, match=r"no loss can learn from unlabeled .*segmentation_head\.0/acam"):
        distill(config.parse(raw), out=tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_a_teacher_of_other_classes(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    torch.manual_seed(1)
    models.save_weights(models.build(config.Model(**tiny.FPN), "segmentation", 9).net, tmp_path / "nine.safetensors")
    raw = tiny.raw_recipe(root, epochs=1)
    raw["teacher"] = {**tiny.FPN, "weights": str(tmp_path / "nine.safetensors"), "num_classes": 9}
    for loss, message in (
        (
            raw["losses"][0],
            r"losses\.0 \(acam\): the channels of segmentation_head\.0 and segmentation_head\.0 are class",
        ),
        (
            {"name": "acam", "pairs": ["decoder"], "mask_grad": "task"},
            r"its masks learn from the teacher's own loss, but",
        ),
    ):
        raw["losses"] = [loss]
        with pytest.raises(
            AcamkdError, match=message + r".*teacher has 9 classes of its own and the student 6: compare"
        ):
            distill(config.parse(raw), out=tmp_path / "refused")
    raw["losses"] = [{"name": "fitnet", "pairs": ["decoder"]}]
    run = distill(config.parse(raw), out=tmp_path / "run")
    assert (
        "the teacher is not scored, and only features are compared: it has 9 classes of its own, the data 6"
    ) in caplog.messages
    assert run.metrics["teacher"] == {"mIoU": None}
    assert "teacher -" in repr(run)
    assert re.search(r"│ teacher │ - ", tiny.in_notebook(run)["text/plain"])
    assert head_of(run.load_teacher()).num_classes == 9
    page = write_report(run).read_text(encoding="utf-8")
    assert "against the" not in page  # there is no score to compare with
    with pytest.raises(AcamkdError, match="a teacher with classes of its own cannot be trained on these images"):
        train(config.parse(raw), "teacher", out=tmp_path / "teacher")
    raw["student"] = {**raw["student"], "num_classes": 9}
    with pytest.raises(AcamkdError, match=r"student\.num_classes: the student has the data's classes"):
        config.parse(raw)
