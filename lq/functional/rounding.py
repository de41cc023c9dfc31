"""Error of rounding a histogram's bins to a grid, for every candidate threshold: any norm, any grid."""

import torch
from torch import Tensor

from lq.functional.grid import FLOAT_FORMATS, Bits, largest_code

# Values of a temporary that is worked off in one go: what a core's cache holds.
SLICE = 2**16


def rounding_errors(counts: Tensor, edges: Tensor, num_bits: Bits, unsigned: bool, p: float) -> Tensor:
    """:math:`\\sum_b c_b |x_b - Q_t(x_b)|^p` in units of bins, float64 ``(rows, candidates)``.

    ``x_b`` is the centre of bin b and ``Q_t`` rounds to the grid whose largest number is the threshold t. A candidate's errors at
    the bins are the same for all histograms, so the sums of all of them are one matrix product.

    Args:
        counts: ``(rows, bins)``.
        edges: candidates in bins, ``(candidates,)``.
        num_bits: width of the integer, or a float format.
        unsigned: all codes lie above zero.
        p: exponent, above 0.
    """
    used = int((counts.sum(dim=0) > 0).nonzero().max()) + 1 if counts.any() else 1
    centre = torch.arange(used, dtype=torch.float64, device=counts.device) + 0.5
    weights = counts[:, :used].double().t().contiguous()
    errors = []
    for part in torch.split(edges.double(), max(1, SLICE // used)):
        scale = (part / largest_code(num_bits, unsigned)).unsqueeze(1)
        error = _rounded(centre / scale, num_bits, unsigned).mul_(scale).sub_(centre)
        errors.append(_power(error, p) @ weights)
    return torch.cat(errors).t()


def _rounded(steps: Tensor, num_bits: Bits, unsigned: bool) -> Tensor:
    """Magnitudes in steps, on the grid; a new tensor or the same."""
    steps.clamp_(max=largest_code(num_bits, unsigned))
    if isinstance(num_bits, tuple):
        return steps.to(FLOAT_FORMATS[num_bits]).double()
    return steps.round_()


def _power(error: Tensor, p: float) -> Tensor:
    if p == 2:
        return error.square_()
    return error.abs_() if p == 1 else error.abs_().pow_(p)
