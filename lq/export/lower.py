"""QuantizeLinear and DequantizeLinear for the FakeQuant nodes of an exported graph.

By now all constants are known: weights become int8 initializers behind a DequantizeLinear, activations pass a QuantizeLinear and
a DequantizeLinear. Import this module late: it needs the extra ``export``.
"""

import ast
from collections.abc import Container
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnxscript import optimizer
from torch import Tensor

from lq.export.check import INT8, fits_int8
from lq.export.relu import relu_between_codes_
from lq.export.translate import ATTRIBUTES, DOMAIN
from lq.functional.fake_quant import quantize
from lq.functional.grid import integer_bounds, scale_from_amax

Grid = tuple[int, bool, bool]


def lower_fake_quant_(model: ir.Model, runtime: str) -> None:
    """Write Q/DQ for every FakeQuant, in place; drop what that makes superfluous, and name nodes after their modules.

    Args:
        model: what ``torch.onnx`` made with :func:`lq.export.translate.translation_table`.
        runtime: ``"onnxruntime"`` has each Relu moved to where ONNX Runtime stays in int8.

    Raises:
        ValueError: a node that Q/DQ cannot express: codes beyond int8, amax along several axes, amax that is computed while the
            model runs, or an input that is not float32.
    """
    _fold_inputs_(model)
    lowering = _Lowering(model.graph)
    for node in [n for n in model.graph.all_nodes() if n.domain == DOMAIN]:
        lowering.lower(node)
    if runtime == "onnxruntime":
        relu_between_codes_(model.graph)
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedOpsetsPass()(model)
    _name_nodes_(model.graph)
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
    # a copy: torch does not take arrays that are read-only
    return None if constant is None else torch.from_numpy(np.array(constant.numpy()))


# Nodes


@dataclass
class _Constants:
    """What Q and DQ of one quantizer share."""

    label: str
    grid: Grid
    amax: Tensor
    attributes: dict[str, int]
    scale: ir.Value
    zero_point: ir.Value


@dataclass
class _Lowering:
    graph: ir.Graph
    constants: dict[tuple[ir.Value, int, Grid], _Constants] = field(default_factory=dict)
    codes: dict[tuple[ir.Value, ir.Value], ir.Value] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        values = [*self.graph.inputs, *self.graph.initializers.values(), *(v for n in self.graph.all_nodes() for v in n.outputs)]
        self.names.update(str(value.name) for value in values)

    def lower(self, node: ir.Node) -> None:
        x, amax = node.inputs
        assert x is not None
        assert amax is not None
        if x.dtype not in (None, ir.DataType.FLOAT):
            raise ValueError(f"The input of quantizer `{_label(amax)}` is {x.dtype}: export in float32, with `model.float()`.")
        constants, value = self._constants(node, x, amax), _tensor(x)
        new = self._activation(x, constants) if value is None else [self._weight(x, value, constants)]
        for part in new:
            part.metadata_props.update(node.metadata_props)
        assert node.graph is not None
        ir.convenience.replace_nodes_and_values(node.graph, node, [node], new, node.outputs, new[-1].outputs)

    def _constants(self, node: ir.Node, x: ir.Value, amax: ir.Value) -> _Constants:
        rank, label = len(x.shape or ()), _label(amax)
        num_bits, unsigned, narrow_range = (node.attributes[name].as_int() for name in ATTRIBUTES)
        grid = (num_bits, bool(unsigned), bool(narrow_range))
        key = (amax, rank, grid)
        if key not in self.constants:
            value = _tensor(amax)
            if value is None:
                raise ValueError(
                    f"The amax of quantizer `{label}` is computed while the model runs: calibrate, so that it is fixed."
                )
            if not fits_int8(*grid[:2]):
                raise ValueError(f"Quantizer `{label}` has `num_bits={num_bits}`, `unsigned={grid[1]}`: its codes exceed int8.")
            axis = _axis(value, rank, label)
            scale = scale_from_amax(value, *grid[:2]).reshape(() if axis is None else -1)
            self.constants[key] = _Constants(
                label,
                grid,
                value,
                {} if axis is None else {"axis": axis},
                self._initializer(f"{label}_scale", scale),
                self._initializer(f"{label}_zero_point", torch.zeros_like(scale, dtype=torch.int8)),
            )
        return self.constants[key]

    def _weight(self, x: ir.Value, value: Tensor, c: _Constants) -> ir.Node:
        key = (x, c.scale)
        if key not in self.codes:
            codes = quantize(value, c.amax, *c.grid)
            self.codes[key] = self._initializer(f"{c.label}_quantized", codes.to(torch.int8))
        return ir.node("DequantizeLinear", [self.codes[key], c.scale, c.zero_point], c.attributes)

    def _activation(self, x: ir.Value, c: _Constants) -> list[ir.Node]:
        clip = [] if integer_bounds(*c.grid) == INT8 else self._clip(x, c)
        quantize = ir.node("QuantizeLinear", [clip[-1].outputs[0] if clip else x, c.scale, c.zero_point], c.attributes)
        dequantize = ir.node("DequantizeLinear", [quantize.outputs[0], c.scale, c.zero_point], c.attributes)
        return [*clip, quantize, dequantize]

    def _clip(self, x: ir.Value, c: _Constants) -> list[ir.Node]:
        """Keep codes in a range smaller than int8's: clip x to the real values of the outermost codes, which round to these."""
        scale = scale_from_amax(c.amax, *c.grid[:2])
        low, high = (bound * scale for bound in integer_bounds(*c.grid))
        if not c.attributes:
            bounds = [self._initializer(f"{c.label}_{name}", v.reshape(())) for name, v in (("low", low), ("high", high))]
            return [ir.node("Clip", [x, *bounds])]
        # Clip takes scalars only
        above = ir.node("Max", [x, self._initializer(f"{c.label}_low", low)])
        return [above, ir.node("Min", [above.outputs[0], self._initializer(f"{c.label}_high", high)])]

    def _initializer(self, name: str, value: Tensor) -> ir.Value:
        name = _free(name, self.names)
        self.names.add(name)
        tensor = ir.tensor(value.numpy(), name=name)
        new = ir.Value(name=name, shape=ir.Shape(value.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(new)
        return new


def _axis(amax: Tensor, rank: int, label: str) -> int | None:
    """The axis of x, of ``rank`` axes, along which amax varies; amax broadcasts against x from the right."""
    axes = [i for i, n in enumerate(amax.shape) if n > 1]
    if len(axes) > 1:
        raise ValueError(f"The amax of quantizer `{label}` has shape {tuple(amax.shape)}: Q/DQ takes one axis at most.")
    return axes[0] + rank - amax.dim() if axes else None


# Names


def _label(amax: ir.Value) -> str:
    """The quantizer's short name, from that of its amax: ``conv1.input``."""
    return str(amax.name).removesuffix("._amax").removesuffix("_quantizer")


def _name_nodes_(graph: ir.Graph) -> None:
    """``conv1/Conv``, ``conv1.input/QuantizeLinear``: what engines and profilers show should lead back to the module."""
    taken: set[str] = set()
    for node in graph.all_nodes():
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "['']"))
        # the first is the model, the last the function
        module = next((scope for scope in reversed(scopes[1:-1]) if scope), None)
        if module is not None:
            node.name = f"{module.removesuffix('_quantizer')}/{node.op_type}"
        node.name = _free(str(node.name), taken)
        taken.add(node.name)


def _free(name: str, taken: Container[str]) -> str:
    number, free = 0, name
    while free in taken:
        number += 1
        free = f"{name}_{number}"
    return free
