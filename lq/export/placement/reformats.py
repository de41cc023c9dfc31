"""Kernels that only quantize, dequantize or requantize. Import this module late: it needs the extra ``export``."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from lq.export.placement import LayerPlacement, Reformat
from lq.export.placement.checks import scale_text
from lq.export.placement.graph import ACTIVATIONS, COMMUTING, QdqGraph, Quantizer, name_of, operator

# Operators without weights that run on codes where their inputs and their output are quantized.
ELEMENTWISE = ACTIVATIONS | {"AveragePool", "GlobalAveragePool", "Sub", "Mul", "Max", "Min"}


@dataclass
class _Uses:
    """What takes a tensor, where Q has moved backwards and DQ forwards as far as they can.

    Attributes:
        quantizers: QuantizeLinear nodes, one for each scale.
        on_codes: nodes that run on the codes.
        in_float: nodes that need the tensor in float.
    """

    quantizers: dict[tuple[object, ...], Quantizer]
    on_codes: list[ir.Node]
    in_float: list[ir.Node]


def find_reformats(graph: QdqGraph, placed: dict[ir.Node, LayerPlacement]) -> Iterator[Reformat]:
    """Every reformat of a graph, in order; :class:`lq.export.PlacementReport` says what counts."""
    dequantizes: dict[ir.Value, list[ir.Node]] = defaultdict(list)
    for node in graph.nodes:
        if operator(node) == "DequantizeLinear":
            dequantizes[_codes(node)].append(node)
    values = dict.fromkeys(v for node in graph.nodes for v in node.inputs if v is not None and not graph.is_known(v))
    for value in values:
        if value in dequantizes:
            yield from _of_codes(graph, placed, dequantizes[value])
        # a dequantized tensor is told with its codes
        elif graph.operand(value).quantizer is None:
            yield from _of_float(graph, value)


def _codes(dequantize: ir.Node) -> ir.Value:
    assert dequantize.inputs[0] is not None
    return dequantize.inputs[0]


def _of_float(graph: QdqGraph, value: ir.Value) -> Iterator[Reformat]:
    uses = _uses_of_float(graph, value)
    if len(uses.quantizers) > 1:
        scales = " and ".join(scale_text(quantizer) for quantizer in uses.quantizers.values())
        names = ", ".join(name_of(quantizer.node) for quantizer in uses.quantizers.values())
        yield Reformat(str(value.name), f"quantized {len(uses.quantizers)} times, with scales {scales}: {names}")
    # what enters a graph is float anyway
    if uses.quantizers and uses.in_float and not value.is_graph_input():
        yield Reformat(str(value.name), f"quantized, and kept in float for {_names(uses.in_float)}")


def _of_codes(graph: QdqGraph, placed: dict[ir.Node, LayerPlacement], dequantizes: list[ir.Node]) -> Iterator[Reformat]:
    uses = _Uses({}, [], [])
    for node in dequantizes:
        _follow_codes(graph, placed, node.outputs[0], uses)
    mine = graph.quantizer(dequantizes[0])
    tensor = str(mine.source.name)
    for grid, quantizer in uses.quantizers.items():
        if grid != mine.grid:
            change = f"from scale {scale_text(mine)} to {scale_text(quantizer)}"
            yield Reformat(tensor, f"requantized {change} for {name_of(quantizer.node)}")
    in_float = list(dict.fromkeys(uses.in_float))
    if in_float and (uses.on_codes or uses.quantizers):
        on_codes = [*uses.on_codes, *(quantizer.node for quantizer in uses.quantizers.values())]
        yield Reformat(tensor, f"codes for {_names(on_codes)}, and dequantized for {_names(in_float)}")
    elif in_float:
        yield Reformat(tensor, f"quantized and dequantized, but nothing takes the codes: {_names(in_float)} runs in float")


def _uses_of_float(graph: QdqGraph, value: ir.Value) -> _Uses:
    """QuantizeLinear moves back past an operator where all that takes its output is quantized alike."""
    uses = _Uses({}, [], [])
    for node in graph.consumers(value):
        if operator(node) == "QuantizeLinear":
            uses.quantizers.setdefault(graph.quantizer(node).grid, graph.quantizer(node))
        elif (moved := _moved_back(graph, node)) is not None:
            uses.quantizers.setdefault(moved.grid, moved)
        else:
            uses.in_float.append(node)
    return uses


def _moved_back(graph: QdqGraph, node: ir.Node) -> Quantizer | None:
    if operator(node) not in COMMUTING | {"Concat"}:
        return None
    found: dict[tuple[object, ...], Quantizer] = {}
    for output in node.outputs:
        uses = _uses_of_float(graph, output)
        if uses.in_float or output.is_graph_output():
            return None
        found |= uses.quantizers
    return next(iter(found.values())) if len(found) == 1 else None


def _follow_codes(graph: QdqGraph, placed: dict[ir.Node, LayerPlacement], value: ir.Value, uses: _Uses) -> None:
    """Collect what takes a dequantized tensor, past what DequantizeLinear moves forward over."""
    for node in graph.consumers(value):
        if operator(node) == "QuantizeLinear":
            uses.quantizers.setdefault(graph.quantizer(node).grid, graph.quantizer(node))
        elif _runs_on_codes(graph, placed, node):
            uses.on_codes.append(node)
        elif operator(node) in COMMUTING or (operator(node) == "Concat" and _quantizer_of(graph, node) is not None):
            for output in node.outputs:
                _follow_codes(graph, placed, output, uses)
        elif operator(node) == "Concat" and (moved := _moved_back(graph, node)) is not None:
            uses.quantizers.setdefault(moved.grid, moved)
        else:
            uses.in_float.append(node)


def _runs_on_codes(graph: QdqGraph, placed: dict[ir.Node, LayerPlacement], node: ir.Node) -> bool:
    if node in placed:
        return placed[node].precision in ("INT8", "FP8")
    if operator(node) not in ELEMENTWISE - COMMUTING or not graph.quantized_after(node.outputs[0]):
        return False
    inputs = [v for v in node.inputs if v is not None and not graph.is_known(v)]
    return all(graph.operand(v).quantizer is not None for v in inputs)


def _quantizer_of(graph: QdqGraph, node: ir.Node) -> Quantizer | None:
    return graph.operand(node.outputs[0]).quantizer


def _names(nodes: list[ir.Node]) -> str:
    return ", ".join(f"{name_of(node)} ({operator(node)})" for node in dict.fromkeys(nodes))
