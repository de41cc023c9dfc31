"""From a signed histogram to the range of affine quantization: pure functions, over many quantizers at once.

A range holds zero, so that zero is on the grid. Both ends are searched together: first over a grid of fractions of what was seen,
then over a finer one around the best. Sums over a level of the grid are differences of prefix sums, so that a candidate costs its
number of levels and not of bins (but for ``lp``). Within this file, positions are in bins, and bin b is centred at b + 1/2.
"""

import torch
from torch import Tensor

from lq.functional.affine_errors import Errors, absolute, divergence, power, squared
from lq.functional.histogram import grow
from lq.functional.threshold import Search, percentile_edges, without_outliers

# Fractions of the largest value, and of the smallest, that are tried, and into how many parts the step between them is cut then.
COARSE, FINE = 32, 8
METHODS = ("max", "noclipping", "percentile", "mse", "mae", "lp", "kl")


def check_affine(method: str, search: Search) -> None:
    """Raise ``ValueError`` for a method or an option that has no affine form."""
    if method not in METHODS:
        raise ValueError(f"`method` is {method!r}: for an affine range choose one of {', '.join(METHODS)}.")
    if not isinstance(search.num_bits, int):
        raise ValueError(f"`num_bits` is {search.num_bits}: floats have no affine form.")
    if search.power_of_two:
        raise ValueError("`power_of_two` is True: a power of two is a symmetric amax, not a range.")


@torch.no_grad()
def affine_range(counts: Tensor, exponent: Tensor, peak: Tensor, method: str, search: Search) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of the grid, ``(rows,)`` each, dtype of ``peak``.

    ``max`` takes all that was seen; ``percentile`` cuts half of the remaining percentage off at either side; ``mse``, ``mae`` and
    ``lp`` have the least :math:`\\sum_b c_b |x_b - Q(x_b)|^p` on the grid of Jacob et al. (2018, arXiv:1712.05877, eq. 1), where
    Sony MCT's ``UNIFORM`` searches both ends by turns; ``kl`` is :func:`lq.functional.divergence.kl` with two ends.

    Args:
        counts: int64 ``(2, rows, bins)``: magnitudes of the negative values, and of the others.
        exponent: each covers ``[0, 2**exponent)``, int32 ``(2, rows)``.
        peak: magnitudes of the smallest and of the largest value, ``(2, rows)``; 0 where there is none of that sign.
        method: one of :data:`METHODS`.
        search: ``num_bits``, ``percentile``, ``p``, ``z_threshold``, and ``min_threshold``, which here is the least width.

    Raises:
        ValueError: a method or an option that has no affine form.

    >>> counts = torch.tensor([[[0, 0, 0, 0]], [[10, 20, 30, 40]]])
    >>> affine_range(counts, torch.zeros(2, 1, dtype=torch.int32), torch.tensor([[0.0], [0.9]]), "max", Search())
    (tensor([0.]), tensor([0.9000]))
    """
    check_affine(method, search)
    signed, width = _signed(counts, exponent)
    if search.z_threshold != float("inf"):
        signed = without_outliers(signed, search.z_threshold)
    seen = peak.double() / width
    assert isinstance(search.num_bits, int)
    if method == "percentile":
        ends = _tails(signed, search.percentile)
    elif method in ("max", "noclipping") or 2**search.num_bits >= signed.shape[1]:
        # a level for each bin: nothing is lost by taking all
        ends = _occupied(signed)
    else:
        ends = _least(_errors(signed, method, search), _occupied(signed))
    filled = signed.sum(dim=1) > 0
    low, high = (torch.where(filled, torch.minimum(end, most), most) * width for end, most in zip(ends, seen, strict=True))
    return (0.0 - low).to(peak.dtype), torch.maximum(high, search.min_threshold - low).to(peak.dtype)


def _signed(counts: Tensor, exponent: Tensor) -> tuple[Tensor, Tensor]:
    """One float64 histogram ``(rows, 2 bins)`` with zero in its middle, and the width of its bins ``(rows,)``."""
    common = exponent.amax(dim=0)
    negative, positive = (grow(c, e, common) for c, e in zip(counts, exponent, strict=True))
    width = torch.ldexp(torch.ones_like(common, dtype=torch.float64), common) / counts.shape[2]
    return torch.cat([negative.flip(1), positive], dim=1).double(), width


def _occupied(signed: Tensor) -> tuple[Tensor, Tensor]:
    """Distances from zero to the outer edges of the outermost bins that are not empty, float64 ``(rows,)``."""
    bins = signed.shape[1] // 2
    distance = torch.arange(1, bins + 1, dtype=torch.float64, device=signed.device)
    sides = signed[:, :bins].flip(1), signed[:, bins:]
    low, high = (torch.where(side > 0, distance, 0).amax(dim=1) for side in sides)
    return low, high


def _tails(signed: Tensor, percentile: float) -> tuple[Tensor, Tensor]:
    """Ends beyond which at most half of what ``percentile`` leaves over lies."""
    bins, kept = signed.shape[1] // 2, 50 + percentile / 2
    high = percentile_edges(signed, kept) - bins
    low = percentile_edges(signed.flip(1), kept) - bins
    return low.clamp_min(0).double(), high.clamp_min(0).double()


def _errors(signed: Tensor, method: str, search: Search) -> Errors:
    assert isinstance(search.num_bits, int)
    if method == "lp":
        return power(signed, search.num_bits, search.p)
    return {"mse": squared, "mae": absolute, "kl": divergence}[method](signed, search.num_bits)


def _least(errors: Errors, most: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Distances of both ends from zero with the least error; of equals the widest range."""
    steps = torch.arange(COARSE, 0, -1, dtype=torch.float64, device=most[0].device) / COARSE
    fine = torch.arange(FINE, -FINE - 1, -1, dtype=torch.float64, device=most[0].device) / (COARSE * FINE)
    a, b = (f.reshape(1, -1).expand(len(most[0]), -1) for f in torch.meshgrid(steps, steps, indexing="ij"))
    a, b = _best(errors, most, a, b)
    da, db = (f.reshape(1, -1) for f in torch.meshgrid(fine, fine, indexing="ij"))
    a, b = ((best.unsqueeze(1) + d).clamp(1 / (COARSE * FINE), 1) for best, d in ((a, da), (b, db)))
    a, b = _best(errors, most, a, b)
    return a * most[0], b * most[1]


def _best(errors: Errors, most: tuple[Tensor, Tensor], a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Of fractions ``(rows, candidates)`` of ``most``, those with the least error; of equals the first."""
    found = errors(a * most[0].unsqueeze(1), b * most[1].unsqueeze(1))
    least = found.amin(dim=1, keepdim=True)
    first = (found <= least * (1 + 1e-9) + 1e-12).int().argmax(dim=1, keepdim=True)
    return a.gather(1, first).squeeze(1), b.gather(1, first).squeeze(1)
