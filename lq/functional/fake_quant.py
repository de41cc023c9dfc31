"""Fake quantization as ``torch.library`` operators: they train, compile, and export as QuantizeLinear/DequantizeLinear.

The arithmetic is ONNX's, ``clamp(round(x / scale)) * scale`` with ``scale = amax / qmax`` and ties to even, so that what is
trained is what is deployed, to the last code. (pytorch-quantization multiplies by ``qmax / amax``, which differs by one code
at some ties: :mod:`lq.functional.legacy`.)
"""

from typing import Any

import torch
from torch import Tensor

from lq.functional import fused
from lq.functional.checks import check_codes, checked_amax
from lq.functional.gradient import with_gradient, within_amax
from lq.functional.grid import FLOAT_FORMATS, Bits, check_num_bits, integer_bounds, largest_code, scale_from_amax
from lq.functional.operators import define, in_pieces


def widened(x: Tensor) -> Tensor:
    """``x`` in the dtype that quantization computes in: float32, or float64."""
    return x if x.dtype.itemsize >= 4 else x.float()


def _codes(x: Tensor, scale: Tensor, bounds: tuple[int, int]) -> Tensor:
    # one fresh tensor, the rest in place: fake quantization is bound by memory traffic
    return torch.div(x, scale).round_().clamp_(*bounds)


def _fake_quant(x: Tensor, amax: Tensor, num_bits: int, unsigned: bool, narrow_range: bool) -> Tensor:
    wide = widened(x)
    scale = scale_from_amax(amax.to(wide.dtype), num_bits, unsigned)
    real = _codes(wide, scale, integer_bounds(num_bits, unsigned, narrow_range)).mul_(scale)
    return real if wide is x else real.to(x.dtype)


def _fake_quant_float(x: Tensor, amax: Tensor, exponent_bits: int, mantissa_bits: int) -> Tensor:
    wide, bits = widened(x), (exponent_bits, mantissa_bits)
    scale, largest = scale_from_amax(amax.to(wide.dtype), bits), largest_code(bits)
    # E4M3 has no infinity: a cast beyond its largest number gives NaN
    return torch.div(wide, scale).clamp_(-largest, largest).to(FLOAT_FORMATS[bits]).to(wide.dtype).mul_(scale).to(x.dtype)


def _integers_kernel(x: Tensor, amax: Tensor, num_bits: int, unsigned: bool, narrow_range: bool) -> Tensor:
    real = fused.rounded(x, amax, amax, *integer_bounds(num_bits, unsigned, narrow_range), num_bits)
    return _fake_quant(x, amax, num_bits, unsigned, narrow_range) if real is None else real


def _floats_kernel(x: Tensor, amax: Tensor, *bits: int) -> Tensor:
    largest = largest_code(bits)  # type: ignore[arg-type]
    real = fused.rounded(x, amax, amax, -largest, largest, bits)  # type: ignore[arg-type]
    return _fake_quant_float(x, amax, *bits) if real is None else real


_integers = define(
    "fake_quant(Tensor x, Tensor amax, int num_bits, bool unsigned, bool narrow_range) -> Tensor",
    _integers_kernel,
    lambda grad, x, amax, num_bits, unsigned, narrow_range: within_amax(grad, x, amax, unsigned),
)
_floats = define(
    "fake_quant_float(Tensor x, Tensor amax, int exponent_bits, int mantissa_bits) -> Tensor",
    _floats_kernel,
    lambda grad, x, amax, *bits: within_amax(grad, x, amax, False),
)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, amax: Tensor, outputs: Tensor, unsigned: bool) -> Tensor:
        ctx.save_for_backward(inputs, amax)
        ctx.unsigned = unsigned
        return outputs.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return within_amax(grad, *ctx.saved_tensors, ctx.unsigned), None, None, None


def straight_through(inputs: Tensor, amax: Tensor, outputs: Tensor, unsigned: bool) -> Tensor:
    """``outputs``, whose gradient goes to ``inputs`` as it is, within ``amax``."""
    result: Tensor = _StraightThrough.apply(inputs, amax, outputs, unsigned)  # type: ignore[no-untyped-call]
    return result


# For callers


@torch.no_grad()
def quantize(x: Tensor, amax: Tensor, num_bits: int, unsigned: bool = False, narrow_range: bool = True) -> Tensor:
    """Integer codes of which :func:`fake_tensor_quant` returns the real values, in the dtype of ``x``, without a gradient.

    >>> quantize(torch.tensor([0.1, -0.26, 3.0]), torch.tensor(1.27), 8)
    tensor([ 10., -26., 127.])
    """
    check_codes(x.dtype, num_bits, unsigned)
    wide = widened(x)
    scale = scale_from_amax(amax.to(wide.dtype), num_bits, unsigned)
    return _codes(wide, scale, integer_bounds(num_bits, unsigned, narrow_range)).to(x.dtype)


def fake_quant(x: Tensor, amax: Tensor, num_bits: Bits, unsigned: bool, narrow_range: bool) -> Tensor:
    """:func:`fake_tensor_quant` to any grid, without a look at the values: quantizers call it in every step."""
    floats = isinstance(num_bits, tuple)
    grid: Any = num_bits if floats else (num_bits, unsigned, narrow_range)
    if not in_pieces():
        return (_floats if floats else _integers)(x, amax, *grid)
    wide, amax = widened(x), amax.detach()
    real = (_fake_quant_float if floats else _fake_quant)(wide.detach(), amax, *grid)
    bound = widened(amax.to(x.dtype))
    return with_gradient(real, wide, torch.zeros_like(bound) if unsigned else -bound, bound).to(x.dtype)


def fake_tensor_quant(
    inputs: Tensor, amax: Tensor | float, num_bits: int = 8, unsigned: bool = False, narrow_range: bool = True
) -> Tensor:
    """Round ``inputs`` to the grid that ``amax`` spans, and return the real values of the codes.

    The gradient passes straight through where ``-amax <= inputs <= amax`` (``0 <= inputs <= amax`` if unsigned) and is zero
    elsewhere (Bengio et al., 2013, arXiv:1308.3432, with clipping as in NVIDIA pytorch-quantization). ``amax`` gets none.

    Args:
        inputs: any shape, floating; half precision is computed in float32 and returned in its own dtype.
        amax: float, ``()`` or broadcastable to ``inputs``. Where it is 0, outputs are 0.
        num_bits: width of the integer, 2 to 32.
        unsigned: use ``[0, 2**num_bits - 1]``.
        narrow_range: leave out the most negative code: ``[-127, 127]`` in place of ``[-128, 127]``.

    Raises:
        ValueError: ``num_bits`` out of range, or an amax that is negative, NaN, infinite, or does not broadcast to ``inputs``.
        TypeError: negative inputs with ``unsigned``. Both look at the values, which makes a GPU wait.

    >>> fake_tensor_quant(torch.tensor([0.1, -0.26, 3.0]), torch.tensor(1.27))
    tensor([ 0.1000, -0.2600,  1.2700])
    """
    return fake_quant(inputs, checked_amax(inputs, amax, num_bits, unsigned), num_bits, unsigned, narrow_range)


def scaled_e4m3(inputs: Tensor, amax: Tensor | float | None = None, exponent_bits: int = 4, mantissa_bits: int = 3) -> Tensor:
    """Round ``inputs`` to FP8 with ``amax`` at the format's largest number, 448 for E4M3: a cast of ``inputs * 448 / amax``.

    Gradients as :func:`fake_tensor_quant`. The format is that of Micikevicius et al., 2022, arXiv:2209.05433, table 1.

    Args:
        inputs: any shape, floating.
        amax: as :func:`fake_tensor_quant`; ``None`` is 448, a plain cast that saturates.
        exponent_bits: 4; or 5, with 2 bits of mantissa.
        mantissa_bits: 3, or 2.

    Raises:
        ValueError: another format, or a bad ``amax``.

    >>> scaled_e4m3(torch.tensor([0.3, 1.1, 500.0])).tolist(), scaled_e4m3(torch.tensor([0.3, 1.1]), 1.0)
    ([0.3125, 1.125, 448.0], tensor([0.2857, 1.0000]))
    """
    bits = (exponent_bits, mantissa_bits)
    check_num_bits(bits)
    amax = checked_amax(inputs, largest_code(bits) if amax is None else amax, bits, floats=True)
    return fake_quant(inputs, amax, bits, unsigned=False, narrow_range=True)
