"""To ONNX, and from there: export, verification in ONNX Runtime, latency. Needs ``pip install "lightning-lq[export]"``."""

from lq.export.by_hand import enable_onnx_export
from lq.export.onnx import to_onnx
from lq.export.runtime import OnnxModel, compare_latency, latency
from lq.export.verify import Verification, verify

__all__ = ["OnnxModel", "Verification", "compare_latency", "enable_onnx_export", "latency", "to_onnx", "verify"]
