"""Residual adds behind quantized convolutions, in a recorded run."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile

from torch import nn

from lq.graph import Call, Flow, Value
from lq.nn import QuantConv1d, QuantConv2d, QuantConv3d
from lq.nn.quant_module import QuantModule
from lq.nn.residual import ADDITIONS
from lq.nn.tensor_quantizer import TensorQuantizer

CONVOLUTIONS = (QuantConv1d, QuantConv2d, QuantConv3d)
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
        The adds, and those to be left in float: why, by the name of the block.
    """
    names = {module: name for name, module in model.named_modules()}
    depth = _depths(flow)
    found: dict[QuantModule, list[tuple[nn.Module, int, int]]] = {}
    left: dict[str, str] = {}
    for index, call in enumerate(flow.calls):
        if call.owner is None or not _adds_two(flow, call) or _has_own_quantizers(call.owner):
            continue
        behind = {place: at for place, value in enumerate(call.inputs) if (at := _convolution_behind(flow, value)) is not None}
        if not behind:
            continue
        main = max(behind, key=lambda place: (depth[call.inputs[place]], -place))
        at = behind[main]
        layer = flow.calls[at].target
        assert isinstance(layer, QuantModule)
        if any(_adds_tensors(other) for other in flow.calls[at + 1 : index]):
            left[names[call.owner]] = f"another add runs between `{names[layer]}` and this one"
        else:
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


def _adds_tensors(call: Call) -> bool:
    """Whether a call is what hooks take for an add of two tensors: it has them as its first two positional arguments."""
    positional = call.arguments[0][:2] if call.arguments is not None else ()
    return call.target in ADDITIONS and len(positional) == 2 and all(isinstance(x, Value) for x in positional)


def _adds_two(flow: Flow, call: Call) -> bool:
    """Whether a call adds two tensors of one shape that are both data."""
    if not _adds_tensors(call) or len(call.inputs) != 2 or call.inputs[0] == call.inputs[1]:
        return False
    first, second = call.inputs
    return flow.shape[first] == flow.shape[second] and not flow.parameters.keys() & {first, second}


def _has_own_quantizers(owner: nn.Module) -> bool:
    """Whether the author of a block has put quantizers beside its layers already."""
    return not isinstance(owner, QuantModule) and any(isinstance(child, TensorQuantizer) for child in owner.children())


def _convolution_behind(flow: Flow, value: int) -> int | None:
    """Place in ``flow.calls`` of the quantized convolution whose output a value is, but for what is folded into it."""
    made = {output: i for i, call in enumerate(flow.calls) for output in call.outputs}
    while value in made and value not in flow.returned and len(flow.consumers(value)) == 1:
        call = flow.calls[made[value]]
        if isinstance(call.target, CONVOLUTIONS):
            return made[value] if all(not q._disabled for q in call.target.quantizers().values()) else None
        if not (isinstance(call.target, FOLDED) or call.target in FOLDED_FUNCTIONS):
            return None
        value = call.inputs[0]
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
