"""What recipes are written in: what is written is read back, and what YAML reads as something else is refused."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from acamkd import config
from acamkd.config.yaml_text import read_yaml
from acamkd.errors import AcamkdError
from command import Command

RECIPE = """
task: segmentation
data: {root: d, classes: [road, car]}
student: {arch: fpn}
losses: [{name: cwd, pairs: [encoder]}]
train: {epochs: 1}
"""

AWKWARD = [
    "1e-3", "1E3", "-1.e4", "+.5e1", "1e5", "1.5", ".5", "12", "0x1f", "0o17", "0b1", "017", "1_000", "12:30",
    "2024-01-01", "2024-01-01 10:00:00", "no", "No", "off", "on", "y", "yes", "true", "null", "Null", "~", "", " ", "=",
    "<<", "!", "&a", "*a", "- a", "? a", "a: b", "a #b", "#", "%", "@", "`", "[", "{", "|", ">", "'", '"', "''", "it's",
    "a\nb", "\n", "a\n", " a", "a ", "\t", "a\tb", "\r\n", "\x00", "\x07", "\x85", "\u2028", "\ufeff", "é", "e\u0301",
    "標識", "🚗", "..", ".", "---", "...", ".inf", ".nan", "-", "a" * 200, "word " * 40, "  two  blanks  ", "\\",
]  # fmt: skip


def _random_texts(count: int) -> list[str]:
    """Texts made of what YAML gives a meaning."""
    draw = random.Random(0)
    pieces = [*"0123456789eE+-.:_ \n\t'\"#&*!|>%@`[]{},?~=\\<é標🚗\x85\u2028\x01", "no", "null", "1e", "0x", ": ", " #"]
    return ["".join(draw.choices(pieces, k=draw.randint(1, 8))) for _ in range(count)]


@pytest.mark.parametrize("texts", [AWKWARD, _random_texts(3000)], ids=["known", "random"])
def test_every_text_is_read_back(texts: list[str]) -> None:
    content = {"list": texts, "keys": dict.fromkeys(texts, 1), "nested": [[text] for text in texts]}
    assert config.read_yaml(config.write_yaml(content), "it") == content
    assert config.read_yaml(config.write_yaml(content, flow=None), "it") == content


@pytest.mark.parametrize("value", [1e-3, 1e-05, 1e22, 1.0, 0.1, -0.0, 2**63, 10**40, True, None, [], {}, 1e300])
def test_every_value_is_read_back_with_its_type(value: Any) -> None:
    again = config.read_yaml(config.write_yaml([value]), "it")[0]
    assert (again, type(again)) == (value, type(value))


def test_a_recipe_with_names_like_numbers_is_read_back(tmp_path: Path) -> None:
    file = tmp_path / "1e-3.yaml"
    file.write_text(RECIPE)
    classes = ", ".join(f"'{name}'" for name in ("1e-3", "2e5", "no", "12:30"))
    recipe = config.load(file, [f"data.classes=[{classes}]", "data.train={name: '1E3'}", "student.options.a='1e1'"])
    copy = tmp_path / "recipe.yaml"
    copy.write_text(config.dump(recipe))
    again = config.load(copy)
    assert again == recipe
    assert (again.name, again.data.classes) == ("1e-3", ("1e-3", "2e5", "no", "12:30"))


@pytest.mark.parametrize(
    ("written", "read"),
    [("no", " as false"), ("12:30", " as 750"), ("1e3", " as 1000.0"), ("On", " as true"), ("0x1f", " as 31"),
     ("7", ""), ("1_0", " as 10")],
)  # fmt: skip
@pytest.mark.parametrize(
    ("line", "key"),
    [("data: {classes: [road, %s]}", "data.classes.1"), ("name: %s", "name"), ("student: {arch: %s}", "student.arch"),
     ("data: {train: {name: %s}}", "data.train.name"), ("data: {root: %s}", "data.root"),
     ("losses: [{name: %s}]", "losses.0.name"), ("losses: [{name: cwd, pairs: [%s]}]", "losses.0.pairs.0")],
)  # fmt: skip
def test_a_name_that_yaml_takes_for_something_else_is_to_be_quoted(
    line: str, key: str, written: str, read: str, tmp_path: Path, acamkd: Command
) -> None:
    advice = f"{key}: {written} is read{read}, and text is needed: write it in quotes, '{written}'"
    section = line.partition(":")[0]
    file, plain = tmp_path / "own.yaml", tmp_path / "plain.yaml"
    file.write_text("\n".join(row for row in RECIPE.split("\n") if not row.startswith(section)) + f"\n{line % written}")
    plain.write_text(RECIPE)
    with pytest.raises(AcamkdError) as caught:
        config.load(file)
    assert advice in str(caught.value)
    with pytest.raises(AcamkdError) as caught:
        config.load(plain, [f"{section}={(line % written).partition(': ')[2]}"])
    assert advice in str(caught.value)
    if section == "losses":
        losses = tmp_path / "losses.yaml"
        losses.write_text((line % written).partition(": ")[2])
        assert advice in acamkd("distill", plain, "--losses", losses).error


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("data: {classes: [2024-01-01]}", r"data.classes.0 is read as a date; .* text: '2024-01-01'"),
        ("data: {classes: &a [*a]}", "data.classes.0 refers to itself"),
        ("data: &a {b: *a}", "data.b refers to itself"),
        ("compare: {methods: {no: {}}}", "the key no in compare.methods is read as False, and keys are text"),
        ("1.5: 2", "the key 1.5 is read as 1.5, and keys are text"),
        ("01: 2", "01: unknown key"),
        (f"train: {{epochs: {'9' * 5000}}}", r"(?s)is not valid YAML: .*too many digits.*line 6"),
        (f"train: {{epochs: 0x{'f' * 5000}}}", "train.epochs is too large"),
        ("train:\n\tepochs: 1", "(?s)is not valid YAML: .*; indent with blanks, not with tabs$"),
        ("train: 3", r"train: must hold keys \(given: 3\); known: epochs"),
        ("losses: fitnet", r"losses: must be a list \(given: 'fitnet'\); write it in brackets"),
        ("name: ~", "name: ~ is read as null, and text is needed: write it in quotes, '~'"),
        ("name:", "name: nothing is given, and text is needed"),
        ("data: {resize: 64}", r"(?s)data.resize: must be a list .*data.resize: must hold keys .*known: short, long$"),
        ("data: {classes: [2024-13-01]}", "(?s)is not valid YAML: .*month.*line 6"),
        ("data: " + "[" * 3000, "nested too deeply"),
        (f"train: {{epochs: 1, seed: {2**64}}}", "train.seed: Input should be less than 18446744073709551616"),
        (f"train: {{epochs: {2**31}}}", r"train.epochs: Input should be less than 2147483648 \(given: 2147483648\)"),
        ("train: {epochs: 1, clip: .inf}", "train.clip: Input should be a finite number"),
        ("name: ..", r"name: '\.\.' cannot name files: use letters, digits and `_.-`"),
        ("name: my recipe", "name: 'my recipe' cannot name files: .* such as my-recipe"),
        ("name: a/b", "name: 'a/b' cannot name files: .* such as a-b"),
        ("compare: {methods: {'my method': {}}}", "compare.methods.my method.*cannot name files.* such as my-method"),
    ],
    ids=lambda text: text[:30],
)
def test_what_no_recipe_can_hold_is_one_message(line: str, message: str, tmp_path: Path) -> None:
    section = line.partition(":")[0]
    rows = [row for row in RECIPE.strip().split("\n") if not row.startswith(section)]
    file = tmp_path / "own.yaml"
    file.write_text("\n".join([*rows, *[""] * (5 - len(rows)), line]))
    with pytest.raises(AcamkdError, match=message) as caught:
        config.load(file)
    assert len(str(caught.value)) < 700


def test_a_losses_file_that_is_no_yaml_is_named(tmp_path: Path, acamkd: Command) -> None:
    recipe, losses = tmp_path / "own.yaml", tmp_path / "losses.yaml"
    recipe.write_text(RECIPE)
    losses.write_text("- name: [cwd")
    assert acamkd("distill", recipe, "--losses", losses).error.startswith(f"{losses} is not valid YAML")


def test_the_largest_seed_is_one_that_torch_takes() -> None:
    import torch

    torch.manual_seed(2**64 - 1)
    torch.Generator().manual_seed(2**64 - 1)


def test_a_tilde_is_the_users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own.yaml").write_text(RECIPE)
    overrides = ["data.root=~/data", "data.val={images: ~/val}", "student.weights=~/w.pth", "data.unlabeled=~/more"]
    recipe = config.as_recipe("~/own.yaml", overrides)
    assert recipe.data.root == tmp_path / "data"
    assert recipe.data.val.images == tmp_path / "val"
    assert recipe.data.unlabeled == tmp_path / "more"
    assert recipe.student.weights == str(tmp_path / "w.pth")
    with pytest.raises(AcamkdError, match=r"data\.root: .*write the path without ~"):
        config.as_recipe("~/own.yaml", ["data.root=~nobody-here/data"])


def test_whole_numbers_are_keys_and_no_part_of_a_union_contradicts_another(tmp_path: Path) -> None:
    read = read_yaml("{0: background, 010: a, 1_0: b, x: [=, <<], y: {<<: {z: 1}}}", "a recipe")
    assert read == {"0": "background", "010": "a", "1_0": "b", "x": ["=", "<<"], "y": {"z": 1}}
    with pytest.raises(AcamkdError, match="0 is given a second time"):
        read_yaml("{0: a, '0': b}", "a recipe")
    file = tmp_path / "own.yaml"
    file.write_text(RECIPE)
    assert config.load(file, ["data.mask_values={0: a, 255: b}"]).data.mask_values == {"0": "a", "255": "b"}
    with pytest.raises(AcamkdError) as caught:
        config.load(file, ["data.resize={short: 3}", "losses=[{name: fitnet, pairs: [no]}]"])
    assert [line.strip() for line in str(caught.value).splitlines()[1:]] == [
        "data.resize.long: missing",
        "losses.0.pairs.0: no is read as false, and text is needed: write it in quotes, 'no'",
    ]


def test_a_file_in_another_encoding_is_told_from_one_that_is_not_there(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_bytes(RECIPE.encode("utf-16"))
    with pytest.raises(AcamkdError, match=r"own\.yaml: it is no UTF-8 .*; save it as UTF-8"):
        config.load(file)
