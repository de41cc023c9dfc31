"""From a histogram of magnitudes to ``amax``: pure functions, vectorised over quantizers and over candidates.

Every method takes a stack of histograms, counts ``(rows, bins)``, and tries the upper edges of bins ``start_bin``, ``start_bin +
stride``, ... as clipping magnitudes. The sums that an error needs over a quantization level are differences of prefix sums, so a
candidate costs its number of levels and no pass over the bins. All arithmetic is float64, hence deterministic.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lq.functional.grid import Bits, integer_bounds

# Candidates are worked off in slices that keep the largest temporary near 64 MiB of float64.
SLICE = 2**23


@dataclass(frozen=True)
class Search:
    """How to look for a threshold.

    Args:
        num_bits: width of the integer the threshold is for.
        unsigned: the integer has no sign, so all of its codes lie above zero.
        percentile: for ``percentile``: percentage of values to keep, in [0, 100].
        start_bin: first candidate, in bins.
        stride: bins between candidates.
    """

    num_bits: Bits = 8
    unsigned: bool = False
    percentile: float = 99.99
    start_bin: int = 128
    stride: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.percentile <= 100:
            raise ValueError(f"`percentile` is {self.percentile}: it must lie in [0, 100].")
        if self.start_bin < 1 or self.stride < 1:
            raise ValueError(f"`start_bin` is {self.start_bin} and `stride` {self.stride}: both must be at least 1.")

    @property
    def integer_bits(self) -> int:
        """``num_bits``, for methods that only know integers."""
        assert isinstance(self.num_bits, int)
        return self.num_bits


Method = Callable[[Tensor, Search], Tensor]


def candidates(counts: Tensor, search: Search) -> Tensor:
    """Edges to try, in bins: int64 ``(candidates,)``. The last one covers every histogram of the stack."""
    bins = counts.shape[1]
    grid = torch.arange(min(search.start_bin, bins), bins + 1, search.stride, device=counts.device)
    return grid if grid[-1] == bins else torch.cat([grid, grid.new_tensor([bins])])


def _prefix(values: Tensor) -> Tensor:
    """Prefix sums along bins with a leading zero: ``(rows, bins + 1)``; the sum over bins ``[a, b)`` is ``p[b] - p[a]``."""
    return torch.nn.functional.pad(values.cumsum(dim=1), (1, 0))


def _best(counts: Tensor, search: Search, levels: int, error: Callable[[Tensor], Tensor], last: bool) -> Tensor:
    """Candidate with the least ``error``, for every row; ``last`` prefers the largest among equals, else the smallest."""
    edges = candidates(counts, search)
    step = max(1, SLICE // (levels * counts.shape[0]))
    errors = torch.cat([error(part) for part in torch.split(edges, step)], dim=1)
    if last:
        # equal up to rounding, lest its noise choose
        equal = errors <= errors.amin(dim=1, keepdim=True) + 1e-12
        return torch.where(equal, edges, 0).amax(dim=1)
    return edges[errors.argmin(dim=1)]


def mse(counts: Tensor, search: Search) -> Tensor:
    """Edge with the least mean squared quantization error, in bins, ``(rows,)``.

    With bins of centre :math:`x_b` and count :math:`c_b`, the error of threshold t with scale s = t / qmax is
    :math:`\\sum_b c_b (x_b - s\\,\\mathrm{clamp}(\\mathrm{round}(x_b / s)))^2`
    (Sung et al., 2015, arXiv:1511.06488, eq. 3; NVIDIA pytorch-quantization ``_compute_amax_mse``).
    """
    _, qmax = integer_bounds(search.integer_bits, search.unsigned)
    c = counts.double()
    centre = torch.arange(counts.shape[1], dtype=torch.float64, device=counts.device) + 0.5
    count, first, second = _prefix(c), _prefix(c * centre), (c * centre.square()).sum(dim=1, keepdim=True)
    level = torch.arange(1, qmax + 1, device=counts.device)

    def error(edges: Tensor) -> Tensor:
        # level q starts where centre >= (q - 1/2) s: the ceiling of ((2q - 1) edge - qmax) / (2 qmax), in integers
        start = -((qmax - (2 * level - 1) * edges.unsqueeze(1)) // (2 * qmax))
        start = start.clamp(0, counts.shape[1])
        # summation by parts: value q of level q is the sum of 1, that of q squared the sum of 2q - 1, over levels up to q
        above = (count[:, -1:, None] - count[:, start]) * (2 * level - 1).double()
        above_first = first[:, -1:, None] - first[:, start]
        scale = edges.double() / qmax
        return second - 2 * scale * above_first.sum(dim=2) + scale.square() * above.sum(dim=2)

    return _best(counts, search, qmax, error, last=False)


def entropy(counts: Tensor, search: Search) -> Tensor:
    """Edge with the least Kullback-Leibler divergence, in bins, ``(rows,)``: TensorRT's calibration.

    P is the histogram up to the edge with everything above it added to the last bin; Q is P without that, merged into
    ``2**(num_bits - 1)`` levels (``2**num_bits`` if unsigned) and spread evenly over each level's non-empty bins (Migacz, "8-bit
    inference with TensorRT", GTC 2017; NVIDIA pytorch-quantization ``_compute_amax_entropy``). Both are normalised. The first
    bin counts as the second one does, so that a spike of zeros does not decide; of equal candidates the largest wins.
    """
    levels = 2 ** (search.integer_bits - (not search.unsigned))
    c = counts.double().clone()
    c[:, 0] = c[:, 1]
    log = torch.special.xlogy
    count, filled, self_information = _prefix(c), _prefix((c > 0).double()), _prefix(log(c, c))
    total = count[:, -1:]
    level = torch.arange(levels + 1, device=counts.device)

    def error(edges: Tensor) -> Tensor:
        # level j holds the bins b with floor(b * levels / edge) == j
        start = -(-(level * edges.unsqueeze(1)) // levels)
        mass, bins = count[:, start].diff(dim=2), filled[:, start].diff(dim=2)
        cross = (log(mass, mass) - log(mass, bins)).sum(dim=2)
        inside = count[:, edges]
        outliers = total - inside
        last = edges - 1
        c_last = c[:, last]
        # the last bin of P carries the outliers as well, and Q there is its level's mean; Q is zero where the bin is empty
        top = (last * levels) // edges
        index = top.expand(c.shape[0], -1).unsqueeze(2)
        mean = (mass / bins.clamp_min(1)).gather(2, index).squeeze(2)
        plain = self_information[:, edges] - log(c_last, c_last) + log(c_last + outliers, c_last + outliers)
        divergence = (plain - cross - log(outliers, mean)) / total - total.log() + inside.log()
        rejected: Tensor = divergence.masked_fill((outliers > 0) & (c_last == 0) | (inside == 0), torch.inf)
        return rejected

    return _best(counts, search, levels, error, last=True)


def percentile(counts: Tensor, search: Search) -> Tensor:
    """Smallest edge, in bins, ``(rows,)``, at or below which at least ``percentile`` percent of the values lie."""
    cumulative = counts.cumsum(dim=1)
    # this order of operations is exact where the wanted number of values is whole: 1000 * (99.9 / 100) is more than 999
    wanted = cumulative[:, -1:].double() * search.percentile / 100
    return torch.searchsorted(cumulative.double(), wanted).squeeze(1).clamp_max(counts.shape[1] - 1) + 1


def noclipping(counts: Tensor, search: Search) -> Tensor:
    """The whole range: nothing is clipped."""
    return torch.full((counts.shape[0],), counts.shape[1], device=counts.device)


METHODS: dict[str, Method] = {
    "max": noclipping,
    "noclipping": noclipping,
    "percentile": percentile,
    "mse": mse,
    "entropy": entropy,
}


# Methods that count the levels of an integer.
SEARCHES = ("mse", "entropy")


def check_method(method: str, num_bits: Bits = 8) -> None:
    """Raise ``ValueError`` for a method that does not exist, or not for ``num_bits``."""
    if method not in METHODS:
        raise ValueError(f"`method` is {method!r}: choose one of {', '.join(METHODS)}.")
    if method in SEARCHES and not (isinstance(num_bits, int) and num_bits <= 16):
        raise ValueError(f"`method` is {method!r}, for integers of 2 to 16 bits, but `num_bits` is {num_bits}: use 'max'.")


@torch.no_grad()
def threshold(counts: Tensor, width: Tensor, peak: Tensor, method: str, search: Search | None = None) -> Tensor:
    """``amax`` of each histogram of a stack.

    Args:
        counts: int64 ``(rows, bins)``.
        width: width of a bin, float64 ``(rows,)``.
        peak: true largest magnitude, ``(rows,)``; no result exceeds it, and a histogram with no count gets it.
        method: a key of :data:`METHODS`.
        search: candidates and bit width.

    Returns:
        ``(rows,)``, dtype of ``peak``.

    >>> counts = torch.tensor([[90, 9, 0, 1]])
    >>> threshold(counts, torch.tensor([0.5]), torch.tensor([1.7]), "percentile", Search(percentile=99))
    tensor([1.])
    """
    search = search or Search()
    check_method(method, search.num_bits)
    edge = METHODS[method](counts, search)
    amax = torch.minimum((edge * width).to(peak.dtype), peak)
    return torch.where(counts.sum(dim=1) > 0, amax, peak)
