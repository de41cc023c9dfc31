"""Triton kernels of fake quantization for GPUs: a pass over the tensor where torch's operators need several.

The arithmetic is that of :mod:`lq.functional.fake_quant`, to the last bit (but for the sign of zero): divisions are rounded as
IEEE 754 says, not approximated. Imported by :mod:`lq.functional.fused` alone, once there is a tensor on a GPU.

A tensor is ``rows`` of ``inner`` values that lie side by side; row ``i`` has the bound ``i % channels``. A program works on a
tile of them.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Values of a tile: 16 for each thread. The best of 1024 to 8192 on 4 to 16 warps, on an H200.
TILE, WARPS = 2048, 4
# Added and subtracted, it leaves a float32 of less than 2**22 as a whole number, ties to even.
ROUNDING = tl.constexpr(1.5 * 2**23)
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
INTEGERS, AFFINE, E4M3, E5M2 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
GRIDS = {"integers": INTEGERS.value, "affine": AFFINE.value, (4, 3): E4M3.value, (5, 2): E5M2.value}


@triton.jit
def _tile(inner, rows, channels, rows_each: tl.constexpr, columns: tl.constexpr):
    """Where a program's values lie, which of them there are, and where their bounds lie."""
    program = tl.program_id(0).to(tl.int64)
    across = (inner - 1) // columns + 1  # cdiv's sum may not fit
    first_row, first_column = program // across * rows_each, program % across * columns
    row, column = tl.arange(0, rows_each)[:, None], tl.arange(0, columns)[None, :]
    there = (row < rows - first_row) & (column < inner - first_column)
    return first_row * inner + first_column + (row * inner + column), there, (first_row + row) % channels


@triton.jit
def _float_step(x, least: tl.constexpr, mantissa: tl.constexpr):
    """Distance of the numbers around ``x`` in a float format: with its least exponent, which subnormal numbers share."""
    exponent = tl.maximum((x.to(tl.int32, bitcast=True) >> 23) & 255, 127 + least)
    return ((exponent - mantissa) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _rounded(x, low, high, lowest, highest, grid: tl.constexpr):
    """``x`` on the grid that the bounds span, float32."""
    if grid == AFFINE:
        scale = tl.maximum(tl.div_rn(high - low, highest), TINY)
        lowest = tl.div_rn(low, scale) + ROUNDING - ROUNDING
        highest = lowest + highest
    else:
        scale = tl.maximum(tl.div_rn(high, highest), TINY)
    codes = tl.clamp(tl.div_rn(x, scale), lowest, highest, propagate_nan=tl.PropagateNan.ALL)
    whole = ROUNDING
    if grid == E4M3:
        whole = ROUNDING * _float_step(codes, -6, 3)
    elif grid == E5M2:
        whole = ROUNDING * _float_step(codes, -14, 2)
    return (codes + whole - whole) * scale


@triton.jit
def _round(
    x, low, high, y, lowest, highest, inner, rows, channels, grid: tl.constexpr, rows_each: tl.constexpr, columns: tl.constexpr
):
    place, there, bound = _tile(inner, rows, channels, rows_each, columns)
    values = tl.load(x + place, there).to(tl.float32)
    least, most = tl.load(low + bound).to(tl.float32), tl.load(high + bound).to(tl.float32)
    tl.store(y + place, _rounded(values, least, most, lowest, highest, grid), there)


@triton.jit
def _mask(
    grad, x, low, high, result, ratio, inner, rows, channels, around: tl.constexpr, rows_each: tl.constexpr, columns: tl.constexpr
):
    place, there, bound = _tile(inner, rows, channels, rows_each, columns)
    values = tl.load(x + place, there)
    # compared in the dtype of the values, as clipping them would
    most = tl.load(high + bound).to(values.dtype)
    if around:  # noqa: SIM108 - a branch is compiled, a choice between values is not
        least = (ratio * tl.load(high + bound).to(tl.float32)).to(values.dtype)
    else:
        least = tl.load(low + bound).to(values.dtype)
    within = (values >= least) & (values <= most)
    tl.store(result + place, tl.where(within, tl.load(grad + place, there), 0.0), there)


@triton.jit
def _learn(
    grad, x, amax, inside, partial, lowest, highest, ratio, factor, inner, rows, channels,
    rounding: tl.constexpr, rows_each: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    place, there, bound = _tile(inner, rows, channels, rows_each, columns)
    most = tl.load(amax + bound).to(tl.float32)
    values, given = tl.load(x + place, there), tl.load(grad + place, there, 0.0)
    within = (values >= (ratio * most).to(values.dtype)) & (values <= most.to(values.dtype))
    tl.store(inside + place, tl.where(within, given, 0.0), there)
    wide = values.to(tl.float32)
    real = _rounded(wide, most, most, lowest, highest, INTEGERS)
    error = real - wide if rounding else tl.zeros_like(real)
    of_amax = tl.sum(tl.where(there, given.to(tl.float32) * tl.where(within, error, real), 0.0), 1)
    program = tl.program_id(0).to(tl.int64)
    across = (inner - 1) // columns + 1  # cdiv's sum may not fit
    row = program // across * rows_each + tl.arange(0, rows_each)
    scaled = factor * of_amax / tl.maximum(tl.load(amax + row % channels).to(tl.float32), TINY)
    tl.store(partial + row * across + program % across, scaled, row < rows)


class Tiles:
    """How a tensor is cut up, given how many values lie side by side for each bound."""

    __slots__ = ("across", "columns", "inner", "programs", "rows", "rows_each")

    def __init__(self, numel: int, inner: int) -> None:
        self.inner, self.rows = inner, numel // inner
        self.columns = min(triton.next_power_of_2(inner), TILE)
        self.rows_each = 1 if self.rows == 1 else TILE // self.columns
        self.across = -(-inner // self.columns)
        self.programs = -(-self.rows // self.rows_each) * self.across


def round_(x: Tensor, low: Tensor, high: Tensor, lowest: float, highest: float, inner: int, grid: Any) -> Tensor:
    """``x``, dense, on a grid; ``low`` matters to affine ones only, where ``highest`` is the number of levels."""
    y, t = torch.empty_like(x), Tiles(x.numel(), inner)
    of_grid = (float(lowest), float(highest), t.inner, t.rows, high.numel(), grid, t.rows_each, t.columns)
    _round[(t.programs,)](x, low, high, y, *of_grid, num_warps=WARPS)
    return y


def mask(grad: Tensor, x: Tensor, low: Tensor | None, high: Tensor, ratio: float, inner: int) -> Tensor:
    """``grad`` where ``low <= x <= high``, else 0; without ``low`` it is ``ratio * high``. Dense tensors of one layout."""
    result, t = torch.empty_like(grad), Tiles(x.numel(), inner)
    around = low is None
    of_tiles = (t.inner, t.rows, high.numel(), around, t.rows_each, t.columns)
    _mask[(t.programs,)](grad, x, high if low is None else low, high, result, float(ratio), *of_tiles, num_warps=WARPS)
    return result


def learn(
    grad: Tensor, x: Tensor, amax: Tensor, lowest: int, highest: int, factor: float, rounding: bool, inner: int
) -> tuple[Tensor, Tensor]:
    """Gradients of ``x`` and of ``amax``, times ``factor`` (:func:`lq.functional.learned.fake_quant_learned`)."""
    inside, t = torch.empty_like(grad), Tiles(x.numel(), inner)
    partial = torch.empty(t.rows, t.across, device=x.device, dtype=torch.float32)
    of_grid = (float(lowest), float(highest), lowest / highest, factor)
    of_tiles = (t.inner, t.rows, amax.numel(), rounding, t.rows_each, t.columns)
    _learn[(t.programs,)](grad, x, amax, inside, partial, *of_grid, *of_tiles, num_warps=WARPS)
    # in an order of its own for each size, so that a step is the same at each run
    total = partial.view(-1, amax.numel(), t.across).sum((0, 2)).reshape(amax.shape)
    return inside, total.to(amax.dtype)
