"""From ``lq::fake_quant`` in a torch program to QuantizeLinear and DequantizeLinear in an ONNX graph.

The exporter first writes one node, ``lq::FakeQuant``, per quantizer. Its own optimizer cannot look into that node, so it neither
folds the weights back to float nor merges constants across it. Then :func:`lower_fake_quant_` writes the standard operators, with all
constants known: weights become int8 initializers behind a DequantizeLinear, activations a QuantizeLinear and a DequantizeLinear.
"""

import ast
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lq.functional.amax import integer_bounds, scale_from_amax
from lq.functional.fake_quant import tensor_quant

if TYPE_CHECKING:
    import onnx_ir as ir

DOMAIN, OP = "lq", "FakeQuant"
INT8 = integer_bounds(8, narrow_range=False)


def fits_int8(num_bits: int, unsigned: bool) -> bool:
    """Whether every code of the integer is one of int8, the only type that both Q/DQ in ONNX and TensorRT have.

    >>> fits_int8(4, unsigned=False), fits_int8(7, unsigned=True), fits_int8(8, unsigned=True)
    (True, True, False)
    """
    low, high = integer_bounds(num_bits, unsigned, narrow_range=False)
    return INT8[0] <= low and high <= INT8[1]


def translation_table() -> dict[Any, Any]:
    """``custom_translation_table`` for ``torch.onnx.export``: ``torch.ops.lq.fake_quant`` as a node of its own."""
    import onnx
    import onnxscript

    schema = onnx.defs.OpSchema
    op = onnxscript.values.Op(
        onnxscript.values.Opset(DOMAIN, 1),
        OP,
        schema(
            OP,
            DOMAIN,
            1,
            inputs=[schema.FormalParameter("x", "T"), schema.FormalParameter("amax", "tensor(float)")],
            outputs=[schema.FormalParameter("y", "T")],
            type_constraints=[("T", ["tensor(float)", "tensor(double)", "tensor(float16)", "tensor(bfloat16)"], "")],
            attributes=[schema.Attribute(name, schema.AttrType.INT, required=True) for name in _ATTRIBUTES],
        ),
    )

    def fake_quant(x: Any, amax: Any, num_bits: int, unsigned: bool, narrow_range: bool) -> Any:
        return op(x, amax, num_bits=int(num_bits), unsigned=int(unsigned), narrow_range=int(narrow_range))

    return {torch.ops.lq.fake_quant.default: fake_quant}


_ATTRIBUTES = ("num_bits", "unsigned", "narrow_range")


def lower_fake_quant_(model: "ir.Model") -> None:
    """Write Q/DQ for every ``lq::FakeQuant`` of an exported model, in place, drop what they made superfluous, and name the nodes.

    Raises:
        ValueError: a node that Q/DQ cannot express: codes beyond int8, amax along several axes, amax that is computed while the
            model runs, or an input that is not float32.
    """
    _fold_inputs_(model)
    lowering = _Lowering(model.graph)
    for node in [n for n in model.graph.all_nodes() if n.domain == DOMAIN]:
        lowering.lower(node)
    _clean_(model)


# Constants


def _fold_inputs_(model: "ir.Model") -> None:
    """Compute what feeds quantizers from constants alone, of whatever size: a weight times its ``pre_quant_scale``."""
    from onnxscript import optimizer

    constant: set[ir.Node] = set()
    for node in model.graph:
        if node.domain != DOMAIN and all(_is_constant(v, constant) for v in node.inputs):
            constant.add(node)
    wanted: set[ir.Node] = set()
    todo = [v.producer() for n in model.graph if n.domain == DOMAIN for v in n.inputs if v is not None]
    while todo:
        node = todo.pop()
        if node in constant and node not in wanted:
            wanted.add(node)
            todo += [v.producer() for v in node.inputs if v is not None]
    if wanted:
        optimizer.fold_constants(model, should_fold=wanted.__contains__)


def _is_constant(value: "ir.Value | None", computed: "set[ir.Node]") -> bool:
    return value is None or _tensor(value) is not None or value.producer() in computed


def _tensor(value: "ir.Value | None") -> Tensor | None:
    """The value of an initializer or a Constant node."""
    import onnx_ir as ir

    if value is None or value.is_graph_input():
        return None
    constant = ir.convenience.get_const_tensor(value)
    return None if constant is None else torch.from_numpy(np.array(constant.numpy()))


# Lowering


@dataclass
class _Grid:
    """The constants of one quantizer."""

    label: str
    amax: Tensor
    axis: int | None
    arguments: tuple[int, bool, bool]
    scale: "ir.Value"
    zero_point: "ir.Value"

    @property
    def attributes(self) -> dict[str, int]:
        return {} if self.axis is None else {"axis": self.axis}


@dataclass
class _Lowering:
    graph: "ir.Graph"
    grids: dict[Any, _Grid] = field(default_factory=dict)
    codes: dict[Any, "ir.Value"] = field(default_factory=dict)

    def lower(self, node: "ir.Node") -> None:
        x, amax = node.inputs
        assert x is not None and amax is not None
        self._check(node, x)
        grid = self._grid(node, x, amax)
        constant = _tensor(x)
        if constant is None:
            self._lower_activation(node, x, grid)
        else:
            self._lower_constant(node, constant, grid)

    def _check(self, node: "ir.Node", x: "ir.Value") -> None:
        import onnx_ir as ir

        if x.dtype not in (None, ir.DataType.FLOAT):
            raise ValueError(f"The input of quantizer `{_label(node)}` is {x.dtype}: export in float32, with `model.float()`.")
        num_bits, unsigned, _ = _arguments(node)
        if not fits_int8(num_bits, unsigned):
            kind = "unsigned" if unsigned else "signed"
            raise ValueError(f"Quantizer `{_label(node)}` has {num_bits} bits, {kind}: its codes do not fit into int8.")

    def _grid(self, node: "ir.Node", x: "ir.Value", amax: "ir.Value") -> _Grid:
        arguments, rank = _arguments(node), len(x.shape or ())
        key = (amax, rank, arguments)
        if key not in self.grids:
            value = _tensor(amax)
            if value is None:
                raise ValueError(f"The amax of quantizer `{_label(node)}` is computed while the model runs: calibrate, so that it is fixed.")
            axis = _axis(value, rank, _label(node))
            scale = scale_from_amax(value, *arguments[:2]).reshape(() if axis is None else -1)
            label = _label(node)
            zero_point = torch.zeros_like(scale, dtype=torch.int8)
            self.grids[key] = _Grid(
                label,
                value,
                axis,
                arguments,
                self._initializer(f"{label}_scale", scale),
                self._initializer(f"{label}_zero_point", zero_point),
            )
        return self.grids[key]

    def _lower_constant(self, node: "ir.Node", x: Tensor, grid: _Grid) -> None:
        key = (node.inputs, id(grid))
        if key not in self.codes:
            codes = tensor_quant(x, grid.amax, *grid.arguments)[0].to(torch.int8)
            self.codes[key] = self._initializer(f"{grid.label}_quantized", codes)
        new = self._node("DequantizeLinear", [self.codes[key], grid.scale, grid.zero_point], grid.attributes)
        self._replace(node, [new])

    def _lower_activation(self, node: "ir.Node", x: "ir.Value", grid: _Grid) -> None:
        clip = self._clip(x, grid)
        clipped = clip[-1].outputs[0] if clip else x
        quantize = self._node("QuantizeLinear", [clipped, grid.scale, grid.zero_point], grid.attributes)
        dequantize = self._node("DequantizeLinear", [quantize.outputs[0], grid.scale, grid.zero_point], grid.attributes)
        self._replace(node, [*clip, quantize, dequantize])

    def _clip(self, x: "ir.Value", grid: _Grid) -> "list[ir.Node]":
        """What keeps the codes in a range that is smaller than int8's: x itself is clipped, to the real values of the outermost codes."""
        bounds = integer_bounds(*grid.arguments)
        if bounds == INT8:
            return []
        scale = scale_from_amax(grid.amax, *grid.arguments[:2])
        scale = scale.reshape(()) if grid.axis is None else scale
        low, high = (self._initializer(f"{grid.label}_{name}", b * scale) for name, b in zip(("low", "high"), bounds, strict=True))
        if grid.axis is None:
            return [self._node("Clip", [x, low, high])]
        # Clip takes scalars only
        above = self._node("Max", [x, low])
        return [above, self._node("Min", [above.outputs[0], high])]

    def _initializer(self, name: str, value: Tensor) -> "ir.Value":
        import onnx_ir as ir

        name = _free(name, self.graph.initializers)
        tensor = ir.tensor(value.numpy(), name=name)
        new = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(new)
        return new

    def _node(self, op: str, inputs: "Sequence[ir.Value]", attributes: dict[str, int] | None = None) -> "ir.Node":
        import onnx_ir as ir

        return ir.node(op, inputs, attributes)

    def _replace(self, old: "ir.Node", new: "list[ir.Node]") -> None:
        import onnx_ir as ir

        for node in new:
            node.metadata_props.update(old.metadata_props)
        assert old.graph is not None
        ir.convenience.replace_nodes_and_values(old.graph, old, [old], new, old.outputs, new[-1].outputs)


def _arguments(node: "ir.Node") -> tuple[int, bool, bool]:
    num_bits, unsigned, narrow_range = (node.attributes[name].as_int() for name in _ATTRIBUTES)
    return num_bits, bool(unsigned), bool(narrow_range)


def _label(node: "ir.Node") -> str:
    """The quantizer's short name, from that of its amax: ``conv1.input``."""
    amax = node.inputs[1]
    return str(amax.name if amax is not None else node.name).removesuffix("._amax").removesuffix("_quantizer")


def _axis(amax: Tensor, rank: int, label: str) -> int | None:
    """The axis of x along which amax varies; amax broadcasts against x from the right."""
    axes = [i for i, n in enumerate(amax.shape) if n > 1]
    if len(axes) > 1:
        raise ValueError(f"The amax of quantizer `{label}` has shape {tuple(amax.shape)}: Q/DQ takes one axis at most.")
    return axes[0] + rank - amax.dim() if axes else None


def _free(name: str, taken: Any) -> str:
    number, free = 0, name
    while free in taken:
        number += 1
        free = f"{name}_{number}"
    return free


# Finish


def _clean_(model: "ir.Model") -> None:
    """Name nodes after the modules they come from; drop float weights that nothing reads, and paths and sources of this machine."""
    from onnx_ir.passes import common

    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedOpsetsPass()(model)
    taken: set[str] = set()
    for node in model.graph.all_nodes():
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "['']"))
        modules = [scope for scope in scopes[:-1] if scope]
        if modules:
            node.name = _free(f"{modules[-1].removesuffix('_quantizer')}/{node.op_type}", taken)
        taken.add(str(node.name))
    common.ClearMetadataAndDocStringPass()(model)
