"""Conversion of a network to an ONNX file: the graph's content, and the exporter."""

from __future__ import annotations

import json
import logging
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from acamkd import __version__, config
from acamkd.errors import AcamkdError
from acamkd.jobs.export.tracing import constant_same_padding, maps_added_in_turn, time_limit
from acamkd.models.base import Batch, TaskModel
from acamkd.models.detection import DenseDetector, Detector, FCOSDetector
from acamkd.models.hf_base import HFModel
from acamkd.models.reppoints import RepPointsDetector
from acamkd.models.segmentation import STRIDE, Segmenter

ADVICE = {
    False: "a fixed input size may work: --set data.resize='[HEIGHT, WIDTH]'",
    True: "take another backbone or architecture",
}
"""Advice if the export fails, by whether the input size was fixed."""


class Graph(nn.Module):
    """Module behind an ONNX file: `pixels` (N, 3, H, W), RGB in [0, 1] -> the outputs described in OnnxModel.

    Args:
        model: The network, in eval mode.
        output_names: Names of the outputs of `forward`.
    """

    def __init__(self, model: TaskModel, *output_names: str) -> None:
        super().__init__()
        self.model = model
        self.output_names = output_names
        self.eval()  # the exporters restore the mode that they find


class SegmentationGraph(Graph):
    """`logits` (N, K, H, W)."""

    def __init__(self, model: Segmenter) -> None:
        super().__init__(model, "logits")

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """See the class."""
        return (self.model(_batch(pixels))["out"],)


class DenseGraph(Graph):
    """`scores` (N, A, K + 1), `boxes` (N, A, 4) in the input, `levels` (A,): all but thresholds and suppression."""

    model: DenseDetector

    def __init__(self, model: DenseDetector) -> None:
        super().__init__(model, "scores", "boxes", "levels")

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """See the class."""
        outputs = self.model(_batch(pixels))
        scores = outputs["cls_logits"].sigmoid()
        if "bbox_ctrness" in outputs:
            scores = (scores * outputs["bbox_ctrness"].sigmoid()).sqrt()
        coder = self.model.net.box_coder
        decode = coder.decode if isinstance(self.model, FCOSDetector) else coder.decode_single
        deltas: Tensor = outputs["bbox_regression"]
        boxes = decode(deltas.flatten(0, 1), outputs["anchors"][0].repeat(pixels.shape[0], 1)).view_as(deltas)
        counts = self.model.anchors_per_level(outputs)
        levels = torch.cat([torch.full((count,), level) for level, count in enumerate(counts)])
        return scores, boxes, levels


class DetectionsGraph(Graph):
    """`boxes` (K, 4) in the padded input, `scores` and `labels` (K,) of one image of fixed size, after suppression."""

    def __init__(self, model: Detector, size: tuple[int, int]) -> None:
        super().__init__(model, "boxes", "scores", "labels")
        self.size = size

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """See the class."""
        batch = Batch(pixels, [self.size], [self.size])
        found = self.model.decode(self.model(batch), batch)[0]
        return tuple(found[name] for name in self.output_names)


def build_graph(
    model: TaskModel, resize: config.Size | config.ShortLong | None, *, with_nms: bool, openvino: bool = False
) -> Graph:
    """Choose the graph to export.

    Args:
        model: In eval mode.
        resize: The recipe's `data.resize`.
        with_nms: Detection: everything up to the non-maximum suppression, for single images of one size.
        openvino: Whether OpenVINO must be able to read the graph.

    Raises:
        AcamkdError: The network has no such graph.
    """
    if isinstance(model, Segmenter):
        if with_nms:
            raise AcamkdError("--with-nms: segmentation has no non-maximum suppression; leave the option out")
        return SegmentationGraph(model)
    if isinstance(model, HFModel):
        raise AcamkdError(
            f"{type(model.net).__name__}: networks of transformers have no export to ONNX yet, neither in float nor in "
            "INT8; their run folder loads in transformers (docs/guides/huggingface.md)"
        )
    if not isinstance(model, Detector):
        raise AcamkdError(
            f"{type(model).__name__} cannot be exported: only torchvision's detectors and segmenters that turn pixels "
            "into logits can"
        )
    if isinstance(model, RepPointsDetector) and (with_nms or openvino):
        option, why = (
            ("--with-nms", "PyTorch's older exporter cannot write, and no other writes the suppression")
            if with_nms
            else ("--openvino", "OpenVINO cannot read")
        )
        raise AcamkdError(f"{option}: RepPoints has deformable convolutions, which {why}; leave the option out")
    if with_nms:
        if not isinstance(resize, tuple):
            raise AcamkdError("--with-nms writes a graph for one image size: --set data.resize='[HEIGHT, WIDTH]'")
        return DetectionsGraph(model, resize)
    if not isinstance(model, DenseDetector):
        raise AcamkdError(
            f"{type(model.net).__name__} suppresses boxes between its two stages, so that backbone and head cannot be "
            "exported alone: use --with-nms, which writes the full graph for single images"
        )
    return DenseGraph(model)


def write_graph(graph: Graph, file: Path, recipe: config.Recipe) -> None:
    """Write an ONNX file with the metadata that OnnxModel needs; raises AcamkdError if PyTorch cannot.

    The batch size stays free, and so does the input size unless the recipe's `resize` fixes it. With suppression, which
    only the legacy exporter can write, both are fixed.
    """
    what = type(graph.model.net).__name__
    resize = recipe.data.resize
    names: dict[str, Any] = {"input_names": ["pixels"], "output_names": list(graph.output_names)}
    fixed = isinstance(resize, tuple)
    # Every feature map must be larger than 1 x 1 here, or the graph would accept only maps of size 1.
    frame = [-(-side // STRIDE) * STRIDE for side in resize] if isinstance(resize, tuple) else [8 * STRIDE, 12 * STRIDE]
    try:
        with warnings.catch_warnings(), maps_added_in_turn(), time_limit(f"PyTorch's export of {what}", ADVICE[fixed]):
            warnings.simplefilter("ignore")  # about deprecation, and about shapes taken as constants
            if isinstance(graph, DetectionsGraph):
                torch.onnx.export(graph, (torch.rand(1, 3, *frame),), file, dynamo=False, **names)
            else:
                shapes = {0: "batch"} if fixed else {0: "batch", 2: "height", 3: "width"}
                example = (torch.rand(2, 3, *frame),)
                with nullcontext() if fixed else constant_same_padding(graph):
                    program = torch.onnx.export(
                        graph, example, dynamo=True, verbose=False, dynamic_shapes=(shapes,), **names
                    )
                assert program is not None
                program.save(file, external_data=False)
    except AcamkdError:
        raise
    except Exception as error:  # the exporters may raise any error
        raise AcamkdError(
            f"PyTorch {torch.__version__} cannot export {what}: {ADVICE[fixed]} ({str(error).strip()[:500]})"
        ) from error
    _write_metadata(file, _metadata(graph, recipe))


def _batch(pixels: Tensor) -> Batch:
    size = (pixels.shape[-2], pixels.shape[-1])
    return Batch(pixels, [size], [size])


def _metadata(graph: Graph, recipe: config.Recipe) -> dict[str, Any]:
    net = graph.model.net
    return {
        "acamkd_version": __version__,
        "task": recipe.task,
        "classes": recipe.data.classes,
        "resize": recipe.data.model_dump()["resize"],
        "mean": graph.model.mean.flatten().tolist(),
        "nms": {
            "score_threshold": net.score_thresh,
            "candidates": net.topk_candidates,
            "iou_threshold": net.nms_thresh,
            "detections": net.detections_per_img,
        }
        if isinstance(graph, DenseGraph)
        else None,
    }


def _write_metadata(file: Path, metadata: dict[str, Any]) -> None:
    import onnx

    content = onnx.load(file)
    onnx.helper.set_model_props(content, {name: json.dumps(value) for name, value in metadata.items()})
    onnx.save(content, file)


logging.getLogger("onnx_ir").setLevel(logging.ERROR)  # it warns about constants that it did not merge
