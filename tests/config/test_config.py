from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from acamkd import config
from acamkd.errors import AcamkdError

RECIPE = """
task: detection
data:
  format: coco
  root: data
  train: {images: images/train, annotations: train.json}
  val: {images: images/val, annotations: val.json}
  resize: {short: 320, long: 533}
  augment: {scale: [0.5, 2.0], crop: [64, 96]}
teacher: {arch: retinanet, backbone: resnet101, weights: teacher.pth}
student: {arch: retinanet, backbone: resnet18, options: {anchor_sizes: [8, 16]}}
losses:
- name: acam
  preset: paper
  pairs: ["backbone:*", [layer3, layer4]]
  ramp_epochs: 0.5
  num_masks: 4
  weight: 1e-3
- {name: pkd, pairs: [backbone:0]}
train:
  epochs: 4
  optimizer: {name: sgd, lr: 2e-2, weight_decay: 1E-4}
  schedule: {name: step, milestones: [2, 3]}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "boxes.yaml"
    file.write_text(RECIPE, encoding="utf-8")
    return file


def changed(**sections: Any) -> dict[str, Any]:
    """The recipe as a mapping, with some of its sections replaced."""
    raw: dict[str, Any] = yaml.safe_load(
        RECIPE.replace("1e-3", "0.001").replace("2e-2", "0.02").replace("1E-4", "1.e-4")
    )
    return {"name": "boxes", **raw, **sections}


def test_a_recipe_is_read(path: Path) -> None:
    recipe = config.load(path)
    assert recipe.name == "boxes"
    assert recipe.data.train.annotations == Path("train.json")
    assert recipe.data.resize == config.ShortLong(short=320, long=533)
    assert recipe.data.augment.crop == (64, 96)
    assert recipe.teacher is not None
    assert recipe.teacher.fpn_channels == 256
    assert recipe.student.options == {"anchor_sizes": [8, 16]}
    acam, pkd = recipe.losses
    assert acam.pairs == ("backbone:*", ("layer3", "layer4"))
    assert acam.options == {"num_masks": 4, "weight": 0.001}
    assert (acam.preset, acam.ramp_epochs, acam.stop_epoch) == ("paper", 0.5, None)
    assert pkd.options == {}
    assert recipe.train.optimizer.lr == 0.02
    assert recipe.train.optimizer.weight_decay == 1e-4
    assert recipe.train.schedule.milestones == (2, 3)


@pytest.mark.parametrize(("text", "value"), [
    ("1e-3", 1e-3), ("1E+2", 100.0), ("-2.5e-1", -0.25), ("+.5e1", 5.0), ("1.e4", 1e4), ("0.1", 0.1),
])  # fmt: skip
def test_numbers_with_an_exponent_are_numbers(path: Path, text: str, value: float) -> None:
    assert config.load(path, [f"losses.0.temperature={text}"]).losses[0].options["temperature"] == value


@pytest.mark.parametrize("text", ["1e", "e-3", "1e-3x", "layer1e3", "2024e"])
def test_words_that_look_like_numbers_are_words(path: Path, text: str) -> None:
    assert config.load(path, [f"teacher.weights={text}"]).teacher.weights == text  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"loses": []}, "loses: unknown key; did you mean losses"),
        ({"data": {**changed()["data"], "clases": ["a"]}}, "data.clases: unknown key; did you mean classes"),
        (
            {"data": {**changed()["data"], "train": {"images": "x", "annotation": "y"}}},
            "data.train.annotation: unknown key; did you mean annotations",
        ),
        (
            {"data": {**changed()["data"], "resize": {"shrt": 3, "long": 4}}},
            "data.resize.shrt: unknown key; did you mean short",
        ),
        (
            {"data": {**changed()["data"], "augment": {"flips": 1}}},
            "data.augment.flips: unknown key; did you mean flip",
        ),
        ({"student": {"arch": "fcos", "backbon": "x"}}, "student.backbon: unknown key; did you mean backbone"),
        ({"teacher": {"arch": "fcos", "weight": "x"}}, "teacher.weight: unknown key; did you mean weights"),
        (
            {"train": {"epochs": 1, "optimizer": {"larning": 1}}},
            "train.optimizer.larning: unknown key; .*lr",
        ),
        ({"train": {"epochs": 1, "schedule": {"gama": 1}}}, "train.schedule.gama: unknown key; did you mean gamma"),
        ({"train": {}}, "train.epochs: missing"),
        ({"train": {"epochs": "4"}}, r"train.epochs: Input should be a valid integer \(given: '4'\)"),
        ({"train": {"epochs": 0}}, r"train.epochs: Input should be greater than 0 \(given: 0\)"),
        ({"train": {"epochs": 2.5}}, "train.epochs: .*integer"),
        ({"train": {"epochs": True}}, "train.epochs: .*integer"),
        ({"train": {"epochs": 1, "optimizer": {"lr": "fast"}}}, r"train.optimizer.lr: .*number \(given: 'fast'\)"),
        ({"train": {"epochs": 1, "devices": "all"}}, "train.devices: Input should be 'auto'"),
        ({"train": {"epochs": 3, "eval_every": 2}}, "train: eval_every 2 does not divide epochs 3$"),
        ({"train": {"epochs": 1, "schedule": {"name": "step"}}}, "train.schedule: step needs milestones"),
        ({"train": {"epochs": 1, "schedule": {"warmup_steps": 9}}}, "train.schedule: one_cycle brings its own warm-up"),
        (
            {"train": {"epochs": 1, "schedule": {"milestones": [16, 22]}}},
            "train.schedule: one_cycle has no milestones: leave it out, or set name: step, which reads it",
        ),
        ({"train": {"epochs": 1, "schedule": {"name": "constant", "power": 1}}}, "constant has no power: .*polynomial"),
        ({"train": {"epochs": 1, "optimizer": {"momentum": 0.8}}}, "train.optimizer: adamw has no momentum: .*sgd"),
        (
            {"data": {"mask_values": {"#ff0000": "a"}, "ignore_index": 0}},
            "data: ignore_index is no color: say in mask_values which color is `void`",
        ),
        ({"losses": [{"pairs": ["a"]}]}, "losses.0.name: missing"),
        ({"losses": {"name": "acam"}}, "losses: "),
        ({"losses": [{"name": "acam", "pairs": [["a", "b", "c"]]}]}, "does not fit:\n  losses.0.pairs.0"),
        (
            {"losses": [{"name": "acam", "pairs": "a"}]},
            "losses.0.pairs: must be a list .*write it in brackets\n  losses.0.pairs: Input should be 'auto'",
        ),
        ({"losses": [{"name": "acam", "pairs": ["auto"]}]}, "losses.0.pairs: auto stands alone: write `pairs: auto`"),
        ({"student": {"arch": "fcos", "options": 5}}, r"student.options: must hold keys \(given: 5\), such as {key: v"),
        ({"compare": {"cache": 5}}, "compare.cache: 5 bytes hold no batch: write a number and its unit, such as 20GB"),
        ({"compare": {"cache": "20 files"}}, "compare.cache: '20 files' is no size: write a number and its unit"),
        ({"task": "depth"}, r"task: Input should be 'detection' or 'segmentation' \(given: 'depth'\)"),
        (
            {"data": {"val": {"images": "x", "name": "y"}}},
            "data.val: give either the split's `name` .*, or its `images`",
        ),
        ({"data": {"val": {"annotations": "x"}}}, "data.val: give either the split's `name`"),
        ({"name": "a/b"}, "name: "),
        ({"train": {"epochs": 1, "devices": -1}}, "train.devices: give their number, or auto"),
        (
            {"teacher": {"arch": "fcos", "inherit": ["head"]}},
            "teacher.inherit: only a student inherits, from the teacher",
        ),
        ({"student": {"arch": "fcos", "precision": 32}}, "student.precision: only the teacher has one of its own"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(AcamkdError, match=message):
        config.parse(changed(**sections))


def test_a_known_layout_needs_no_paths() -> None:
    data = config.parse(changed(data={"root": "d"})).data
    assert (data.format, data.train.name, data.val.name) == ("auto", "train", "val")


def test_every_bad_key_is_named_at_once() -> None:
    with pytest.raises(AcamkdError, match=r"(?s)^recipe does not fit:\n  .*task: .*\n  .*train\.epochs: missing"):
        config.parse(changed(task=3, train={}))


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("train.epochs=8", lambda recipe: recipe.train.epochs == 8),
        ("train.precision=32", lambda recipe: recipe.train.precision == "32"),
        ("train.schedule.milestones=[1]", lambda recipe: recipe.train.schedule.milestones == (1,)),
        ("losses.1.weight=2", lambda recipe: recipe.losses[1].options == {"weight": 2}),
        ("losses.0.pairs=auto", lambda recipe: recipe.losses[0].pairs == "auto"),
        ("losses.0.pairs.1=layer1", lambda recipe: recipe.losses[0].pairs == ("backbone:*", "layer1")),
        ("data.augment.crop.0=32", lambda recipe: recipe.data.augment.crop == (32, 96)),
        ("losses=[]", lambda recipe: recipe.losses == ()),
        ("teacher=null", lambda recipe: recipe.teacher is None),
        ("student.options.depth=3", lambda recipe: recipe.student.options == {"anchor_sizes": [8, 16], "depth": 3}),
        ("teacher.precision=16", lambda recipe: recipe.teacher.precision == "16"),
        ("teacher.options.depth=3", lambda recipe: recipe.teacher.options == {"depth": 3}),
        ("data.root=a=b", lambda recipe: recipe.data.root == Path("a=b")),
        ("name=other", lambda recipe: recipe.name == "other"),
    ],
)
def test_overrides(path: Path, override: str, read: Any) -> None:
    assert read(config.load(path, [override]))


def test_an_override_makes_a_missing_section(path: Path) -> None:
    path.write_text(yaml.safe_dump(changed(teacher=None)), encoding="utf-8")
    recipe = config.load(path, ["teacher.arch=fcos", "teacher.weights=t.pth"])
    assert recipe.teacher == config.Model(arch="fcos", weights="t.pth")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epochs", "--set train.epochs: write key=value, such as train.epochs=20"),
        ("=3", "--set =3: write key=value"),
        ("losses.2.weight=1", r"--set losses.2.weight: there is no entry 2, the list has 2 \(counted from 0\)"),
        ("losses.x=1", r"--set losses.x: there is no entry x, the list has 2"),
        ("losses.-1.weight=1", r"there is no entry -1"),
        ("task.name=1", "--set task.name: task is a single value and has no key name"),
        ("task.name.first=1", "--set task.name.first: name would lie below a single value"),
        ("train.epochs=[1", "--set train.epochs=.1: the value is not valid YAML"),
        ("trian.epochs=1", "trian: unknown key; did you mean train"),
        ("train.epoch=1", "train.epoch: unknown key; did you mean epochs"),
        ("train.epochs=many", r"train.epochs: .*integer.* \(given: 'many'\)"),
    ],
)
def test_wrong_overrides_are_refused(path: Path, override: str, message: str) -> None:
    with pytest.raises(AcamkdError, match=message):
        config.load(path, [override])


def test_another_method_keeps_the_pairs_and_drops_the_options(path: Path) -> None:
    loss = config.load(path, ["losses.0.name=fgd"]).losses[0]
    assert (loss.name, loss.options, loss.preset) == ("fgd", {}, None)
    assert loss.pairs == ("backbone:*", ("layer3", "layer4"))
    assert loss.ramp_epochs == 0.5
    after = config.load(path, ["losses.0.name=fgd", "losses.0.weight=2"]).losses[0]
    assert after.options == {"weight": 2}
    same = config.load(path, ["losses.0.name=acam"])
    assert same == config.load(path)


@pytest.mark.parametrize(
    "overrides", [[], ["losses=[]", "teacher=null"], ["data.resize=[64, 96]", "data.classes=[é, 'no', '1']"]]
)
def test_what_is_written_is_read_back(path: Path, tmp_path: Path, overrides: list[str]) -> None:
    recipe = config.load(path, overrides)
    copy = tmp_path / "copy.yaml"
    copy.write_text(config.dump(recipe), encoding="utf-8")
    assert config.load(copy) == recipe
    assert config.dump(config.load(copy)) == config.dump(recipe)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"train: [1", "boxes.yaml is not valid YAML"),
        (b"- 1\n- 2", "boxes.yaml must hold a mapping with the keys name, task, data"),
        (b"", "boxes.yaml must hold a mapping"),
        (b"name: \xff\xfe", "cannot read the recipe .*boxes.yaml: "),
        (b"task: !!python/name:os.system", "boxes.yaml is not valid YAML"),
        (b"losses: [a]\nname: b\nlosses: []", r"is not valid YAML: losses is given a second time\n.*line 3"),
        (b"name: {{ name }}", "is not valid YAML: while constructing a mapping"),
        (b"name: 2024-01-01", "name is read as a date; write it in quotes if it is meant as text: '2024-01-01'"),
    ],
)
def test_files_that_are_no_recipes(path: Path, content: bytes, message: str) -> None:
    path.write_bytes(content)
    with pytest.raises(AcamkdError, match=message):
        config.load(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(AcamkdError, match=r"cannot read the recipe .*none\.yaml: No such file or directory"):
        config.load(tmp_path / "none.yaml")


def test_recipes_do_not_change(path: Path) -> None:
    recipe = config.load(path)
    with pytest.raises(ValueError, match="frozen"):
        recipe.train.epochs = 3  # type: ignore[misc]


@pytest.mark.parametrize("module", ["acamkd", "acamkd.config", "acamkd.cli"])
def test_importing_needs_no_torch(module: str) -> None:
    code = f"import sys, {module}; print([m for m in ('torch', 'lightning', 'timm', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arch", "title"),
    [("fpn", "fpn on resnet50"), ("torchvision/lraspp_mobilenet_v3_large",) * 2, ("package.module:factory",) * 2],
)
def test_a_network_is_called_by_what_the_recipe_chooses(arch: str, title: str) -> None:
    assert config.Model(arch=arch).title == title


def test_merged_keys_are_not_given_twice(path: Path) -> None:
    path.write_text(
        path.read_text()
        + "compare:\n  methods:\n    a: &base {train.seed: 1}\n    b: &mid {<<: *base, train.seed: 2}\n"
        "    c: {<<: *mid, train.epochs: 3}\n"
    )
    assert config.load(path).compare.methods["c"] == {"train.seed": 2, "train.epochs": 3}


@pytest.mark.parametrize(
    ("weight", "given"),
    [
        ("-1", "-1"),
        ("-0.5", "-0.5"),
        (".inf", "inf"),
        (".nan", "nan"),
        ("true", "True"),
        ("'3'", "'3'"),
        ("own", "'own'"),
    ],
)
def test_a_weight_is_a_number_from_0_or_auto(path: Path, weight: str, given: str) -> None:
    said = f"losses.0.weight: must be a number from 0, or auto, not {given}; leave it out for the method's own weight"
    with pytest.raises(AcamkdError) as error:
        config.load(path, [f"losses.0.weight={weight}"])
    assert str(error.value).splitlines()[1:] == [f"  {said}"]


def test_a_weight_is_an_option_only_where_it_is_given(path: Path) -> None:
    for text, weight in (("0", 0), ("2", 2), ("2.5", 2.5), ("auto", "auto")):
        loss = config.load(path, [f"losses.0.weight={text}"]).losses[0]
        assert (loss.weight, loss.options["weight"], loss.is_auto) == (weight, weight, text == "auto")
        assert type(loss.weight) is type(weight)  # by which a trial's hash tells recipes apart
        assert loss.model_dump(mode="json", exclude_defaults=True)["weight"] == weight
    loss = config.load(path, ["losses.0.weight=null"]).losses[0]
    assert (loss.weight, loss.is_auto) == (None, False)
    assert "weight" not in loss.options
    assert "weight" not in loss.model_dump(mode="json", exclude_defaults=True)
    assert config.load(path, ["losses.0.weight=auto", "losses.0.name=fgd"]).losses[0].weight is None


def test_an_override_changes_one_of_two_sections_that_share_an_anchor(path: Path) -> None:
    file = path.with_name("anchor.yaml")
    shared = "student: {arch: fcos, options: &o {a: 1}}\nteacher: {arch: fcos, options: *o}\n"
    file.write_text(f"task: detection\ndata: {{root: d}}\n{shared}train: {{epochs: 1}}\n")
    recipe = config.load(file, ["student.options.a=2"])
    assert recipe.teacher is not None
    assert (recipe.student.options, recipe.teacher.options) == ({"a": 2}, {"a": 1})


def test_the_older_spelling_of_a_key_is_read(path: Path) -> None:
    raw = {**changed(), "data": {**changed()["data"], "unlabelled": "a"}}
    assert config.parse(raw).data.unlabeled == Path("a")
    file = path.with_name("older.yaml")
    file.write_text(json.dumps(raw))
    assert config.load(file).data.unlabeled == Path("a")
    for key in ("data.unlabelled", "data.unlabeled"):
        assert config.load(file, [f"{key}=b"]).data.unlabeled == Path("b")
        assert config.override(config.load(file), [f"{key}=null"]).data.unlabeled is None
    with pytest.raises(AcamkdError, match=r"data\.unlabelled: unknown key; did you mean unlabeled"):
        config.parse({**raw, "data": {**raw["data"], "unlabeled": "b"}})
