from __future__ import annotations

import base64
import copy
import dataclasses
import html
import io
import json
import re
import shutil
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from selenium.webdriver.common.keys import Keys
from torch import nn

import tiny
from acamkd import cli
from acamkd.distillation.distiller import Distiller
from acamkd.engine.mask_history import REPLAY, look
from acamkd.engine.runs import RECIPE, open_run
from acamkd.errors import AcamkdError
from acamkd.jobs.train import distill, train
from acamkd.losses import FGD, MasKD
from acamkd.models.segmentation import Segmenter
from acamkd.report import charts, masks, panels
from acamkd.report.run import write_report
from acamkd.report.visualize import EMBEDDED_SIDE, embed, embed_mask, hex_color
from browser import Browser


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with `baseline` and `distilled`, both with their reports."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = tiny.recipe(tiny.write_data(folder / "data"), epochs=2)
    write_report(train(recipe, out=folder / "baseline"))
    write_report(distill(recipe, out=folder / "distilled"))
    return folder


class _Page(HTMLParser):
    """All tags of a page with their attributes."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))


def _text(run: Path) -> str:
    return (run / "report.html").read_text(encoding="utf-8")


def _payload(run: Path) -> dict[str, Any]:
    [content] = re.findall(r'<script type="application/json" id="replay">(.*?)</script>', _text(run), re.DOTALL)
    return json.loads(content)  # type: ignore[no-any-return]


def test_nothing_is_fetched(runs: Path) -> None:
    for run in ("baseline", "distilled"):
        page = _Page(runs / run / "report.html")
        links = [value for _, attrs in page.tags for name, value in attrs.items() if name in ("src", "href")]
        assert all(link.startswith(("data:", "#")) for link in links), run
        assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest", _text(runs / run))
        policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv"))
        assert policy.startswith("default-src 'none'; img-src data:;")


def test_the_page_is_readable_by_all(runs: Path) -> None:
    page = _Page(runs / "distilled" / "report.html")
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
    assert "prefers-color-scheme: dark" in _text(runs / "distilled")
    assert all("alt" in attrs for tag, attrs in page.tags if tag == "img")
    assert all(attrs.get("aria-label") for tag, attrs in page.tags if tag == "svg")
    [slider] = [attrs for tag, attrs in page.tags if attrs.get("type") == "range"]
    assert slider["aria-label"] == "Epoch"


def test_the_headline_is_the_difference_to_the_student_alone(runs: Path) -> None:
    metrics = {run: json.loads((runs / run / "metrics.json").read_text()) for run in ("baseline", "distilled")}
    before, after = (metrics[run]["student"]["mIoU"] for run in ("baseline", "distilled"))
    text = _text(runs / "distilled")
    assert f"{after - before:+.2f}".replace("-", "\N{MINUS SIGN}") in text
    for score in (before, after, metrics["distilled"]["teacher"]["mIoU"]):
        assert f"{score:.2f} <small>% mIoU</small>" in text
    assert metrics["distilled"]["teacher_sha256"] in text
    assert metrics["distilled"]["data"]["val"] in text
    assert f"torch {torch.__version__.partition('+')[0]}" in text
    assert "num_masks: 3" in text


def test_a_student_that_distillation_made_worse_is_warned_of(
    runs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(runs / "baseline", tmp_path / "baseline")
    run = open_run(shutil.copytree(runs / "distilled", tmp_path / "distilled"))
    for alone, warned in ((99.0, True), (0.0, False)):
        caplog.clear()
        metrics = json.loads((tmp_path / "baseline/metrics.json").read_text())
        metrics["student"]["mIoU"] = alone
        (tmp_path / "baseline/metrics.json").write_text(json.dumps(metrics))
        write_report(run)
        assert any("the distilled student is below the baseline" in text for text in caplog.messages) is warned


def test_the_student_alone_has_a_report_without_comparison(runs: Path) -> None:
    text = _text(runs / "baseline")
    assert "trained without distillation" in text
    assert "How good is it?" in text
    assert "acamkd distill RECIPE" in text
    assert text.count('class="example card"') == 4  # of 4 images
    assert text.count("<figcaption>baseline <b>") == 4
    assert "the baseline wrong" not in text
    assert 'id="replay"' not in text


def test_the_viewer_holds_what_was_recorded(runs: Path) -> None:
    payload = _payload(runs / "distilled")
    with np.load(runs / "distilled" / REPLAY) as stored:
        spatial = stored["segmentation_head.0/acam/spatial"]
    assert payload["epochs"] == [0, 1, 2]
    assert len(payload["images"]) == 4
    [level] = payload["levels"]
    packed = level["masks"]["spatial"]
    assert packed["shape"] == list(spatial.shape[1:])
    assert base64.b64decode(packed["bytes"]) == spatial.tobytes()
    assert [len(row) for row in packed["figures"]] == [3, 3, 3]


def test_the_command_writes_it_anew(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (runs / "distilled" / "report.html").unlink()
    command = ["acamkd", "report", str(runs / "distilled"), "--baseline", str(runs / "baseline")]
    command += ["--set", "train.ema=0.9998", "--set", "train.epochs=9"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    assert "over the baseline, one seed" in _text(runs / "distilled")
    assert "2 epochs of 9, since the metric rose no more." in _text(runs / "distilled")
    assert "those of the moving average of its weights (EMA, decay 0.9998)" in _text(runs / "distilled")


def test_what_cannot_be_reported_is_refused(runs: Path, tmp_path: Path) -> None:
    distilled, alone = open_run(runs / "distilled"), open_run(runs / "baseline")
    with pytest.raises(AcamkdError, match="is no run of a baseline"):
        write_report(distilled, distilled)
    with pytest.raises(AcamkdError, match="is no distillation"):
        write_report(alone, distilled)
    unfinished = shutil.copytree(runs / "distilled", tmp_path / "unfinished")
    (unfinished / "metrics.json").unlink()
    with pytest.raises(AcamkdError, match=r"no metrics\.json: its training has not ended"):
        write_report(open_run(unfinished))
    other = shutil.copytree(runs / "baseline", tmp_path / "other")
    metrics = json.loads((other / "metrics.json").read_text())
    (other / "metrics.json").write_text(json.dumps(metrics | {"data": {"train": "x", "val": "y"}}))
    with pytest.raises(AcamkdError, match="different validation images"):
        write_report(distilled, open_run(other))
    with pytest.raises(AcamkdError, match=r"not those that .* was scored on"):
        write_report(open_run(other))


def test_a_gain_over_a_baseline_trained_otherwise_is_not_all_the_distillations(
    runs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert "was trained otherwise" not in _text(runs / "distilled")
    other = shutil.copytree(runs / "baseline", tmp_path / "other")
    (other / RECIPE).write_text((other / RECIPE).read_text().replace("epochs: 2", "epochs: 1"))
    metrics = json.loads((other / "metrics.json").read_text())
    metrics["data"]["train"] = "fewer"
    (other / "metrics.json").write_text(json.dumps(metrics))
    distilled = open_run(shutil.copytree(runs / "distilled", tmp_path / "run"))
    write_report(distilled, open_run(other))
    words = "otherwise (other training images; train.epochs was 1, is 2): not all of the difference is the distillation"
    assert f"The baseline was trained {words}" in html.unescape(_text(distilled.folder))
    assert "was trained otherwise than" in caplog.text


def test_a_run_is_reported_at_its_own_size_alone(runs: Path) -> None:
    folder = runs / "distilled"
    message = rf"^data\.resize is \(32, 32\), but the scores in {folder} are of None: leave it as it is$"
    with pytest.raises(AcamkdError, match=message):
        write_report(open_run(folder, ["data.resize=[32, 32]"]))


def test_what_the_report_has_to_leave_out_is_said(runs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    baseline, folder = (shutil.copytree(runs / name, tmp_path / name) for name in ("baseline", "distilled"))
    metrics = json.loads((baseline / "metrics.json").read_text())
    (baseline / "metrics.json").write_text(json.dumps(metrics | {"data": {"train": "x", "val": "y"}}))
    write_report(open_run(folder, ["teacher.weights=gone.safetensors"]))
    assert caplog.messages == [
        f"the report compares only with the teacher: {baseline} and {folder} were scored on different validation "
        "images",
        "the report omits the teacher's cost: weights gone.safetensors: there is no such file",
    ]


# The canvas, what is read aloud of it, and the time beside the slider.
SHOWN = """
const mask = document.getElementById("mask"), when = document.getElementById("when");
return [mask.toDataURL(), mask.getAttribute("aria-label"), when.textContent];
"""


def test_a_browser_opens_the_page_and_fetches_nothing(runs: Path, browser: Browser) -> None:
    for run in ("distilled", "baseline"):
        page = runs / run / "report.html"
        browser.requests()
        for width, scheme in ((1100, "light"), (1100, "dark"), (390, "light")):
            browser.open(page, width=width, scheme=scheme)
            assert browser.console() == []
            assert browser.run("return document.documentElement.scrollWidth") == width
            ratio, text = browser.faintest()
            assert ratio >= 4.5, (scheme, text)
            browser.shoot(f"report-{run}-{scheme}-{width}")
        assert browser.requests() == [page.as_uri()] * 3


def test_the_keys_move_the_slider_and_the_image(runs: Path, browser: Browser) -> None:
    browser.open(runs / "distilled/report.html", fragment="#epoch=2&image=1")
    slider = browser.driver.find_element("id", "epoch")
    last, said, when = browser.run(SHOWN)
    assert when == "epoch 2"
    assert "spatial, mask 1, segmentation_head.0, over 00002.jpg, epoch 2: mean" in said
    slider.send_keys(Keys.ARROW_LEFT)
    before, _, when = browser.run(SHOWN)
    assert (when, slider.get_attribute("aria-valuetext")) == ("epoch 1", "epoch 1")
    slider.send_keys(Keys.HOME)
    first, _, when = browser.run(SHOWN)
    assert when == "start"
    assert len({last, before, first}) == 3
    other_mask = browser.driver.find_elements("css selector", "#units button")[2]
    other_mask.send_keys(Keys.ENTER)
    assert "mask 2" in browser.run(SHOWN)[1]
    assert browser.run(SHOWN)[0] != first
    assert browser.console() == []


def test_the_page_plays_the_epochs(runs: Path, browser: Browser) -> None:
    browser.open(runs / "distilled/report.html")
    browser.run("""
        const when = document.getElementById("when");
        window.shown = [];
        new MutationObserver(() => window.shown.push(when.textContent)).observe(when, {childList: true});
    """)
    play = browser.driver.find_element("id", "play")
    play.send_keys(Keys.ENTER)
    deadline = time.monotonic() + 30
    while play.get_attribute("aria-label") == "pause" and time.monotonic() < deadline:
        time.sleep(0.1)
    assert browser.run("return window.shown") == ["start", "epoch 1", "epoch 2"]
    play.send_keys(Keys.ENTER)
    browser.driver.find_element("id", "epoch").send_keys(Keys.END)  # past which the next tick would go
    assert play.get_attribute("aria-label") == "play"
    time.sleep(0.6)
    assert browser.run("return window.shown.at(-1)") == "epoch 2"
    assert browser.console() == []


def test_masks_of_other_methods_are_shown_too(runs: Path, browser: Browser, tmp_path: Path) -> None:
    folder = shutil.copytree(runs / "distilled", tmp_path / "run")
    student = Segmenter(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, stride=4)), 4).eval()
    boxes = [{"boxes": torch.tensor([[8.0, 8, 40, 24]])}] * 4
    batch = dataclasses.replace(student.prepare([torch.rand(3, 64, 64)] * 4), targets=boxes)
    moments = []
    for _ in range(2):
        losses = [MasKD(4, 4, num_tokens=3), FGD(4, 4)]
        distiller = Distiller(student, copy.deepcopy(student), [("0", "0")] * 2, losses)
        moments.append(look(distiller, batch, distiller.teacher_maps(batch)))
    stacked = {name: np.stack([moment[name] for moment in moments]) for name in moments[0]}
    np.savez(folder / REPLAY, epoch=np.arange(2), images=np.arange(4), **stacked)  # type: ignore[arg-type]
    browser.open(write_report(open_run(folder)))
    levels = browser.driver.find_elements("css selector", "#level option")
    assert [level.text for level in levels] == ["0 (maskd)", "0 (fgd)"]
    seen = {}
    for level in levels:
        level.click()
        for kind in browser.driver.find_elements("css selector", "#kind option"):
            if kind.is_displayed():
                kind.click()
            seen[browser.run('return document.getElementById("mask-title").textContent')] = browser.run(SHOWN)[0]
    assert list(seen) == ["spatial mask 1, 0", "background mask 1, 0", "foreground mask 1, 0"]
    assert len(set(seen.values())) == 3
    assert browser.console() == []


@pytest.mark.parametrize(
    ("figures", "collapsed", "words"),
    [
        ([(0.5, 0.1), (0.5, 0.1)], False, "active: mean 0.50, standard deviation 0.100, diversity 0.75"),
        ([(0.5, 0.1), (0.04, 0.1)], True, "collapsed since epoch 1: their mean is 0.04, below 0.1"),
        ([(0.5, 0.1), (0.95, 0.1)], True, "collapsed since epoch 1: their mean is 0.95, above 0.9"),
        ([(0.5, 0.01), (0.5, 0.019)], True, "collapsed from the start: they vary by 0.019 only"),
        ([(0.5, 0.01), (0.5, 0.1)], False, "had collapsed at epoch 0"),
    ],
)
def test_a_collapse_is_said_in_words(figures: list[tuple[float, float]], collapsed: bool, words: str) -> None:
    verdict = masks.judge("layer", "spatial", [0, 1], np.array([(*row, 0.25) for row in figures]))
    assert verdict.collapsed == collapsed
    assert words in verdict.words


def test_two_hundred_images_stay_below_15_megabytes() -> None:
    noise = torch.randint(0, 256, (3, 480, 640), dtype=torch.uint8)
    square = torch.randint(0, 256, (3, EMBEDDED_SIDE, EMBEDDED_SIDE), dtype=torch.uint8)
    worst = max(len(embed(image.permute(1, 2, 0).numpy())) for image in (noise, square))
    assert 200 * worst < 15e6
    smooth = torch.linspace(0, 255, 640).expand(3, 480, 640).byte()
    assert len(embed(smooth.permute(1, 2, 0).numpy())) < 6e3


def test_label_maps_leave_background_and_void_clear() -> None:
    uri = embed_mask(np.array([[0, 1], [2, 255]]), ("background", "disc", "ring"))
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as image:
        pixels = np.array(image.convert("RGBA"))
    assert (pixels[..., 3] == [[0, 165], [165, 0]]).all()
    assert "#{:02x}{:02x}{:02x}".format(*pixels[0, 1, :3]) == hex_color(1)


def test_boxes_are_right_once_per_object_and_class() -> None:
    target = {
        "boxes": torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30], [0, 0, 5, 5]]),
        "labels": torch.tensor([1, 2, 1]),
        "iscrowd": torch.tensor([0, 0, 1]),
    }
    found = {
        "boxes": torch.tensor([[0.0, 0, 10, 9], [0, 0, 9, 10], [20, 20, 30, 30]]),
        "labels": torch.tensor([1, 1, 2]),
        "scores": torch.tensor([0.9, 0.8, 0.1]),
    }
    panel = panels.prediction_panel("student", found, target, ("a", "b"), 50.0)
    assert [(box.label, box.right) for box in panel.boxes] == [("a", True), ("a", False)]  # as many as objects
    assert panel.words == "1 of 2 objects found by its 2 best boxes"
    nothing = {name: x[:0] for name, x in found.items()}
    assert panels.prediction_panel("student", nothing, target, ("a", "b"), 0.0).boxes == ()


def test_every_loss_term_has_a_curve(runs: Path) -> None:
    history = charts.read_history(runs / "distilled" / "history.csv")
    drawn = charts.loss_charts(history)
    assert [chart.title for chart in drawn] == [
        "total loss", "task: cross entropy", "acam: channel", "acam: channel selection", "acam: spatial",
        "acam: spatial selection", "acam: diversity",
    ]  # fmt: skip
    assert drawn[2].lines[0].last == history[-1]["loss/segmentation_head.0/acam/channel"]


def test_a_curve_lies_where_its_values_are() -> None:
    assert charts.draw("nothing yet", {"a": []}).lines == ()
    chart = charts.draw("x", {"a": [(0, 0.0), (2, 1.0)], "b": []}, limits=(0, 1), bands=[(0.9, 1)])
    [line] = chart.lines
    bottom = charts.HEIGHT - charts.BOTTOM
    assert line.path == f"M{charts.LEFT}.0,{bottom}.0 L{charts.WIDTH - charts.RIGHT}.0,{charts.TOP}.0"
    assert chart.bands[0] == pytest.approx((charts.TOP, 0.1 * (bottom - charts.TOP)), abs=0.1)
    assert [tick.label for tick in chart.x_ticks if float(tick.label) in (0, 1, 2)] == ["0", "1", "2"]


def test_missing_cells_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "history.csv").write_text("epoch,mIoU,loss\n1,,2.5\n2,30,nan\n")
    history = charts.read_history(tmp_path / "history.csv")
    assert charts.curve(history, "mIoU") == [(2, 30)]
    assert charts.curve(history, "loss") == [(1, 2.5)]
