"""Residual adds behind quantized convolutions, in a recorded run."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import nn

from lq.graph import Call, Flow, Value
from lq.nn import QuantConv1d, QuantConv2d, QuantConv3d, QuantConvTranspose1d, QuantConvTranspose2d, QuantConvTranspose3d
from lq.nn.quant_module import QuantModule
from lq.nn.residual import ADDITIONS
from lq.nn.tensor_quantizer import TensorQuantizer

CONVOLUTIONS = (QuantConv1d, QuantConv2d, QuantConv3d)
TRANSPOSED = (QuantConvTranspose1d, QuantConvTranspose2d, QuantConvTranspose3d)
# What TensorRT folds into the convolution before it, or drops.
FOLDED = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.Identity),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
)
FOLDED_FUNCTIONS = frozenset({"batch_norm", "dropout", "dropout2d"})


@dataclass(frozen=True)
class Shortcut:
    """A residual add behind a convolution.

    Attributes:
        block: the module in which the convolution and then the add run.
        layer: the convolution that TensorRT computes together with the add.
        operand: place of the shortcut among the operands of the add, 0 or 1.
        values: number of the shortcut, for each call of the layer.
    """

    block: nn.Module
    layer: QuantModule
    operand: int
    values: tuple[int, ...]


def find_shortcuts(flow: Flow, model: nn.Module) -> tuple[list[Shortcut], dict[str, str]]:
    """Adds of which one operand is what a quantized convolution gives, through BatchNorm at most, for this add alone.

    Of two convolutions the one that more quantized layers lie before is the main one; the other is on the shortcut.

    Returns:
        The adds, and those behind a convolution that are to be left in float: why, by the name of the block.
    """
    names = {module: name for name, module in model.named_modules()}
    depth = _depths(flow)
    found: dict[QuantModule, list[tuple[nn.Module, int, int]]] = {}
    left: dict[str, str] = {}
    for index, call in enumerate(flow.calls):
        if call.owner is None or not _adds_data(flow, call) or _has_own_quantizers(call.owner):
            continue
        ways = {place: way for place, value in enumerate(call.inputs) if (way := _way_from_convolution(flow, value))}
        if not ways:
            continue
        # a convolution that the add can be computed with, before one that it cannot
        main = max(ways, key=lambda place: (ways[place].between is None, depth[call.inputs[place]], -place))
        way = ways[main]
        if reason := _why_not(flow, index, way, names):
            left[names[call.owner]] = reason
            continue
        layer = flow.calls[way.start].target
        assert isinstance(layer, QuantModule)
        block = _common(model, names[layer], names[call.owner])
        found.setdefault(layer, []).append((block, 1 - main, call.inputs[1 - main]))
    return list(_agreeing(flow, found, names, left)), left


def _agreeing(
    flow: Flow, found: dict[QuantModule, list[tuple[nn.Module, int, int]]], names: dict[nn.Module, str], left: dict[str, str]
) -> Iterator[Shortcut]:
    """Layers of which every call ends in an add of the same form."""
    for layer, sites in found.items():
        block, operand, _ = sites[0]
        if len(sites) == len(flow.calls_of(layer)) and all(site[:2] == (block, operand) for site in sites):
            yield Shortcut(block, layer, operand, tuple(value for *_, value in sites))
        else:
            left[names[block]] = f"`{names[layer]}` runs several times, and not always before the same add"


def _adds_data(flow: Flow, call: Call) -> bool:
    """Whether a call adds two tensors that are both data."""
    return call.target in ADDITIONS and len(set(call.inputs)) == 2 and not flow.parameters.keys() & {*call.inputs}


def _adds_of_shape(flow: Flow, call: Call, shape: torch.Size) -> bool:
    """Whether a call is what hooks take for the add behind a layer with an output of this shape."""
    positional = call.arguments[0][:2] if call.arguments is not None else ()
    return (
        call.target in ADDITIONS
        and len(positional) == 2
        and all(isinstance(x, Value) and flow.shape[x.number] == shape for x in positional)
    )


def _why_not(flow: Flow, index: int, way: "_Way", names: dict[nn.Module, str]) -> str | None:
    """Why an add, by its place among the calls, is not computed together with the convolution before it."""
    convolution = flow.calls[way.start]
    assert isinstance(convolution.target, nn.Module)
    name, shape = names[convolution.target], flow.shape[convolution.outputs[0]]
    if way.between is not None:
        target = way.between.target
        return f"{target if isinstance(target, str) else type(target).__name__} stands between `{name}` and the add"
    if not isinstance(convolution.target, CONVOLUTIONS):
        return f"`{name}` is a transposed convolution, which is computed without the add"
    if not _adds_of_shape(flow, flow.calls[index], shape):
        return f"what is added to `{name}` has another shape, or is given by keyword"
    if any(_adds_of_shape(flow, other, shape) for other in flow.calls[way.start + 1 : index]):
        return f"another add runs between `{name}` and this one"
    return None


def _has_own_quantizers(owner: nn.Module) -> bool:
    """Whether the author of a block has put quantizers beside its layers already."""
    return not isinstance(owner, QuantModule) and any(isinstance(child, TensorQuantizer) for child in owner.children())


@dataclass(frozen=True)
class _Way:
    """How the output of a quantized convolution comes to an add, and to it alone.

    Attributes:
        start: place of the convolution among the calls.
        between: the last call on the way that is not folded into a convolution.
    """

    start: int
    between: Call | None


def _way_from_convolution(flow: Flow, value: int) -> _Way | None:
    """The way of a value from a quantized convolution, through calls that take nothing else but parameters."""
    made = {output: i for i, call in enumerate(flow.calls) for output in call.outputs}
    between = None
    while value in made and value not in flow.returned and len(flow.consumers(value)) == 1:
        call = flow.calls[made[value]]
        if isinstance(call.target, (*CONVOLUTIONS, *TRANSPOSED)):
            return _Way(made[value], between) if all(not q._disabled for q in call.target.quantizers().values()) else None
        data = [v for v in call.inputs if v not in flow.parameters]
        if isinstance(call.target, QuantModule) or len(data) != 1:
            return None
        if between is None and not (isinstance(call.target, FOLDED) or call.target in FOLDED_FUNCTIONS):
            between = call
        value = data[0]
    return None


def _depths(flow: Flow) -> dict[int, int]:
    """For each value, how many quantized layers lie on the longest way to it."""
    depth = dict.fromkeys(flow.shape, 0)
    for call in flow.calls:
        before = max((depth[v] for v in call.inputs), default=0) + isinstance(call.target, QuantModule)
        depth.update(dict.fromkeys(call.outputs, before))
    return depth


def _common(model: nn.Module, *names: str) -> nn.Module:
    """The innermost module that has all of ``names`` inside, or is one of them."""
    paths = zip(*(name.split(".") for name in names), strict=False)
    return model.get_submodule(".".join(parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, paths)))
