"""ONNX Runtime: one ``.onnx`` file, on CPUs."""

from __future__ import annotations

from pathlib import Path

from qaware.exporters.base import Runner
from qaware.exporters.onnx_exporter import OnnxExporter
from qaware.exporters.signature import Signature


class OnnxRuntimeExporter(OnnxExporter):
    """An ONNX file for ONNX Runtime."""

    name = "onnxruntime"
    suffix = ".onnx"
    packages = ("onnxruntime", "onnx", "onnxscript")
    extra = "onnxruntime"

    def open(self, path: Path, signature: Signature) -> Runner:
        """Load a file.

        Raises:
            QawareError: ONNX Runtime cannot read it or its inputs are not those of ``signature``.
        """
        from qaware.exporters.onnx_runner import open_file

        return open_file(path, signature)
