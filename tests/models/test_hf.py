"""Every model type of transformers that the library knows, on tiny networks at random."""

from __future__ import annotations

import json
import logging
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from acamkd import config
from acamkd.distillation.build import build_distiller
from acamkd.distillation.taps import probe
from acamkd.errors import AcamkdError
from acamkd.models import Target, TaskModel, build, hf, save_weights
from acamkd.models.base import Batch, PixelSize
from acamkd.models.build import family_of
from acamkd.models.hf_kinds import KINDS
from tiny_hf import OPTIONS

transformers: Any = pytest.importorskip("transformers")

CLASSES = ("cat", "dog", "cow", "owl", "ant")
SIDE = 128
MODEL_TYPES = list(KINDS)
QUICK = {"rt_detr_v2", "d_fine", "conditional_detr", "yolos", "segformer", "mask2former"}
"""One of each kind of code; the others are slow tests: pytest -m slow tests/models/test_hf.py."""

DETECTORS = [name for name, kind in KINDS.items() if kind.task == "detection"]


def make(name: str, classes: int = len(CLASSES), size: Any = (SIDE, SIDE), seed: int = 0, **section: Any) -> TaskModel:
    torch.manual_seed(seed)
    given = {"arch": f"hf/{name}", "options": OPTIONS[name], **section}
    return build(config.Model(**given), KINDS[name].task, classes, size)


def images() -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=random) for size in ((100, 120), (128, 90))]


def targets(name: str) -> list[Target]:
    """The second image has nothing to learn from."""
    if KINDS[name].task == "detection":
        boxes = torch.tensor([[10.0, 10, 60, 70], [50, 20, 110, 90], [0, 0, 120, 100]])
        labels, crowd = torch.tensor([1, 5, 2]), torch.tensor([0, 0, 1])
        nothing = {"boxes": boxes[:0], "labels": labels[:0], "iscrowd": crowd[:0]}
        return [{"boxes": boxes, "labels": labels, "iscrowd": crowd}, nothing]
    mask = torch.zeros(100, 120, dtype=torch.long)
    mask[20:70, 30:90] = 3
    return [{"mask": mask}, {"mask": torch.full((128, 90), 255)}]


@pytest.mark.parametrize(
    ("name", "more"), [("d_fine", {"encoder_in_channels": [32, 48, 64]}), ("conditional_detr", {})]
)
def test_a_backbone_of_timm_takes_the_weight_files_of_timm(name: str, more: dict[str, Any], tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    weights = timm.create_model("test_efficientnet").state_dict()
    file = tmp_path / "backbone.pth"
    torch.save(weights, file)
    described = {
        "model_type": "timm_backbone", "backbone": "test_efficientnet", "out_indices": [2, 3, 4],
        "freeze_batch_norm_2d": False,
    }  # fmt: skip
    options = {**OPTIONS[name], "backbone_config": described, **more}
    model = make(name, options=options, backbone_weights=str(file))
    own = model.backbone.state_dict()
    assert own.keys() <= weights.keys()
    torch.testing.assert_close(own, {name: weights[name] for name in own})


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MODEL_TYPES]
)
def test_it_learns_distills_predicts_and_comes_back(name: str, tmp_path: Path) -> None:
    kind, model = KINDS[name], make(name)

    # The loss is finite and falls on two images, of which one is empty; it is finite on empty ones alone.
    batch = model.prepare(images(), targets(name))
    # Where queries are chosen anew in each step, the loss jumps at first.
    steps, rate = (12, 5e-3) if "group_detr" in OPTIONS[name] else (5, 2e-3)
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    losses = []
    for _ in range(steps):
        torch.manual_seed(0)  # of dropout and denoising
        (loss,) = model.train().loss(model(batch), batch).values()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert losses[-1] < losses[0] < 200
    nothing = model.prepare(images()[1:] * 2, targets(name)[1:] * 2)
    (loss,) = model.loss(model(nothing), nothing).values()
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.isfinite()
    with torch.no_grad():
        assert all(term.isfinite() for term in model.eval().loss(model(batch), batch).values())

    # What the table names can be tapped: maps of the input's form, each stride once.
    maps = probe(model, model.comparable_layers(), batch)
    assert maps
    strides = [SIDE // x.shape[-1] for x in maps.values()]
    assert all(x.shape[2:] == (SIDE // stride,) * 2 for x, stride in zip(maps.values(), strides, strict=True))
    if kind.task == "detection":
        assert len(strides) == len(set(strides))

    # One step of ACAM-KD, whose masks look ahead, reaches the student through every pair.
    teacher = make(name, seed=1).eval()
    distiller = build_distiller(
        model.train(), teacher, [config.Loss(name="acam", pairs=model.comparable_layers(), weight=1.0)]
    )
    terms = distiller(batch)
    torch.stack(list(terms.values())).sum().backward()  # type: ignore[no-untyped-call]
    assert {key.partition("/")[0] for key in terms} == {"task", *maps}
    assert all(term.isfinite() for term in terms.values())
    model.zero_grad()
    optimizer.step()

    # The prediction is the same from our file, and from transformers' own loading of the folder.
    predictions = model.eval().predict(images())
    assert {len(x) for x in predictions[0].values()} == {20 if kind.task == "detection" else 100}
    if kind.task == "detection":
        assert all(int(each["labels"].min()) >= 1 and int(each["labels"].max()) <= 5 for each in predictions)
    file = tmp_path / "student.safetensors"
    save_weights(model.net, file)
    model.write_config(file, CLASSES)
    for again in (make(name, arch=f"hf/{tmp_path}", options={}), make(name, weights=str(file))):
        again.eval()
        assert all(same(*pair) for pair in zip(again.predict(images()), predictions, strict=True))
    assert again.comparable_layers() == model.comparable_layers()
    from_pretrained(model, tmp_path)

    # A head for other classes, and the rest as it was.
    other = make(name, classes=3, arch=f"hf/{tmp_path}", options={})
    kept, new = model.net.state_dict(), other.net.state_dict()
    changed = [key for key in kept if kept[key].shape != new[key].shape]
    assert 0 < len(changed) < 20
    assert all(torch.equal(new[key], kept[key]) for key in kept if key not in changed)


def test_how_far_the_teacher_runs_changes_nothing_in_the_student() -> None:
    """It runs as a whole in the first step after a resume alone, and its loss would draw random points."""
    pairs = KINDS["mask2former"].layers
    distiller = build_distiller(
        make("mask2former").train(), make("mask2former", seed=1), [config.Loss(name="pkd", pairs=pairs)]
    )
    batch, terms = distiller.student.prepare(images(), targets("mask2former")), []
    for _ in range(2):
        torch.manual_seed(0)
        terms.append(distiller(batch))
    assert same(*terms)


def from_pretrained(model: TaskModel, folder: Path) -> None:
    """Nothing of ours reads the folder: the same pixels, and the same outputs of the network."""
    network: Any = type(model.net)
    net = network.from_pretrained(folder).eval()
    assert list(net.config.id2label.values()) == list(CLASSES)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    square = images()[0][:, :100, :100]
    inputs = processor(images=square, return_tensors="pt")
    batch = model.prepare([square])
    assert torch.allclose(inputs["pixel_values"], model.normalize(batch), atol=1e-5)
    with torch.no_grad():
        outputs = net(**inputs)
    if model.task == "segmentation":
        (mask,) = processor.post_process_semantic_segmentation(outputs, target_sizes=[(100, 100)])
        assert (mask == model.predict([square])[0]["mask"]).float().mean() > 0.99
        return
    (found,) = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=[(100, 100)])
    ours = model.predict([square])[0]
    best = found["scores"].sort(descending=True)[0][: len(ours["scores"])]
    assert torch.allclose(best, ours["scores"], atol=1e-5)
    theirs = torch.cat([found["boxes"], 1000.0 * (found["labels"][:, None] + 1)], dim=1)
    own = torch.cat([ours["boxes"], 1000.0 * ours["labels"][:, None]], dim=1)
    distances = torch.cdist(own, theirs, compute_mode="donot_use_mm_for_euclid_dist")
    assert distances.min(dim=1)[0].max() < 0.01  # as sets: the order of equal scores may flip


@pytest.mark.parametrize(
    ("name", "size", "said"),
    [
        ("segformer", (SIDE, SIDE), ""),
        ("yolos", (SIDE, 96), ""),
        ("yolos", config.ShortLong(short=64, long=160), "100 x 130 pixels become 64 x "),
        ("eomt", (SIDE, SIDE), "100 x 130 pixels become 98 x 128, here 128 x 128"),
        ("dpt", config.ShortLong(short=64, long=160), "AttributeError"),
    ],
)
def test_what_transformers_would_prepare_otherwise_is_said_once(
    name: str, size: Any, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make(name, size=size).eval()
    for _ in range(2):
        model.write_config(tmp_path / "student.safetensors", CLASSES)
    found = [message for message in caplog.messages if "prepares images otherwise" in message]
    assert len(found) == bool(said)
    assert all(said in message for message in found)


def test_a_size_of_ours_is_exact_whatever_the_processor_kept(tmp_path: Path) -> None:
    model = make("dpt", size=(96, SIDE))
    save_weights(model.net, tmp_path / "student.safetensors")
    model.write_config(tmp_path / "student.safetensors", CLASSES)
    file = tmp_path / "preprocessor_config.json"
    kept = json.loads(file.read_text())
    file.write_text(json.dumps({**kept, "keep_aspect_ratio": True, "ensure_multiple_of": 14}))
    again = make("dpt", size=(96, SIDE), arch=f"hf/{tmp_path}", options={})
    again.write_config(tmp_path / "student.safetensors", CLASSES)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    image = torch.zeros(3, 100, 200, dtype=torch.uint8)
    assert processor(images=image, return_tensors="pt")["pixel_values"].shape == (1, 3, 96, SIDE)


@pytest.mark.parametrize("name", ["detr", "deformable_detr", "rf_detr"])
def test_a_mask_says_where_the_image_ends(name: str) -> None:
    model: Any = make(name, size=config.ShortLong(short=90, long=100)).eval()
    batch = model.prepare([torch.zeros(3, 180, 200, dtype=torch.uint8)])
    mask = model.inputs(batch)["pixel_mask"]
    assert mask.shape == (1, 96, 128)
    assert mask[0, :90, :100].all()
    assert mask.sum() == 90 * 100


def test_boxes_of_a_padded_image_come_back() -> None:
    model = make("detr", size=config.ShortLong(short=90, long=120))
    given = [{"boxes": torch.tensor([[10.0, 20, 50, 60]]), "labels": torch.tensor([2])}]
    batch = model.prepare([torch.zeros(3, 180, 200, dtype=torch.uint8)], given)
    assert (batch.sizes, batch.input_size) == ([(90, 100)], (96, 128))
    assert batch.targets is not None
    assert torch.allclose(batch.targets[0]["boxes"], torch.tensor([[5.0, 10, 25, 30]]))
    (labels,) = model._labels(batch)  # type: ignore[operator]
    assert torch.allclose(labels["boxes"], torch.tensor([[0.15, 20 / 90, 0.2, 20 / 90]]))
    logits = torch.full((1, 1, 6), -20.0)
    logits[0, 0, 1] = 20
    (found,) = model.decode({"logits": logits, "pred_boxes": labels["boxes"][None]}, batch)
    assert torch.allclose(found["boxes"], given[0]["boxes"], atol=1e-4)
    assert (found["labels"].tolist(), found["scores"].tolist()) == ([2], [1.0])


def test_boxes_without_area_do_not_train() -> None:
    model: Any = make("rt_detr")
    boxes = torch.tensor([[10.0, 10, 60, 70], [20, 20, 20, 40], [60, 30, 60, 50]])
    boxes[2, 2] = boxes[2, 2].nextafter(torch.tensor(61.0))  # its corners coincide as fractions only
    batch = model.prepare([images()[1]], [{"boxes": boxes, "labels": torch.tensor([1, 2, 3])}])
    (labels,) = model._labels(batch)
    assert labels["class_labels"].tolist() == [0]
    assert model.loss(model(batch), batch)["detection"].isfinite()


def test_a_network_that_diverged_is_said() -> None:
    model = make("rt_detr")
    batch = model.prepare(images(), targets("rt_detr"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    with pytest.raises(AcamkdError, match="boxes of RTDetrForObjectDetection are no longer finite: lower the learning"):
        model(batch)


@pytest.mark.parametrize("name", ["rt_detr", "segformer"])
def test_whole_numbers_as_colors_make_floats(name: str) -> None:
    model = make(name, mean=(0, 0, 0), std=(1, 1, 1))
    assert model.mean.dtype == model.std.dtype == torch.float32
    batch = model.prepare([torch.full((3, SIDE, SIDE), 51, dtype=torch.uint8)])
    assert torch.allclose(model.normalize(batch), torch.tensor(0.2))


@pytest.mark.parametrize(
    ("name", "mean", "std", "size", "is_bgr"),
    [
        ("rt_detr", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (640, 640), False),
        ("beit", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), (224, 224), False),
        ("mobilevit", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), config.ShortLong(short=224, long=2**31 - 1), True),
        ("detr", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), config.ShortLong(short=800, long=1333), False),
    ],
)
def test_images_are_prepared_as_the_processor_says(
    name: str, mean: tuple[float, ...], std: tuple[float, ...], size: Any, is_bgr: bool
) -> None:
    model: Any = make(name, size=None)
    assert torch.allclose(model.mean.flatten(), torch.tensor(mean))
    assert torch.allclose(model.std.flatten(), torch.tensor(std))
    assert (model.preprocessing.resize, model.preprocessing.is_bgr) == (size, is_bgr)
    other: Any = make(name, mean=(0.1, 0.2, 0.3), size=(64, 96))
    assert torch.allclose(other.mean.flatten(), torch.tensor((0.1, 0.2, 0.3)))
    assert other.preprocessing.resize == (64, 96)
    batch = other.prepare([torch.ones(3, 20, 30)])
    first = other.normalize(batch)[0, :, 0, 0]
    expected = (1 - torch.tensor((0.1, 0.2, 0.3))) / torch.tensor(std)
    assert torch.allclose(first, expected.flip(0) if is_bgr else expected, atol=1e-5)


def test_a_folder_says_how_images_are_prepared(tmp_path: Path) -> None:
    model = make("rt_detr")
    file = tmp_path / "student.safetensors"
    save_weights(model.net, file)
    model.write_config(file, CLASSES)
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    settings |= {"size": {"height": 64, "width": 96}, "image_mean": [0.1, 0.2, 0.3], "rescale_factor": 2 / 255}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    again: Any = make("rt_detr", size=None, arch=f"hf/{tmp_path}", options={})
    assert again.preprocessing.resize == (64, 96)
    assert torch.allclose(again.mean.flatten(), torch.tensor([0.05, 0.1, 0.15]))
    assert torch.allclose(again.std.flatten(), torch.tensor(0.5))


def test_what_does_not_fit_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(AcamkdError, match="hf/rt_detr has no option num_querys; did you mean num_queries"):
        make("rt_detr", options={"num_querys": 3})
    with pytest.raises(AcamkdError, match=r"hf/rt_detr3 is no folder .* no model type; did you mean rt_detr"):
        make("rt_detr", arch="hf/rt_detr3")
    with pytest.raises(AcamkdError, match="hf/detr is for detection, and the recipe for segmentation; did you mean"):
        family_of("hf/detr", "segmentation")
    with pytest.raises(AcamkdError, match=r"hf/d_fine cannot be built: .*33 must be divisible by .*; its options are"):
        make("d_fine", options={**OPTIONS["d_fine"], "d_model": 33})
    with pytest.raises(AcamkdError, match=r"takes images of one size alone: set data.resize to \[128, 128\]"):
        make("eomt", options={**OPTIONS["eomt"], "image_size": 128}, size=(64, 64))
    model = make("detr")
    batch = model.prepare(images(), [{"boxes": torch.ones(1, 4), "labels": torch.tensor([6])}] * 2)
    with pytest.raises(AcamkdError, match="a target has a label above 5"):
        model.loss(model(batch), batch)
    wide = make("segformer", size=(96, 100)).prepare([torch.zeros(3, 96, 100, dtype=torch.uint8)])
    assert wide.input_size == (96, 128)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(AcamkdError, match="the model type bert is not supported"):
        make("detr", arch=f"hf/{tmp_path}")
    save_weights(model.net, tmp_path / "w.safetensors")
    model.write_config(tmp_path / "w.safetensors", CLASSES)
    with caplog.at_level(logging.WARNING):
        make("detr", classes=2, arch=f"hf/{tmp_path}", options={})
    with pytest.raises(AcamkdError, match=rf"^hf/{tmp_path} has no option num_querys; did you mean num_queries"):
        make("detr", arch=f"hf/{tmp_path}", options={"num_querys": 3})
    assert "2 of" in caplog.text
    assert "start at random: class_labels_classifier.weight" in caplog.text


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("rt_detr", (100, 128), "RTDetrForObjectDetection needs images whose sides are multiples of 32, and got "
         "100 x 128: set data.resize"),
        ("eomt", (64, 96), r"EomtForUniversalSegmentation takes images of \(128, 128\) alone, and got 64 x 96: set "
         "data.resize, or take networks of one size"),
    ],
)  # fmt: skip
def test_a_batch_of_a_size_that_it_does_not_take_is_refused(name: str, size: PixelSize, message: str) -> None:
    with pytest.raises(AcamkdError, match=f"^{message}$"):
        make(name)(Batch(torch.zeros(1, 3, *size), [size], [size]))


def test_a_processor_that_no_recipe_can_express_is_said(tmp_path: Path) -> None:
    model: Any = make("rf_detr")
    save_weights(model.net, tmp_path / "w.safetensors")
    model.write_config(tmp_path / "w.safetensors", CLASSES)
    file = tmp_path / "preprocessor_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "resample": 3}))
    bicubic: Any = make("rf_detr", arch=f"hf/{tmp_path}", options={})
    with pytest.raises(
        AcamkdError, match=r"^RfDetrForObjectDetection resizes by bicubic interpolation, which exported"
    ):
        bicubic.export_form()
    file.write_text(json.dumps({**settings, "size": {"max_height": 90, "max_width": 70}}))
    with pytest.raises(
        AcamkdError, match=r"the size \{'max_height': 90, .* is no rule .*: give data\.resize, \[height"
    ):
        make("rf_detr", size=None, arch=f"hf/{tmp_path}", options={})
    (tmp_path / "config.json").write_text("no JSON")
    with pytest.raises(AcamkdError, match=rf"^transformers cannot read {tmp_path}: .*config\.json"):
        make("rf_detr", arch=f"hf/{tmp_path}")


def test_an_older_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf.transformers(), "__version__", "5.9.0")
    with pytest.raises(
        AcamkdError, match=r"transformers 5\.9\.0 is too old, 5\.13 or newer is needed: pip install 'ac"
    ):
        make("detr")


def test_without_transformers_the_rest_works() -> None:
    program = """
import sys
sys.modules["transformers"] = None
from acamkd import config, models
from acamkd.errors import AcamkdError
models.build(config.Model(arch="retinanet", backbone="mobilenetv3_small_050", backbone_weights=None), "detection", 2)
try:
    models.build(config.Model(arch="hf/rt_detr"), "detection", 2)
except AcamkdError as error:
    print(error)
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "pip install 'acamkd[hf]'" in ran.stdout


def test_the_guides_table_is_up_to_date() -> None:
    docs = Path(__file__).parents[2] / "docs"
    page = runpy.run_path(str(docs / "generate_networks.py"))["page"]
    assert page() == (docs / "guides/huggingface.md").read_text(encoding="utf-8"), "python docs/generate_networks.py"
