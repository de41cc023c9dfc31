"""Fake quantization as a ``torch.library`` operator: it trains, compiles, and exports as QuantizeLinear/DequantizeLinear.

The arithmetic is ONNX's, ``clamp(round(x / scale)) * scale`` with ``scale = amax / qmax`` and ties to even, so that what is
trained is what is deployed, to the last code. (pytorch-quantization multiplies by ``qmax / amax``, which differs by one code
at some ties.)
"""

from typing import Any

import torch
from torch import Tensor

from lq.functional.amax import integer_bounds, scale_from_amax

INFINITY = float("inf")


def _codes(x: Tensor, scale: Tensor, bounds: tuple[int, int]) -> Tensor:
    # one fresh tensor, the rest in place: fake quantization is bound by memory traffic
    return torch.div(x, scale).round_().clamp_(*bounds)


@torch.library.custom_op("lq::fake_quant", mutates_args=())
def _fake_quant(x: Tensor, amax: Tensor, num_bits: int, unsigned: bool, narrow_range: bool) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = scale_from_amax(amax.to(wide.dtype), num_bits, unsigned)
    return _codes(wide, scale, integer_bounds(num_bits, unsigned, narrow_range)).mul_(scale).to(x.dtype)


@_fake_quant.register_fake
def _(x: Tensor, amax: Tensor, num_bits: int, unsigned: bool, narrow_range: bool) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("lq::fake_quant_backward", mutates_args=())
def _fake_quant_backward(grad: Tensor, x: Tensor, amax: Tensor, unsigned: bool) -> Tensor:
    if x.device.type == "cpu" and amax.numel() == 1:
        # hardtanh leaves its own bounds out, the straight-through estimator keeps them: step one float outwards
        high = torch.nextafter(amax.to(x.dtype), amax.new_tensor(INFINITY, dtype=x.dtype)).item()
        low = torch.nextafter(x.new_zeros(()), x.new_tensor(-INFINITY)).item() if unsigned else -high
        inside: Tensor = torch.ops.aten.hardtanh_backward(grad, x, low, high)
        return inside
    outside = x.abs() > amax.to(x.dtype)
    return grad.masked_fill(outside | (x < 0) if unsigned else outside, 0)


@_fake_quant_backward.register_fake
def _(grad: Tensor, x: Tensor, amax: Tensor, unsigned: bool) -> Tensor:
    return torch.empty_like(grad)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, amax, _, ctx.unsigned, _ = inputs
    ctx.save_for_backward(x, amax)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
    x, amax = ctx.saved_tensors
    return _fake_quant_backward(grad, x, amax, ctx.unsigned), None, None, None, None


_fake_quant.register_autograd(_backward, setup_context=_setup_context)


def fake_tensor_quant(
    inputs: Tensor, amax: Tensor, num_bits: int = 8, unsigned: bool = False, narrow_range: bool = True
) -> Tensor:
    """Round ``inputs`` to the grid that ``amax`` spans, and return the real values of the codes.

    The gradient passes straight through where ``-amax <= inputs <= amax`` (``0 <= inputs <= amax`` if unsigned) and is zero
    elsewhere (Bengio et al., 2013, arXiv:1308.3432, with clipping as in NVIDIA pytorch-quantization). ``amax`` gets none.

    Args:
        inputs: any shape, floating; half precision is computed in float32 and returned in its own dtype.
        amax: float, ``()`` or broadcastable to ``inputs``.
        num_bits: width of the integer.
        unsigned: use ``[0, 2**num_bits - 1]``.
        narrow_range: leave out the most negative code: ``[-127, 127]`` in place of ``[-128, 127]``.

    >>> fake_tensor_quant(torch.tensor([0.1, -0.26, 3.0]), torch.tensor(1.27))
    tensor([ 0.1000, -0.2600,  1.2700])
    """
    output: Tensor = _fake_quant(inputs, amax, num_bits, unsigned, narrow_range)
    return output


@torch.no_grad()
def tensor_quant(
    inputs: Tensor, amax: Tensor, num_bits: int = 8, unsigned: bool = False, narrow_range: bool = True
) -> tuple[Tensor, Tensor]:
    """Integer codes of ``inputs``, held in its floating dtype, and NVIDIA's scale ``qmax / amax``: ``codes / scale`` dequantizes.

    >>> codes, scale = tensor_quant(torch.tensor([0.1, -0.26, 3.0]), torch.tensor(1.27))
    >>> codes, round(scale.item(), 3)
    (tensor([  10.,  -26.,  127.]), 100.0)
    """
    wide = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
    scale = scale_from_amax(amax.to(wide.dtype), num_bits, unsigned)
    codes = _codes(wide, scale, integer_bounds(num_bits, unsigned, narrow_range))
    return codes.to(inputs.dtype), scale.reciprocal()
