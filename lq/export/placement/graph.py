"""An ONNX file as TensorRT's Q/DQ propagation sees it. Import this module late: it needs the extra ``export``."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import InlinePass

# "TensorRT Processing of Q/DQ Networks" moves Q backwards and DQ forwards past each operator with Q(Op(x)) == Op(Q(x)). Its
# example is max pooling. The others fulfil that, too, with one scale per tensor and zero point 0: they only move values or drop
# some, and Relu keeps both their order and 0. An average gives new values and so does not.
COMMUTING = frozenset(
    {
        *("MaxPool", "GlobalMaxPool", "Relu", "Identity", "Dropout", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose"),
        *("Slice", "Split", "DepthToSpace", "SpaceToDepth"),
    }
)
# The operators that a report lists, but for recurrent ones.
LAYERS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "Add"})
# What TensorRT computes in the kernel of the layer before it.
ACTIVATIONS = frozenset({"Relu", "LeakyRelu", "PRelu", "Clip", "Sigmoid", "Tanh", "Elu", "HardSigmoid", "HardSwish", "Gelu"})


def operator(node: ir.Node) -> str:
    """The operator's name, with its domain where that is not ONNX's own."""
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"


def name_of(node: ir.Node) -> str:
    """A node's name, else that of what it gives."""
    return node.name or str(node.outputs[0].name)


@dataclass(frozen=True, eq=False)
class Quantizer:
    """The constants of a QuantizeLinear or DequantizeLinear.

    Attributes:
        node: which.
        source: for DequantizeLinear the float tensor before QuantizeLinear, else the codes; for QuantizeLinear its input.
        codes: type of the codes.
        scale: float32; ``None`` where it is not a constant that the file has.
        scale_fixed: whether the scale is computed from constants only.
        zero_point: float32; ``None`` where there is none, or no constant.
        floats: type of the scale, which is that of the tensor before or behind.
        before: that of the QuantizeLinear that a DequantizeLinear undoes.
        axis: of several scales.
        block_size: values per scale along ``axis``, 0 for all.
    """

    node: ir.Node
    source: ir.Value
    codes: ir.DataType
    scale: NDArray[np.float32] | None
    scale_fixed: bool
    zero_point: NDArray[np.float32] | None
    floats: ir.DataType
    before: "Quantizer | None"
    axis: int
    block_size: int

    @property
    def grid(self) -> tuple[object, ...]:
        """Equal for those that give equal codes."""
        zero = None if self.zero_point is None or not self.zero_point.any() else self.zero_point.tobytes()
        scale = self.node.inputs[1] if self.scale is None else self.scale.tobytes()
        return self.codes, scale, zero


@dataclass(frozen=True)
class Operand:
    """Where an input of a layer comes from, past what commutes with quantization.

    Attributes:
        quantizers: DequantizeLinear nodes; several behind Concat, none for a tensor in float.
        obstacle: an operator, no layer, right behind a DequantizeLinear that keeps it from the layer.
    """

    quantizers: tuple[Quantizer, ...] = ()
    obstacle: ir.Node | None = None

    @property
    def quantizer(self) -> Quantizer | None:
        """That of the whole tensor."""
        return self.quantizers[0] if self.quantizers and self.obstacle is None else None


class QdqGraph:
    """The nodes of a model with its subgraphs, in order, and where tensors come from and go."""

    def __init__(self, model: ir.Model) -> None:
        self.opset = model.opset_imports.get("", 1)
        self.nodes = list(model.graph.all_nodes())
        self._fixed: set[ir.Value] = set()
        self._sizes: set[ir.Value] = set()
        self._quantizers: dict[ir.Node, Quantizer] = {}
        self._operands: dict[ir.Value, Operand] = {}
        for node in self.nodes:
            self._sort(node)
        # from the front, so that no trace has to go far back
        for node in self.nodes:
            for value in node.outputs:
                self.operand(value)

    def _sort(self, node: ir.Node) -> None:
        """Whether what a node gives is constant, or known from the shapes of tensors, or neither."""
        inputs = [v for v in node.inputs if v is not None]
        if operator(node) in ("Shape", "Size"):
            self._sizes.update(node.outputs)
        elif operator(node) == "Constant" or (inputs and all(map(self.is_fixed, inputs))):
            self._fixed.update(node.outputs)
        elif inputs and all(map(self.is_known, inputs)) and operator(node) != "ConstantOfShape":
            self._sizes.update(node.outputs)

    def is_fixed(self, value: ir.Value | None) -> bool:
        """Whether a tensor is an initializer, a Constant, or computed from these."""
        return value is not None and (value.is_initializer() or value.const_value is not None or value in self._fixed)

    def is_known(self, value: ir.Value) -> bool:
        """Whether a tensor holds no data: it is constant, or computed from shapes."""
        return self.is_fixed(value) or value in self._sizes

    def consumers(self, value: ir.Value) -> list[ir.Node]:
        """The nodes that take a tensor's values, in order, and not its shape alone."""
        return list(dict.fromkeys(use.node for use in value.uses() if operator(use.node) not in ("Shape", "Size")))

    def only_consumer(self, value: ir.Value) -> ir.Node | None:
        """The node that alone takes a tensor, if there is one."""
        consumers = self.consumers(value)
        return consumers[0] if len(consumers) == 1 and not value.is_graph_output() else None

    # Q/DQ

    def quantizer(self, node: ir.Node) -> Quantizer:
        """What a QuantizeLinear or DequantizeLinear does."""
        if node not in self._quantizers:
            self._quantizers[node] = self._read(node)
        return self._quantizers[node]

    def _read(self, node: ir.Node) -> Quantizer:
        source, scale, *rest = node.inputs
        assert source is not None
        assert scale is not None
        zero_point = rest[0] if rest else None
        codes = ir.DataType.UINT8 if zero_point is None else _dtype(zero_point)
        before = None
        if operator(node) == "QuantizeLinear":
            codes = ir.DataType(int(_attribute(node, "output_dtype", 0))) or codes
        else:
            quantize = self._quantize_before(source)
            before = None if quantize is None else self.quantizer(quantize)
            codes = _dtype(source) if before is None else before.codes
            source = source if before is None else before.source
        return Quantizer(
            node,
            source,
            codes,
            _numbers(scale),
            self.is_fixed(scale),
            _numbers(zero_point),
            _dtype(scale),
            before,
            axis=int(_attribute(node, "axis", 1)),
            block_size=int(_attribute(node, "block_size", 0)),
        )

    def _quantize_before(self, codes: ir.Value) -> ir.Node | None:
        """The QuantizeLinear of codes, also past operators that move them."""
        node = codes.producer()
        while node is not None and operator(node) in COMMUTING and node.inputs[0] is not None:
            node = node.inputs[0].producer()
        return node if node is not None and operator(node) == "QuantizeLinear" else None

    def operand(self, value: ir.Value) -> Operand:
        """Where TensorRT's propagation finds the DequantizeLinear of a tensor."""
        if value not in self._operands:
            self._operands[value] = self._trace(value)
        return self._operands[value]

    def _trace(self, value: ir.Value) -> Operand:
        node = value.producer()
        if node is None or not node.inputs or node.inputs[0] is None:
            return Operand()
        if operator(node) == "DequantizeLinear":
            return Operand((self.quantizer(node),))
        if operator(node) in COMMUTING:
            return self.operand(node.inputs[0])
        parts = [self.operand(v).quantizers for v in node.inputs if v is not None]
        found = tuple(quantizer for part in parts for quantizer in part)
        if operator(node) == "Concat":
            joins = all(parts) and len({quantizer.grid for quantizer in found}) == 1
            return Operand(found, None if joins or not found else node)
        return Operand(obstacle=node if parts[0] and operator(node) not in LAYERS else None)

    def quantized_after(self, value: ir.Value) -> bool:
        """Whether nothing but QuantizeLinear takes a tensor, past activations and what commutes with quantization."""
        node = self.only_consumer(value)
        while node is not None and operator(node) in COMMUTING | ACTIVATIONS:
            value = node.outputs[0]
            node = self.only_consumer(value)
        consumers = self.consumers(value)
        return bool(consumers) and not value.is_graph_output() and _all_are(consumers, "QuantizeLinear")

    def pairs_after(self, value: ir.Value) -> list[ir.Node]:
        """What takes a tensor behind Q and DQ, where nothing takes it before."""
        quantizes = self.consumers(value)
        if not _all_are(quantizes, "QuantizeLinear"):
            return []
        dequantizes = [node for quantize in quantizes for node in self.consumers(quantize.outputs[0])]
        if not _all_are(dequantizes, "DequantizeLinear"):
            return []
        return [node for dequantize in dequantizes for node in self.consumers(dequantize.outputs[0])]


def load_graph(path: str | Path) -> QdqGraph:
    """Read a file without its external weights.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no such file.
        ValueError: it is not ONNX.
    """
    file = Path(path)
    if file.is_dir():
        raise IsADirectoryError(f"`onnx_path` is '{path}', which is a folder: give the file that `to_onnx` wrote.")
    if not file.is_file():
        raise FileNotFoundError(f"`onnx_path` is '{path}', which does not exist: give the file that `to_onnx` wrote.")
    remedy = "give the file that `to_onnx` or `torch.onnx.export` wrote"
    if file.stat().st_size == 0:
        raise ValueError(f"`onnx_path` is '{path}', which is empty: {remedy}.")
    try:
        model = ir.load(file)
    except OSError:
        raise
    # protobuf and onnx_ir have errors of their own for each way to be malformed
    except Exception as error:
        with file.open("rb") as stream:
            start = stream.read(8)
        raise ValueError(f"`onnx_path` is '{path}', which starts with {start!r} and is not ONNX: {remedy}.") from error
    if not model.graph.outputs:
        raise ValueError(f"`onnx_path` is '{path}', which holds no graph with outputs: {remedy}.")
    if model.functions:
        InlinePass()(model)
    try:
        return QdqGraph(model)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"`onnx_path` is '{path}', whose weights lie in another file, which is not there ({error}): keep them together."
        ) from error


def _all_are(nodes: Iterable[ir.Node], op: str) -> bool:
    return all(operator(node) == op for node in nodes)


def _attribute(node: ir.Node, name: str, default: Any) -> Any:
    return node.attributes[name].value if name in node.attributes else default


def _dtype(value: ir.Value) -> ir.DataType:
    tensor = ir.convenience.get_const_tensor(value)
    return (value.dtype or ir.DataType.UNDEFINED) if tensor is None else tensor.dtype


def _numbers(value: ir.Value | None) -> NDArray[np.float32] | None:
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    # ir.Tensor.numpy opens external data, and this file alone
    return None if tensor is None else np.asarray(tensor.numpy()).astype(np.float32)
