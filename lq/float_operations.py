"""Products that a model computes in float although others are quantized, found by running it once.

Quantizers belong to layers: a function that a ``forward`` calls, ``q @ k`` or ``F.conv2d``, has none unless its author wrote one.
"""

from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from lq.graph import function_name, tensors_in
from lq.nn.evaluating import evaluating
from lq.nn.tensor_quantizer import TensorQuantizer

_RNN = ("lstm", "gru", "rnn_tanh", "rnn_relu")
_CONV = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution")
_MATMUL = ("matmul", "rmatmul", "linalg_matmul", "mm", "bmm", "mv", "inner", "tensordot", "grouped_mm")

# Functions that multiply, and which of the floating tensors that they take are factors (a bias or a mask is none).
FACTORS = {
    **dict.fromkeys(("linear", *_CONV, *_MATMUL, *_RNN, *(f"{name}_cell" for name in _RNN)), slice(2)),
    **dict.fromkeys(("addmm", "addbmm", "baddbmm", "addmv"), slice(1, 3)),
    **dict.fromkeys(("bilinear", "scaled_dot_product_attention", "flex_attention", "multi_head_attention_forward"), slice(3)),
    **dict.fromkeys(("einsum", "chain_matmul", "linalg_multi_dot"), slice(None)),
}
# Functions that project and multiply what they made themselves: in float, whatever they are given.
OUT_OF_REACH = frozenset({*_RNN, "multi_head_attention_forward"})

# Functions and properties whose output holds the values that they take, and perhaps zeros (dropout: in evaluation).
MOVES = frozenset(
    {
        *("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "contiguous", "clone", "detach", "data"),
        *("transpose", "permute", "t", "T", "mT", "movedim", "swapaxes", "pixel_shuffle", "pixel_unshuffle"),
        *("split", "chunk", "unbind", "narrow", "select", "getitem", "index_select", "gather", "unfold"),
        *("cat", "concat", "stack", "where", "setitem", "pad", "dropout"),
        *("expand", "repeat", "repeat_interleave", "tile", "roll", "flip"),
        *("to", "float", "half", "bfloat16"),
    }
)


class Kind(NamedTuple):
    """What a tensor is: made of parameters and buffers alone; out of an enabled quantizer, and only moved since."""

    weight: bool = False
    quantized: bool = False

    def __str__(self) -> str:
        return "quantized" if self.quantized else "weight" if self.weight else "float"


@dataclass(frozen=True)
class FloatOperation:
    """A product or convolution in float.

    Attributes:
        module: name of the module in whose ``forward`` it is called; the class for the model itself.
        operation: name of the function.
        operands: ``float``, ``weight`` or ``quantized``, for each of the factors.
        calls: how often it ran.
    """

    module: str
    operation: str
    operands: tuple[str, ...]
    calls: int

    def __str__(self) -> str:
        operands = f" ({', '.join(self.operands)})" if "quantized" in self.operands else ""
        return f"{self.module}: {self.calls} x {self.operation}{operands}"


class _Watcher(TorchFunctionMode):
    """Follows quantized tensors and weights, by identity, and counts the products that run in float while it is active."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.kinds = WeakIdKeyDictionary(dict.fromkeys(chain(model.parameters(), model.buffers()), Kind(weight=True)))
        self.modules = [type(model).__name__]
        self.calls: Counter[tuple[str, str, tuple[str, ...]]] = Counter()

    def kind(self, tensor: Tensor) -> Kind:
        kind: Kind = self.kinds[tensor] if tensor in self.kinds else Kind()
        return kind

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # split_ and __getitem__ as split and getitem, torch.ops.aten.mm.default as mm
        name = function_name(func).partition(".")[0].strip("_")
        taken = [(tensor.is_floating_point(), self.kind(tensor)) for tensor in tensors_in((args, kwargs))]
        values = [kind for floating, kind in taken if floating]
        output = func(*args, **kwargs)
        self.count(name, values[FACTORS.get(name, slice(0))])
        # for a weight all tensors count: rows that data chooses from one are data
        weight = bool(taken) and all(kind.weight for _, kind in taken)
        quantized = name in MOVES and bool(values) and all(kind.quantized for kind in values)
        for tensor in tensors_in(args[0] if name == "setitem" else output):
            self.kinds[tensor] = Kind(weight, quantized)
        return output

    def count(self, name: str, factors: list[Kind]) -> None:
        in_float = len(factors) > 1 and Kind() in factors and Kind(weight=True, quantized=True) not in factors
        if in_float or name in OUT_OF_REACH:
            self.calls[self.modules[-1], name, tuple(map(str, factors))] += 1

    def attach(self, name: str, module: nn.Module, stack: ExitStack) -> None:
        def enter(module: nn.Module, args: Any) -> None:
            self.modules.append(name or self.modules[0])

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self.modules.pop()

        stack.enter_context(module.register_forward_pre_hook(enter, prepend=True))
        stack.enter_context(module.register_forward_hook(leave, always_call=True))
        if isinstance(module, TensorQuantizer) and not module._disabled:
            stack.callback(setattr, module, "_if_calib", module._if_calib)
            stack.enter_context(module.register_forward_pre_hook(lambda quantizer, _: quantizer.disable_calib()))
            stack.enter_context(module.register_forward_hook(self.mark, with_kwargs=True))
            module.enable_calib()  # a module whose quantizers have nothing to do yet would leave its forward to torch

    def mark(self, quantizer: TensorQuantizer, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        quantizer.enable_calib()
        alias = output.detach()  # before it is calibrated, a quantizer returns its very input
        self.kinds[alias] = Kind(self.kind(tensors_in((args, kwargs))[0]).weight, quantized=True)
        return alias


def float_operations(model: nn.Module, args: Any = (), kwargs: dict[str, Any] | None = None) -> list[FloatOperation]:
    """Matrix products and convolutions of ``model`` that take data in float, in the order of their first calls.

    Runs the model once, in evaluation mode and without gradients, and takes no statistics. An operand is quantized if an enabled
    quantizer made it, calibrated or not, and it was only moved since (``view``, ``transpose``, ``cat`` ...). An operation is
    listed if any operand is data (depends on more than parameters and buffers) and not quantized, unless another is a quantized
    weight: a rule without ``input`` is a choice. The fused functions of ``nn.LSTM``, ``nn.GRU``, ``nn.RNN`` and
    ``nn.MultiheadAttention`` are always listed, once a call: no quantizer reaches what they multiply inside.

    Args:
        model: any module.
        args: positional inputs: a tuple, or the only one.
        kwargs: inputs by keyword.

    >>> from lq.nn import QuantLinear
    >>> class Attention(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.qk = QuantLinear(4, 8)
    ...     def forward(self, x):
    ...         q, k = self.qk(x).chunk(2, dim=-1)
    ...         return q @ k.mT
    >>> for operation in float_operations(nn.Sequential(Attention(), nn.Linear(2, 2)), torch.ones(1, 2, 4)):
    ...     print(operation)
    0: 1 x matmul
    1: 1 x linear
    """
    watcher = _Watcher(model)
    # else the modules that are compiled would be so again, together with the watcher
    with ExitStack() as stack, evaluating(model), torch.compiler.set_stance("force_eager"):
        for name, module in model.named_modules():
            watcher.attach(name, module, stack)
        with watcher:
            model(*(args if isinstance(args, tuple) else (args,)), **(kwargs or {}))
    return [FloatOperation(*call, calls) for call, calls in watcher.calls.items()]
