"""An exported network in OpenVINO.

An export for OpenVINO contains a copy of this file. There it needs openvino and NumPy, not acamkd:

    model = OpenVinoModel("student.xml")
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy.typing as npt

if __package__:
    from acamkd.jobs.export import onnx_model
else:  # beside an exported network
    import onnx_model  # type: ignore[import-not-found,no-redef]


class OpenVinoModel(onnx_model.ExportedModel):
    """An exported network in OpenVINO, on the processor.

    Args:
        file: OpenVINO's own file, with the suffix .xml, or the ONNX file.
        threads: Threads of the processor; 0 = all.
        precision: `f32` computes in float32 also where the processor would take bfloat16 by default.

    Raises:
        AcamkdError: OpenVINO is missing, cannot read the file, or `acamkd export` did not write it. Without acamkd it
            is a ValueError.
    """

    def __init__(self, file: Path | str, *, threads: int = 0, precision: str | None = None) -> None:
        core = _core()
        network = _read(core, file)
        # A latency is asked for, and a share of the machine's threads, as of the other runtimes.
        settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        if precision is not None:
            settings["INFERENCE_PRECISION_HINT"] = precision
        try:
            self._network = core.compile_model(network, "CPU", settings)
        except RuntimeError as error:
            raise onnx_model.AcamkdError(f"{file}: OpenVINO cannot run it: {error}") from error
        paths = {name: ["framework", name] for name in (*onnx_model.METADATA, onnx_model.PREPARATION)}
        found = {name: network.get_rt_info(path).value for name, path in paths.items() if network.has_rt_info(path)}
        super().__init__(onnx_model.read_metadata(found, file))
        sides = list(network.inputs[0].partial_shape)[2:]
        if all(side.is_static for side in sides):
            self.input_size = (sides[0].get_length(), sides[1].get_length())

    def run(self, pixels: onnx_model.Floats) -> dict[str, npt.NDArray[Any]]:
        """See the base class."""
        return {output.get_any_name(): values for output, values in self._network([pixels]).to_dict().items()}


def write_openvino(file: Path, out: Path) -> None:
    """Write an exported ONNX file in OpenVINO's own form: `out` with the suffix .xml, and the weights as .bin.

    The weights keep their precision; those of a float file stay float32.

    Raises:
        AcamkdError: OpenVINO is missing or cannot convert the file.
    """
    core = _core()
    network = _read(core, file)
    import openvino

    try:
        openvino.save_model(network, out, compress_to_fp16=False)
    except RuntimeError as error:
        raise onnx_model.AcamkdError(f"{file}: OpenVINO cannot write {out}: {error}") from error


def _core() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise onnx_model.AcamkdError("openvino is not installed: pip install 'acamkd[openvino]'") from error
    return openvino.Core()


def _read(core: Any, file: Path | str) -> Any:
    try:
        return core.read_model(file)
    except RuntimeError as error:
        raise onnx_model.AcamkdError(f"{file}: OpenVINO cannot read it: {error}") from error
