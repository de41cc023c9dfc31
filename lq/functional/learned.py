"""Fake quantization with a step size, or a clipping magnitude, that is learned (LSQ, LSQ+, PACT)."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lq.functional import fused
from lq.functional.fake_quant import fake_quant
from lq.functional.gradient import within_range
from lq.functional.grid import integer_bounds, largest_code, scale_from_amax
from lq.functional.operators import in_pieces

# A few of them, of 1
ULPS = 2.0**-20


class _Learned(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        amax: Tensor,
        num_bits: int,
        unsigned: bool,
        narrow_range: bool,
        gradient_scale: float,
        rounding: bool,
    ) -> Tensor:
        y = fake_quant(x, amax, num_bits, unsigned, narrow_range)
        # the layer behind keeps y for its own gradient: it costs no memory to keep it here too
        ctx.save_for_backward(x, amax, y)
        ctx.grid = (num_bits, unsigned, narrow_range)
        ctx.gradient_scale, ctx.rounding = gradient_scale, rounding
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, amax, y = ctx.saved_tensors
        lowest, highest = bounds = integer_bounds(*ctx.grid)
        at_once = fused.learned(grad, x, amax, bounds, ctx.gradient_scale, ctx.rounding)
        if at_once is not None:
            return *at_once, None, None, None, None, None
        inside = within_range(grad, x, lowest / highest * amax, amax)
        if x.dtype.itemsize < 4:  # where y itself is rounded
            x = x.float()
            y = fake_quant(x, amax, *ctx.grid)
        # dy/ds is y / s outside of the range and (y - x) / s inside (0 for PACT): products of whole tensors, and no mask. Sums of
        # y and of x would leave nothing of their difference
        total = _summed(grad - inside, y, amax)
        if ctx.rounding:
            total = total + _summed(inside, y - x, amax)
        gradient = ctx.gradient_scale * total / amax.double().clamp_min(torch.finfo(torch.float32).tiny)
        return inside, gradient.to(amax.dtype), None, None, None, None, None


def _summed(a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    """Products of two tensors, summed over what shares an element of ``like``; float64."""
    if like.numel() > 1:
        return (a.float() * b.float()).sum_to_size(like.shape).double()
    if a.is_contiguous() and b.is_contiguous():
        return torch.dot(a.flatten().float(), b.flatten().float()).double().reshape(like.shape)
    return (a.float() * b.float()).sum().double().reshape(like.shape)


def fake_quant_learned(
    inputs: Tensor,
    amax: Tensor,
    num_bits: int,
    unsigned: bool = False,
    narrow_range: bool = True,
    gradient_scale: float = 1.0,
    rounding: bool = True,
) -> Tensor:
    """:func:`lq.functional.fake_quant.fake_tensor_quant` with a gradient for ``amax``.

    With the step :math:`s = amax / Q_P` and the code :math:`q = \\mathrm{round}(x / s)` the output s q changes with s by

    .. math:: q - x / s \\text{ within the range}, \\quad -Q_N \\text{ below}, \\quad Q_P \\text{ above}

    (LSQ: Esser et al., 2020, arXiv:1902.08153, eq. 3); with amax by :math:`1 / Q_P` of that, summed over what shares it. That of
    ``inputs`` passes within the range, as ever.

    Outside of ``torch.func`` and ``torch.compile`` there are no second gradients.

    Without ``rounding`` the first of the three is 0: amax learns only from what it clips (PACT: Choi et al., 2018,
    arXiv:1805.06085, eq. 3).

    Args:
        inputs: any shape, floating.
        amax: float32, ``()`` or broadcastable to ``inputs``; not negative.
        num_bits: width of the integer, 2 to 32.
        unsigned: use ``[0, 2**num_bits - 1]``.
        narrow_range: leave out the most negative code.
        gradient_scale: factor on the gradient of amax, as :func:`gradient_scale` computes it.
        rounding: whether amax also learns from what is rounded within the range.

    >>> x, amax = torch.tensor([0.3, -0.8, 5.0]), torch.tensor(3.0, requires_grad=True)
    >>> y = fake_quant_learned(x, amax, num_bits=3)
    >>> y, torch.autograd.grad(y.sum(), amax)[0]  # (0 - 0.3 - 1 + 0.8 + 3) / 3
    (tensor([ 0., -1.,  3.], grad_fn=<_LearnedBackward>), tensor(0.8333))
    """
    if not in_pieces():
        grid = (num_bits, unsigned, narrow_range)
        result: Tensor = _Learned.apply(inputs, amax, *grid, gradient_scale, rounding)  # type: ignore[no-untyped-call]
        return result
    wide = inputs if inputs.dtype.itemsize >= 4 else inputs.float()
    amax = _scaled_gradient(amax, gradient_scale).to(wide.dtype)
    scale = scale_from_amax(amax, num_bits, unsigned)
    lowest, highest = integer_bounds(num_bits, unsigned, narrow_range)
    if not rounding:
        clipped = wide.clamp(lowest / highest * amax, amax)
        codes = (clipped.detach() / scale.detach()).round().clamp(lowest, highest)
        return (clipped + (codes * scale.detach() - clipped).detach()).to(inputs.dtype)
    # amax mostly is a value of the tensor, and the quotient of both may lie an ulp beyond the last code
    codes = (wide / scale).clamp(lowest * (1 + ULPS), highest * (1 + ULPS))
    rounded = codes.detach().round().clamp(lowest, highest)
    return ((codes + (rounded - codes).detach()) * scale).to(inputs.dtype)


class _NotPositive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(max=0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.where((x > 0) & (grad < 0), 0, grad)


def not_positive(x: Tensor) -> Tensor:
    """``min(x, 0)``, whose gradient, that of a projection, leads back from above 0 and no further up.

    That of ``clamp`` is 0 there: where one step of an optimizer leads above 0, ``x`` would stay for good.

    >>> x = torch.tensor([0.1, 0.1, -0.1], requires_grad=True)
    >>> torch.autograd.grad(not_positive(x), x, torch.tensor([2.0, -2.0, -2.0]))[0]
    tensor([ 2.,  0., -2.])
    """
    result: Tensor = _NotPositive.apply(x)  # type: ignore[no-untyped-call]
    return result


def fake_quant_affine_learned(inputs: Tensor, low: Tensor, high: Tensor, num_bits: int, gradient_scale: float = 1.0) -> Tensor:
    """:func:`lq.functional.affine.fake_affine_tensor_quant` with gradients for both ends of the range.

    Those of LSQ+ (Bhalgat et al., 2020, arXiv:2004.09576, eq. 7), with the step :math:`s = (high - low) / (2^b - 1)` and the
    offset :math:`\\beta = low`: the output changes with s as in :func:`fake_quant_learned`, and with :math:`\\beta` by 1 outside
    of the range and not at all within. Zero stays on the grid.

    Args:
        inputs: any shape, floating.
        low: smallest value, float32, ``()`` or broadcastable to ``inputs``; not positive.
        high: largest value, likewise; not negative.
        num_bits: width of the integer.
        gradient_scale: factor on both gradients.

    >>> x = torch.tensor([-2.0, 0.4, 5.0])
    >>> low, high = torch.tensor([-1.0, 2.0], requires_grad=True).unbind()
    >>> y = fake_quant_affine_learned(x, low, high, num_bits=2)
    >>> y.tolist(), torch.autograd.grad(y[0], (low, high), retain_graph=True), torch.autograd.grad(y[2], (low, high))
    ([-1.0, 0.0, 2.0], (tensor(1.), tensor(0.)), (tensor(0.), tensor(1.)))
    """
    wide = inputs if inputs.dtype.itemsize >= 4 else inputs.float()
    low, high = (_scaled_gradient(end, gradient_scale).to(wide.dtype) for end in (low, high))
    levels = 2**num_bits - 1
    scale = ((high - low) / levels).clamp_min(torch.finfo(torch.float32).tiny)
    first = _rounded(low / scale)
    codes = (wide / scale - first).clamp(0, levels)
    codes = codes + ((wide / scale).round().sub(first).clamp(0, levels) - codes).detach()
    result: Tensor = ((codes + first) * scale).to(inputs.dtype)
    return result


def _rounded(x: Tensor) -> Tensor:
    """Whole numbers, with the gradient of ``x``."""
    return x + (x.round() - x).detach()


def _scaled_gradient(x: Tensor, factor: float) -> Tensor:
    """``x``, whose gradient is multiplied."""
    return x if factor == 1 else x.detach() + (x - x.detach()) * factor


def gradient_scale(features: int, num_bits: int, unsigned: bool = False) -> float:
    """Factor that makes amax learn as fast as weights: :math:`Q_P^2 / \\sqrt{N Q_P}`.

    LSQ (section 2.2) has :math:`1 / \\sqrt{N Q_P}` for the step s. A change of amax changes s by :math:`1 / Q_P` of it, and its
    gradient is :math:`1 / Q_P` of that of s: with this factor s takes the same way under SGD.

    Args:
        features: N, the weights, or the values of one sample, that share an amax.
        num_bits: width of the integer.
        unsigned: whether its codes begin at 0.

    >>> gradient_scale(64, 3), gradient_scale(4, 4, unsigned=True)
    (0.649519052838329, 29.047375096555626)
    """
    return float(largest_code(num_bits, unsigned) ** 1.5 * features**-0.5)
