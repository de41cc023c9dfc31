"""What TensorRT asks of the constants of Q/DQ. Import this module late: it needs the extra ``export``."""

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from lq.export.placement import Precision, rules
from lq.export.placement.graph import Operand, QdqGraph, Quantizer, name_of, operator
from lq.export.placement.rules import Finding

PRECISIONS: dict[ir.DataType, Precision] = {
    ir.DataType.INT8: "INT8",
    ir.DataType.FLOAT8E4M3FN: "FP8",
    ir.DataType.INT4: "INT4",
}


def check_input(graph: QdqGraph, role: str, value: ir.Value, operand: Operand) -> Iterator[Finding]:
    """What a quantized activation has to be."""
    node, quantizer = operand.obstacle, operand.quantizer
    if node is not None and operator(node) == "Concat":
        scales = ", ".join(sorted({scale_text(q) for q in operand.quantizers}))
        yield Finding(rules.CONCAT_SCALES, f"{role}: {name_of(node)} joins scales {scales}, or codes with float")
    elif node is not None:
        yield Finding(rules.OP_BETWEEN, f"{role}: {name_of(node)} ({operator(node)}) stands behind DequantizeLinear")
    elif quantizer is None:
        yield Finding(rules.INPUT_NOT_QUANTIZED, f"{role} {value.name} is not quantized")
    else:
        yield from check_quantizer(graph, role, quantizer)
        if quantizer.codes is ir.DataType.INT4:
            yield Finding(rules.INT4_GEMM, f"the {role} has INT4 codes")
        if quantizer.scale is not None and quantizer.scale.size > 1:
            yield Finding(rules.PER_CHANNEL_ACTIVATION, f"the {role} has {quantizer.scale.size} scales")


def check_quantizer(graph: QdqGraph, role: str, quantizer: Quantizer) -> Iterator[Finding]:
    """What holds for weights and activations."""
    codes, scale, zero_point = quantizer.codes, quantizer.scale, quantizer.zero_point
    if codes.name.startswith("FLOAT") and codes is not ir.DataType.FLOAT8E4M3FN:
        yield Finding(rules.FP8_FORMAT, f"the {role} has {codes.name} codes")
    elif codes not in PRECISIONS:
        yield Finding(rules.SIGNED_CODES, f"the {role} has {codes.name} codes")
    least = {ir.DataType.FLOAT8E4M3FN: 19, ir.DataType.INT4: 21}.get(codes, 0)
    if graph.opset < least:
        yield Finding(rules.OPSET, f"the {role} has {codes.name} codes, and the graph opset {graph.opset}")
    if not quantizer.scale_fixed:
        yield Finding(rules.SCALE_NOT_CONSTANT, f"the {role}'s scale is computed by the model")
    if scale is not None and not bool(((scale > 0) & np.isfinite(scale)).all()):
        yield Finding(rules.SCALE_NOT_POSITIVE, f"the {role} has a scale of {scale.min():g}")
    before = quantizer.before
    if before is not None and before.grid != quantizer.grid:
        scales = f"{scale_text(before)} and {scale_text(quantizer)}"
        yield Finding(rules.PAIR_SCALES, f"the {role} is quantized and dequantized with scales {scales}", blocks=False)
    if zero_point is not None and zero_point.any():
        yield Finding(rules.ZERO_POINT, f"the {role} has the zero point {zero_point.flat[np.flatnonzero(zero_point)[0]]:g}")


def scale_text(quantizer: Quantizer) -> str:
    return "unknown" if quantizer.scale is None else f"{quantizer.scale.max():.4g}"


def check_types(role: str, first: Quantizer | None, second: Quantizer | None) -> Iterator[Finding]:
    """That two inputs have one type, of those that TensorRT has at all, in codes and in float."""
    if first is None or second is None or not {first.codes, second.codes} <= PRECISIONS.keys():
        return
    if first.floats is not second.floats:
        yield Finding(rules.FLOAT_TYPES, f"{role} are {first.floats.name} and {second.floats.name} behind DequantizeLinear")
    if first.codes is not second.codes:
        yield Finding(rules.MIXED_TYPES, f"{role} are {first.codes.name} and {second.codes.name}")
