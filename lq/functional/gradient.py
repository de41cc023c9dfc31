"""The straight-through estimator (Bengio et al., 2013, arXiv:1308.3432), with clipping: gradients pass within a range.

Bounds belong to the range. Comparing and masking take five times as long on a CPU as ``hardtanh_backward``, which compares one
tensor with two numbers and masks another in one go.
"""

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lq.functional import fused
from lq.functional.operators import Function, define

# given a gradient, x and two numbers: the gradient where x lies between them, else 0
_between: Function = torch.ops.aten.hardtanh_backward.default

# at work where ``torch.autograd.grad(is_grads_batched=True)`` asks for gradients
_BATCHING: Any = torch._C._parse_dispatch_key("VmapMode")

_SUBNORMAL = torch.tensor(1e-40, device="cpu")


@cache
def _numbers(dtype: torch.dtype) -> tuple[float, float]:
    """The least number above 0, and the least where ``torch.set_flush_denormal(True)`` has less count as 0."""
    numbers, compared = torch.finfo(dtype), torch.finfo(torch.promote_types(dtype, torch.float32))
    # a product that is flushed itself is float64's, and what Python computes there would be flushed as well
    least = numbers.smallest_normal * numbers.eps or 5e-324
    return least, max(least, compared.smallest_normal)


def _smallest(dtype: torch.dtype) -> float:
    """Least number above 0 that kernels tell from it."""
    return _numbers(dtype)[_SUBNORMAL.item() == 0]


def _beyond(bound: Tensor, dtype: torch.dtype, sign: int) -> float:
    """The number behind a bound, up or down: what comparisons that leave out their bounds are made with."""
    value = (bound if bound.dtype is dtype else bound.to(dtype)).item()
    compared = torch.finfo(torch.promote_types(dtype, torch.float32))
    beyond = value + sign * max(0.6 * abs(value) * compared.eps, _smallest(dtype))
    return beyond if abs(beyond) <= compared.max else sign * math.inf


def _within_range(grad: Tensor, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """``grad`` where ``low <= x <= high``, else 0."""
    if x.is_cpu and low.numel() == high.numel() == 1:
        return _between(grad, x, _beyond(low, x.dtype, -1), _beyond(high, x.dtype, 1))
    if (at_once := fused.masked(grad, x, low, high)) is not None:
        return at_once
    result = torch.maximum(x, low.to(x.dtype))
    changed = torch.minimum(result, high.to(x.dtype), out=result).sub_(x)
    return _masked(grad, changed, _smallest(x.dtype))


def _within_amax(grad: Tensor, x: Tensor, amax: Tensor, unsigned: bool) -> Tensor:
    """``grad`` where ``-amax <= x <= amax`` (``0 <= x <= amax`` if unsigned), else 0."""
    if x.is_cpu and amax.numel() == 1:
        highest = _beyond(amax, x.dtype, 1)
        return _between(grad, x, -_smallest(x.dtype) if unsigned else -highest, highest)
    if (at_once := fused.masked(grad, x, None, amax, ratio=-1.0 * (not unsigned))) is not None:
        return at_once
    amax = amax.to(x.dtype)
    if unsigned:
        return _within_range(grad, x, torch.zeros_like(amax), amax)
    # the quotient lies above 1 where x lies above amax: further than what rounds to 1
    return _masked(grad, torch.div(x, amax.clamp_min(_smallest(x.dtype))), 1 + torch.finfo(x.dtype).eps)


def _masked(grad: Tensor, x: Tensor, bound: float) -> Tensor:
    """``grad`` where ``-bound < x < bound``, else 0; in the memory of ``x``, where that is laid out as the result is to be."""
    # batched, there are no operators that write into memory that is there
    if grad.stride() != x.stride() or torch._C._dispatch_tls_is_dispatch_key_included(_BATCHING):
        return _between(grad, x, -bound, bound)
    torch.ops.aten.hardtanh_backward.grad_input(grad, x, -bound, bound, grad_input=x)
    return x


# both are linear in the gradient, and so their own gradients
within_range: Function
within_amax: Function
within_range = define(
    "fake_quant_affine_backward(Tensor grad, Tensor x, Tensor low, Tensor high) -> Tensor",
    _within_range,
    lambda outer, grad, *args: within_range(outer, *args),
)
within_amax = define(
    "fake_quant_backward(Tensor grad, Tensor x, Tensor amax, bool unsigned) -> Tensor",
    _within_amax,
    lambda outer, grad, *args: within_amax(outer, *args),
)


class _Factored(torch.autograd.Function):
    """As :func:`with_gradient`; the gradient is multiplied with what :func:`torch.compile` makes no comparisons of."""

    @staticmethod
    def forward(ctx: Any, real: Tensor, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        ctx.save_for_backward(x, low, high)
        return real.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None, None]:
        x, low, high = ctx.saved_tensors
        largest = torch.finfo(x.dtype).max
        # 0 within the range, and elsewhere 1: the least difference is lifted above it by two steps
        outside = ((x - x.clamp(low, high)).abs() * largest * largest).clamp(max=1)
        return None, grad * (1 - outside), None, None


def with_gradient(real: Tensor, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """``real``, what ``x`` is rounded to, with the gradient of clipping ``x``, in plain arithmetic of float32 or float64.

    The differences are exact: what a number is rounded to is at most twice or at least half of it, or 0.

    >>> x = torch.tensor([0.3, 2.0], requires_grad=True)
    >>> y = with_gradient(torch.tensor([0.25, 1.0]), x, torch.tensor(-1.0), torch.tensor(1.0))
    >>> y.tolist(), torch.autograd.grad(y.sum(), x)[0].tolist()
    ([0.25, 1.0], [1.0, 0.0])
    """
    if x.device.type == "cpu" and torch.compiler.is_dynamo_compiling():
        # its code for CPUs takes ten times as long to write a mask as for all of the arithmetic
        factored: Tensor = _Factored.apply(real, x, low, high)  # type: ignore[no-untyped-call]
        return factored
    clipped = x.clamp(low, high)
    # not as a sum: modules that look for the next sum of two tensors would take this one
    return clipped - (clipped - real).detach()
