"""Which layers of an ONNX file TensorRT runs in low precision, and why not the others, told from the graph alone."""

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lq.export._require import require
from lq.export.placement.rules import RULES

Precision = Literal["INT8", "FP8", "INT4", "float"]


@dataclass(frozen=True)
class LayerPlacement:
    """One layer.

    Attributes:
        name: of the node, as TensorRT's engine inspector has it.
        op: its operator in ONNX.
        precision: what TensorRT computes in; ``"INT4"`` is stored so, and computed in float.
        reasons: why, with the names of tensors and nodes.
        rules: identifiers of the rules it breaks, keys of :data:`lq.export.placement.rules.RULES`. A layer in low precision may
            break some, too: they cost kernels around it.
        expected: whether float is no mistake: recurrent layers, and operators without a constant weight among floats.
    """

    name: str
    op: str
    precision: Precision
    reasons: tuple[str, ...]
    rules: tuple[str, ...]
    expected: bool = False


@dataclass(frozen=True)
class Reformat:
    """A tensor that costs a kernel of its own to quantize, dequantize or requantize.

    Attributes:
        tensor: its name.
        reason: what it is needed for.
    """

    tensor: str
    reason: str


@dataclass(frozen=True)
class PlacementReport:
    """What to expect of an engine; ``print`` shows it as a table.

    A tensor that is quantized where the graph begins, or dequantized where it ends, is no reformat: there is no other way for
    a graph that takes and gives floats. Nor is what one kernel does with its own result. So a graph that is quantized from end
    to end has none.

    Attributes:
        layers: Conv, ConvTranspose, Gemm, MatMul, Add of two activations, LSTM, GRU and RNN, in the order of the file, those of
            subgraphs too.
        reformats: further kernels that convert tensors.
    """

    layers: tuple[LayerPlacement, ...]
    reformats: tuple[Reformat, ...]

    @property
    def float_layers(self) -> tuple[LayerPlacement, ...]:
        """The layers in float that could run in low precision."""
        return tuple(layer for layer in self.layers if layer.precision == "float" and not layer.expected)

    @property
    def count(self) -> dict[str, int]:
        """Number of layers by precision.

        >>> layers = (LayerPlacement("conv", "Conv", "INT8", (), ()), LayerPlacement("lstm", "LSTM", "float", (), (), True))
        >>> PlacementReport(layers, ()).count
        {'INT8': 1, 'float': 1}
        """
        return dict(Counter(layer.precision for layer in self.layers))

    def records(self) -> list[dict[str, Any]]:
        """The layers as dictionaries, for JSON or pandas.

        >>> PlacementReport((LayerPlacement("conv", "Conv", "INT8", ("quantized",), ()),), ()).records()
        [{'name': 'conv', 'op': 'Conv', 'precision': 'INT8', 'reasons': ('quantized',), 'rules': (), 'expected': False}]
        """
        return [asdict(layer) for layer in self.layers]

    def __str__(self) -> str:
        rows = [("layer", "operator", "precision", "reason")]
        for layer in self.layers:
            first, *more = layer.reasons or ("",)
            rows += [(layer.name, layer.op, layer.precision, first), *(("", "", "", reason) for reason in more)]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = ["  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3]]).rstrip() for row in rows]
        lines += ["", self.summary, *(f"  {reformat.tensor}: {reformat.reason}" for reformat in self.reformats)]
        broken = dict.fromkeys(rule for layer in self.layers for rule in layer.rules)
        if broken:
            lines.append("rules broken:")
            lines += [f"  {rule}: {RULES[rule].says} ({RULES[rule].section})" for rule in broken]
        return "\n".join(lines)

    @property
    def summary(self) -> str:
        """The numbers, on one line."""
        counts = ", ".join(f"{number} {precision}" for precision, number in sorted(self.count.items())) or "none"
        left, reformats = len(self.float_layers), len(self.reformats)
        plural = "s" * (reformats != 1)
        return f"{len(self.layers)} layers: {counts}; {left} in float could be quantized; {reformats} reformat{plural}"


def placement_report(onnx_path: str | Path) -> PlacementReport:
    """Say for each layer of an ONNX file whether TensorRT runs it in INT8, FP8, INT4 or float, and why.

    It reads the graph and the scales only: no TensorRT, no GPU, and none of the weights that lie in other files. It follows
    what NVIDIA documents of explicit quantization (:mod:`lq.export.placement.rules`): Q moves backwards and DQ forwards past
    what commutes with them, layers take in the DQ before them and the Q behind them. TensorRT decides for itself which kernel
    is fastest, so an engine may still differ: its inspector has the last word.

    A file that ``to_onnx`` wrote for ``target="onnxruntime"`` is not for TensorRT, and the report says so: its codes are uint8
    (``signed-codes``), and Q/DQ between layers and their ReLU keeps these apart (``split-fusion``).

    Args:
        onnx_path: what :func:`to_onnx` wrote, or any other ONNX file.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no such file.
        ValueError: it is not ONNX.
        ImportError: ``onnx`` is missing.
    """
    require("onnx", "onnx_ir")
    from lq.export.placement.graph import load_graph
    from lq.export.placement.layers import place_layers
    from lq.export.placement.reformats import find_reformats

    graph = load_graph(onnx_path)
    placed = place_layers(graph)
    return PlacementReport(tuple(placed.values()), tuple(find_reformats(graph, placed)))
