"""Operators of torch under the name ``lq``, with as little between the caller and the arithmetic as torch allows.

``torch.library.custom_op`` makes the same of a function, but what a call costs beside the arithmetic is several times as much.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

_LIBRARY = torch.library.Library("lq", "FRAGMENT")  # type: ignore[no-untyped-call]

Function = Callable[..., Tensor]


def define(schema: str, kernel: Function, gradient: Function) -> Function:
    """Define ``torch.ops.lq.<name>``: one node in exported programs, of whose arguments the first alone has a gradient.

    Args:
        schema: name, arguments and result as torch writes them: tensors before all else, the result shaped like the first.
        kernel: computes the result into new memory, given the arguments.
        gradient: that of the first argument, given that of the result and then the arguments.

    Returns:
        The operator, to be called: past torch's dispatcher where nothing would look on there.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    overload = getattr(torch.ops.lq, name).default
    operator: Function = overload
    tensors = [str(argument.type) for argument in overload._schema.arguments].count("Tensor")

    def below_autograd(*args: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    def differentiable(function: Function, args: tuple[Any, ...]) -> Tensor:
        if not torch.is_grad_enabled():
            return function(*args)
        # a few arguments: torch looks at each of them in turn
        result: Tensor = _Differentiable.apply(args[0], function, gradient, tensors, args)  # type: ignore[no-untyped-call]
        return result

    def call(*args: Any) -> Tensor:
        return differentiable(kernel, args) if is_unobserved(args[0]) else operator(*args)

    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    _LIBRARY.impl(name, lambda *args: differentiable(below_autograd, args), "Autograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"lq::{name}", lambda first, *others: torch.empty_like(first), lib=_LIBRARY)
    return call


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, first: Tensor, function: Function, gradient: Function, tensors: int, args: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(*args[:tensors])
        ctx.gradient, ctx.others = gradient, args[tensors:]
        return function(*args)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return ctx.gradient(grad, *ctx.saved_tensors, *ctx.others), None, None, None, None


def is_unobserved(x: Tensor) -> bool:
    """Whether ``x`` is a tensor like any other, and nothing traces or watches what becomes of it."""
    if torch.compiler.is_compiling() or type(x) not in (Tensor, nn.Parameter):
        return False
    return not torch._C._len_torch_dispatch_stack() and torch._C._get_tracing_state() is None


def is_fused() -> bool:
    """Whether ``torch.compile`` makes code of what is called, and not a graph for an export."""
    # what is_exporting() returns; dynamo before torch 2.13 takes every call of it for True
    return torch.compiler.is_dynamo_compiling() and not torch.compiler._is_exporting_flag


def in_pieces() -> bool:
    """Whether plain arithmetic serves better than one operator: ``torch.compile`` fuses it, ``torch.func`` transforms it."""
    if torch.compiler.is_dynamo_compiling():
        return is_fused()
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def saves_elsewhere() -> bool:
    """Whether somebody looks after the tensors that are saved for the backward pass: ``torch.utils.checkpoint``, say."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
