"""``lq::fake_quant`` in a torch program as a node of its own in an ONNX graph.

The exporter's optimizer cannot look into that node, so it neither folds weights back to float nor merges constants across it.
:mod:`lq.export.lower` turns the nodes into standard operators afterwards. Import this module late: it needs the extra ``export``.
"""

from typing import Any

import onnx
import onnxscript
import torch

DOMAIN, OP = "lq", "FakeQuant"
ATTRIBUTES = ("num_bits", "unsigned", "narrow_range")


def translation_table() -> dict[Any, Any]:
    """``custom_translation_table`` for ``torch.onnx.export``."""
    define = onnx.defs.OpSchema
    schema = define(
        OP,
        DOMAIN,
        1,
        inputs=[define.FormalParameter("x", "T"), define.FormalParameter("amax", "tensor(float)")],
        outputs=[define.FormalParameter("y", "T")],
        type_constraints=[("T", ["tensor(float)", "tensor(double)", "tensor(float16)", "tensor(bfloat16)"], "")],
        attributes=[define.Attribute(name, define.AttrType.INT, required=True) for name in ATTRIBUTES],
    )
    node = onnxscript.values.Op(onnxscript.values.Opset(DOMAIN, 1), OP, schema)

    def fake_quant(x: Any, amax: Any, num_bits: int, unsigned: bool, narrow_range: bool) -> Any:
        return node(x, amax, num_bits=int(num_bits), unsigned=int(unsigned), narrow_range=int(narrow_range))

    return {torch.ops.lq.fake_quant.default: fake_quant}
