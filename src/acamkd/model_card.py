"""The text that goes with an exported network: what it is, what it was trained on, how well it does, how to use it."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING

from acamkd import __version__
from acamkd.config import Loss, Recipe, ShortLong

if TYPE_CHECKING:
    from acamkd.export import Export
    from acamkd.runs import Role


def model_card(recipe: Recipe, role: Role, figures: Export, *, with_nms: bool, pictures: int) -> str:
    """Write a model card in Markdown.

    Args:
        recipe: The run's, with its class names.
        role: Which of its networks was exported.
        figures: What the export measured.
        with_nms: Whether the graph ends with the suppressed detections.
        pictures: Number of validation pictures.
    """
    model = recipe.teacher if role == "teacher" else recipe.student
    assert model is not None
    classes = recipe.data.classes or ()
    height, width = figures.input_size
    any_size = f"any multiples of 32, here {height} x {width}" if figures.dynamic_size else f"{height} x {width} only"
    batch = "1" if with_nms else "any number"
    return f"""# {recipe.name}: {model.arch} on {model.backbone}

A network for {recipe.task}, written by acamkd {__version__}.

- Classes ({len(classes)}): {", ".join(classes)}
- Data: {recipe.data.format} under `{recipe.data.root}`, training pictures in `{recipe.data.train.images}`, {pictures} \
validation pictures in `{recipe.data.val.images}`
{_training(recipe, role)}
- Size: {figures.parameters:,} parameters; {figures.gflops:.2f} GFLOPs for one picture of {height} x {width} \
(height x width), 2 FLOPs per multiply-add
- Input of `{role}.onnx`: `pixels`, RGB in [0, 1], {batch} x 3 x height x width, {any_size}; the graph normalises
- `{role}.safetensors`: the same weights, for the framework that the network is of

## Figures

On the validation pictures, in percent.

{_scores(role, figures)}

Outputs of onnxruntime and PyTorch differ by at most {figures.difference[0]:.1e}, or {figures.difference[1]:.1e} of \
the output's largest value.

| network | median of one picture |
|---|---|
{chr(10).join(f"| {name} | {value:.1f} ms |" for name, value in figures.milliseconds.items())}

From the prepared pixels to the predictions, with {figures.threads} thread(s) on {platform.machine()}.

## Use

With onnxruntime, NumPy and Pillow alone; `acamkd predict {role}.onnx FOLDER` does the same for a folder.

```python
{_code(recipe, role, with_nms=with_nms)}```

## Licence

TO FILL IN by whoever publishes this network: the licence of these weights; the licence of the training pictures and \
whether it allows this use; the licence of the pretrained weights that the training started from \
({model.backbone_weights or model.weights or "none"}); intended use and known limits.
"""


def _training(recipe: Recipe, role: Role) -> str:
    train = recipe.train
    lines = [f"- Training: {train.epochs} epochs in batches of {train.batch_size}, {train.optimizer.name} at "
             f"{train.optimizer.lr:g}, seed {train.seed}"]  # fmt: skip
    if role == "student" and recipe.teacher is not None and recipe.losses:
        lines.append(f"- Teacher: {recipe.teacher.arch} on {recipe.teacher.backbone}")
        lines += [f"- Distilled by {_describe(loss)}" for loss in recipe.losses]
    return "\n".join(lines)


def _describe(loss: Loss) -> str:
    pairs = ", ".join(pair if isinstance(pair, str) else " <- ".join(pair) for pair in loss.pairs)
    settings = {**({"preset": loss.preset} if loss.preset else {}), **loss.options}
    options = ", ".join(f"{name}: {value}" for name, value in settings.items())
    return f"{loss.name} at {pairs or 'the heads'}" + (f" ({options})" if options else "")


def _scores(role: Role, figures: Export) -> str:
    columns = {f"{role}, PyTorch": figures.pytorch, f"{role}, onnxruntime": figures.onnxruntime}
    if figures.teacher:
        columns = {"teacher": figures.teacher, **columns}
    rows = [["metric", *columns], ["---"] * (1 + len(columns))]
    rows += [[name, *(_percent(scores.get(name)) for scores in columns.values())] for name in figures.pytorch]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _percent(value: float | None) -> str:
    return "-" if value is None or value != value else f"{value:.2f}"


def _code(recipe: Recipe, role: Role, *, with_nms: bool) -> str:
    """Python lines that need nothing of acamkd."""
    resize = recipe.data.resize
    if isinstance(resize, ShortLong):
        size = (
            f"scale = min({resize.short} / min(picture.size), {resize.long} / max(picture.size))\n"
            "height, width = (int(side * scale) for side in picture.size[::-1])"
        )
    else:
        size = "height, width = " + ("picture.size[::-1]" if resize is None else f"{resize[0]}, {resize[1]}")
    decode = _MASK if recipe.task == "segmentation" else _DETECTIONS if with_nms else _HEADS
    return _PREPARE.format(file=f"{role}.onnx", size=size) + decode


_PREPARE = """import json

import numpy as np
import onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession("{file}")
metadata = {{key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}}
picture = Image.open("picture.jpg").convert("RGB")
{size}
small = np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR), dtype=np.float32) / 255
pixels = np.empty((1, 3, -(-height // 32) * 32, -(-width // 32) * 32), dtype=np.float32)
pixels[:] = np.reshape(metadata["mean"], (3, 1, 1))  # what the padding is filled with
pixels[0, :, :height, :width] = small.transpose(2, 0, 1)
"""

_MASK = """
logits = session.run(["logits"], {"pixels": pixels})[0][0, :, :height, :width]
mask = Image.fromarray(logits.argmax(axis=0).astype(np.uint8)).resize(picture.size, Image.Resampling.NEAREST)
for value in np.unique(mask):
    print(metadata["classes"][value], f"{(np.asarray(mask) == value).mean():.0%}")
"""

_PRINT = """
for box, score, label in detections:
    print(metadata["classes"][label - 1], f"{score:.2f}", (box * np.tile(scale, 2)).round())
"""

_DETECTIONS = (
    """
boxes, scores, labels = session.run(["boxes", "scores", "labels"], {"pixels": pixels})
scale = np.array(picture.size) / (width, height)
detections = [found for found in zip(boxes, scores, labels) if found[1] > 0.3]
"""
    + _PRINT
)

_HEADS = (
    """
scores, boxes = (output[0] for output in session.run(["scores", "boxes"], {"pixels": pixels}))
scale = np.array(picture.size) / (width, height)
boxes = boxes.clip(0, [width, height, width, height])


def overlap(one, other):
    low, high = np.maximum(one[:2], other[:2]), np.minimum(one[2:], other[2:])
    shared = (high - low).clip(0).prod()
    return shared / ((one[2:] - one[:2]).prod() + (other[2:] - other[:2]).prod() - shared + 1e-9)


rows, labels = np.nonzero(scores[:, 1:] > 0.3)  # column 0 is the background
detections = []
for row, label in sorted(zip(rows, labels + 1), key=lambda found: -scores[found]):  # best first
    rivals = [box for box, _, known in detections if known == label]
    if all(overlap(boxes[row], box) <= metadata["nms"]["iou_threshold"] for box in rivals):
        detections.append((boxes[row], scores[row, label], label))
"""
    + _PRINT
)
