"""Models as people write them, exported for TensorRT: valid, free in their batch, and computing what torch does."""

import warnings

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import lq
from exported import Graph
from lq.export import placement_report, to_onnx, verify
from lq.nn import QuantModule
from zoo import ZOO

# Quantizers inside of branches, and those that the graph calls in another number than torch does: their codes are not compared.
UNSEEN = {"control_flow": 2, "lstm": 2}


def negated(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(-x if x.is_floating_point() else x for x in inputs)


@pytest.mark.parametrize("name", ZOO)
def test_model(tmp_path, name):
    torch.manual_seed(0)
    build, inputs = ZOO[name]
    model, example = build().eval(), inputs(4)
    with warnings.catch_warnings():
        # nothing is left in float
        warnings.simplefilter("error", UserWarning)
        lq.quantize_(model, "int8", target="tensorrt", args=example)
    with lq.calibrating(model):
        model(*example)
        # the other branch, where there is one
        model(*negated(example))
    path = to_onnx(model, example, tmp_path / "model.onnx")

    graph = Graph(path)  # runs the checker
    assert not {"Cast", "BatchNormalization"} & {node.op_type for node in graph.nodes} - allowed(name)
    assert all(c.dtype != np.uint8 for c in graph.constants.values())
    report = placement_report(path)
    assert not report.float_layers, str(report)

    result = verify(model, path, batches=[inputs(7), inputs(1)])
    assert result.samples == 8
    # float rounding may move single values to the next code, and what follows with them
    with torch.no_grad():
        outputs = list(tree_leaves(model(*example)))
    for output, y in zip(result.onnxruntime.outputs, outputs, strict=True):
        assert output.max_abs < 0.05 * float(y.abs().max()), str(result)
        assert output.mean_abs < 0.005 * float(y.abs().max()), str(result)
    assert result.first_difference is None
    assert sum(layer.unequal for layer in result.layers) <= 2 + sum(layer.codes for layer in result.layers) / 5000, str(result)
    weights = {f"{n}.{role}".strip(".") for n, m in model.named_modules() if isinstance(m, QuantModule) for role in m.weights()}
    activations = {name for name, _ in lq.named_quantizers(model)} - weights
    assert len(result.layers) == len(activations) - UNSEEN.get(name, 0)


@pytest.mark.parametrize("name", ["functional", "control_flow", "bert", "mobilenet_v2", "unet"])
def test_model_in_half_precision(tmp_path, name):
    torch.manual_seed(0)
    build, inputs = ZOO[name]
    model, example = build().eval(), inputs(4)
    lq.quantize_(model, "int8", target="tensorrt", args=example)
    with lq.calibrating(model):
        model(*example)
        model(*negated(example))
    path = to_onnx(model, example, tmp_path / "model.onnx", precision="fp16")
    onnx.checker.check_model(str(path), full_check=True)
    report = placement_report(path)
    assert not report.float_layers, str(report)
    assert not {rule for layer in report.layers for rule in layer.rules} & {"op-between", "float-types"}
    # half precision moves values to the next code, which moves outputs by steps
    result = verify(model, path, batches=[inputs(7)]).onnxruntime
    assert max(output.mean_steps for output in result.outputs) < 1, str(result)


def allowed(name: str) -> set[str]:
    # the mask of tokens is made of integers
    return {"Cast"} if name == "bert" else set()
