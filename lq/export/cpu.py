"""A layout that ONNX Runtime's kernels for 8 bits on the CPU take. Import this module late: it needs the extra ``export``."""

import onnx_ir as ir
import torch

from lq.export.codes import to_ir, to_torch
from lq.export.names import free

# int8's codes as uint8's.
OFFSET = 128


def suit_cpu_(graph: ir.Graph) -> None:
    """Bring QuantizeLinear to where ONNX Runtime looks for it, and write the codes of activations as uint8, in place.

    On the CPU, ONNX Runtime runs a convolution or an add in integers only if a QuantizeLinear follows at once. What rounding
    commutes with, because it keeps the order of values, therefore goes behind it: ``MaxPool, Q, DQ`` becomes ``Q, DQ, MaxPool, Q,
    DQ`` with one scale, ``Concat`` likewise, and ``Relu, Q, DQ`` becomes ``Q, DQ, LeakyRelu(0), Q, DQ``. As LeakyRelu it is a
    table of codes there, as Relu it is not; ReLU6 is such a Relu where the codes end at 6 anyway.

    Kernels take uint8 activations. ONNX Runtime turns int8 into uint8 itself, but not where several layers take one tensor; these
    it would run in float. All codes are those of before, but for the offset of 128.
    """
    # from behind, so that a QuantizeLinear moves over all that it may pass
    for node in reversed(list(graph.all_nodes())):
        quantize = _quantizer_of(node.outputs[0])
        if quantize is None:
            continue
        behind_layer = [place for place, x in enumerate(node.inputs) if _from_layer(x)]
        if node.op_type in ("MaxPool", "Concat") or (_is_relu(node, quantize) and behind_layer):
            for place in behind_layer:
                _insert_before(node, place, quantize)
            if node.op_type in ("Relu", "Clip"):
                _as_leaky(node)
    _write_uint8_(graph)


def _quantizer_of(value: ir.Value) -> ir.Node | None:
    """The QuantizeLinear, with one scale, that alone takes a value."""
    takers = value.consumers()
    if len(takers) != 1 or value.is_graph_output() or takers[0].op_type != "QuantizeLinear" or takers[0].attributes:
        return None
    return takers[0]


def _is_relu(node: ir.Node, quantize: ir.Node) -> bool:
    """A Relu, or a Clip from 0 to what the largest code stands for, or beyond."""
    if node.op_type != "Clip":
        return node.op_type == "Relu"
    low, high, scale = (_number(value) for value in (*node.inputs[1:3], quantize.inputs[1]))
    largest = 127 * scale * (1 - 1e-6)
    return low == 0 and high >= largest


def _number(value: ir.Value | None) -> float:
    constant = None if value is None else ir.convenience.get_const_tensor(value)
    return float("nan") if constant is None else float(to_torch(constant))


def _from_layer(x: ir.Value | None) -> bool:
    """Whether one node alone takes what a quantized layer gives, directly or through what moves: in float nothing is gained."""
    if x is None or len(x.consumers()) != 1 or x.is_graph_output():
        return False
    layer = x.producer()
    if layer is None or layer.op_type == "DequantizeLinear":
        return False
    if layer.op_type in ("Relu", "Clip", "MaxPool"):
        return _from_layer(layer.inputs[0])
    return all(v is not None and (n := v.producer()) is not None and n.op_type == "DequantizeLinear" for v in layer.inputs[:2])


def _insert_before(node: ir.Node, place: int, quantize: ir.Node) -> None:
    """Put Q and DQ with the constants of ``quantize`` in front of an input of a node."""
    x, constants = node.inputs[place], quantize.inputs[1:]
    assert node.graph is not None
    new = [ir.node("QuantizeLinear", [x, *constants])]
    new.append(ir.node("DequantizeLinear", [new[0].outputs[0], *constants]))
    for part in new:
        part.metadata_props.update(quantize.metadata_props)
    node.graph.insert_before(node, new)
    node.replace_input_with(place, new[1].outputs[0])


def _as_leaky(relu: ir.Node) -> None:
    assert relu.graph is not None
    leaky = ir.node("LeakyRelu", [relu.inputs[0]], {"alpha": 0.0}, metadata_props=dict(relu.metadata_props))
    ir.convenience.replace_nodes_and_values(relu.graph, relu, [relu], [leaky], relu.outputs, leaky.outputs)


def _write_uint8_(graph: ir.Graph) -> None:
    taken = {str(name) for name in graph.initializers}
    offsets: dict[ir.Value, ir.Value] = {}
    for quantize in [n for n in graph.all_nodes() if n.op_type == "QuantizeLinear"]:
        zero = quantize.inputs[2]
        assert zero is not None
        if zero.dtype != ir.DataType.INT8:
            continue
        if zero not in offsets:
            offsets[zero] = _offset(graph, zero, taken)
        for node in (quantize, *quantize.outputs[0].consumers()):
            node.replace_input_with(2, offsets[zero])
        quantize.outputs[0].dtype = ir.DataType.UINT8


def _offset(graph: ir.Graph, zero: ir.Value, taken: set[str]) -> ir.Value:
    """A zero point of 128 for each of 0."""
    name = free(f"{str(zero.name).removesuffix('_zero_point')}_offset", taken)
    taken.add(name)
    assert zero.const_value is not None
    tensor = to_ir(torch.full_like(to_torch(zero.const_value), OFFSET, dtype=torch.uint8), name)
    new = ir.Value(name=name, shape=zero.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(new)
    return new
