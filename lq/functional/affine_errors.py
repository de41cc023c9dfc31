"""What affine quantization of a signed histogram costs, for every candidate range: see :mod:`lq.functional.affine_range`.

A histogram is float64 ``(rows, bins)`` with zero in its middle; a range is two distances from zero, ``low`` and ``high``, in
bins, ``(rows, candidates)``. The grid between them is that of :func:`lq.functional.affine.fake_affine_tensor_quant`.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.special import xlogy

# Values of a temporary that is worked off in one go.
SLICE = 2**20

# Distances of both ends, to errors (rows, candidates).
Errors = Callable[[Tensor, Tensor], Tensor]


def positions(signed: Tensor) -> Tensor:
    """Centres of the bins, in bins."""
    half = signed.shape[1] // 2
    return torch.arange(-half, half, dtype=torch.float64, device=signed.device) + 0.5


def squared(signed: Tensor, num_bits: int) -> Errors:
    """Sum of squared errors, from prefix sums of c, c x and c x^2: a candidate costs its number of levels."""
    x = positions(signed)
    prefix = torch.stack([_prefix(signed), _prefix(signed * x), _prefix(signed * x.square())])

    def errors(low: Tensor, high: Tensor) -> Tensor:
        values = _grid(low, high, num_bits)
        c, cx, cxx = _at(prefix, _bounds(values, signed.shape[1])).diff(dim=-1)
        found: Tensor = (cxx - 2 * values * cx + values.square() * c).sum(dim=-1)
        return found

    return _sliced(errors, signed, 2**num_bits)


def absolute(signed: Tensor, num_bits: int) -> Errors:
    """Sum of absolute errors, from prefix sums of c and c x, below and above the value of each level."""
    prefix = torch.stack([_prefix(signed), _prefix(signed * positions(signed))])

    def errors(low: Tensor, high: Tensor) -> Tensor:
        values = _grid(low, high, num_bits)
        c, cx = _at(prefix, _bounds(values, signed.shape[1]))
        c_mid, cx_mid = _at(prefix, _index(values, signed.shape[1]))
        below = values * (c_mid - c[..., :-1]) - (cx_mid - cx[..., :-1])
        above = cx[..., 1:] - cx_mid - values * (c[..., 1:] - c_mid)
        found: Tensor = (below + above).sum(dim=-1)
        return found

    return _sliced(errors, signed, 2**num_bits)


def power(signed: Tensor, num_bits: int, p: float) -> Errors:
    """Sum of ``|error|**p``, bin by bin."""
    x = positions(signed)

    def errors(low: Tensor, high: Tensor) -> Tensor:
        found = torch.empty_like(low)
        for row, counts in enumerate(signed):
            used = counts > 0
            values = _grid(low[row], high[row], num_bits)
            scale = values.diff(dim=-1)[..., :1]
            rounded = torch.round(x[used] / scale).mul_(scale).clamp_(values[..., :1], values[..., -1:])
            found[row] = rounded.sub_(x[used]).abs_().pow_(p) @ counts[used]
        return found

    return _sliced(errors, signed, signed.shape[1] // len(signed) + 1)


def divergence(signed: Tensor, num_bits: int) -> Errors:
    """KL(P || Q): P has what lies beyond the ends in its first and last bin, Q the mass of each level without that.

    As :func:`lq.functional.divergence.kl`, with two ends; the bin above zero counts as the next one does.
    """
    c, half = signed.clone(), signed.shape[1] // 2
    c[:, half] = c[:, half + 1]
    prefix = torch.stack([_prefix(c), _prefix((c > 0).double()), _prefix(xlogy(c, c))])
    total = c.sum(dim=1, keepdim=True)

    def errors(low: Tensor, high: Tensor) -> Tensor:
        first, end = half - low.ceil().long(), half + high.ceil().long()
        bounds = _bounds(_grid(low, high, num_bits), 2 * half)
        bounds = torch.maximum(torch.minimum(bounds, end.unsqueeze(-1)), first.unsqueeze(-1))
        mass, filled, _ = _at(prefix, bounds).diff(dim=-1)
        mean = mass / filled.clamp_min(1)
        edges = _at(prefix, torch.stack([first, end], dim=-1))
        inside, (below, above) = edges[0].diff(dim=-1).squeeze(-1), (edges[0][..., 0], total - edges[0][..., 1])
        plain = edges[2].diff(dim=-1).squeeze(-1)
        kept = xlogy(mass, mean).sum(dim=-1)
        lost = inside <= 0
        # the levels that hold the first and the last bin
        outer = (
            (bounds[..., 1:] > first.unsqueeze(-1)).int().argmax(dim=-1),
            (bounds[..., :-1] < end.unsqueeze(-1)).sum(dim=-1) - 1,
        )
        for at, level, outliers in ((first, outer[0], below), (end - 1, outer[1], above)):
            value = c.gather(1, at.clamp(0, 2 * half - 1))
            plain = plain - xlogy(value, value) + xlogy(value + outliers, value + outliers)
            kept = kept + xlogy(outliers, mean.gather(-1, level.clamp_min(0).unsqueeze(-1)).squeeze(-1))
            lost = lost | ((outliers > 0) & (value == 0))
        found = (plain - kept) / total - total.log() + inside.log()
        rejected: Tensor = found.masked_fill(lost | (end - first < 2), torch.inf)
        return rejected

    return _sliced(errors, signed, 2**num_bits)


def _grid(low: Tensor, high: Tensor, num_bits: int) -> Tensor:
    """The values that are kept, ``(..., 2**num_bits)``."""
    scale = ((low + high) / (2**num_bits - 1)).clamp_min(torch.finfo(torch.float32).tiny)
    first = torch.round(-low / scale)
    code = torch.arange(2**num_bits, dtype=torch.float64, device=low.device)
    values: Tensor = (first.unsqueeze(-1) + code) * scale.unsqueeze(-1)
    return values


def _bounds(values: Tensor, bins: int) -> Tensor:
    """Bins at which the values' levels begin, and the last one ends: half way between values, and everything beyond them."""
    index = _index((values[..., 1:] + values[..., :-1]) / 2, bins)
    return torch.cat([torch.zeros_like(index[..., :1]), index, torch.full_like(index[..., :1], bins)], dim=-1)


def _index(position: Tensor, bins: int) -> Tensor:
    """The first bin whose centre is at least ``position``."""
    return (torch.ceil(position - 0.5) + bins // 2).clamp_(0, bins).long()


def _prefix(values: Tensor) -> Tensor:
    return torch.nn.functional.pad(values.cumsum(dim=1), (1, 0))


def _at(prefix: Tensor, index: Tensor) -> Tensor:
    """Prefix sums ``(sums, rows, bins + 1)`` at ``(rows, candidates, n)``: ``(sums, rows, candidates, n)``."""
    flat = index.reshape(1, index.shape[0], -1).expand(prefix.shape[0], -1, -1)
    return prefix.gather(2, flat).reshape(prefix.shape[0], *index.shape)


def _sliced(errors: Errors, signed: Tensor, size: int) -> Errors:
    """``errors`` of a few candidates at a time; one costs ``size`` values for each row."""

    def of_all(low: Tensor, high: Tensor) -> Tensor:
        step = max(1, SLICE // (size * len(signed)))
        parts = zip(torch.split(low, step, dim=1), torch.split(high, step, dim=1), strict=True)
        return torch.cat([errors(*part) for part in parts], dim=1)

    return of_all
