"""Where torch and ONNX Runtime part: the codes of every activation on both sides. Import this module late: it needs ``export``.

A graph's QuantizeLinear nodes have the names of the quantizers that they came from. What they give is compared with what these
give in torch, on one batch; the graph runs with its integer kernels, which a look at codes, unlike one at floats, does not undo.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import onnx
import torch
from torch import Tensor, nn

from lq.export.recentre import MOVE, movable
from lq.export.runtime import OnnxModel
from lq.nn import TensorQuantizer
from lq.nn.reuse import weight_quantizers

# What one protobuf message, and so a graph with its weights in memory, may have.
MAX_BYTES = 2**31 - 1


@dataclass(frozen=True)
class CodeDifference:
    """The codes that one quantizer gives in torch and in the graph.

    Attributes:
        name: of the quantizer, as ``conv1.input``.
        codes: how many there are, in one batch.
        unequal: how many of them differ.
        largest: the largest difference, in steps of the scale.
    """

    name: str
    codes: int
    unequal: int
    largest: float

    @property
    def beyond_rounding(self) -> bool:
        """Whether more than float rounding is at work: more than one code of a hundred differs, by however much."""
        return self.unequal > max(1, self.codes / 100)


Calls = list[tuple[TensorQuantizer, Tensor]]


@contextmanager
def recording(model: nn.Module) -> Iterator[Calls]:
    """Within the block, quantizers of activations leave their codes, float32 on the CPU, in the order of their calls."""
    calls: Calls = []
    moved = movable(model)
    weights = set(weight_quantizers(model))

    def seen(quantizer: nn.Module, args: object, output: Tensor) -> None:
        assert isinstance(quantizer, TensorQuantizer)
        if quantizer.active and quantizer.scale is not None:
            codes = (output.detach() / quantizer.scale).float().cpu()
            calls.append((quantizer, codes - MOVE if quantizer in moved else codes))

    found = [m for m in model.modules() if isinstance(m, TensorQuantizer) and m not in weights]
    handles = [quantizer.register_forward_hook(seen) for quantizer in found]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def compare_codes(
    model: nn.Module, calls: Calls, graph: OnnxModel, run: Callable[[OnnxModel], tuple[Tensor, ...]]
) -> tuple[CodeDifference, ...]:
    """Differences at the quantizers of activations, in the order in which torch calls them first.

    Left out are quantizers that the graph does not name, or runs in another number or shape than torch does, and graphs of more
    than 2 GiB.

    Args:
        model: the model that was exported.
        calls: what :func:`recording` left.
        graph: from a file.
        run: runs a graph on the batch of ``calls``.
    """
    assert graph.path is not None
    proto = onnx.load(graph.path)
    if proto.ByteSize() > MAX_BYTES:
        return ()
    first = len(proto.graph.output)
    exposed = _expose_codes_(proto.graph)
    if not exposed:
        return ()
    outputs = run(OnnxModel(proto.SerializeToString(), optimize=graph.optimize))[first:]
    # a graph names a quantizer by the path of a call, of which a shared one has several
    of_path = {
        path.removesuffix("_quantizer"): module
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, TensorQuantizer)
    }
    theirs: dict[TensorQuantizer, list[Tensor]] = defaultdict(list)
    for (name, zero_point), codes in zip(exposed, outputs, strict=True):
        if name in of_path:
            _append_new_(theirs[of_path[name]], codes - zero_point)
    ours: dict[TensorQuantizer, list[Tensor]] = defaultdict(list)
    for quantizer, codes in calls:
        _append_new_(ours[quantizer], codes)
    label = {module: name for name, module in reversed(of_path.items())}
    return tuple(_difference(label[q], ours[q], theirs[q]) for q in ours if _same_shapes(ours[q], theirs[q]))


def _expose_codes_(graph: onnx.GraphProto) -> list[tuple[str, float]]:
    """Make the codes of activations outputs of a graph, in float, in place; returns their quantizers' names and zero points."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    found = []
    for node in list(graph.node):
        match = re.fullmatch(r"(.*)/QuantizeLinear(_\d+)?", node.name)
        if match is None or node.input[0] in constants or _is_moved(graph, node):
            continue
        zero_point = onnx.numpy_helper.to_array(constants[node.input[2]])
        # FP8 has no NumPy type
        exposed = onnx.helper.make_node("Cast", [node.output[0]], [f"{node.name}/codes"], to=onnx.TensorProto.FLOAT)
        graph.node.append(exposed)
        graph.output.append(onnx.helper.make_tensor_value_info(exposed.output[0], onnx.TensorProto.FLOAT, None))
        found.append((match[1], float(zero_point.flat[0])))
    return found


def _is_moved(graph: onnx.GraphProto, quantize: onnx.NodeProto) -> bool:
    """Whether there is another QuantizeLinear with the same scale right behind (:mod:`lq.export.cpu`): that one counts."""

    def takers(node: onnx.NodeProto) -> list[onnx.NodeProto]:
        return [other for other in graph.node if node.output[0] in other.input]

    passed = [node for dequantize in takers(quantize) for node in takers(dequantize)]
    if len(passed) != 1 or passed[0].op_type not in ("LeakyRelu", "MaxPool", "Concat"):
        return False
    return [node.input[1:] for node in takers(passed[0]) if node.op_type == "QuantizeLinear"] == [quantize.input[1:]]


def _append_new_(found: list[Tensor], codes: Tensor) -> None:
    """A tensor that several layers take is quantized in the graph once."""
    if not any(torch.equal(codes.round(), other.round()) for other in found):
        found.append(codes)


def _same_shapes(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return [x.shape for x in ours] == [x.shape for x in theirs]


def _difference(name: str, ours: list[Tensor], theirs: list[Tensor]) -> CodeDifference:
    # a code is a whole number in int8, and in FP8 one of float32 that a division by the scale may miss by a rounding
    differences = [(a - b).abs() for a, b in zip(ours, theirs, strict=True)]
    unequal = [d > 1e-3 * a.abs().clamp_min(1e-3) for d, a in zip(differences, ours, strict=True)]
    return CodeDifference(
        name,
        codes=sum(d.numel() for d in differences),
        unequal=sum(int(u.sum()) for u in unequal),
        largest=max((float((d * u).max()) for d, u in zip(differences, unequal, strict=True) if d.numel()), default=0.0),
    )
