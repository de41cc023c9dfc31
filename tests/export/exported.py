"""What the tests of export share: small calibrated models, and a plain reader of ONNX files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import numpy_helper
from torch import Tensor, nn

import lq
from lq.export import to_onnx


def calibrated(model: nn.Module, *args: Any, rules: Any = "int8", **kwargs: Any) -> nn.Module:
    """``model`` with quantizers, calibrated on one batch, in evaluation."""
    lq.quantize_(model.eval(), rules)
    with lq.calibrating(model):
        model(*args, **kwargs)
    return model


def set_statistics(norm: nn.Module, seed: int = 0) -> nn.Module:
    """BatchNorm with statistics and an affine part that are far from the identity, some gammas negative."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        norm.running_mean.uniform_(-1, 1, generator=generator)
        norm.running_var.uniform_(0.3, 3, generator=generator)
        norm.weight.uniform_(-2, 2, generator=generator)
        norm.bias.uniform_(-1, 1, generator=generator)
    return norm


@dataclass
class Graph:
    """An ONNX file, checked."""

    path: Path

    def __post_init__(self) -> None:
        onnx.checker.check_model(str(self.path), full_check=True)
        self.proto = onnx.load(str(self.path))
        self.nodes = list(self.proto.graph.node)
        self.constants = {t.name: numpy_helper.to_array(t) for t in self.proto.graph.initializer}
        self.producer = {output: node for node in self.nodes for output in node.output}

    def of(self, op: str) -> list[onnx.NodeProto]:
        return [node for node in self.nodes if node.op_type == op]

    def node(self, name: str) -> onnx.NodeProto:
        (node,) = [node for node in self.nodes if node.name == name]
        return node

    def feeding(self, node: onnx.NodeProto, index: int) -> onnx.NodeProto | None:
        return self.producer.get(node.input[index])

    def run(self, *tensors: Tensor, optimize: bool = False, rewritten: Path | None = None) -> list[np.ndarray]:
        """ONNX Runtime on the graph as it stands in the file, or as ONNX Runtime rewrites it (and writes to ``rewritten``)."""
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        level = onnxruntime.GraphOptimizationLevel
        options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
        if rewritten is not None:
            options.optimized_model_filepath = str(rewritten)
        session = onnxruntime.InferenceSession(str(self.path), options, providers=["CPUExecutionProvider"])
        names = [i.name for i in session.get_inputs()]
        return session.run(None, dict(zip(names, (t.numpy() for t in tensors), strict=True)))


def export(model: nn.Module, args: Any, folder: Path, **options: Any) -> Graph:
    return Graph(to_onnx(model, args, folder / "model.onnx", **options))


def codes(weight: Tensor, amax: Tensor, num_bits: int = 8, narrow_range: bool = True) -> np.ndarray:
    """int8 codes, in plain NumPy: round to nearest, ties to even, of ``weight / (amax / qmax)``."""
    qmax = np.float32(2 ** (num_bits - 1) - 1)
    scale = np.maximum(amax.numpy() / qmax, np.finfo(np.float32).tiny)
    low = -qmax if narrow_range else -qmax - 1
    return np.clip(np.rint(weight.detach().numpy() / scale), low, qmax).astype(np.int8)


@torch.no_grad()
def close(model: nn.Module, graph: Graph, *tensors: Tensor, atol: float = 2e-6, share: float = 1.0) -> None:
    """Outputs agree to float rounding, in the ``share`` of values that no flipped code reaches."""
    outputs = model(*tensors)
    expected = outputs if isinstance(outputs, (tuple, list)) else [outputs]
    for e, a in zip(expected, graph.run(*tensors), strict=True):
        assert e.shape == a.shape
        inside = np.abs(e.numpy() - a) <= atol * max(1.0, float(e.abs().max()))
        assert inside.mean() >= share, f"{100 * (1 - inside.mean()):.2f} % differ, at most by {np.abs(e.numpy() - a).max()}"
