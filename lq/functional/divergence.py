"""Kullback-Leibler divergence between a histogram and what is left of it on a grid of integers, for every candidate threshold.

The sums over a level are differences of prefix sums, so a candidate costs its number of levels and no pass over the bins.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.special import xlogy

from lq.functional.grid import integer_bounds

# Gathered values that are worked off in one go.
SLICE = 2**20


def entropy(counts: Tensor, edges: Tensor, num_bits: int, unsigned: bool) -> Tensor:
    """TensorRT's divergence, ``(rows, candidates)``.

    P is the histogram up to the edge with everything above it added to the last bin; Q is P without that, merged into
    ``2**(num_bits - 1)`` levels (``2**num_bits`` if unsigned) and spread evenly over each level's non-empty bins (Migacz, "8-bit
    inference with TensorRT", GTC 2017; NVIDIA pytorch-quantization ``_compute_amax_entropy``). Both are normalised. The first
    bin counts as the second one does, so that a spike of zeros does not decide. Infinite where Q is 0 and P is not.

    Args:
        counts: ``(rows, bins)``.
        edges: candidates in bins, int64 ``(candidates,)``.
        num_bits: width of the integer.
        unsigned: all codes lie above zero.
    """
    levels = 2 ** (num_bits - (not unsigned))
    c = counts.double().clone()
    c[:, 0] = c[:, 1]
    count, filled = _prefix(c), _prefix((c > 0).double())
    self_information, total = _prefix(xlogy(c, c)).t(), count[-1]
    level = torch.arange(levels + 1, device=counts.device)

    def error(edges: Tensor) -> Tensor:
        # level j holds the bins b with floor(b * levels / edge) == j
        start = -(-(level * edges.unsqueeze(1)) // levels)
        mass, bins = _levels(count, filled, start)
        inside, last = count[edges], edges - 1
        outliers, c_last = total - inside, c.t()[last]
        # the last bin of P carries the outliers as well, and Q there is its level's mean; Q is zero where the bin is empty
        top = ((last * levels) // edges).reshape(-1, 1, 1).expand(-1, 1, c.shape[0])
        mean = (mass / bins.clamp_min(1)).gather(1, top).squeeze(1)
        plain = self_information.t()[edges] - xlogy(c_last, c_last) + xlogy(c_last + outliers, c_last + outliers)
        divergence: Tensor = (plain - _kept(mass, bins) - xlogy(outliers, mean)) / total - total.log() + inside.log()
        rejected: Tensor = divergence.masked_fill((outliers > 0) & (c_last == 0) | (inside == 0), torch.inf)
        return rejected

    return _sliced(error, edges, levels * counts.shape[0])


def kl(counts: Tensor, edges: Tensor, num_bits: int, unsigned: bool) -> Tensor:
    """Divergence of the whole histogram from its rounded self, ``(rows, candidates)``.

    P is the histogram; Q has the mass of all bins that round to a code, or are clipped to the last one, spread evenly over those
    of them that are not empty: :math:`\\sum_b p_b \\log(p_b / q_b)`, which is
    :math:`\\sum_b p_b \\log p_b - \\sum_l m_l \\log(m_l / n_l)` over levels of mass m and n bins. (Sony MCT's ``KL`` compares
    with the clipped histogram as TensorRT does; here what is clipped counts as merged.)

    Arguments as :func:`entropy`.
    """
    _, qmax = integer_bounds(num_bits, unsigned)
    c = counts.double()
    count, filled = _prefix(c), _prefix((c > 0).double())
    plain, total, bins = xlogy(c, c).sum(dim=1), count[-1], counts.shape[1]
    level = torch.arange(1, qmax + 1, device=counts.device)

    def error(edges: Tensor) -> Tensor:
        # code q begins where a bin's centre is at least (q - 1/2) s: the ceiling of ((2q - 1) edge - qmax) / (2 qmax)
        start = -((qmax - (2 * level - 1) * edges.unsqueeze(1)) // (2 * qmax))
        first, end = torch.zeros_like(start[:, :1]), torch.full_like(start[:, :1], bins)
        mass, n = _levels(count, filled, torch.cat([first, start.clamp(0, bins), end], dim=1))
        divergence: Tensor = (plain - _kept(mass, n)) / total.clamp_min(1)
        return divergence

    return _sliced(error, edges, qmax * counts.shape[0])


def _prefix(values: Tensor) -> Tensor:
    """Prefix sums along bins, ``(bins + 1, rows)``: rows last, so that one look-up serves them all."""
    return torch.nn.functional.pad(values.cumsum(dim=1), (1, 0)).t().contiguous()


def _levels(count: Tensor, filled: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Mass and number of non-empty bins of each level, ``(candidates, levels, rows)``; level l is ``[start_l, start_l+1)``."""
    return count[start].diff(dim=1), filled[start].diff(dim=1)


def _kept(mass: Tensor, bins: Tensor) -> Tensor:
    """The sum of ``m log(m / n)`` over levels, ``(candidates, rows)``."""
    kept: Tensor = xlogy(mass, mass / bins.clamp_min(1)).sum(dim=1)
    return kept


def _sliced(error: Callable[[Tensor], Tensor], edges: Tensor, size: int) -> Tensor:
    return torch.cat([error(part) for part in torch.split(edges, max(1, SLICE // size))]).t()
