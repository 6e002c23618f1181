"""Draw what a study's three detectors find, on validation images that are chosen by score.

    python studies/draw_runs.py runs/bccd_few docs/bccd.webp

The folder holds the runs teacher, baseline and distilled. All validation images are sorted by the distilled student's
own mAP on them minus the baseline's. Drawn are the first, the middle one and the last: the largest gain, the median,
and the largest loss. Of each network as many of its best boxes are drawn as there are objects. A box is right if it
overlaps an object of its class, which no better box has found, by an IoU of 0.5.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.ops import box_iou

from acamkd import data
from acamkd.engine.metrics import Scorer
from acamkd.engine.runs import open_run
from acamkd.models.base import Prediction, TaskModel

RUNS = ("teacher", "baseline", "distilled")
ROWS = ("largest gain", "median", "largest loss")
RIGHT, WRONG, TRUTH = "#00a05a", "#ff2d20", "#1d3557"
HIT = 0.5
TILE = (300, 225)
LETTERS, HEAD, GAP = 15, 50, 8


def predict(model: TaskModel, image: Tensor) -> Prediction:
    """Predict one image."""
    [found] = model.predict([image])
    return found


def mark(found: Prediction, boxes: Tensor, labels: Tensor) -> list[tuple[list[float], bool]]:
    """The best boxes, as many as there are objects, best first, and whether each is right."""
    best = found["scores"].argsort(descending=True)[: len(boxes)]
    overlaps = box_iou(found["boxes"][best], boxes) * (found["labels"][best][:, None] == labels)
    marked = []
    for box, row in zip(found["boxes"][best].tolist(), overlaps, strict=True):
        right = bool(row.max() >= HIT)
        if right:
            overlaps[:, row.argmax()] = 0
        marked.append((box, right))
    return marked


def tile(image: Tensor, boxes: list[tuple[list[float], str]], words: str) -> Image.Image:
    """One image with boxes, and a line of words on it."""
    scale = TILE[0] / image.shape[-1], TILE[1] / image.shape[-2]
    drawn = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(TILE, Image.Resampling.LANCZOS)
    canvas = ImageDraw.Draw(drawn)
    for (x1, y1, x2, y2), color in boxes:
        canvas.rectangle((x1 * scale[0], y1 * scale[1], x2 * scale[0], y2 * scale[1]), outline=color, width=2)
    font = ImageFont.load_default(LETTERS)
    left, top, right, bottom = canvas.textbbox((6, TILE[1] - LETTERS - 8), words, font=font)
    canvas.rectangle((left - 4, top - 3, right + 4, bottom + 3), fill="white")
    canvas.text((6, TILE[1] - LETTERS - 8), words, font=font, fill="black")
    return drawn


def main() -> None:
    """Score every image, choose three, draw them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder of the three runs")
    parser.add_argument("output", type=Path, help="a .webp or .png file")
    arguments = parser.parse_args()
    runs = {name: open_run(arguments.runs / name) for name in RUNS}
    models = {name: run.load() for name, run in runs.items()}
    recipe = runs["distilled"].recipe
    images = data.build(recipe.data, recipe.task, "val", seed=recipe.train.seed, augment=False)
    scorer = Scorer("detection", images.classes)
    changes = []
    for index in range(len(images)):
        image, target = images[index]
        scores = {}
        for name, model in models.items():
            scorer.update([predict(model, image)], [target])
            scores[name] = scorer.compute()["mAP"]
        if not any(map(math.isnan, scores.values())):
            changes.append((scores["distilled"] - scores["baseline"], index, scores))
    changes.sort(key=lambda change: (-change[0], change[1]))
    gains = np.array([gain for gain, _, _ in changes])
    print(f"{(gains > 0).sum()} images better, {(gains < 0).sum()} worse, median {np.median(gains):+.1f} mAP")

    width, height = TILE
    columns = ("ground truth", *(f"{name}: mAP {runs[name].metrics[runs[name].role]['mAP']:.1f}" for name in RUNS))
    sheet = Image.new("RGB", (len(columns) * (width + GAP) - GAP, HEAD + len(ROWS) * (height + GAP) - GAP), "white")
    canvas, font = ImageDraw.Draw(sheet), ImageFont.load_default(LETTERS)
    for column, words in enumerate(columns):
        canvas.text((column * (width + GAP) + 4, 4), words, font=ImageFont.load_default(LETTERS + 4), fill="black")
    canvas.text((4, 29), "Best boxes, as many as there are objects:", font=font, fill="black")
    for place, (words, color) in enumerate((("right", RIGHT), ("wrong", WRONG))):
        canvas.text((width + GAP + 4 + 60 * place, 29), words, font=font, fill=color)
    for row, (words, change) in enumerate(
        zip(ROWS, (changes[0], changes[len(changes) // 2], changes[-1]), strict=True)
    ):
        gain, index, scores = change
        image, target = images[index]
        single = target["iscrowd"] == 0
        boxes, labels = target["boxes"][single], target["labels"][single]
        tiles = [tile(image, [(box, TRUTH) for box in boxes.tolist()], f"{words}: {gain:+.1f}")]
        for name, model in models.items():
            marked = mark(predict(model, image), boxes, labels)
            found = sum(right for _, right in marked)
            tiles.append(
                tile(
                    image,
                    [(box, RIGHT if right else WRONG) for box, right in reversed(marked)],
                    f"{found} of {len(boxes)}, mAP {scores[name]:.1f}",
                )
            )
        for column, drawn in enumerate(tiles):
            sheet.paste(drawn, (column * (width + GAP), HEAD + row * (height + GAP)))
        print(f"{words}: {images.files[index].name} {scores}")
    sheet.save(arguments.output, quality=60, method=6)
    print(f"{arguments.output}: {arguments.output.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
