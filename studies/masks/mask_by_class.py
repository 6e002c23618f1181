"""Where the spatial masks of a finished run point.

    python -m studies.masks.mask_by_class RUN

What the student feels of M masks is one weight per position, mean_m M^2 / sum M. Printed is its mean at the positions
of each true class of the validation images, and in each third of their height, relative to the whole image's, with
the share of the positions that this is and the relative error of the imitation there. Of a detector, `background` is
what no box covers, and an object counts on every level.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from studies.masks.kv_stride_fidelity import seen_by_masks, trained
from torch import Tensor

from acamkd.losses import ACAM
from acamkd.losses.acam.distances import distillation_distances
from acamkd.losses.acam.statistics import mask_weights
from acamkd.models.base import VOID, Batch

THIRDS = ("top", "middle", "bottom")


def classes_at(batch: Batch, size: tuple[int, int]) -> Tensor:
    """Class of every position, (N, H, W): a segmenter's ids, or a detector's labels with 0 for background."""
    assert batch.targets is not None
    maps = []
    for target in batch.targets:
        if "mask" in target:
            label_map = target["mask"]
        else:
            label_map = torch.zeros(batch.input_size, dtype=torch.int64)
            for (x1, y1, x2, y2), label in zip(target["boxes"].round().int().tolist(), target["labels"], strict=True):
                label_map[y1 : max(y2, y1 + 1), x1 : max(x2, x1 + 1)] = label
        maps.append(F.interpolate(label_map[None, None].float(), size, mode="nearest-exact")[0, 0].long())
    return torch.stack(maps)


@torch.no_grad()
def level(loss: ACAM, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor] | None:
    """Weight and error of every position, (N, H, W) and relative to the image's mean; nothing without thirds."""
    mask = loss.masks(student, teacher).get("spatial")
    if mask is None or mask.shape[2] < len(THIRDS):
        return None
    aligned, teacher = loss._to_common_form(student, teacher)
    kinds = ("spatial",)
    error = distillation_distances(loss.align(aligned), teacher, kinds, loss.imitation, loss.temperature)["spatial"]
    weight, error = (x / x.mean(dim=1, keepdim=True) for x in (mask_weights(mask.flatten(2)), error))
    return weight.view(-1, *mask.shape[2:]), error.view(-1, *mask.shape[2:])


def places(batch: Batch, size: tuple[int, int], names: Sequence[str]) -> Iterator[tuple[str, float, Tensor]]:
    """Where each of the classes is, and each third: its name, share of the positions, and (N, H, W) of booleans."""
    label_maps = classes_at(batch, size)
    known = (label_maps != VOID).sum()
    for index, name in enumerate(names):
        where = label_maps == index
        if where.any():
            yield name, (where.sum() / known).item(), where
    third = torch.cat([torch.full((len(rows),), k) for k, rows in enumerate(torch.arange(size[0]).tensor_split(3))])
    for index, name in enumerate(THIRDS):
        where = (third == index)[:, None].expand_as(label_maps)
        yield name, where.float().mean().item(), where


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN")
    distiller, batches = trained(parser.parse_args().run)
    names = (*(["background"] if distiller.student.task == "detection" else []), *batches.classes)
    found: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    spread: list[float] = []
    for images, targets in batches.val:
        batch = distiller.student.prepare(images, targets)
        for seen in filter(None, (level(*maps) for maps in seen_by_masks(distiller, batch))):
            weight, error = seen
            spread.append(weight.flatten(1).std(dim=1, correction=0).mean().item())
            for name, share, where in places(batch, (weight.shape[1], weight.shape[2]), names):
                found[name].append((share, weight[where].mean().item(), error[where].mean().item()))
    print(f"deviation of the weight: {sum(spread) / len(spread):.2f}\n")
    print("| | share | weight | error |\n|---|---:|---:|---:|")
    for name, figures in found.items():
        share, weight_there, error_there = torch.tensor(figures).mean(dim=0).tolist()
        print(f"| {name} | {100 * share:.1f} % | {weight_there:.2f} | {error_there:.2f} |")


if __name__ == "__main__":
    main()
