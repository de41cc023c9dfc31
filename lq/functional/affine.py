"""Affine fake quantization: a grid between a smallest and a largest value, on which zero lies."""

import torch
from torch import Tensor

from lq.functional import fused
from lq.functional.checks import check_broadcast
from lq.functional.fake_quant import widened
from lq.functional.gradient import with_gradient, within_range
from lq.functional.grid import check_num_bits
from lq.functional.operators import define, in_pieces


def affine_grid(low: Tensor, high: Tensor, num_bits: int) -> tuple[Tensor, Tensor]:
    """Scale, and how many steps the smallest value lies from zero, which is less the zero point.

    >>> affine_grid(torch.tensor(-1.0), torch.tensor(0.5), 4)
    (tensor(0.1000), tensor(-10.))
    """
    levels = torch.full_like(high, 2**num_bits - 1)
    scale = ((high - low) / levels).clamp_min(torch.finfo(torch.float32).tiny)
    return scale, torch.round(low / scale)


def affine_codes(x: Tensor, scale: Tensor, first: Tensor, num_bits: int) -> Tensor:
    """Whole numbers from 0 to ``2**num_bits - 1``, in the dtype of ``x``, on what :func:`affine_grid` gave."""
    return torch.div(x, scale).round_().sub_(first).clamp_(0, 2**num_bits - 1)


def _fake_quant_affine(x: Tensor, low: Tensor, high: Tensor, num_bits: int) -> Tensor:
    wide = widened(x)
    scale, first = affine_grid(low.to(wide.dtype), high.to(wide.dtype), num_bits)
    codes = affine_codes(wide, scale, first, num_bits)
    # not as a sum: modules that look for the next sum of two tensors would take this one
    return codes.sub_(-first).mul_(scale).to(x.dtype)


def _affine_kernel(x: Tensor, low: Tensor, high: Tensor, num_bits: int) -> Tensor:
    real = fused.rounded(x, low, high, 0, 2**num_bits - 1, None)
    return _fake_quant_affine(x, low, high, num_bits) if real is None else real


_affine = define(
    "fake_quant_affine(Tensor x, Tensor low, Tensor high, int num_bits) -> Tensor",
    _affine_kernel,
    lambda grad, x, low, high, num_bits: within_range(grad, x, low, high),
)


def fake_affine_tensor_quant(inputs: Tensor, min_range: Tensor | float, max_range: Tensor | float, num_bits: int = 8) -> Tensor:
    """Round ``inputs`` to ``2**num_bits`` values from ``min_range`` to ``max_range``, shifted so that 0 is one of them.

    With ``scale = (max_range - min_range) / (2**num_bits - 1)`` and ``z = round(min_range / scale)`` the output is
    ``(clamp(round(x / scale) - z, 0, 2**num_bits - 1) + z) * scale`` (Jacob et al., 2018, arXiv:1712.05877, eq. 1; NVIDIA
    pytorch-quantization ``FakeAffineTensorQuantFunction``). The gradient passes within the range and is zero outside.

    Args:
        inputs: any shape, floating; half precision is computed in float32 and returned in its own dtype.
        min_range: smallest value, ``()`` or broadcastable to ``inputs``.
        max_range: largest value, likewise.
        num_bits: width of the integer, 2 to 32.

    Raises:
        ValueError: ``num_bits`` out of range, a range that is not finite, is turned around, or does not broadcast.

    >>> fake_affine_tensor_quant(torch.tensor([-2.0, -0.2, 0.0, 0.33, 1.0]), -1.0, 0.5, num_bits=4)
    tensor([-1.0000, -0.2000,  0.0000,  0.3000,  0.5000])
    """
    check_num_bits(num_bits, floats=False)
    low, high = (torch.as_tensor(v, device=inputs.device, dtype=widened(inputs[:0]).dtype) for v in (min_range, max_range))
    check_broadcast(inputs, low)
    check_broadcast(inputs, high)
    if not torch.compiler.is_compiling() and not bool(((low <= high) & low.isfinite() & high.isfinite()).all()):
        raise ValueError(
            f"`min_range` is {low.tolist()} and `max_range` {high.tolist()}: both must be finite, the first not above the second."
        )
    return fake_quant_affine(inputs, low, high, num_bits)


def fake_quant_affine(inputs: Tensor, low: Tensor, high: Tensor, num_bits: int) -> Tensor:
    """:func:`fake_affine_tensor_quant` of a range that is known to be one: nothing is looked at."""
    if not in_pieces():
        return _affine(inputs, low, high, num_bits)
    bounds = (widened(bound.detach().to(inputs.dtype)) for bound in (low, high))
    real = _fake_quant_affine(widened(inputs.detach()), low, high, num_bits)
    return with_gradient(real, widened(inputs), *bounds).to(inputs.dtype)
