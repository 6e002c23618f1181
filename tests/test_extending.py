"""The complete examples of the pages about new data formats and networks run in a training."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import acamkd
import tiny
from acamkd import config, data
from acamkd.errors import AcamkdError
from acamkd.jobs.export.onnx_model import OnnxModel
from acamkd.jobs.pretrain import ImagesAlone, pretrain
from acamkd.models.base import VOID

GUIDES = Path(__file__).parents[1] / "docs/guides"


def blocks(page: str, language: str) -> list[str]:
    text = (GUIDES / f"{page}.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def install(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the page's modules, which their first lines name, where Python finds them."""
    for code in blocks(page, "python"):
        (folder / code.split(":")[0].strip('"')).write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(folder)


def test_the_reader_of_the_page_opens_and_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install("add-a-data-format", tmp_path, monkeypatch)
    drawn, root = tiny.write_data(tmp_path / "drawn"), tmp_path / "railway"
    for split in ("train", "val"):
        names = [file.stem for file in sorted((drawn / "images" / split).iterdir())]
        for name in names:
            for source, target in ((f"images/{split}/{name}.jpg", f"frames/{split}{name}.jpg"),
                                   (f"masks/{split}/{name}.png", f"labels/{split}{name}.png")):  # fmt: skip
                (root / target).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(drawn / source, root / target)
        (root / f"{split}.txt").write_text("\n".join(f"{split}{name}" for name in names))
    raw = tiny.raw_recipe(drawn, epochs=1)
    (block,) = blocks("add-a-data-format", "yaml")
    raw["data"] = {**yaml.safe_load(block)["data"], "root": str(root), "resize": [64, 64], "workers": 0}
    with pytest.raises(AcamkdError, match="the mask holds"):  # drawn scenes have more than three classes
        acamkd.train(config.parse(raw), out=tmp_path / "run")
    for file in (root / "labels").iterdir():
        Image.fromarray(np.asarray(Image.open(file)) % 3).save(file)
    run = acamkd.train(config.parse(raw), out=tmp_path / "run")
    assert run.recipe.data.classes == ("background", "rail", "train")


def test_the_boxes_of_the_page_are_read_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install("add-a-data-format", tmp_path, monkeypatch)
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (40, 30)).save(tmp_path / "images" / name)
    lines = ["b.png,1,2,11,12,signal", "a.png,0,0,20,10,boom", "a.png,5,5,50,10,signal", "a.png,5,5,9,9,tree"]
    (tmp_path / "gates_train.csv").write_text("\n".join(lines[:3]))
    (tmp_path / "gates_val.csv").write_text("\n".join(lines))
    source = config.Data(root=tmp_path, format="gates:Gates")
    train = data.build(source, "detection", "train", seed=0, augment=False)
    image, target = train[0]
    assert image.shape == (3, 30, 40)
    assert target["boxes"].tolist() == [[0, 0, 20, 10], [5, 5, 40, 10]]  # clipped to the image
    assert target["labels"].tolist() == [1, 2]
    val = data.build(source, "detection", "val", seed=0, augment=False)
    assert val.problems == [f"{tmp_path / 'gates_val.csv'}:4: there is no class 'tree'"]


def test_the_network_of_the_page_distills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install("add-a-network", tmp_path, monkeypatch)
    raw = tiny.raw_recipe(tiny.write_data(tmp_path / "data"), epochs=1)
    (block,) = blocks("add-a-network", "yaml")
    run = acamkd.distill(config.parse({**raw, **yaml.safe_load(block)}), out=tmp_path / "run")
    assert run.load().get_submodule("net.0").out_channels == 8
    assert "2/cwd/channel" in (run.folder / "history.csv").read_text(encoding="utf-8").splitlines()[0]
    model, image = run.load(), torch.randint(256, (3, 8, 8), dtype=torch.uint8)
    void = {"mask": torch.full((8, 8), VOID)}
    batch, floats = (model.prepare([given], [void]) for given in (image, image.float() / 255))
    torch.testing.assert_close(batch.pixels, floats.pixels)
    assert model.loss(model(batch), batch)["cross_entropy"] == 0
    monkeypatch.setattr(ImagesAlone, "check", lambda _: pytest.fail("it looked at the images"))
    with pytest.raises(AcamkdError, match="TinySegmenter does not say which part of its network is the backbone"):
        pretrain(config.parse({**raw, **yaml.safe_load(block)}), out=tmp_path / "pretrained")


@pytest.mark.slow
def test_the_network_of_the_page_is_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install("add-a-network", tmp_path, monkeypatch)
    raw = tiny.raw_recipe(tiny.write_data(tmp_path / "data"), epochs=1)
    raw |= {"student": {"arch": "tinyseg:build"}, "losses": []}
    del raw["teacher"]
    figures = acamkd.export(acamkd.train(config.parse(raw), out=tmp_path / "run"))
    assert figures.relative_difference < 1e-4
    assert OnnxModel(figures.folder / "student.onnx").preparation == {"resize": None, "multiple": 1, "kernel": "smooth"}
