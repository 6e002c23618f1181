"""An exported network in OpenVINO."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy.typing as npt

from acamkd.errors import AcamkdError
from acamkd.jobs.export.onnx_forms import ExportedForm
from acamkd.jobs.export.onnx_model import METADATA, ExportedModel, Floats, read_metadata


class OpenVinoModel(ExportedModel):
    """An exported ONNX file in OpenVINO, on the processor.

    Args:
        file: The ONNX file.
        threads: Threads of the processor; 0 = all.

    Raises:
        AcamkdError: OpenVINO is missing, cannot read the file, or `acamkd export` did not write it.
    """

    def __init__(self, file: Path | str, *, threads: int = 0) -> None:
        try:
            import openvino
        except ImportError as error:
            raise AcamkdError("openvino is not installed: pip install '.[openvino]' in the checkout") from error
        core = openvino.Core()
        try:
            network = core.read_model(file)
            # A latency is asked for, and a share of the machine's threads, as of the other runtimes.
            settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
            self._network = core.compile_model(network, "CPU", settings)
        except RuntimeError as error:
            raise AcamkdError(f"{file}: OpenVINO cannot read it: {error}") from error
        paths = {name: ["framework", name] for name in METADATA}
        found = {name: network.get_rt_info(path).value for name, path in paths.items() if network.has_rt_info(path)}
        super().__init__(read_metadata(found, file))

    def run(self, pixels: Floats) -> dict[str, npt.NDArray[Any]]:
        """See the base class."""
        return {output.get_any_name(): values for output, values in self._network([pixels]).to_dict().items()}


class OpenVinoForm(ExportedForm):
    """An exported file in OpenVINO."""

    runtime = "OpenVINO"

    def open(self) -> ExportedModel:
        """See the base class."""
        return OpenVinoModel(self.file, threads=self.threads)
