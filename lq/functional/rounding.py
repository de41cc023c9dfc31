"""Error of rounding a histogram's bins to a grid, for every candidate threshold: any norm, any grid."""

import math

import torch
from torch import Tensor

from lq.functional.grid import FLOAT_FORMATS, Bits, largest_code, scale_from_amax

# Values of a temporary that is worked off in one go: few enough for the cache, enough for all cores.
SLICE = 2**19


def rounding_errors(counts: Tensor, edges: Tensor, num_bits: Bits, unsigned: bool, p: float, scale_amax: float = 1.0) -> Tensor:
    """:math:`\\sum_b c_b |x_b - Q_t(x_b)|^p` in units of bins, float64 ``(rows, candidates)``.

    ``x_b`` is the centre of bin b and ``Q_t`` rounds to the grid whose largest number is ``scale_amax`` times the threshold t. A
    candidate's errors at the bins are the same for all histograms, so the sums of all of them are one matrix product.

    Args:
        counts: ``(rows, bins)``.
        edges: candidates in bins, int64 ``(candidates,)``, rising.
        num_bits: width of the integer, or a float format.
        unsigned: all codes lie above zero.
        p: exponent, above 0.
        scale_amax: share of a threshold that the grid's largest number is.
    """
    used = int((counts.sum(dim=0) > 0).nonzero().max()) + 1 if counts.any() else 1
    centre = torch.arange(used, dtype=torch.float64, device=counts.device) + 0.5
    weights = counts[:, :used].double().t().contiguous()
    errors = []
    for part in torch.split(edges, max(1, SLICE // used)):
        largest = scale_amax * part.double().unsqueeze(1)
        scale = largest / largest_code(num_bits, unsigned)
        # from the largest number of the part on, there is nothing to round
        inside = math.ceil(largest[-1].item())
        error = _rounded(centre[:inside] / scale, num_bits, unsigned).mul_(scale).sub_(centre[:inside])
        clipped = centre[inside:] - largest
        errors.append(_power(error, p) @ weights[:inside] + _power(clipped, p) @ weights[inside:])
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
    if p == 1:
        return error.abs_()
    # float32 is twice as fast, exact to 1e-7, and has room for errors of a whole range to the eighth power
    return error.abs_().float().pow_(p).double() if p <= 8 else error.abs_().pow_(p)


def energies(counts: Tensor, width: Tensor, amax: Tensor, num_bits: Bits, unsigned: bool = False) -> tuple[Tensor, Tensor]:
    """Energy of what a histogram counted, and of the noise that quantizing it with ``amax`` adds: float64 ``(rows,)`` each.

    Every value is taken for the centre of its bin, so the noise means something while a bin is narrower than a step.

    Args:
        counts: ``(rows, bins)``.
        width: width of a bin, float64 ``(rows,)``.
        amax: ``(rows,)``.
        num_bits: width of the integer, or a float format.
        unsigned: all codes lie above zero.

    >>> signal, noise = energies(torch.tensor([[0, 2, 1]]), torch.tensor([1.0]), torch.tensor([2.0]), 2)
    >>> signal, noise  # 1.5 and 1.5 become 2, and so does 2.5
    (tensor([10.7500], dtype=torch.float64), tensor([0.7500], dtype=torch.float64))
    """
    centre = torch.arange(counts.shape[1], dtype=torch.float64, device=counts.device) + 0.5
    scale = scale_from_amax(amax.double(), num_bits, unsigned).unsqueeze(1)
    parts = []
    for c, w, s in zip(*(torch.split(t, max(1, SLICE // len(centre))) for t in (counts, width.double(), scale)), strict=True):
        x = centre * w.unsqueeze(1)
        error = _rounded(x / s, num_bits, unsigned).mul_(s).sub_(x)
        parts.append(torch.stack([(c * x.square()).sum(dim=1), (c * error.square_()).sum(dim=1)]))
    signal, noise = torch.cat(parts, dim=1)
    return signal, noise
