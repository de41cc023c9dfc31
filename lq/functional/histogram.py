"""Histograms of magnitudes whose range grows by powers of two.

A histogram is ``counts``, int64 ``(rows, bins)``, over ``[0, 2**exponent)`` with ``exponent``, int32 ``(rows,)``: a row for each
amax. When data exceeds the range, the range doubles and neighbouring bins merge. Scaling by a power of two is exact, so a
value falls into the same final bin whenever it is counted: any split of the data, in any order, over any number of ranks, ends in
the same integers. The widest bin is ``2**exponent / bins``; callers keep twice the bins they want, because up to half may lie
above the largest value.
"""

import math
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from torch import Tensor

# Below 2**-100 everything shares the first bin: the bin width stays a normal float32 number.
MIN_EXPONENT = -100
# Values that a CPU counts in one go: what its cache holds.
CHUNK = 2**20
# From so many of them on, several cores count.
PARALLEL = 2**18


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
    if _can_look(counts) and torch.equal(exponent, new_exponent):
        return counts  # mostly
    bins = counts.shape[1]
    shift = (new_exponent - exponent).clamp(0, 62).to(torch.int64).unsqueeze(1)
    target = torch.arange(bins, device=counts.device).unsqueeze(0) >> shift
    return torch.zeros_like(counts).scatter_add_(1, target, counts)


def zeros(rows: Tensor) -> Tensor:
    """How many exact zeros each of ``(rows, values)`` has, int64 ``(rows,)``."""
    # over all dimensions it is several times as fast on a CPU
    return rows.shape[1] - (torch.count_nonzero(rows).reshape(1) if len(rows) == 1 else torch.count_nonzero(rows, dim=1))


def update(counts: Tensor, exponent: Tensor, rows: Tensor, peak: Tensor, skip: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Count the magnitudes of ``rows`` into a histogram and return the new counts and exponents.

    Args:
        counts: int64 ``(rows, bins)``.
        exponent: int32 ``(rows,)``.
        rows: floating ``(rows, values)``; must be finite where it is to be counted right, other values never write out of bounds.
        peak: largest magnitude of each row, ``(rows,)``.
        skip: how many exact zeros to leave out, int64 ``(rows,)``: :func:`zeros` for all of them.

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
    # a long row pays for the steps of its own that the CPU's way takes
    on_cpu = _can_look(rows) and rows.shape[1] >= rows.shape[0] and bool(peak.isfinite().all())
    count = _count_on_cpu if on_cpu else _count
    counts = grow(counts, exponent, new_exponent) + count(rows, new_exponent, counts.shape[1])
    if skip is not None:
        counts[:, 0] -= skip
    return counts, new_exponent


def _can_look(x: Tensor) -> bool:
    """Whether values can be looked at: on other devices that costs more than it saves, and compiled code has none."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _count(rows: Tensor, exponent: Tensor, bins: int) -> Tensor:
    """Counts of the magnitudes of ``(rows, values)`` over ``[0, 2**exponent)`` in ``bins`` bins, on any device."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    per_unit = torch.ldexp(torch.full_like(exponent, bins, dtype=dtype), -exponent)
    index = torch.nan_to_num(rows.abs().to(dtype) * per_unit.unsqueeze(1), nan=0.0).clamp_max_(bins - 1).to(torch.int64)
    index += torch.arange(rows.shape[0], device=index.device).unsqueeze(1) * bins
    flat = torch.zeros(rows.shape[0] * bins, dtype=torch.int64, device=index.device)
    index = index.reshape(-1)
    # scatter_add, unlike bincount, does not ask the device how large its result is
    return flat.scatter_add_(0, index, torch.ones_like(index)).reshape(rows.shape[0], bins)


def _count_on_cpu(rows: Tensor, exponent: Tensor, bins: int) -> Tensor:
    """The same for finite values on a CPU, by ``bincount`` of 16-bit indices: a quarter of the time of ``torch.histc``."""
    per_unit = (math.ldexp(bins, -e) for e in exponent.tolist())
    return torch.stack([_count_row(row, unit, bins) for row, unit in zip(rows, per_unit, strict=True)])


def _count_row(values: Tensor, per_unit: float, bins: int) -> Tensor:
    counts = torch.zeros(bins, dtype=torch.int64)
    size = min(CHUNK, values.numel())
    scaled = torch.empty(size, dtype=torch.promote_types(values.dtype, torch.float32))
    indices = torch.empty(size, dtype=torch.int16 if bins <= 2**15 else torch.int32)
    for chunk in torch.split(values, CHUNK):
        n = chunk.numel()
        # half precision is widened first; the conversion to integers cuts off towards zero
        torch.mul(chunk.to(scaled.dtype), per_unit, out=scaled[:n])
        index = indices[:n].copy_(scaled[:n]).abs_()
        for part in _bincounts(index, bins):
            counts += part
    return counts


def _bincounts(index: Tensor, bins: int) -> list[Tensor]:
    """Counts whose sum is that of ``index``: of a part each, counted on as many cores as torch uses, where that pays."""
    threads = torch.get_num_threads()
    if threads == 1 or index.numel() < PARALLEL:
        return [torch.bincount(index, minlength=bins)]
    mine, *others = torch.tensor_split(index, threads)
    running = [_helpers(os.getpid(), threads - 1).submit(torch.bincount, part, minlength=bins) for part in others]
    return [torch.bincount(mine, minlength=bins), *(future.result() for future in running)]


@cache
def _helpers(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads that count besides the caller's; a forked process needs its own, because threads are not forked."""
    return ThreadPoolExecutor(threads, "lq-bincount")
