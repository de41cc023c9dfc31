"""Kullback-Leibler divergence between a histogram and what is left of it on a grid of integers, for every candidate threshold.

The sums over a level are differences of prefix sums, so a candidate costs its number of levels and no pass over the bins.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.special import xlogy

from lq.functional.grid import integer_bounds

# Values of a temporary that is worked off in one go: few enough for the cache.
SLICE = 2**18


def entropy(counts: Tensor, edges: Tensor, num_bits: int, unsigned: bool) -> Tensor:
    """TensorRT's divergence, ``(rows, candidates)``.

    P is the histogram up to the edge with everything above it added to the last bin; Q is P without that, merged into
    ``2**(num_bits - 1)`` levels (``2**num_bits`` if unsigned) of equal width and spread evenly over each level's non-empty bins
    (Migacz, "8-bit inference with TensorRT", GTC 2017; NVIDIA pytorch-quantization ``_compute_amax_entropy``). Both are
    normalised. The first bin counts as the second one does, so that a spike of zeros does not decide. Infinite where Q is 0 and
    P is not.

    Args:
        counts: ``(rows, bins)``.
        edges: candidates in bins, int64 ``(candidates,)``.
        num_bits: width of the integer.
        unsigned: all codes lie above zero.
    """
    levels = 2 ** (num_bits - (not unsigned))
    level = torch.arange(levels + 1, device=counts.device)

    # level j holds the bins b with floor(b * levels / edge) == j
    def starts(edges: Tensor) -> Tensor:
        return -torch.div(-level * edges.unsqueeze(1), levels, rounding_mode="floor")

    return _outliers_lost(counts, edges, levels, starts)


def kl(counts: Tensor, edges: Tensor, num_bits: int, unsigned: bool, scale_amax: float = 1.0) -> Tensor:
    """Divergence of the clipped histogram from the rounded one, ``(rows, candidates)``.

    As :func:`entropy`, but the levels are the integer's codes, each with the bins that round to it. (Sony MCT's ``KL`` compares
    the same two, but lets a spike of zeros decide, which no threshold hurts, and smooths both distributions where here a Q that
    is 0 where P is not is rejected.)

    Arguments as :func:`entropy`, and ``scale_amax``, the share of an edge that the largest code stands for: there P is clipped.
    """
    _, qmax = integer_bounds(num_bits, unsigned)
    steps = qmax / scale_amax
    # code q begins half a step before its value, and the last one ends at it
    half_steps = torch.tensor([0, *range(1, 2 * qmax, 2), 2 * qmax], dtype=torch.float64, device=counts.device)

    # h half steps are reached by the first bin whose centre is at least h s / 2: the ceiling of (h edge - steps) / (2 steps)
    def starts(edges: Tensor) -> Tensor:
        first = -torch.div(steps - half_steps * edges.unsqueeze(1), 2 * steps, rounding_mode="floor")
        return first.long().clamp(0, counts.shape[1])

    return _outliers_lost(counts, edges, qmax + 1, starts)


Bounds = Callable[[Tensor], Tensor]


def _outliers_lost(counts: Tensor, edges: Tensor, levels: int, starts: Bounds) -> Tensor:
    """KL(P || Q) where P has what lies above the last level in its last bin, and Q has the mass of each level but not that.

    Args:
        counts: ``(rows, bins)``.
        edges: candidates ``(candidates,)``.
        levels: how many levels there are.
        starts: of edges, the bins at which levels begin and the last one ends, ``(candidates, levels + 1)``, rising.
    """
    c = counts.to(torch.float64, copy=True)
    c[:, 0] = c[:, 1]
    rows = c.shape[0]
    # both sums side by side, so that one look-up serves them and all rows
    prefix = _prefix(torch.cat([c, (c > 0).double()]))
    count, self_information = prefix[:, :rows], _prefix(xlogy(c, c))
    total = count[-1]

    def error(edges: Tensor) -> Tensor:
        start = starts(edges)
        sums = prefix.index_select(0, start.flatten()).reshape(*start.shape, 2 * rows)
        # mass and number of non-empty bins of each level, (candidates, levels, rows)
        mass, bins = torch.split(sums.diff(dim=1), rows, dim=2)
        end = start[:, -1]
        inside, last = count[end], (end - 1).clamp_min(0)
        outliers, c_last = total - inside, c.t()[last]
        # Q in the last bin is its level's mean; Q is zero where the bin is empty
        top = (start[:, :-1] <= last.unsqueeze(1)).sum(dim=1) - 1
        index = top.reshape(-1, 1, 1).expand(-1, 1, rows)
        density = torch.div(mass, bins.clamp_min_(1), out=bins)
        mean = density.gather(1, index).squeeze(1)
        plain = self_information[end] - xlogy(c_last, c_last) + xlogy(c_last + outliers, c_last + outliers)
        divergence: Tensor = (
            (plain - xlogy(mass, density).sum(dim=1) - xlogy(outliers, mean)) / total - total.log() + inside.log()
        )
        rejected: Tensor = divergence.masked_fill((outliers > 0) & (c_last == 0) | (inside == 0), torch.inf)
        return rejected

    return torch.cat([error(part) for part in torch.split(edges, max(1, SLICE // (levels * rows)))]).t()


def _prefix(values: Tensor) -> Tensor:
    """Prefix sums along bins, ``(bins + 1, rows)``: rows last, so that one look-up serves them all."""
    return torch.nn.functional.pad(values.cumsum(dim=1), (1, 0)).t().contiguous()
