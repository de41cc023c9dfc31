"""Fake quantization with a step size that is learned (LSQ)."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lq.functional.fake_quant import fake_quant
from lq.functional.gradient import within_range
from lq.functional.grid import integer_bounds, largest_code, scale_from_amax
from lq.functional.operators import in_pieces


class _Learned(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, amax: Tensor, num_bits: int, unsigned: bool, narrow_range: bool, gradient_scale: float
    ) -> Tensor:
        y = fake_quant(x, amax, num_bits, unsigned, narrow_range)
        # the layer behind keeps y for its own gradient: it costs no memory to keep it here too
        ctx.save_for_backward(x, amax, y)
        lowest, highest = integer_bounds(num_bits, unsigned, narrow_range)
        ctx.lowest, ctx.gradient_scale = lowest / highest, gradient_scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, amax, y = ctx.saved_tensors
        inside = within_range(grad, x, ctx.lowest * amax, amax)
        # dy/ds is y / s outside of the range and (y - x) / s inside: two products of whole tensors, and no mask
        total = _summed(grad, y, amax) - _summed(inside, x, amax)
        gradient = ctx.gradient_scale * total / amax.double().clamp_min(torch.finfo(torch.float32).tiny)
        return inside, gradient.to(amax.dtype), None, None, None, None


def _summed(a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    """Products of two tensors, summed over what shares an element of ``like``; float64."""
    if like.numel() > 1:
        return (a.float() * b.float()).sum_to_size(like.shape).double()
    if a.is_contiguous() and b.is_contiguous():
        return torch.dot(a.flatten().float(), b.flatten().float()).double().reshape(like.shape)
    return (a.float() * b.float()).sum().double().reshape(like.shape)


def fake_quant_learned(
    inputs: Tensor, amax: Tensor, num_bits: int, unsigned: bool = False, narrow_range: bool = True, gradient_scale: float = 1.0
) -> Tensor:
    """:func:`lq.functional.fake_quant.fake_tensor_quant` with a gradient for ``amax``.

    With the step :math:`s = amax / Q_P` and the code :math:`q = \\mathrm{round}(x / s)` the output s q changes with s by

    .. math:: q - x / s \\text{ within the range}, \\quad -Q_N \\text{ below}, \\quad Q_P \\text{ above}

    (LSQ: Esser et al., 2020, arXiv:1902.08153, eq. 3); with amax by :math:`1 / Q_P` of that, summed over what shares it. That of
    ``inputs`` passes within the range, as ever.

    Args:
        inputs: any shape, floating.
        amax: float32, ``()`` or broadcastable to ``inputs``; not negative.
        num_bits: width of the integer, 2 to 32.
        unsigned: use ``[0, 2**num_bits - 1]``.
        narrow_range: leave out the most negative code.
        gradient_scale: factor on the gradient of amax, as :func:`gradient_scale` computes it.

    >>> x, amax = torch.tensor([0.3, -0.8, 5.0]), torch.tensor(3.0, requires_grad=True)
    >>> y = fake_quant_learned(x, amax, num_bits=3)
    >>> y, torch.autograd.grad(y.sum(), amax)[0]  # (0 - 0.3 - 1 + 0.8 + 3) / 3
    (tensor([ 0., -1.,  3.], grad_fn=<_LearnedBackward>), tensor(0.8333))
    """
    if not in_pieces():
        result: Tensor = _Learned.apply(inputs, amax, num_bits, unsigned, narrow_range, gradient_scale)  # type: ignore[no-untyped-call]
        return result
    wide = inputs if inputs.dtype.itemsize >= 4 else inputs.float()
    learned = amax * gradient_scale + (amax * (1 - gradient_scale)).detach()
    scale = scale_from_amax(learned.to(wide.dtype), num_bits, unsigned)
    codes = (wide / scale).clamp(*integer_bounds(num_bits, unsigned, narrow_range))
    return ((codes + (codes.round() - codes).detach()) * scale).to(inputs.dtype)


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
