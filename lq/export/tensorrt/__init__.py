"""TensorRT engines: build, run, inspect, time. Written against NVIDIA's documentation; not tried on a GPU yet."""

from lq.export.tensorrt.benchmark import EngineBenchmark, EngineLatency, benchmark_engine
from lq.export.tensorrt.build import build_engine, require_tensorrt
from lq.export.tensorrt.engine import Engine
from lq.export.tensorrt.inspection import EngineLayer, EngineReport, engine_report

__all__ = [
    "Engine",
    "EngineBenchmark",
    "EngineLatency",
    "EngineLayer",
    "EngineReport",
    "benchmark_engine",
    "build_engine",
    "engine_report",
    "require_tensorrt",
]
