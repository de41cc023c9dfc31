"""A layout of ReLU that ONNX Runtime runs in int8. Import this module late: it needs the extra ``export``."""

import onnx_ir as ir


def relu_between_codes_(graph: ir.Graph) -> None:
    """Turn ``layer, Relu, Q, DQ`` into ``layer, Q, DQ, LeakyRelu(0), Q, DQ`` with the same scale throughout, in place.

    On the CPU, ONNX Runtime runs a convolution or Gemm in int8 only if a QuantizeLinear follows at once; it drops a Relu between
    them only for codes that start at 0, which int8 with zero point 0 are not. Rounding is monotonic and keeps 0, so a Relu may as
    well follow the rounding: all codes are those of before. As LeakyRelu it is a table of int8 values there, as Relu it is not.
    """
    for relu in [node for node in graph.all_nodes() if node.op_type == "Relu" and _can_move(node)]:
        x, y = relu.inputs[0], relu.outputs[0]
        (after,) = y.consumers()
        assert relu.graph is not None
        constants = after.inputs[1:]
        quantize = ir.node("QuantizeLinear", [x, *constants], metadata_props=dict(after.metadata_props))
        dequantize = ir.node("DequantizeLinear", [quantize.outputs[0], *constants], metadata_props=dict(after.metadata_props))
        leaky = ir.node("LeakyRelu", [dequantize.outputs[0]], {"alpha": 0.0}, metadata_props=dict(relu.metadata_props))
        ir.convenience.replace_nodes_and_values(relu.graph, relu, [relu], [quantize, dequantize, leaky], [y], leaky.outputs)


def _can_move(relu: ir.Node) -> bool:
    x, y = relu.inputs[0], relu.outputs[0]
    if x is None or len(x.consumers()) != 1 or len(y.consumers()) != 1 or x.is_graph_output() or y.is_graph_output():
        return False
    layer, (after,) = x.producer(), y.consumers()
    if layer is None or after.op_type != "QuantizeLinear" or after.attributes:
        return False
    # a layer in float would gain nothing
    return all(v is not None and (n := v.producer()) is not None and n.op_type == "DequantizeLinear" for v in layer.inputs[:2])
