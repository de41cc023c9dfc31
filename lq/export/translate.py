"""Fake quantization in a torch program as a node of its own in an ONNX graph.

The exporter's optimizer cannot look into that node, so it neither folds weights back to float nor merges constants across it.
:mod:`lq.export.lower` turns the nodes into standard operators afterwards. Import this module late: it needs the extra ``export``.
"""

from collections.abc import Callable
from typing import Any

import onnx
import onnx_ir as ir
import onnxscript
import torch

from lq.export.codes import Grid

DOMAIN = "lq"
INTEGERS, FLOATS = "FakeQuant", "FakeQuantFloat"
# What the operators of torch take beside the tensor and its amax.
ATTRIBUTES = {INTEGERS: ("num_bits", "unsigned", "narrow_range"), FLOATS: ("exponent_bits", "mantissa_bits")}


def translation_table() -> dict[Any, Any]:
    """``custom_translation_table`` for ``torch.onnx.export``."""
    return {torch.ops.lq.fake_quant.default: _node(INTEGERS), torch.ops.lq.fake_quant_float.default: _node(FLOATS)}


def grid_of(node: ir.Node) -> Grid:
    """The grid that a node quantizes to."""
    values = [node.attributes[name].as_int() for name in ATTRIBUTES[node.op_type]]
    if node.op_type == FLOATS:
        return Grid((values[0], values[1]))
    return Grid(values[0], unsigned=bool(values[1]), narrow_range=bool(values[2]))


def _node(op: str) -> Callable[..., Any]:
    define = onnx.defs.OpSchema
    schema = define(
        op,
        DOMAIN,
        1,
        inputs=[define.FormalParameter("x", "T"), define.FormalParameter("amax", "tensor(float)")],
        outputs=[define.FormalParameter("y", "T")],
        type_constraints=[("T", ["tensor(float)", "tensor(double)", "tensor(float16)", "tensor(bfloat16)"], "")],
        attributes=[define.Attribute(name, define.AttrType.INT, required=True) for name in ATTRIBUTES[op]],
    )
    node = onnxscript.values.Op(onnxscript.values.Opset(DOMAIN, 1), op, schema)
    if op == FLOATS:

        def fake_quant_float(x: Any, amax: Any, exponent_bits: int, mantissa_bits: int) -> Any:
            return node(x, amax, exponent_bits=int(exponent_bits), mantissa_bits=int(mantissa_bits))

        return fake_quant_float

    def fake_quant(x: Any, amax: Any, num_bits: int, unsigned: bool, narrow_range: bool) -> Any:
        return node(x, amax, num_bits=int(num_bits), unsigned=int(unsigned), narrow_range=int(narrow_range))

    return fake_quant
