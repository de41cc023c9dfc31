"""QuantizeLinear and DequantizeLinear for the FakeQuant nodes of an exported graph.

By now all constants are known: weights become int8, int4 or fp8 initializers behind a DequantizeLinear, activations pass a
QuantizeLinear and a DequantizeLinear. Import this module late: it needs the extra ``export``.
"""

from dataclasses import dataclass, field

import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnxscript import optimizer
from torch import Tensor

from lq.export.check import INT8, fits_int8
from lq.export.codes import FLOATS, Grid, to_ir, to_torch
from lq.export.cpu import suit_cpu_
from lq.export.names import free, name_nodes_
from lq.export.translate import DOMAIN, grid_of


def lower_fake_quant_(model: ir.Model, target: str) -> None:
    """Write Q/DQ for every FakeQuant, in place; drop what that makes superfluous, and name nodes after their modules.

    Args:
        model: what ``torch.onnx`` made with :func:`lq.export.translate.translation_table`.
        target: ``"onnxruntime"`` is laid out for its kernels (:mod:`lq.export.cpu`).

    Raises:
        ValueError: a node that Q/DQ cannot express: codes beyond int8, amax along several axes, amax that is computed while the
            model runs, or an input of a type that has no scales.
    """
    _fold_inputs_(model)
    lowering = _Lowering(model.graph)
    for node in [n for n in model.graph.all_nodes() if n.domain == DOMAIN]:
        lowering.lower(node)
    if target == "onnxruntime":
        suit_cpu_(model.graph)
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedOpsetsPass()(model)
    name_nodes_(model.graph)
    # paths and source lines of the machine that exported
    common.ClearMetadataAndDocStringPass()(model)


# Constants


def _fold_inputs_(model: ir.Model) -> None:
    """Compute what constants alone feed to quantizers, whatever its size: a weight times its ``pre_quant_scale``."""
    constant: set[ir.Node] = set()
    for node in model.graph:
        known = (v is None or v.producer() in constant or _constant(v) is not None for v in node.inputs)
        if node.domain != DOMAIN and all(known):
            constant.add(node)
    wanted: set[ir.Node] = set()
    todo = [v.producer() for n in model.graph if n.domain == DOMAIN for v in n.inputs if v is not None]
    while todo:
        producer = todo.pop()
        if producer in constant and producer not in wanted:
            wanted.add(producer)
            todo += [v.producer() for v in producer.inputs if v is not None]
    if wanted:
        optimizer.fold_constants(model, should_fold=wanted.__contains__)


def _constant(value: ir.Value) -> ir.TensorProtocol | None:
    """The value of an initializer or a Constant node."""
    return None if value.is_graph_input() else ir.convenience.get_const_tensor(value)


def _tensor(value: ir.Value) -> Tensor | None:
    constant = _constant(value)
    return None if constant is None else to_torch(constant)


# Nodes


@dataclass
class _Constants:
    """What Q and DQ of one quantizer share. ``rounded`` are its scales as numbers, in the shape of ``amax``."""

    label: str
    grid: Grid
    amax: Tensor
    rounded: Tensor
    attributes: dict[str, int]
    scale: ir.Value
    zero_point: ir.Value


@dataclass
class _Lowering:
    graph: ir.Graph
    constants: dict[tuple[object, ...], _Constants] = field(default_factory=dict)
    codes: dict[tuple[ir.Value, ir.Value, bool], ir.Value] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        values = [*self.graph.inputs, *self.graph.initializers.values(), *(v for n in self.graph.all_nodes() for v in n.outputs)]
        self.names.update(str(value.name) for value in values)

    def lower(self, node: ir.Node) -> None:
        x, amax = node.inputs
        assert x is not None
        assert amax is not None
        value, last = _tensor(x), node
        if value is None:
            new = self._activation(x, self._constants(node, x, amax))
        else:
            # stored as the matrix product takes it: what only rearranges a weight goes
            blocks = _out_of_blocks(node, value, _tensor(amax))
            last = blocks or node
            transpose = _transpose(last, value.dim() - (blocks is not None))
            last = transpose or last
            write = self._weight if blocks is None else self._blocks
            new = [write(node, x, amax, value, transpose is not None)]
        for part in new:
            part.metadata_props.update(node.metadata_props)
        assert node.graph is not None
        ir.convenience.replace_nodes_and_values(node.graph, last, [last], new, last.outputs, new[-1].outputs)

    def _constants(self, node: ir.Node, x: ir.Value, amax: ir.Value) -> _Constants:
        rank, grid, label = len(x.shape or ()), grid_of(node), _label(amax)
        key = (amax, rank, grid, x.dtype)
        if key not in self.constants:
            value = _checked(_tensor(amax), grid, label)
            axis = _axis(value, rank, label)
            rounded = self._scale(value, grid, x, label)
            scale = rounded.reshape(() if axis is None else -1)
            self.constants[key] = _Constants(
                label,
                grid,
                value,
                rounded,
                {} if axis is None else {"axis": axis},
                self._initializer(f"{label}_scale", scale),
                self._initializer(f"{label}_zero_point", torch.zeros_like(scale).to(grid.dtype)),
            )
        return self.constants[key]

    def _scale(self, amax: Tensor, grid: Grid, x: ir.Value, label: str) -> Tensor:
        if x.dtype is not None and x.dtype not in FLOATS:
            raise ValueError(f"The input of quantizer `{label}` is {x.dtype}: export in float32, with `model.float()`.")
        try:
            return grid.scale(amax, FLOATS[x.dtype or ir.DataType.FLOAT])
        except ValueError as error:
            raise ValueError(f"Quantizer `{label}` has {error}.") from None

    def _weight(self, node: ir.Node, x: ir.Value, amax: ir.Value, value: Tensor, transposed: bool) -> ir.Node:
        c = self._constants(node, x, amax)
        key = (x, c.scale, transposed)
        if key not in self.codes:
            codes = c.grid.encode(value, c.amax, c.rounded)
            self.codes[key] = self._initializer(f"{c.label}_quantized", codes.mT if transposed else codes)
        attributes = {name: 1 - axis for name, axis in c.attributes.items()} if transposed else c.attributes
        return ir.node("DequantizeLinear", [self.codes[key], c.scale, c.zero_point], attributes)

    def _blocks(self, node: ir.Node, x: ir.Value, amax: ir.Value, value: Tensor, transposed: bool) -> ir.Node:
        """A weight in blocks along its last axis, or, ``transposed``, along its first."""
        grid, label = grid_of(node), _label(amax)
        ranges = _checked(_tensor(amax), grid, label)
        rounded = self._scale(ranges, grid, x, label)
        codes, scale = grid.encode(value, ranges, rounded).flatten(-2), rounded.squeeze(-1)
        if transposed:
            codes, scale = codes.mT, scale.mT
        small = isinstance(grid.num_bits, int) and grid.num_bits <= 4
        inputs = [
            self._initializer(f"{label}_quantized", codes, four_bits=small),
            self._initializer(f"{label}_scale", scale),
            self._initializer(f"{label}_zero_point", torch.zeros_like(scale).to(grid.dtype), four_bits=small),
        ]
        axis = codes.dim() - (2 if transposed else 1)
        return ir.node("DequantizeLinear", inputs, {"axis": axis, "block_size": value.shape[-1]})

    def _activation(self, x: ir.Value, c: _Constants) -> list[ir.Node]:
        exact = isinstance(c.grid.num_bits, tuple) or c.grid.bounds == INT8
        clip = [] if exact else self._clip(x, c)
        quantize = ir.node("QuantizeLinear", [clip[-1].outputs[0] if clip else x, c.scale, c.zero_point], c.attributes)
        dequantize = ir.node("DequantizeLinear", [quantize.outputs[0], c.scale, c.zero_point], c.attributes)
        return [*clip, quantize, dequantize]

    def _clip(self, x: ir.Value, c: _Constants) -> list[ir.Node]:
        """Keep codes in a range smaller than int8's: clip x to the real values of the outermost codes, which round to these."""
        low, high = (bound * c.rounded for bound in c.grid.bounds)
        if not c.attributes:
            bounds = [self._initializer(f"{c.label}_{name}", v.reshape(())) for name, v in (("low", low), ("high", high))]
            return [ir.node("Clip", [x, *bounds])]
        # Clip takes scalars only
        above = ir.node("Max", [x, self._initializer(f"{c.label}_low", low)])
        return [above, ir.node("Min", [above.outputs[0], self._initializer(f"{c.label}_high", high)])]

    def _initializer(self, name: str, value: Tensor, *, four_bits: bool = False) -> ir.Value:
        name = free(name, self.names)
        self.names.add(name)
        tensor = to_ir(value, name, four_bits=four_bits)
        new = ir.Value(name=name, shape=ir.Shape(value.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(new)
        return new


def _checked(amax: Tensor | None, grid: Grid, label: str) -> Tensor:
    if amax is None:
        raise ValueError(f"The amax of quantizer `{label}` is computed while the model runs: calibrate, so that it is fixed.")
    if isinstance(grid.num_bits, int) and not fits_int8(grid.num_bits, grid.unsigned):
        raise ValueError(
            f"Quantizer `{label}` has `num_bits={grid.num_bits}`, `unsigned={grid.unsigned}`: its codes exceed int8."
        )
    return amax


def _axis(amax: Tensor, rank: int, label: str) -> int | None:
    """The axis of x, of ``rank`` axes, along which amax varies; amax broadcasts against x from the right."""
    axes = [i for i, n in enumerate(amax.shape) if n > 1]
    if len(axes) > 1:
        raise ValueError(f"The amax of quantizer `{label}` has shape {tuple(amax.shape)}: Q/DQ takes one axis at most.")
    return axes[0] + rank - amax.dim() if axes else None


def _out_of_blocks(node: ir.Node, value: Tensor, amax: Tensor | None) -> ir.Node | None:
    """The Reshape that brings a weight in blocks, with an amax each, into its own form again."""
    if amax is None or amax.dim() != value.dim() or value.dim() < 3 or amax.shape[-1] != 1:
        return None
    reshape = _only(node, "Reshape")
    return reshape if reshape is not None and reshape.outputs[0].shape == ir.Shape(value.flatten(-2).shape) else None


def _transpose(node: ir.Node, rank: int) -> ir.Node | None:
    """The Transpose of a matrix behind ``node``."""
    found = _only(node, "Transpose") if rank == 2 else None
    return found if found is not None and found.attributes["perm"].as_ints() == (1, 0) else None


def _only(node: ir.Node, op: str) -> ir.Node | None:
    """The node of an operator that alone takes the output of ``node``."""
    takers = node.outputs[0].consumers()
    return takers[0] if len(takers) == 1 and takers[0].op_type == op and not node.outputs[0].is_graph_output() else None


def _label(amax: ir.Value) -> str:
    """The quantizer's short name, from that of its amax: ``conv1.input``."""
    return str(amax.name).removesuffix("._amax").removesuffix("_quantizer")
