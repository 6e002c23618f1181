"""What users get wrong: each is one message and exit code 1, without a traceback and without a file left behind."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import tiny
from command import Command

Raw: TypeAlias = dict[str, Any]
Damage: TypeAlias = Callable[[Raw, Path], None]
"""Changes the recipe, as it would be read from YAML, or the data below its root."""


class Case(NamedTuple):
    """One mistake: on which data set, the command that meets it, and parts of its message, which must all be there."""

    base: str
    damage: Damage
    words: str
    parts: tuple[str, ...]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small sound data set per layout."""
    folder = tmp_path_factory.mktemp("drawn")
    tiny.write_data(folder / "segmentation")
    tiny.write_data(folder / "detection", "detection")
    for write in (_voc, _yolo, _cityscapes):
        write(folder / write.__name__.removeprefix("_"))
    return folder


def _image(file: Path, size: tuple[int, int] = (64, 64)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (90, 120, 150)).save(file)


VOC = """<annotation><size><width>64</width><height>64</height></size>
<object><name>dog</name><difficult>0</difficult>
<bndbox><xmin>5</xmin><ymin>6</ymin><xmax>30</xmax><ymax>40</ymax></bndbox></object></annotation>
"""


def _voc(root: Path) -> None:
    for folder in ("Annotations", "SegmentationClass", "ImageSets/Main", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for split in ("train", "val"):
        names = [f"{split}_{number}" for number in range(2)]
        for name in names:
            _image(root / f"JPEGImages/{name}.jpg")
            (root / f"Annotations/{name}.xml").write_text(VOC)
            Image.fromarray(np.zeros((64, 64), np.uint8)).save(root / f"SegmentationClass/{name}.png")
        for task in ("Main", "Segmentation"):
            (root / f"ImageSets/{task}/{split}.txt").write_text("".join(f"{name}\n" for name in names))


def _yolo(root: Path) -> None:
    for split in ("train", "val"):
        (root / "labels" / split).mkdir(parents=True)
        for number in range(2):
            _image(root / f"images/{split}/{number}.jpg")
            (root / f"labels/{split}/{number}.txt").write_text("0 0.5 0.5 0.4 0.3\n1 0.3 0.3 0.2 0.2\n")
    (root / "data.yaml").write_text("names: [cat, dog]\n")


def _cityscapes(root: Path) -> None:
    for split in ("train", "val"):
        for number in range(2):
            frame = f"{split}/ulm/ulm_{number:06}_000019"
            _image(root / f"leftImg8bit/{frame}_leftImg8bit.png")
            mask = root / f"gtFine/{frame}_gtFine_labelIds.png"
            mask.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((64, 64), 7, np.uint8)).save(mask)


def _recipe(base: str, root: Path) -> Raw:
    if base in ("segmentation", "detection"):
        return tiny.raw_recipe(root, base)  # type: ignore[arg-type]
    task = "segmentation" if base in ("cityscapes", "voc masks") else "detection"
    student = tiny.FPN if task == "segmentation" else tiny.RETINANET
    return {
        "name": "tiny", "task": task, "data": {"root": str(root), "workers": 0}, "student": student,
        "train": {"epochs": 1, "batch_size": 2, "accelerator": "cpu"},
    }  # fmt: skip


def put(key: str, value: Any) -> Damage:
    """Set one key of the recipe."""

    def damage(raw: Raw, root: Path) -> None:
        node: Any = raw
        *parents, last = key.split(".")
        for name in parents:
            node = node[int(name)] if isinstance(node, list) else node.setdefault(name, {})
        node[last] = value

    return damage


def drop(key: str) -> Damage:
    """Leave one key of the recipe out."""

    def damage(raw: Raw, root: Path) -> None:
        del raw[key]

    return damage


def text(content: str | bytes) -> Damage:
    """Another file in the recipe's place."""

    def damage(raw: Raw, root: Path) -> None:
        raw.clear()
        raw["text"] = content

    return damage


def write(name: str, content: str | bytes) -> Damage:
    """Replace a file of the data, or add one."""

    def damage(raw: Raw, root: Path) -> None:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return damage


def cut(name: str, length: int) -> Damage:
    """Keep the first bytes of a file."""

    def damage(raw: Raw, root: Path) -> None:
        (root / name).write_bytes((root / name).read_bytes()[:length])

    return damage


def remove(name: str) -> Damage:
    """Remove a file or folder."""

    def damage(raw: Raw, root: Path) -> None:
        if (root / name).is_dir():
            shutil.rmtree(root / name)
        else:
            (root / name).unlink()

    return damage


def empty(*names: str) -> Damage:
    """Empty some folders."""

    def damage(raw: Raw, root: Path) -> None:
        for name in names:
            shutil.rmtree(root / name)
            (root / name).mkdir()

    return damage


def mask(name: str, value: int, size: tuple[int, int] = (64, 64), mode: str = "L") -> Damage:
    """A mask of one value."""

    def damage(raw: Raw, root: Path) -> None:
        Image.new(mode, size, value).save(root / name)

    return damage


def void(split: str) -> Damage:
    """Every mask of a split is void."""

    def damage(raw: Raw, root: Path) -> None:
        for file in (root / "masks" / split).iterdir():
            Image.new("L", (64, 64), 255).save(file)

    return damage


def palettes(raw: Raw, root: Path) -> None:
    """Each training mask has a palette of its own."""
    for number, file in enumerate(sorted((root / "masks/train").iterdir())):
        image = Image.new("P", (64, 64), 1)
        image.putpalette([0, 0, 0, 30 * number, 20, 200])
        image.save(file)


def coco(change: Callable[[Any], None], split: str = "train") -> Damage:
    """Change the content of a COCO JSON."""

    def damage(raw: Raw, root: Path) -> None:
        file = root / f"annotations/instances_{split}.json"
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))

    return damage


def box(**values: Any) -> Damage:
    """Change the fifth box of a COCO JSON."""
    return coco(lambda content: content["annotations"][4].update(values))


def replace(name: str, old: str, new: str) -> Damage:
    """Change the text of a file."""

    def damage(raw: Raw, root: Path) -> None:
        content = (root / name).read_text()
        assert old in content
        (root / name).write_text(content.replace(old, new))

    return damage


def both(*damages: Damage) -> Damage:
    """Several of them."""

    def damage(raw: Raw, root: Path) -> None:
        for each in damages:
            each(raw, root)

    return damage


def teacher(name: str, content: bytes | Callable[[Path], object]) -> Damage:
    """Other weights for the teacher, written as bytes or by a function."""

    def damage(raw: Raw, root: Path) -> None:
        if callable(content):
            content(root / name)
        else:
            (root / name).write_bytes(content)
        raw["teacher"]["weights"] = str(root / name)

    return damage


def cut_teacher(suffix: str, length: int) -> Damage:
    """The first bytes of the right weights."""

    def damage(raw: Raw, root: Path) -> None:
        if suffix == "pth":
            torch.save({"a": torch.zeros(1000)}, root / "whole.pth")
        whole = root / ("whole.pth" if suffix == "pth" else "teacher.safetensors")
        teacher(f"cut.{suffix}", whole.read_bytes()[:length])(raw, root)

    return damage


class Malicious:
    """A pickle that would run a command when it is read."""

    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


def _malicious(file: Path) -> None:
    torch.save({"state_dict": Malicious()}, file)


SEG, DET = "segmentation", "detection"
LOSS = "losses.0"

RECIPES: dict[str, Case] = {
    "wrong key": Case(SEG, put("train.epoch", 3), "train",
        ("recipe.yaml does not fit:\n  train.epoch: unknown key; did you mean epochs",)),
    "two wrong keys at once": Case(SEG, put("data.augment", {"flop": 1, "flip": 2}), "train",
        ("data.augment.flop: unknown key; did you mean flip", "data.augment.flip: Input should be less than or equal")),
    "text for a number": Case(SEG, put("train.epochs", "many"), "train",
        ("train.epochs: Input should be a valid integer (given: 'many')",)),
    "no epochs": Case(SEG, put("train.epochs", 0), "train",
        ("train.epochs: Input should be greater than 0 (given: 0)",)),
    "negative seed": Case(SEG, put("train.seed", -1), "train",
        ("train.seed: Input should be greater than or equal to 0",)),
    "learning rate of zero": Case(SEG, put("train.optimizer.lr", 0), "train",
        ("train.optimizer.lr: Input should be gr",)),
    "unknown optimizer": Case(SEG, put("train.optimizer.name", "lion"), "train",
        ("train.optimizer.name: Input should be 'sgd' or 'adamw' (given: 'lion')",)),
    "unknown schedule": Case(SEG, put("train.schedule.name", "cosine"), "train",
        ("train.schedule.name: Input should be 'constant', 'step', 'polynomial' or 'one_cycle' (given: 'cosine')",)),
    "steps without milestones": Case(SEG, put("train.schedule.name", "step"), "train",
        ("train.schedule: step needs milestones, such as [16, 22]",)),
    "two warm-ups": Case(SEG, put("train.schedule.warmup_steps", 9), "train",
        ("train.schedule: one_cycle brings its own warm-up: set pct_start",)),
    "evaluations that miss the last epoch": Case(SEG, put("train.eval_every", 3), "train",
        ("train: eval_every 3 does not divide epochs 2",)),
    "unknown precision": Case(SEG, put("train.precision", "fp8"), "train", ("train.precision: Input should be '32'",)),
    "unknown accelerator": Case(SEG, put("train.accelerator", "abacus"), "train",
        ("train: this machine, or what launched it, cannot run accelerator abacus, ", "Available names are")),
    "no such device": Case(SEG, put("train.devices", 0), "train",
        ("train.devices: give their number, or auto for all of them",)),
    "broken YAML": Case(SEG, text("train: [1"), "train", ("recipe.yaml is not valid YAML: ",)),
    "empty recipe": Case(SEG, text(""), "train", ("recipe.yaml must hold a mapping with the keys name, task, data",)),
    "a list as a recipe": Case(SEG, text("- 1\n- 2"), "train", ("recipe.yaml must hold a mapping with the keys",)),
    "binary recipe": Case(SEG, text(b"name: \xff\xfe\x00"), "train", ("cannot read the recipe", "recipe.yaml: ")),
    "code in a recipe": Case(SEG, text("task: !!python/name:os.system"), "train", ("recipe.yaml is not valid YAML",)),
    "date in a recipe": Case(SEG, text("name: 2024-01-01"), "train",
        ("name is read as a date; write it in quotes if it is meant as text: '2024-01-01'",)),
    "unknown task": Case(SEG, put("task", "depth"), "train",
        ("task: Input should be 'detection' or 'segmentation' (given: 'depth')",)),
    "format of another task": Case(SEG, put("task", "detection"), "train",
        ("task detection needs data.format: coco, yolo, voc, parquet, shards, not masks",)),
    "unknown format": Case(SEG, put("data.format", "cocoo"), "train",
        ("data.format: there is no format 'cocoo'; did you mean coco",)),
    "masks without class names": Case(SEG, put("data.classes", None), "train",
        ("data.classes is missing: data.format masks does not say the class names, so the recipe lists them",)),
    "the same class twice": Case(SEG, put("data.classes", ["a", "b", "c", "d", "e", "a"]), "train",
        ("the class a is listed 2 times: each needs a name of its own",)),
    "images without annotations": Case(DET, put("data.val", {"images": "images/val"}), "train",
        ("data.val.annotations is missing: data.format coco needs it beside `images`",)),
    "neither a name nor images": Case(DET, put("data.val", {"annotations": "x.json"}), "train",
        ("data.val: give either the split's `name` in the format's own layout, or its `images`",)),
    "size of one number": Case(SEG, put("data.resize", 64), "train", ("data.resize", "(given: 64)")),
    "size of zero": Case(SEG, put("data.resize", [0, 64]), "train", ("data.resize", "greater than 0 (given: 0)")),
    "scale from large to small": Case(SEG, put("data.augment", {"scale": [2, 0.5]}), "train",
        ("data.augment: scale must be a range of factors above 0, such as [0.5, 2], not [2.0, 0.5]",)),
    "scale of zero": Case(SEG, put("data.augment", {"scale": [0, 1]}), "train",
        ("data.augment: scale must be a range",)),
    "color of two numbers": Case(SEG, put("student.mean", [0.5, 0.5]), "train", ("student.mean",)),
    "deviation of zero": Case(SEG, put("student.std", [0.2, 0.2, 0]), "train", ("student.std", "greater than 0")),
    "classes of the student": Case(SEG, put("student.num_classes", 3), "train",
        ("student.num_classes: the student has the data's classes; only a teacher may have others",)),
    "unknown method": Case(SEG, put(f"{LOSS}.name", "akam"), "distill",
        ("losses.0 (akam): there is no method 'akam'; did you mean acam",)),
    "method of a missing module": Case(SEG, put(f"{LOSS}.name", "no_such_module:Loss"), "distill",
        ("losses.0 (no_such_module:Loss): name no_such_module:Loss: No module named 'no_such_module'; the m",)),
    "method that is none": Case(SEG, put(f"{LOSS}.name", "pathlib:Path"), "distill",
        ("pathlib:Path is no method: it must be a subclass of FeatureLoss or HeadLoss",)),
    "unknown option": Case(SEG, put(f"{LOSS}.masknum", 3), "distill",
        ("losses.0 (acam): acam has no option 'masknum'; did you mean", "num_masks")),
    "option of a wrong type": Case(SEG, put(f"{LOSS}.num_masks", "many"), "distill",
        ("losses.0 (acam): acam.num_masks: Input should be a valid integer (given: 'many')",)),
    "option that is no choice": Case(SEG, put(f"{LOSS}.mask_grad", "sideways"), "distill",
        ("losses.0 (acam): acam.mask_grad: Input should be ", "(given: 'sideways')")),
    "weight of another word": Case(SEG, put(f"{LOSS}.weight", "automatic"), "distill",
        ("losses.0.weight: must be a number from 0, or auto, not 'automatic'",)),
    "unknown preset": Case(SEG, put(f"{LOSS}.preset", "papr"), "distill",
        ("losses.0 (acam): acam has no preset 'papr'; did you mean paper",)),
    "preset of a method without": Case(SEG, put("losses", [{"name": "dist", "pairs": ["decoder"], "preset": "x"}]),
        "distill", ("losses.0 (dist): dist has no preset 'x'; ",)),
    "negative ramp": Case(SEG, put(f"{LOSS}.ramp_epochs", -1), "distill", ("losses.0.ramp_epochs: Input should be",)),
    "wrong layer": Case(SEG, put(f"{LOSS}.pairs", ["segmentation_heat.0"]), "distill",
        ("losses.0 (acam): student: there is no layer 'segmentation_heat.0' to tap", "mean segmentation_head.0")),
    "wrong layer of the teacher": Case(SEG, put(f"{LOSS}.pairs", [["decoder", "decodr"]]), "distill",
        ("losses.0 (acam): teacher: there is no layer 'decodr' to tap", "decoder")),
    "entry that an output lacks": Case(SEG, put(f"{LOSS}.pairs", ["encoder:9"]), "distill",
        ("losses.0 (acam): student: ", "encoder", "9")),
    "numbers of levels that differ": Case(SEG, put(f"{LOSS}.pairs", [["encoder:*", "decoder"]]), "distill",
        ("encoder:* stands for ", "decoder for 1 of the teacher: name them one by one")),
    "three layers in a pair": Case(SEG, put(f"{LOSS}.pairs", [["a", "b", "c"]]), "distill", ("losses.0.pairs.0",)),
    "no pairs": Case(SEG, put(f"{LOSS}.pairs", []), "distill",
        ("losses.0 (acam): `pairs` is missing", "such as [backbone:*] or [segmentation_head.0]")),
    "boxes in a segmentation": Case(SEG, put("losses", [{"name": "fgd", "pairs": ["decoder"]}]), "distill",
        ("losses.0 (fgd): this method needs boxes, and segmentation has none",)),
    "the same method twice at a layer": Case(SEG, put("losses", [tiny.ACAM, tiny.ACAM]), "distill",
        ("the same method stands twice at one layer: segmentation_head.0/acam",)),
    "unknown architecture": Case(DET, put("student.arch", "retinanett"), "train",
        ("unknown detector retinanett; did you mean retinanet",)),
    "unknown backbone": Case(SEG, put("student.backbone", "resnet19"), "train",
        ("unknown encoder resnet19; did you mean", "resnet18")),
    "architecture of a missing module": Case(SEG, put("student.arch", "no_such_module:net"), "train",
        ("arch no_such_module:net: No module named 'no_such_module'",)),
    "architecture that is no network": Case(DET, put("student", {"arch": "builtins:dict"}), "train",
        ("builtins:dict returned dict; allowed: an acamkd TaskModel, torchvision's RetinaNet, FCOS or FasterRCNN",)),
    "unknown option of an architecture": Case(DET, put("student.options", {"score_tresh": 0.1}), "train",
        ("retinanet has no option score_tresh; did you mean score_thresh",)),
    "four sizes of anchors": Case(DET, put("student.options", {"anchor_sizes": [8, 16, 32, 64]}), "train",
        ("anchor_sizes must be five numbers, one per level of the pyramid, not [8, 16, 32, 64]",)),
    "a width that the heads cannot have": Case(DET, put("student", {**tiny.RETINANET, "arch": "fcos", "options": {}}),
        "train", ("fpn_channels 16: fcos has heads with group norm of 32 groups; give a multiple of 32",)),
    "unknown part to inherit": Case(SEG, put("student", {**tiny.FPN, "inherit": ["segmentation_hat"]}), "distill",
        ("inherit segmentation_hat: the student's network has no such part; did you mean segmentation_head",)),
    "no teacher to train": Case(SEG, drop("teacher"), "train --role teacher",
        ("the recipe tiny has no `teacher` section",)),
    "no teacher to distill from": Case(SEG, drop("teacher"), "distill",
        ("the recipe tiny needs a `teacher` section and `losses` to distill",)),
    "override of a missing entry": Case(SEG, put("name", "tiny"), "train --set losses.3.weight=2",
        ("--set losses.3.weight: there is no entry 3, the list has 1 (counted from 0)",)),
    "override without a value": Case(SEG, put("name", "tiny"), "train --set train.epochs",
        ("--set train.epochs: write key=value, such as train.epochs=20",)),
    "losses that are no list": Case(SEG, write("other.yaml", "name: acam"), "distill --losses data/other.yaml",
        ("losses: must be a list (given: {'name': 'acam'})",)),
    "losses that are no YAML": Case(SEG, write("other.yaml", "- {name: acam"), "distill --losses data/other.yaml",
        ("data/other.yaml is not valid YAML",)),
    "binary losses": Case(SEG, write("other.yaml", b"\xff\xfe\x00"), "distill --losses data/other.yaml",
        ("cannot read the losses data/other.yaml: it is no UTF-8", "save it as UTF-8")),
}  # fmt: skip

DATA: dict[str, Case] = {
    "root that is not there": Case(SEG, put("data", {"root": "nowhere"}), "train",
        ("data.root nowhere: there is no such folder",)),
    "no layout": Case("yolo", remove("data.yaml"), "train",
        ("data.format: auto finds no layout that is known in", "looked for annotations/instances_*.json (coco); ")),
    "two layouts": Case("yolo", write("annotations/instances_train.json", "{}"), "train",
        ("data.format: auto finds both coco and yolo",)),
    "missing folder": Case(SEG, remove("masks/val"), "train",
        ("cannot read the folder", "masks/val: No such file or directory")),
    "missing image": Case(SEG, remove("images/train/00001.jpg"), "train",
        ("1 problem:", "masks/train/00001.png: the mask has no image in", "images/train")),
    "missing mask": Case(SEG, remove("masks/train/00001.png"), "train",
        ("1 problem:", "images/train/00001.jpg: the image has no mask")),
    "mask of a wrong size": Case(SEG, mask("masks/train/00002.png", 0, (32, 64)), "train",
        ("1 problem:", "masks/train/00002.png: the mask has 32 x 64 pixels, but 00002.jpg has 64 x 64 pixels")),
    "class id out of range": Case(SEG, mask("masks/train/00002.png", 17), "train",
        ("masks/train/00002.png: the mask holds 17, but the values for the 6 classes and for void are 0 to 5 and",)),
    "mask of colors": Case(SEG, mask("masks/train/00002.png", 0, mode="RGB"), "train",
        ("masks/train/00002.png: the mask cannot be read: it is of mode RGB; save class ids, as 8-bit gray",)),
    "mask of 16 bits": Case(SEG, mask("masks/train/00002.png", 0, mode="I;16"), "train",
        ("it is of mode I;16; save class ids, as 8-bit gray or with a palette, not colors or 16 bits",)),
    "broken mask": Case(SEG, cut("masks/val/00002.png", 60), "train",
        ("masks/val/00002.png: the mask cannot be read",)),
    "broken image": Case(SEG, cut("images/val/00003.jpg", 200), "train",
        ("1 problem:", "images/val/00003.jpg: the image cannot be read")),
    "empty image": Case(SEG, write("images/val/00003.jpg", ""), "train", ("00003.jpg: the image cannot be read",)),
    "image of 16 bits": Case("yolo", mask("images/train/1.png", 0, mode="I;16"), "train",
        ("images/train/1.png: the image cannot be read: its pixels are of mode I;16; save it with 8 bits per",)),
    "no images at all": Case(SEG, empty("images/train", "masks/train"), "train",
        ("images/train: the folder holds no images (.jpg, .jpeg, .jfif, .png",)),
    "missing annotations": Case(DET, put("data.val.annotations", "annotations/val.json"), "train",
        ("cannot read the annotations", "annotations/val.json: No such file or directory")),
    "broken JSON": Case(DET, cut("annotations/instances_val.json", 300), "train",
        ("instances_val.json is not valid JSON: ", "line 1 column")),
    "empty JSON": Case(DET, write("annotations/instances_val.json", ""), "train", ("is not valid JSON",)),
    "JSON of something else": Case(DET, write("annotations/instances_val.json", '{"shapes": []}'), "train",
        ("is not a COCO file: it needs the lists images, annotations, categories",)),
    "deep JSON": Case(DET, write("annotations/instances_val.json", "[" * 100_000), "train", ("is not valid JSON",)),
    "image without a size": Case(DET, coco(lambda c: c["images"][1].pop("width")), "train",
        ("instances_train.json: images[1] has no width, or one of a wrong type",)),
    "image with a size in words": Case(DET, coco(lambda c: c["images"][1].update(width="128")), "train",
        ("instances_train.json: images[1] has no width, or one of a wrong type",)),
    "category without a name": Case(DET, coco(lambda c: c["categories"][0].pop("name")), "train",
        ("instances_train.json: categories[0] has no name",)),
    "two categories of one name": Case(DET, coco(lambda c: c["categories"][1].update(name="disc")), "train",
        ("the class disc is listed 2 times: each needs a name of its own",)),
    "two images of one id": Case(DET, coco(lambda c: c["images"][1].update(id=1)), "train",
        ("instances_train.json: 1 images share an id with another",)),
    "an image that is not there": Case(DET, coco(lambda c: c["images"][1].update(file_name="no.jpg")), "train",
        ("images/train/no.jpg: there is no such image",)),
    "an image of another size": Case(DET, coco(lambda c: c["images"][1].update(height=100)), "train",
        ("00002.jpg has 128 x 128 pixels, but", "says 128 x 100 pixels")),
    "box the wrong way round": Case(DET, box(bbox=[10, 10, -5, 5]), "train",
        ("instances_train.json: annotation 5 of image ", "the box from (10, 10) to (5, 15) on ", " has no area")),
    "box of NaN": Case(DET, box(bbox=[10, 10, float("nan"), 5]), "train",
        ("annotation 5 of image", "has no defined area")),
    "box outside": Case(DET, box(bbox=[200, 10, 5, 5]), "train", ("annotation 5 of image", "lies outside 0000")),
    "box of three numbers": Case(DET, box(bbox=[1, 2, 3]), "train",
        ("annotation 5 of image", "it needs image_id, category_id and bbox [x, y, width, height]")),
    "box of a list": Case(DET, box(bbox=[[1], 2, 3, 4]), "train", ("it needs image_id, category_id and bbox",)),
    "box of an unknown image": Case(DET, box(image_id=99), "train",
        ("annotation 5 of image 99: the file lists no image 99",)),
    "box of an unknown category": Case(DET, box(category_id=7), "train",
        ("the file lists no category 7, only 1, 2, 3, 4, 5",)),
    "crowd of a word": Case(DET, box(iscrowd=[2]), "train", ("annotation 5", "iscrowd must be 0 or 1, not [2]")),
    "boxes that are no list": Case(DET, coco(lambda c: c.update(annotations={"1": {}})), "train",
        ("is not a COCO file",)),
    "no boxes at all": Case(DET, coco(lambda c: c.update(annotations=[])), "train",
        ("instances_train.json: there is no box for any image",)),
    "other classes in val": Case(DET, coco(lambda c: c["categories"][0].update(name="disk"), "val"), "train",
        ("train and val must list the same classes in the same order, but train has disc, square",)),
    "other classes in the recipe": Case(DET, put("data.classes", ["cat"]), "train",
        ("data.classes is cat, but the categories of", "are disc, square, triangle, ring, cross: leave")),
    "voc: no such list": Case("voc", put("data.train", {"name": "trainval"}), "train",
        ("there is no list", "ImageSets/Main/trainval.txt; name one with data.train.name and data.val.name (there")),
    "voc: empty list": Case("voc", write("ImageSets/Main/val.txt", "\n\n"), "train", ("val.txt: the list is empty",)),
    "voc: binary list": Case("voc", write("ImageSets/Main/val.txt", b"\xff\xfe\x00"), "train",
        ("val.txt is not a text",)),
    "voc: broken XML": Case("voc", cut("Annotations/train_1.xml", 150), "train",
        ("1 problem:", "Annotations/train_1.xml: it is not valid XML: ", "line 3")),
    "voc: empty XML": Case("voc", write("Annotations/train_1.xml", ""), "train", ("train_1.xml: it is not valid XML",)),
    "voc: missing XML": Case("voc", remove("Annotations/train_1.xml"), "train",
        ("train_1.xml: the annotation cannot be read: No such file or directory",)),
    "voc: XML without a size": Case("voc", replace("Annotations/train_1.xml", "width>", "breadth>"), "train",
        ("train_1.xml: it has no size with width and height above 0",)),
    "voc: XML with a size of NaN": Case("voc", replace("Annotations/train_1.xml", "<width>64", "<width>nan"), "train",
        ("train_1.xml: it has no size with width and height above 0",)),
    "voc: missing image": Case("voc", remove("JPEGImages/val_0.jpg"), "train",
        ("val_0.jpg: there is no such image",)),
    "voc: unknown class": Case("voc",
        both(put("data.classes", ["cat", "dog"]), replace("Annotations/train_1.xml", "dog", "dgo")), "train",
        ("train_1.xml: object 1 (dgo): there is no class 'dgo'; did you mean dog?",)),
    "voc: box of words": Case("voc", replace("Annotations/train_1.xml", "<xmin>5", "<xmin>five"), "train",
        ("train_1.xml: object 1 (dog): it needs a bndbox with the numbers xmin, ymin, xmax and ymax",)),
    "voc: box the wrong way round": Case("voc", replace("Annotations/train_1.xml", "<xmax>30", "<xmax>3"), "train",
        ("train_1.xml: object 1 (dog): the box from (4, 5) to (3, 40) on train_1.jpg has no area",)),
    "cityscapes: paths beside the layout": Case("cityscapes",
        put("data", {"format": "cityscapes", "train": {"images": "leftImg8bit"}}), "train",
        ("data.train.images: data.format cityscapes has folders of its own: give the split's `name` instead",)),
    "voc masks: unknown id": Case("voc masks", mask("SegmentationClass/val_1.png", 33), "train",
        ("SegmentationClass/val_1.png: the mask holds 33, but the values for the 21 classes and for void are 0 to",)),
    "voc masks: missing mask": Case("voc masks", remove("SegmentationClass/val_1.png"), "train",
        ("SegmentationClass/val_1.png: there is no such mask",)),
    "yolo: unknown class": Case("yolo", write("labels/train/1.txt", "0 0.5 0.5 0.1 0.1\n2 0.5 0.5 0.1 0.1\n"), "train",
        ("1 problem:", "labels/train/1.txt:2: class 2 is none of the 2, 0 to 1")),
    "yolo: pixels": Case("yolo", write("labels/train/1.txt", "1 32 20 10 8"), "train",
        ("labels/train/1.txt:1: the center (32, 20) must be shares of width and height from 0 to 1, not pixels",)),
    "yolo: polygon": Case("yolo", write("labels/train/1.txt", "1 0.1 0.1 0.2 0.1 0.2"), "train",
        ("labels/train/1.txt:1: a box is `class cx cy w h`, not `1 0.1 0.1 0.2 0.1 0.2`; a polygon",)),
    "yolo: class by name": Case("yolo", write("labels/train/1.txt", "dog 0.5 0.5 0.1 0.1"), "train",
        ("labels/train/1.txt:1: a box is `class cx cy w h`",)),
    "yolo: binary labels": Case("yolo", write("labels/train/1.txt", b"\xff\xfe\x00"), "train",
        ("1.txt is not a text file",)),
    "yolo: no labels": Case("yolo", remove("labels/val"), "train",
        ("cannot read the folder", "labels/val: No such file")),
    "yolo: no images": Case("yolo", remove("images/val"), "train",
        ("there is no folder of images for the split val; looked for",)),
    "yolo: no names": Case("yolo", write("data.yaml", "nc: 2"), "train",
        ("the class names are missing: give `names` in",)),
    "yolo: names with a gap": Case("yolo", write("data.yaml", "names: {0: cat, 2: dog}"), "train",
        ("data.yaml: names must be numbered 0 to 1, not 0, 2",)),
    "yolo: broken data.yaml": Case("yolo", write("data.yaml", "names: [cat"), "train",
        ("data.yaml is not valid YAML",)),
    "cityscapes: missing mask": Case("cityscapes",
        remove("gtFine/val/ulm/ulm_000001_000019_gtFine_labelIds.png"), "train",
        ("ulm_000001_000019_gtFine_labelIds.png: there is no such mask",)),
    "cityscapes: unknown id": Case("cityscapes",
        mask("gtFine/val/ulm/ulm_000001_000019_gtFine_labelIds.png", 40), "train",
        ("the mask holds 40, but the values for the 19 classes and for void are 0 to 33 and 255",)),
    "cityscapes: coarse masks only": Case("cityscapes",
        both(remove("gtFine/val"), write("gtCoarse/x", ""), lambda _, root: (root / "gtCoarse/val").mkdir()), "train",
        ("gtFine/val: there is no such folder; ", "gtCoarse/val is there, but coarse masks are not read")),
    "cityscapes: other classes": Case("cityscapes", put("data.classes", ["road"]), "train",
        ("data.classes is road, but the classes of Cityscapes are road, sidewalk",)),
    "masks of void alone": Case(SEG, void("train"), "train",
        ("none of the 8 images has a pixel that is not void: nothing can be learned or scored; ",)),
    "masks of void alone, to distill": Case(SEG, void("train"), "distill",
        ("none of the 8 images has a pixel that is not void",)),
    "validation masks of void alone": Case(SEG, void("val"), "train",
        ("none of the 4 images has a pixel that is not void",)),
    "a palette per mask": Case(SEG, palettes, "train",
        ("the palette's color 1 is #", "data.mask_values")),
    "yolo: names that are no text": Case("yolo", write("data.yaml", "names: [yes, no]"), "train",
        ('names: class 0 is written yes, which YAML reads as True, not as text: put it in quotes, "yes"',)),
    "yolo: path that is not there": Case("yolo", replace("data.yaml", "names", "path: gone\nnames"), "train",
        ("data.yaml: there is no folder for path gone; looked for",)),
    "coco: an infinite area": Case(DET, box(area=float("inf")), "train",
        ("has the area inf, which must be a finite number from 0 on",)),
    "no unlabeled images": Case(SEG, put("data.unlabeled", "more"), "distill",
        ("cannot read the folder", "more: No such")),
    "broken unlabeled image": Case(SEG, both(put("data.unlabeled", "more"), write("more/1.jpg", "x")), "distill",
        ("more/1.jpg: the image cannot be read",)),
    "unlabeled images that no loss can use": Case(SEG,
        both(put("data.unlabeled", "images/val"), put(f"{LOSS}.mask_grad", "task")), "distill",
        ("no loss can learn from unlabeled images, since each needs targets: segmentation_head.0/acam",)),
}  # fmt: skip

WEIGHTS: dict[str, Case] = {
    "missing file": Case(SEG, put("teacher.weights", "gone.safetensors"), "distill",
        ("weights gone.safetensors: there is no such file",)),
    "no weights": Case(SEG, put("teacher.weights", None), "distill",
        ("the teacher has no weights: set teacher.weights, or train it first (acamkd train RECIPE --role teacher",)),
    "file of another type": Case(SEG, put("teacher.weights", "teacher.onnx"), "distill",
        ("weights teacher.onnx: give a .safetensors, .pth or .pt file, or a torchvision name",)),
    "unknown weights of torchvision": Case(SEG, put("teacher.weights", "ResNet50_Weights.IMAGENET1K_V3"), "distill",
        ("torchvision has no weights ResNet50_Weights.IMAGENET1K_V3; did you mean ResNet50_Weights.IMAGENET1K_V",)),
    "file of another network": Case(SEG,
        teacher("teacher.pth", lambda file: torch.save(torch.nn.Conv2d(3, 6, 1).state_dict(), file)), "distill",
        ("teacher.pth: 0 of 99 tensors matched", "2 left over (weight, bias)", "every tensor is needed here")),
    "another backbone": Case(SEG, put("teacher.backbone", "resnet18"), "distill",
        ("fpn on resnet18 from", "teacher.safetensors", "missing (encoder.conv1.weight", "check arch, backbone")),
    "other classes": Case(SEG, put("data.classes", list("abcdefgh")), "distill",
        ("2 of wrong shape (segmentation_head.0.bias (6,) in the file, (8,) in the network",
         "teacher.num_classes")),
    "safetensors: truncated": Case(SEG, cut_teacher("safetensors", 5000), "distill",
        ("cut.safetensors: the file is damaged (", "copy it again")),
    "safetensors: empty": Case(SEG, teacher("t.safetensors", b""), "distill", ("t.safetensors: the file is damaged",)),
    "safetensors: text": Case(SEG, teacher("t.safetensors", b"<html>404</html>"), "distill", ("the file is damaged",)),
    "safetensors: a header of 2^60 bytes": Case(SEG,
        teacher("t.safetensors", (1 << 60).to_bytes(8, "little")), "distill",
        ("t.safetensors: the file is damaged",)),
    "safetensors: without tensors": Case(SEG, teacher("t.safetensors", (2).to_bytes(8, "little") + b"{}"), "distill",
        ("t.safetensors: no state dict in it",)),
    "safetensors: a folder": Case(SEG, teacher("t.safetensors", lambda file: file.mkdir()), "distill",
        ("t.safetensors: there is no such file",)),
    "pth: truncated": Case(SEG, cut_teacher("pth", 900), "distill",
        ("cut.pth: the file is damaged, or no PyTorch file",)),
    "pth: empty": Case(SEG, teacher("t.pth", b""), "distill", ("t.pth: the file is damaged, or no PyTorch file",)),
    "pth: text": Case(SEG, teacher("t.pth", b"version https://git-lfs"), "distill", ("t.pth: the file is damaged",)),
    "pth: without tensors": Case(SEG, teacher("t.pth", lambda file: torch.save({"epoch": 3}, file)), "distill",
        ("t.pth: no state dict in it; its keys are epoch; save one by torch.save(net.state_dict(), FILE)",)),
    "pth: a list": Case(SEG, teacher("t.pth", lambda file: torch.save([torch.zeros(2)], file)), "distill",
        ("t.pth: no state dict in it",)),
    "pth: code": Case(SEG, teacher("t.pth", _malicious), "distill",
        ("t.pth: the file would call posix.system; no file of weights does: delete it",)),
    "not a number in them": Case(SEG,
        teacher("t.pth", lambda file: torch.save({"decoder": float("nan")}, file)), "distill",
        ("t.pth: no state dict in it",)),
    "weights of a backbone that are gone": Case(SEG, put("student.backbone_weights", "gone.pth"), "train",
        ("weights gone.pth: there is no such file",)),
    "student's weights that do not fit": Case(SEG,
        both(lambda _, root: torch.save({"a": torch.zeros(2)}, root / "s.pth"), put("student.weights", "data/s.pth")),
        "train", ("data/s.pth matched almost nothing of fpn on tu-test_efficientnet: 0 of 99 tensors",)),
    "tokens that are gone": Case(SEG,
        put("losses", [{"name": "maskd", "pairs": ["decoder"], "tokens": "gone.safetensors"}]), "distill",
        ("losses.0 (maskd): weights gone.safetensors: there is no such file",)),
    "tokens of another layer": Case(SEG,
        both(lambda _, root: _tokens(root / "t.safetensors"),
             put("losses", [{"name": "maskd", "pairs": ["decoder"], "tokens": "data/t.safetensors"}])), "distill",
        ("losses.0 (maskd): the tokens file has none for the teacher's layer decoder, only for encoder",)),
}  # fmt: skip


def _tokens(file: Path) -> None:
    from safetensors.torch import save_file

    save_file({"encoder/tokens": torch.zeros(2, 3)}, file)


CASES = {**RECIPES, **DATA, **WEIGHTS}


def test_no_case_hides_another() -> None:
    assert len(CASES) == len(RECIPES) + len(DATA) + len(WEIGHTS)
    assert len(CASES) >= 100


@pytest.mark.parametrize("name", CASES)
def test_it_is_one_message_and_leaves_nothing(
    name: str, acamkd: Command, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "data"
    shutil.copytree(drawn / case.base.partition(" ")[0], root)
    raw = _recipe(case.base, root)
    case.damage(raw, root)
    file = tmp_path / "recipe.yaml"
    content = raw["text"] if set(raw) == {"text"} else yaml.safe_dump(raw)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    there = sorted(tmp_path.rglob("*"))
    command, *options = case.words.split()
    result = acamkd(command, file, *options)
    assert result.code == 1, result.err
    for part in case.parts:
        assert part in result.error
    assert sorted(tmp_path.rglob("*")) == there
