"""Where the spatial masks of a finished run point.

    python benchmarks/mask_places.py RUN

What the student feels of M masks is one weight per position, mean_m M^2 / sum M. Printed is its mean at the positions
of each true class of the validation pictures, and in each third of their height, relative to the whole picture's, with
the share of the positions that this is and the relative error of the imitation there. Of a detector, `background` is
what no box covers, and an object counts on every level.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
from economical_masks import seen_by_masks, trained
from torch import Tensor

from acamkd.losses.functional import imitation_errors, safe_divide
from acamkd.models.base import VOID, Batch


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
        for loss, student, teacher in seen_by_masks(distiller, batch):
            mask = loss.masks_of(student, teacher).spatial
            if mask is None or mask.shape[2] < 3:
                continue
            mask, size = mask.flatten(2), (mask.shape[2], mask.shape[3])
            weight = safe_divide(mask.square(), mask.sum(dim=2, keepdim=True)).mean(dim=1)  # (N, HW)
            aligned = loss.align(loss._to_common_form(student, teacher)[0])
            error = imitation_errors(aligned, teacher, ("spatial",), loss.imitation, loss.temperature)["spatial"]
            weight, error = (x / x.mean(dim=1, keepdim=True) for x in (weight, error))
            spread.append(weight.std(dim=1, correction=0).mean().item())
            places = classes_at(batch, size).flatten(1)
            known = places != VOID
            for index, name in enumerate(names):
                where = places == index
                if where.any():
                    share = (where.sum() / known.sum()).item()
                    found[name].append((share, weight[where].mean().item(), error[where].mean().item()))
            thirds = (x.view(-1, *size).tensor_split(3, 1) for x in (weight, error))
            for name, of_weight, of_error in zip(("top", "middle", "bottom"), *thirds, strict=True):
                share = of_weight[0].numel() / weight.shape[1]
                found[name].append((share, of_weight.mean().item(), of_error.mean().item()))
    print(f"deviation of the weight: {sum(spread) / len(spread):.2f}\n")
    print("| | share | weight | error |\n|---|---:|---:|---:|")
    for name, figures in found.items():
        share, weight, error = torch.tensor(figures).mean(dim=0).tolist()
        print(f"| {name} | {100 * share:.1f} % | {weight:.2f} | {error:.2f} |")


if __name__ == "__main__":
    main()
