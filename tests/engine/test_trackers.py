"""One interrupted and resumed training that logs to every tracker installed, read back by each tracker's own means."""

from __future__ import annotations

import csv
import json
import logging
import struct
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

import tiny
from acamkd import config
from acamkd.engine import trackers
from acamkd.engine.mask_history import mask_sheets, mask_values
from acamkd.engine.runs import Run
from acamkd.engine.trackers import MLflow, TensorBoard, WeightsAndBiases, build_trackers, check_installed, tracked_name
from acamkd.errors import AcamkdError
from acamkd.jobs.train import distill

KEY = "segmentation_head.0/acam"


def _trained(folder: Path, *names: str) -> Run:
    """A training that was interrupted and resumed, logged to those of some trackers that are installed."""
    root = tiny.write_data(folder / "scenes")
    settings: dict[str, Any] = {
        "wandb": {"name": "wandb", "mode": "offline"},
        "mlflow": {"name": "mlflow", "tracking_uri": f"sqlite:///{folder / 'mlflow.db'}"},
    }
    loggers = ["csv", *(settings.get(name, name) for name in names if find_spec(name))]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("WANDB_SILENT", "true")
        recipe = tiny.recipe(root, loggers=loggers)
        with pytest.MonkeyPatch.context() as interrupted:
            tiny.interrupt_at(interrupted, epoch=1, batch=1)
            with pytest.raises(KeyboardInterrupt):
                distill(recipe, out=folder / "run")
        return distill(recipe, out=folder / "run", resume=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return _trained(tmp_path_factory.mktemp("tracked"), "tensorboard")


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Slow: imports, and MLflow's new database."""
    return _trained(tmp_path_factory.mktemp("tracked"), "wandb", "mlflow")


def _rows(run: Run) -> list[dict[str, str]]:
    with (run.folder / "logs/metrics.csv").open(newline="") as lines:
        return list(csv.DictReader(lines))


def _steps(run: Run, name: str) -> dict[int, float]:
    """What the step log has of one value."""
    return {int(row["step"]): float(row[name]) for row in _rows(run) if row[name]}


TRACKED = ("loss_step", "loss/task/cross_entropy_step", f"loss/{KEY}/spatial_step", f"{KEY}/spatial_mask_step", "mIoU")


def test_tensorboard_reads_every_value_once(run: Run) -> None:
    pytest.importorskip("tensorboard", reason="pip install 'acamkd[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.folder / "logs/tensorboard"), {"images": 0, "scalars": 0})
    events.Reload()
    for name in TRACKED:
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(step, pytest.approx(value)) for step, value in _steps(run, name).items()]
    rates = [event.value for event in events.Scalars("lr/student")]
    assert len(rates) == 4
    assert max(rates) == pytest.approx(1e-3, rel=0.2)
    assert {event.value for event in events.Scalars(f"weight/{KEY}/weight")} == {1.0}
    assert [event.step for event in events.Images(f"masks/{KEY}/spatial")] == [0, 1, 3]
    [text] = events.Tensors("recipe/text_summary")
    assert config.dump(run.recipe).encode() in text.tensor_proto.string_val[0]


@pytest.mark.slow
def test_mlflow_has_one_run_with_every_value(elsewhere: Run) -> None:
    pytest.importorskip("mlflow", reason="pip install 'acamkd[mlflow]'")
    from mlflow import MlflowClient

    [logger] = [logger for logger in elsewhere.recipe.train.loggers if logger.name == "mlflow"]
    client = MlflowClient(logger.tracking_uri)
    experiment = client.get_experiment_by_name("tiny")
    [found] = client.search_runs([experiment.experiment_id])
    assert (found.info.run_name, found.info.status) == ("run", "FINISHED")
    for name in TRACKED:
        history = {each.step: each.value for each in client.get_metric_history(found.info.run_id, name)}
        assert history == pytest.approx(_steps(elsewhere, name))
    assert found.data.params["losses/0/name"] == "acam"
    assert {file.path for file in client.list_artifacts(found.info.run_id)} == {"images", "recipe.yaml"}
    assert client.download_artifacts(found.info.run_id, "recipe.yaml")
    assert len(client.list_artifacts(found.info.run_id, "images")) >= 6  # two kinds of masks at three times


@pytest.mark.slow
def test_wandb_keeps_the_run_on_the_disk(elsewhere: Run) -> None:
    pytest.importorskip("wandb", reason="pip install 'acamkd[wandb]'")
    files = sorted((elsewhere.folder / "logs/wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2  # the interrupted training, and its end
    assert len({file.name for file in files}) == 1  # one run for W&B
    for name in TRACKED:
        found = {int(row["trainer/global_step"]): row[name] for file in files for row in _history(file) if name in row}
        assert found == pytest.approx(_steps(elsewhere, name))
    assert list((elsewhere.folder / "logs/wandb").glob("*/files/media/images/masks/**/*.png"))


def _history(file: Path) -> Iterator[dict[str, Any]]:
    """Rows of W&B's log, which has LevelDB's form: chunks with a head of 7 bytes in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, part = file.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        part += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last chunk
            record, part = Record.FromString(part), b""
            if record.WhichOneof("record_type") == "history":
                yield {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
                }


@pytest.mark.slow
def test_the_step_log_is_what_it_is_alone(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = distill(run.recipe, overrides=["train.loggers=[csv]"], out=tmp_path / "alone")
    for table in ("history.csv", "logs/metrics.csv"):
        assert tiny.rows(run.folder / table) == tiny.rows(alone.folder / table)
    assert run.weights.read_bytes() == alone.weights.read_bytes()
    assert [file.name for file in (alone.folder / "logs").iterdir()] == ["metrics.csv"]


class _Broken(TensorBoard):
    """Breaks at its third value."""

    def _log_values(self, live: Any, values: Any, step: int) -> None:
        if step >= 2:
            raise ConnectionError("the server is gone\nand more")
        super()._log_values(live, values, step)


def test_a_tracker_that_breaks_is_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("tensorboard", reason="pip install 'acamkd[tensorboard]'")
    tracker = _Broken(config.Logger(name="tensorboard"), _recipe(), tmp_path)
    tracker.log_metrics({"a": 1.0}, 0)  # not begun: another process than the first never is
    assert not (tmp_path / "logs").exists()
    tracker.begin(0)
    for step in range(5):
        tracker.log_metrics({"a": 1.0}, step)
    tracker.log_image("b", np.zeros((2, 2, 3), np.uint8), 5)
    tracker.finalize("success")
    assert [record.message for record in caplog.records if record.levelno == logging.WARNING] == [
        "tensorboard does not work and gets nothing more, the training goes on: the server is gone"
    ]


@pytest.mark.slow
def test_an_unreachable_mlflow_is_given_up_within_seconds(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("mlflow", reason="pip install 'acamkd[mlflow]'")
    tracker = MLflow(config.Logger(name="mlflow", tracking_uri="http://127.0.0.1:9"), _recipe(), tmp_path)
    tracker.begin(0)
    tracker.log_metrics({"a": 1.0}, 0)
    assert "mlflow does not work and gets nothing more, the training goes on" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("key", ["", "a" * 40])
def test_wandb_without_key_or_network_logs_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, key: str
) -> None:
    pytest.importorskip("wandb", reason="pip install 'acamkd[wandb]'")
    for name, value in {"HOME": str(tmp_path), "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setattr(trackers, "PATIENCE", 3)
    tracker = WeightsAndBiases(config.Logger(name="wandb"), _recipe(), tmp_path / "run")
    tracker.begin(0)
    tracker.log_metrics({"a": 1.0}, 0)
    tracker.finalize("success")
    assert "wandb logs offline" in caplog.text
    assert "wandb sync" in caplog.text
    assert list((tmp_path / "run/logs/wandb").glob("offline-run-*/run-*.wandb"))


def _recipe(**train: Any) -> config.Recipe:
    return tiny.recipe(Path("nowhere"), **train)


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    check_installed(_recipe())
    with pytest.raises(AcamkdError, match=r"mlflow is not installed: pip install 'acamkd\[mlflow\]', or leave it out"):
        check_installed(_recipe(loggers=["csv", "mlflow"]))
    for job in (lambda recipe: distill(recipe, dry_run=True), lambda recipe: distill(recipe, out=tmp_path / "run")):
        with pytest.raises(AcamkdError, match="wandb is not installed"):
            job(_recipe(loggers=["wandb"]))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("uri", ["postgresql://me:secret@host/db", "postgresql://host/db?password=secret"])
def test_a_password_gets_into_no_file(uri: str) -> None:
    with pytest.raises(AcamkdError, match=r"a user or password, which would get into every run .* MLFLOW"):
        check_installed(_recipe(loggers=[{"name": "mlflow", "tracking_uri": uri}]))


def test_a_folder_of_the_name_is_no_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(AcamkdError, match="wandb is not installed"):
        check_installed(_recipe(loggers=["wandb"]))


def test_names_are_the_same_everywhere() -> None:
    assert tracked_name("IoU/traffic light") == "IoU/traffic light"
    assert tracked_name("backbone:1@2/acam/spatial_mask_step") == "backbone_1_2/acam/spatial_mask_step"


def test_loggers_of_a_recipe(tmp_path: Path) -> None:
    assert build_trackers(_recipe(), tmp_path) == []
    recipe = _recipe(loggers=["csv", {"name": "wandb", "mode": "offline"}])
    assert config.parse({**recipe.model_dump(mode="json")}) == recipe
    assert recipe.model_dump(mode="json")["train"]["loggers"] == ["csv", {"name": "wandb", "mode": "offline"}]
    for loggers, message in (
        (["csv", "csv"], "train.loggers: csv stands there twice"),
        (["wandbb"], "train.loggers.0.name: Input should be 'csv', 'tensorboard', 'wandb' or 'mlflow' "),
        ("csv", "train.loggers: must be a list"),
        ([{"name": "mlflow", "project": "a"}], "train.loggers.0: mlflow has no project: leave it out"),
        ([{"name": "csv", "mode": "offline"}], "train.loggers.0: csv has no mode: leave it out, or set"),
        ([{"name": "wandb", "projct": "a"}], "train.loggers.0.projct: unknown key; did you mean project"),
    ):
        with pytest.raises(AcamkdError, match=message):
            _recipe(loggers=loggers)


def test_a_run_may_resume_with_other_loggers(tmp_path: Path) -> None:
    one, other = _recipe(), _recipe(loggers=["tensorboard"])
    assert Run(tmp_path, one, "student")._content(one) == Run(tmp_path, one, "student")._content(other)


def test_a_tracker_that_a_resumed_run_begins_with_gets_the_recipe(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="pip install 'acamkd[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for step in (5, 9):  # the second time its events are there
        (tracker,) = build_trackers(_recipe(loggers=["tensorboard"]), tmp_path)
        tracker.begin(step)
        tracker.finalize("success")
        events = EventAccumulator(str(tmp_path / "logs/tensorboard")).Reload()
        assert len(events.Tensors("recipe/text_summary")) == 1


def test_statistics_and_drawing_of_masks() -> None:
    spatial = np.zeros((2, 3, 4, 5), np.uint8)
    spatial[:, 0, :2] = 255  # the first mask is half open, the others are closed
    found = {
        "x/acam/student": np.zeros((2, 1, 4, 5), np.uint8),
        "x/acam/spatial": spatial,
        "x/acam/spatial/figures": np.array([0.2, 0.3, 0.4]),
        "x/fgd/boxes": np.full((2, 1, 4, 5), 255, np.uint8),
        "x/fgd/boxes/figures": np.array([1.0, 0.0, 1.0]),
        "x/acam/channel": np.full((2, 3, 7), 51, np.uint8),
        "x/acam/channel/figures": np.array([0.2, 0.0, 1.0]),
    }
    values = mask_values(found)
    assert {name: values[f"x/acam/spatial/{name}"] for name in ("mean", "std", "overlap")} == {
        "mean": 0.2, "std": 0.3, "overlap": 0.4,
    }  # fmt: skip
    assert values["x/acam/spatial/collapsed"] == pytest.approx(2 / 3)
    assert values["x/acam/channel/collapsed"] == 1
    assert "x/fgd/boxes/collapsed" not in values
    images = [torch.full((3, 40, 50), 7, dtype=torch.uint8)] * 2
    sheets = mask_sheets(found, images)
    assert set(sheets) == {"x/acam/spatial", "x/fgd/boxes", "x/acam/channel"}
    sheet = sheets["x/acam/spatial"]
    scale = 96 // 5
    assert sheet.shape == (2 * (4 * scale + 2), 4 * (5 * scale + 2), 3)
    assert (sheet[1 : 1 + 4 * scale, 1 : 1 + 5 * scale] == 7).all()  # the image
    first = sheet[1 : 1 + 4 * scale, 5 * scale + 3 : 10 * scale + 3]
    assert first[: 2 * scale].min() == 255
    assert first[2 * scale :].max() == 0
    assert sheets["x/acam/channel"].shape == (2 * (3 * 13 + 2), 7 * 13 + 2, 3)


class _Wandb:
    """Stands for Lightning's logger of W&B, which needs the package."""

    made: ClassVar[list[_Wandb]] = []
    exit_code: int

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.experiment = SimpleNamespace(finish=lambda exit_code: setattr(self, "exit_code", exit_code))
        self.made.append(self)

    def log_hyperparams(self, params: dict[str, Any]) -> None:
        self.params = params

    def save(self) -> None:
        """Hold nothing back."""


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """W&B with a key that its server takes."""
    module = SimpleNamespace(login=lambda prompt: True, Settings=lambda **settings: settings)
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(trackers, "WandbLogger", _Wandb)
    monkeypatch.setattr(_Wandb, "made", [])
    for name in ("WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    return module


def _unreachable(prompt: bool) -> bool:
    raise ConnectionError("no route to https://me:secret@wandb.example\nand more")


@pytest.mark.parametrize(
    ("login", "reason"),
    [
        (lambda prompt: False, "no API key is known (`wandb login` stores one)"),
        (_unreachable, "no route to https://wandb.example"),
    ],
)
def test_wandb_that_cannot_log_in_says_how_to_upload_later(
    login: Any, reason: str, wandb: SimpleNamespace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wandb.login = login
    WeightsAndBiases(config.Logger(name="wandb"), _recipe(), tmp_path).begin(0)
    assert caplog.messages == [
        f"wandb logs offline: {reason}; `wandb sync {tmp_path}/logs/wandb/offline-run-*` uploads the run"
    ]
    [live] = _Wandb.made
    assert (live.options["mode"], live.options["resume"]) == ("offline", None)


def test_a_resumed_training_goes_on_with_its_run_at_wandb(wandb: SimpleNamespace, tmp_path: Path) -> None:
    tracker = WeightsAndBiases(config.Logger(name="wandb", project="cells", entity="lab"), _recipe(), tmp_path)
    for step, status in ((0, "failed"), (7, "success"), (0, "success")):
        tracker.begin(step)
        tracker.finalize(status)
    first, resumed, anew = _Wandb.made
    assert first.options["id"] == resumed.options["id"] != anew.options["id"]
    assert [live.exit_code for live in _Wandb.made] == [1, 0, 0]
    assert [hasattr(live, "params") for live in _Wandb.made] == [True, False, True]  # a run gets its recipe once
    wanted = {"mode": "online", "resume": "allow", "project": "cells", "entity": "lab", "name": tmp_path.name}
    assert first.options | wanted == first.options


def test_wandb_does_not_log_in_where_the_recipe_says_offline(wandb: SimpleNamespace, tmp_path: Path) -> None:
    wandb.login = None
    WeightsAndBiases(config.Logger(name="wandb", mode="offline"), _recipe(), tmp_path).begin(0)
    assert [live.options["mode"] for live in _Wandb.made] == ["offline"]


class _Mlflow:
    """Stands for Lightning's logger of MLflow, which needs the package; its experiment notes every call."""

    made: ClassVar[list[_Mlflow]] = []

    def __init__(self, experiment: str, *, run_name: str, tracking_uri: str, run_id: str | None) -> None:
        self.uri, self.run_id = tracking_uri, run_id or f"run-{len(self.made)}"
        self.calls: list[tuple[Any, ...]] = []
        self.experiment = SimpleNamespace(
            log_batch=lambda run_id, metrics: self.calls.append(("batch", run_id, metrics)),
            log_text=lambda run_id, text, name: self.calls.append(("text", run_id, name)),
            update_run=lambda run_id, status: self.calls.append(("update", run_id, status)),
        )
        self.made.append(self)

    def log_hyperparams(self, params: dict[str, Any]) -> None:
        self.params = params

    def finalize(self, status: str) -> None:
        self.calls.append(("end", status))


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow with a server whose address holds a password."""
    module = SimpleNamespace(get_tracking_uri=lambda: "https://me:secret@host")
    monkeypatch.setitem(sys.modules, "mlflow", module)
    monkeypatch.setitem(sys.modules, "mlflow.entities", SimpleNamespace(Metric=lambda *values: values))
    monkeypatch.setattr(trackers, "MLFlowLogger", _Mlflow)
    monkeypatch.setattr(_Mlflow, "made", [])
    for name in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        monkeypatch.setenv(name, "1")


@pytest.mark.usefixtures("mlflow")
def test_a_resumed_training_goes_on_with_its_run_at_the_same_mlflow(tmp_path: Path) -> None:
    for step, settings in ((0, {}), (5, {}), (9, {"tracking_uri": "http://other"})):
        tracker = MLflow(config.Logger(name="mlflow", **settings), _recipe(), tmp_path)
        tracker.begin(step)
        tracker.finalize("success")
    first, resumed, other = _Mlflow.made
    assert [live.run_id for live in _Mlflow.made] == ["run-0", "run-0", "run-2"]
    assert [live.uri for live in _Mlflow.made] == ["https://me:secret@host"] * 2 + ["http://other"]
    assert resumed.calls == [("update", "run-0", "RUNNING"), ("end", "success")]
    assert first.params["losses/0/name"] == "acam"
    assert ("text", "run-2", "recipe.yaml") in other.calls
    assert "secret" not in (tmp_path / "logs/mlflow-run.txt").read_text()


@pytest.mark.usefixtures("mlflow")
def test_mlflow_gets_the_values_of_many_steps_with_few_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(trackers, "time", SimpleNamespace(time=lambda: now, monotonic=lambda: now))
    monkeypatch.setattr(trackers, "LARGEST", 4)
    tracker = MLflow(config.Logger(name="mlflow"), _recipe(), tmp_path)
    tracker.begin(0)
    for step in range(8):
        tracker.log_metrics({"loss@1": float(step)}, step)
        now += 2.0
    tracker.finalize("success")
    [live] = _Mlflow.made
    batches = [[(name, value, step) for name, value, _, step in each[2]] for each in live.calls if each[0] == "batch"]
    assert [len(batch) for batch in batches] == [1, 4, 2, 1]  # at once, after more than 10 seconds in two, at the end
    assert [value for batch in batches for value in batch] == [("loss_1", float(step), step) for step in range(8)]
    assert live.calls[-1] == ("end", "success")
