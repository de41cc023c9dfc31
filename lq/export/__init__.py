"""To ONNX, and from there: export, verification in ONNX Runtime, latency. Needs ``pip install "lightning-lq[export]"``."""

from lq.export.by_hand import enable_onnx_export
from lq.export.difference import OutputDifference, RuntimeDifference
from lq.export.onnx import to_onnx
from lq.export.placement import LayerPlacement, PlacementReport, Reformat, placement_report
from lq.export.runtime import OnnxModel, compare_latency, latency
from lq.export.tensorrt import (
    Engine,
    EngineBenchmark,
    EngineLatency,
    EngineLayer,
    EngineReport,
    benchmark_engine,
    build_engine,
    engine_report,
    require_tensorrt,
)
from lq.export.verify import Verification, verify

__all__ = [
    "Engine",
    "EngineBenchmark",
    "EngineLatency",
    "EngineLayer",
    "EngineReport",
    "LayerPlacement",
    "OnnxModel",
    "OutputDifference",
    "PlacementReport",
    "Reformat",
    "RuntimeDifference",
    "Verification",
    "benchmark_engine",
    "build_engine",
    "compare_latency",
    "enable_onnx_export",
    "engine_report",
    "latency",
    "placement_report",
    "require_tensorrt",
    "to_onnx",
    "verify",
]
