"""An exported network in OpenVINO, as a form of the benchmark."""

from __future__ import annotations

from acamkd.jobs.export.onnx_forms import ExportedForm
from acamkd.jobs.export.onnx_model import ExportedModel
from acamkd.jobs.export.openvino_model import OpenVinoModel


class OpenVinoForm(ExportedForm):
    """An exported file in OpenVINO."""

    runtime = "OpenVINO"

    def open(self) -> ExportedModel:
        """See the base class."""
        return OpenVinoModel(self.file, threads=self.threads)
