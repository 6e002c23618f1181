"""Conversion of a network to an ONNX file: the graph's content, and the exporter."""

from __future__ import annotations

import copy
import json
import logging
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from acamkd import __version__, config
from acamkd.errors import AcamkdError
from acamkd.jobs.export.tracing import constant_same_padding, maps_added_in_turn, time_limit
from acamkd.models.base import Batch, ExportForm, TaskModel
from acamkd.models.detection import DenseDetector, Detector, FCOSDetector
from acamkd.models.reppoints import RepPointsDetector
from acamkd.models.segmentation import STRIDE, Segmenter

Resize: TypeAlias = config.Size | config.ShortLong | None
"""A recipe's `data.resize`."""

BOXES = ("boxes", "scores", "labels")
"""Outputs of a graph whose boxes are final."""

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
        resize: How images are resized before; a recipe's `data.resize`.
        multiple: The number that the sides of the input are a multiple of.
        is_traced: Whether PyTorch's older exporter writes the file.
    """

    def __init__(
        self, model: TaskModel, *output_names: str, resize: Resize, multiple: int = STRIDE, is_traced: bool = False
    ) -> None:
        super().__init__()
        self.model = model
        self.output_names = output_names
        self.resize = resize
        self.multiple = multiple
        self.is_traced = is_traced
        self.eval()  # the exporters restore the mode that they find

    @property
    def has_queries(self) -> bool:
        """Whether the boxes are final, and many in each image of a batch."""
        return False

    def in_double(self) -> Graph:
        """A copy that computes in 64 bits."""
        return copy.deepcopy(self).double()

    def settings(self) -> dict[str, Any]:
        """Metadata that only some graphs have."""
        return {}


class SegmentationGraph(Graph):
    """`logits` (N, K, H, W)."""

    def __init__(self, model: Segmenter, resize: Resize) -> None:
        super().__init__(model, "logits", resize=resize)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """See the class."""
        return (self.model(_batch(pixels))["out"],)


class DenseGraph(Graph):
    """`scores` (N, A, K + 1), `boxes` (N, A, 4) in the input, `levels` (A,): all but thresholds and suppression."""

    model: DenseDetector

    def __init__(self, model: DenseDetector, resize: Resize) -> None:
        super().__init__(model, "scores", "boxes", "levels", resize=resize)

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

    def settings(self) -> dict[str, Any]:
        """The thresholds and limits of the suppression that follows."""
        net = self.model.net
        nms = {
            "score_threshold": net.score_thresh, "candidates": net.topk_candidates, "iou_threshold": net.nms_thresh,
            "detections": net.detections_per_img,
        }  # fmt: skip
        return {"nms": nms}


class DetectionsGraph(Graph):
    """`boxes` (K, 4) in the padded input, `scores` and `labels` (K,) of one image of fixed size, after suppression."""

    def __init__(self, model: Detector, size: tuple[int, int]) -> None:
        super().__init__(model, *BOXES, resize=size, is_traced=True)
        self.size = size

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """See the class."""
        batch = Batch(pixels, [self.size], [self.size])
        found = self.model.decode(self.model(batch), batch)[0]
        return tuple(found[name] for name in self.output_names)


class FormGraph(Graph):
    """What a network's `export_form` gives."""

    def __init__(self, model: TaskModel, form: ExportForm) -> None:
        names = ("logits",) if model.task == "segmentation" else BOXES
        super().__init__(model, *names, resize=form.resize, multiple=form.multiple, is_traced=form.is_traced)
        self.form = form

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """See the class."""
        outputs = self.form.outputs(pixels)
        return tuple(outputs[name] for name in self.output_names)

    @property
    def has_queries(self) -> bool:
        """See the base class."""
        return self.model.task == "detection"

    def in_double(self) -> Graph:
        """See the base class; the form's outputs belong to one network."""
        model = copy.deepcopy(self.model).double()
        return FormGraph(model, model.export_form())

    def settings(self) -> dict[str, Any]:
        """What the file's reader does with an image."""
        resize = self.resize.model_dump() if isinstance(self.resize, config.ShortLong) else self.resize
        return {"preparation": {"resize": resize, "multiple": self.multiple, "kernel": self.form.kernel}}


def needs_nms(model: TaskModel) -> bool:
    """Whether a network can be exported only with its non-maximum suppression, which lies between its two stages."""
    return isinstance(model, Detector) and not isinstance(model, DenseDetector) and not _has_form(model)


def _has_form(model: TaskModel) -> bool:
    """Whether a network says itself how it is exported."""
    return type(model).export_form is not TaskModel.export_form


def build_graph(model: TaskModel, resize: Resize, *, with_nms: bool, openvino: bool = False) -> Graph:
    """Choose the graph to export.

    Args:
        model: In eval mode.
        resize: The recipe's `data.resize`.
        with_nms: Detection: everything up to the non-maximum suppression, for single images of one size.
        openvino: Whether OpenVINO must be able to read the graph.

    Raises:
        AcamkdError: The network has no such graph.
    """
    if with_nms and model.task == "segmentation":
        raise AcamkdError("--with-nms: segmentation has no non-maximum suppression; leave the option out")
    if isinstance(model, Segmenter) and not _has_form(model):
        return SegmentationGraph(model, resize)
    if not isinstance(model, Detector) or _has_form(model):
        if with_nms:
            raise AcamkdError(
                f"--with-nms: {type(model.net).__name__} has no non-maximum suppression of ours; leave the option out"
            )
        return FormGraph(model, model.export_form())
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
    return DenseGraph(model, resize)


def write_graph(graph: Graph, file: Path, recipe: config.Recipe) -> None:
    """Write an ONNX file with the metadata that OnnxModel needs; raises AcamkdError if PyTorch cannot.

    The batch size stays free, and so does the input size unless `resize` fixes it. With suppression both are fixed.
    """
    what = type(graph.model.net).__name__
    names: dict[str, Any] = {"input_names": ["pixels"], "output_names": list(graph.output_names)}
    fixed = isinstance(graph.resize, tuple)
    # Every feature map must be larger than 1 x 1 here, or the graph would accept only maps of size 1.
    sides = graph.resize if isinstance(graph.resize, tuple) else (8 * STRIDE, 12 * STRIDE)
    frame = [-(-side // graph.multiple) * graph.multiple for side in sides]
    single = isinstance(graph, DetectionsGraph)
    example = (torch.rand(1 if single else 2, 3, *frame),)
    free = {0: "batch"} if fixed else {0: "batch", 2: "height", 3: "width"}
    try:
        with warnings.catch_warnings(), maps_added_in_turn(), time_limit(f"PyTorch's export of {what}", ADVICE[fixed]):
            warnings.simplefilter("ignore")  # about deprecation, and about shapes taken as constants
            if graph.is_traced:
                axes = {} if single else {"pixels": free, **{name: {0: "batch"} for name in graph.output_names}}
                torch.onnx.export(graph, example, file, dynamo=False, dynamic_axes=axes, **names)
            else:
                with nullcontext() if fixed else constant_same_padding(graph, graph.multiple):
                    program = torch.onnx.export(
                        graph, example, dynamo=True, verbose=False, dynamic_shapes=(free,), **names
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
    return {
        "acamkd_version": __version__,
        "task": recipe.task,
        "classes": recipe.data.classes,
        "resize": recipe.data.model_dump()["resize"],
        "mean": graph.model.mean.flatten().tolist(),
        "nms": None,
        **graph.settings(),
    }


def _write_metadata(file: Path, metadata: dict[str, Any]) -> None:
    import onnx

    content = onnx.load(file)
    onnx.helper.set_model_props(content, {name: json.dumps(value) for name, value in metadata.items()})
    onnx.save(content, file)


logging.getLogger("onnx_ir").setLevel(logging.ERROR)  # it warns about constants that it did not merge
