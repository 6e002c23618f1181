"""INT8 of an exported network: static quantization by onnxruntime's tools, with what must stay float found by trial."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeAlias

from acamkd.engine.machine import int8_instructions
from acamkd.errors import AcamkdError
from acamkd.jobs.export.onnx_model import OnnxModel, Pixels
from acamkd.progress import progress

if TYPE_CHECKING:
    import onnx

log = logging.getLogger(__name__)

CALIBRATION_IMAGES = 100

CALIBRATIONS = ("MinMax", "Entropy", "Percentile")
"""Names in onnxruntime's CalibrationMethod."""

Choice: TypeAlias = tuple[str, str]
"""Calibration, and `all`, `computing`, `weighted` or `convolving` operators."""

CONVOLVING = ("Conv", "ConvTranspose")

WEIGHTED = (*CONVOLVING, "Gemm", "MatMul")
"""Operators with weights."""

COMPUTING = (
    *WEIGHTED, "Add", "Clip", "Relu", "Concat", "Resize", "MaxPool", "AveragePool", "GlobalAveragePool", "Reshape",
    "Transpose",
)  # fmt: skip
"""Operators with weights, and those that join, cut or move what they compute."""

GROUPS = 16
"""Parts of the graph, in the order of computation, of which each may be left in float."""

LARGEST_FLOAT_PART = 0.5
"""Share of the groups beyond which a file would no longer be a quantized one."""


@dataclass(frozen=True)
class Quantized:
    """How a network was quantized.

    Attributes:
        method: The calibration that was kept, and which operators it quantizes.
        tried: The metric of each such choice, with no node left in float, in percent.
        before: The metric of the float file.
        after: The metric of the quantized file.
        float_nodes: Names of the nodes that were left in float since they cost the metric most.
        nodes: Number of nodes that can be quantized.
        bits: Bits of a weight: 7 where the processor's products of 8 bits may overflow, which those of VNNI do not.
    """

    method: str
    tried: dict[str, float]
    before: float
    after: float
    float_nodes: tuple[str, ...]
    nodes: int
    bits: int

    def __str__(self) -> str:
        tried = ", ".join(f"{name} {score:.2f}" for name, score in self.tried.items())
        left = f"{len(self.float_nodes) or 'none'} of {self.nodes} nodes left in float"
        return (
            f"INT8: {self.before:.2f} before, {self.after:.2f} after; {self.method} ({tried}), {left}, "
            f"weights of {self.bits} bits"
        )


def quantize(
    file: Path,
    out: Path,
    images: Sequence[Pixels],
    score: Callable[[Path], float],
    *,
    before: float,
    max_drop: float,
) -> Quantized:
    """Write a quantized copy of an exported file: static, QDQ, with one scale per output channel of a weight.

    Each of CALIBRATIONS is tried, on all operators that onnxruntime can quantize and on COMPUTING alone, and the choice
    with the best metric kept. Where the graph gives final boxes, of queries or after suppression, it is on WEIGHTED
    operators and on CONVOLVING alone: 8 bits are too few for coordinates. If it loses too much, parts of the graph stay
    in float: first those that gain the metric most by it, and as few as possible.

    Args:
        file: The float file.
        out: Where to write.
        images: Training images to calibrate on.
        score: Gives the metric of a file on the validation images, in percent.
        before: The float file's metric.
        max_drop: Largest allowed loss of the metric, in points.

    Raises:
        AcamkdError: onnxruntime cannot quantize the file, or it loses more than `max_drop`.
    """
    with TemporaryDirectory() as folder:
        quantizer = _Quantizer(file, Path(folder), images)
        trial = Path(folder, "trial.onnx")

        def result(choice: Choice, left: Sequence[str]) -> float:
            quantizer.write(trial, choice, left)
            return score(trial)

        tried = {}
        for choice in quantizer.choices:
            tried[choice] = result(choice, ())
            log.info("INT8, %s of %s operators: %.2f, before %.2f", *choice, tried[choice], before)
        best = max(tried, key=lambda choice: tried[choice])
        nodes = quantizer.nodes(best)
        after, left = tried[best], []
        if not before - after <= max_drop:
            groups = list(_groups(nodes))
            alone = []
            for number, group in enumerate(progress(groups, "INT8 but for one part", unit=" parts"), start=1):
                alone.append(result(best, group))
                log.info("part %d of %d in float: %+.2f", number, len(groups), alone[-1] - tried[best])
            order = sorted(range(len(groups)), key=lambda index: -alone[index])
            for count, index in enumerate(order[: int(LARGEST_FLOAT_PART * len(groups))]):
                left += groups[index]
                after = result(best, left) if count else alone[index]
                log.info("INT8 with %d of %d nodes in float: %.2f", len(left), len(nodes), after)
                if before - after <= max_drop:
                    break
        if not before - after <= max_drop:
            raise AcamkdError(
                f"INT8 loses {before - after:.2f} points, {before:.2f} before and {after:.2f} after, with "
                f"{len(left)} of {len(nodes)} nodes in float (allowed: {max_drop:g}): nothing was written; "
                "--max-drop allows more, and an export without --int8 stays float"
            )
        quantizer.write(out, best, left)
        scores = {f"{method} of {operators} operators": value for (method, operators), value in tried.items()}
        return Quantized(
            " of ".join(best) + " operators", scores, before, after, tuple(left), len(nodes), quantizer.bits
        )


class _Quantizer:
    """Quantizes one file in several ways, calibrating once for each method.

    Args:
        file: The float file.
        folder: Folder for its own files.
        images: Images to calibrate on.
    """

    def __init__(self, file: Path, folder: Path, images: Sequence[Pixels]) -> None:
        import onnx
        from onnxruntime.quantization import quant_pre_process
        from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

        self.prepared = folder / "prepared.onnx"
        try:
            # Folds batch norm, so that its convolutions are quantized as they run.
            quant_pre_process(file, self.prepared, skip_symbolic_shape=True)
        except Exception as error:  # onnxruntime may raise any error
            raise AcamkdError(f"onnxruntime cannot prepare {file.name} for INT8: {error}") from error
        exported = OnnxModel(file)
        has_final_boxes = exported.task == "detection" and exported.metadata["nms"] is None
        # Calibrated once, on the operators of the last, which include the others'.
        kinds = ("convolving", "weighted") if has_final_boxes else ("computing", "all")
        self.choices: tuple[Choice, ...] = tuple((method, kind) for method in CALIBRATIONS for kind in kinds)
        model = onnx.load(self.prepared)
        for number, node in enumerate(model.graph.node):
            node.name = node.name or f"{node.op_type}_{number}"
        _forget_shapes(model)
        onnx.save(model, self.prepared)
        every = sorted({*QDQRegistry, *QLinearOpsRegistry})
        self.types = {
            "all": every, "computing": sorted(COMPUTING), "weighted": sorted(WEIGHTED),
            "convolving": sorted(CONVOLVING),
        }  # fmt: skip
        self._kinds = {node.name: node.op_type for node in model.graph.node}
        self.bits = 8 if int8_instructions() else 7
        self._metadata = onnx.load(file, load_external_data=False).metadata_props
        self._folder = folder
        self._inputs = [{"pixels": exported.prepare(image)[0]} for image in images]
        self._ranges: dict[str, Any] = {}

    def nodes(self, choice: Choice) -> list[str]:
        """Names of the nodes that a choice quantizes, in the order of computation."""
        return [name for name, kind in self._kinds.items() if kind in self.types[choice[1]]]

    def write(self, out: Path, choice: Choice, left: Sequence[str]) -> None:
        """Write the file as one choice quantizes it, with some nodes in float."""
        import onnx
        from onnxruntime.quantization import QDQQuantizer, QuantType

        method, operators = choice
        disabled = logging.root.manager.disable
        logging.disable(logging.WARNING)  # onnxruntime warns of each vector that has no channels
        try:
            if method not in self._ranges:
                self._ranges[method] = self._calibrate(method)
            quantizer = QDQQuantizer(
                onnx.shape_inference.infer_shapes(onnx.load(self.prepared)), per_channel=True,
                reduce_range=self.bits == 7, weight_qType=QuantType.QInt8, activation_qType=QuantType.QUInt8,
                tensors_range=self._ranges[method], nodes_to_quantize=[], nodes_to_exclude=list(left),
                op_types_to_quantize=self.types[operators], extra_options={},
            )  # fmt: skip
            quantizer.quantize_model()
            model = quantizer.model.model
        except Exception as error:  # onnxruntime may raise any error
            raise AcamkdError(f"onnxruntime cannot quantize the network: {error}") from error
        finally:
            logging.disable(disabled)
        _forget_shapes(model)
        del model.metadata_props[:]
        model.metadata_props.extend(self._metadata)
        onnx.save(model, out)

    def _calibrate(self, method: str) -> Any:
        """Ranges of all activations."""
        from onnxruntime.quantization import CalibrationMethod, create_calibrator

        calibrator = create_calibrator(
            self.prepared, self.types[self.choices[-1][1]], str(self._folder / "augmented.onnx"),
            calibrate_method=CalibrationMethod[method], extra_options={"symmetric": False},
        )  # fmt: skip
        with redirect_stdout(StringIO()):  # onnxruntime prints what it does
            # One by one: onnxruntime's histograms hold all that they are given at once, as one array of one shape.
            for image in progress(self._inputs, f"calibrating, {method}", unit=" images"):
                calibrator.collect_data(_Reader([image]))
            return calibrator.compute_data()


class _Reader:
    """Inputs in the form of onnxruntime's CalibrationDataReader."""

    def __init__(self, inputs: Sequence[dict[str, Any]]) -> None:
        self._inputs: Iterator[dict[str, Any]] = iter(inputs)

    def get_next(self) -> dict[str, Any] | None:
        """The next inputs; None after the last."""
        return next(self._inputs, None)


def _forget_shapes(model: onnx.ModelProto) -> None:
    """From inferred shapes onnxruntime derives reshapes that fail where an image has no box."""
    del model.graph.value_info[:]


def _groups(nodes: Sequence[str]) -> Iterator[list[str]]:
    """Parts of about equal length, in order."""
    count = min(GROUPS, len(nodes))
    for index in range(count):
        yield list(nodes[index * len(nodes) // count : (index + 1) * len(nodes) // count])
