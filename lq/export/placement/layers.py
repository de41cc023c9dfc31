"""The precision of each layer, and the rules that decide it. Import this module late: it needs the extra ``export``."""

from collections.abc import Callable, Iterator

import onnx_ir as ir

from lq.export.placement import LayerPlacement, Precision, rules
from lq.export.placement.checks import PRECISIONS, check_input, check_quantizer, check_types
from lq.export.placement.graph import ACTIVATIONS, LAYERS, Operand, QdqGraph, Quantizer, name_of, operator
from lq.export.placement.rules import Finding

CONVOLUTIONS = frozenset({"Conv", "ConvTranspose"})
PRODUCTS = frozenset({"Gemm", "MatMul"})
RECURRENT = frozenset({"LSTM", "GRU", "RNN"})
INTEGER_OPERATORS = frozenset({"QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger"})

INT4_BLOCK_SIZES = (64, 128)
FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}

Placements = dict[ir.Node, LayerPlacement]


def place_layers(graph: QdqGraph) -> Placements:
    """Every layer of a graph, in order."""
    placed: Placements = {}
    for node in graph.nodes:
        place = _judge_of(graph, node)
        if place is not None:
            placed[node] = place(graph, placed, node)
    return placed


def _judge_of(graph: QdqGraph, node: ir.Node) -> Callable[[QdqGraph, Placements, ir.Node], LayerPlacement] | None:
    op = operator(node)
    if op in RECURRENT:
        return _recurrent
    if op in INTEGER_OPERATORS:
        return _integer_operator
    if op not in LAYERS or graph.is_fixed(node.outputs[0]):
        return None
    if op in CONVOLUTIONS:
        return _weighted
    computed = [v for v in node.inputs[:2] if v is not None and not graph.is_known(v)]
    if op in PRODUCTS:
        return _product if len(computed) == 2 else _weighted
    # sums of shapes are integers
    types = {v.dtype for v in computed}
    return _add if len(computed) == 2 and types <= FLOATS | {None} else None


def _recurrent(graph: QdqGraph, placed: Placements, node: ir.Node) -> LayerPlacement:
    return _placement(node, "float", [], "TensorRT runs recurrent layers in float", expected=True)


def _integer_operator(graph: QdqGraph, placed: Placements, node: ir.Node) -> LayerPlacement:
    finding = Finding(rules.QDQ_FORMAT, f"TensorRT cannot import {operator(node)}: export Q/DQ")
    return _placement(node, "float", [finding])


# Layers with a weight


def _weighted(graph: QdqGraph, placed: Placements, node: ir.Node) -> LayerPlacement:
    place = 0 if operator(node) in PRODUCTS and graph.is_fixed(node.inputs[0]) else 1
    data, weight = _input(node, 1 - place), _input(node, place)
    x = graph.operand(data)
    w, axis = _weight_quantizer(graph, node, place)
    findings = list(_check_weight(graph, node, weight, w, axis))
    if w is not None and w.codes is ir.DataType.INT4:
        findings += _check_int4(node, w, x)
    else:
        findings += check_input(graph, "input", data, x)
        findings += check_types("input and weight", x.quantizer, w)
    if len(node.inputs) > 2 and node.inputs[2] is not None and graph.operand(node.inputs[2]).quantizer is not None:
        findings.append(Finding(rules.BIAS_QUANTIZED, f"the bias {node.inputs[2].name} has Q/DQ"))
    if w is None or any(finding.blocks for finding in findings):
        # a convolution with kernels that the model computes is not meant to be quantized
        expected = w is None and x.quantizer is None and not graph.is_known(weight)
        return _placement(node, "float", findings, expected=expected)
    precision = PRECISIONS[w.codes]
    if precision == "INT4":
        return _placement(node, precision, findings, "weight in blocks, computed in float")
    findings += _check_after(graph, node)
    return _placement(node, precision, findings, "input and weight are quantized")


def _weight_quantizer(graph: QdqGraph, node: ir.Node, place: int) -> tuple[Quantizer | None, int]:
    """That of a weight, and the axis of output channels as it sees it.

    A GEMM may transpose behind DequantizeLinear, as ``torch.onnx`` writes Linear layers; convolutions may not.
    """
    producer, transpose = _input(node, place).producer(), None
    if producer is not None and operator(producer) == "Transpose" and operator(node) in PRODUCTS:
        producer, transpose = _input(producer, 0).producer(), producer
    if producer is None or operator(producer) != "DequantizeLinear":
        return None, 0
    w = graph.quantizer(producer)
    if operator(node) in CONVOLUTIONS:
        return w, 0
    rank = len(w.source.shape) if w.source.shape is not None else 2
    flag = node.attributes.get("transB" if place else "transA")
    transposed = flag is not None and bool(flag.as_int())
    axis = rank - (2 if transposed == bool(place) else 1)
    if transpose is None:
        return w, axis
    perm = transpose.attributes.get("perm")
    return w, rank - 1 - axis if perm is None else perm.as_ints()[axis]


def _check_weight(graph: QdqGraph, node: ir.Node, weight: ir.Value, w: Quantizer | None, axis: int) -> Iterator[Finding]:
    if w is None:
        between = graph.operand(weight)
        if between.quantizers or between.obstacle is not None:
            yield Finding(rules.OP_BETWEEN, f"{_last(weight)} stands between DequantizeLinear and the weight")
        elif graph.is_known(weight):
            yield Finding(rules.WEIGHT_NOT_QUANTIZED, f"weight {weight.name} is not quantized")
        else:
            yield Finding(rules.WEIGHT_NOT_CONSTANT, f"weight {weight.name} is computed by the model")
        return
    if not graph.is_fixed(w.source):
        yield Finding(rules.WEIGHT_NOT_CONSTANT, f"weight {w.source.name} is computed by the model, and then quantized")
    yield from check_quantizer(graph, "weight", w)
    if w.codes is ir.DataType.INT4 or w.scale is None or w.scale.size == 1:
        return
    rank = len(w.source.shape) if w.source.shape is not None else w.scale.ndim
    if w.block_size or w.scale.ndim > 1:
        yield Finding(rules.WEIGHT_AXIS, f"the weight has {w.codes.name} codes in blocks")
    elif w.axis % rank != axis:
        yield Finding(rules.WEIGHT_AXIS, f"the weight has its scales on axis {w.axis % rank}, {operator(node)} needs {axis}")


def _check_int4(node: ir.Node, w: Quantizer, x: Operand) -> Iterator[Finding]:
    if operator(node) not in PRODUCTS:
        yield Finding(rules.INT4_GEMM, f"{operator(node)} has an INT4 weight")
    if w.block_size not in INT4_BLOCK_SIZES:
        yield Finding(rules.INT4_BLOCKS, f"the INT4 weight has {_blocks(w)}")
    yield from check_types("input and weight", x.quantizer, w)


def _blocks(w: Quantizer) -> str:
    if w.block_size:
        return f"blocks of {w.block_size}"
    return "one scale" if w.scale is not None and w.scale.size == 1 else "a scale per channel"


def _check_after(graph: QdqGraph, node: ir.Node) -> Iterator[Finding]:
    """What keeps a quantized layer from handing on codes."""
    value = node.outputs[0]
    after = graph.only_consumer(value)
    if operator(node) == "MatMul" and after is not None and _is_bias_add(graph, after):
        value = after.outputs[0]
        after = graph.only_consumer(value)
    if after is not None and operator(after) == "BatchNormalization":
        yield Finding(rules.UNFOLDED_BATCHNORM, f"{name_of(after)} after it is not folded", blocks=False)
    if after is not None and operator(after) == "Cast" and graph.quantized_after(after.outputs[0]):
        yield Finding(rules.OP_BETWEEN, f"{name_of(after)} (Cast) stands between it and QuantizeLinear", blocks=False)
    behind = graph.pairs_after(value)
    if behind and all(operator(n) in ACTIVATIONS | {"BatchNormalization"} for n in behind):
        names = ", ".join(f"{name_of(n)} ({operator(n)})" for n in behind)
        yield Finding(rules.SPLIT_FUSION, f"Q/DQ separates it from {names}", blocks=False)


# Layers of two activations


def _product(graph: QdqGraph, placed: Placements, node: ir.Node) -> LayerPlacement:
    operands = [graph.operand(_input(node, place)) for place in (0, 1)]
    if not any(operand.quantizers or operand.obstacle for operand in operands):
        return _placement(node, "float", [], "neither operand is quantized (optional)", expected=True)
    findings = list(_check_pair(graph, node, operands))
    return _both_quantized(graph, node, operands, findings)


def _both_quantized(graph: QdqGraph, node: ir.Node, operands: list[Operand], findings: list[Finding]) -> LayerPlacement:
    first = operands[0].quantizer
    if first is None or any(finding.blocks for finding in findings):
        return _placement(node, "float", findings)
    return _placement(node, PRECISIONS[first.codes], findings, "both operands are quantized")


def _check_pair(graph: QdqGraph, node: ir.Node, operands: list[Operand]) -> Iterator[Finding]:
    for place, operand in enumerate(operands):
        value = _input(node, place)
        if operand.quantizer is not None or operand.obstacle is not None:
            yield from check_input(graph, f"operand {value.name}", value, operand)
        else:
            yield Finding(rules.OPERAND_NOT_QUANTIZED, f"operand {value.name} is not quantized, the other one is")
    yield from check_types("operands", *(operand.quantizer for operand in operands))


def _add(graph: QdqGraph, placed: Placements, node: ir.Node) -> LayerPlacement:
    operands = [graph.operand(_input(node, place)) for place in (0, 1)]
    quantized = [place for place in (0, 1) if operands[place].quantizer is not None]
    layers = [_layer_behind(graph, placed, _input(node, place)) for place in (0, 1)]
    if len(quantized) == 2:
        return _add_of_codes(graph, node, operands)
    if len(quantized) == 1 and (layer := layers[1 - quantized[0]]) is not None:
        return _fused_add(graph, placed, node, operands[quantized[0]], _input(node, quantized[0]), layer)
    if quantized:
        return _placement(node, "float", list(_check_pair(graph, node, operands)))
    behind = next((n for n in layers if n is not None and operator(n) == "Conv"), None)
    if behind is None:
        return _placement(node, "float", [], "neither operand is quantized (optional)", expected=True)
    shortcut = _input(node, 1 if layers[0] is behind else 0)
    reason = f"shortcut {shortcut.name} is not quantized, so {name_of(behind)} hands on float"
    return _placement(node, "float", [Finding(rules.SHORTCUT_NOT_QUANTIZED, reason)])


def _add_of_codes(graph: QdqGraph, node: ir.Node, operands: list[Operand]) -> LayerPlacement:
    findings = list(_check_pair(graph, node, operands))
    if not graph.quantized_after(node.outputs[0]):
        findings.append(Finding(rules.OUTPUT_NOT_QUANTIZED, "both operands are quantized, the sum is not"))
    for operand in operands:
        quantizer = operand.quantizer
        layer = None if quantizer is None else quantizer.source.producer()
        if layer is not None and operator(layer) == "Conv" and graph.pairs_after(layer.outputs[0]) == [node]:
            reason = f"Q/DQ separates {name_of(layer)} from it, which is a kernel of its own then"
            findings.append(Finding(rules.SPLIT_FUSION, reason, blocks=False))
            # one of two convolutions is on the shortcut
            break
    return _both_quantized(graph, node, operands, findings)


def _fused_add(
    graph: QdqGraph, placed: Placements, node: ir.Node, operand: Operand, shortcut: ir.Value, layer: ir.Node
) -> LayerPlacement:
    quantizer, precision = operand.quantizer, placed[layer].precision
    assert quantizer is not None
    findings = list(check_input(graph, f"shortcut {shortcut.name}", shortcut, operand))
    if not findings and PRECISIONS[quantizer.codes] != precision:
        findings.append(Finding(rules.MIXED_TYPES, f"the shortcut is {quantizer.codes.name}, {name_of(layer)} {precision}"))
    if findings:
        return _placement(node, "float", findings)
    return _placement(node, precision, findings, f"in one kernel with {name_of(layer)}")


def _layer_behind(graph: QdqGraph, placed: Placements, value: ir.Value) -> ir.Node | None:
    """The quantized layer that gives a tensor to one node alone, past its bias, BatchNormalization and what does nothing."""
    while True:
        node = value.producer()
        if node is None or graph.only_consumer(value) is None:
            return None
        if operator(node) in LAYERS - {"Add"}:
            return node if node in placed and placed[node].precision in ("INT8", "FP8") else None
        if operator(node) in ("BatchNormalization", "Identity", "Dropout"):
            value = _input(node, 0)
        elif _is_bias_add(graph, node):
            value = next(v for v in node.inputs if v is not None and not graph.is_fixed(v))
        else:
            return None


def _is_bias_add(graph: QdqGraph, node: ir.Node) -> bool:
    return operator(node) == "Add" and sum(graph.is_fixed(v) for v in node.inputs) == 1


# Results


def _placement(
    node: ir.Node, precision: Precision, findings: list[Finding], *reasons: str, expected: bool = False
) -> LayerPlacement:
    reasons += tuple(finding.reason for finding in findings)
    ids = tuple(dict.fromkeys(finding.rule.id for finding in findings))
    return LayerPlacement(name_of(node), operator(node), precision, reasons, ids, expected)


def _input(node: ir.Node, place: int) -> ir.Value:
    value = node.inputs[place]
    assert value is not None
    return value


def _last(value: ir.Value) -> str:
    node = value.producer()
    assert node is not None
    return f"{name_of(node)} ({operator(node)})"
