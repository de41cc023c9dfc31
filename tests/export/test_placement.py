"""Each rule of TensorRT has a graph that breaks it alone; whole models get the report that their Q/DQ deserve."""

import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import lq
from lq.export import to_onnx
from lq.export.placement import LayerPlacement, PlacementReport, Reformat, placement_report
from lq.export.placement.rules import RULES

INT8, INT4, FP8, E5M2 = np.int8, ml_dtypes.int4, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2


class Net:
    """A graph, written node by node."""

    def __init__(self, opset: int = 21) -> None:
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str = "x", shape: tuple[int, ...] = (1, 8, 8, 8), dtype: int = TensorProto.FLOAT) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def constant(self, array: np.ndarray, name: str = "") -> str:
        name = name or f"constant{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def op(self, op: str, *inputs: str, name: str = "", **attributes) -> str:
        name = name or f"{op}{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [f"{name}_out"], name=name, **attributes))
        return f"{name}_out"

    def parameters(self, scale, zero, dtype) -> list[str]:
        if isinstance(scale, str):
            return [scale, self.constant(np.zeros((), dtype))]
        scales = np.asarray(scale, np.float32)
        return [self.constant(scales), self.constant(np.full(scales.shape, zero).astype(dtype))]

    def qdq(self, x: str, scale=0.1, *, zero=0, dtype=INT8, **attributes) -> str:
        parameters = self.parameters(scale, zero, dtype)
        return self.op("DequantizeLinear", self.op("QuantizeLinear", x, *parameters, **attributes), *parameters, **attributes)

    def weight(self, shape=(8, 8, 3, 3), scale=0.1, *, zero=0, dtype=INT8, **attributes) -> str:
        codes = self.constant(np.ones(shape).astype(dtype))
        return self.op("DequantizeLinear", codes, *self.parameters(scale, zero, dtype), **attributes)

    def conv(self, x: str, name: str = "layer", **weight) -> str:
        return self.op("Conv", x, self.weight(**weight), name=name, pads=[1, 1, 1, 1])

    def proto(self, *outputs: str) -> onnx.ModelProto:
        ends = [helper.make_empty_tensor_value_info(name) for name in outputs or self.nodes[-1].output]
        graph = helper.make_graph(self.nodes, "graph", self.inputs, ends, self.constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=10)


@pytest.fixture
def report(tmp_path):
    def write_and_report(net: Net, *outputs: str) -> PlacementReport:
        onnx.save(net.proto(*outputs), tmp_path / "model.onnx")
        return placement_report(tmp_path / "model.onnx")

    return write_and_report


def layer(report: PlacementReport, name: str = "layer") -> LayerPlacement:
    (found,) = [layer for layer in report.layers if layer.name == name]
    return found


# One rule, one graph


def input_not_quantized(net):
    net.conv(net.input())


def weight_not_quantized(net):
    net.op("Conv", net.qdq(net.input()), net.constant(np.ones((8, 8, 3, 3), np.float32)), name="layer")


def weight_not_constant(net):
    net.op("Conv", net.qdq(net.input()), net.qdq(net.input("w", (8, 8, 3, 3))), name="layer")


def operand_not_quantized(net):
    net.op("MatMul", net.qdq(net.input()), net.input("y"), name="layer")


def operand_of_add_not_quantized(net):
    net.op("Add", net.input("y"), net.qdq(net.input()), name="layer")


def cast_before_layer(net):
    net.conv(net.op("Cast", net.qdq(net.input()), to=TensorProto.FLOAT16))


def average_before_layer(net):
    net.conv(net.op("AveragePool", net.qdq(net.input()), kernel_shape=[2, 2]))


def cast_of_weight(net):
    net.op("Conv", net.qdq(net.input()), net.op("Cast", net.weight(), to=TensorProto.FLOAT16), name="layer")


def transpose_of_kernel(net):
    net.op("Conv", net.qdq(net.input()), net.op("Transpose", net.weight(), perm=[1, 0, 2, 3]), name="layer")


def concat_scales(net):
    net.conv(net.op("Concat", net.qdq(net.input(), 0.1), net.qdq(net.input("y"), 0.2), axis=1))


def concat_with_float(net):
    net.conv(net.op("Concat", net.qdq(net.input()), net.input("y"), axis=1))


def mixed_types(net):
    net.conv(net.qdq(net.input()), dtype=FP8)


def mixed_operands(net):
    net.op("MatMul", net.qdq(net.input()), net.qdq(net.input("y"), dtype=FP8), name="layer")


def mixed_shortcut(net):
    conv = net.conv(net.qdq(net.input()), name="conv")
    net.op("Add", conv, net.qdq(net.input("y"), dtype=FP8), name="layer")


def int4_with_int8(net):
    x = net.qdq(net.input("x", (4, 128)))
    net.op("MatMul", x, net.weight((128, 8), np.ones((2, 8)), dtype=INT4, axis=0, block_size=64), name="layer")


def bias_quantized(net):
    bias = net.op("DequantizeLinear", net.constant(np.ones(8, np.int32)), net.constant(np.float32(0.01)))
    net.op("Conv", net.qdq(net.input()), net.weight(), bias, name="layer")


def per_channel_activation(net):
    net.conv(net.qdq(net.input(), [0.1] * 8, axis=1))


def axis_of_conv(net):
    net.conv(net.qdq(net.input()), scale=[0.1] * 8, axis=1)


def axis_of_transposed_conv(net):
    net.op("ConvTranspose", net.qdq(net.input()), net.weight(scale=[0.1] * 8, axis=1), name="layer")


def axis_of_gemm(net):
    net.op("Gemm", net.qdq(net.input("x", (4, 8))), net.weight((8, 6), [0.1] * 8, axis=0), name="layer")


def axis_of_transposed_gemm(net):
    net.op("Gemm", net.qdq(net.input("x", (4, 8))), net.weight((6, 8), [0.1] * 8, axis=-1), name="layer", transB=1)


def axis_of_matmul(net):
    net.op("MatMul", net.qdq(net.input("x", (4, 8))), net.weight((8, 6), [0.1] * 8, axis=0), name="layer")


def axis_behind_transpose(net):
    weight = net.op("Transpose", net.weight((6, 8), [0.1] * 8, axis=1), perm=[1, 0])
    net.op("MatMul", net.qdq(net.input("x", (4, 8))), weight, name="layer")


def int8_in_blocks(net):
    weight = net.weight((128, 8), np.ones((2, 8)), axis=0, block_size=64)
    net.op("MatMul", net.qdq(net.input("x", (4, 128))), weight, name="layer")


def int8_in_blocks_of_outputs(net):
    weight = net.weight((8, 128), np.ones((8, 2)), axis=1, block_size=64)
    net.op("MatMul", net.qdq(net.input("x", (4, 8))), weight, name="layer")


def scale_not_constant(net):
    net.conv(net.qdq(net.input(), net.input("scale", ())))


def scale_is_zero(net):
    net.conv(net.qdq(net.input()), scale=[0.1] * 7 + [0.0], axis=0)


def scale_is_nan(net):
    net.conv(net.qdq(net.input(), np.nan))


def scale_is_infinite(net):
    net.conv(net.qdq(net.input(), np.inf))


def zero_point(net):
    net.conv(net.qdq(net.input(), zero=3))


def zero_point_of_weight(net):
    net.conv(net.qdq(net.input()), scale=[0.1] * 8, zero=[0] * 7 + [1], axis=0)


def unsigned_codes(net):
    net.conv(net.qdq(net.input(), dtype=np.uint8))


def default_codes_are_unsigned(net):
    scale = net.constant(np.float32(0.1))
    net.conv(net.op("DequantizeLinear", net.op("QuantizeLinear", net.input(), scale), scale))


def other_fp8(net):
    net.conv(net.qdq(net.input(), dtype=E5M2), dtype=E5M2)


def fp8_before_opset_19(net):
    net.opset = 18
    net.conv(net.qdq(net.input(), dtype=FP8), dtype=FP8)


def int4_before_opset_21(net):
    net.opset = 20
    weight = net.weight((128, 8), np.ones((2, 8)), dtype=INT4, axis=0, block_size=64)
    net.op("MatMul", net.input("x", (4, 128)), weight, name="layer")


def int4_per_channel(net):
    net.op("MatMul", net.input("x", (4, 128)), net.weight((128, 8), [0.1] * 8, dtype=INT4, axis=1), name="layer")


def int4_in_small_blocks(net):
    weight = net.weight((128, 8), np.ones((4, 8)), dtype=INT4, axis=0, block_size=32)
    net.op("MatMul", net.input("x", (4, 128)), weight, name="layer")


def int4_convolution(net):
    net.conv(net.input(), shape=(8, 64, 3, 3), scale=np.ones((8, 1, 3, 3)), dtype=INT4, axis=1, block_size=64)


def int4_activations(net):
    net.op("MatMul", *(net.qdq(net.input(name), dtype=INT4) for name in "xy"), name="layer")


def shortcut_not_quantized(net):
    x = net.input()
    net.op("Add", x, net.conv(net.qdq(x), name="conv"), name="layer")


def output_not_quantized(net):
    net.op("Add", net.qdq(net.input()), net.qdq(net.input("y")), name="layer")


def integer_convolution(net):
    scale, zero = net.constant(np.float32(0.1)), net.constant(np.int8(0))
    x = net.op("QuantizeLinear", net.input(), scale, zero)
    w = net.constant(np.ones((8, 8, 3, 3), INT8))
    net.op("QLinearConv", x, scale, zero, w, scale, zero, scale, zero, name="layer")


def scales_of_two_types(net):
    scale = net.constant(np.full((), 0.1, np.float16))
    weight = net.op("DequantizeLinear", net.constant(np.ones((8, 8, 3, 3), INT8)), scale, net.constant(np.zeros((), INT8)))
    net.op("Conv", net.qdq(net.input()), weight, name="layer")


IN_FLOAT = {
    "input-not-quantized": [input_not_quantized],
    "weight-not-quantized": [weight_not_quantized],
    "weight-not-constant": [weight_not_constant],
    "operand-not-quantized": [operand_not_quantized, operand_of_add_not_quantized],
    "op-between": [cast_before_layer, average_before_layer, cast_of_weight, transpose_of_kernel],
    "concat-scales": [concat_scales, concat_with_float],
    "float-types": [scales_of_two_types],
    "mixed-types": [mixed_types, mixed_operands, mixed_shortcut, int4_with_int8],
    "bias-quantized": [bias_quantized],
    "per-channel-activation": [per_channel_activation],
    "weight-axis": [
        *(axis_of_conv, axis_of_transposed_conv, axis_of_gemm, axis_of_transposed_gemm, axis_of_matmul),
        *(axis_behind_transpose, int8_in_blocks, int8_in_blocks_of_outputs),
    ],
    "scale-not-constant": [scale_not_constant],
    "scale-not-positive": [scale_is_zero, scale_is_nan, scale_is_infinite],
    "zero-point": [zero_point, zero_point_of_weight],
    "signed-codes": [unsigned_codes, default_codes_are_unsigned],
    "fp8-format": [other_fp8],
    "opset": [fp8_before_opset_19, int4_before_opset_21],
    "int4-blocks": [int4_per_channel, int4_in_small_blocks],
    "int4-gemm": [int4_convolution, int4_activations],
    "shortcut-not-quantized": [shortcut_not_quantized],
    "output-not-quantized": [output_not_quantized],
    "qdq-format": [integer_convolution],
}


@pytest.mark.parametrize(("rule", "graph"), [(rule, graph) for rule, graphs in IN_FLOAT.items() for graph in graphs])
def test_rule_puts_layer_in_float(rule, graph, report):
    net = Net()
    graph(net)
    found = report(net)
    placement = layer(found)
    assert placement.precision == "float"
    assert placement.rules == (rule,)
    assert placement in found.float_layers
    assert RULES[rule].says in str(found)


def batchnorm_behind(net, layer_of):
    norm = [net.constant(np.ones(8, np.float32)) for _ in range(4)]
    net.qdq(net.op("BatchNormalization", layer_of(net.qdq(net.input())), *norm))


def unfolded_batchnorm(net):
    batchnorm_behind(net, net.conv)


def unfolded_batchnorm_of_transposed_conv(net):
    batchnorm_behind(net, lambda x: net.op("ConvTranspose", x, net.weight(), name="layer"))


def unfolded_batchnorm_of_matmul(net):
    bias = net.constant(np.ones(8, np.float32))
    batchnorm_behind(net, lambda x: net.op("Add", net.op("MatMul", x, net.weight((8, 8)), name="layer"), bias))


def cast_before_quantize(net):
    net.qdq(net.op("Cast", net.conv(net.qdq(net.input())), to=TensorProto.FLOAT16))


def qdq_before_relu(net):
    net.qdq(net.op("Relu", net.qdq(net.conv(net.qdq(net.input())))))


def qdq_before_batchnorm(net):
    batchnorm_behind(net, lambda x: net.qdq(net.conv(x)))


def qdq_before_add(net):
    conv = net.conv(net.qdq(net.input()), name="conv")
    net.qdq(net.op("Add", net.qdq(conv), net.qdq(net.input("y")), name="layer"))


def pair_of_two_scales(net):
    codes = net.op("QuantizeLinear", net.input(), *net.parameters(0.1, 0, INT8))
    net.conv(net.op("DequantizeLinear", codes, *net.parameters(0.2, 0, INT8)))


AROUND = {
    "unfolded-batchnorm": [unfolded_batchnorm, unfolded_batchnorm_of_transposed_conv, unfolded_batchnorm_of_matmul],
    "op-between": [cast_before_quantize],
    "pair-scales": [pair_of_two_scales],
    "split-fusion": [qdq_before_relu, qdq_before_batchnorm, qdq_before_add],
}


@pytest.mark.parametrize(("rule", "graph"), [(rule, graph) for rule, graphs in AROUND.items() for graph in graphs])
def test_rule_costs_kernels_around_a_quantized_layer(rule, graph, report):
    net = Net()
    graph(net)
    placement = layer(report(net))
    assert placement.precision == "INT8"
    assert placement.rules == (rule,)


def test_each_rule_has_a_graph_and_a_source():
    assert {*IN_FLOAT, *AROUND} == set(RULES)
    for name, rule in RULES.items():
        assert name == rule.id
        assert rule.section
        # one rule is ONNX's own
        assert rule.url.startswith(("https://docs.nvidia.com/deeplearning/tensorrt/", "https://onnx.ai/onnx/operators/"))


# What breaks none


def plain_conv(net):
    net.conv(net.qdq(net.input()))


def per_channel_conv(net):
    net.conv(net.qdq(net.input()), scale=[0.1] * 8, axis=0)


def weight_quantized_in_graph(net):
    w = net.op("Transpose", net.constant(np.ones((8, 8, 3, 3), np.float32)), perm=[1, 0, 2, 3])
    net.op("Conv", net.qdq(net.input()), net.qdq(w, [0.1] * 8, axis=-4), name="layer")


def per_channel_transposed_conv(net):
    net.op("ConvTranspose", net.qdq(net.input()), net.weight((8, 6, 3, 3), [0.1] * 8, axis=0), name="layer")


def per_channel_gemm(net):
    net.op("Gemm", net.qdq(net.input("x", (4, 8))), net.weight((8, 6), [0.1] * 6, axis=1), name="layer")


def per_channel_transposed_gemm(net):
    net.op("Gemm", net.qdq(net.input("x", (4, 8))), net.weight((6, 8), [0.1] * 6, axis=0), name="layer", transB=1)


def per_channel_matmul_behind_transpose(net):
    weight = net.op("Transpose", net.weight((6, 8), [0.1] * 6, axis=0), perm=[1, 0])
    net.op("MatMul", net.qdq(net.input("x", (2, 4, 8))), weight, name="layer")


def weight_on_the_left(net):
    net.op("MatMul", net.weight((6, 8), [0.1] * 6, axis=0), net.qdq(net.input("x", (8, 4))), name="layer")


def batched_weight(net):
    net.op("MatMul", net.qdq(net.input("x", (3, 4, 8))), net.weight((3, 8, 6), [0.1] * 6, axis=2), name="layer")


def two_activations(net):
    x, y = (net.qdq(net.input(name)) for name in "xy")
    net.op("MatMul", x, net.op("Transpose", y, perm=[0, 1, 3, 2]), name="layer")


def past_commuting_operators(net):
    x = net.op("MaxPool", net.qdq(net.input()), kernel_shape=[2, 2])
    x = net.op("Reshape", net.op("Transpose", x, perm=[0, 2, 3, 1]), net.constant(np.array([1, 8, 4, 4])))
    net.conv(net.op("Relu", x))


def past_concat(net):
    net.conv(net.op("Concat", net.qdq(net.input()), net.qdq(net.input("y")), axis=1))


def codes_are_moved(net):
    parameters = net.parameters(0.1, 0, INT8)
    codes = net.op("Transpose", net.op("QuantizeLinear", net.input(), *parameters), perm=[0, 1, 3, 2])
    net.conv(net.op("DequantizeLinear", codes, *parameters))


def input_is_codes(net):
    net.conv(net.op("DequantizeLinear", net.input(dtype=TensorProto.INT8), *net.parameters(0.1, 0, INT8)))


def type_without_zero_point(net):
    scale = net.constant(np.float32(0.1))
    codes = net.op("QuantizeLinear", net.input(), scale, output_dtype=TensorProto.INT8)
    net.conv(net.op("DequantizeLinear", codes, scale))


def scale_of_constant_node(net):
    net.op("Constant", name="scale", value=numpy_helper.from_array(np.float32(0.1)))
    net.conv(net.qdq(net.input(), "scale_out"))


def residual(net):
    x = net.qdq(net.input())
    net.op("Add", net.conv(x, name="conv"), x, name="layer")


def residual_behind_batchnorm(net):
    x = net.qdq(net.input())
    norm = [net.constant(np.ones(8, np.float32)) for _ in range(4)]
    net.op("Add", net.op("BatchNormalization", net.conv(x, name="conv"), *norm), x, name="layer")


def residual_behind_gemm(net):
    x = net.qdq(net.input("x", (4, 8)))
    product = net.op("MatMul", x, net.weight((8, 8)), name="product")
    net.op("Add", x, net.op("Add", product, net.constant(np.ones(8, np.float32))), name="layer")


def add_of_codes(net):
    total = net.op("Add", net.qdq(net.input()), net.qdq(net.input("y"), 0.2), name="layer")
    net.qdq(net.op("Relu", total))


def add_of_two_convolutions(net):
    x = net.qdq(net.input())
    net.op("Add", net.conv(x, name="main"), net.qdq(net.conv(x, name="shortcut")), name="layer")


@pytest.mark.parametrize(
    "graph",
    [
        *(plain_conv, per_channel_conv, weight_quantized_in_graph, per_channel_transposed_conv, per_channel_gemm),
        *(per_channel_transposed_gemm, per_channel_matmul_behind_transpose, weight_on_the_left, batched_weight),
        *(two_activations, past_commuting_operators, past_concat, codes_are_moved, input_is_codes),
        *(
            type_without_zero_point,
            scale_of_constant_node,
            residual,
            residual_behind_batchnorm,
            residual_behind_gemm,
            add_of_codes,
            add_of_two_convolutions,
        ),
    ],
)
def test_quantized_layer(graph, report):
    net = Net()
    graph(net)
    found = report(net)
    assert (layer(found).precision, layer(found).rules) == ("INT8", ())
    assert found.float_layers == ()
    assert found.reformats == ()


def test_other_precisions(report):
    net = Net()
    x = net.input("x", (4, 128))
    net.op("Gemm", x, net.weight((8, 128), np.ones((8, 1)), dtype=INT4, axis=1, block_size=128), name="int4", transB=1)
    net.op("MatMul", net.qdq(x, dtype=FP8), net.weight((128, 8), dtype=FP8), name="fp8")
    found = report(net, "int4_out", "fp8_out")
    assert {layer.name: layer.precision for layer in found.layers} == {"int4": "INT4", "fp8": "FP8"}
    assert all(layer.rules == () for layer in found.layers)


def test_codes_are_not_followed_past_an_average(report):
    net = Net()
    pooled = net.op("AveragePool", net.qdq(net.input()), kernel_shape=[2, 2])
    net.conv(net.qdq(pooled))
    found = report(net)
    assert layer(found).precision == "INT8"
    # DQ, AveragePool and Q become one kernel
    assert found.reformats == ()


# Float that is no mistake


def test_expected_float(report):
    net = Net()
    x, y = net.input("x", (4, 1, 8)), net.input("y", (4, 1, 8))
    net.op("MatMul", x, y, name="attention")
    net.op("Add", x, y, name="sum")
    net.op("Conv", x, y, name="dynamic")
    weights = [net.constant(np.ones(shape, np.float32)) for shape in ((1, 32, 8), (1, 32, 8))]
    for op in ("LSTM", "GRU", "RNN"):
        net.op(op, x, *weights, name=op, hidden_size=8)
    net.op("Add", x, net.constant(np.ones(8, np.float32)), name="bias")
    found = report(net, *(node.output[0] for node in net.nodes))
    assert "6 layers: 6 float; 0 in float could be quantized; 0 reformats" in str(found)
    # a bias is no layer
    assert [layer.name for layer in found.layers] == ["attention", "sum", "dynamic", "LSTM", "GRU", "RNN"]
    assert all(layer.precision == "float" and layer.expected and layer.reasons for layer in found.layers)
    assert found.float_layers == ()


def test_residual_of_a_float_model(report):
    net = Net()
    x = net.input()
    net.op("Add", x, net.conv(x, name="conv"), name="layer")
    found = report(net)
    assert layer(found).expected
    assert [layer.name for layer in found.float_layers] == ["conv"]


def test_attention_in_float_behind_quantized_projections(report):
    net = Net()
    x = net.qdq(net.input("x", (4, 8)))
    net.op("MatMul", *(net.op("MatMul", x, net.weight((8, 8)), name=name) for name in "qk"), name="layer")
    assert layer(report(net)).expected


def test_residual_in_float_is_a_mistake_behind_a_convolution_only(report):
    net = Net()
    x = net.input("x", (4, 8))
    net.op("Add", x, net.op("MatMul", net.qdq(x), net.weight((8, 8)), name="product"), name="layer")
    assert layer(report(net)).expected


def test_sum_that_is_given_in_float_too(report):
    net = Net()
    net.qdq(net.op("Add", net.qdq(net.input()), net.qdq(net.input("y")), name="layer"))
    assert layer(report(net)).precision == "INT8"
    assert layer(report(net, "layer_out", net.nodes[-1].output[0])).rules == ("output-not-quantized",)


def test_convolution_that_others_take_too_runs_no_add(report):
    net = Net()
    conv = net.conv(net.qdq(net.input()), name="conv")
    net.op("Add", conv, net.qdq(net.input("y")), name="layer")
    assert layer(report(net, "layer_out")).precision == "INT8"
    assert layer(report(net, "layer_out", conv)).rules == ("operand-not-quantized",)


def test_sums_of_shapes_are_no_layers(report):
    net = Net()
    x = net.input()
    net.op("Add", net.op("Shape", x), net.op("Shape", x))
    net.op("Add", net.input("i", dtype=TensorProto.INT64), net.input("j", dtype=TensorProto.INT64))
    assert report(net, *(node.output[0] for node in net.nodes)).layers == ()


def test_what_is_computed_from_constants_is_no_layer(report):
    net = Net()
    net.op("MatMul", *(net.constant(np.ones((8, 8), np.float32)) for _ in "ab"))
    assert report(net).layers == ()


def test_other_domains_have_other_operators(report):
    net = Net()
    net.op("Conv", net.input(), net.constant(np.ones(8, np.float32)), domain="mine")
    assert report(net).layers == ()


# Reformats


def activation(net):
    """A convolution's result, for others to take."""
    return net.op("Relu", net.conv(net.qdq(net.input()), name="first"), name="relu")


def test_two_scales(report):
    net = Net()
    x = activation(net)
    net.conv(net.qdq(x, 0.1), name="a")
    net.conv(net.op("MaxPool", net.qdq(net.op("MaxPool", x, kernel_shape=[2, 2]), 0.2), kernel_shape=[2, 2]), name="b")
    (reformat,) = report(net, "a_out", "b_out").reformats
    assert reformat.tensor == "relu_out"
    assert "scales 0.1 and 0.2" in reformat.reason


def test_one_scale_for_all(report):
    net = Net()
    x = activation(net)
    net.conv(net.qdq(x, 0.1), name="a")
    net.conv(net.qdq(net.op("MaxPool", x, kernel_shape=[2, 2]), 0.1), name="b")
    net.conv(net.qdq(net.op("Concat", x, x, axis=1), 0.1), name="c")
    assert report(net, "a_out", "b_out", "c_out").reformats == ()


@pytest.mark.parametrize("also", ["in float", "as output", "with another scale"])
def test_quantize_does_not_move_past_what_others_take_too(also, report):
    net = Net()
    x = activation(net)
    pool = net.op("MaxPool", x, name="pool", kernel_shape=[2, 2])
    outputs = [net.conv(net.qdq(tensor, 0.1), name=name) for tensor, name in ((x, "a"), (pool, "b"))]
    if also == "in float":
        outputs.append(net.op("Softmax", pool))
    elif also == "as output":
        outputs.append(pool)
    else:
        outputs.append(net.conv(net.qdq(pool, 0.2), name="c"))
    first, *more = report(net, *outputs).reformats
    assert first == Reformat("relu_out", "quantized, and kept in float for pool (MaxPool)")
    assert [reformat.tensor for reformat in more] == ([] if also == "as output" else ["pool_out"])


def test_codes_and_float_of_one_tensor(report):
    net = Net()
    x = activation(net)
    net.conv(net.qdq(x), name="a")
    net.op("Sigmoid", x, name="sigmoid")
    net.op("Shape", x)
    (reformat,) = report(net, "a_out", "sigmoid_out").reformats
    assert reformat == Reformat("relu_out", "quantized, and kept in float for sigmoid (Sigmoid)")


def test_entries_and_exits_are_free(report):
    net = Net()
    x = net.input()
    net.conv(net.qdq(x), name="a")
    net.op("Sigmoid", x, name="sigmoid")
    assert report(net, net.qdq("a_out"), "sigmoid_out", "a_out").reformats == ()


def test_dequantized_for_a_float_operator(report):
    net = Net()
    x = net.qdq(activation(net))
    net.conv(x, name="a")
    net.op("Softmax", x, name="softmax")
    (reformat,) = report(net, "a_out", "softmax_out").reformats
    assert reformat == Reformat("relu_out", "codes for a (Conv), and dequantized for softmax (Softmax)")


def test_pair_that_nothing_uses(report):
    net = Net()
    net.op("Softmax", net.qdq(net.op("LayerNormalization", net.input(), net.constant(np.ones(8, np.float32)), name="norm")))
    (reformat,) = report(net).reformats
    assert reformat.tensor == "norm_out"
    assert "nothing takes the codes" in reformat.reason


def average_without_quantized_output(net, x):
    return net.op("AveragePool", x, name="operator", kernel_shape=[2, 2])


def product_with_float(net, x):
    return net.qdq(net.op("Mul", x, net.input("y"), name="operator"))


@pytest.mark.parametrize("graph", [average_without_quantized_output, product_with_float])
def test_operator_in_float_takes_no_codes(graph, report):
    net = Net()
    net.conv(graph(net, net.qdq(net.input())))
    (reformat,) = report(net).reformats
    assert reformat.tensor == "x"
    assert "nothing takes the codes: operator" in reformat.reason


def test_layer_in_float_takes_no_codes(report):
    net = Net()
    weight_not_quantized(net)
    (reformat,) = report(net).reformats
    assert reformat == Reformat("x", "quantized and dequantized, but nothing takes the codes: layer (Conv) runs in float")


def test_requantized(report):
    net = Net()
    x = net.op("MaxPool", net.qdq(net.input(), 0.1), kernel_shape=[2, 2])
    net.conv(net.qdq(x, 0.1), name="same")
    net.conv(net.qdq(x, 0.3), name="other")
    net.conv(x, name="direct")
    (reformat,) = report(net, "same_out", "other_out", "direct_out").reformats
    assert reformat.tensor == "x"
    assert "requantized from scale 0.1 to 0.3" in reformat.reason


def test_concat_of_scales_is_requantized(report):
    net = Net()
    x = net.op("Concat", net.qdq(net.input(), 0.1), net.qdq(net.input("y"), 0.2), axis=1)
    net.conv(net.qdq(x, 0.2))
    found = report(net)
    (reformat,) = found.reformats
    assert reformat.tensor == "x"
    assert "requantized from scale 0.1 to 0.2" in reformat.reason
    assert layer(found).precision == "INT8"


def test_concat_of_scales_in_float(report):
    net = Net()
    concat_scales(net)
    assert [reformat.tensor for reformat in report(net).reformats] == ["x", "y"]


# Whole files


def test_subgraphs(report):
    net, then = Net(), Net()
    x = net.qdq(net.input())
    then.conv(x, name="quantized")
    then.conv("x", name="float")
    branch = then.proto("quantized_out", "float_out").graph
    condition = net.input("condition", (), TensorProto.BOOL)
    net.nodes.append(helper.make_node("If", [condition], ["a", "b"], then_branch=branch, else_branch=branch))
    found = report(net, "a", "b")
    assert [(layer.name, layer.precision) for layer in found.layers] == [("quantized", "INT8"), ("float", "float")] * 2


def test_functions(tmp_path):
    net, body = Net(), Net()
    x, w = net.qdq(net.input()), net.weight()
    body.op("Conv", "a", "b", name="conv")
    function = helper.make_function("mine", "Block", ["a", "b"], ["conv_out"], body.nodes, [helper.make_opsetid("", 21)])
    net.op("Block", x, w, name="block", domain="mine")
    proto = net.proto()
    proto.functions.append(function)
    proto.opset_import.append(helper.make_opsetid("mine", 1))
    onnx.save(proto, tmp_path / "model.onnx")
    assert placement_report(tmp_path / "model.onnx").count == {"INT8": 1}


def test_long_graph(report):
    net = Net()
    x = net.input()
    for _ in range(3000):
        x = net.op("Sigmoid", x)
    net.conv(x)
    assert layer(report(net)).rules == ("input-not-quantized",)


def test_weights_in_other_files_are_not_read(tmp_path):
    net = Net()
    net.conv(net.qdq(net.input(), -0.1))
    (weight,) = [constant.name for constant in net.constants if len(constant.dims) == 4]
    path = tmp_path / "model.onnx"
    onnx.save(net.proto(), path, save_as_external_data=True, all_tensors_to_one_file=False, size_threshold=0)
    (tmp_path / weight).unlink()
    found = placement_report(str(path))
    assert layer(found).rules == ("scale-not-positive",)
    assert "-0.1" in layer(found).reasons[0]


def test_errors(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"none.onnx', which does not exist: give"):
        placement_report(tmp_path / "none.onnx")
    with pytest.raises(IsADirectoryError, match="which is a folder: give"):
        placement_report(tmp_path)
    file = tmp_path / "file.onnx"
    file.touch()
    with pytest.raises(ValueError, match=r"`onnx_path` is '.*file.onnx', which is empty: give"):
        placement_report(file)
    torch.save({"a": torch.ones(2)}, file)
    with pytest.raises(ValueError, match=r"starts with b'PK.* and is not ONNX: give"):
        placement_report(file)
    onnx.save(onnx.ModelProto(ir_version=10), file)
    with pytest.raises(ValueError, match="holds no graph with outputs: give"):
        placement_report(file)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "onnx", None)
        with pytest.raises(ImportError, match=r"lightning-lq\[export\]"):
            placement_report(file)
    net = Net()
    net.conv(net.qdq(net.input(), -0.1))
    onnx.save(net.proto(), file, save_as_external_data=True, location="weights", size_threshold=0)
    (tmp_path / "weights").unlink()
    with pytest.raises(FileNotFoundError, match=r"weights lie in another file, which is not there"):
        placement_report(file)


def test_import_needs_no_onnx():
    code = "import sys; sys.modules['onnx'] = sys.modules['onnx_ir'] = None; import lq.export.placement"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_report(report):
    net = Net()
    x = net.input()
    net.op("Add", x, net.conv(net.qdq(x), name="conv"), name="sum")
    net.conv(net.op("Cast", "sum_out", name="cast", to=TensorProto.FLOAT), name="last")
    found = report(net)
    assert found.count == {"INT8": 1, "float": 2}
    assert [layer.name for layer in found.float_layers] == ["sum", "last"]
    assert json.loads(json.dumps(found.records()))[0] == {
        "name": "conv",
        "op": "Conv",
        "precision": "INT8",
        "reasons": ["input and weight are quantized"],
        "rules": [],
        "expected": False,
    }
    lines = str(found).splitlines()
    assert lines[:6] == [
        "layer  operator  precision  reason",
        "conv   Conv      INT8       input and weight are quantized",
        "sum    Add       float      shortcut x is not quantized, so conv hands on float",
        "last   Conv      float      input cast_out is not quantized",
        "",
        "3 layers: 1 INT8, 2 float; 2 in float could be quantized; 0 reformats",
    ]
    assert lines[6] == "rules broken:"
    assert lines[7].startswith("  shortcut-not-quantized: Quantize the shortcut")


# What this package writes


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        return self.head((self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())) + x).relu())


def written(model: nn.Module, x: torch.Tensor, path: Path, preset: str = "int8", export: str = "tensorrt", **options):
    torch.manual_seed(0)
    lq.quantize_(model.eval(), preset, **options)
    with lq.calibrating(model):
        model(x)
    return placement_report(to_onnx(model, x, path / "model.onnx", target=export))


def test_residual_network_for_tensorrt(tmp_path):
    x = torch.randn(2, 3, 8, 8)
    found = written(Residual(), x, tmp_path, target="tensorrt", args=(x,))
    assert found.count == {"INT8": 5}
    assert all(layer.rules == () for layer in found.layers)
    assert found.reformats == ()


def test_residual_network_without_quantized_shortcut(tmp_path):
    found = written(Residual(), torch.randn(2, 3, 8, 8), tmp_path)
    (add,) = found.float_layers
    assert (add.op, add.rules) == ("Add", ("shortcut-not-quantized",))
    assert len(found.reformats) == 1


def test_layout_for_onnxruntime_is_not_for_tensorrt(tmp_path):
    found = written(Residual(), torch.randn(2, 3, 8, 8), tmp_path, export="onnxruntime")
    assert "signed-codes" in layer(found, "conv1/Conv").rules


def test_transformer(tmp_path):
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    found = written(model, torch.randn(2, 5, 16), tmp_path)
    assert found.count == {"INT8": 6, "float": 2}
    assert found.float_layers == ()
    assert {layer.op for layer in found.layers if layer.expected} == {"Add"}


def test_int4_weights(tmp_path):
    found = written(nn.Sequential(nn.Linear(128, 32)), torch.randn(2, 3, 128), tmp_path, "w4a16")
    assert found.count == {"INT4": 1}
    assert found.float_layers == found.reformats == ()
