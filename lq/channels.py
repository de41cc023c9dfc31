"""Which channels of a tensor the input channels of layers are, however they got there.

Channels are numbered, and a tensor of these numbers takes the way that the values took through a recorded run (:mod:`lq.graph`):
operations that let a positive factor on a channel pass hand the numbers on, and those that only rearrange values rearrange them.
Reshapes, heads, repeated heads, splits and concatenations need no rule of their own that way.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lq.graph import Call, Flow, Value, tensors_in
from lq.nn.input_channels import channel_dim

# What a positive factor on a channel passes through, value by value: f(s x) = s f(x).
SAME_MODULES: tuple[type[nn.Module], ...] = (
    *(nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
)
SAME_FUNCTIONS = frozenset(
    {
        *("relu", "relu_", "leaky_relu", "leaky_relu_", "prelu", "dropout", "dropout1d", "dropout2d", "dropout3d"),
        *("contiguous", "clone", "to", "type", "type_as", "float", "double", "half", "bfloat16"),
    }
)
# ... and channel by channel, of which they have one along dimension 1 as before.
POOLING_MODULES: tuple[type[nn.Module], ...] = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.Upsample),
    *(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
)
POOLING_FUNCTIONS = frozenset(
    {f"{kind}{n}d" for kind in ("max_pool", "avg_pool", "adaptive_avg_pool") for n in (1, 2, 3)} | {"interpolate"}
)
# What moves values about and leaves them as they are.
MOVING_MODULES: tuple[type[nn.Module], ...] = (nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle)
MOVING_FUNCTIONS = frozenset(
    {
        *("view", "reshape", "flatten", "unflatten", "ravel", "squeeze", "unsqueeze", "T", "mT", "t", "transpose", "swapaxes"),
        *("swapdims", "permute", "movedim", "moveaxis", "chunk", "split", "tensor_split", "unbind", "narrow", "select"),
        *("__getitem__", "expand", "repeat", "repeat_interleave", "tile", "flip", "roll", "pixel_shuffle", "pixel_unshuffle"),
    }
)
JOINING_FUNCTIONS = frozenset({"cat", "concat", "concatenate", "stack"})
PRODUCTS = frozenset({"mul", "mul_", "multiply", "__mul__", "__rmul__", "__imul__"})
QUOTIENTS = frozenset({"div", "div_", "divide", "true_divide", "__truediv__"})
MATRIX_PRODUCTS = frozenset({"matmul", "bmm", "__matmul__"})

# No channel of the tensor.
NONE = -1


@dataclass
class Use:
    """Where the channels of a tensor go.

    Attributes:
        layers: layers with, for each of their input channels, the number of the channel that it is, or -1; int64 ``(channels,)``.
        free: whether a channel goes nowhere else, and nothing but layers sees a factor on it; bool ``(channels,)``.
    """

    layers: list[tuple[nn.Module, Tensor]] = field(default_factory=list)
    free: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))


def follow(flow: Flow, value: int, dim: int, layer_of: Callable[[Call], nn.Module | None]) -> Use:
    """Follow the channels of ``value`` along its dimension ``dim`` to layers.

    Args:
        flow: a recorded run.
        value: number of the tensor.
        dim: dimension of its channels.
        layer_of: the layer whose input meets its weight in a call; ``None`` if that is no layer's, or one's that must not change.
    """
    shape = flow.shape[value]
    channels = shape[dim]
    numbers = torch.arange(channels, dtype=torch.int32).reshape([-1 if i == dim % len(shape) else 1 for i in range(len(shape))])
    use, carried = Use(free=torch.ones(channels, dtype=torch.bool)), {value: numbers.expand(shape)}
    for call in flow.calls:
        taken = [v for v in call.inputs if v in carried]
        if not taken:
            continue
        layer = layer_of(call)
        index = None if layer is None or taken != [call.inputs[0]] else _along(carried[taken[0]], layer)
        if layer is not None and index is not None:
            use.layers.append((layer, index))
        else:
            passing, handed = _handed_on(flow, call, carried)
            _block(use, [carried[v] for v in taken if v not in passing])
            carried |= handed
    _block(use, [carried[v] for v in flow.returned if v in carried])
    layers = [(layer, torch.where((i >= 0) & use.free[i.clamp_min(0)], i, NONE)) for layer, i in use.layers]
    return Use([(layer, i) for layer, i in layers if bool((i >= 0).any())], use.free)


def _block(use: Use, carried: list[Tensor]) -> None:
    for numbers in carried:
        seen = torch.unique(numbers).long()
        use.free[seen[seen >= 0]] = False


def _along(numbers: Tensor, layer: nn.Module) -> Tensor | None:
    """Numbers of a layer's input channels, if each channel has one."""
    dim = channel_dim(layer, numbers.dim())
    rows = numbers.movedim(dim, -1).flatten(0, -2) if numbers.dim() > 1 else numbers.unsqueeze(0)
    if not rows.numel() or not bool((rows == rows[:1]).all()):
        return None
    return rows[0].long()


def passes(call: Call) -> bool:
    """Whether a call is one that may let a positive factor on a channel pass.

    >>> passes(Call(nn.ReLU(), (0,), (1,))), passes(Call("gelu", (0,), (1,)))
    (True, False)
    """
    return (_RULES.get(call.target) if isinstance(call.target, str) else _rule_of_module(call.target)) is not None


# The values of which a factor passes, and the numbers of what the call returns.
Handed = tuple[list[int], list[Tensor]]
Rule = Callable[[Flow, Call, dict[int, Tensor]], Handed | None]


def _handed_on(flow: Flow, call: Call, carried: dict[int, Tensor]) -> tuple[list[int], dict[int, Tensor]]:
    """Inputs of which a factor passes, and the numbers of what the call returns."""
    rule = _RULES.get(call.target) if isinstance(call.target, str) else _rule_of_module(call.target)
    found = None if rule is None else rule(flow, call, carried)
    if found is None or [n.shape for n in found[1]] != [flow.shape[v] for v in call.outputs]:
        return [], {}
    return found[0], dict(zip(call.outputs, found[1], strict=True))


def _same(flow: Flow, call: Call, carried: dict[int, Tensor]) -> Handed | None:
    # `type_as` takes another tensor, to look at
    value = call.inputs[0]
    return ([value], [carried[value]]) if value in carried else None


def _pooled(flow: Flow, call: Call, carried: dict[int, Tensor]) -> Handed | None:
    numbers = carried[call.inputs[0]]
    places = numbers.flatten(2)
    if numbers.dim() < 3 or len(call.outputs) != 1 or not bool((places == places[:, :, :1]).all()):
        return None
    shape = flow.shape[call.outputs[0]]
    return [call.inputs[0]], [places[:, :, 0].reshape(*places.shape[:2], *[1] * (len(shape) - 2)).expand(shape)]


def _moved(flow: Flow, call: Call, carried: dict[int, Tensor]) -> Handed | None:
    def numbers(leaf: Any) -> Any:
        if not isinstance(leaf, Value):
            return leaf
        return carried.get(leaf.number, torch.full((), NONE, dtype=torch.int32).expand(flow.shape[leaf.number]))

    passing = [v for v in call.inputs if v in carried]
    if not isinstance(call.target, str):
        return passing, [type(call.target).forward(call.target, carried[call.inputs[0]])]
    if call.arguments is None or (len(call.inputs) > 1 and call.target not in JOINING_FUNCTIONS):
        return None
    args, kwargs = tree_map(numbers, call.arguments)
    return passing, tensors_in(call.function(*args, **kwargs))


def _multiplied(flow: Flow, call: Call, carried: dict[int, Tensor]) -> Handed | None:
    """One operand of a product, as the gate's other one in a gated MLP: of two, the second. A denominator never passes."""
    value = call.inputs[0] if call.target in QUOTIENTS else next(v for v in reversed(call.inputs) if v in carried)
    shape = flow.shape[call.outputs[0]]
    rounds = call.arguments is None or call.arguments[1].get("rounding_mode") is not None
    if rounds or value not in carried or call.inputs.count(value) > 1 or flow.shape[value] != shape:
        return None
    return [value], [carried[value]]


def _mixed(flow: Flow, call: Call, carried: dict[int, Tensor]) -> Handed | None:
    """The right operand of a matrix product, as the values of attention: its last dimension stays, the one before is summed."""
    if len(call.inputs) != 2 or call.inputs[1] not in carried or call.inputs[0] == call.inputs[1]:
        return None
    return _summed(call.inputs[1], carried[call.inputs[1]], flow.shape[call.outputs[0]])


def _attended(flow: Flow, call: Call, carried: dict[int, Tensor]) -> Handed | None:
    """The values of ``scaled_dot_product_attention``; heads of which several queries share one are repeated."""
    if len(call.inputs) < 3 or call.inputs[2] not in carried or call.inputs.count(call.inputs[2]) > 1:
        return None
    numbers, shape = carried[call.inputs[2]], flow.shape[call.outputs[0]]
    if numbers.dim() > 2 and numbers.shape[-3] not in (1, shape[-3]):
        numbers = numbers.repeat_interleave(shape[-3] // numbers.shape[-3], dim=-3)
    return _summed(call.inputs[2], numbers, shape)


def _summed(value: int, numbers: Tensor, shape: torch.Size) -> Handed | None:
    if numbers.dim() < 2 or not bool((numbers == numbers[..., :1, :]).all()):
        return None
    numbers = numbers[..., :1, :]
    fits = all(n in (1, s) for n, s in zip(numbers.shape[::-1], shape[::-1], strict=False))
    return ([value], [numbers.expand(shape)]) if fits and numbers.dim() <= len(shape) else None


_RULES: dict[str, Rule] = {
    **dict.fromkeys(SAME_FUNCTIONS, _same),
    **dict.fromkeys(POOLING_FUNCTIONS, _pooled),
    **dict.fromkeys(MOVING_FUNCTIONS | JOINING_FUNCTIONS, _moved),
    **dict.fromkeys(PRODUCTS | QUOTIENTS, _multiplied),
    **dict.fromkeys(MATRIX_PRODUCTS, _mixed),
    "scaled_dot_product_attention": _attended,
}


def _rule_of_module(module: nn.Module) -> Rule | None:
    rules = ((SAME_MODULES, _same), (POOLING_MODULES, _pooled), (MOVING_MODULES, _moved))
    return next((rule for classes, rule in rules if type(module) in classes), None)
