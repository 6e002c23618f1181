"""Whether an exported file computes what PyTorch computes."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from acamkd.data import ImageDataset
from acamkd.errors import AcamkdError
from acamkd.jobs.export.graph import DetectionsGraph, Graph
from acamkd.jobs.export.onnx_model import ExportedModel

log = logging.getLogger(__name__)

LARGEST_DIFFERENCE = 1e-3
"""Allowed difference between the outputs of the two runtimes, as a share of an output's largest value."""

LARGEST_METRIC_DIFFERENCE = 0.1
"""Allowed difference between the runtimes' metrics, in points."""

COMPARED_IMAGES = 8

OTHER_QUERIES = 0.05
"""Share of an image's queries that may be others: where scores are equal, rounding decides which are chosen."""


@torch.no_grad()
def compare_outputs(
    graph: Graph, exported: ExportedModel, images: ImageDataset, runtime: str = "onnxruntime"
) -> tuple[float, float]:
    """Largest difference of any output on real images, absolute and as a share of the output's largest value.

    Final boxes are compared as sets, since rounding may change their order. A difference that is too large is measured
    again in 64 bits: PyTorch's own rounding may be the larger one, such as in a group norm over four values.

    Raises:
        AcamkdError: The difference is too large.
    """
    largest, relative = _differences(graph, exported, images, torch.float32)
    if not relative <= LARGEST_DIFFERENCE and not (graph.has_queries or isinstance(graph, DetectionsGraph)):
        log.info("outputs of %s differ from PyTorch's by %.1e: comparing with 64 bits", runtime, relative)
        largest, relative = _differences(graph.in_double(), exported, images, torch.float64)
    log.info("largest difference between %s and PyTorch: %.1e, %.1e relative", runtime, largest, relative)
    if not relative <= LARGEST_DIFFERENCE:
        chance = " (or its queries are still alike: train longer)" if graph.has_queries else ""
        raise AcamkdError(
            f"the exported file is wrong{chance}: its outputs by {runtime} differ from PyTorch's by {relative:.1e} of "
            f"their largest value (allowed: {LARGEST_DIFFERENCE:g}); nothing was written"
        )
    return largest, relative


def _differences(
    graph: Graph, exported: ExportedModel, images: ImageDataset, precision: torch.dtype
) -> tuple[float, float]:
    """Largest difference, absolute and as a share, from a graph that computes in this precision."""
    largest = relative = 0.0
    for index in range(min(COMPARED_IMAGES, len(images))):
        pixels = graph.model.prepare([images[index][0]]).pixels
        if not isinstance(graph, DetectionsGraph):
            pixels = pixels.expand(1 + index % 2, -1, -1, -1)  # batches of different sizes
        expected = dict(zip(graph.output_names, (value.numpy() for value in graph(pixels.to(precision))), strict=True))
        actual = exported.run(pixels.float().numpy())
        if isinstance(graph, DetectionsGraph):  # rounding may add boxes, too: only sorted scores are compared
            count = min(len(found["scores"]) for found in (expected, actual))
            expected, actual = ({"scores": found["scores"][:count]} for found in (expected, actual))
        for name, ours in expected.items():
            if ours.shape != actual[name].shape:
                raise AcamkdError(
                    f"the exported file is wrong: {name} has shape {actual[name].shape}, not {ours.shape}"
                )
        if graph.has_queries:
            largest = max(largest, _query_difference(expected, actual, pixels.shape[2:]))
            relative = largest
            continue
        for name, ours in expected.items():
            difference = float(np.abs(ours - actual[name]).max(initial=0))
            largest = max(largest, difference)
            relative = max(relative, difference / max(float(np.abs(ours).max(initial=0)), 1e-12))
    return largest, relative


def _query_difference(
    ours: Mapping[str, npt.NDArray[Any]], theirs: Mapping[str, npt.NDArray[Any]], frame: Sequence[int]
) -> float:
    """Difference of two sets of boxes (N, Q, 4), scores and labels (N, Q): scores, and sides as shares of the input.

    Each box counts with the nearest one of the other set that has its label; OTHER_QUERIES of them do not count.
    """
    one, other = (
        np.concatenate([each["boxes"] / np.tile(frame[::-1], 2), each["scores"][..., None]], axis=-1)
        for each in (ours, theirs)
    )
    largest = 0.0
    for index in range(len(one)):
        apart = np.abs(one[index][:, None] - other[index]).max(axis=-1)
        apart[ours["labels"][index][:, None] != theirs["labels"][index]] = np.inf
        for nearest in (apart.min(axis=0), apart.min(axis=1)):
            largest = max(largest, float(np.sort(nearest)[math.ceil((1 - OTHER_QUERIES) * len(nearest)) - 1]))
    return largest


def compare_scores(metric: str, ours: Mapping[str, float], theirs: Mapping[str, float], runtime: str) -> None:
    """Raise AcamkdError if the metric by a runtime differs from PyTorch's."""
    same = abs(ours[metric] - theirs[metric]) <= LARGEST_METRIC_DIFFERENCE
    if not (same or (math.isnan(ours[metric]) and math.isnan(theirs[metric]))):
        raise AcamkdError(
            f"the exported file is wrong: {metric} {theirs[metric]:.2f} by {runtime}, {ours[metric]:.2f} by PyTorch; "
            "nothing was written"
        )
