"""Histograms of magnitudes whose range grows by powers of two.

A histogram is ``counts``, int64 ``(rows, bins)``, over ``[0, 2**exponent)`` with ``exponent``, int32 ``(rows,)``: a row for each
amax. When data exceeds the range, the range doubles and neighbouring bins merge. Scaling by a power of two is exact, so a
value falls into the same final bin whenever it is counted: any split of the data, in any order, over any number of ranks, ends in
the same integers. The widest bin is ``2**exponent / bins``; callers keep twice the bins they want, because up to half may lie
above the largest value.
"""

import math

import torch
from torch import Tensor

# Below 2**-100 everything shares the first bin: the bin width stays a normal float32 number.
MIN_EXPONENT = -100
# Values that are counted in one go on a CPU: their magnitudes stay in its cache, and float32, in which histc counts, is exact.
CHUNK = 2**20


def bins_for(num_bins: int) -> int:
    """Bins to keep for a resolution of ``num_bins`` over the range in use: a power of two, at least twice ``num_bins``.

    >>> bins_for(2048), bins_for(1000)
    (4096, 2048)
    """
    return int(2 ** math.ceil(math.log2(2 * num_bins)))


def empty_histogram(rows: int, bins: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Counts and exponents of a histogram that has seen nothing."""
    counts = torch.zeros(rows, bins, dtype=torch.int64, device=device)
    return counts, torch.full((rows,), MIN_EXPONENT, dtype=torch.int32, device=device)


def bin_width(exponent: Tensor, bins: int) -> Tensor:
    """Width of a bin, float64 ``(rows,)``."""
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float64), exponent) / bins


def grow(counts: Tensor, exponent: Tensor, new_exponent: Tensor) -> Tensor:
    """Counts over ``[0, 2**new_exponent)``, where ``new_exponent >= exponent``. No host synchronisation.

    >>> grow(torch.tensor([[1, 2, 3, 4]]), torch.tensor([0]), torch.tensor([1]))
    tensor([[3, 7, 0, 0]])
    """
    bins = counts.shape[1]
    shift = (new_exponent - exponent).clamp(0, 62).to(torch.int64).unsqueeze(1)
    target = torch.arange(bins, device=counts.device).unsqueeze(0) >> shift
    return torch.zeros_like(counts).scatter_add_(1, target, counts)


def update(counts: Tensor, exponent: Tensor, rows: Tensor, peak: Tensor, skip_zeros: bool = False) -> tuple[Tensor, Tensor]:
    """Count the magnitudes of ``rows`` into a histogram and return the new counts and exponents.

    Args:
        counts: int64 ``(rows, bins)``.
        exponent: int32 ``(rows,)``.
        rows: floating ``(rows, values)``; must be finite where it is to be counted right, other values never write out of bounds.
        peak: largest magnitude of each row, ``(rows,)``.
        skip_zeros: leave exact zeros out.

    >>> counts, exponent = empty_histogram(1, 4)
    >>> counts, exponent = update(counts, exponent, torch.tensor([[0.1, -0.9]]), torch.tensor([0.9]))
    >>> counts, exponent = update(counts, exponent, torch.tensor([[1.5]]), torch.tensor([1.5]))
    >>> counts, exponent
    (tensor([[1, 1, 0, 1]]), tensor([1], dtype=torch.int32))
    """
    # frexp: peak = m * 2**e with 0.5 <= m < 1, so peak < 2**e even where peak is itself a power of two
    # and what is zero or tiny must not widen the range
    finite = torch.nan_to_num(peak, nan=0.0, posinf=0.0).clamp_min(2.0 ** (MIN_EXPONENT - 1))
    new_exponent = torch.maximum(exponent, torch.frexp(finite).exponent.to(torch.int32))
    counts = grow(counts, exponent, new_exponent)
    counts += _count(rows, new_exponent, counts.shape[1])
    if skip_zeros:
        counts[:, 0] -= (rows == 0).sum(dim=1)
    return counts, new_exponent


def _count(rows: Tensor, exponent: Tensor, bins: int) -> Tensor:
    """Counts of the magnitudes of ``(rows, values)`` over ``[0, 2**exponent)`` in ``bins`` bins."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    # histc multiplies by bins before it divides by the range, so float32 must have room above
    if rows.shape[0] == 1 and rows.device.type == "cpu" and int(exponent) < 64:
        return _count_in_chunks(rows.reshape(-1), dtype, bins, 2.0 ** int(exponent)).unsqueeze(0)
    per_unit = torch.ldexp(torch.full_like(exponent, bins, dtype=dtype), -exponent)
    index = torch.nan_to_num(rows.abs().to(dtype) * per_unit.unsqueeze(1), nan=0.0).clamp_max_(bins - 1).to(torch.int64)
    index += torch.arange(rows.shape[0], device=index.device).unsqueeze(1) * bins
    flat = torch.zeros(rows.shape[0] * bins, dtype=torch.int64, device=index.device)
    index = index.reshape(-1)
    # scatter_add, unlike bincount, does not ask the device how large its result is
    return flat.scatter_add_(0, index, torch.ones_like(index)).reshape(rows.shape[0], bins)


def _count_in_chunks(values: Tensor, dtype: torch.dtype, bins: int, top: float) -> Tensor:
    total = torch.zeros(bins, dtype=torch.int64)
    magnitude = torch.empty(min(CHUNK, values.numel()), dtype=dtype)
    for chunk in torch.split(values, CHUNK):
        part = magnitude[: chunk.numel()].copy_(chunk).abs_()
        total += torch.histc(part, bins, 0, top).to(torch.int64)
    return total
