"""pytorch-quantization's own arithmetic, to the last bit: ``clamp(round(x * scale))`` with ``scale = qmax / amax``."""

import torch
from torch import Tensor

from lq.functional.checks import check_codes, checked_amax
from lq.functional.fake_quant import straight_through, widened
from lq.functional.grid import integer_bounds

# Below this, half of float16's smallest positive number, an amax counts as zero.
EPSILON = 2.0**-24


def _codes(inputs: Tensor, amax: Tensor, num_bits: int, unsigned: bool, narrow_range: bool) -> tuple[Tensor, Tensor]:
    """Codes and ``qmax / amax`` in float32 (float64 for double)."""
    wide = widened(inputs)
    amax = amax.to(wide.dtype)
    low, high = integer_bounds(num_bits, unsigned, narrow_range)
    # a tensor divided by a tensor: torch computes a number divided by a tensor as reciprocal times number, one ulp off
    scale = torch.full_like(amax, high) / amax
    dead = amax <= EPSILON
    codes = torch.mul(wide, scale.masked_fill(dead, 0)).round_().clamp_(low, high)
    return codes, scale.masked_fill(dead, 1)


def tensor_quant(
    inputs: Tensor, amax: Tensor | float, num_bits: int = 8, unsigned: bool = False, narrow_range: bool = True
) -> tuple[Tensor, Tensor]:
    """Integer codes of ``inputs``, and the scale ``qmax / amax``: ``codes / scale`` dequantizes.

    Args:
        inputs: any shape, floating; half precision is computed in float32.
        amax: ``()`` or broadcastable to ``inputs``. Where it is at most ``2**-24``, codes are 0 and the scale is 1.
        num_bits: width of the integer, 2 to 32.
        unsigned: use ``[0, 2**num_bits - 1]``.
        narrow_range: leave out the most negative code.

    Returns:
        Codes and scale, both in the dtype of ``inputs``, the scale in the shape of ``amax``. Codes get gradients as those of
        :func:`lq.functional.fake_quant.fake_tensor_quant`.

    Raises:
        ValueError: as ``fake_tensor_quant``, or a scale too large for float16, or codes that half precision cannot hold.
        TypeError: as ``fake_tensor_quant``.

    >>> codes, scale = tensor_quant(torch.tensor([0.1, -0.26, 3.0]), torch.tensor(1.27))
    >>> codes, round(scale.item(), 3)
    (tensor([ 10., -26., 127.]), 100.0)
    """
    amax = checked_amax(inputs, amax, num_bits, unsigned)
    check_codes(inputs.dtype, num_bits, unsigned)
    codes, scale = _codes(inputs.detach(), amax, num_bits, unsigned, narrow_range)
    largest = torch.finfo(inputs.dtype).max
    if not torch.compiler.is_compiling() and scale.numel() and bool(scale.max() > largest):
        raise ValueError(
            f"The scale {scale.max().item():g} of `amax` {amax.min().item():g} is too large for {inputs.dtype}: "
            "quantize `inputs.float()`."
        )
    return straight_through(inputs, amax, codes.to(inputs.dtype), unsigned), scale.to(inputs.dtype)


def legacy_fake_tensor_quant(
    inputs: Tensor, amax: Tensor | float, num_bits: int = 8, unsigned: bool = False, narrow_range: bool = True
) -> Tensor:
    """``codes / scale`` of :func:`tensor_quant`: what pytorch-quantization's fake quantization returns, bit for bit.

    Arguments, gradients and errors as :func:`lq.functional.fake_quant.fake_tensor_quant`, from which it differs by an ulp in most
    values and by a code at some ties.

    >>> legacy_fake_tensor_quant(torch.tensor([0.1, -0.26, 3.0]), torch.tensor(1.27))
    tensor([ 0.1000, -0.2600,  1.2700])
    """
    amax = checked_amax(inputs, amax, num_bits, unsigned)
    codes, scale = _codes(inputs.detach(), amax, num_bits, unsigned, narrow_range)
    return straight_through(inputs, amax, codes.div_(scale).to(inputs.dtype), unsigned)
