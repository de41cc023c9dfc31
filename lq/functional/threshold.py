"""From a histogram of magnitudes to ``amax``: pure functions, over many quantizers and all candidates at once.

A method that searches gives each candidate, the upper edge of a bin, an error, and the candidate with the least one wins. In
units of bins candidates and grids are the same for all histograms of a stack. All arithmetic is float64.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from lq.functional import divergence
from lq.functional.grid import Bits
from lq.functional.rounding import rounding_errors


@dataclass(frozen=True)
class Search:
    """How to look for a threshold.

    Args:
        num_bits: width of the integer the threshold is for, or a float format.
        unsigned: the integer has no sign, so all of its codes lie above zero.
        percentile: for ``percentile``: percentage of values to keep, in [0, 100].
        start_bin: first candidate, in bins; of powers of two for divergences only.
        stride: bins between candidates.
        p: for ``lp``: the norm's exponent, above 0.
        z_threshold: leave out bins that lie more than this many standard deviations from the mean of the magnitudes.
        min_threshold: the least result, in units of the data.
        power_of_two: only powers of two are candidates, and ``percentile`` and ``max`` go up to the next one.
        scale_amax: what the quantizer multiplies the threshold with; the methods in :data:`ROUNDING` take the grid that it makes.

    Raises:
        ValueError: an option out of range.
        TypeError: an option that is no number.
    """

    num_bits: Bits = 8
    unsigned: bool = False
    percentile: float = 99.99
    start_bin: int = 128
    stride: int = 1
    p: float = 2.0
    z_threshold: float = math.inf
    min_threshold: float = 0.0
    power_of_two: bool = False
    scale_amax: float = 1.0

    def __post_init__(self) -> None:
        for name in ("percentile", "p", "z_threshold", "min_threshold", "scale_amax"):
            if not isinstance(value := getattr(self, name), int | float):
                raise TypeError(f"`{name}` is {value!r}: it must be a number.")
        for name in ("start_bin", "stride"):
            if not isinstance(value := getattr(self, name), int):
                raise TypeError(f"`{name}` is {value!r}: it must be an integer.")
        if not 0 <= self.percentile <= 100:
            raise ValueError(f"`percentile` is {self.percentile}: it must lie in [0, 100].")
        if self.start_bin < 1 or self.stride < 1:
            raise ValueError(f"`start_bin` is {self.start_bin} and `stride` {self.stride}: both must be at least 1.")
        for name in ("p", "z_threshold", "scale_amax"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` is {getattr(self, name)}: it must be above 0.")
        if not 0 <= self.min_threshold < math.inf:
            raise ValueError(f"`min_threshold` is {self.min_threshold}: it must be finite and not negative.")


# Names of the options that a caller sets; the others follow from the quantizer.
OPTIONS = ("percentile", "start_bin", "stride", "p", "z_threshold", "min_threshold", "power_of_two")

# Counts ``(rows, bins)`` and a search, to an edge in bins ``(rows,)``.
Method = Callable[[Tensor, Search], Tensor]


def candidates(counts: Tensor, search: Search) -> Tensor:
    """Edges to try, in bins: int64 ``(candidates,)``, rising. The last one covers every histogram of the stack.

    The range of a histogram is a power of two, and so are ``bins``: halves of it are the powers of two.
    """
    bins = counts.shape[1]
    if search.power_of_two:
        return 2 ** torch.arange(math.ceil(math.log2(bins / search.scale_amax)) + 1, device=counts.device)
    grid = torch.arange(min(search.start_bin, bins), bins + 1, search.stride, device=counts.device)
    return grid if grid[-1] == bins else torch.cat([grid, grid.new_tensor([bins])])


def _least(errors: Tensor, edges: Tensor, last: bool) -> Tensor:
    """Edge with the least error in each row; of equals (up to rounding, lest its noise choose) the first or the last."""
    least = errors.amin(dim=1, keepdim=True)
    if last:
        return torch.where(errors <= least + 1e-12, edges, 0).amax(dim=1)
    return torch.where(errors <= least * (1 + 1e-9), edges, edges[-1]).amin(dim=1)


def _norm(counts: Tensor, search: Search, p: float) -> Tensor:
    edges = candidates(counts, search)
    errors = rounding_errors(counts, edges, search.num_bits, search.unsigned, p, search.scale_amax)
    return _least(errors, edges, last=False)


def mse(counts: Tensor, search: Search) -> Tensor:
    """Least mean squared rounding error (Sung et al., 2015, arXiv:1511.06488, eq. 3; NVIDIA ``_compute_amax_mse``)."""
    return _norm(counts, search, 2)


def mae(counts: Tensor, search: Search) -> Tensor:
    """Least mean absolute rounding error (Sony MCT's ``MAE``)."""
    return _norm(counts, search, 1)


def lp(counts: Tensor, search: Search) -> Tensor:
    """Least sum of ``|error|**p`` (Nahshan et al., 2019, arXiv:1911.07190, eq. 6; Sony MCT's ``LP``)."""
    return _norm(counts, search, search.p)


def _divergence(counts: Tensor, search: Search, error: Callable[..., Tensor]) -> Tensor:
    assert isinstance(search.num_bits, int)
    edges = candidates(counts, search)
    # powers of two begin at one bin, which alone is a distribution that nothing is lost of, whatever lies above it
    edges = edges[edges >= min(search.start_bin, counts.shape[1])]
    if 2 ** (search.num_bits - (not search.unsigned)) >= counts.shape[1]:
        # a level for each bin: nothing is lost anywhere
        return edges[-1].expand(counts.shape[0])
    return _least(error(counts, edges, search.num_bits, search.unsigned), edges, last=True)


def entropy(counts: Tensor, search: Search) -> Tensor:
    """Least of TensorRT's divergences: :func:`lq.functional.divergence.entropy`."""
    return _divergence(counts, search, divergence.entropy)


def kl(counts: Tensor, search: Search) -> Tensor:
    """Least divergence from the rounded histogram: :func:`lq.functional.divergence.kl`."""
    return _divergence(counts, search, partial(divergence.kl, scale_amax=search.scale_amax))


def percentile(counts: Tensor, search: Search) -> Tensor:
    """Smallest edge at or below which at least ``percentile`` percent of the values lie."""
    return percentile_edges(counts, search.percentile)


def percentile_edges(counts: Tensor, percentile: float) -> Tensor:
    """Edge in bins at or below which at least ``percentile`` percent of the counts lie, ``(rows,)``."""
    cumulative = counts.cumsum(dim=1)
    # this order of operations is exact where the wanted number of values is whole: 1000 * (99.9 / 100) is more than 999
    wanted = cumulative[:, -1:].double() * percentile / 100
    return torch.searchsorted(cumulative.double(), wanted).squeeze(1).clamp_max(counts.shape[1] - 1) + 1


def noclipping(counts: Tensor, search: Search) -> Tensor:
    """Upper edge of the last bin that is not empty: nothing is clipped."""
    bins = torch.arange(1, counts.shape[1] + 1, device=counts.device)
    return torch.where(counts > 0, bins, 1).amax(dim=1)


METHODS: dict[str, Method] = {
    "max": noclipping,
    "noclipping": noclipping,
    "percentile": percentile,
    "mse": mse,
    "mae": mae,
    "lp": lp,
    "kl": kl,
    "entropy": entropy,
}
# Methods that count the levels of an integer.
DIVERGENCES = ("kl", "entropy")
# Methods that compare data with what the quantizer's grid makes of it.
ROUNDING = ("mse", "mae", "lp", "kl")


def check_method(method: str, num_bits: Bits = 8) -> None:
    """Raise ``ValueError`` for a method that does not exist, or not for ``num_bits``."""
    if method not in METHODS:
        raise ValueError(f"`method` is {method!r}: choose one of {', '.join(METHODS)}.")
    if method in DIVERGENCES and not isinstance(num_bits, int):
        raise ValueError(f"`method` is {method!r}, which counts the levels of integers, but `num_bits` is {num_bits}: use 'mse'.")


def without_outliers(counts: Tensor, z_threshold: float) -> Tensor:
    """Counts without bins whose centre lies more than ``z_threshold`` standard deviations from the mean (Sony MCT's).

    >>> without_outliers(torch.tensor([[50, 50, 50, 0, 0, 0, 0, 1]]), 4.0)
    tensor([[50, 50, 50,  0,  0,  0,  0,  0]])
    """
    c = counts.double()
    total = c.sum(dim=1, keepdim=True).clamp_min(1)
    deviation = torch.arange(counts.shape[1], dtype=torch.float64, device=counts.device) + 0.5
    deviation = deviation - (c * deviation).sum(dim=1, keepdim=True) / total
    std = ((c * deviation.square()).sum(dim=1, keepdim=True) / total).sqrt()
    return counts.masked_fill(deviation.abs() > z_threshold * std, 0)


@torch.no_grad()
def threshold(counts: Tensor, width: Tensor, peak: Tensor, method: str, search: Search | None = None) -> Tensor:
    """``amax`` of each histogram of a stack.

    Args:
        counts: int64 ``(rows, bins)``.
        width: width of a bin, float64 ``(rows,)``.
        peak: true largest magnitude, ``(rows,)``; unless a power of two is asked for no result exceeds it (or
            ``min_threshold``) by more than ``scale_amax`` takes away, and a histogram with no count gets it.
        method: a key of :data:`METHODS`.
        search: candidates, bit width, options.

    Returns:
        ``(rows,)``, dtype of ``peak``.

    Raises:
        ValueError: an unknown method, or one that does not go with ``num_bits``.

    >>> counts = torch.tensor([[90, 9, 0, 1]])
    >>> threshold(counts, torch.tensor([0.5]), torch.tensor([1.7]), "percentile", Search(percentile=99))
    tensor([1.])
    """
    search = search or Search()
    check_method(method, search.num_bits)
    if search.z_threshold < math.inf:
        counts = without_outliers(counts, search.z_threshold)
    if method not in ROUNDING:
        search = replace(search, scale_amax=1.0)
    # a grid that reaches the peak is far enough
    amax = torch.minimum((METHODS[method](counts, search) * width).to(peak.dtype), peak / search.scale_amax)
    amax = torch.where(counts.sum(dim=1) > 0, amax, peak).clamp_min(search.min_threshold)
    return _next_power_of_two(amax) if search.power_of_two else amax


def _next_power_of_two(x: Tensor) -> Tensor:
    mantissa, exponent = torch.frexp(x)  # x = mantissa * 2**exponent with 0.5 <= mantissa < 1, or 0
    power = torch.ldexp(torch.ones_like(x), exponent - (mantissa == 0.5).int())
    return torch.where(x > 0, power, x)
